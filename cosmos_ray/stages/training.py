"""What `pretrain` and `refine` share: the initial policy, and how a learner group starts and trains."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from cosmos_ray.asks import learner_ask
from cosmos_ray.config import LearnerConfig
from cosmos_ray.embodiment import Embodiment
from cosmos_ray.fit import check_chunk, check_fits, check_suite, refuse_misfit
from cosmos_ray.learner.actor import LearnerTask, learner_group
from cosmos_ray.learner.group import TURN_S, LearnerGroup
from cosmos_ray.learner.mixture import Mixture, evenly
from cosmos_ray.model.checkpoint import load_net, read_description, save_policy
from cosmos_ray.model.images import prepare
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.replay.format.episode import TRAINED
from cosmos_ray.replay.format.schema import DamagedEpisode
from cosmos_ray.replay.sampling.demonstrated import demonstrated
from cosmos_ray.replay.sampling.ranges import dataset_statistics
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.run import Run
from cosmos_ray.stages.texts import complete_texts, embed_instructions

BURST = 25  #: learner steps between two progress updates while nobody acts
FIT_FRAMES = 512  #: frames the tokenizer is fitted on
NARROWEST = 0.1  #: narrowest range that the tiny preset scales proprioception from, in metres or in units of a quaternion


def make_initial_policy(run: Run) -> None:
    """Write checkpoint ``initial``: robot, texts, scales and tokenizer of the demonstrations, weights of ``config.init`` or random."""
    config, store = run.config, run.folder.store()
    known = demonstrated(store, run.counter("read", "episodes"))
    body = known.embodiment
    if config.sim.names:
        body = check_fits("the demonstrations", body, config.sim)
    check_suite(config, body.cameras)
    check_chunk(config, body)
    stats = dataset_statistics(store, ("demo",))
    spec = make_spec(config.model, body.cameras, body.action_dim, body.proprio_dim, body.control_freq)
    spec = dataclasses.replace(spec, moving=body.moving, quality=body.quality)
    policy = build(spec, None if config.init else config.seed)
    proprio = widened(stats.proprio_min, stats.proprio_max) if spec.preset == "tiny" else (stats.proprio_min, stats.proprio_max)
    policy.set_statistics(np.minimum(stats.actions_min, stats.labels_min), np.maximum(stats.actions_max, stats.labels_max), *proprio)
    if config.init:
        load_net(policy, config.init)
    embed_instructions(run, policy.text, known.instructions)
    info = {"init": config.init}
    if hasattr(policy.tokenizer, "fit"):
        sampler = WindowSampler(store, chunk=config.model.chunk, gamma=config.replay.gamma, seed=config.seed)
        drawn = sampler.draw(FIT_FRAMES // len(body.cameras), evenly(sampler, "demo") if config.sim.suite else "demo").images
        frames = prepare(drawn, spec.image_size, jpeg=False, centre_crop=False, resize=spec.resize)
        info["tokenizer_variance_kept"] = policy.tokenizer.fit(torch.from_numpy(frames.reshape(-1, *frames.shape[2:])))
    save_policy(policy, run.folder.checkpoint("initial"), 0, info)


def complete_initial_policy(run: Run) -> None:
    """Have checkpoint ``initial``, which was imported or made by an earlier call, know the instructions that the store has now."""
    known = demonstrated(run.folder.store(), run.counter("read", "episodes"))
    complete_texts(run, run.folder.checkpoint("initial"), known.instructions)


def widened(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges (p,), (p,) with the same middles, at least ``NARROWEST`` wide.

    Demonstrations hardly change some numbers, such as the tilt of the hand. Scaled from their narrow range, these numbers would dominate
    the loss as soon as rollouts change them.
    """
    more = np.maximum(NARROWEST - (high - low), 0) / 2
    return low - more, high + more


def train_alone(run: Run, stage: str, learner: LearnerGroup, total: int, target: str, info: dict) -> dict:
    """Train ``learner`` to step ``total`` without rollouts, and write checkpoint ``target``. An interrupt keeps what was learned."""
    every, number, state = run.config.learner.checkpoint_every, info.get("round", 1), learner.folder.name
    metrics, exported = {"loss": float("nan")}, False
    try:
        learner.start()
        first = learner.step
        run.goes_on(stage, number, state, first, total)
        progress = run.progress(run.of_round(stage, info["round"]) if "round" in info else stage, total, first, "steps")
        while not exported:
            for kind, value in learner.poll(TURN_S if learner.busy else 0.0):
                if kind == "train":
                    metrics = value
                    run.tracker.log(stage, **metrics, round=number)
                    progress.update(learner.step, f"loss {metrics['loss']:.3f}  action error {metrics['action']:.3f}")
                elif kind == "save":
                    run.folder.manifest.saved(state, value, stage, number)
                elif kind == "start":
                    run.tracker.log("resume", what=stage, round=number, step=value)
                exported = exported or kind == "export"
            if learner.busy or exported:
                continue
            if learner.save_due(every):
                learner.save()
            if learner.step < total:
                learner.train(min(BURST, total - learner.step))
            else:
                learner.export(run.folder.checkpoint(target), run.folder.next_version(), {"stage": stage, **info})
        run.folder.fetch(run.folder.checkpoint(target))
        progress.finish(learner.step, f"loss {metrics['loss']:.3f}")
    except KeyboardInterrupt:
        if (step := learner.save_now()) is not None:
            run.folder.manifest.saved(state, step, stage, number)
        raise
    finally:
        learner.close()
    return {"steps": learner.step, "new": learner.step - first, "loss": metrics["loss"], "learner_restarts": learner.restarts}


def start_learner(run: Run, learner: LearnerConfig, name: str, policy: str, mixture: Mixture, peak_lr: float, total_steps: int,
                  planning: str = "", world_weight: float = 0.0) -> LearnerGroup:
    """The learner of stage ``name``, to be started from checkpoint ``policy`` or to resume an interrupted stage; it does not wait.

    ``planning`` is the checkpoint of the planning network whose value weighs own rollouts, "" for none. ``world_weight`` weighs the future
    frames in world-model samples; 0 is the policy's own.
    """
    config = run.config
    _check_episodes(run, read_description(run.folder.checkpoint(policy))[0].embodiment)
    mixture = dataclasses.replace(mixture, by_task=bool(config.sim.suite))
    task = LearnerTask(policy=str(run.folder.checkpoint(policy)), store=str(run.folder.replay), state=str(run.folder.learner_state(name)),
                       mixture=mixture, chunk=config.model.chunk, gamma=config.replay.gamma, peak_lr=peak_lr, total_steps=total_steps,
                       seed=config.seed, latents=str(run.folder.latents), world_weight=world_weight,
                       planning_checkpoint=str(run.folder.checkpoint(planning)) if planning else "")
    run.folder.publish()  # ranks on other machines read it
    return learner_group(learner, task, run.supervisor, run.placement.gang(learner_ask(learner)))


def _check_episodes(run: Run, policy: Embodiment) -> None:
    """ConfigError when the run's episodes are of another robot than the policy. The episodes of a store are alike, so one is asked."""
    store = run.folder.store()
    for summary in store.summaries():
        if summary.episode_class not in TRAINED:
            continue
        try:
            theirs = store.view(summary.name).embodiment
        except (FileNotFoundError, DamagedEpisode):
            continue  # the sampler says so
        refuse_misfit("the policy", policy, "cannot learn from episodes of", theirs, f"({store.root}): take a policy of their robot, "
                      "or give the policy's robot to a new run")
        return
