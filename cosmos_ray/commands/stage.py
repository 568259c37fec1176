"""What a stage command says when it is done."""

from __future__ import annotations

from typing import Any

from cosmos_ray.errors import ConfigError
from cosmos_ray.report.audit_page import headline
from cosmos_ray.report.benchmark_page import benchmark_text
from cosmos_ray.report.filmstrip import save_filmstrip
from cosmos_ray.rounds import Rounds
from cosmos_ray.run import Run
from cosmos_ray.stages.audit import audit
from cosmos_ray.stages.benchmark import SEEDS, TRIALS, Benchmark, benchmark
from cosmos_ray.stages.collect import collect
from cosmos_ray.stages.demo import demo
from cosmos_ray.stages.evaluate import evaluate
from cosmos_ray.stages.exchange import export_policy, import_policy
from cosmos_ray.stages.plan import plan_episode
from cosmos_ray.stages.pretrain import pretrain
from cosmos_ray.stages.refine import refine
from cosmos_ray.stages.report import report
from cosmos_ray.stages.rollout import rollout
from cosmos_ray.stages.serve import serve


def run_stage(name: str, run: Run, options: dict | None = None) -> str:
    """Run stage ``name`` with the options that only it has; returns its result as text for the terminal."""
    return {"collect": _collect, "pretrain": _pretrain, "rollout": _rollout, "refine": _refine, "evaluate": _evaluate, "plan": _plan,
            "audit": _audit, "report": _report, "demo": _demo, "import": _import, "export": _export,
            "serve": _serve}[name](run, **(options or {}))


def _collect(run: Run) -> str:
    done = collect(run)
    where = str(run.folder.replay).partition("?")[0]
    return f"{done['demonstrations']} demonstrations in {where} ({done['new']} new, {done['failed']} attempts failed)"


def _pretrain(run: Run) -> str:
    done = pretrain(run)
    return f"base policy after {done['steps']} steps in {run.folder.shown(run.folder.checkpoint('base'))} ({done['new']} new)"


def _rollout(run: Run) -> str:
    done = rollout(run)
    return f"{done['episodes']} rollouts, {done['successes']} succeeded ({done['new']} new)"


def _refine(run: Run, from_round: int | None = None) -> str:
    done = refine(run, from_round)
    return (f"refined policy version {done['version']} after {done['steps']} steps in "
            f"{run.folder.shown(run.folder.checkpoint('refined'))} ({done['new']} new)")


def _evaluate(run: Run, arms: str | None, round: str | None, suite: str | None = None, video: bool = False, **of_suite: Any) -> str:
    rounds = Rounds(run.folder).asked(round) if round else ()
    only = _listed(arms)
    if suite is None:
        for name, value in {**of_suite, "video": video or None}.items():
            if value is not None:
                raise ConfigError(f"--{name} goes with --suite: give both, or leave it out")
        return table(evaluate(run, only, rounds))
    seeds = of_suite["seeds"]
    try:
        numbers = tuple(int(seed) for seed in _listed(seeds)) or SEEDS
    except ValueError as error:
        raise ConfigError(f"--seeds {seeds!r} are not whole numbers: give some, such as 195,196,197") from error
    trials = TRIALS if of_suite["trials"] is None else of_suite["trials"]
    asked = Benchmark(suite, tuple(_listed(of_suite["tasks"])), trials, numbers)
    done = benchmark(run, asked, only, rounds, of_suite["against"], video)
    shown = f"\nvideos in {done['videos']}" if video else ""
    return f"{benchmark_text(done)}\npage in {done['page']}, the same numbers in {done['file']}{shown}"


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _plan(run: Run, checkpoint: str | None, round: int | None, to: str | None) -> str:
    run.folder.write_results_to(to)
    trace = plan_episode(run, checkpoint, round)
    path = run.folder.results / f"plan_{trace.seed}.png"
    save_filmstrip(trace, path)
    lines = [f"{'step':>5} {'chosen':>6}  scores"]
    for step, chosen, scores in zip(trace.steps, trace.chosen, trace.scores, strict=True):
        lines.append(f"{step:5d} {chosen:6d}  " + " ".join(f"{s:.3f}" for s in scores))
    return "\n".join([*lines, f"{'succeeded' if trace.success else 'failed'} after {trace.length} steps; filmstrip in {path}"])


def _audit(run: Run, checkpoint: str | None, round: int | None, probes: int) -> str:
    done = audit(run, checkpoint, probes, round)
    lines = [f"{name:<11} {arm['successes']:3d}/{done['episodes']:<3d} = {100 * arm['rate']:5.1f} %" for name, arm in done["arms"].items()]
    return "\n".join([*lines, headline(done), f"page in {done['page']}"])


def _serve(run: Run, checkpoint: str | None, round: int | None, **options: Any) -> str:
    done = serve(run, checkpoint, round, **options)
    return f"answered {done['answered']} requests, refused {done['refused']}, recorded {done['recorded']} episodes"


def _report(run: Run, to: str | None) -> str:
    run.folder.write_results_to(to)
    report(run)
    return f"report in {run.folder.shown(run.folder.report)}"


def _demo(run: Run) -> str:
    demo(run)
    return table(run.folder.read_json("evaluation.json")) + f"\nreport in {run.folder.shown(run.folder.report)}"


def _import(run: Run, weights: str, statistics: str, **options: str) -> str:
    done = import_policy(run, weights, statistics, options["as"])  # a word of Python: no parameter can have this name
    text = f"{done['what']} of {done['parameters']:,} parameters in {done['path']}"
    return text + (f"; constant, so always 0 to the network: {', '.join(done['constant'])}" if done["constant"] else "")


def _export(run: Run, checkpoint: str | None, round: int | None, format: str, to: str, overwrite: bool) -> str:
    return "wrote " + " and ".join(map(str, export_policy(run, checkpoint, round, format, to, overwrite)))


def table(evaluation: dict) -> str:
    """The evaluation as a text table."""
    gains = {p["arm"]: f"{p['gain_points']:+.1f} points against {p['against']} (won {p['won']}, lost {p['lost']}, p = {p['p']:.2f})"
             for p in evaluation["pairs"]}
    lines = []
    width = max(19, *map(len, evaluation["arms"]), *(2 + len(task) for arm in evaluation["arms"].values() for task in arm.get("tasks", ())))
    for name, arm in evaluation["arms"].items():
        lines.append(f"{name:<{width}} {arm['successes']:3d}/{arm['episodes']:<3d} = {100 * arm['rate']:5.1f} %  "
                     f"[{100 * arm['low']:.1f}, {100 * arm['high']:.1f}]  {gains.get(name, '')}".rstrip())
        for task, row in arm.get("tasks", {}).items():
            lines.append(f"  {task:<{width - 2}} {row['successes']:3d}/{row['episodes']:<3d} = {100 * row['rate']:5.1f} %  "
                         f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]")
    for row in evaluation.get("quarantined", []):
        whose = f" of {row['task']}" if "task" in row else ""
        lines.append(f"initial state {row['seed']}{whose} is quarantined and counts in no arm: {row['reason']}")
    if "verified" in evaluation:
        check = evaluation["verified"]
        lines.append(f"compared {check['repeated']} repeated episodes with the stored ones: {check['identical']} bit-identical"
                     + (f", different: {', '.join(check['different'])}" if check["different"] else ""))
    return "\n".join(lines)
