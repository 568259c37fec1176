"""Settings that come with a model preset or a suite. Anything given in a TOML file or as a flag wins over them."""

from __future__ import annotations

from typing import Any

from cosmos_ray.model.suites import SUITES, Suite

#: The paper's training and planning (method 2.7, 4.1, 5.3), where it differs from the laptop's defaults. The batch is what one GPU
#: holds, not the paper's 200 to 1920: raise learner.batch_size with learner.world_size and learner.accumulate.
LARGE: dict[str, Any] = {
    "pretrain_steps": 50_000, "refine_steps": 18_000, "publish_every": 500, "learner.checkpoint_every": 1000,
    "sim.image_size": 224, "sim.actions": "pose", "model.chunk": 16,
    "replay.gamma": 0.99,
    "learner.batch_size": 8, "learner.lr": 1e-4, "learner.refine_lr": 1e-4, "learner.schedule": "paper", "learner.warmup": 1000,
    "learner.weight_decay": 0.1, "learner.beta2": 0.99, "learner.ema": 0.0, "learner.precision": "bf16",
    "learner.base_value_mode": "full", "learner.activation_checkpointing": True, "learner.latent_cache": "augmented",
    "learner.loader_threads": 2,
    "planner.futures": 3, "planner.future_steps": 5, "planner.value_samples": 5, "planner.value_steps": 5,
    "planner.aggregate": "majority_mean",
}


def preset_settings(preset: str, suite: str) -> dict[str, Any]:
    """``{"section.field": value}`` of a model preset and a suite ("" for none)."""
    settings = dict(LARGE) if preset != "tiny" else {}
    if suite in SUITES:
        settings.update(_suite_settings(SUITES[suite]))
    return settings


def _suite_settings(suite: Suite) -> dict[str, Any]:
    return {
        "sim.image_size": suite.image_size, "sim.actions": "pose", "model.chunk": suite.chunk, "rollout.execute": suite.open_loop,
        "replay.gamma": suite.gamma, "inference.steps": suite.steps, "learner.warmup": suite.warmup, "learner.cycle": suite.cycle,
        "learner.refine_warmup": suite.refine_warmup, "learner.refine_cycle": suite.refine_cycle,
    }
