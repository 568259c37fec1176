"""Shells and machines that are not as usual: no home, long temporary folders, closed pipes, odd variables. One line, or it just works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, file_system
from tests.test_command_line import make_run

CONNECT = """
import sys
from cosmos_ray.connection import connect
from cosmos_ray.errors import ConfigError
try:
    connect("", simulates=False)
except ConfigError as error:
    print(error)
else:
    print("started")
"""


def python(*arguments: str, cwd: Path = ROOT, without: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    given = {k: v for k, v in environment().items() if k not in (*without, "RAY_TMPDIR")} | {"PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *arguments], env=given, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_a_temporary_folder_too_long_for_sockets_is_one_line(tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    for name in ("TMPDIR", "RAY_TMPDIR"):
        said = python("-c", CONNECT, **{name: str(long)}).stdout.splitlines()
        assert said[-1].startswith("Ray did not start on this machine") and said[-1].endswith("such as /tmp"), said


def test_a_temporary_folder_that_cannot_be_written_is_one_line(tmp_path):
    with file_system(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        said = python("-c", CONNECT, RAY_TMPDIR=str(disk)).stdout.splitlines()
    assert said[-1].startswith("Ray did not start on this machine") and "set RAY_TMPDIR to another folder" in said[-1], said


def test_without_a_home_that_can_be_written_compiled_functions_go_to_a_temporary_folder(tmp_path):
    code = "import os, cosmos_ray.sim.gl as gl; gl.load(); import numba; print(numba.config.CACHE_DIR, os.environ['MPLCONFIGDIR'])"
    with file_system(tmp_path / "home", "1m") as home:
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        (tmp_path / "t").mkdir()
        done = python("-c", code, HOME=str(home), TMPDIR=str(tmp_path / "t"), without=("NUMBA_CACHE_DIR", "MPLCONFIGDIR"))
        assert done.stdout.split() == [f"{tmp_path}/t/cosmos_ray_{os.getuid()}/{name}" for name in ("numba_cache_dir", "mplconfigdir")]
        (tmp_path / "t" / f"cosmos_ray_{os.getuid()}").chmod(0o777)  # numba runs what its cache holds
        done = python("-c", code, HOME=str(home), TMPDIR=str(tmp_path / "t"), without=("NUMBA_CACHE_DIR", "MPLCONFIGDIR"))
        assert f"/cosmos_ray_{os.getuid()}/" not in done.stdout and done.stdout.startswith(f"{tmp_path}/t/cosmos_ray_"), done.stdout
        done = python("-c", "from cosmos_ray.released import hub; import cosmos_ray.sim; print(hub())", HOME=str(home),
                      without=("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
        assert done.stdout.strip() == f"{home}/.cache/huggingface/hub"
    done = python("-c", "import os, cosmos_ray.sim; print(os.environ.get('NUMBA_CACHE_DIR'))", HOME=str(tmp_path),
                  without=("NUMBA_CACHE_DIR",))
    assert done.stdout.strip() == "None"


def test_a_terminal_of_plain_ascii_shows_the_help(tmp_path):
    for name in ("evaluate", "demo"):
        done = python("-m", "cosmos_ray", name, "--help", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", COLUMNS="60")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-500:]


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m cosmos_ray refine --help-all | true; exit ${{PIPESTATUS[0]}}"],
                          env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 128 + signal.SIGPIPE) and "Traceback" not in done.stderr and "Error" not in done.stderr, done.stderr


def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path):
    make_run(tmp_path, "door")
    started = subprocess.Popen([sys.executable, "-m", "cosmos_ray", "pretrain", "--root", str(tmp_path), "--name", "door"], cwd=ROOT,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130 and "Traceback" not in err and "interrupted" in err, err[-1000:]


def test_a_private_ray_starts_with_odd_variables():
    odd = {"OMP_NUM_THREADS": "many", "CUDA_VISIBLE_DEVICES": "garbage", "HTTP_PROXY": "http://192.0.2.1:9"}
    said = python("-c", CONNECT, **odd).stdout.splitlines()
    assert said[-1:] == ["started"], said


def test_an_address_where_no_ray_is_is_named():
    said = python("-c", CONNECT, RAY_ADDRESS="127.0.0.1:1").stdout.splitlines()
    assert "RAY_ADDRESS" in said[-1], said


@pytest.mark.parametrize("variables, complaint", [
    ({"WANDB_MODE": "garbage"}, "wandb refuses what a WANDB_ variable says (1 validation error"),
    ({"WANDB_API_KEY": "short"}, "wandb is not available")])
def test_wandb_variables_that_cannot_work_are_one_line(variables, complaint, tmp_path):
    code = """
import sys
from cosmos_ray.config.settings import new_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.tracking import Tracker
config = new_config({"root": sys.argv[1], "name": "x", "wandb": "online"})
try:
    Tracker(config, RunFolder(config)).log("stage", a=1)
except ConfigError as error:
    print(error)
"""
    done = python("-c", code, str(tmp_path), **variables)
    said = (done.stdout + done.stderr).strip()
    assert complaint in said and len(said.splitlines()) == 1 and done.returncode == 0, said
