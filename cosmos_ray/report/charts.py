"""The charts of the report. Each draws one part of the report dict."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from cosmos_ray.report import style

WIDTH = 9.6  #: inches, of every full-width figure


def draw_arms(arms: list[dict]) -> Figure:
    """Success rate and interval of every arm, and the initial states that each arm solved."""
    figure, (rates, states) = style.figure(WIDTH, 1.5 + 0.42 * len(arms), 1, 2, width_ratios=(1, 1.25))
    rows = range(len(arms))
    colours = [style.ARMS[i % len(style.ARMS)] for i in rows]
    names = [arm["name"] for arm in arms]
    style.tidy(rates, grid="x")
    rates.barh(rows, [arm["rate"] for arm in arms], height=0.62, color=colours, alpha=0.35)
    for i, arm in enumerate(arms):
        rates.plot([arm["low"], arm["high"]], [i, i], color=colours[i], linewidth=2.2, solid_capstyle="butt")
        rates.plot([arm["rate"]], [i], "o", color=colours[i], markersize=6)
        rates.text(1.03, i, f"{arm['successes']}/{arm['episodes']}", va="center", fontsize=style.FONT, color=style.INK)
    rates.set(xlim=(0, 1), yticks=list(rows), yticklabels=names, ylim=(len(arms) - 0.4, -0.6))
    rates.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.label(rates, "success rate, with Wilson 95 % interval", "", "Success on held-out initial states")
    style.tidy(states, grid="")
    _draw_states(states, arms, colours)
    return figure


def _draw_states(axis, arms: list[dict], colours: list[str]) -> None:
    """One cell per arm and initial state: filled where it succeeded. Ordered by how many arms solved it."""
    matrix = [arm["outcomes"] for arm in arms]
    order = sorted(range(len(matrix[0])), key=lambda i: (-sum(row[i] for row in matrix), [-row[i] for row in matrix]))
    for i, row in enumerate(matrix):
        for outcome in (1, 0):
            x = [column for column, state in enumerate(order) if row[state] == outcome]
            axis.bar(x, [0.62] * len(x), bottom=i - 0.31, width=1.0, color=colours[i] if outcome else "#eef0f2", edgecolor=style.PAPER,
                     linewidth=0.8 if len(order) <= 150 else 0)
    axis.set(xlim=(-0.5, len(order) - 0.5), ylim=(len(arms) - 0.4, -0.6), yticks=[])
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.spines["left"].set_visible(False)
    style.label(axis, "initial states, those solved by most arms first", "", "Which ones (filled: succeeded)")


def draw_training(curves: dict[str, dict]) -> Figure:
    """Loss, and error per frame of the latent sequence, of each training stage."""
    figure, axes = style.figure(WIDTH, 0.4 + 2.15 * len(curves), len(curves), 2)
    titles = {"pretrain": "Pretraining on demonstrations", "planning": "Planning network on rollouts",
              "refine": "Refinement on demonstrations and rollouts"}
    for i, (stage, curve) in enumerate(curves.items()):
        loss, errors = axes[2 * i], axes[2 * i + 1]
        _line(loss, curve, "loss", style.INK)
        _scale(loss)
        style.label(loss, "learner step", "loss", titles[stage])
        for frame, colour in (("action", style.BLUE), ("future", style.VERMILION), ("value", style.GREEN)):
            _line(errors, curve, frame, colour)
        _scale(errors)
        style.label(errors, "learner step", "mean absolute error\n(latent units)", "Error per frame type")
        if errors.lines:
            style.legend(errors, ncols=3, loc="upper right")
            low, high = errors.get_ylim()
            logarithmic = errors.get_yscale() == "log"
            errors.set_ylim(low, high * (high / low) ** 0.22 if logarithmic else high + 0.22 * (high - low))  # room for the legend
    return figure


def _line(axis, curve: dict, key: str, colour: str) -> None:
    points = [(x, y) for x, y in zip(curve["step"], curve.get(key, []), strict=False) if y is not None and y > 0]
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=key, marker="o" if len(points) < 3 else None, markersize=4)


def _scale(axis) -> None:
    """Make the axis logarithmic where the values span enough for labelled ticks."""
    values = [y for line in axis.lines for y in line.get_ydata()]
    if values and max(values) > 5 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_versions(rows: list[dict]) -> Figure:
    """Success of rollouts by policy version, with intervals and episode counts."""
    figure, (axis,) = style.figure(WIDTH, 2.5)
    x = range(len(rows))
    rate = [row["successes"] / row["episodes"] for row in rows]
    axis.vlines(x, [row["low"] for row in rows], [row["high"] for row in rows], color=style.SKY, linewidth=5)
    axis.plot(x, rate, "o-", color=style.BLUE, markersize=5, linewidth=1.0)
    ticks = list(x) if len(rows) <= 24 else list(x)[:: math.ceil(len(rows) / 24)]
    axis.set(ylim=(0, 1.02), xlim=(-0.6, len(rows) - 0.4), xticks=ticks,
             xticklabels=[f"{rows[i]['version']}\n{rows[i]['successes']}/{rows[i]['episodes']}" for i in ticks])
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.label(axis, "policy version that began the episode (below: successes / episodes)", "success rate",
                "Rollouts by policy version, Wilson 95 % intervals")
    return figure


def draw_rounds(rows: list[dict]) -> Figure:
    """Success by round: each way to act on the held-out initial states, and the rollouts that the round collected."""
    figure, (axis,) = style.figure(WIDTH, 2.8)
    series: dict[str, dict[int, dict]] = {}
    for row in rows:
        for arm, counted in row["arms"].items():
            _, _, plans = arm.partition(" + ")
            series.setdefault(f"evaluation, with {plans}" if plans else "evaluation, policy alone", {})[row["round"]] = counted
        if row["rollouts"]:
            series.setdefault("rollouts collected in the round", {})[row["round"]] = row["rollouts"]
    colours = {name: style.ARMS[1 + i] for i, name in enumerate(sorted(series))}
    for i, (name, points) in enumerate(sorted(series.items())):
        shift = 0.07 * (i - (len(series) - 1) / 2)  # so that intervals of one round do not hide each other
        x, counts = [number + shift for number in points], points.values()
        axis.vlines(x, [c["low"] for c in counts], [c["high"] for c in counts], color=colours[name], linewidth=1.6, alpha=0.6)
        rates = [c["successes"] / c["episodes"] for c in counts]
        axis.plot(x, rates, "o-", color=colours[name], markersize=5, linewidth=1.2, label=name)
    numbers = [row["round"] for row in rows]
    axis.set(ylim=(0, 1.02), xlim=(min(numbers) - 0.4, max(numbers) + 0.4))
    axis.xaxis.set_major_locator(MaxNLocator(24, integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.label(axis, "round (0 is the base policy)", "success rate", "Success by round, Wilson 95 % intervals")
    axis.legend(frameon=False, fontsize=style.FONT - 1, labelcolor=style.INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_planning(planning: dict) -> Figure:
    """How often each candidate was chosen, and how far apart the candidates' scores were."""
    figure, (picks, spreads) = style.figure(WIDTH, 2.4, 1, 2)
    counts = planning["picks"]
    colours = [style.MUTED] + [style.BLUE] * (len(counts) - 1)
    picks.bar(range(len(counts)), [c / planning["decisions"] for c in counts], color=colours, width=0.8)
    picks.axhline(1 / len(counts), color=style.VERMILION, linewidth=1.1, linestyle=(0, (4, 3)), label="if the choice were random")
    picks.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    picks.xaxis.set_major_locator(MaxNLocator(min(len(counts), 16), integer=True))
    picks.set_ylim(0, 1.28 * max(max(counts) / planning["decisions"], 1 / len(counts)))
    style.label(picks, "chosen candidate (0 is the policy's own)", "share of decisions", "What the planner chose")
    style.legend(picks, loc="upper right")
    spreads.hist(planning["spreads"], bins=24, range=(0, max(max(planning["spreads"]), 0.01)), color=style.SKY)
    median = planning["median_spread"]
    spreads.axvline(median, color=style.VERMILION, linewidth=1.4, linestyle=(0, (4, 3)), label=f"median {median:.3f}")
    spreads.set_ylim(0, 1.22 * spreads.get_ylim()[1])
    style.label(spreads, "score of best minus worst candidate", "decisions", "How far candidates differ")
    style.legend(spreads, loc="upper right")
    return figure


