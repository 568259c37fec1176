"""Diagnostics of planner, value function and world model, from the decisions in stored episodes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_ray.evidence import auc, brier, calibration
from cosmos_ray.replay.format.schema import DamagedEpisode
from cosmos_ray.replay.store import ReplayStore

if TYPE_CHECKING:
    from cosmos_ray.report.trace import EpisodeTrace

logger = logging.getLogger(__name__)

BINS = 10  #: of the calibration table
TIE = 1e-4  #: scores are stored to four digits: closer ones are equal


@dataclass(frozen=True)
class Outcome:
    """One episode's result and its ``info``."""

    name: str
    success: bool
    length: int
    invalid: str
    info: dict

    @property
    def decisions(self) -> list[dict]:
        """The decisions that have a finite value, each ``{step, value, chosen, scores}``; empty for demonstrations."""
        return [d for d in self.info.get("decisions", []) if d.get("value") is not None and math.isfinite(d["value"])]


def outcomes(store: ReplayStore, names: list[str]) -> list[Outcome]:
    """The named episodes, from their headers. Leaves out a missing or damaged episode and logs a warning."""
    found = []
    for name in names:
        try:
            view = store.view(name)
        except FileNotFoundError:
            logger.warning("the report leaves out episode %s: it is not in the store", name)
            continue
        except DamagedEpisode as error:
            store.discard(name, str(error))
            continue
        summary = view.summary
        found.append(Outcome(name, summary.success, summary.length, summary.invalid, view.header["info"]))
    return found


def planning(episodes: list[Outcome]) -> dict | None:
    """Statistics of the planner's choices over all decisions; None when no decision had more than one candidate.

    ``spread`` is the best minus the worst score of a decision. ``within_decision`` is the mean standard deviation of the scores within a
    decision; ``between_decisions`` is the standard deviation of the mean score over decisions. Where the first is much smaller than the
    second, scores separate situations, not candidates.
    """
    rows = [(e.success, d) for e in episodes for d in e.decisions if len(d["scores"]) > 1]
    if not rows:
        return None
    scores = [np.asarray(d["scores"], np.float64) for _, d in rows]
    chosen = np.array([d["chosen"] for _, d in rows])
    spread = np.array([s.max() - s.min() for s in scores])
    means = np.array([s.mean() for s in scores])
    gain = np.array([s[c] - s[0] for s, c in zip(scores, chosen, strict=True)])
    candidates = sorted({len(s) for s in scores})
    picks = np.bincount(chosen, minlength=candidates[-1])
    best = [s[c] for s, c in zip(scores, chosen, strict=True)]
    return {"episodes": len(episodes), "decisions": len(rows), "candidates": candidates, "share_not_first": float((chosen != 0).mean()),
            "expected_share_not_first": float(np.mean([1 - 1 / len(s) for s in scores])), "share_ties": float((spread < TIE).mean()),
            "mean_spread": float(spread.mean()), "median_spread": float(np.median(spread)), "mean_gain_over_first": float(gain.mean()),
            "within_decision": float(np.mean([s.std() for s in scores])), "between_decisions": float(means.std()),
            "score_auc": auc(best, [success for success, _ in rows]),
            "picks": picks.tolist(), "spreads": [round(float(s), 4) for s in spread]}


def values(groups: dict[str, list[Outcome]], gamma: float, chunk: int) -> dict | None:
    """Quality of the policy's own value, per group and for all groups together; None when no decision has a value.

    The policy predicts a value before the outcome is known, so no group has seen its own labels. The value's training target is the
    discounted return: ``gamma ** h`` for a success, 0 for a failure. ``h`` is the number of steps from the end of the chunk to the end of
    the episode.
    """
    out = {}
    for name, episodes in {**groups, "all": [e for group in groups.values() for e in group]}.items():
        rows = [(d, e) for e in episodes if not e.invalid for d in e.decisions]
        if not rows:
            continue
        predicted = np.clip([(d["value"] + 1) / 2 for d, _ in rows], 0, 1)
        success = np.array([e.success for _, e in rows])
        target = np.array([e.success * gamma ** max(0, e.length - d["step"] - chunk) for d, e in rows])
        first = [(e.decisions[0]["value"], e.success) for e in episodes if not e.invalid and e.decisions]
        out[name] = {"episodes": len(first), "decisions": len(rows), "success_share": float(success.mean()),
                     "mean_predicted": float(predicted.mean()), "mean_target": float(target.mean()), "auc": auc(predicted, success),
                     "auc_first_decision": auc([v for v, _ in first], [s for _, s in first]), "brier": brier(predicted, success),
                     "brier_constant": brier(np.full(len(success), success.mean()), success), "target_mse": brier(predicted, target),
                     "calibration": calibration(predicted, success, target, BINS)}
    if len(out) == 2:  # one group and "all", which is the same
        out.pop("all")
    return out or None


def values_by_task(store: ReplayStore, groups: dict[str, list[Outcome]], gamma: float, chunk: int) -> dict[str, dict]:
    """:func:`values` of all groups together by task; tasks without a decision are left out."""
    task_of = {summary.name: summary.task for summary in store.summaries()}
    by_task: dict[str, list[Outcome]] = {}
    for episode in (episode for group in groups.values() for episode in group):
        by_task.setdefault(task_of.get(episode.name, ""), []).append(episode)
    return {task: found["episodes"] for task, episodes in by_task.items() if (found := values({"episodes": episodes}, gamma, chunk))}


def imagination(trace: EpisodeTrace) -> dict:
    """Mean absolute error of the imagined frames of a planned episode, in grey levels of 255, decision by decision.

    ``unchanged`` is the error of the prediction that nothing moves: the frame at the decision against the frame that followed.
    """
    def error(left, right) -> list[float]:
        return [round(float(np.abs(a.astype(np.float64) - b).mean()), 3) for a, b in zip(left, right, strict=True)]

    imagined, unchanged = error(trace.imagined, trace.happened), error(trace.observed, trace.happened)
    return {"seed": int(trace.seed), "success": bool(trace.success), "length": int(trace.length), "candidates": int(trace.candidates),
            "steps": [int(s) for s in trace.steps], "chosen": [int(c) for c in trace.chosen],
            "scores": [[float(s) for s in row] for row in trace.scores], "values": [float(v) for v in trace.values],
            "imagined_error": imagined, "unchanged_error": unchanged, "mean_imagined_error": float(np.mean(imagined)),
            "mean_unchanged_error": float(np.mean(unchanged))}
