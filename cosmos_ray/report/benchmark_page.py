"""The page and the terminal's table of a policy's evaluation on a suite."""

from __future__ import annotations

import html
import statistics
from pathlib import Path
from typing import Any

from cosmos_ray.report.headline import p_value
from cosmos_ray.report.page import html_table, write_page

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{suite}: {run}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 1.5rem auto; padding: 0 1.25rem; color: #1d2733; }}
table {{ border-collapse: collapse; font-size: 0.92rem; }}
td, th {{ padding: 0.3rem 0.9rem 0.3rem 0; text-align: right; border-bottom: 1px solid #d9dee3; }}
td:first-child, th:first-child {{ text-align: left; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: 0.6rem 0.8rem; }}</style></head><body>
<h1>{suite}, run {run}</h1>
<p>{what}</p>
{tables}
<h2>Reproduce</h2>
<pre>{command}</pre>
<h3>Versions and machine</h3>{versions}
<h3>Simulator fingerprint, as far as all tasks share it</h3>{fingerprint}
<h3>Simulation</h3>{simulation}
<h3>Policy</h3>{policies}
</body></html>
"""


def benchmark_text(out: dict[str, Any]) -> str:
    """The result as a text table: every arm over all, by noise seed and by task; then pairs."""
    width = max(19, *(2 + len(task) for task in out["tasks"]), *map(len, out["arms"]))
    lines = []
    for name, arm in out["arms"].items():
        lines.append(f"{name:<{width}} {_counts(arm)}  {_over_seeds(arm)}".rstrip())
        lines += [f"  {task:<{width - 2}} {_counts(row)}  {row['instruction']}" for task, row in arm["tasks"].items()]
    lines += [f"{pair['arm']} against {pair['against']}: {_gain(pair)}" for pair in out["pairs"]]
    if other := out.get("against"):
        lines.append(f"{other['arm']} against {other['other']} of run {other['run']}: {_gain(other)}")
    return "\n".join([*lines, *(f"initial state {row['seed']} of {row['task']} is quarantined and counts in no arm: {row['reason']}"
                                for row in out["quarantined"])])


def write_benchmark_page(out: dict[str, Any], path: Path) -> None:
    """Write the page, whole or not at all: the tables of :func:`benchmark_text`, and all that it takes to repeat them."""
    tables = []
    head = ("task", *out["arms"])
    rows = [(f"{task}: {next(arm['tasks'][task]['instruction'] for arm in out['arms'].values() if task in arm['tasks'])}",
             *(_cell(arm["tasks"].get(task)) for arm in out["arms"].values()))
            for task in out["tasks"] if any(task in arm["tasks"] for arm in out["arms"].values())]
    tables.append("<h2>Success</h2>" + html_table(head, [*rows, ("all tasks", *map(_cell, out["arms"].values()))]))
    seeds = [(f"seed {seed}", *(_cell(arm["seeds"][seed]) for arm in out["arms"].values())) for seed in out["noise_seeds"]]
    tables.append("<h2>Noise seeds</h2>" + html_table(("", *out["arms"]), [*seeds, ("", *map(_over_seeds, out["arms"].values()))]))
    pairs = [(f"{pair['arm']} against {pair['against']}", _gain(pair)) for pair in out["pairs"]]
    if other := out.get("against"):
        pairs.append((f"{other['arm']} against {other['other']} of run {other['run']}", _gain(other)))
    if pairs:
        tables.append("<h2>On the same states, with the same noise</h2>" + html_table(("", "points [95 % bootstrap interval]"), pairs))
    if out["quarantined"]:
        tables.append("<h2>Quarantined initial states, which count in no arm</h2>" + html_table(
            ("task", "state", "why"), [(row["task"], row["seed"], row["reason"]) for row in out["quarantined"]]))
    what = (f"{len(out['tasks'])} tasks, {out['trials']} held-out initial states each, noise seeds "
            f"{', '.join(map(str, out['noise_seeds']))}: every task, state and seed once. Cells: successes of episodes, rate, Wilson 95 % "
            "interval.")
    policies = [(name, arm["checkpoint"], arm["policy_version"], arm["planner"] or "no planning", ", ".join(sorted(set(
        key.rpartition(":")[2] for key in arm["digests"].values())))) for name, arm in out["arms"].items()]
    write_page(path, _PAGE.format(
        suite=html.escape(out["suite"]), run=html.escape(out["run"]), what=html.escape(what), tables="".join(tables),
        command=html.escape(out["command"]), versions=_pairs_of(out["versions"]), fingerprint=_pairs_of(out["fingerprint"]),
        simulation=_pairs_of({**out["simulation"], "initial states": f"seeds {out['states'][0]} to {out['states'][-1]}"}),
        policies=html_table(("arm", "checkpoint", "version", "planner", "digests of weights and settings, by task"), policies)))


def _pairs_of(table: dict[str, Any]) -> str:
    return html_table(("", ""), list(table.items()))


def _counts(row: dict[str, Any]) -> str:
    return (f"{row['successes']:4d}/{row['episodes']:<4d} = {100 * row['rate']:5.1f} %  [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")


def _cell(row: dict[str, Any] | None) -> str:
    return " ".join(_counts(row).split()) if row else "-"


def _over_seeds(arm: dict[str, Any]) -> str:
    """Mean and standard deviation over the noise seeds, as papers give them; nothing for one seed."""
    rates = [100 * row["rate"] for row in arm["seeds"].values()]
    return f"{statistics.mean(rates):.1f} ± {statistics.stdev(rates):.1f} over {len(rates)} seeds" if len(rates) > 1 else ""


def _gain(pair: dict[str, Any]) -> str:
    return (f"{pair['gain_points']:+.1f} [{pair['ci_low']:+.1f}, {pair['ci_high']:+.1f}] points over {pair['pairs']} pairs, won "
            f"{pair['won']}, lost {pair['lost']}, McNemar p {p_value(pair['p'])}")
