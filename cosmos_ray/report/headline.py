"""States the evaluation in a sentence that claims no more than the paired counts support."""

from __future__ import annotations

ALPHA = 0.05  #: a p-value below this counts as a difference


def headline(arms: list[dict], comparisons: list[dict]) -> str:
    """One to three sentences from the ``arms`` and ``comparisons`` of the report."""
    by_name = {arm["name"]: arm for arm in arms}
    several = sum(bool(arm["candidates"]) for arm in arms) > 1
    sentences = [comparison(by_name[c["arm"]], by_name[c["against"]], c, several) for c in comparisons if c["headline"]]
    if sentences:
        return " ".join(sentences)
    if not arms:
        return "Nothing was evaluated: the run has demonstrations and no simulation."
    first = arms[0]
    only = f"The {first['name']} policy succeeds in {first['successes']} of {first['episodes']} held-out episodes"
    return f"{only} ({interval(first)}); there is nothing to compare it with yet."


def comparison(arm: dict, other: dict, counts: dict, several: bool = False) -> str:
    """A sentence that compares one arm with another on the same initial states. It names the arm where ``several`` arms plan."""
    won, lost, p = counts["won"], counts["lost"], counts["p"]
    score = f"{arm['successes']}/{arm['episodes']} against {other['successes']}/{other['episodes']}"
    paired = f"won {won}, lost {lost}, p {p_value(p)}"
    planning = f"Best-of-{arm['candidates']} planning" + (f" ({arm['name']})" if several else "")
    what = planning if arm["candidates"] else f"The {arm['name']} policy"
    gain = counts["gain_points"]
    if won == lost == 0:
        return f"{what} changed no outcome: {score}."
    if p < ALPHA:
        verb = "raised" if gain > 0 else "lowered"
        if not arm["candidates"]:
            verb = "beats" if gain > 0 else "is worse than"
            return f"{what} {verb} the {other['name']} policy by {abs(gain):.1f} points: {score} ({paired})."
        return f"{what} {verb} success by {abs(gain):.1f} points: {score} ({paired})."
    if won == lost:
        return f"{what} changed nothing measurable: {score} ({paired})."
    return (f"{what} changed nothing measurable: {score}, {'a gain' if gain > 0 else 'a loss'} of {abs(gain):.1f} points "
            f"within chance ({paired}).")


def interval(arm: dict) -> str:
    """Rate and interval as text."""
    return f"{100 * arm['rate']:.0f} %, 95 % interval {100 * arm['low']:.0f} to {100 * arm['high']:.0f} %"


def p_value(p: float) -> str:
    """A p-value with its relation sign: ``= 0.73``, or the bound ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"
