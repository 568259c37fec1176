"""The result of an audit: how many points each learned part costs. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmos_ray.evidence import auc, paired_with_interval, rank_correlation, wilson
from cosmos_ray.oracle.chooser import ARMS

#: From perfect planning to learned planning: (arm, the part that costs the points between the arm before and this arm, why).
LADDER = (("return", "candidates", "no candidate at any decision leads to success"),
          ("V(true s')", "value", "the learned value ranks real futures wrongly"),
          ("V(s')", "world model", "the imagined futures differ from the real ones"))

#: The scores that rank candidates.
SCORES = ("Q(s,a)", "V(s')", "V(true s')")


def shares(outcomes: list[dict[str, Any]], probes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts per arm, paired differences against "policy", points lost per part, and how well each score ranks candidates.

    Args: outcomes and probes as :class:`cosmos_ray.oracle.core.OracleCore` returns them.
    """
    by_arm = {arm: {o["index"]: bool(o["success"]) for o in outcomes if o["arm"] == arm} for arm in ARMS}
    common = sorted(set.intersection(*(set(found) for found in by_arm.values() if found)))
    success = {arm: np.array([found[i] for i in common]) for arm, found in by_arm.items() if found}
    out: dict[str, Any] = {"episodes": len(common), "arms": {}, "lost": [], "probes": _ranking(probes)}
    for arm, won in success.items():
        low, high = wilson(int(won.sum()), len(won))
        row = {"successes": int(won.sum()), "rate": float(won.mean()), "low": low, "high": high, "outcomes": won.astype(int).tolist()}
        if arm != "policy":
            row |= paired_with_interval(won, success["policy"])
        out["arms"][arm] = row
    above = 1.0
    for arm, part, why in LADDER:
        if arm in success:
            out["lost"].append({"part": part, "points": 100 * (above - float(success[arm].mean())), "why": why})
            above = float(success[arm].mean())
    return out


def _ranking(probes: list[dict[str, Any]]) -> dict[str, Any]:
    """How candidates differ, and how well each score ranks them."""
    returns = [np.array(p["return"]) for p in probes]
    mixed = [p for p, r in zip(probes, returns, strict=True) if (r > 0).any() and (r == 0).any()]
    out: dict[str, Any] = {
        "decisions": len(probes), "spread": float(np.mean([p["spread"] for p in probes])) if probes else None,
        "candidates_differ": len(mixed), "all_fail": sum(not (r > 0).any() for r in returns), "judgements": {},
    }
    for name in SCORES:
        scores = np.concatenate([p[name] for p in probes]) if probes else np.zeros(0)
        ends = np.concatenate(returns) > 0 if probes else np.zeros(0, bool)
        chosen = [p["return"][int(np.argmax(p[name]))] > 0 for p in mixed]
        out["judgements"][name] = {
            "auc": auc(scores, ends),
            "auc_within_a_decision": _mean([auc(np.array(p[name]), np.array(p["return"]) > 0) for p in mixed]),
            "chose_success": _mean(chosen), "chance": _mean([float(np.mean(np.array(p["return"]) > 0)) for p in mixed]),
        }
    out["agreement"] = _agreement(probes)
    return out


def _agreement(probes: list[dict[str, Any]]) -> dict[str, float]:
    """{score: mean rank correlation with V(true s') among the candidates of a decision}.

    The scores are the planner's own, and V of an imagined future with one true part. Where a true part raises the correlation, the world
    model gets this part wrong and the value reads it.
    """
    scores: dict[str, list[float]] = {}
    for probe in probes:
        rows = {name: probe[name] for name in SCORES[:2]}
        rows |= {f"V(s') with the true {part}": values for part, values in probe["parts"].items()}
        for name, values in rows.items():
            scores.setdefault(name, []).append(rank_correlation(values, probe["V(true s')"]))
    return {name: float(np.mean(found)) for name, found in scores.items()}


def _mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None
