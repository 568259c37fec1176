"""The page of a planning audit."""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib.figure import Figure

from cosmos_ray.oracle.chooser import ARMS
from cosmos_ray.report import style
from cosmos_ray.report.charts import draw_arms
from cosmos_ray.report.page import html_table, write_page

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Planning audit: {task}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1.5rem auto; padding: 0 1.25rem; color: #1d2733; }}
img {{ width: 100%; }} table {{ border-collapse: collapse; font-size: 0.92rem; }}
td, th {{ padding: 0.3rem 0.9rem 0.3rem 0; text-align: right; border-bottom: 1px solid #d9dee3; }}
td:first-child, th:first-child, td:last-child, th:last-child {{ text-align: left; }}</style></head><body>
<h1>Planning audit: {task}, checkpoint {checkpoint}</h1>
<p>{headline}</p>
<img src="{image}" alt="success rate per arm and points lost per part">
<h2>Arms</h2>{arms}
<h2>How well candidates are ranked</h2><p>{probed}</p>{judgements}{agreement}
</body></html>
"""


def headline(result: dict) -> str:
    """The result of the audit in two sentences."""
    lost = ", ".join(f"{row['points']:.1f} to the {row['part']}" for row in result["lost"])
    policy, planned, oracle = (result["arms"][arm] for arm in ("policy", "V(s')", "return"))
    return (f"Over {result['episodes']} held-out initial states the policy alone succeeds in {100 * policy['rate']:.1f} %, "
            f"best of {result['candidates']} by V(s') in {100 * planned['rate']:.1f} %, and the best choice there is in "
            f"{100 * oracle['rate']:.1f} %. Points lost from 100: {lost}.")


def draw_audit(result: dict) -> Figure:
    """Draw the success of every arm, from no planning to the best choice there is."""
    return draw_arms([{"name": name, "episodes": result["episodes"], **arm} for name, arm in result["arms"].items()])


def write_audit_page(result: dict, path: Path) -> None:
    """Write the page, whole or not at all."""
    arms = [(name, f"{a['successes']}/{result['episodes']}", f"{100 * a['rate']:.1f} %", f"[{100 * a['low']:.1f}, {100 * a['high']:.1f}]",
             f"{a['gain_points']:+.1f} [{a['ci_low']:+.1f}, {a['ci_high']:+.1f}]" if "gain_points" in a else "",
             f"{a['won']} / {a['lost']}" if "won" in a else "", ARMS[name]) for name, a in result["arms"].items()]
    probes = result["probes"]
    judged = [(name, _number(row["auc"]), _number(row["auc_within_a_decision"]), _share(row["chose_success"]), _share(row["chance"]))
              for name, row in probes["judgements"].items()]
    spread = _number(probes["spread"])
    page = _PAGE.format(
        task=html.escape(result["task"]), checkpoint=html.escape(result["checkpoint"]), headline=html.escape(headline(result)),
        image=style.data_uri(style.png(draw_audit(result))),
        arms=html_table(("arm", "successes", "rate", "95 % interval", "points over the policy", "won / lost", "how it chooses"), arms),
        probed=f"{probes['decisions']} decisions of the policy; at {probes['candidates_differ']} of them some candidates lead to "
               f"success and some to failure, at {probes['all_fail']} all fail. Mean standard deviation of the candidates' actions: "
               f"{spread}.",
        agreement=_agreement(probes["agreement"]),
        judgements=html_table(("judgement", "AUC over all candidates", "AUC within a decision", "chose a success", "by chance"), judged))
    write_page(path, page)


def _agreement(found: dict[str, float]) -> str:
    """The section on the parts of the future; empty where nothing was probed."""
    if not found:
        return ""
    return ("<h2>Which part of the imagined future misleads the value</h2><p>Rank correlation with V of the true future among the "
            "candidates of one decision: by what the planner has, and with one part of the imagined future replaced by the real one.</p>"
            + html_table(("scored by", "rank correlation"), [(name, _number(value)) for name, value in found.items()]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
