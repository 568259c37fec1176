"""Initial states that break their simulators: named with their reason, not handed out again, and in no arm of an evaluation."""

import dataclasses
import json
import os
import subprocess

import pytest

from cosmos_ray.commands.stage import table
from cosmos_ray.errors import SimulationError
from cosmos_ray.quarantine import Quarantine
from cosmos_ray.report.build import write_report
from cosmos_ray.seeds import state_seed
from cosmos_ray.stages.acting import rollout_ticket
from cosmos_ray.stages.evaluate import arms, evaluate, results, ticket
from cosmos_ray.stages.rollout import act
from tests.conftest import ROOT, command, copy_run, environment, metrics
from tests.test_evaluate import fill, put, run  # noqa: F401 - a fixture

#: Read by Python when it starts: has the simulators' process abort where the named episode begins.
POISON = """
import os, sys
if sys.orig_argv[1:3] == ["-m", "cosmos_ray.sim.child"]:
    from cosmos_ray.sim.simulators import Simulators
    begin = Simulators.begin
    def poisoned(self, place, seed, horizon=0, task=""):
        if seed == {seed}:
            os.abort()
        return begin(self, place, seed, horizon, task)
    Simulators.begin = poisoned
"""


def quarantined(run, index: int, reason: str = "died of SIGSEGV") -> None:  # noqa: F811
    key = ticket(run, arms(run)[0], index).key
    run.quarantine.take({key.name: reason}, [key])


def test_the_file_names_the_state_once_and_is_read_again(run):  # noqa: F811
    quarantined(run, 2)
    quarantined(run, 2, "again")
    key = ticket(run, arms(run)[0], 2).key
    with open(run.quarantine.path, "a") as file:
        file.write('{"name": "torn')
    (row,) = [json.loads(line) for line in run.quarantine.path.read_text().splitlines()[:-1]]
    assert row == {"name": key.name, "task": "Lift", "seed": key.seed, "reason": "died of SIGSEGV"}
    again = Quarantine(run.folder)
    assert key in again and ticket(run, arms(run)[1], 2).key in again and ticket(run, arms(run)[0], 1).key not in again


def test_a_quarantined_state_counts_in_no_arm_and_is_tried_in_none(run):  # noqa: F811
    """Of the refined arms nothing of the state is stored: without Ray, nothing can be run."""
    fill(run, base="0001", refined="001", refined_planning="111")
    quarantined(run, 3)
    out = evaluate(run)
    assert out["new"] == 0 and {name: arm["outcomes"] for name, arm in out["arms"].items()} == {
        "base": [0, 0, 0], "refined": [0, 0, 1], "refined + planning": [1, 1, 1]}
    assert out["seeds"] == [state_seed("eval", 2, i) for i in range(3)]
    assert out["quarantined"] == [{"seed": state_seed("eval", 2, 3), "reason": "died of SIGSEGV"}]
    assert f"initial state {state_seed('eval', 2, 3)} is quarantined and counts in no arm: died of SIGSEGV" in table(out)
    for index in range(3):
        quarantined(run, index)
    with pytest.raises(SimulationError, match="all 4 held-out initial states are quarantined"):
        results(run, run.folder.store())


def test_a_quarantined_state_is_not_handed_out_again(run):  # noqa: F811
    """All other rollouts are stored: without Ray, nothing can be run."""
    wanted = [rollout_ticket(run, i) for i in range(3)]
    for each in wanted[:2]:
        put(run, each.key, True)
    run.quarantine.take({wanted[2].key.name: "hung"}, [each.key for each in wanted])
    assert act(run, "rollout", run.folder.checkpoint("base"), wanted)["episodes"] == 2
    later = dataclasses.replace(wanted[2], key=dataclasses.replace(wanted[2].key, attempt=7))
    assert later.key in run.quarantine  # the state, in whatever round


def test_an_evaluation_goes_on_without_a_state_that_breaks_every_simulator(finished_run, tmp_path):
    """Real simulators that abort natively where one of three states begins; the report names the state and what broke."""
    folder = copy_run(finished_run, tmp_path)
    seed = state_seed("eval", 0, 2)  # the run's evaluation had states 0 and 1
    (tmp_path / "sitecustomize.py").write_text(POISON.format(seed=seed))
    surroundings = {**environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    done = subprocess.run(command("evaluate", tmp_path, "--eval-episodes", "3", "--arms", "base"), cwd=ROOT, env=surroundings,
                          capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (row,) = [json.loads(line) for line in (folder / "quarantined.jsonl").read_text().splitlines()]
    assert row["seed"] == seed and row["task"] == "Lift" and "died of SIGABRT" in row["reason"]
    assert f"initial state {seed} is quarantined" in done.stdout and "/2 " in done.stdout
    assert len(metrics(folder, "death")) == 3


def test_the_report_names_deaths_waits_and_quarantine(run):  # noqa: F811
    fill(run, base="0001", refined="0011", refined_planning="1111")
    evaluate(run)
    assert write_report(run.folder, run.config)["supervision"] == {"deaths": [], "waits": [], "quarantined": []}
    assert "No process died, and nothing waited for more than ten seconds." in run.folder.report.read_text()
    run.supervisor.died("rollout worker 1 on node <a>", "no answer for 180 s", "3 tickets start again")
    run.folder.record("wait", who="rollout workers", on="a place", seconds=12.5)
    quarantined(run, 3, "died of SIGSEGV, in draw (renderer.py:97)")
    evaluate(run)
    report, page = write_report(run.folder, run.config), run.folder.report.read_text()
    (death,), (wait,), (state,) = (report["supervision"][name] for name in ("deaths", "waits", "quarantined"))
    assert (death["who"], death["why"], death["then"]) == ("rollout worker 1 on node <a>", "no answer for 180 s", "3 tickets start again")
    assert (wait["who"], wait["on"], wait["seconds"]) == ("rollout workers", "a place", 12.5) and len(death["time"]) == 19
    assert state["seed"] == state_seed("eval", 2, 3)
    for text in ("rollout worker 1 on node &lt;a&gt;", "1 process died", "1 wait was longer", "1 initial state is quarantined",
                 "in draw (renderer.py:97)"):
        assert text in page
