"""What a study found: counts of every arm, paired differences with intervals, and the table of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cosmos_ray.evidence import paired_with_interval, wilson


def summarise(outcomes: Sequence[Mapping[str, str]], arms: Sequence[str], base: str, pairs: Sequence[tuple[str, str]] = ()) -> dict:
    """Counts of every arm over all training seeds, and paired differences: {"arms": {...}, "pairs": {"a over b": {...}}}.

    A pair is the same initial state of the same training seed under two arms. Intervals are 95 % percentile bootstrap over the pairs, in
    points.

    Args:
        outcomes: per training seed, by arm, a text with 0 or 1 for each initial state, "-" for a quarantined one. An initial state that is
            quarantined under one arm counts under none.
    """
    counted = [{arm: _kept(of_seed[arm], of_seed.values()) for arm in arms if arm in of_seed} for of_seed in outcomes]
    joined = {arm: np.concatenate([found[arm] for found in counted]) for arm in arms if all(arm in found for found in counted)}
    table, differences = {}, {}
    for arm, won in joined.items():
        low, high = wilson(int(won.sum()), len(won))
        table[arm] = {"successes": int(won.sum()), "episodes": len(won), "low": low, "high": high,
                      "by_seed": [int(found[arm].sum()) for found in counted]}
    for arm, other in [*((arm, base) for arm in arms if arm != base), *pairs]:
        if arm in joined and other in joined and f"{arm} over {other}" not in differences:
            differences[f"{arm} over {other}"] = paired_with_interval(joined[arm], joined[other])
    return {"arms": table, "pairs": differences}


def _kept(text: str, all_arms: Iterable[str]) -> np.ndarray:
    return np.array([int(text[i]) for i in range(len(text)) if all(other[i] != "-" for other in all_arms)], int)


def table(task: str, result: Mapping, base: str) -> str:
    """The table of one task as Markdown."""
    lines = [f"### {task}", "", f"| arm | successes (each training seed) | 95 % (Wilson) | over {base}, points (95 %) | won, lost |",
             "|---|---|---|---|---|"]
    for name, arm in result["arms"].items():
        pair, gain = result["pairs"].get(f"{name} over {base}"), " | "
        if pair:
            gain = f"{_points(pair)} | {pair['won']}, {pair['lost']}"
        lines.append(f"| {name} | {arm['successes']}/{arm['episodes']} ({', '.join(map(str, arm['by_seed']))}) | "
                     f"{100 * arm['low']:.1f} to {100 * arm['high']:.1f} % | {gain} |")
    more = {name: pair for name, pair in result["pairs"].items() if not name.endswith(f" over {base}")}
    if more:
        lines += ["", "| pair | points (95 %) | won, lost |", "|---|---|---|"]
        lines += [f"| {name} | {_points(pair)} | {pair['won']}, {pair['lost']} |" for name, pair in more.items()]
    return "\n".join(lines) + "\n"


def _points(pair: Mapping) -> str:
    return f"{pair['gain_points']:+.1f} ({pair['ci_low']:+.1f} to {pair['ci_high']:+.1f})"
