"""How good the predicted values are, and two arms on the same initial states."""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmos_ray.errors import ConfigError
from cosmos_ray.evidence import auc, brier, calibration, paired, wilson
from cosmos_ray.replay.format.episode import SOURCES
from cosmos_ray.watch.episodes import Episodes, Filter

BINS = 10


def value_panel(episodes: Episodes, chosen: Filter) -> dict[str, Any]:
    """Values of the decisions of the chosen episodes against how these ended: histogram by outcome, calibration, AUC, Brier score.

    ``calibration`` rows have ``low`` and ``high``, which a :class:`Filter` takes to list the episodes of the bin.
    """
    rows = episodes.rows(chosen)
    index = episodes.store.index
    held = episodes.decisions(rows[index["invalid"][rows] == 0])
    success = index["success"][held[:, 0].astype(np.int64)]
    values = np.clip(held[:, 2], 0, 1)
    histogram = {outcome: np.histogram(values[success == won], BINS, (0, 1))[0].tolist()
                 for outcome, won in (("success", True), ("failure", False))}
    table = calibration(values, success, success.astype(np.float64), BINS)
    for row in table:
        row["wilson"] = wilson(round(row["success_share"] * row["count"]), row["count"])
    return {"decisions": len(held), "episodes": len(np.unique(held[:, 0])), "unread": episodes.unread, "histogram": histogram,
            "calibration": table, "auc": auc(values, success), "brier": brier(values, success)}


def groups(episodes: Episodes) -> list[dict[str, Any]]:
    """The arms that were evaluated: {id, arm, version, episodes, successes}, oldest first. Their episodes share a run key and an arm."""
    index = episodes.store.index
    rows = np.sort(episodes.rows(Filter(source="eval")))
    out: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows.tolist():
        run, arm = int(index["run"][row]), max(0, int(episodes.arms[row]))
        group = out.setdefault((run, arm), {"id": f"{run}.{arm}", "arm": episodes.arm_names.values[arm] or "evaluation", "episodes": 0,
                                            "version": int(index["policy_version"][row]), "successes": 0})
        group["episodes"] += 1
        group["successes"] += int(index["success"][row])
    return list(out.values())


def compare(episodes: Episodes, first: str, second: str) -> dict[str, Any]:
    """Two of :func:`groups`, by the initial states that both played: {won, lost, both, neither, counts}.

    The lists have {task, seed, initial_state, a, b}: the names of both episodes. "won" is where only ``first`` succeeded. ConfigError.
    """
    index = episodes.store.index
    sides = []
    for group in (first, second):
        run, _, arm = group.partition(".")
        if not (run.isdigit() and arm.isdigit()):
            raise ConfigError(f"arm {group!r} is unknown: take the id of one that was evaluated")
        known = np.flatnonzero(index.alive[: len(episodes.arms)])
        rows = known[(index["source"][known] == SOURCES.index("eval")) & (index["run"][known] == int(run))
                     & (np.maximum(episodes.arms[known], 0) == int(arm)) & (index["invalid"][known] == 0)]
        sides.append({(int(index["task"][r]), int(index["seed"][r]), int(index["initial_state"][r])): r for r in rows.tolist()})
    lists: dict[str, list[dict[str, Any]]] = {"won": [], "lost": [], "both": [], "neither": []}
    a, b = [], []
    for key in sorted(sides[0].keys() & sides[1].keys()):
        left, right = sides[0][key], sides[1][key]
        a.append(bool(index["success"][left]))
        b.append(bool(index["success"][right]))
        word = {(True, False): "won", (False, True): "lost", (True, True): "both", (False, False): "neither"}[a[-1], b[-1]]
        lists[word].append({"task": index.tables["task"].values[key[0]], "seed": key[1],
                            "initial_state": index.tables["initial_state"].values[key[2]], "a": index.names[left], "b": index.names[right]})
    return {**lists, "counts": {**paired(np.array(a, np.int8), np.array(b, np.int8)), "pairs": len(a), "a": sum(a), "b": sum(b)}}
