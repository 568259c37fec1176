"""The base policy: one network trained from scratch on the demonstrations."""

from __future__ import annotations

from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.run import Run
from cosmos_ray.stages.training import make_initial_policy, start_learner

BURST = 25  #: learner steps between two progress updates


def pretrain(run: Run) -> dict:
    """Train checkpoint ``base`` for ``config.pretrain_steps`` steps; continues an interrupted training."""
    config, target = run.config, run.folder.checkpoint("base")
    total = config.pretrain_steps
    if target.exists() and read_description(target)[2]["step"] >= total:
        return {"steps": total, "new": 0}
    if not run.folder.checkpoint("initial").exists():
        make_initial_policy(run)
    mixture = Mixture.base(config.learner, config.replay)
    learner = start_learner(run, config.learner, "base", "initial", mixture, config.learner.lr, total, actors_beside=0)
    try:
        first, metrics = learner.step, {"loss": float("nan")}
        progress = run.progress("pretrain", total, first, "steps")
        while learner.step < total:
            metrics = learner.finish_training(learner.begin_training(min(BURST, total - learner.step)))
            run.tracker.log("pretrain", **metrics)
            progress.update(learner.step, f"loss {metrics['loss']:.3f}  action error {metrics['action']:.3f}")
            if learner.step % config.learner.checkpoint_every < BURST and learner.step < total:
                learner.save()
        learner.export(target, run.folder.next_version(), {"stage": "pretrain"})
        progress.finish(learner.step, f"loss {metrics['loss']:.3f}")
    except KeyboardInterrupt:
        learner.save()  # queued behind the burst that is running: nothing learned is lost
        raise
    finally:
        learner.close()
    return {"steps": learner.step, "new": learner.step - first, "loss": metrics["loss"]}
