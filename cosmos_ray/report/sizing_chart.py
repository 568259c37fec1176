"""The chart of `size`: what the fleet gives with more and more workers, and where the bottleneck moves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from cosmos_ray.report import style
from cosmos_ray.sizing.fleet import Outcome, Shape


def draw_sizes(shapes: Sequence[Shape], outcomes: Sequence[Outcome]) -> Figure:
    """Episodes per hour, and how busy cores and inference are, over the number of workers."""
    figure, (speed, busy) = style.figure(9.6, 2.9, columns=2)
    workers = [shape.workers for shape in shapes]
    speed.plot(workers, [out.episodes_h for out in outcomes], "o-", color=style.BLUE, label="simulated")
    speed.plot(workers, [outcomes[0].episodes_h * count / workers[0] for count in workers], "--", color=style.MUTED, label="in proportion")
    speed.set(xscale="log", yscale="log")
    busy.plot(workers, [100 * out.cores_busy for out in outcomes], "o-", color=style.GREEN, label="cores")
    busy.plot(workers, [100 * out.actors_busy for out in outcomes], "o-", color=style.VERMILION, label="inference actors")
    busy.set(xscale="log", ylim=(0, 105))
    style.label(speed, "rollout workers", "episodes per hour", "What the fleet gives")
    style.label(busy, "rollout workers", "busy, %", "Where the bottleneck is")
    for axis in (speed, busy):
        style.legend(axis)
    return figure
