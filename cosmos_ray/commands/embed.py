"""``replay embed``: the text embeddings of every instruction of a store, in one file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from cosmos_ray.config import RunConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.model.embedding_file import embed_to_file
from cosmos_ray.replay.sampling.demonstrated import demonstrated
from cosmos_ray.replay.store import ReplayStore


def embed(store: ReplayStore, options: argparse.Namespace, progress: Callable[[int, int], None]) -> tuple[str, int]:
    """Write them; what to print and the exit code."""
    instructions = list(demonstrated(store).instructions)
    run = stored_config(RunConfig(root=options.root, name=options.name)) if options.name and not options.store else None
    instructions += [sim.instruction for sim in run.sim.each()] if run is not None else []
    target = Path(options.to).expanduser()
    count, new = embed_to_file(instructions, Path(options.t5).expanduser(), target, progress)
    return f"{target} has the embeddings of {count} instructions, {new} of them new: give it as --model.text-path", 0
