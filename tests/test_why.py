"""`why`: the pulse of a running command, what it says of waits, deaths and silence, and the stacks of real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.diagnosis import stacks
from cosmos_ray.diagnosis.pulse import Pulse, lives, pulse_file, read_pulse
from cosmos_ray.diagnosis.stacks import Doing
from cosmos_ray.diagnosis.why import explain
from cosmos_ray.supervision import Supervisor
from tests.conftest import environment
from tests.scripted_cluster import Cluster
from tests.test_fleet_core import make, poll_until

LONG = 60.0


@pytest.fixture
def supervisor():
    now = [100.0]
    made = Supervisor(clock=lambda: now[0])
    made.died("rollout worker 2 on node a", "killed", "3 tickets start again")
    made.waits("learner", "a burst of 25 training steps")
    now[0] += 42
    return made


def pulse_of(supervisor, tmp_path, until=lambda pulse: True):
    pulse = Pulse(pulse_file(tmp_path), supervisor, every_s=0.05)
    end = time.monotonic() + LONG
    while (found := read_pulse(tmp_path)) is None or not until(found):
        assert time.monotonic() < end
        time.sleep(0.02)
    return pulse, found


def test_a_pulse_tells_of_waits_deaths_and_of_the_main_thread(supervisor, tmp_path):
    pulse, found = pulse_of(supervisor, tmp_path)
    try:
        assert found["waiting"] == [{"who": "learner", "on": "a burst of 25 training steps", "seconds": 42.0}]
        assert [death["who"] for death in found["deaths"]] == ["rollout worker 2 on node a"]
        assert any("pulse_of (tests/test_why.py:" in frame for frame in found["stack"])
        assert found["pid"] == os.getpid() and lives(found)
    finally:
        pulse.close()
    assert not pulse_file(tmp_path).exists() and read_pulse(tmp_path) is None


def test_why_tells_who_waits_longest_first_and_the_oldest_ticket(supervisor, tmp_path):
    supervisor.waits("rollout worker 1", "an answer on 2 tickets")
    supervisor.shows("rollout workers", lambda: [
        {"who": "rollout worker 1", "where": "node a", "tickets": 2, "asked_s": 3.0, "waits_for": "its simulators, which start again",
         "oldest": "eval-12", "oldest_s": 77.0}])
    supervisor.shows("inference actors", lambda: [{"who": "inference actor 0", "version": 3, "wanted": 4, "answered_s": 1.0, "waiting": 5,
                                                   "computing": 16, "lost": False, "taking_s": 2.0}])
    supervisor.shows("learner", lambda: [{"who": "learner", "step": 75, "does": "a burst of 25 training steps", "since_s": 42.0,
                                          "restarts": 1}])
    supervisor.shows("progress", lambda: [{"what": "refine", "done": 75, "total": 300, "unit": "steps", "note": "version 3",
                                           "seconds": 61.0}])
    pulse, found = pulse_of(supervisor, tmp_path, lambda pulse: "progress" in pulse["views"])
    pulse.close()
    learns = Doing(7, "ray::LearnerActor.train", 98.0, 700.0, ["forward (net.py:1)", "step (a.py:2)"])
    text = explain("run x", found, True, {"node a": [learns]}, found["time"] + 1)
    lines = [line.strip() for line in text.splitlines()]
    for line in ("at refine 75/300 steps, 1:01 so far; version 3",
                 "rollout worker 1 on node a: 2 tickets, asked 3 s ago; waits for its simulators, which start again",
                 "inference actor 0: policy version 3, should hold 4, takes it since 2 s, answered 1 s ago; 16 rows computed, 5 wait",
                 "learner: step 75, a burst of 25 training steps, for 42 s; started again 1 times",
                 "eval-12, with rollout worker 1 for 77 s",
                 "ray::LearnerActor.train (pid 7), 98 % CPU, 700 MB: forward (net.py:1) < step (a.py:2)"):
        assert line in lines, line
    waits = lines[lines.index("waits") + 1:]
    assert waits[:2] == ["learner for a burst of 25 training steps, 42 s", "rollout worker 1 for an answer on 2 tickets, 0 s"]
    assert "rollout worker 2 on node a (killed)" in text and "3 tickets start again" in text


@pytest.mark.parametrize("alive, age, words", [
    (True, 1.0, None), (True, 60.0, "no sign for 1:00: the process is stopped"), (None, 60.0, "no sign for 1:00: its machine is gone"),
    (False, 60.0, "the process has ended without a word, 1:00 after its last sign or sooner"),
])  # fmt: skip
def test_why_tells_a_dead_command_from_a_silent_one(supervisor, tmp_path, alive, age, words):
    pulse, found = pulse_of(supervisor, tmp_path)
    pulse.close()
    second = explain("run x", {**found, "every_s": 2.0}, alive, {}, found["time"] + age).splitlines()[1]
    assert words in second if words else "no sign" not in second and "ended" not in second


def test_a_killed_command_is_known_to_be_dead(tmp_path):
    program = """
        import sys, time
        from pathlib import Path
        from cosmos_ray.diagnosis.pulse import Pulse
        from cosmos_ray.supervision import Supervisor
        Pulse(Path(sys.argv[1]), Supervisor(), every_s=0.05)
        time.sleep(600)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(pulse_file(tmp_path))])
    try:
        end = time.monotonic() + LONG
        while read_pulse(tmp_path) is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert lives(read_pulse(tmp_path))
    finally:
        child.kill()
        child.wait()
    left = read_pulse(tmp_path)
    assert lives(left) is False
    (tmp_path / "config.json").write_text("{}")
    assert lives({**left, "host": "elsewhere"}) is None
    pulse_file(tmp_path).write_text("{half")
    assert read_pulse(tmp_path) is None


