"""Choice of the OpenGL backend, in fresh processes because it is settled once per process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.sim import gl


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", gl.RENDERED)}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_unset_backend_is_probed_and_left_for_children():
    done = python("import os; from cosmos_ray.sim import gl; print(gl.choose_backend(), os.environ['MUJOCO_GL'])")
    chosen, inherited = done.stdout.split()
    assert chosen == inherited and chosen in gl.CANDIDATES


def test_users_backend_is_kept_and_tried_once():
    code = """
import os
from cosmos_ray.sim import gl
print(gl.choose_backend())
gl._probe = None
print(gl.choose_backend(), os.environ['COSMOS_RAY_GL'])
"""
    assert python(code, MUJOCO_GL="OSMesa", COSMOS_RAY_GL="").stdout.split() == ["osmesa"] * 3


@pytest.mark.parametrize("backend, complaint", [
    ("glfw", r"MUJOCO_GL=glfw needs a display and there is none \(\$DISPLAY is not set\): unset MUJOCO_GL"),
    ("nonsense", "MUJOCO_GL=nonsense is no backend of MuJoCo: unset it, or set it to one of egl, osmesa, glfw"),
    ("wgl", "MUJOCO_GL=wgl is no backend"),
])
def test_a_backend_that_cannot_draw_here_is_refused_before_anything_starts(backend, complaint, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setenv(gl.RENDERED, "")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=complaint):
        gl.choose_backend()


def test_a_backend_without_its_library_is_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setenv(gl.RENDERED, "")
    monkeypatch.setenv("DISPLAY", ":99")  # nobody serves it
    with pytest.raises(ConfigError, match=r"MuJoCo cannot use MUJOCO_GL=glfw \(.*\); unset MUJOCO_GL") as caught:
        gl.choose_backend()
    assert "\n" not in str(caught.value)


def test_machine_without_a_backend_names_the_packages(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "CANDIDATES", ("nothing", "nowhere"))
    with pytest.raises(SimulationError, match="libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6") as caught:
        gl.choose_backend()
    assert "\n" not in str(caught.value) and "MUJOCO_GL" not in os.environ


def test_hanging_driver_is_given_up(monkeypatch):
    monkeypatch.setattr(gl, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gl, "PROBE_SECONDS", 0.2)
    assert "no picture within" in gl._probe("egl")


def test_disabled_rendering_fails_at_the_first_picture_only():
    code = """
from cosmos_ray.config import SimConfig
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim.environment import Environment
env = Environment(SimConfig())
env.step([0, 0, 0, 0])
try:
    env.render()
except SimulationError as error:
    print(error)
"""
    assert "MUJOCO_GL=disabled disables rendering" in python(code, MUJOCO_GL="disabled").stdout


def test_backend_unknown_to_mujoco_is_reported_in_one_line():
    done = python("from cosmos_ray.sim import gl; gl.load()", MUJOCO_GL="nonsense")
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: MUJOCO_GL=nonsense is no backend of MuJoCo" in last


def test_import_of_robosuite_is_quiet():
    done = python("from cosmos_ray.sim import gl; gl.load()", MUJOCO_GL="egl")
    assert done.returncode == 0 and done.stdout == "" and "robosuite" not in done.stderr


def test_rendering_from_another_thread_is_refused():
    code = """
import threading
from cosmos_ray.config import SimConfig
from cosmos_ray.errors import SimulationError
from cosmos_ray.sim.environment import Environment
env = Environment(SimConfig())
env.render()
def other():
    try:
        env.render()
    except SimulationError as error:
        print(error)
thread = threading.Thread(target=other)
thread.start()
thread.join()
"""
    assert "another thread" in python(code).stdout
