"""A run whose root is a bucket: its working copies, its lease, and what machines see of each other. A real S3 server in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from cosmos_ray.caches import local_root
from cosmos_ray.commands.cli import main
from cosmos_ray.config import RunConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.replay.files import bucket, lease
from cosmos_ray.replay.files.lease import Lease
from cosmos_ray.replay.files.working_copy import WorkingCopy, fetched, published
from cosmos_ray.uri import below
from tests.s3_server import fresh_uri, running_server
from tests.test_model import tiny
from tests.test_replay_episode import make_episode

server = pytest.fixture(scope="module")(running_server)


@pytest.fixture
def root(server, tmp_path, monkeypatch):
    """The URI of a folder of runs. This test's machine is A; :func:`machine` makes others."""
    return fresh_uri(server, tmp_path / "A", monkeypatch).replace("/replay?", "?")


def machine(monkeypatch, tmp_path, name: str) -> None:
    """Be another machine, with working copies of its own."""
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / name))
    monkeypatch.setattr(lease.socket, "gethostname", lambda: name)


def config(root: str) -> RunConfig:
    return RunConfig(root=root, name="run")


def objects(root: str) -> set[str]:
    client = WorkingCopy(below(root, "run"), Path("/nowhere")).client
    return {meta["path"] for page in obstore.list(client) for meta in page}


def test_another_machine_goes_on_where_this_one_closed_the_run(root, tmp_path, monkeypatch):
    folder = RunFolder(config(root))
    save_policy(tiny(), folder.checkpoint("base"), 3)
    assert folder.next_version() == 4
    folder.record("refine", step=10)
    folder.store().commit(make_episode(0))
    assert folder.shown(folder.report) == f"{root.partition('?')[0]}/run/report.html"
    folder.close()
    machine(monkeypatch, tmp_path, "B")
    again = RunFolder(config(root), create=False)
    assert str(again.path).startswith(str(tmp_path / "B")) and again.identity == folder.identity
    assert load_checkpoint(again.checkpoint("base"))[1] == 3 and again.next_version() == 5
    assert again.metrics("refine")[0]["step"] == 10 and len(again.store()) == 1
    save_policy(tiny(), again.checkpoint("base"), 8)
    shutil.rmtree(again.checkpoint("base"))
    again.record("refine", step=20)
    again.close()
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("COSMOS_RAY_CACHE", str(tmp_path / "A" / "cache"))
    first = RunFolder(config(root))
    assert len(first.metrics("refine")) == 2 and not first.has_policy("base")  # what went there went here
    first.close()
    assert not any(name.startswith("checkpoints/") for name in objects(root))


def test_what_was_not_published_is_after_the_next_opening_on_this_machine(root, server, caplog, monkeypatch):
    monkeypatch.setattr(bucket, "_RETRY", {"max_retries": 1, "retry_timeout": timedelta(seconds=1)})
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    folder = RunFolder(config(root))
    server.stop()
    try:
        folder.record("refine", step=10)
        folder._bucket._lease._stop.set()
        folder.close()
    finally:
        server.start()
    assert "the next command on this machine publishes them" in caplog.text
    caplog.clear()
    again = RunFolder(config(root))  # its lease was not given back
    assert again.metrics("refine")[0]["step"] == 10
    again.close()
    assert "metrics.jsonl" in objects(root)


def test_a_copy_that_is_ahead_stays_although_opening_it_is_killed(root, monkeypatch):
    folder = RunFolder(config(root))
    folder.publish()
    monkeypatch.setattr(WorkingCopy, "publish", lambda self, path="", **options: None)
    folder.record("refine", step=10)
    folder.close()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkingCopy, "fetch", lambda self, path="": (_ for _ in ()).throw(KeyboardInterrupt))
        RunFolder(config(root))
    again = RunFolder(config(root))
    assert again.metrics("refine")[0]["step"] == 10
    again.close()


def test_what_a_cleaner_took_from_the_copy_comes_back_and_stays_in_the_bucket(root):
    folder = RunFolder(config(root))
    save_policy(tiny(), folder.checkpoint("base"), 3)
    folder.record("refine", step=10)
    folder.close()
    shutil.rmtree(folder.checkpoint("base"))
    (folder.path / "metrics.jsonl").unlink()
    again = RunFolder(config(root))
    assert load_checkpoint(again.checkpoint("base"))[1] == 3 and again.metrics("refine")
    again.close()
    assert {"metrics.jsonl", "checkpoints/base/files.json"} <= objects(root)


def test_a_run_that_another_process_works_on_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    folder = RunFolder(config(root))
    machine(monkeypatch, tmp_path, "B")
    with pytest.raises(ConfigError, match=rf"run s3://\S+/run is in use by process {os.getpid()} on \S+: wait"):
        RunFolder(config(root))
    folder.close()
    RunFolder(config(root)).close()


