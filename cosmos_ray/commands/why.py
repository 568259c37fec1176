"""``why``: what a running command waits for."""

from __future__ import annotations

import argparse
import os

HELP = "say what a command that runs waits for, and what its processes do"
NODE_S = 60.0  #: for another node to look at its processes


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="RUN", help="the run that the command works on")
    parser.add_argument("--root", default="runs", metavar="PATH", help="folder or bucket of the runs [runs]")


def why(options: argparse.Namespace) -> tuple[str, int]:
    """The text, and the exit code: 0, or 1 where no command works on the run. ConfigError where there is no such run."""
    from cosmos_ray.caches import local_root
    from cosmos_ray.diagnosis.pulse import lives, read_pulse
    from cosmos_ray.diagnosis.why import explain
    from cosmos_ray.errors import ConfigError

    folder = local_root(options.root) / options.name
    if not (folder / "config.json").exists():
        raise ConfigError(f"there is no run {options.name!r} in {options.root}: give another --name or --root")
    pulse = read_pulse(folder)
    if pulse is None:
        return f"no command works on run {options.name} now, or it is just starting", 1
    alive = lives(pulse)
    return explain(f"run {options.name}", pulse, alive, _processes(pulse, alive)), 0


def _processes(pulse: dict, alive: bool | None) -> dict[str, list]:
    """Node -> what the processes there do: those of this machine, and of the whole cluster where there is one that answers."""
    from cosmos_ray.diagnosis.stacks import look, of_run, on_this_machine

    if not pulse["cluster"]:
        return {pulse["host"]: look(of_run(pulse["pid"]))} if alive else {}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cosmos_ray.connection import connect
    from cosmos_ray.errors import ConfigError

    os.environ.pop("RAY_ADDRESS", None)
    try:
        connect(pulse["cluster"], simulates=False)
    except ConfigError:  # no cluster answers: its own machine at least
        return {"this machine": look(on_this_machine())}
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(lambda: look(on_this_machine()))
        calls = {f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})":
                 task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
                 for node in ray.nodes() if node["Alive"]}
        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_S)
        return {node: ray.get(call) for node, call in calls.items() if call in done}
    finally:
        ray.shutdown()
