"""The base policy: one network, trained on the demonstrations."""

from __future__ import annotations

from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.run import Run
from cosmos_ray.stages.training import complete_initial_policy, make_initial_policy, start_learner, train_alone


def pretrain(run: Run) -> dict:
    """Train checkpoint ``base`` for ``config.pretrain_steps`` steps; continues an interrupted training."""
    config, target = run.config, run.folder.checkpoint("base")
    total = config.pretrain_steps
    if target.exists() and read_description(target)[2]["step"] >= total:
        return {"steps": total, "new": 0}
    if run.folder.checkpoint("initial").exists():
        complete_initial_policy(run)
    else:
        make_initial_policy(run)
    mixture = Mixture.base(config.learner, config.replay)
    learner = start_learner(run, config.learner, "base", "initial", mixture, config.learner.lr, total)
    return train_alone(run, "pretrain", learner, total, "base", {})
