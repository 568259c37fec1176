"""Draws a stored episode: a filmstrip PNG, or an mp4 at the speed of the simulation."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.report import style
from cosmos_ray.report.filmstrip import pick

COLUMNS = 8  #: of a filmstrip that chooses its steps itself
MOST_COLUMNS = 40  #: of a filmstrip whose steps are given
DEFAULT_RATE = 20  #: control steps per second of episodes that do not record it
VIDEO_SIDE = 320  #: smaller pictures are enlarged by a whole number to at least this many pixels

# Filmstrip lengths in inches: fixed cells keep labels apart whatever the number of columns and cameras.
_LEFT, _RIGHT, _CELL, _GAP, _LEAST_WIDTH = 1.1, 0.25, 1.25, 0.06, 10.3
_TITLE, _HEAD, _CURVE, _BETWEEN, _BOTTOM = 0.78, 0.32, 0.95, 0.24, 0.5
# Video lengths in pixels.
_BAND, _SEPARATOR, _MARGIN = 30, 4, 8


def save_episode(episode: Episode, path: str | Path, every: int | None = None) -> None:
    """Write ``episode`` to ``path`` as a filmstrip (``.png``) or as H.264 video (``.mp4``), whole or not at all.

    Shows only steps that have frames. A filmstrip shows 8 of them, evenly spread. With ``every``, both formats show the steps at its
    multiples, and the last step. A video shows each frame until the next one, so it runs at the episode's control frequency.

    Raises:
        ConfigError: the suffix is another one, the episode has no frames, ``every`` is below 1 or makes the filmstrip too long, or the file
            cannot be written.
        StoreError: a frame is no JPEG.
    """
    path = Path(path)
    writers = {".png": _write_png, ".mp4": _write_mp4}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise ConfigError(f"cannot write an episode as {path.name!r}: the name must end in .png (filmstrip) or .mp4 (video)")
    if every is not None and every < 1:
        raise ConfigError(f"cannot show every {every} steps of an episode: give 1 or more")
    if not episode.frames:
        raise ConfigError(f"episode {episode.key.name} has no stored frames to show: render them from its states first")
    _whole(path, lambda temporary: write(episode, temporary, every))


def draw_episode(episode: Episode, every: int | None = None) -> Figure:
    """Draw the filmstrip: a column per shown step, a row per camera, and below them predictions, actions and rewards of all steps."""
    steps = _strip_steps(episode, every)
    width = max(_LEAST_WIDTH, _LEFT + _RIGHT + _CELL * len(steps))
    cell = min((width - _LEFT - _RIGHT) / len(steps), 2.2)
    image = cell - _GAP
    ratios = [_size(episode.frames[steps[0]][camera]) for camera in range(len(episode.cameras))]
    heights = [image * h / w for h, w in ratios]
    curves = _curves(episode)
    strip = sum(heights) + _GAP * len(heights)
    height = _TITLE + _HEAD + strip + (_CURVE + _BETWEEN) * len(curves) + _BOTTOM
    figure = style.blank(width, height)
    _draw_title(figure, episode, steps)
    for column, step in enumerate(steps):
        top, left = _TITLE + _HEAD, _LEFT + column * cell
        _text(figure, left + image / 2, top - 0.15, f"step {step}" if column == 0 else str(step), ha="center", fontweight="bold")
        for camera, drawn in enumerate(heights):
            axis = _axes(figure, left, top, image, drawn)
            axis.imshow(decode_jpeg(episode.frames[step][camera]), interpolation="nearest", aspect="auto")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(style.GRID)
            if column == 0:
                _text(figure, _LEFT - 0.12, top + drawn / 2, _wrapped(episode.cameras[camera]), ha="right", size=style.FONT - 1)
            top += drawn + _GAP
    top = _TITLE + _HEAD + strip + _BETWEEN
    for index, draw in enumerate(curves):
        axis = _axes(figure, _LEFT, top, width - _LEFT - _RIGHT, _CURVE)
        style.tidy(axis)
        for step in steps:
            axis.axvline(step, color=style.GRID, linewidth=3, zorder=0)
        draw(axis, episode)
        last = index == len(curves) - 1
        axis.set_xlim(-0.01 * episode.length, 1.01 * episode.length)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.tick_params(labelbottom=last)
        if last:
            style.label(axis, "control step (grey: shown above)", axis.get_ylabel())
        top += _CURVE + _BETWEEN
    return figure


def outcome_text(episode: Episode) -> str:
    """How the episode ended, for a title."""
    if episode.invalid:
        return f"simulation broke after {episode.length} steps"
    graded = f", score {episode.score:.2f}" if episode.score is not None else ""
    if episode.success:
        return f"success after {episode.length} steps{graded}"
    return f"{'timed out' if episode.timed_out else 'failed'} after {episode.length} steps{graded}"


def _chosen(episode: Episode, every: int | None) -> list[int]:
    """The steps that have frames; with ``every``, those at its multiples and the last."""
    rendered = sorted(episode.frames)
    return rendered if every is None else [step for step in rendered if step % every == 0 or step == rendered[-1]]


def _strip_steps(episode: Episode, every: int | None) -> list[int]:
    steps = _chosen(episode, every)
    if every is None:
        return [steps[index] for index in pick(len(steps), COLUMNS)]
    if len(steps) > MOST_COLUMNS:
        raise ConfigError(f"every {every} steps would be {len(steps)} columns of a filmstrip, at most {MOST_COLUMNS} fit: take "
                          f"{-(-episode.length // (MOST_COLUMNS - 2))} or more, or write a .mp4")
    return steps


def _draw_title(figure: Figure, episode: Episode, steps: list[int]) -> None:
    """Draw the task and the outcome, and below them the origin of the episode."""
    key, colour = episode.key, style.GREEN if episode.success else style.VERMILION
    made = _text(figure, 0.2, 0.24, f"{_short(key.task, 60)}, seed {key.seed}:", size=style.FONT + 2, fontweight="bold")
    right = made.get_window_extent(figure.canvas.get_renderer()).x1 / figure.dpi + 0.07
    _text(figure, right, 0.24, outcome_text(episode), size=style.FONT + 2, fontweight="bold", color=colour)
    policy = "demonstration" if episode.policy_version < 0 and key.source == "demo" else f"policy version {episode.policy_version}"
    initial = getattr(key, "initial_state", "")
    began = [f"initial state {_short(initial, 30)}"] if initial else []
    parts = [f"“{_short(' / '.join(episode.instructions), 60)}”", policy, *began, _short(key.name, 70)]
    _text(figure, 0.2, 0.52, "   ·   ".join(parts), color=style.MUTED)


def _curves(episode: Episode) -> list[Callable]:
    """The curves below the pictures. Values are among them only where the episode has predictions."""
    return ([_draw_values] if np.isfinite(episode.predicted_values).any() else []) + [_draw_actions, _draw_rewards]


def _draw_values(axis, episode: Episode) -> None:
    """Predicted values, at the decisions."""
    steps = np.flatnonzero(np.isfinite(episode.predicted_values))
    axis.plot(steps, episode.predicted_values[steps], color=style.VERMILION, linewidth=1.4, marker="o", markersize=3, clip_on=False)
    axis.yaxis.set_major_locator(MaxNLocator(3))
    _name(axis, "predicted\nvalue")


def _draw_actions(axis, episode: Episode) -> None:
    """Draw the size of the motion command, and the last entry, which closes the gripper in robosuite's action spaces."""
    steps = np.arange(episode.length)
    if episode.actions.shape[1] > 1:
        norm = np.linalg.norm(episode.actions[:, :-1], axis=1)
        axis.step(steps, norm, where="post", color=style.BLUE, linewidth=1.3, label="norm of the motion")
    axis.step(steps, episode.actions[:, -1], where="post", color=style.ORANGE, linewidth=1.3, label="last entry (gripper, 1 closes)")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    axis.set_yticks([tick for tick in MaxNLocator(4, integer=True).tick_values(low, high) if low <= tick <= high])
    style.legend(axis, ncols=2, loc="upper right", borderaxespad=0.0)
    _name(axis, "action")


