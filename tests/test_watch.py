"""The live page without a browser: what it tells of real stores, and its HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient

from cosmos_ray.commands.cli import main
from cosmos_ray.config import RunConfig
from cosmos_ray.diagnosis.pulse import Pulse, pulse_file
from cosmos_ray.errors import StoreError
from cosmos_ray.folder import RunFolder
from cosmos_ray.port import bound
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.run import open_run
from cosmos_ray.stages.demo import live_page
from cosmos_ray.supervision import Supervisor
from cosmos_ray.use import Use
from cosmos_ray.watch.app import Watch, make_app
from cosmos_ray.watch.episodes import Episodes, Filter
from cosmos_ray.watch.metrics import MAX_POINTS, Metrics
from cosmos_ray.watch.values import compare, groups, value_panel
from tests.conftest import ROOT, environment
from tests.test_replay_episode import make_episode
from tests.test_state_render import CONFIGS, record, stripped

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> & lift"
TOKEN = "a secret of sixteen letters"


def played(seed: int, source: str = "rollout", version: int = 1, success: bool = True, value: float = 0.5, arm: str = "", run: str = "run"):
    """An episode with decisions, as a rollout worker stores it."""
    episode = make_episode(seed, source=source, chunk=5, success=success, run=run)
    episode.policy_version = version
    episode.info = {"arm": arm or source, "noise_seed": seed, "decisions": [
        {"step": step, "value": value, "chosen": 1, "scores": [0.2, 0.6]} for step in range(0, episode.length, 5)]}
    return episode


def filled(root) -> ReplayStore:
    """Two demonstrations, eight rollouts of two versions, and six evaluation episodes of two arms on the same states."""
    store = ReplayStore(root)
    for seed in range(2):
        store.commit(make_episode(seed), created=1000.0 + seed)
    for seed in range(8):
        store.commit(played(10 + seed, version=1 + seed // 4, success=seed % 4 < seed // 4 + 1, value=seed / 10), created=2000.0 + seed)
    for seed in range(3):
        store.commit(played(100 + seed, "eval", 1, success=seed == 0, arm="base", run="run:a"), created=3000.0 + seed)
        store.commit(played(100 + seed, "eval", 2, success=seed != 0, arm="refined", run="run:b"), created=3010.0 + seed)
    return store


def read(root) -> Episodes:
    """What the page knows of the store once every header is read."""
    episodes = Episodes(str(root))
    while episodes.update() or episodes.unread:
        pass
    return episodes


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


@contextlib.contextmanager
def client(watch: Watch, token: str = "", base_url: str = "http://127.0.0.1:1"):
    watch.update()
    try:
        with TestClient(make_app(watch, token), base_url=base_url) as asked:
            yield asked
    finally:
        watch.close()


def test_episodes_are_listed_newest_first_and_filtered(store):
    episodes = read(store.root)
    page = episodes.page(Filter())
    created = [row["created"] for row in page["episodes"]]
    assert page["total"] == 16 and created == sorted(created, reverse=True)
    assert {row["arm"] for row in episodes.page(Filter(source="eval"))["episodes"]} == {"base", "refined"}
    assert episodes.page(Filter(source="rollout", version=2, outcome="success"))["total"] == 2
    assert episodes.page(Filter(arm="refined", outcome="failure"))["total"] == 1
    assert episodes.page(Filter(task="no such task"))["total"] == 0
    assert episodes.page(Filter(source="rollout", low=0.8, high=0.9))["total"] == 2  # values 0.6 and 0.7 of [-1, 1]


def test_a_growing_store_is_followed_without_opening_what_is_known(store, monkeypatch):
    episodes = read(store.root)
    opened = []
    real = episodes.store.catalog.storage._storage.open
    monkeypatch.setattr(episodes.store.catalog.storage._storage, "open", lambda path: opened.append(path) or real(path))
    store.commit(played(50), created=9000.0)
    assert episodes.update()
    assert set(opened) == {store.path(played(50).key.name)}
    assert episodes.page(Filter())["episodes"][0]["seed"] == 50
    store.evict([played(50).key.name], "test")
    episodes.update()
    assert episodes.page(Filter())["total"] == 16
    with pytest.raises(StoreError, match="may have been evicted"):
        episodes.detail(played(50).key.name)


def test_the_page_changes_nothing_in_a_store_with_damaged_files(store):
    names = [played(10).key.name, played(11).key.name]
    files = [store.root / store.path(name) for name in names]
    files[0].write_bytes(files[0].read_bytes()[:100])
    body = bytearray(files[1].read_bytes())
    body[body.find(played(11).frames[0][1]) + 300] ^= 1
    files[1].write_bytes(body)
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    watch = Watch(str(store.root))
    with client(watch) as asked:
        assert watch.trouble == "" and asked.get("/api/state").json()["episodes"] == 15
        assert "no episode" in asked.get(f"/api/episodes/{names[0]}").json()["error"]
        assert asked.get(f"/api/episodes/{names[1]}/frames/1/5").status_code == 200
        assert "does not match its checksum" in asked.get(f"/api/episodes/{names[1]}/frames/1/0").json()["error"]
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_quarantined_files_and_an_empty_store_are_told(tmp_path, store):
    damaged = store.root / store.path(played(10).key.name)
    damaged.write_bytes(b"torn")
    ReplayStore(store.root).refresh()
    watch = Watch(str(store.root))
    with client(watch) as asked:
        state = asked.get("/api/state").json()
        assert (state["quarantined"], state["episodes"]) == (1, 15)
    ReplayStore(tmp_path / "empty")
    with client(Watch(str(tmp_path / "empty"))) as asked:
        assert asked.get("/api/state").json()["stage"] is None
        assert asked.get("/api/episodes").json()["total"] == 0
        assert asked.get("/api/value").json()["auc"] is None
        assert asked.get("/api/groups").json()["groups"] == []


def test_an_episode_in_full(store):
    episode = played(10)
    with client(Watch(str(store.root))) as asked:
        detail = asked.get(f"/api/episodes/{episode.key.name}").json()
        assert detail["length"] == episode.length and detail["frames"] == sorted(episode.frames)
        assert detail["decisions"][0] == {"step": 0, "value": 0.5, "chosen": 1, "scores": [0.2, 0.6]}
        assert episode.key.name in detail["replay"] and detail["info"]["noise_seed"] == "10"
        step = min(episode.frames)
        frame = asked.get(f"/api/episodes/{episode.key.name}/frames/1/{step}")
        assert frame.content == episode.frames[step][1] and frame.headers["content-type"] == "image/jpeg"
        assert asked.get(f"/api/episodes/{episode.key.name}/frames/9/0").status_code == 404
        assert asked.get("/api/episodes/..%2F..%2Fetc%2Fpasswd").status_code == 404
        assert "unknown" in asked.get("/api/episodes?outcome=nonsense").json()["error"]


def test_values_by_bin_and_two_arms_on_the_same_states(store):
    episodes = read(store.root)
    panel = value_panel(episodes, Filter(source="rollout"))
    assert panel["decisions"] == sum(sum(counts) for counts in panel["histogram"].values())
    for row in panel["calibration"]:  # what a click on a bin lists
        rows = episodes.rows(Filter(source="rollout", low=row["low"], high=row["high"]))
        assert len(episodes.decisions(rows)) == row["count"]
    base, refined = (next(group for group in groups(episodes) if group["arm"] == arm) for arm in ("base", "refined"))
    pair = compare(episodes, refined["id"], base["id"])
    assert [row["seed"] for row in pair["won"]] == [101, 102] and [row["seed"] for row in pair["lost"]] == [100]
    assert pair["counts"]["pairs"] == 3 and pair["both"] == pair["neither"] == []


def test_metrics_are_followed_by_what_was_added(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    assert not metrics.update()
    rows = [{"stage": "refine", "time": 10.0 + step, "step": step, "loss": 1 / step, "version": 1} for step in range(1, 101)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + 'no json\n{"stage": "death", "time": 50, "who": "learner", "why"')
    assert metrics.update() and len(metrics.curves["refine"]) == 100 and not metrics.marks
    with open(file, "a") as more:
        again = {"stage": "refine", "time": 200.0, "step": 51, "loss": float("nan")}
        more.write(': "killed", "then": "restarts"}\n' + json.dumps(again) + "\n")
    assert metrics.update() and metrics.marks[0]["text"] == "learner died (killed): restarts"
    assert [point["step"] for point in metrics.curves["refine"]][-2:] == [50, 51]  # went back, and nothing counts twice
    assert metrics.curves["refine"][-1]["loss"] is None
    with open(file, "a") as more:
        more.writelines(json.dumps({"stage": "pretrain", "time": 300.0 + step, "step": step}) + "\n" for step in range(3 * MAX_POINTS))
    metrics.update()
    assert len(metrics.curves["pretrain"]) <= MAX_POINTS and metrics.rate("pretrain") == pytest.approx(1.0)


def test_a_run_tells_its_stage_versions_and_deaths_while_another_command_holds_its_lock(tmp_path):
    config = RunConfig(root=str(tmp_path), name="small", refine_steps=40)
    folder = RunFolder(config)
    store = filled(folder.replay)
    folder.record("refine", step=10, loss=0.5, version=3)
    folder.record("refine_episode", success=1, length=9, version=1, step=10, name="x")
    folder.record("death", who="rollout worker 2", why="its process died", then="another one starts")
    watch = Watch(str(folder.replay), folder.path, config)
    with client(watch) as asked:
        state = asked.get("/api/state").json()
        assert state["process"] == {"pid": os.getpid(), "host": state["process"]["host"], "alive": True}
        assert (state["stage"]["name"], state["stage"]["done"], state["stage"]["total"]) == ("refine", 10, 40)
        assert [(row["version"], row["successes"], row["episodes"]) for row in state["versions"]] == [(1, 1, 4), (2, 2, 4)]
        assert 0 < state["versions"][0]["low"] < 0.25 < state["versions"][0]["high"]
        assert "rollout worker 2 died" in state["marks"][0]["text"] and state["staleness"][-1]["versions"] == 2
        before = watch.revision
        store.commit(played(70), created=time.time())
        folder.record("refine", step=20, loss=0.25, version=3)
        watch._told = 0.0
        watch.update()
        assert watch.revision == before + 1
        state = asked.get("/api/state").json()
        assert state["stage"]["done"] == 20 and state["episodes"] == 17
    folder.close()


def test_a_running_command_tells_of_its_processes_waits_and_of_the_time_left(tmp_path):
    config, supervisor = RunConfig(root=str(tmp_path), name="small"), Supervisor(clock=lambda: clock[0])
    clock, folder = [0.0], RunFolder(config)
    watch = Watch(str(filled(folder.replay).root), folder.path, config)
    supervisor.shows("progress", lambda: [{"what": "evaluate", "done": 12, "total": 300, "unit": "episodes", "note": "",
                                           "seconds": 60.0, "left_s": 1440.0}])
    supervisor.shows("inference actors", lambda: [{"who": "inference actor 0", "version": 3, "wanted": 4, "answered_s": 1.0, "waiting": 5,
                                                   "computing": 16, "lost": False, "taking_s": None}])
    supervisor.waits("rollout worker 1", "an answer on 6 tickets")
    clock[0] = 30.0
    pulse = Pulse(pulse_file(folder.path), supervisor, every_s=0.05)
    until = time.monotonic() + 60
    with client(watch) as asked:
        while (state := asked.get("/api/state").json())["command"] is None:
            assert time.monotonic() < until
            watch.update()
        assert state["command"]["processes"] == [
            "inference actor 0: policy version 3, should hold 4, answered 1 s ago; 16 rows computed, 5 wait"]
        assert state["command"]["waiting"] == ["rollout worker 1: an answer on 6 tickets, 30 s"]
        assert {k: state["stage"][k] for k in ("name", "done", "total", "left", "ended")} == {
            "name": "evaluate", "done": 12, "total": 300, "left": 1440.0, "ended": False}
        pulse.close()
        watch._told = 0.0
        watch.update()
        assert asked.get("/api/state").json()["command"] is None  # it has ended
    folder.close()


def test_who_may_come_in(store):
    watch = Watch(str(store.root))
    with client(watch, TOKEN) as asked:
        assert asked.get("/api/state").status_code == 401 and asked.get("/?token=wrong").status_code == 401
        assert asked.get("/api/state", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        moved = asked.get("/", params={"token": TOKEN}, follow_redirects=False)
        assert moved.status_code == 303 and TOKEN not in moved.headers["location"] and "HttpOnly" in moved.headers["set-cookie"]
        assert asked.get("/api/state").status_code == 200  # by the cookie
    with client(Watch(str(store.root)), base_url="http://evil.example") as asked:
        assert asked.get("/api/state").status_code == 403  # a name of another site that leads here
    with client(Watch(str(store.root)), base_url="http://localhost:8778") as asked:
        page = asked.get("/")
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert "http://" not in page.text and "https://" not in page.text
        assert asked.post(f"/api/episodes/{played(10).key.name}/render").status_code == 422  # a page of another site cannot ask for it


def test_what_a_rendering_child_cannot_do_is_told_in_one_line(store):
    name = played(10).key.name
    with client(Watch(str(store.root))) as asked:
        asked.post(f"/api/episodes/{name}/render", headers={"X-Watch": "1"}).raise_for_status()
        while (rendered := asked.get(f"/api/episodes/{name}").json()["rendered"])["state"] == "running":
            time.sleep(0.2)
        assert rendered["state"] == "failed" and "cannot be rendered" in rendered["error"] or "fingerprint" in rendered["error"], rendered


def test_frames_that_are_not_stored_are_rendered_as_they_were(tmp_path):
    episode = record(*CONFIGS["Lift"], seed=21, steps=3)
    store = ReplayStore(tmp_path / "store")
    store.commit(stripped(episode))
    name = episode.key.name
    with client(Watch(str(store.root))) as asked:
        assert asked.get(f"/api/episodes/{name}/frames/0/2").status_code == 404
        asked.post(f"/api/episodes/{name}/render", headers={"X-Watch": "1"}).raise_for_status()
        while (rendered := asked.get(f"/api/episodes/{name}").json()["rendered"])["state"] == "running":
            time.sleep(0.2)
        assert rendered == {"state": "done", "frames": 4, "error": ""}
        for step, images in episode.frames.items():
            assert [asked.get(f"/api/episodes/{name}/frames/{camera}/{step}").content for camera in (0, 1)] == images


@contextlib.contextmanager
def serving(watch: Watch):
    """The page on a real port, in a thread."""
    with bound("127.0.0.1", 0) as listening:
        app = make_app(watch)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, args=([listening],))
        watch.begin()
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            app.state.ending = server.should_exit = True
            thread.join()
            watch.close()


def test_snapshots_are_pushed_as_the_store_grows(store):
    def counts(lines):
        for line in lines:
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))["episodes"]

    with serving(Watch(str(store.root))) as address, httpx.stream("GET", f"{address}/api/events", timeout=120) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        pushed = counts(stream.iter_lines())
        next(count for count in pushed if count == 16)
        store.commit(played(60))
        next(count for count in pushed if count == 17)


def test_the_command_serves_until_a_signal_and_needs_neither_torch_nor_ray(store):
    code = ("import sys; from cosmos_ray.commands.cli import main; code = main(sys.argv[1:]);"
            "assert not {'torch', 'ray'} & set(sys.modules); sys.exit(code)")
    child = subprocess.Popen([sys.executable, "-c", code, "watch", "--store", str(store.root), "--port", "0"], cwd=ROOT, env=environment(),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = child.stdout.readline()
    address = re.search(r"http://\S+/", line)[0]
    assert httpx.get(f"{address}api/episodes", timeout=120).json()["total"] >= 0
    child.send_signal(signal.SIGTERM)
    assert "the page is closed" in child.communicate(timeout=120)[0] and child.returncode == 0


def test_the_demo_shows_the_page_of_its_run_while_it_works(tmp_path, capfd):
    with open_run(RunConfig(root=str(tmp_path), name="shown"), Use(needs_ray=False)) as run, live_page(run):
        said = ""
        while not (found := re.search(r"live page of shown: (http://\S+/)", said)):
            said += capfd.readouterr().err
            time.sleep(0.1)
        assert httpx.get(f"{found[1]}api/state", timeout=120).json()["name"] == "shown"
    with pytest.raises(httpx.ConnectError):
        httpx.get(found[1], timeout=120)


@pytest.mark.parametrize("flags, told", [
    (["--store", "nowhere"], "is not a replay store"),
    (["--name", "nothing", "--root", "nowhere"], "there is no run 'nothing' in"),
    (["--name", "nothing", "--store", "nowhere"], "are two stores"),
    ([], "needs the name of its run"),
    (["--store", "nowhere", "--host", "0.0.0.0"], "COSMOS_RAY_TOKEN"),
    (["--store", "nowhere", "--port", "70000"], "is no port"),
])
def test_bad_input_is_one_line(flags, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COSMOS_RAY_TOKEN", raising=False)
    assert main(["watch", *flags]) in (1, 2)
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


def test_what_a_foreign_file_says_is_shown_as_numbers_or_text(tmp_path):
    store = ReplayStore(tmp_path / "store")
    episode = played(1)
    episode.instruction = HOSTILE
    episode.info = {"arm": {"not": "text"}, "noise_seed": [HOSTILE], "decisions": [
        {"step": 0, "value": float("nan")}, "nothing", {"step": "0", "value": 1}, {"step": 5, "value": 0.0, "scores": [float("inf"), "x"]}]}
    store.commit(episode)
    with client(Watch(str(store.root))) as asked:
        text = asked.get(f"/api/episodes/{episode.key.name}").text
        detail = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        assert detail["decisions"] == [{"step": 5, "value": 0.5, "chosen": 0, "scores": [None, None]}]
        assert detail["instructions"] == [[0, HOSTILE]]
    assert np.isfinite(read(store.root).decisions(np.arange(1))).all()
