"""The whole loop as a user runs it: commands, restarts, kills. Real Ray, real robosuite, real DeepSpeed. `make test-slow` runs the long
ones, `make test` the others."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from cosmos_ray.replay.store import ReplayStore
from tests.conftest import PLANNING, ROOT, SMALL, command, copy_run, environment, metrics, run_command


def stored(folder: Path, source: str | None = None) -> list:
    store = ReplayStore(folder / "replay", create=False)
    store.refresh()
    return [s for s in store.summaries() if source in (None, s.source)]


def wait_for(condition, driver: subprocess.Popen, seconds: float = 600):
    """Wait until ``condition()`` is true while ``driver`` runs; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert driver.poll() is None, "the command ended early:\n" + driver.stderr.read()[-5000:]
        time.sleep(0.1)
    raise AssertionError("nothing happened in time")


def forget_refinement(folder: Path) -> None:
    """Back to where `refine` begins."""
    shutil.rmtree(folder / "checkpoints" / "refined")
    for state in (folder / "learner").glob("refined*"):
        shutil.rmtree(state)


def start_refine(folder: Path, *flags: str) -> subprocess.Popen:
    """`refine` on a copy of the finished run, from its beginning."""
    forget_refinement(folder)
    return subprocess.Popen(command("refine", folder.parent, *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_demo_runs_every_stage(finished_run):
    sources = Counter((s.source, s.episode_class == "demo") for s in stored(finished_run))
    assert sources[("demo", True)] == 6 and sources[("eval", False)] == 3 * (2 + 1)
    assert sum(s.source == "rollout" and s.policy_version >= 1 for s in stored(finished_run)) >= 4 + 1
    assert {row["name"] for row in metrics(finished_run, "demo")} == {"collect", "pretrain", "rollout", "refine", "evaluate"}
    assert metrics(finished_run, "pretrain")[-1]["step"] == 30 and metrics(finished_run, "planning")[-1]["step"] == 10
    assert json.loads((finished_run / "checkpoints" / "planning" / "policy.json").read_text())["info"]["stage"] == "planning"
    assert {row["version"] for row in metrics(finished_run, "refine")} >= {1, 3, 4, 5}  # 2 is the planning network
    report = json.loads((finished_run / "report.json").read_text())
    evaluation = json.loads((finished_run / "evaluation.json").read_text())
    assert list(evaluation["arms"]) == ["base", "refined", "refined + planning"]
    assert evaluation["verified"] == {"repeated": 3, "identical": 3, "different": []}
    outcomes = {s.name: s.success for s in stored(finished_run, "eval")}
    for arm in evaluation["arms"].values():
        assert arm["successes"] == sum(outcomes[name] for name in arm["episode_names"])
    assert report["assessment"]["windows"] > 0 and set(report["assessment"]["values"]) == {"V(real s')", "V(imagined s')"}
    page = (finished_run / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert any(base64.b64decode(data)[:4] == b"\x89PNG" for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)) or "<svg" in page
    assert page.count("<td>agentview</td>") == len(report["assessment"]["world_model"])


def test_another_round_acts_with_the_refined_policy_and_goes_on_from_it(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    before, rows = {s.name for s in stored(folder, "rollout")}, len(metrics(folder, "refine"))
    version = json.loads((folder / "checkpoints" / "refined" / "policy.json").read_text())["version"]
    again = [*PLANNING, "--rounds", "2", "--refine-steps", "20", "--rollout.planned", "true"]
    run_command("refine", tmp_path, *again)
    more = {s.name: s.policy_version for s in stored(folder, "rollout") if s.name not in before}
    assert len(more) == 4 + 6 and sorted(more.values())[:4] == [version] * 4
    assert [row["step"] for row in metrics(folder, "refine")[rows:]] == [10, 20]
    infos = [json.loads((folder / "checkpoints" / name / "policy.json").read_text())["info"] for name in ("planning", "refined")]
    assert [(info["round"], info["step"], info["base_version"]) for info in infos] == [(2, 10, 1), (2, 20, 1)]
    assert (folder / "learner" / f"refined_from_{version}").exists() and not (folder / "learner" / "refined_from_1").exists()
    store = ReplayStore(folder / "replay", create=False)
    store.refresh()
    planned = [name for name in more if store.read(name).info["candidates"] == 3]
    assert len(planned) == 4 and {more[name] for name in planned} == {version}  # those before training, by the refined policy alone
    done = run_command("refine", tmp_path, *again)
    assert "(0 new)" in done.stdout and len(metrics(folder, "refine")) == rows + 2
    evaluated = {s.name for s in stored(folder, "eval")}
    done = run_command("evaluate", tmp_path, *PLANNING, "--round", "1")  # it was evaluated when it was the newest
    assert "refined + planning, round 1" in done.stdout and {s.name for s in stored(folder, "eval")} == evaluated


@pytest.mark.slow
def test_going_back_a_round_collects_and_trains_the_next_one_anew(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    again = [*PLANNING, "--rounds", "2", "--refine-steps", "20"]
    run_command("refine", tmp_path, *again)
    before = {s.name for s in stored(folder, "rollout")}
    weights = (folder / "checkpoints" / "rounds" / "2" / "refined" / "model.safetensors").read_bytes()
    done = run_command("refine", tmp_path, *again, "--from-round", "1")
    assert "moved round 2 to" in done.stderr and "(1 new)" not in done.stdout and "(20 new)" in done.stdout
    assert (folder / "checkpoints" / "rounds.1" / "2" / "refined" / "model.safetensors").read_bytes() == weights
    assert (folder / "checkpoints" / "rounds" / "2" / "refined" / "model.safetensors").read_bytes() != weights
    assert len({s.name for s in stored(folder, "rollout")} - before) == 4 + 6
    done = run_command("evaluate", tmp_path, *PLANNING, "--round", "all", "--keep-rounds", "last:1")
    assert [line.partition("  ")[0] for line in done.stdout.splitlines()[1:]] == [
        "refined, round 1", "refined + planning, round 1", "refined, round 2", "refined + planning, round 2"]
    run_command("report", tmp_path)
    rows = json.loads((folder / "report.json").read_text())["rounds"]
    assert [(row["round"], len(row["arms"]), row["rollouts"]["episodes"] if row["rollouts"] else 0) for row in rows] == [
        (0, 1, 0), (1, 2, 10), (2, 2, 10)]
    assert 'id="rounds"' in (folder / "report.html").read_text()


@pytest.mark.slow
def test_demo_again_continues_and_changes_nothing(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*.arrow")}
    run_command("demo", tmp_path)
    assert {p: p.read_bytes() for p in folder.rglob("*.arrow")} == before
    assert len(metrics(folder, "pretrain")) == len(metrics(finished_run, "pretrain"))


@pytest.mark.slow  # the folder's part of it is in test_settings
def test_a_fresh_run_leaves_the_old_one_aside(finished_run, tmp_path):
    before = len(stored(copy_run(finished_run, tmp_path)))
    run_command("collect", tmp_path, "--fresh", "--demos", "1")
    assert len(stored(tmp_path / "small")) == 1 and len(stored(tmp_path / "small.1")) == before


@pytest.mark.slow
def test_evaluate_reproduces_the_reported_numbers(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    shutil.rmtree(folder / "replay" / "episodes" / "eval-Lift")  # forget the results: they must come out the same
    before = json.loads((folder / "evaluation.json").read_text())
    done = run_command("evaluate", tmp_path, "--repeat", "1", "--rollout.workers", "2", "--rollout.envs-per-worker", "1")
    after = json.loads((folder / "evaluation.json").read_text())
    assert after["verified"] == {"repeated": 3, "identical": 3, "different": []}
    assert after["arms"] == before["arms"] and "3 bit-identical" in done.stdout
    first = {s.name: (s.success, s.length) for s in stored(finished_run, "eval") if s.key.attempt == 0}
    assert {s.name: (s.success, s.length) for s in stored(folder, "eval") if s.key.attempt == 0} == first


def test_plan_draws_a_filmstrip(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    done = run_command("plan", tmp_path)
    strip = next(folder.glob("plan_*.png"))
    assert strip.read_bytes()[:4] == b"\x89PNG" and str(strip) in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert all(len(row) == 2 + 3 for row in rows) and rows[0][0] == "0"


@pytest.mark.slow
def test_ctrl_c_stops_refine_cleanly_and_it_continues(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    rows = len(metrics(folder, "refine"))
    driver = start_refine(folder, "--refine-steps", "50")
    try:
        wait_for(lambda: len(metrics(folder, "refine")) > rows, driver)
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert driver.returncode == 130, errors[-5000:]
    assert errors.strip().splitlines()[-1] == "cosmos_ray: interrupted; the same command continues where it stopped"
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    reached = metrics(folder, "refine")[-1]["step"]
    assert 0 < reached < 50
    run_command("refine", tmp_path, "--refine-steps", "50")
    continued = [row["step"] for row in metrics(folder, "refine")[rows:]]
    assert continued == sorted(set(continued)) and continued[-1] == 50  # no step was trained twice


@pytest.mark.slow
def test_a_torn_episode_costs_only_itself(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    victim = next(p for p in folder.rglob("rollout-*.arrow"))
    victim.write_bytes(victim.read_bytes()[:200])
    forget_refinement(folder)
    run_command("refine", tmp_path)
    assert victim.name in (folder / "replay" / "quarantine" / "log.jsonl").read_text()


@pytest.mark.slow  # test_settings refuses a run in use too; here another command holds it, which SIGTERM then ends
def test_a_run_in_use_is_refused(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    driver = start_refine(folder)
    try:
        wait_for(lambda: (folder / ".lock").read_text().startswith(f"{driver.pid} on "), driver)
        done = run_command("evaluate", tmp_path, code=2)
        assert f"is in use by process {driver.pid}" in done.stderr
    finally:
        driver.send_signal(signal.SIGTERM)
        driver.communicate(timeout=300)
    assert driver.returncode == 130


@pytest.mark.slow
def test_wandb_offline_writes_its_own_run(finished_run, tmp_path):
    folder = copy_run(finished_run, tmp_path)
    run_command("evaluate", tmp_path, "--wandb", "offline")
    assert list((folder / "wandb").glob("offline-run-*"))


@pytest.fixture
def head(tmp_path):
    """A local Ray head with a job server, and the environment that reaches it."""
    port = 20000 + os.getpid() % 20000
    token = tmp_path / "token"
    token.write_text("cosmos-ray-test-token-0123456789abcdef")
    variables = {**environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
                 "RAY_ADDRESS": f"http://127.0.0.1:{port + 1}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={port + 1}",
             f"--dashboard-agent-listen-port={port + 2}", "--num-cpus=2", f"--temp-dir=/tmp/ray_{os.getpid()}", "--disable-usage-stats"]
    log = open(tmp_path / "head.log", "w+")
    # Ended by its own process, not by `ray stop`: that would take down every Ray on the machine.
    process = subprocess.Popen(start, env={**variables, "RAY_ADDRESS": ""}, stdout=log, stderr=log)
    try:
        for _ in range(120):
            if subprocess.run([*ray, "job", "list"], env=variables, capture_output=True, timeout=60).returncode == 0:
                break
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(1)
        yield ray, variables
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        for child in psutil.wait_procs(children, timeout=20)[1]:
            child.kill()
        log.close()
        shutil.rmtree(f"/tmp/ray_{os.getpid()}", ignore_errors=True)


@pytest.mark.slow
def test_ray_job_submit_refine_against_a_local_head(finished_run, tmp_path, head):
    folder = copy_run(finished_run, tmp_path)
    forget_refinement(folder)
    ray, variables = head
    submit = [*ray, "job", "submit", "--working-dir", ".", "--", sys.executable, "jobs/refine.py", "--root", str(tmp_path),
              "--name", "small", *SMALL]
    for _ in range(60):
        done = subprocess.run(submit, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=400)
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(1)  # the server answers before the agent that starts jobs is up
    assert done.returncode == 0 and "refined policy version" in done.stdout, done.stdout[-4000:] + done.stderr[-3000:]
    assert (folder / "checkpoints" / "refined" / "policy.json").exists()



def test_episode_files_are_plain_arrow(finished_run):
    """The store is readable without this package."""
    file = next((finished_run / "replay").rglob("*.arrow"))
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.num_rows > 1