def _draw_rewards(axis, episode: Episode) -> None:
    """Draw rewards as bars, and a mark at the end of the episode."""
    steps = np.arange(1, episode.length + 1)  # the state that earned it
    rewards = np.nan_to_num(episode.rewards)
    axis.vlines(steps, 0, rewards, color=style.GREEN, linewidth=2)
    axis.axhline(0, color=style.MUTED, linewidth=0.7)
    top, bottom = max(1.0, float(rewards.max())), min(0.0, float(rewards.min()))
    marker, colour = ("*", style.GREEN) if episode.success else ("X", style.VERMILION)
    axis.plot([episode.length], [max(0.0, float(rewards[-1]))], marker=marker, markersize=10, color=colour, clip_on=False)
    axis.set_ylim(bottom * 1.1, top * 1.15)
    ticks = sorted({bottom, 0.0, top})
    axis.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    word = "success" if episode.success else "broken" if episode.invalid else "no success"
    axis.annotate(word, (episode.length, max(0.0, float(rewards[-1]))), xytext=(-10, 5 if rewards[-1] <= 0 else -3), ha="right",
                  textcoords="offset points", va="bottom" if rewards[-1] <= 0 else "center", fontsize=style.FONT - 1, color=colour)
    _name(axis, "reward")


def _name(axis, text: str) -> None:
    """Label the axis at a fixed place, which aligns the labels of all rows."""
    axis.set_ylabel(text, fontsize=style.FONT - 0.5, color=style.INK)
    axis.yaxis.set_label_coords(-0.62 / (axis.get_position().width * axis.figure.get_size_inches()[0]), 0.5)


