"""The filmstrip of a planned episode: frames seen, imagined and happened, the candidates' scores, and the value over time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cosmos_ray.errors import ConfigError
from cosmos_ray.report import style

if TYPE_CHECKING:
    from cosmos_ray.report.trace import EpisodeTrace

MAX_DECISIONS = 8
_ROWS = ("seen", "imagined", "happened")

# All lengths in inches: fixed cells keep labels apart whatever the number of decisions and cameras.
_WIDTH, _LEFT, _RIGHT, _CELL = 10.8, 0.95, 0.15, 1.62
_TITLE, _HEAD, _GAP, _CAMERA_GAP, _BARS, _CURVE = 0.5, 0.36, 0.05, 0.16, 0.95, 1.75


def draw_filmstrip(trace: EpisodeTrace) -> Figure:
    """Draw one column per decision and one block of rows per camera. Of more than 8 decisions, draw 8, evenly spread.

    ConfigError when the trace has no decision.
    """
    if not trace.steps:
        raise ConfigError(f"planned episode {trace.seed} of {trace.task} has no decision to draw: choose another --plan-seed")
    picked = pick(len(trace.steps), MAX_DECISIONS)
    cell = min(_CELL, (_WIDTH - _LEFT - _RIGHT) / len(picked))
    image = cell - _GAP
    strip = 3 * (image + _GAP) * len(trace.cameras) + _CAMERA_GAP * len(trace.cameras)
    height = _TITLE + _HEAD + strip + 0.2 + _BARS + 0.72 + _CURVE + 0.5
    figure = style.blank(_WIDTH, height)
    figure.text(_LEFT / _WIDTH, 1 - 0.22 / height, _title(trace), fontsize=style.FONT + 2, fontweight="bold", color=style.INK, va="center")
    for column, index in enumerate(picked):
        top = _TITLE + _HEAD
        x = _LEFT + column * cell
        figure.text((x + image / 2) / _WIDTH, 1 - (top - 0.17) / height, f"step {trace.steps[index]}", fontsize=style.FONT,
                    color=style.INK, ha="center", va="center", fontweight="bold")
        for camera in range(len(trace.cameras)):
            for row, frames in enumerate((trace.observed, trace.imagined, trace.happened)):
                axis = _axes(figure, x, top, image, image)
                _show(axis, frames[index][camera], row, column == 0)
                top += image + _GAP
            if column == 0:
                _name_camera(figure, trace.cameras[camera], top - 1.5 * (image + _GAP), height)
            top += _CAMERA_GAP
        _draw_scores(_axes(figure, x + 0.04, top + 0.2, image - 0.08, _BARS), trace, index, column == 0)
    _draw_curve(_axes(figure, _LEFT, height - 0.5 - _CURVE, _WIDTH - _LEFT - _RIGHT - 0.1, _CURVE), trace, picked)
    return figure


def save_filmstrip(trace: EpisodeTrace, path: str | Path) -> None:
    """Write the filmstrip as PNG, whole or not at all. ConfigError for a trace without a decision, or a file that cannot be written."""
    path = Path(path)
    data = style.png(draw_filmstrip(trace))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write the filmstrip {path}: {error.strerror}") from error


def pick(count: int, most: int) -> list[int]:
    """At most ``most`` numbers of ``range(count)``, evenly spread, with both ends."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def _title(trace: EpisodeTrace) -> str:
    end = f"succeeded after {trace.length} steps" if trace.success else f"failed after {trace.length} steps"
    return f"{trace.task}, initial state {trace.seed}: best of {trace.candidates} {end}"


def _axes(figure: Figure, left: float, top: float, width: float, height: float):
    """Axes at a place given in inches from the upper left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes((left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height))


def _show(axis, image: np.ndarray, row: int, first: bool) -> None:
    """Draw one frame with its pixels as squares, and an imagined frame with a coloured border."""
    axis.imshow(image, interpolation="nearest", aspect="auto")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color(style.VERMILION if row == 1 else style.GRID)
        spine.set_linewidth(1.6)
    if first:
        colour = style.VERMILION if row == 1 else style.INK
        axis.set_ylabel(_ROWS[row], fontsize=style.FONT - 0.5, color=colour, rotation=0, ha="right", va="center")


def _name_camera(figure: Figure, name: str, centre: float, height: float) -> None:
    figure.text(0.14 / _WIDTH, 1 - centre / height, name, rotation=90, fontsize=style.FONT - 0.5, color=style.INK, ha="center", va="center")


def _draw_scores(axis, trace: EpisodeTrace, index: int, first: bool) -> None:
    """Draw a bar per candidate, the chosen one in colour. All decisions share one scale."""
    scores, chosen = np.asarray(trace.scores[index], np.float64), trace.chosen[index]
    style.tidy(axis)
    colours = ["#b9c1c9"] * len(scores)
    colours[chosen] = style.VERMILION
    axis.bar(range(len(scores)), scores, color=colours, width=0.8 if len(scores) <= 40 else 1.0)
    top = max(max(row) for row in trace.scores)
    axis.set(ylim=(0, 1.05 * top if top > 0 else 1), xticks=[], xlim=(-0.7, len(scores) - 0.3))
    text = f"no. {chosen}: {scores[chosen]:.2f}\nspread {scores.max() - scores.min():.2f}"
    axis.set_xlabel(text, fontsize=style.FONT - 1, color=style.INK, labelpad=3)
    if first:
        axis.set_ylabel("candidate\nscore", fontsize=style.FONT - 0.5, color=style.INK)
    else:
        axis.set_yticklabels([])


def _draw_curve(axis, trace: EpisodeTrace, picked: list[int]) -> None:
    """Policy value and candidate scores over the episode."""
    style.tidy(axis)
    steps = np.asarray(trace.steps)
    low, mean, high = (np.array([f(row) for row in trace.scores]) for f in (np.min, np.mean, np.max))
    value = np.clip((np.asarray(trace.values) + 1) / 2, 0, 1)
    for index in picked:
        axis.axvline(steps[index], color=style.GRID, linewidth=4, zorder=0)
    if trace.candidates > 1:
        axis.fill_between(steps, low, high, color=style.SKY, alpha=0.35, linewidth=0, label="candidate scores, worst to best")
        axis.plot(steps, mean, color=style.BLUE, linewidth=1.4, label="mean score", marker="o", markersize=3)
        axis.plot(steps, high, color=style.BLUE, linewidth=0.8, linestyle=(0, (4, 2)), label="best score")
    axis.plot(steps, value, color=style.VERMILION, linewidth=1.8, label="policy value of the chosen chunk", marker="o", markersize=4)
    bottom, top = min(low.min(), value.min()), max(high.max(), value.max())
    margin = 0.1 * max(top - bottom, 0.1)
    axis.set(xlim=(steps[0] - 0.6, max(steps[-1], 1) + 0.6), ylim=(bottom - margin, top + 3.2 * margin))
    axis.set_yticks([tick for tick in axis.get_yticks() if bottom - margin <= tick <= 1])  # the room above 1 is for the legend
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    style.label(axis, "control step of the decision (grey: shown above)", "value in [0, 1]")
    style.legend(axis, ncols=4, loc="upper left")
