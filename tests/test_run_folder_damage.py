"""A run whose files are damaged, or whose folder cannot be written: one line, nothing lost, and reading goes on."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.run import open_run
from cosmos_ray.use import Use
from tests.conftest import file_system
from tests.test_command_line import make_run
from tests.test_replay_episode import make_episode

DAMAGE = {
    "a list": (b"[1, 2]", "it holds list instead of an object"),
    "a number": (b"3", "it holds int instead of an object"),
    "null": (b"null", "it holds NoneType instead of an object"),
    "a text": (b'"sim"', "it holds str instead of an object"),
    "empty": (b"", "Expecting value"),
    "truncated": (b'{"format": 2, "sim": {"task": "Li', "Unterminated string"),
    "binary": (bytes(range(128, 200)), "'utf-8' codec"),
    "a name twice": (b'{"format": 2, "seed": 1, "seed": 2}', "it has 'seed' twice"),
    "far too deep": (b'{"a":' * 100_000, "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", [["pretrain"], ["report"], ["replay", "ls"], ["collect"]], ids=" ".join)
def test_a_config_json_that_is_no_object_of_settings_is_one_line(damage, command, tmp_path, capfd):
    make_run(tmp_path, "door")
    content, reason = DAMAGE[damage]
    (tmp_path / "door" / "config.json").write_bytes(content)
    assert main([*command, "--root", str(tmp_path), "--name", "door"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "config.json is damaged (" in err and reason in err
    assert (tmp_path / "door" / "config.json").read_bytes() == content


@pytest.mark.parametrize("name", ["a b", "-x", ".hidden", "a\nb", "a/b", "..", "tür", "a*", "", "x" * 101, "a\tb", "$HOME", "a;b"])
def test_a_name_that_is_not_plain_is_refused(name, tmp_path, capfd):
    assert main(["collect", "--root", str(tmp_path), f"--name={name}"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and re.search("is no plain name: use letters|is not a folder name: use letters", err)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_run_or_of_the_root_is_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    for arguments in (["--root", str(tmp_path), "--name", "file"], ["--root", str(tmp_path / "file"), "--name", "door"]):
        for command in ("collect", "pretrain"):
            assert main([command, *arguments]) == 2
            err = capfd.readouterr().err
            assert len(err.splitlines()) == 1 and "file" in err


@pytest.fixture
def read_only_run(tmp_path):
    """A run with an episode, on a file system that is read-only."""
    with file_system(tmp_path / "disk", "24m") as disk:
        make_run(disk, "door")
        ReplayStore(disk / "door" / "replay").commit(make_episode(0, "demo", size=32))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield disk


def test_a_read_only_run_is_read_and_what_would_write_says_so(read_only_run, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--root", str(read_only_run), "--name", "door"]
    for verb in (["ls"], ["stats"], ["verify", "--decode"], ["show", "demo", "--to", str(tmp_path / "episode.png")]):
        assert main(["replay", verb[0], *where, *verb[1:]]) == 0, capfd.readouterr().err
    assert (tmp_path / "episode.png").stat().st_size
    capfd.readouterr()
    for command in (["pretrain"], ["collect"], ["evaluate"]):
        assert main([*command, *where]) == 2
        err = capfd.readouterr().err
        assert len(err.splitlines()) == 1 and "door cannot be written: mount it writable or copy the run" in err
    for command in ("report", "plan"):
        assert main([command, *where]) == 2
        assert "door cannot be written: give --to FOLDER" in capfd.readouterr().err
    assert main(["report", *where, "--to", str(tmp_path / "out")]) == 2
    assert "nothing was evaluated yet" in capfd.readouterr().err
    assert main(["replay", "repair", *where]) != 0 and len(capfd.readouterr().err.splitlines()) == 1
    assert not os.access(read_only_run / "door", os.W_OK)


def test_a_command_that_fails_before_anything_is_made_leaves_no_run(tmp_path):
    config = RunConfig(root=str(tmp_path), name="new")
    with pytest.raises(ConfigError, match="no weights"), open_run(config, Use(needs_ray=False)):
        raise ConfigError("no weights")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no weights"), open_run(config, Use(needs_ray=False)) as run:
        run.folder.record("import")
        raise ConfigError("no weights")
    assert (tmp_path / "new" / "config.json").exists()  # something was made: it stays