def test_the_stack_of_a_process_that_stands_still_is_seen():
    program = "import time\ndef stands_still():\n    time.sleep(600)\nprint('there', flush=True)\nstands_still()"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        os.kill(child.pid, signal.SIGSTOP)
        (found,) = stacks.look([psutil.Process(child.pid)])
        assert any(frame.startswith("stands_still (") for frame in found.stack) or "py-spy says" in found.stack[0], found.stack
    finally:
        child.kill()
        child.wait()


def test_a_fleet_tells_how_its_workers_are():
    cluster = Cluster(a=1)
    fleet, _, _ = make(cluster)
    fleet.submit(["x", "y"])
    poll_until(fleet, cluster, lambda: any(row["tickets"] for row in fleet.view()))
    busy, empty = fleet.view()
    assert busy["tickets"] >= 1 and busy["oldest"] in ("x", "y") and busy["oldest_s"] >= 0 and busy["where"] == "a"
    assert empty["waits_for"] == "a place" and empty["oldest"] is None
    fleet.close()


def test_an_open_run_has_a_pulse_and_leaves_none(tmp_path, capsys):
    program = """
        import sys
        from cosmos_ray.config import RunConfig
        from cosmos_ray.run import open_run
        from cosmos_ray.use import Use
        with open_run(RunConfig(root=sys.argv[1], name="x"), Use(), quiet=True):
            sys.stdin.readline()
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdin=subprocess.PIPE, env=environment())
    try:
        end = time.monotonic() + 3 * LONG
        while read_pulse(tmp_path / "x") is None:
            assert time.monotonic() < end and child.poll() is None
            time.sleep(0.05)
        assert main(["why", "--root", str(tmp_path), "--name", "x"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"run x: `cosmos_ray {tmp_path}`, process {child.pid} ") and "nobody has waited for long" in text
        child.communicate(b"\n", timeout=3 * LONG)
        assert child.returncode == 0
    finally:
        child.kill()
        child.wait()
    assert not pulse_file(tmp_path / "x").exists()
    assert main(["why", "--root", str(tmp_path), "--name", "x"]) == 1
    assert "no command works on run x now" in capsys.readouterr().out
    assert main(["why", "--root", str(tmp_path), "--name", "y"]) == 2
    assert "there is no run 'y'" in capsys.readouterr().err
