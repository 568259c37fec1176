"""One cell of a study in a process of its own: the stages of a run, then what its arms reach on the held-out initial states.

The description comes as one JSON object on standard input. Events go to standard output, a line of JSON each, after :data:`MARK`:
``{"done": step}`` for a stage, ``{"arm": name, "outcomes": "01-"}`` for an arm, ``{"error": text}`` at the end of a cell that failed.
All other lines are the log.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from cosmos_ray.caches import use_temporary_caches
from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import changed, given, new_config, with_absolute_paths
from cosmos_ray.config.stored import stored_config
from cosmos_ray.config.study import Cell, read_settings, same_result
from cosmos_ray.errors import ConfigError, CosmosRayError, RunInUse
from cosmos_ray.run import Run, open_run
from cosmos_ray.sim.child import die_with
from cosmos_ray.stages.collect import collect
from cosmos_ray.stages.evaluate import evaluate, held_out
from cosmos_ray.stages.pretrain import pretrain
from cosmos_ray.stages.refine import refine
from cosmos_ray.stages.rollout import rollout
from cosmos_ray.supervision import Supervisor

MARK = "@cell "
STAGES = {"collect": collect, "pretrain": pretrain, "rollout": rollout, "refine": refine}
LEAVE_S = 60  #: for a cell to save what it has when it is stopped
LOST = "-"  #: in outcomes: an initial state that is quarantined
FROM = Path("study")  #: how messages name the settings of a cell


def description(cell: Cell, address: str, base: str) -> dict[str, Any]:
    """What :func:`work` needs to know, as JSON holds it; ``base`` is the checkpoint that becomes the run's base policy, or ""."""
    config = with_absolute_paths(dataclasses.replace(cell.config, address=address))
    return {"settings": given(config), "stages": cell.chain.stages, "base": base,
            "arms": [{"name": arm.name, "plays": arm.plays, "settings": arm.values} for arm in cell.arms]}


def refuse_other_settings(cell: Cell) -> None:
    """ConfigError when the run exists with settings that give other results: its results would pass for results of these settings.

    The planner's settings may differ, because evaluations know them. So may the places of the base policy and the store, because a study
    may be moved.
    """
    before = stored_config(cell.config)
    if before is not None and (other := same_result(cell, before)):
        name, theirs, ours = other
        raise ConfigError(f"run {cell.config.name} in {cell.config.root} was made with {name} = {theirs}, not {ours}: give another --root, "
                          "or the same settings")


def work(told: dict[str, Any]) -> None:
    """Do what is missing of a cell, and say what its arms reached."""
    config, supervisor = new_config(read_settings(FROM, told["settings"])), Supervisor()
    while True:
        try:
            with open_run(config) as run:
                signal.signal(signal.SIGTERM, _leave)  # again: Ray has put its own handler there
                supervisor.goes_on(config.name)
                return _work(run, told)
        except RunInUse as error:  # another study may share the run; a cell that was killed may still be saving
            supervisor.waits(config.name, str(error).partition(":")[0])
            time.sleep(1)


def _work(run: Run, told: dict[str, Any]) -> None:
    if told["base"]:
        adopt(run, Path(told["base"]))
    for name in told["stages"]:
        STAGES[name](run)
        _say(done=name)
    for arm in told["arms"]:
        values = read_settings(FROM, arm["settings"])
        _say(arm=arm["name"], outcomes=outcomes(run, arm["plays"], changed(run.config, values)))


def outcomes(run: Run, plays: str, config: RunConfig) -> str:
    """Outcomes of an arm with other settings on all held-out initial states, in order: 1, 0, or :data:`LOST`. The run keeps its own."""
    other = dataclasses.replace(run, config=config)
    found = evaluate(other, [plays])
    by_seed = dict(zip(found["seeds"], found["arms"][plays]["outcomes"], strict=True))
    return "".join(str(by_seed.get(held_out(run, i)[1], LOST)) for i in range(config.eval_episodes))


def adopt(run: Run, base: Path) -> None:
    """Make ``run`` begin from another run's base policy."""
    target = run.folder.checkpoint("base")
    target.parent.mkdir(exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(os.path.relpath(base.resolve(), target.parent.resolve()), target_is_directory=True)


def _say(**event: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(event)}\n")
    sys.stdout.flush()


def _leave(*_: object) -> None:
    signal.alarm(LEAVE_S)  # a cluster that is gone answers nobody
    raise KeyboardInterrupt


def main() -> int:
    die_with(int(sys.argv[1]), signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        work(json.loads(sys.stdin.read()))
    except CosmosRayError as error:
        _say(error=str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    use_temporary_caches()
    os._exit(main())  # without interpreter teardown, where GL and Ray threads abort now and then
