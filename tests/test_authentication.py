"""Real Ray clusters that ask for a token, and private ones that nobody else may join."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from cosmos_ray.learner.engine import free_port

JOIN = """
    import sys, time
    from cosmos_ray.connection import connect
    from cosmos_ray.errors import ConfigError
    began = time.monotonic()
    try:
        connect(sys.argv[1], simulates=False)
    except ConfigError as error:
        print(f"{time.monotonic() - began:.2f} {error}")
    else:
        import ray
        print(f"{time.monotonic() - began:.2f} joined {ray.get_runtime_context().gcs_address}")
"""
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_TMPDIR")


def surroundings(home: Path, **more: str) -> dict[str, str]:
    """Environment of a user at ``home`` who has set nothing for Ray but ``more``; Ray's files are in a folder of the user's own."""
    (home / "r").mkdir(parents=True, exist_ok=True)
    return {**{k: v for k, v in os.environ.items() if k not in OURS}, "HOME": str(home), "RAY_TMPDIR": str(home / "r"), **more}


def join(address: str, environment: dict[str, str]) -> tuple[float, str]:
    """Seconds that an attempt to join took, and what came of it."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(JOIN), address], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, _, said = done.stdout.splitlines()[-1].partition(" ")
    return float(seconds), said


@pytest.fixture
def home():
    """A user's home with a short path, for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="u"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def guarded(home):
    """A cluster that asks for a token: its address, its token's file and its folder."""
    (home / "token").write_text("1" * 64)
    address = f"127.0.0.1:{free_port()}"
    ray = Path(sys.executable).with_name("ray")
    environment = surroundings(home / "head", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(home / "token"))
    head = subprocess.Popen([ray, "start", "--head", f"--port={address.split(':')[1]}", "--num-cpus=1", "--include-dashboard=false",
                             "--disable-usage-stats", "--block"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (home / "head" / "r" / "ray" / "ray_current_cluster").exists() and time.monotonic() < end:
        time.sleep(0.2)
    yield address, home / "token", home / "head"
    head.terminate()
    head.wait(60)


def test_a_cluster_that_refuses_us_is_named_with_its_cause_within_5_s(guarded, home):
    address, token, head = guarded
    (home / "own" / ".ray").mkdir(parents=True)
    (home / "own" / ".ray" / "auth_token").write_text("2" * 64)  # what Ray leaves after a private run
    for environment, cause in (
            (surroundings(home / "none"), "asks for authentication and there is no token here: set RAY_AUTH_MODE=token"),
            (surroundings(home / "own"), "asks for authentication, which is off here: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"),
            (surroundings(home / "own", RAY_AUTH_MODE="token"), "refuses the token of ~/.ray/auth_token (authentication)"),
            (surroundings(home / "none", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="abc"), "refuses the token of $RAY_AUTH_TOKEN"),
    ):  # fmt: skip
        seconds, said = join(address, environment)
        assert cause in said and address in said and seconds < 5
    assert join(address, surroundings(home / "none", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token)))[1].startswith("joined")
    head_folder = str(head / "r")
    assert join("auto", surroundings(home / "none", RAY_TMPDIR=head_folder, RAY_AUTH_TOKEN_PATH=str(token)))[1].startswith("joined")
    assert "refuses the token" in join("auto", surroundings(home / "own", RAY_TMPDIR=head_folder))[1]


def test_a_private_ray_leaves_no_token_behind_and_nobody_else_joins(home):
    code = """
        import ray
        from cosmos_ray.connection import connect
        connect("", simulates=False)
        assert ray.get(ray.remote(lambda: 3).remote()) == 3
        print(ray.get_runtime_context().gcs_address, flush=True)
        input()
    """
    environment = surroundings(home / "user")
    private = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        address = private.stdout.readline().strip()
        assert ":" in address
        assert not (home / "user" / ".ray").exists()
        seconds, said = join("auto", environment)
        assert "--address auto finds no Ray on this machine that `ray start` began" in said and seconds < 5
        seconds, said = join(address, environment)
        assert "asks for authentication and there is no token here" in said and seconds < 5
    finally:
        private.communicate("\n", timeout=60)


def test_a_port_of_something_else_is_told_from_a_cluster(home):
    server = subprocess.Popen([sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, cwd=home)
    try:
        port = server.stdout.readline().split("port ")[1].split()[0]
        seconds, said = join(f"127.0.0.1:{port}", surroundings(home / "user"))
        assert f"no Ray cluster answers at 127.0.0.1:{port}, but something else" in said and seconds < 5
    finally:
        server.kill()
        server.wait()
