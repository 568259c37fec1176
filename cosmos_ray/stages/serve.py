"""A policy of the run behind a port, until Ctrl-C."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosmos_ray.deployment import DeployedPolicy
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import load_core
from cosmos_ray.port import address, bound, serve_until_told, token_for
from cosmos_ray.progress import say
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import asked_policy, planning_checkpoint

EXTRA = "the policy server needs FastAPI and uvicorn: pip install 'cosmos-ray[serve]'"


def serve(run: Run, checkpoint: str | None, number: int | None, *, plan: bool, host: str, port: int, queue: int,
          record: bool) -> dict[str, int]:
    """Serve the policy of ``checkpoint`` ("refined" or "base", by default the newest) or of a round until the process is told to end.

    ``plan``: best-of-N with the run's planner and planning network; else the policy alone. Returns how many requests were answered and
    refused, and how many episodes were recorded. ConfigError for a port that is taken, and for an address beyond this machine without a
    token.
    """
    try:
        import uvicorn  # noqa: F401 - so that its lack is told before the policy is loaded

        from cosmos_ray.serving.app import MAX_BYTES, make_app
        from cosmos_ray.serving.core import PolicyServer
        from cosmos_ray.serving.recorder import Recorder
    except ModuleNotFoundError as error:
        raise ConfigError(f"{EXTRA} ({error})") from error
    token = token_for(host, "`Authorization: Bearer SECRET`")
    if queue < 1:
        raise ConfigError(f"--queue {queue}: let at least 1 request wait")
    with bound(host, port) as listening:
        name, path = asked_policy(run, checkpoint, number)
        policy = _policy(run, name, path, plan, number)
        where = address(host, listening)
        config = run.config
        server = PolicyServer(policy, config.inference.max_batch, config.inference.wait_ms, queue)
        info = _info(run, policy, name)
        recorder = None
        if record:
            task = next(iter(config.sim.names), "served")
            rate = {"control_freq": config.sim.control_freq} if config.sim.names else {}
            recorder = Recorder(ReplayStore(str(run.folder.replay)), policy, run.folder.identity.key, task, config.rollout.execute, rate)
        app = make_app(server, info, config.rollout.execute, token, recorder)
        say(f"serving {name} version {policy.core.version} on http://{where}/act, ws://{where}/ (openpi) and "
            f"ws://{where}/vla-eval; Ctrl-C ends it", run.quiet)
        serve_until_told(app, listening, ws_max_size=MAX_BYTES, ws="websockets-sansio", timeout_keep_alive=120,
                         timeout_graceful_shutdown=10)
        if recorder is not None:
            recorder.close()
        return {"answered": server.answered, "refused": server.refused, "recorded": recorder.recorded if recorder else 0}


def _policy(run: Run, name: str, path: Path, plan: bool, number: int | None) -> DeployedPolicy:
    if not (path / "policy.json").exists():
        raise ConfigError(f"there is no {name} policy to serve: run `{'pretrain' if name == 'base' else 'refine'}` first")
    config = run.config
    planner = config.planner if plan else None
    if planner is not None and planner.candidates < 2:
        raise ConfigError("--plan chooses among candidates and planner.candidates is 1: raise it (8, say), or leave --plan out")
    judge = planning_checkpoint(run, name, number) if plan else ""
    torch.set_num_threads(config.inference.threads)
    core = load_core(path, config.inference, "cuda" if config.inference.gpus else "cpu", judge)
    if config.inference.accelerate != "none":
        say(f"compiling for batches of up to {config.inference.max_batch} observations: minutes the first time, then seconds", run.quiet)
    core.prepare(planner, config.inference.max_batch, config.inference.steps, [sim.instruction for sim in config.sim.each()])
    return DeployedPolicy(core, planner, config.inference.steps, config.seed)


def _info(run: Run, policy: DeployedPolicy, checkpoint: str) -> dict[str, Any]:
    """What a client may know of the policy."""
    spec = policy.spec
    return {"run": run.config.name, "checkpoint": checkpoint, "policy_version": policy.core.version,
            "cameras": {camera: list(keys) for camera, keys in policy.cameras.items()}, "proprio_dim": spec.proprio_dim,
            "action_dim": spec.action_dim, "chunk": spec.chunk, "execute": run.config.rollout.execute, "steps": policy.steps,
            "candidates": policy.planner.candidates if policy.planner else 1,
            "planning_checkpoint": Path(policy.core.planning_checkpoint).name}
