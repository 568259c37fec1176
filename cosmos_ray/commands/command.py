"""The commands: what each does, the flags that only it has, and the settings that it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from cosmos_ray.config import RunConfig
from cosmos_ray.config.tasks import TaskSuite
from cosmos_ray.use import Use, always


@dataclass(frozen=True)
class Command:
    """A stage as a command."""

    help: str
    reads: tuple[str, ...]  #: sections and settings that ``--help`` shows, after the run's name and root
    use: Use = Use(creates=False)  #: what it does with the run
    options: tuple[tuple[str, dict[str, Any]], ...] = ()  #: flags of its own, as ``argparse`` takes them; handed to the stage


FLEET = ("rollout.workers", "rollout.envs_per_worker", "rollout.execute", "rollout.deadline_s")
NEW_RUN = ("seed", "sim", "model.preset", "model.suite", "model.chunk", "model.tokenizer_path", "model.text_path")
ROUND = ("--round", {"type": int, "metavar": "N", "help": "policy of an earlier round of `refine` [the newest]"})
TO = (("--to", {"metavar": "FOLDER", "help": "folder to write to [the run's]"}),)


def _with_rollouts(config: RunConfig) -> bool:
    """`refine` on stored rollouts alone needs no simulation."""
    return config.refine_rollouts > 0 or config.rounds > 1


ACTS = Use(creates=False, simulates=always, acts=True)
READS = Use(creates=False, needs_ray=False, only_reads=True)
REFINES = replace(ACTS, simulates=_with_rollouts, learns=True)

COMMANDS = {
    "demo": Command("run every stage and write the report", use=Use(demonstrates=True, simulates=always, acts=True, learns=True), reads=(
        "seed", "demos", "pretrain_steps", "rollouts", "rounds", "refine_steps", "planning_steps", "refine_rollouts", "eval_episodes",
        "sim", "model.preset", "model.suite", "model.chunk", "replay.gamma", "learner.lr", "learner.refine_lr", "learner.self_imitation",
        "learner.advantage_temperature", "inference.gpus", "rollout.workers", "rollout.chunk_noise", "rollout.horizon",
        "planner.candidates", "planner.rank_by", "planner.spread")),
    "collect": Command("record scripted demonstrations in a new run", use=Use(demonstrates=True, simulates=always), reads=(
        "demos", *NEW_RUN, "replay.store", "replay.patience_s", *FLEET[:1])),
    "pretrain": Command("train the base policy on the demonstrations", use=Use(creates=False, learns=True), reads=(
        "pretrain_steps", "init", "replay.gamma", "replay.success_share", "learner")),
    "rollout": Command("run episodes of the base policy, successes and failures", use=ACTS, reads=(
        "rollouts", "replay.rollout_frame_stride", "replay.patience_s", "replay.keep_newest", "replay.keep_failures", "inference",
        "rollout")),
    "refine": Command("train on rollouts while acting with the newest weights", use=REFINES, reads=(
        "rounds", "keep_rounds", "refine_steps", "planning_steps", "refine_rollouts", "publish_every", "learner", "replay.gamma",
        "replay.success_share", "replay.samples_per_insert", "replay.keep_newest", "replay.keep_failures", "rollout.workers",
        "rollout.chunk_noise", "rollout.horizon", "rollout.planned", "inference.gpus", "inference.steps"), options=(
        ("--from-round", {"type": int, "metavar": "N", "help": "train the rounds after round N anew; those there are move aside"}),
    )),
    "evaluate": Command("compare base, refined and planning on held-out states", use=ACTS, reads=(
        "eval_episodes", "repeat", "keep_rounds", "planner", "inference", *FLEET), options=(
        ("--arms", {"metavar": "A,B,...", "help": "arms, such as 'base,base + planning' [those of its policies]"}),
        ("--round", {"metavar": "N|all", "help": "a round of `refine` instead of the newest, or every round that is kept"}),
        ("--suite", {"choices": [name for name in get_args(TaskSuite) if name],
                     "help": "the tasks of a suite instead of the run's states, as papers report them; the newest policy alone plays"}),
        ("--tasks", {"metavar": "A,B,...", "help": "with --suite: some of its tasks [all]"}),
        ("--trials", {"type": int, "metavar": "N", "help": "with --suite: initial states of each task [50]"}),
        ("--seeds", {"metavar": "A,B,...", "help": "with --suite: seeds of the policy's noise [195,196,197]"}),
        ("--against", {"metavar": "RUN", "help": "with --suite: pair with what RUN reached on the same states"}),
        ("--video", {"action": "store_true", "help": "with --suite: write an mp4 of every episode"}),
    )),
    "plan": Command("run one planned episode and draw what was imagined", use=replace(READS, simulates=always, acts=True), reads=(
        "plan_seed", "planner", "inference", "rollout.execute"), options=(
        ("--checkpoint", {"choices": ("base", "refined"), "help": "policy of the run [the newest]"}), ROUND, *TO,
    )),
    "audit": Command("measure what planning could win and which part limits it", use=ACTS, reads=(
        "eval_episodes", "planner", "inference", "replay.gamma", "rollout.workers", "rollout.execute"), options=(
        ("--checkpoint", {"choices": ("base", "refined"), "help": "policy of the run [the newest]"}), ROUND,
        ("--probes", {"type": int, "default": 24, "metavar": "N", "help": "episodes along which every choice is compared [24]"}),
    )),
    "serve": Command("answer robots and benchmarks over HTTP and websockets", use=replace(READS, acts=True, beside=True), reads=(
        "planner", "inference", "rollout.execute"), options=(
        ("--checkpoint", {"choices": ("base", "refined"), "help": "policy of the run [the newest]"}), ROUND,
        ("--plan", {"action": "store_true", "help": "choose the best of planner.candidates chunks [the policy alone]"}),
        ("--host", {"default": "127.0.0.1", "metavar": "ADDRESS", "help": "address to listen on; one beyond this machine needs a secret in "
                                                                          "$COSMOS_RAY_TOKEN [127.0.0.1]"}),
        ("--port", {"type": int, "default": 8777, "metavar": "N", "help": "port, 0 = a free one [8777]"}),
        ("--queue", {"type": int, "default": 256, "metavar": "N", "help": "requests that may wait; one more gets status 429 [256]"}),
        ("--record", {"action": "store_true", "help": "keep episodes that requests name as rollouts in the run's store"}),
    )),
    "watch": Command("show a run or store live on a page", use=replace(READS, beside=True), reads=(), options=(
        ("--store", {"metavar": "PATH", "help": "a store instead of a run: a folder, or an s3:// or gs:// URI"}),
        ("--host", {"default": "127.0.0.1", "metavar": "ADDRESS", "help": "address to listen on; one beyond this machine needs a secret in "
                                                                          "$COSMOS_RAY_TOKEN [127.0.0.1]"}),
        ("--port", {"type": int, "default": 8778, "metavar": "N", "help": "port, 0 = a free one [8778]"}),
    )),
    "report": Command("write report.html and report.json", use=replace(READS, acts=True), reads=(
        "plan_seed", "learner.value_mode", "inference.gpus", "inference.threads"), options=TO),
    "import": Command("start a run from a released or exported policy", use=Use(needs_ray=False), reads=NEW_RUN, options=(
        ("--as", {"choices": ("base", "planning"), "default": "base",
                  "help": "'base' acts, 'planning' imagines and values for it; a run takes one of each [base]"}),
        ("--weights", {"required": True, "metavar": "PATH", "help": "public .pt, .safetensors, DCP folder or diffusers folder"}),
        ("--statistics", {"required": True, "metavar": "FILE", "help": "dataset statistics JSON; it has actions_min, actions_max, "
                                                                     "proprio_min and proprio_max"}),
    )),
    "export": Command("write a run's policy for other projects", use=READS, reads=(), options=(
        ("--checkpoint", {"choices": ("initial", "base", "refined", "planning"), "help": "network of the run [the newest policy]"}), ROUND,
        ("--format", {"default": "pt", "choices": ("pt", "dcp", "diffusers", "safetensors"), "help": "file format [pt]"}),
        ("--to", {"required": True, "metavar": "PATH", "help": "file or folder to write"}),
        ("--overwrite", {"action": "store_true", "help": "replace a file that exists"}),
    )),
}

REPLAY = "show, check, repair, shrink and exchange a replay store"
