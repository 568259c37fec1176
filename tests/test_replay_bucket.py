"""The bucket of a store: a server in trouble, addresses, credentials, and runs whose store lies there."""

import dataclasses
import logging
import re
import time
from pathlib import Path

import pytest

from cosmos_ray.commands.stage import run_stage
from cosmos_ray.config import RunConfig, SimConfig, check
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError, StoreError, StoreUnavailable
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.files import bucket
from cosmos_ray.report.settings_table import commands
from cosmos_ray.rollout.outbox import Outbox
from cosmos_ray.run import open_run
from tests.s3_server import CREDENTIALS, NAMES, episode_objects, fill, fresh_uri, opened, running_server
from tests.test_replay_episode import make_episode

server = pytest.fixture(running_server, scope="module")
uri = pytest.fixture(fresh_uri)


def test_a_server_that_is_gone_is_one_clear_line_and_the_store_goes_on_when_it_is_back(uri, server, caplog):
    store = ReplayStore(uri)
    fill(store, [0])
    outbox = Outbox(store, 1e6)
    server.stop()
    try:
        with pytest.raises(StoreUnavailable) as error:
            store.refresh()
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
        outbox.put(make_episode(1), "waiting")
        assert outbox.flush() == [] and len(outbox) == 1
    finally:
        server.start()
    done = []
    for _ in range(100):
        done += outbox.flush()
        if done:
            break
        time.sleep(0.1)
    assert done == [("waiting", True)] and len(episode_objects(store)) == 2
    assert len(caplog.records) == 2 and "secret" not in caplog.text
    assert sorted(s.key.seed for s in ReplayStore(uri, create=False).refresh()) == [0, 1]


def test_a_server_that_refuses_access_is_an_error_that_is_not_tried_again(uri, server):
    store = ReplayStore(uri)
    server.refuse = "AccessDenied"
    try:
        for action in (lambda: store.commit(make_episode(0)), store.refresh, lambda: ReplayStore(uri)):
            with pytest.raises(StoreError, match="refuses this access") as error:
                action()
            assert not isinstance(error.value, StoreUnavailable) and "\n" not in str(error.value)
    finally:
        server.refuse = ""


def test_a_bucket_that_is_not_there_is_one_clear_error(uri, server):
    with pytest.raises(StoreError, match="there is no such bucket"):
        ReplayStore(server.uri("missing/x"))
    with pytest.raises(StoreError, match="is not a replay store"):
        ReplayStore(server.uri("missing/x"), create=False)


def test_credentials_are_never_shown(uri, caplog):
    caplog.set_level(logging.DEBUG, "cosmos_ray")
    store = ReplayStore(uri)
    fill(store, range(2))
    shown = [f"{store.root} {store.storage.name} {store.summaries()[0].path} {store.storage.where('x')}"]
    with pytest.raises(StoreError) as error:
        store.read(NAMES[9])
    shown.append(str(error.value))
    store.storage._put(store.path(NAMES[0]), b"torn")
    opened(uri)
    shown += [caplog.text, str(ReplayStore(uri).quarantine.entries())]
    assert "quarantined s3://" in caplog.text and all("secret" not in text for text in shown)


# ---------------------------------------------------------------- addresses and credentials


@pytest.mark.parametrize("uri", [
    "s3://mykey:se/cr%et@bucket/x", "s3://mykey:se cr%et@bucket/x", "s3://mykey:se?cr%et@bucket/x", "s3://mykey:secr%et@/x",
    "s3://mykey:se%2Fcr%25et@bucket/x?no_such_option=1", "nonsense://mykey:secr%et@bucket/x", "s3://mykey@bucket/x",
])  # fmt: skip
def test_credentials_in_a_uri_are_refused_and_not_shown(uri):
    for error, attempt in ((StoreError, lambda: ReplayStore(uri)), (ConfigError, lambda: check(replaced(RunConfig(), uri)))):
        with pytest.raises(error, match="holds credentials: leave them out, and give them in the environment") as raised:
            attempt()
        assert "\n" not in str(raised.value) and not re.search("mykey|cr%|%et|2Fcr|secr", str(raised.value))


