"""Where the parts of a released policy lie on this machine: a file, a folder with one such file, or the local Hugging Face cache.

Nothing is downloaded. The cache has a folder ``models--ORG--REPO`` for each repository, with ``refs/main`` (a revision) and
``snapshots/REVISION/``, whose files are links to blobs without a suffix: so links to files are never followed to their targets here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from cosmos_ray.errors import ConfigError

#: In a name, what tells a file beside the weights from the weights.
_BESIDE = re.compile(r"t5_embeddings|tokenizer|vae|statistics", re.IGNORECASE)

INDEX = ".safetensors.index.json"  #: how the name of a file ends that lists the safetensors files of one model


def hub() -> Path:
    """The folder of the Hugging Face cache, as huggingface_hub finds it."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(given or os.path.join(home, "hub")))


def local(path: str | Path) -> Path:
    """The file or folder that ``path`` names, as an absolute path: a path, a repository's folder in the Hugging Face cache (its
    snapshot is meant), or ``ORG/REPO`` or ``ORG/REPO/FILE`` of the cache. What is nowhere comes back as it is.

    ConfigError where the cache has the repository but not this file or a single snapshot, and for a link to a file that is gone.
    """
    there = Path(path).expanduser()
    if there.exists():
        return _snapshot(there.resolve() if there.is_dir() else there.parent.resolve() / there.name)
    if there.is_symlink():
        raise ConfigError(f"{there} is a link to {os.readlink(there)}, which is missing: the download is incomplete, repeat it")
    if named := re.fullmatch(r"([\w-][\w.-]*)/([\w-][\w.-]*)(?:/(.+))?", str(path)):
        repository, rest = hub() / f"models--{named[1]}--{named[2]}", named[3]
        if repository.is_dir():
            folder = _snapshot(repository)
            if rest and not (folder / rest).exists():
                raise ConfigError(f"{named[1]}/{named[2]} has no {rest} in {folder}, only {_listed(folder.iterdir())}: download it, or "
                                  "name another file")
            return folder / rest if rest else folder
    return there


def problem(path: str) -> str:
    """What to say of a ``path`` that :func:`local` does not find."""
    cached = f", and the Hugging Face cache {hub()} has no such repository" if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)+", path) else ""
    return f"{path!r} does not exist{cached}"


def weights(path: str | Path) -> Path:
    """The weights at ``path``: what :func:`local` finds or, in a folder of no format of its own, the one file of weights in it."""
    folder = local(path)
    if not folder.is_dir() or (folder / "policy.json").is_file() or (folder / "config.json").is_file():
        return folder
    if indices := [file for file in folder.glob(f"*{INDEX}") if not _BESIDE.search(file.name)]:
        return _only(folder, indices, "indices of weights")
    files = [file for suffix in (".pt", ".pth", ".ckpt", ".safetensors") for file in folder.glob(f"*{suffix}")
             if not _BESIDE.search(file.stem)]
    transformer = folder / "transformer"
    return _only(folder, files + [transformer] * (transformer / "config.json").is_file(), "weights")


def tokenizer(path: str | Path) -> Path:
    """The Wan 2.1 VAE at ``path``: a diffusers folder, or a file such as ``tokenizer.pth``, also one level below."""
    folder = local(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return folder
    files = [file for place in (folder, folder / "tokenizer") for file in place.glob("*")
             if file.suffix in (".pth", ".pt", ".safetensors") and re.search("tokenizer|vae", file.stem, re.IGNORECASE)]
    vae = folder / "vae"
    return _only(folder, files + [vae] * (vae / "config.json").is_file(), "VAEs")


def text(path: str | Path) -> Path:
    """The text embeddings or the T5 folder at ``path``; of a folder of other things, the one file of embeddings in it."""
    folder = local(path)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return folder
    return _only(folder, [file for file in folder.glob("*t5_embeddings*") if file.suffix in (".pkl", ".safetensors")], "text embeddings")


def statistics(path: str | Path) -> Path:
    """The dataset statistics at ``path``: the file, or the one ``*dataset_statistics.json`` in a folder."""
    folder = local(path)
    return _only(folder, list(folder.glob("*dataset_statistics.json")), "dataset statistics") if folder.is_dir() else folder


def _only(folder: Path, found: list[Path], what: str) -> Path:
    """The one of ``found``, or ``folder`` where there is none. ConfigError names several."""
    if len(found) > 1:
        raise ConfigError(f"{folder} has {len(found)} {what}: {_listed(found)}; give the path of one of them")
    return found[0] if found else folder


def _listed(paths: Iterable[Path]) -> str:
    names = sorted(path.name for path in paths)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"


def _snapshot(folder: Path) -> Path:
    """The snapshot of a repository's folder in the cache; ``folder`` itself where it is none."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    revision = folder / "refs" / "main"
    if revision.is_file() and (named := snapshots / revision.read_text().strip()).is_dir() and named != snapshots:
        return named
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        advice = f"{_listed(found)}; give the path of one of them" if found else "the download is incomplete, repeat it"
        raise ConfigError(f"{folder} has {len(found) or 'no'} snapshots: {advice}")
    return found[0]
