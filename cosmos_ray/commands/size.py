"""The command `size`: what a cluster gives, from a probe of this machine and a simulation of the fleet."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_ray.config.recipes import recipe
from cosmos_ray.config.settings import new_config
from cosmos_ray.errors import ConfigError

if TYPE_CHECKING:  # `--help` needs no simulator
    from cosmos_ray.sizing.fleet import Outcome, Shape
    from cosmos_ray.sizing.probe import Probe

HELP = "estimate episodes/h, memory and cost of a cluster"
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)  #: workers of the plot


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `size`."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the cluster [1]")
    parser.add_argument("--cores", type=int, default=2, metavar="N", help="cores of each node [2]")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="rollout workers in all, 0 = one for each core [0]")
    parser.add_argument("--envs", type=int, default=6, metavar="N", help="episodes that each worker runs at once [6]")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="inference actors in all [1]")
    parser.add_argument("--gpu-speed", type=float, default=0.0, metavar="X", help="the actors have GPUs, X times as fast as one core [0]")
    parser.add_argument("--learner", action="store_true", help="a learner trains on the first node")
    parser.add_argument("--price", type=float, default=0.0, metavar="X", help="price of a node-hour; gives the cost of 1000 episodes")
    parser.add_argument("--recipe", metavar="NAME", default="demo", help="settings that the probe measures [demo]")
    parser.add_argument("--probe", type=Path, metavar="FILE", help="use a saved probe [measure this machine, about a minute]")
    parser.add_argument("--save", type=Path, metavar="FILE", help="save the probe")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw 1 to 1000 workers, with as many nodes as they need")


def size_command(options: argparse.Namespace) -> tuple[str, int]:
    """What the asked cluster gives, as text, and exit code 0. ConfigError for a cluster that cannot be."""
    for name, low in (("nodes", 1), ("cores", 1), ("workers", 0), ("envs", 1), ("actors", 1), ("gpu_speed", 0), ("price", 0)):
        if getattr(options, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name):g} must be at least {low}")
    try:
        from cosmos_ray.sizing.fleet import Shape, simulate
    except ModuleNotFoundError as error:
        raise ConfigError(f"the simulation needs SimPy: pip install -r requirements.txt ({error})") from error
    from cosmos_ray.sizing.probe import load_probe, measure

    config = new_config(recipe(options.recipe))
    probe = load_probe(options.probe) if options.probe else measure(config)
    if options.save:
        probe.save(options.save)
    shape = Shape(options.nodes, options.cores, options.workers or options.nodes * options.cores, options.envs, options.actors,
                  options.gpu_speed, options.learner)
    text = _text(probe, shape, simulate(probe, shape), options.price)
    if options.plot:
        from cosmos_ray.replay.files.durable import replace
        from cosmos_ray.report.sizing_chart import draw_sizes
        from cosmos_ray.report.style import png

        shapes = [dataclasses.replace(shape, workers=count, nodes=max(1, -(-count // shape.cores))) for count in SWEEP]
        replace(png(draw_sizes(shapes, [simulate(probe, one) for one in shapes])), options.plot)
        text += f"\nplot in {options.plot}"
    return text, 0


def _text(probe: Probe, shape: Shape, out: Outcome, price: float) -> str:
    lines = [f"{shape.nodes} nodes of {shape.cores} cores, {shape.workers} workers of {shape.envs} episodes, {shape.actors} inference "
             f"actors{' on GPUs' if shape.gpu_speed else ''}{', a learner' if shape.learner else ''}; task {probe.task}",
             f"  episodes/h          {out.episodes_h:,.0f} (of {probe.horizon} control steps)", f"  control steps/s     {out.steps_s:,.0f}"]
    if shape.learner:
        lines.append(f"  learner steps/h     {out.learner_h:,.0f}")
    lines += [f"  cores busy          {100 * out.cores_busy:.0f} %", f"  inference busy      {100 * out.actors_busy:.0f} %, "
              f"{out.rows:.1f} rows in a batch", f"  what limits         {out.bottleneck}",
              f"  memory, fullest node {out.node_mb:,.0f} MB", f"  object store        {out.plasma_mb:,.0f} MB",
              f"  store grows by      {out.episodes_h * probe.episode_mb:,.0f} MB/h"]
    if price:
        lines.append(f"  1000 episodes cost  {1000 * price * shape.nodes / out.episodes_h:.2f}")
    return "\n".join(lines)
