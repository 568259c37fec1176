"""The store as a Ray Data dataset, for curation and statistics over more episodes than one process wants to read."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.parquet import episode_row, step_table
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.store import ReplayStore

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


def read_episodes(
    root: str | Path, summaries: Iterable[EpisodeSummary] | None = None, *, rows: str = "episode", per_task: int = 16
) -> ray.data.Dataset:
    """The store in ``root``, or of it only ``summaries``, read in tasks of ``per_task`` episodes.

    A row is an ``"episode"`` (what its header says) or a ``"step"`` (its columns, JPEG bytes included, and the episode's name). An
    episode that cannot be read is left out with a warning in the task's log. StoreError if there is none to read.
    Needs the package's extra ``data``: Ray Data imports pandas.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise StoreError(f"Ray Data needs {error.name}: pip install 'cosmos-ray[data]'") from error
    if rows not in ("episode", "step"):
        raise StoreError(f"rows = {rows!r}: a row is an 'episode' or a 'step'")
    if summaries is None:
        store = ReplayStore(root, create=False)
        summaries = store.refresh()
    names = [summary.name for summary in summaries]
    if not names:
        raise StoreError(f"{root} has no episode to read")
    groups = [{"names": names[i : i + per_task]} for i in range(0, len(names), per_task)]
    dataset = ray.data.from_items(groups, override_num_blocks=len(groups))
    return dataset.map_batches(partial(_read, root=str(root), rows=rows), batch_size=1, batch_format="pyarrow")


def _read(batch: pa.Table, root: str, rows: str) -> pa.Table:
    """The episodes of one group, in a Ray task."""
    store = ReplayStore(root, create=False)
    tables = []
    for name in (name for group in batch["names"].to_pylist() for name in group):
        try:
            view = store.view(name)
            view.check()
            tables.append(step_table(view) if rows == "step" else pa.Table.from_pylist([episode_row(view)]))
        except (StoreError, FileNotFoundError) as error:
            logger.warning("leaving out episode %s: %s", name, error)
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