def _axes(figure: Figure, left: float, top: float, width: float, height: float):
    """Axes at a place given in inches from the upper left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes((left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height))


def _text(figure: Figure, left: float, top: float, text: str, size: float = style.FONT, color: str = style.INK, **options):
    """Text at a place given in inches from the upper left corner. Never read as a formula."""
    width, height = figure.get_size_inches()
    return figure.text(left / width, 1 - top / height, text, fontsize=size, color=color, va="center", parse_math=False, **options)


def _wrapped(name: str) -> str:
    """A camera's name on lines of about 12 characters, broken after underscores and within longer words."""
    lines = [""]
    for word in re.findall(r"[^_]{1,11}_?|_", _short(name, 40)):
        if lines[-1] and len(lines[-1]) + len(word) > 12:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _short(text: str, most: int) -> str:
    """One line of at most ``most`` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _size(jpeg: bytes) -> tuple[int, int]:
    return decode_jpeg(jpeg).shape[:2]


def _write_png(episode: Episode, path: Path, every: int | None) -> None:
    path.write_bytes(style.png(draw_episode(episode, every)))


def _write_mp4(episode: Episode, path: Path, every: int | None) -> None:
    """One picture per control step 0..T, at the control frequency."""
    import av

    steps = _chosen(episode, every)
    canvas = _Canvas(episode)
    shown = steps[0]
    wanted = set(steps)
    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=_rate(episode), options={"crf": "18", "preset": "veryfast"})
            stream.height, stream.width = canvas.height, canvas.width
            stream.pix_fmt = "yuv420p"
            for step in range(episode.length + 1):
                shown = step if step in wanted else shown
                container.mux(stream.encode(av.VideoFrame.from_ndarray(canvas.draw(step, shown), format="rgb24")))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:  # some are an OSError, some are not
        raise OSError(error.errno, error.strerror) from error


def _rate(episode: Episode) -> Fraction:
    """Pictures per second: the episode's control steps, 20 where it does not say."""
    rate = episode.embodiment.control_freq
    return Fraction(rate if 1 <= rate <= 500 else DEFAULT_RATE).limit_denominator(1001)


class _Canvas:
    """Draws the video pictures of one episode: cameras side by side, the episode's name above, the present step below."""

    def __init__(self, episode: Episode):
        self.episode = episode
        sizes = [_size(jpeg) for jpeg in episode.frames[min(episode.frames)]]
        self.factors = [max(1, -(-VIDEO_SIDE // max(size))) for size in sizes]
        self.sizes = [(h * f, w * f) for (h, w), f in zip(sizes, self.factors, strict=True)]
        width = sum(w for _, w in self.sizes) + _SEPARATOR * (len(sizes) - 1)
        self.width = max(width + width % 2, VIDEO_SIDE)  # 4:2:0 needs even sides
        tallest = max(h for h, _ in self.sizes)
        self.height = tallest + tallest % 2 + 2 * _BAND
        self.font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 15)
        self._decoded: tuple[int, np.ndarray] | None = None

    def draw(self, step: int, shown: int) -> np.ndarray:
        """The picture (H, W, 3) uint8 at ``step``, with the frame of step ``shown``."""
        image = Image.fromarray(self._pictures(shown))
        draw = ImageDraw.Draw(image)
        key, episode = self.episode.key, self.episode
        ended = step == episode.length
        self._line(draw, 0, f"{key.task}  seed {key.seed}  {key.source}", outcome_text(episode), True)
        self._line(draw, self.height - _BAND, f"step {step} / {episode.length}", f"frame of step {shown}" if shown != step else "", ended)
        return np.asarray(image)

    def _line(self, draw: ImageDraw.ImageDraw, top: int, left_text: str, right_text: str, coloured: bool) -> None:
        """Draw one band: text on the left, and text on the right as far as there is room."""
        ink = style.GREEN if self.episode.success else style.VERMILION
        middle = top + _BAND // 2
        right_width = draw.textlength(right_text, self.font)
        room = self.width - 2 * _MARGIN - right_width - (2 * _MARGIN if right_text else 0)
        while left_text and draw.textlength(left_text, self.font) > room:
            left_text = left_text[:-2].rstrip() + "…" if len(left_text) > 2 else ""
        draw.text((_MARGIN, middle), left_text, style.INK, self.font, anchor="lm")
        draw.text((self.width - _MARGIN, middle), right_text, ink if coloured else style.MUTED, self.font, anchor="rm")

    def _pictures(self, shown: int) -> np.ndarray:
        """A white picture with the enlarged frames of a step; their pixels are squares."""
        if self._decoded is None or self._decoded[0] != shown:
            canvas = np.full((self.height, self.width, 3), 255, np.uint8)
            left = (self.width - sum(w for _, w in self.sizes) - _SEPARATOR * (len(self.sizes) - 1)) // 2
            for jpeg, factor, (height, width) in zip(self.episode.frames[shown], self.factors, self.sizes, strict=True):
                picture = decode_jpeg(jpeg).repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]
                canvas[_BAND : _BAND + len(picture), left : left + picture.shape[1]] = picture
                left += width + _SEPARATOR
            self._decoded = shown, canvas
        return self._decoded[1]


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary file beside ``path``, sync it, rename it to ``path``. ConfigError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
