"""What a user may have meant by a name that no setting has: by meaning first, by spelling second."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

#: Words of other programs -> the settings that mean it here, the likeliest first. Words stand in lower case, without hyphens, "num" before
#: and the plural's "s" behind.
MEANT = {
    "agent": ("rollout.workers",), "actionhorizon": ("model.chunk", "rollout.execute"), "batch": ("learner.batch_size",),
    "batchsize": ("learner.batch_size", "inference.max_batch"), "bestof": ("planner.candidates",),
    "camera": ("sim.third_cameras", "sim.wrist_cameras"),
    "checkpoint": ("init",), "chunksize": ("model.chunk",), "ckpt": ("init",), "data": ("replay.store",), "datadir": ("replay.store",),
    "dataset": ("replay.store",), "denoisingstep": ("inference.steps",), "device": ("inference.gpus", "learner.gpus"),
    "discount": ("replay.gamma",), "dtype": ("learner.precision", "inference.precision"), "env": ("rollout.envs_per_worker",),
    "environment": ("sim.task",), "envname": ("sim.task",), "epoch": ("pretrain_steps", "refine_steps"),
    "episode": ("rollouts", "eval_episodes", "demos"), "experiment": ("name",), "fps": ("sim.control_freq",),
    "gpu": ("inference.gpus", "learner.gpus"), "gradaccum": ("learner.accumulate",), "gradientaccumulationstep": ("learner.accumulate",),
    "inferencestep": ("inference.steps",),
    "iter": ("pretrain_steps", "refine_steps"), "iteration": ("pretrain_steps", "refine_steps"),
    "learningrate": ("learner.lr", "learner.refine_lr"),
    "logdir": ("root",), "lora": ("learner.lora_rank",), "lr": ("learner.lr", "learner.refine_lr"),
    "maxstep": ("pretrain_steps", "sim.horizon"),
    "model": ("model.preset",), "nprocpernode": ("learner.world_size",), "openloopstep": ("rollout.execute",), "out": ("root",),
    "outdir": ("root",), "output": ("root",), "outputdir": ("root",), "pretrained": ("init",), "rank": ("learner.world_size",),
    "resume": ("name",), "runname": ("name",), "sample": ("planner.candidates",), "size": ("learner.world_size",),
    "step": ("pretrain_steps", "refine_steps", "inference.steps"), "temperature": ("learner.advantage_temperature",),
    "thread": ("learner.threads", "inference.threads"), "trainstep": ("pretrain_steps",), "trial": ("eval_episodes",),
    "warmupstep": ("learner.warmup",), "weight": ("init",), "worker": ("rollout.workers", "learner.loader_threads"),
}  # fmt: skip
ONE = {"env": ("sim.task",)}  #: words whose plural means another thing


def meant(bad: str, settings: Mapping[str, Any]) -> list[str]:
    """Names of ``settings`` (:data:`SETTINGS`, or those that a command has) that the unknown name ``bad`` may stand for; at most three.

    Asks, in this order: the same name in another section, :data:`MEANT`, a like spelling, the help texts, any spelling.
    """
    bad = bad.replace("-", "_").lower()
    section, _, last = bad.rpartition(".")
    words = (_plain(bad), _plain(last), _singular(_plain(last)))
    listed = ONE.get(words[1]) or next((MEANT[word] for word in words if word in MEANT), ())
    same = [name for name in settings if _singular(_plain(name.rpartition(".")[2])) == _singular(_plain(last))]
    found = [name for name in dict.fromkeys([*listed, *same]) if name in settings]
    found = [name for name in found if section and name.startswith(section + ".")] or found
    if not found:
        found = difflib.get_close_matches(bad, list(settings), n=1, cutoff=0.7) or _by_help(bad, settings)
    return found[:3] or difflib.get_close_matches(bad, list(settings), n=1, cutoff=0.5)


def _plain(word: str) -> str:
    return re.sub(r"^num_?(?=.)|^n_|[_.]", "", word)


def _singular(word: str) -> str:
    return word.removesuffix("s")


def _by_help(bad: str, settings: Mapping[str, Any]) -> list[str]:
    """The settings whose name and help have every word of ``bad``; none if these are many, for then the words say little."""
    words = [word for word in re.split(r"[_.]", bad) if len(word) > 2]
    found = [name for name, setting in settings.items() if words and all(
        re.search(rf"\b{re.escape(word)}", f"{name} {setting.help.split(';')[0]}".replace("_", " ").replace(".", " ").lower())
        for word in words)]
    return found if len(found) <= 2 else []