def test_a_lease_that_nobody_renews_is_taken_over_after_its_deadline_and_the_holder_stops(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    folder = RunFolder(config(root))
    held = folder._bucket._lease
    held._stop.set()  # as a machine that is paused, or has lost its network
    held._thread.join()
    machine(monkeypatch, tmp_path, "B")
    other = RunFolder(config(root))
    assert "waiting up to 1 s for a sign of life" in caplog.text and "is taken over from process" in caplog.text
    held._stop.clear()
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    held._renew()  # the machine wakes up
    with pytest.raises(StoreError, match=rf"was taken over by process {os.getpid()} on B, because this process could not renew"):
        folder.record("refine", step=10)
    folder.close()
    other.record("refine", step=20)
    other.close()
    assert [row["step"] for row in RunFolder(config(root)).metrics("refine")] == [20]


HOLD = """
import sys, time
from cosmos_ray.config import RunConfig
from cosmos_ray.folder import RunFolder
folder = RunFolder(RunConfig(root=sys.argv[1], name="run"))
folder.record("refine", step=10)
print("open", flush=True)
time.sleep(600)
"""


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(root, monkeypatch, caplog):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, root], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(ConfigError, match=f"is in use by process {holder.pid} on"):
        RunFolder(config(root))
    holder.kill()
    holder.wait()
    monkeypatch.setattr(lease, "LEASE_S", 1e6)
    folder = RunFolder(config(root))
    assert f"is taken over from process {holder.pid}" in caplog.text
    assert folder.metrics("refine")[0]["step"] == 10  # the copy was ahead of the bucket
    folder.close()


def test_only_one_of_several_takes_a_lease(root):
    first, second = Lease(below(root, "run")), Lease(below(root, "run"))
    assert first.take() == ""
    first.give_back()
    version = second._look()[0]
    third = Lease(below(root, "run"))
    assert third.take() == first.token
    with pytest.raises(Exception, match="(?i)precondition"):
        second._put(version)
    third.give_back()
    assert second.take() == third.token
    second.give_back(forget=True)
    assert Lease(below(root, "run"))._look() is None


# ---------------------------------------------------------------- the copy


@pytest.fixture
def copies(root, tmp_path):
    """The copy of the driver's machine, and that of an actor's, as paths that say where their original lies."""
    made = []
    for name in ("A", "B"):
        os.environ["COSMOS_RAY_CACHE"] = str(tmp_path / name)
        made.append(local_root(root) / "run")
        made[-1].mkdir(parents=True)
    return made


def test_an_actor_elsewhere_gets_a_checkpoint_and_each_of_its_versions(copies, server, caplog):
    here, there = (copy / "checkpoints" / "refined" for copy in copies)
    for version in (1, 2):
        save_policy(tiny(), here, version)
        published(here)
        assert load_checkpoint(there)[1] == version
    assert fetched("/an/ordinary/path") == Path("/an/ordinary/path")
    stamp = (there / "policy.json").stat().st_mtime_ns
    fetched(there)
    assert (there / "policy.json").stat().st_mtime_ns == stamp  # nothing changed, so nothing is fetched again
    server.stop()
    try:
        assert load_checkpoint(there)[1] == 2 and "going on with the copy that is there" in caplog.text  # as an actor that restarts now
    finally:
        server.start()


def test_a_checkpoint_is_replaced_as_a_whole_wherever_its_writer_is_killed(copies, root, monkeypatch):
    here, there = (copy / "checkpoints" / "refined" for copy in copies)
    save_policy(tiny(), here, 1)
    published(here)
    put, puts = WorkingCopy._put, []

    def killed(self, path, file):
        puts.append(path)
        if len(puts) == 2:
            raise KeyboardInterrupt
        return put(self, path, file)

    save_policy(tiny(), here, 2)
    monkeypatch.setattr(WorkingCopy, "_put", killed)
    with pytest.raises(KeyboardInterrupt):
        published(here)
    monkeypatch.setattr(WorkingCopy, "_put", put)
    assert load_checkpoint(there)[1] == 1  # the one of before, whole
    published(here)
    assert load_checkpoint(there)[1] == 2
    names = {name for name in objects(root) if name.startswith("checkpoints/refined/")}
    assert len({Path(name).parent for name in names}) == 2  # the pointer's folder, and one version's


def test_a_damaged_object_of_a_checkpoint_is_refused(copies, root):
    here, there = (copy / "checkpoints" / "base" for copy in copies)
    save_policy(tiny(), here, 1)
    published(here)
    client = WorkingCopy(below(root, "run"), Path("/nowhere")).client
    weights = next(name for name in objects(root) if name.endswith("model.safetensors"))
    obstore.put(client, weights, b"x")
    with pytest.raises(StoreError, match="model.safetensors is damaged: bring it back from a copy of the run"):
        load_checkpoint(there)
    assert not there.exists()