@pytest.mark.parametrize("uri, message", [
    ("ftp://host/x", "ftp://host/x is neither a folder nor an s3:// or gs:// URI"),
    ("s3://localhost:9000/x", "has a server where the bucket's name belongs: write s3://BUCKET/FOLDER?endpoint_override=localhost:9000"),
    ("s3:///x", "names no bucket: write s3://BUCKET/FOLDER"),
    ("s3://bucket/x?no_such_option=1", "s3://bucket/x cannot be used as a store: it has no option 'no_such_option', only region"),
    ("gs://bucket/x?region=eu", "it has no option 'region', only none"),
])  # fmt: skip
def test_a_wrong_uri_is_one_clear_error(uri, message):
    with pytest.raises(StoreError, match=re.escape(message)) as error:
        ReplayStore(uri)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variable", bucket.ENDPOINTS)
def test_the_endpoint_may_stand_in_the_environment(uri, server, monkeypatch, variable):
    fill(ReplayStore(uri), [0])
    monkeypatch.setenv(variable, f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    plain = uri.partition("?")[0]
    assert [s.key.seed for s in ReplayStore(plain, create=False).refresh()] == [0]


def test_the_endpoint_in_a_uri_may_be_an_url_and_comes_before_the_environment(uri, server, monkeypatch):
    fill(ReplayStore(uri), [0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    plain = uri.partition("?")[0]
    assert len(ReplayStore(f"{plain}?endpoint_override=http://127.0.0.1:{server.port}&region=us-east-1", create=False).refresh()) == 1


@pytest.mark.parametrize("profile", ["default", "robots"])
def test_keys_and_region_may_stand_in_a_profile(uri, tmp_path, monkeypatch, profile):
    fill(ReplayStore(uri), [0])
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    if profile != "default":
        monkeypatch.setenv("AWS_PROFILE", profile)
    (tmp_path / "keys").write_text(f"[{profile}]\naws_access_key_id = key\naws_secret_access_key = sec%ret\n")
    (tmp_path / "config").write_text(f"[{profile if profile == 'default' else 'profile ' + profile}]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert len(ReplayStore(uri, create=False).refresh()) == 1
    assert bucket._profile() == {"access_key_id": "key", "secret_access_key": "sec%ret", "region": "us-east-1"}
    (tmp_path / "keys").write_text("aws_secret_access_key\n")
    with pytest.raises(StoreError, match="keys cannot be read: ") as error:
        ReplayStore(uri, create=False)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_collects_into_a_store_elsewhere_and_keeps_where_it_is(uri, tmp_path):
    """The real command, with real workers."""
    config = RunConfig(root=str(tmp_path), name="run", demos=2, sim=SimConfig(image_size=32))
    config = replaced(config, uri)
    with open_run(config, quiet=True) as run:
        said = run_stage("collect", run)
    assert said.startswith("2 demonstrations in s3://b")
    store = opened(uri)
    assert sum(s.episode_class == "demo" for s in store.summaries()) == 2 and not (tmp_path / "run" / "replay").exists()
    kept = stored_config(RunConfig(root=str(tmp_path), name="run"))
    assert kept.replay.store == uri
    folder = RunFolder(kept)
    assert len(folder.store()) == len(store)
    folder.close()
    with pytest.raises(ConfigError, match="--fresh cannot move the replay store s3://b.* aside"):
        RunFolder(kept, fresh=True)


def test_a_report_repeats_where_the_store_lies():
    assert all("--replay.store s3://bucket/x" in line["command"] for line in commands(replaced(RunConfig(), "s3://bucket/x")))


def test_a_store_of_another_kind_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="replay.store: ftp://host/x is neither"):
        check(replaced(RunConfig(), "ftp://host/x"))


def test_a_folder_elsewhere_is_a_store_too(tmp_path):
    config = replaced(RunConfig(root=str(tmp_path), name="run"), str(tmp_path / "elsewhere"))
    folder = RunFolder(config)
    folder.store().commit(make_episode(0))
    assert folder.replay == Path(tmp_path / "elsewhere") and len(ReplayStore(tmp_path / "elsewhere", create=False).refresh()) == 1
    folder.close()


def replaced(config, store):
    return dataclasses.replace(config, replay=dataclasses.replace(config.replay, store=store))
