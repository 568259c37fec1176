"""Episodes as Parquet: ``steps.parquet`` with one row per state, ``episodes.parquet`` with one row per episode.

Steps have ``episode``, ``step``, ``proprio``, ``state``, ``action``, ``label``, ``reward``, ``policy_version``, ``predicted_value`` and
the JPEG columns ``frame/<camera>`` as in the store; row groups are small, so that a reader can fetch a few steps. Episodes have
what the header of an episode has, ``info`` as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore

ROW_GROUP = 64


def export_parquet(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, progress: Progress | None = None
) -> Exchanged:
    """Write the episodes into the new folder ``target``. Episodes with other columns than the first, and damaged ones, are skipped
    and named. StoreError if ``target`` exists or nothing can be written."""
    todo, skipped, rows = list(summaries), [], []
    with new_folder(target) as folder:
        writer = None
        try:
            for number, summary in enumerate(todo):
                try:
                    view = store.view(summary.name)
                    view.check()
                    table = step_table(view)
                    writer = writer or pq.ParquetWriter(folder / "steps.parquet", table.schema, compression="zstd")
                    if table.schema != writer.schema:
                        raise StoreError("its cameras or vector sizes differ from the first episode's")
                    writer.write_table(table, row_group_size=ROW_GROUP)
                    rows.append(episode_row(view))
                except (StoreError, FileNotFoundError) as error:
                    skipped.append((summary.name, str(error)))
                if progress:
                    progress(number + 1, len(todo))
        finally:
            if writer is not None:
                writer.close()
        if not rows:
            raise nothing_to_write(skipped)
        pq.write_table(pa.Table.from_pylist(rows), folder / "episodes.parquet")
    return Exchanged(len(rows), tuple(skipped))


def step_table(view: EpisodeView) -> pa.Table:
    """The rows of an episode with its name in front; without the checksums, which are of the store's own format."""
    table = pa.table(view.batch).replace_schema_metadata(None)
    table = table.drop_columns([name for name in table.column_names if name.startswith("frame_crc/")])
    # Parquet readers stumble over fixed-size lists that are null, as the last action is.
    vector = pa.types.is_fixed_size_list
    lists = [field.with_type(pa.list_(field.type.value_type)) if vector(field.type) else field for field in table.schema]
    table = table.cast(pa.schema(lists))
    return table.add_column(0, "episode", pa.array([view.summary.name] * table.num_rows, pa.string()))


def episode_row(view: EpisodeView) -> dict:
    """What is known of an episode as a whole, in plain values."""
    s = view.summary
    return {
        "episode": s.name, "run": s.key.run, "task": s.task, "source": s.source, "seed": s.key.seed, "attempt": s.key.attempt,
        "initial_state": s.key.initial_state, "instruction": view.instruction, "success": s.success, "score": s.score,
        "return": s.episode_return, "length": s.length, "timed_out": s.timed_out, "invalid": s.invalid, "policy_version": s.policy_version,
        "created": s.created, "info": json.dumps(view.header["info"]),
    }  # fmt: skip
