"""Frames that a store does not hold, rendered from the simulator states by a child process.

``python -m cosmos_ray.watch.rendering STORE NAME FOLDER [TASK]`` is the child: it writes ``STEP-CAMERA.jpg`` into the folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from cosmos_ray.errors import StoreError

KEPT = 8  #: rendered episodes


class Rendering:
    """Starts children, at most one at a time, and hands out the pictures that they make. Not thread-safe.

    ``task`` is the run's, whose module the child imports for tasks of gymnasium: no stored file decides what is imported.
    """

    def __init__(self, store: str, task: str = "") -> None:
        self._store, self._task = store, task
        self._root = Path(tempfile.mkdtemp(prefix="cosmos_ray-watch-"))
        self._made: OrderedDict[str, subprocess.Popen[bytes]] = OrderedDict()

    def begin(self, name: str) -> dict[str, Any]:
        """Have the episode's frames rendered; :meth:`status` of it. StoreError while another episode is being rendered."""
        if name in self._made and self._made[name].poll() in (None, 0):
            return self.status(name)
        if any(child.poll() is None for child in self._made.values()):
            raise StoreError("another episode is being rendered: try again when it is done")
        self._forget(name)
        while len(self._made) >= KEPT:
            self._forget(next(iter(self._made)))
        folder = self._root / name
        folder.mkdir()
        with open(folder / "error", "wb") as log:
            command = [sys.executable, "-m", "cosmos_ray.watch.rendering", self._store, name, str(folder), self._task]
            self._made[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.status(name)

    def status(self, name: str) -> dict[str, Any]:
        """{state, frames, error}: "none", "running", "done" or "failed"; how many steps are rendered; why it failed."""
        child = self._made.get(name)
        if child is None:
            return {"state": "none", "frames": 0, "error": ""}
        folder, code = self._root / name, child.poll()
        state = "running" if code is None else "done" if code == 0 else "failed"
        error = ""
        if state == "failed":
            lines = (folder / "error").read_text(errors="replace").strip().splitlines()
            error = lines[-1][:500] if lines else f"the rendering process ended with {code}"
        return {"state": state, "frames": sum(1 for _ in folder.glob("*-0.jpg")), "error": error}

    def frame(self, name: str, camera: int, step: int) -> bytes | None:
        """A rendered picture as JPEG, None where there is none (yet)."""
        if name not in self._made:
            return None
        try:
            return (self._root / name / f"{step}-{camera}.jpg").read_bytes()
        except FileNotFoundError:
            return None

    def _forget(self, name: str) -> None:
        child = self._made.pop(name, None)
        if child is not None:
            if child.poll() is None:
                child.kill()
            child.wait()
            shutil.rmtree(self._root / name, ignore_errors=True)

    def close(self) -> None:
        """End the child and delete what it made."""
        while self._made:
            self._forget(next(iter(self._made)))
        shutil.rmtree(self._root, ignore_errors=True)


def render(store: str, name: str, folder: Path, task: str = "") -> None:
    """Write every step's pictures into ``folder``. StoreError where this machine cannot render the episode as it was."""
    from cosmos_ray.replay.store import ReplayStore
    from cosmos_ray.sim.make import load
    from cosmos_ray.sim.state_render import StateRenderer

    if task:
        load(task)
    view = ReplayStore(store, read_only=True).view(name)
    renderer = StateRenderer()
    try:
        for step in range(view.length + 1):
            for camera, jpeg in enumerate(renderer(view, [step])[step]):
                unfinished = folder / "unfinished"
                unfinished.write_bytes(jpeg)
                unfinished.rename(folder / f"{step}-{camera}.jpg")
    finally:
        renderer.close()


if __name__ == "__main__":
    from cosmos_ray.errors import CosmosRayError

    try:
        render(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    except CosmosRayError as error:
        sys.exit(str(error))
