"""What one machine lacks for cosmos_ray, and what to do about it. No Ray: `nodes.py` has every node of a cluster look."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
import psutil
from packaging.requirements import Requirement

from cosmos_ray.errors import ConfigError, SimulationError, StoreError
from cosmos_ray.replay.files.bucket import answers, open_bucket
from cosmos_ray.sim import gl
from cosmos_ray.uri import is_uri

PYTHONS = ((3, 11), (3, 12))
DISK_GB, SHM_GB, MEMORY_GB = 5.0, 1.0, 4.0  #: free, for a small run
GB = 1e9


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    good: bool
    said: str  #: what was found
    todo: str = ""  #: what to do; "" where nothing is wrong


def look(root: str) -> list[Finding]:
    """All checks of this machine. ``root`` is the folder or bucket of runs."""
    return [finding for check in (python, pins, rendering, memory, lambda: disk(root), shared_memory, gpu, lambda: writes(root))
            for finding in check()]


def python() -> Iterator[Finding]:
    """The interpreter."""
    mine = sys.version_info[:2]
    names = " or ".join(".".join(map(str, version)) for version in PYTHONS)
    yield Finding("python", mine in PYTHONS, f"{sys.version.split()[0]} in {sys.prefix}", "" if mine in PYTHONS else f"take Python {names}")


def pins(required: Callable[[], list[str]] = lambda: importlib.metadata.requires("cosmos-ray") or []) -> Iterator[Finding]:
    """The versions of the packages that cosmos_ray was tested with."""
    try:
        requirements = [r for r in map(Requirement, required()) if r.marker is None or r.marker.evaluate({"extra": ""})]
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).parents[2] / "requirements.txt"
        if not file.exists():
            yield Finding("packages", False, "cosmos_ray is not installed here, and its requirements.txt is not beside it",
                          "run `pip install -e .` in the checkout, or cluster/setup.sh")
            return
        requirements = [Requirement(line) for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    wrong = []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    yield Finding("packages", not wrong, "; ".join(wrong) or f"{len(requirements)} as pinned",
                  "run cluster/setup.sh, or `pip install -r requirements.txt`, on this machine" if wrong else "")


def rendering() -> Iterator[Finding]:
    """Whether a picture of MuJoCo comes, from a process of its own."""
    os.environ.pop(gl.RENDERED, None)  # an earlier answer does not count
    try:
        backend = gl.choose_backend()
    except (ConfigError, SimulationError) as error:
        yield Finding("rendering", False, str(error), f"install {gl.PACKAGES}, or the driver's EGL; on a node that only learns, nothing")
        return
    drawn = backend not in gl.DISABLED
    yield Finding("rendering", drawn, f"MUJOCO_GL={backend}", "" if drawn else "unset MUJOCO_GL where simulators should draw")


def memory() -> Iterator[Finding]:
    """Free memory of the host."""
    free, total = psutil.virtual_memory().available / GB, psutil.virtual_memory().total / GB
    good = free >= MEMORY_GB
    yield Finding("memory", good, f"{free:.1f} of {total:.1f} GB free",
                  "" if good else f"free {MEMORY_GB:g} GB: a small run takes 4 GB, the workers 0.3 GB each and more with many tasks")


def disk(root: str) -> Iterator[Finding]:
    """Room where Ray keeps its files, and where the runs are."""
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    for what, folder in (("disk of Ray", temporary), ("disk of the runs", "" if is_uri(root) else root)):
        if not folder:
            continue
        free = shutil.disk_usage(_there(folder)).free / GB
        other = "$RAY_TMPDIR" if folder == temporary else "--root"
        yield Finding(what, free >= DISK_GB, f"{free:.0f} GB free at {folder}",
                      "" if free >= DISK_GB else f"free {DISK_GB:g} GB there, or give another {other}")


def shared_memory() -> Iterator[Finding]:
    """/dev/shm, in which Ray keeps its objects: weights and batches of observations."""
    try:
        total = shutil.disk_usage("/dev/shm").total / GB
    except OSError:
        yield Finding("/dev/shm", False, "there is none", "mount a tmpfs there; Ray keeps its objects on the disk meanwhile, which is slow")
        return
    todo = "give the container more: `docker run --shm-size=8g`, or an emptyDir of medium Memory in Kubernetes"
    yield Finding("/dev/shm", total >= SHM_GB, f"{total:.1f} GB", "" if total >= SHM_GB else todo)


def gpu() -> Iterator[Finding]:
    """Whether torch can use the GPUs that the machine has."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("GPU", True, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    elif Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi"):
        yield Finding("GPU", False, "the machine has NVIDIA's driver and torch can use no GPU",
                      "compare `nvidia-smi` with the CUDA version of torch, and see whether CUDA_VISIBLE_DEVICES hides the GPUs")
    else:
        yield Finding("GPU", True, "none; everything runs on the CPU")


def writes(root: str) -> Iterator[Finding]:
    """Whether this machine can write where the runs are."""
    name = f".doctor-{secrets.token_hex(6)}"
    try:
        if is_uri(root):
            with answers():
                bucket = open_bucket(root)
                obstore.put(bucket, name, b"x")
                obstore.delete(bucket, name)
        else:
            file = _there(root) / name
            file.write_bytes(b"x")
            file.unlink()
    except (OSError, StoreError) as error:
        yield Finding("runs", False, f"cannot write to {root} ({str(error).splitlines()[0][:200]})",
                      "mount it here, or mend its rights or credentials, or give another --root")
        return
    yield Finding("runs", True, f"{root} can be written")


def _there(folder: str) -> Path:
    """``folder``, or the nearest folder above that exists."""
    path = Path(folder).expanduser().absolute()
    return next(p for p in (path, *path.parents) if p.exists())
