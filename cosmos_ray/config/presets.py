"""The two model presets, each a complete record of every setting that a preset decides, and what a suite changes in them.

Both records have the same names; None leaves a setting to what it follows. A recipe, a TOML file and a flag each win over them.
"""

from __future__ import annotations

from typing import Any

from cosmos_ray.config.suites import SUITES

#: 1.5 M parameters, 64-pixel frames: trains from scratch in minutes on a laptop.
TINY: dict[str, Any] = {
    "pretrain_steps": 600, "refine_steps": 600, "publish_every": 50,
    "sim.actions": None, "model.image_size": 64,
    "model.chunk": 8, "model.output": "x0", "model.width": 128, "model.layers": 4, "model.heads": 4, "model.patch": 4,
    "model.adaln_rank": 64, "model.rope_scale": (1.0, 1.0, 1.0), "model.text_width": 64, "model.text_tokens": 16,
    "model.sigma_frame_scale": False, "model.sigma_min": 1.0, "model.residual": True, "model.top_share": 0.7,
    "model.imagined_share": 0.5, "model.action_weight": 4.0, "model.value_weight": 3.0, "model.world_weight": 10.0,
    "model.loss_scale": 1.0, "model.augment": False, "model.jpeg": False,
    "replay.gamma": 0.98,
    "learner.batch_size": 32, "learner.lr": 1.5e-3, "learner.refine_lr": 8e-4, "learner.schedule": "linear", "learner.warmup": 50,
    "learner.weight_decay": 0.01, "learner.beta2": 0.95, "learner.ema": 0.995, "learner.precision": "fp32",
    "learner.base_value_mode": None,
    # With the paper's 0.1, 0.45, 0.45 a network of this size forgets its policy.
    "learner.refine_mix": (0.5, 0.25, 0.25), "learner.activation_checkpointing": False, "learner.latent_cache": "off",
    "learner.loader_threads": 0, "learner.checkpoint_every": 200,
    "planner.futures": 1, "planner.future_steps": 1, "planner.value_samples": 1, "planner.value_steps": 1,
    "planner.aggregate": "average",
}

#: The dimensions of Cosmos-Predict2 2B, the paper's training and planning (method 2.7, 4.1, 5.3). The batch is what one GPU holds, not
#: the paper's 200 to 1920: raise learner.batch_size with learner.world_size and learner.accumulate.
LARGE: dict[str, Any] = {
    "pretrain_steps": 50_000, "refine_steps": 18_000, "publish_every": 500,
    "sim.actions": "pose", "model.image_size": 224,
    "model.chunk": 16, "model.output": "velocity", "model.width": 2048, "model.layers": 28, "model.heads": 16, "model.patch": 2,
    "model.adaln_rank": 256, "model.rope_scale": (1.0, 3.0, 3.0), "model.text_width": 1024, "model.text_tokens": 512,
    "model.sigma_frame_scale": True, "model.sigma_min": 4.0, "model.residual": False, "model.top_share": 0.0,
    "model.imagined_share": 0.0, "model.action_weight": 1.0, "model.value_weight": 1.0, "model.world_weight": 1.0,
    "model.loss_scale": 10.0, "model.augment": True, "model.jpeg": False,
    "replay.gamma": 0.99,
    "learner.batch_size": 8, "learner.lr": 1e-4, "learner.refine_lr": 1e-4, "learner.schedule": "paper", "learner.warmup": 1000,
    "learner.weight_decay": 0.1, "learner.beta2": 0.99, "learner.ema": 0.0, "learner.precision": "bf16",
    "learner.base_value_mode": "full",
    "learner.refine_mix": (0.1, 0.45, 0.45), "learner.activation_checkpointing": True, "learner.latent_cache": "augmented",
    "learner.loader_threads": 2, "learner.checkpoint_every": 1000,
    "planner.futures": 3, "planner.future_steps": 5, "planner.value_samples": 5, "planner.value_steps": 5,
    "planner.aggregate": "majority_mean",
}

PRESETS = {"tiny": TINY, "cosmos-predict2-2b": LARGE}

#: How close frames, augmentation, decay and planning are to the public code, where ours differs on purpose (docs/model.md).
FIDELITIES: dict[str, dict[str, Any]] = {
    "ours": {"model.resize": "bilinear", "model.augmentation": "smooth", "learner.decay_all": False, "planner.ladder": "rounded"},
    "reference": {"model.resize": "bicubic", "model.augmentation": "torchvision", "learner.decay_all": True, "planner.ladder": "truncated"},
}


def preset_settings(preset: str, suite: str, fidelity: str = "") -> dict[str, Any]:
    """``{"section.field": value}`` of a model preset, a suite ("" for none) and a fidelity ("" for the suite's, which is "reference").

    An unknown name, which the check refuses, adds nothing.
    """
    fidelity = fidelity or ("reference" if suite in SUITES else "ours")
    own = SUITES[suite].settings() if suite in SUITES else {}
    return {**PRESETS.get(preset, TINY), "model.fidelity": fidelity, **FIDELITIES.get(fidelity, FIDELITIES["ours"]), **own}
