"""Chooses the OpenGL backend, and is the one place that imports MuJoCo and robosuite.

Both libraries read ``MUJOCO_GL`` at import, and robosuite silently sets ``egl`` when the variable is empty. So every module
of this package imports them through :func:`load`, which sets the variable first.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

from cosmos_ray.errors import ConfigError, SimulationError

log = logging.getLogger(__name__)

CANDIDATES = ("egl", "osmesa")
BACKENDS = ("egl", "osmesa", "glfw")
RENDERED = "COSMOS_RAY_GL"  #: the variable that names the backend which rendered a picture, for child processes
DISABLED = ("disable", "disabled", "off", "false", "0")
PACKAGES = "libegl1 libegl-mesa0 libgl1-mesa-dri libosmesa6"
PROBE_SECONDS = 60

_PROBE = """
import importlib, os
import mujoco
gl = importlib.import_module("mujoco." + os.environ["MUJOCO_GL"])
context = gl.GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom type='sphere' size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
scene = mujoco.MjvScene(model, 10)
camera = mujoco.MjvCamera()
camera.distance = 4
renderer = mujoco.MjrContext(model, 50)
mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, renderer)
mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, 7, scene)
mujoco.mjr_render(mujoco.MjrRect(0, 0, 64, 64), scene, renderer)
import numpy
pixels = numpy.zeros((64, 64, 3), numpy.uint8)
mujoco.mjr_readPixels(pixels, None, mujoco.MjrRect(0, 0, 64, 64), renderer)
print("usable" if pixels.any() else "blank", flush=True)
os._exit(0)
"""


def choose_backend() -> str:
    """Choose the OpenGL backend of this process and write it to ``MUJOCO_GL``.

    Keeps a value that the user set, once it has rendered a picture. Otherwise tries ``egl``, then ``osmesa``: each renders one
    64-pixel picture in a subprocess with a time limit, because a broken driver can hang or kill its process. Child processes
    inherit the variables and do not try again.

    Raises:
        ConfigError: ``MUJOCO_GL`` names no backend, or one that does not render here.
        SimulationError: neither backend works; names the Debian packages that provide them.
    """
    # A software rasteriser's own threads cost a sixth of a small picture, and take cores from other simulators.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen:
        if chosen not in DISABLED and os.environ.get(RENDERED) != chosen:
            _check_backend(chosen)
            os.environ[RENDERED] = chosen
        return chosen
    reasons = []
    for backend in CANDIDATES:
        reason = _probe(backend)
        if not reason:
            log.debug("rendering with MUJOCO_GL=%s", backend)
            os.environ["MUJOCO_GL"] = os.environ[RENDERED] = backend
            return backend
        reasons.append(f"{backend}: {reason}")
    raise SimulationError(
        f"no OpenGL backend renders on this machine ({'; '.join(reasons)}); install the Debian packages {PACKAGES}, "
        "or set MUJOCO_GL to a backend that works"
    )


def _check_backend(backend: str) -> None:
    """Raise ConfigError for a value of ``MUJOCO_GL`` that cannot draw here."""
    if backend not in BACKENDS:
        raise ConfigError(f"MUJOCO_GL={backend} is no backend of MuJoCo: unset it, or set it to one of {', '.join(BACKENDS)}")
    if backend == "glfw" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ConfigError("MUJOCO_GL=glfw needs a display and there is none ($DISPLAY is not set): unset MUJOCO_GL, or set it to egl or "
                          "osmesa")
    reason = _probe(backend)
    if reason:
        raise ConfigError(f"MuJoCo cannot use MUJOCO_GL={backend} ({reason}); unset MUJOCO_GL to let a working backend be found")


def _probe(backend: str) -> str:
    """Render a picture with ``backend`` in a fresh process: empty text for success, else the reason of the failure."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no picture within {PROBE_SECONDS} s"
    if done.stdout.strip().endswith("usable"):
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:160] if lines else f"exit code {done.returncode}"


def load() -> tuple[ModuleType, ModuleType]:
    """Import and return ``(mujoco, robosuite)``, with the backend chosen first.

    Silences robosuite's log lines but its errors: at import robosuite warns about optional packages and macro files that
    this project does not use, and it logs a line per controller.

    Raises:
        SimulationError: no backend works, or the one in ``MUJOCO_GL`` cannot be loaded.
    """
    choose_backend()
    robosuite_log = logging.getLogger("robosuite_logs")
    if _only_errors not in robosuite_log.filters:
        robosuite_log.addFilter(_only_errors)
    backend = os.environ["MUJOCO_GL"]
    try:
        import mujoco
        import robosuite
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _unusable(backend, error) from error
    os.environ["MUJOCO_GL"] = backend  # robosuite overwrites values it does not like, such as `disabled`, with egl

    if mujoco.get_mju_user_warning() is None:
        # MuJoCo's own handler prints, and writes MUJOCO_LOG.TXT to the working directory.
        mujoco.set_mju_user_warning(_log_warning)
    return mujoco, robosuite


def _log_warning(message: str) -> None:
    log.debug("MuJoCo: %s", message)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def context(size: int) -> Any:
    """A new OpenGL context (``size`` pixels square) of the chosen backend, current on the calling thread.

    Raises:
        SimulationError: rendering is disabled, or the backend cannot make a context.
    """
    backend = choose_backend()
    if backend in DISABLED:
        raise SimulationError(f"MUJOCO_GL={backend} disables rendering; unset it, or set it to egl or osmesa")
    try:
        if backend == "egl":
            from mujoco.egl import GLContext
        elif backend == "osmesa":
            from mujoco.osmesa import GLContext
        else:
            from mujoco.gl_context import GLContext
        made = GLContext(size, size)
        made.make_current()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise _unusable(backend, error) from error
    return made


def _unusable(backend: str, error: Exception) -> SimulationError:
    return SimulationError(
        f"MuJoCo cannot use MUJOCO_GL={backend} ({str(error)[:120]}); install the Debian packages {PACKAGES}, "
        "or unset MUJOCO_GL to let a working backend be found"
    )