def test_learner_states_travel_with_who_reads_and_writes_them(copies, root):
    here, there = (copy / "learner" / "base" for copy in copies)
    for step in (10, 20, 30):
        (here / f"step_{step:08d}").mkdir(parents=True)
        (here / f"step_{step:08d}" / "rank0.json").write_text(json.dumps({"step": step}))
        (here / "latest").write_text(f"step_{step:08d}")
        if step == 30:
            shutil.rmtree(here / "step_00000010")
        published(here)
    published(here)  # what is gone goes once two calls have missed it
    WorkingCopy(below(root, "run"), copies[1]).fetch()
    assert not there.exists()
    fetched(there)
    assert sorted(path.name for path in there.iterdir()) == ["latest", "step_00000020", "step_00000030"]
    assert (there / "latest").read_text() == "step_00000030"


def test_states_of_a_learner_elsewhere_are_deleted_there_too(root, copies, tmp_path):
    os.environ["COSMOS_RAY_CACHE"] = str(tmp_path / "B")
    there = copies[1] / "learner" / "refined_from_1"
    there.mkdir(parents=True)
    (there / "latest").write_text("x")
    published(there)
    os.environ["COSMOS_RAY_CACHE"] = str(tmp_path / "A")
    folder = RunFolder(config(root))
    assert folder.learner_states() == {"refined_from_1"} and not folder.learner_state("refined_from_1").exists()
    folder.remove_learner_state("refined_from_1")
    assert folder.learner_states() == set() and not any(name.startswith("learner") for name in objects(root))
    folder.close()


def test_names_in_the_bucket_that_lead_elsewhere_are_not_followed(copies, root, tmp_path):
    client = WorkingCopy(below(root, "run"), Path("/nowhere")).client
    for name in ("x/.hidden", ".lock", "checkpoints/.a/b"):
        obstore.put(client, name, b"1")
    WorkingCopy(below(root, "run"), copies[1]).fetch()
    assert [path.name for path in copies[1].iterdir()] == [".published"]


# ---------------------------------------------------------------- the command line


def test_the_commands_take_a_bucket_as_root(root, capfd):
    assert main(["pretrain", "--root", root, "--name", "run"]) == 2
    assert "there is no run s3://" in capfd.readouterr().err and not objects(root)
    folder = RunFolder(config(root))
    folder.store().commit(make_episode(0))
    folder.close()
    shutil.rmtree(local_root(root))
    assert stored_config(config(root)) is None
    assert main(["replay", "ls", "--root", root, "--name", "run"]) == 0
    assert make_episode(0).key.name in capfd.readouterr().out
    assert stored_config(config(root)) is not None
    assert main(["report", "--root", root, "--name", "run", "--sim.task", "Lift"]) == 2
    assert "nothing was evaluated yet" in capfd.readouterr().err
    assert main(["collect", "--root", root, "--name", "run", "--fresh"]) == 2
    assert "--fresh cannot move a run in a bucket aside" in capfd.readouterr().err


@pytest.mark.parametrize("bad", ["s3://", "ftp://host/runs", "s3://key:secret@bucket/runs", "s3://localhost:9000/runs"])
def test_a_root_that_is_no_bucket_is_one_line(bad, capfd):
    assert main(["collect", "--root", bad, "--name", "run"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "root: " in err and "secret" not in err


def test_a_command_that_fails_before_anything_is_made_leaves_nothing_in_the_bucket(root):
    folder = RunFolder(config(root))
    folder.publish()
    assert "config.json" in objects(root)
    folder.unmake()
    folder.close()
    assert not objects(root) and not folder.path.exists()


def test_what_changes_is_published_without_being_asked(root, monkeypatch):
    monkeypatch.setattr("cosmos_ray.bucket_run.PUBLISH_S", 0.1)
    folder = RunFolder(config(root))
    until, step = time.monotonic() + 120, 0
    while "metrics.jsonl" not in objects(root):  # although it never rests
        assert time.monotonic() < until
        folder.record("refine", step=(step := step + 1))
    folder.close()


def test_a_large_file_is_not_put_as_often_as_it_grows(copies, root, monkeypatch):
    monkeypatch.setattr("cosmos_ray.replay.files.working_copy.LARGE", 10)
    copy, file = WorkingCopy(below(root, "run"), copies[0]), copies[0] / "metrics.jsonl"

    def there() -> int:
        return obstore.head(copy.client, "metrics.jsonl")["size"]

    file.write_text("0123456789\n")
    copy.publish(rest_s=1e6)
    file.write_text("0123456789\n" * 2)
    copy.publish(rest_s=1e6)
    assert there() == 11
    copy.publish()  # as the command ends
    assert there() == 22
