"""Writes the report of a run. It counts from ``evaluation.json``, ``metrics.jsonl`` and the replay store, and runs nothing."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.evidence import paired
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.report import contents, diagnostics
from cosmos_ray.report.headline import headline
from cosmos_ray.report.page import render_page, write_page
from cosmos_ray.report.settings_table import commands, settings_table, versions
from cosmos_ray.rollout.ticket import own_rollouts

if TYPE_CHECKING:
    from cosmos_ray.report.trace import EpisodeTrace

SCHEMA = 2  #: version of report.json


def write_report(folder: RunFolder, config: RunConfig, trace: EpisodeTrace | None = None, assessment: dict | None = None) -> dict:
    """Write ``report.json`` and ``report.html`` with the same numbers, and return the numbers.

    Args:
        trace: the planned episode of the filmstrip; the page has none without a trace, or for a trace without a decision.
        assessment: how well the network imagines and values (:func:`cosmos_ray.planning.assessment.assess`); None leaves it out.

    Raises:
        ConfigError: nothing was evaluated yet, in a run that has a simulation.
        StoreError: ``evaluation.json`` is damaged.
    """
    evaluation = read_evaluation(folder) if config.sim.names else {"task": "", "arms": {}, "pairs": [], "seeds": []}
    trace = trace if trace is not None and trace.steps else None
    store = folder.store()
    arms = _arms(evaluation)
    comparisons = _comparisons(arms, evaluation["pairs"])
    episodes = {arm["name"]: diagnostics.outcomes(store, arm["episode_names"]) for arm in arms}
    rollouts = own_rollouts(store, folder.identity.key, config.sim.names)
    planners = [arm for arm in arms if arm["candidates"]]
    planned = episodes[planners[-1]["name"]] if planners else []  # of one network that plans: scores of two are not comparable
    unplanned = [e for e in diagnostics.outcomes(store, [s.name for s in rollouts]) if e.info.get("candidates", 1) == 1]
    acted = {"rollouts": unplanned,
             **{f"evaluation, {arm['name']}": episodes[arm["name"]] for arm in arms if not arm["candidates"]}}
    report = contents.plain({
        "schema": SCHEMA, "name": config.name, "task": evaluation["task"], "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "headline": headline(arms, comparisons), "arms": arms, "comparisons": comparisons, "seeds": evaluation["seeds"],
        "verified": evaluation.get("verified"), "missing_episodes": sum(len(a["episode_names"]) - len(episodes[a["name"]]) for a in arms),
        "training": contents.training_curves(folder), "rollouts_by_version": contents.by_version(rollouts),
        "rounds": contents.by_round(folder, rollouts),
        "stage_results": contents.stage_results(folder), "stage_times": contents.stage_times(folder),
        "store": contents.store_contents(store), "supervision": contents.supervision(folder),
        "planning": diagnostics.planning(planned), "planner": planners[-1]["planner"] if planners else None,
        "values": diagnostics.values(acted, config.replay.gamma, config.model.chunk),
        "tasks": contents.by_task(arms, rollouts, diagnostics.values_by_task(store, acted, config.replay.gamma, config.model.chunk)),
        "imagination": diagnostics.imagination(trace) if trace else None, "assessment": assessment,
        "fingerprints": _fingerprints([e for group in episodes.values() for e in group]),
        "settings": settings_table(config), "versions": versions(), "commands": commands(config)})
    page = render_page(report, trace)  # before anything is written: a page that cannot be drawn leaves the old pair in place
    replace(json.dumps(report, indent=1).encode(), folder.results / "report.json")
    write_page(folder.report, page)
    return report


def read_evaluation(folder: RunFolder) -> dict:
    """The file that `evaluate` wrote. ConfigError when `evaluate` has not run, StoreError when the file is damaged."""
    try:
        evaluation = folder.read_json("evaluation.json")
    except ConfigError as error:
        raise StoreError(f"{folder.path / 'evaluation.json'} is damaged ({error}): run `evaluate` again") from error
    if evaluation is None:
        raise ConfigError(f"nothing was evaluated yet in {folder.path}: run `evaluate` first")
    if not evaluation.get("arms"):
        raise StoreError(f"{folder.path / 'evaluation.json'} has no arms: run `evaluate` again")
    return evaluation


def _arms(evaluation: dict) -> list[dict]:
    """The arms in order: each with its name, its number of candidates (0 without planning) and its paired gain, if any."""
    gains = {pair["arm"]: pair for pair in evaluation["pairs"]}
    return [{"name": name, **arm, "candidates": arm["planner"]["candidates"] if arm["planner"] else 0, "paired": gains.get(name)}
            for name, arm in evaluation["arms"].items()]


def _comparisons(arms: list[dict], pairs: list[dict]) -> list[dict]:
    """The evaluation's pairs, then each planning arm against the same policy without planning.

    ``headline`` marks the comparisons in the headline: each policy against the first, and planning against its own policy.
    """
    by_name, out = {arm["name"]: arm for arm in arms}, []
    for pair in pairs:
        out.append({**pair, "headline": not by_name[pair["arm"]]["candidates"]})
    for arm in arms:
        if not arm["candidates"]:
            continue
        own = [a for a in arms if not a["candidates"] and a["policy_version"] == arm["policy_version"]]
        if own:
            out = [c for c in out if (c["arm"], c["against"]) != (arm["name"], own[0]["name"])]
            out.append({"arm": arm["name"], "against": own[0]["name"], **paired(arm["outcomes"], own[0]["outcomes"]), "headline": True})
    return out


def _fingerprints(episodes: list[diagnostics.Outcome]) -> list[dict]:
    """The distinct simulator fingerprints of the evaluation episodes, most frequent first: {episodes, fingerprint}."""
    found: dict[str, dict] = {}
    for episode in episodes:
        fingerprint = episode.info.get("fingerprint") or {}
        row = found.setdefault(json.dumps(fingerprint, sort_keys=True), {"episodes": 0, "fingerprint": fingerprint})
        row["episodes"] += 1
    return sorted(found.values(), key=lambda row: -row["episodes"])