def draw_calibration(rows: list[dict]) -> Figure:
    """Predicted value against the outcome, and the number of decisions in each bin."""
    figure, (curve, counts) = style.figure(WIDTH, 3.0, 1, 2, width_ratios=(1.15, 1))
    style.tidy(curve, grid="both")
    curve.plot([0, 1], [0, 1], color=style.MUTED, linewidth=1, linestyle=(0, (4, 3)), label="ideal")
    x = [row["predicted"] for row in rows]
    curve.plot(x, [row["mean_target"] for row in rows], "s-", color=style.VERMILION, markersize=5, linewidth=1.5, label="discounted return")
    curve.plot(x, [row["success_share"] for row in rows], "o-", color=style.BLUE, markersize=5, linewidth=1.5, label="share that succeeded")
    curve.set(xlim=(0, 1), ylim=(0, 1.02))
    style.label(curve, "predicted value, rescaled to [0, 1]", "what happened", "Calibration of the value")
    style.legend(curve, loc="upper left")
    middle = [(row["low"] + row["high"]) / 2 for row in rows]
    width = 0.9 * (rows[0]["high"] - rows[0]["low"])
    won = [row["success_share"] * row["count"] for row in rows]
    counts.bar(middle, won, width=width, color=style.BLUE, label="in successes")
    lost = [row["count"] - w for row, w in zip(rows, won, strict=True)]
    counts.bar(middle, lost, bottom=won, width=width, color="#c9ced4", label="in failures")
    counts.set_xlim(0, 1)
    style.label(counts, "predicted value, rescaled to [0, 1]", "decisions", "Decisions per bin")
    style.legend(counts, loc="upper center")
    return figure
