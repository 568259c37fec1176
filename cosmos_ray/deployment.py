"""A policy in a program of your own: observation in, actions out. Torch and this package; no Ray, no simulator, no run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cosmos_ray import released
from cosmos_ray.config import PlannerConfig, RunConfig, check
from cosmos_ray.config.acting import JUDGED
from cosmos_ray.config.settings import SETTINGS, changed, nearest, new_config
from cosmos_ray.config.stored import stored_config
from cosmos_ray.config.suites import SUITES, check_sizes
from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import InferenceCore, ready
from cosmos_ray.model.checkpoint import load_checkpoint, load_released, read_description
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.spec import make_spec

INSTRUCTION = "task_description"  #: key of the instruction in an observation, as the public server has it


class Query(NamedTuple):
    """B observations as the networks take them. :meth:`DeployedPolicy.query` makes one."""

    keys: tuple[str, ...]  #: of the cameras in the observation, in latent order
    images: list[np.ndarray]  #: per camera (B, H, W, 3) uint8
    proprio: np.ndarray  #: (B, p) float32
    instructions: list[str]
    seeds: torch.Tensor  #: (B,) int64


class PolicyOutput(NamedTuple):
    """What a policy makes of one observation; of B observations, every array begins with B."""

    actions: np.ndarray  #: (K, d) float32, in the robot's units
    value: float | np.ndarray  #: in [0, 1]: the score of the chosen candidate; without planning, the value generated with the actions
    futures: dict[str, np.ndarray]  #: {key of the observation: (H, W, 3) uint8 after the chunk}; empty when not asked for


def load_policy(path: str | Path, *, suite: str = "", statistics: str | Path = "", text: str | Path = "", tokenizer: str | Path = "",
                planning: str | Path = "", planning_statistics: str | Path = "", candidates: int = 1, steps: int | None = None,
                seed: int = 0, device: str = "cpu", settings: Mapping[str, Any] | None = None) -> DeployedPolicy:
    """A policy from a checkpoint folder of a run (``runs/NAME/checkpoints/refined``, ``runs/NAME/checkpoints/rounds/3/refined``) or from
    released weights.

    Args:
        path: the checkpoint folder; or released weights, in any format that `import` reads.
        suite: released weights: "libero", "robocasa" or "aloha", which sets dimensions, cameras and evaluation settings.
        statistics: released weights: the dataset statistics JSON; by default the one that lies beside the weights.
        text: released weights: text embeddings or a T5 folder, as ``model.text_path``; by default the embeddings beside the weights.
        tokenizer: released weights: the Wan 2.1 VAE, as ``model.tokenizer_path``.
        planning: a second checkpoint of the same kind, which imagines and values the candidates; by default the policy does.
        planning_statistics: released weights: statistics of ``planning``; by default as ``statistics``, beside ``planning``.
        candidates: action chunks to choose from (best-of-N); 1 is the policy alone.
        steps: network evaluations per chunk; by default those of the run or suite.
        seed: of the noise, for calls that give none.
        device: "cpu" or "cuda", also with a number.
        settings: further settings by name, such as ``{"planner.rank_by": "joint"}``; they win over the other arguments. What is not given
            is as the checkpoint's run was last used or, for released weights, as the 2B preset and the suite have it.

    ConfigError or CheckpointError, in one line, for whatever is missing or does not fit.
    """
    _check_device(device)
    path = _there(path)
    planning = _there(planning) if planning else planning
    given = {"planner.candidates": candidates, **({} if steps is None else {"inference.steps": steps}), **(settings or {})}
    if unknown := [name for name in given if name not in SETTINGS]:
        raise ConfigError(f"settings has no {unknown[0]!r}{nearest(unknown[0], SETTINGS)}")
    if (path / "policy.json").exists():
        _refuse(path, suite=suite, statistics=statistics, text=text, tokenizer=tokenizer, planning_statistics=planning_statistics)
        config = _checked(changed(_run_settings(path), given))
        networks = [load_checkpoint(folder, dtype=None)[0] for folder in (path, planning) if folder]
    else:
        if not tokenizer:
            raise ConfigError(f"{path} is no checkpoint folder (it has no policy.json), and released weights come without their Wan 2.1 "
                              "VAE: give tokenizer=PATH")
        files = {"model.text_path": str(text or _beside(path, "*_t5_embeddings.*", "text")), "model.tokenizer_path": str(tokenizer)}
        config = _checked(new_config({"model.preset": "cosmos-predict2-2b", "model.suite": suite, **files, **given}))
        pairs = ((path, statistics), (planning, planning_statistics))
        networks = [_released(config, weights, ranges) for weights, ranges in pairs if weights]
    planner = config.planner if config.planner.candidates > 1 else None
    if planning:
        if planner is None or planner.rank_by not in JUDGED:
            why = "there is one candidate" if planner is None else f"planner.rank_by = {planner.rank_by!r} asks the policy alone"
            raise ConfigError(f"planning = {planning} would judge nothing, for {why}: leave it out, or give candidates=8, say")
        _check_pair(networks[0], networks[1], str(planning))
    policy, judge = networks[0], networks[1] if planning else None
    for network in networks:
        ready(network, config.inference, device)
    core = InferenceCore(policy, 0, judge, checkpoint=str(path) if (path / "policy.json").exists() else "")
    core.prepare(planner, 1, config.inference.steps)
    return DeployedPolicy(core, planner, config.inference.steps, seed)


class DeployedPolicy:
    """A policy that is ready to act. :func:`load_policy` makes one.

    The same seed gives the same actions for the same observation, whatever else is in its batch, and the actions of `rollout` and
    `evaluate` for that noise.

    Args:
        core: the networks.
        planner: best-of-N, or None for the policy alone.
        steps: network evaluations per chunk.
        seed: of the noise, for calls that give none.
    """

    def __init__(self, core: InferenceCore, planner: PlannerConfig | None, steps: int, seed: int = 0):
        self.core, self.planner, self.steps, self.seed = core, planner, steps, seed
        self.spec = core.policy.spec  #: cameras in latent order, sizes, actions per chunk
        self.cameras = dict(zip(self.spec.cameras, _keys(self.spec.cameras), strict=True))  #: {camera: keys that an observation may have}

    def get_action(self, observation: Mapping[str, Any], instruction: str | Sequence[str] | None = None, *,
                   seed: int | Sequence[int] | None = None, futures: bool = False) -> PolicyOutput:
        """One chunk of actions for one observation, or for B of them.

        Args:
            observation: per camera (H, W, 3) uint8 RGB, upright, of any size, under its public key (``primary_image``, ``secondary_image``,
                ``wrist_image``, ``left_wrist_image``, ``right_wrist_image``) or its own name; ``proprio`` (p,) in the robot's units; and
                ``task_description``, unless ``instruction`` is given. A batch has B in front of every shape, and one instruction or B.
            instruction: what to do.
            seed: of this call's noise, one for all rows or one each; by default the policy's.
            futures: also decode the predicted frames at the end of the chunk. Decoding takes time.

        ConfigError names the first key that is missing, unknown or holds something else.
        """
        query = self.query(observation, instruction, seed)
        decision, frames = self.core.decide(query.images, query.proprio, query.instructions, query.seeds, self.steps, self.planner, futures)
        actions = decision.actions.cpu().numpy()
        value = decision.scores.cpu().gather(1, decision.chosen.cpu()[:, None])[:, 0].numpy()
        shown = {} if frames is None else dict(zip(query.keys, frames.cpu().numpy().swapaxes(0, 1), strict=True))
        if np.ndim(observation["proprio"]) == 2:
            return PolicyOutput(actions, value, shown)
        return PolicyOutput(actions[0], float(value[0]), {key: frame[0] for key, frame in shown.items()})

    def query(self, observation: Mapping[str, Any], instruction: str | Sequence[str] | None = None,
              seed: int | Sequence[int] | None = None) -> Query:
        """The checked observation, or observations. Arguments and errors as for :meth:`get_action`."""
        proprio = self._proprio(observation)
        rows = len(np.atleast_2d(proprio))
        keys = self._camera_keys(observation)
        images = [self._image(key, observation[key], rows if proprio.ndim == 2 else None) for key in keys]
        told, seeds = _instructions(observation, instruction, rows), _seeds(self.seed if seed is None else seed, rows)
        return Query(tuple(keys), images, np.atleast_2d(proprio), told, seeds)

    def _camera_keys(self, observation: Mapping[str, Any]) -> list[str]:
        """The key of every camera, in latent order. ConfigError for keys that are missing, double or unknown."""
        takes = ", ".join(keys[0] for keys in self.cameras.values()) + f", proprio and {INSTRUCTION}"
        chosen = []
        for keys in self.cameras.values():
            found = [key for key in keys if key in observation]
            if len(found) != 1:
                wrong = f"names one camera twice, as {found[0]!r} and {found[1]!r}" if found else f"lacks {' or '.join(map(repr, keys))}"
                raise ConfigError(f"the observation {wrong}: this policy takes {takes}")
            chosen += found
        if unknown := [key for key in observation if key not in (*chosen, "proprio", INSTRUCTION)]:
            raise ConfigError(f"the observation has {unknown[0]!r}, which this policy does not see: it takes {takes}")
        return chosen

    def _image(self, key: str, image: Any, rows: int | None) -> np.ndarray:
        """(B, H, W, 3) uint8; B is 1 where ``rows`` is None."""
        image = np.asarray(image)
        shape = "height x width x 3" if rows is None else f"{rows} x height x width x 3, as many as proprio"
        if image.ndim != (3 if rows is None else 4) or image.shape[-1] != 3 or 0 in image.shape or rows not in (None, len(image)):
            raise ConfigError(f"{key} is {' x '.join(map(str, image.shape)) or 'a single number'}: give {shape}")
        if image.dtype != np.uint8:
            raise ConfigError(f"{key} is of dtype {image.dtype}: give uint8 from 0 to 255")
        return image if rows is not None else image[None]

    def _proprio(self, observation: Mapping[str, Any]) -> np.ndarray:
        """(p,) or (B, p) float32."""
        if not isinstance(observation, Mapping):
            raise ConfigError(f"an observation is a dict of images, proprio and {INSTRUCTION}, not a {type(observation).__name__}")
        if "proprio" not in observation:
            raise ConfigError(f"the observation lacks 'proprio': give {self.spec.proprio_dim} numbers, in the robot's units")
        proprio, needed = np.asarray(observation["proprio"]), self.spec.proprio_dim
        if proprio.dtype.kind not in "fiu":
            raise ConfigError(f"proprio is of dtype {proprio.dtype}: give numbers")
        if proprio.ndim not in (1, 2) or proprio.shape[-1] != needed or not len(proprio):
            raise ConfigError(f"proprio is of shape {proprio.shape}: this policy takes {needed} numbers, or B x {needed}")
        if not np.isfinite(proprio).all():
            raise ConfigError("proprio has a number that is not finite")
        return proprio.astype(np.float32)


# ---------------------------------------------------------------- what an observation holds


def _keys(cameras: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The keys of each camera: the public one, if there is one for so many cameras, the camera's name, and robosuite's key for it."""
    wrists = [name for name in cameras if not third_person(name)]
    others = [name for name in cameras if third_person(name)]
    public: dict[str, str] = {}
    if len(wrists) == 1:
        public = {wrists[0]: "wrist_image"}
    elif len(wrists) == 2:
        left, right = wrists[::-1] if "right" in wrists[0] and "left" in wrists[1] else wrists
        public = {left: "left_wrist_image", right: "right_wrist_image"}
    public |= dict(zip(others, ("primary_image", "secondary_image"), strict=False))
    for name in cameras:
        yield tuple(dict.fromkeys([*([public[name]] if name in public else []), name, f"{name}_image"]))


def _instructions(observation: Mapping[str, Any], instruction: str | Sequence[str] | None, rows: int) -> list[str]:
    """The instruction of every row."""
    told = observation.get(INSTRUCTION) if instruction is None else instruction
    if told is None:
        raise ConfigError(f"no instruction: give get_action one, or the observation a {INSTRUCTION!r}")
    if instruction is not None and observation.get(INSTRUCTION, instruction) != instruction:
        raise ConfigError(f"two instructions, {instruction!r} and {observation[INSTRUCTION]!r} of the observation: give one")
    texts = [told] * rows if isinstance(told, str) else list(told)
    if len(texts) != rows or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"the instruction is {told!r}: give a text, or {rows} of them, one per observation")
    return texts


def _seeds(seed: int | Sequence[int], rows: int) -> torch.Tensor:
    """(rows,) int64."""
    seeds = np.broadcast_to(np.asarray(seed), rows) if np.ndim(seed) == 0 else np.asarray(seed)
    if seeds.dtype.kind not in "iu" or seeds.shape != (rows,):
        raise ConfigError(f"seed = {seed!r}: give a whole number, or {rows} of them, one per observation")
    return torch.from_numpy(seeds.astype(np.int64))


# ---------------------------------------------------------------- where a policy comes from


def _run_settings(checkpoint: Path) -> RunConfig:
    """The settings that the run of a checkpoint was last used with; the preset's where the folder lies in no run."""
    parents = checkpoint.expanduser().resolve().parents
    folder = parents[3] if len(parents) > 3 and parents[1].name == "rounds" else parents[1]
    stored = stored_config(RunConfig(root=str(folder.parent), name=folder.name)) if (folder / "config.json").exists() else None
    return stored or new_config({"model.preset": read_description(checkpoint)[0].preset})


def _released(config: RunConfig, weights: str | Path, statistics: str | Path) -> CosmosPolicy:
    ranges = read_statistics(statistics or _beside(released.local(weights), "*_dataset_statistics.json", "statistics"))
    check_sizes(config.model.suite, len(ranges.actions_low), len(ranges.proprio_low), str(statistics or weights))
    suite = SUITES.get(config.model.suite)
    cameras = suite.cameras if suite else config.sim.cameras
    return load_released(make_spec(config.model, cameras, len(ranges.actions_low), len(ranges.proprio_low)), weights, ranges)


def _there(path: str | Path) -> Path:
    """What ``path`` names. ConfigError when that is nowhere."""
    found = released.local(path)
    if not found.exists():
        raise ConfigError(f"{released.problem(str(path))}: give a checkpoint folder of a run, or released weights")
    return found


def _beside(weights: Path, pattern: str, argument: str) -> Path:
    """The one file that lies beside the weights, or in the folder that they are; one that begins with their name comes first, as `export`
    writes it."""
    folder = weights if weights.is_dir() else weights.parent
    found = sorted(folder.glob(f"{escape(weights.stem)}{pattern[1:]}")) or sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ConfigError(f"{weights} is no checkpoint folder (it has no policy.json), and released weights need {argument}: "
                          f"{folder} has {len(found) or 'no'} {pattern}, give {argument}=FILE")
    return found[0]


def _check_pair(policy: CosmosPolicy, judge: CosmosPolicy, planning: str) -> None:
    if name := policy.spec.unlike(judge.spec):
        mine, theirs = (getattr(network.spec, name) for network in (policy, judge))
        raise ConfigError(f"planning = {planning} and the policy differ in {name}: {theirs} and {mine}; give networks of one robot and "
                          "suite")


def _checked(config: RunConfig) -> RunConfig:
    check(config)
    return config


def _refuse(path: Path, **released: str | Path) -> None:
    if named := [name for name, value in released.items() if value]:
        raise ConfigError(f"{path} is a checkpoint folder, which holds its own {named[0]}: leave {named[0]} out")


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device = {device!r}: give 'cpu' or 'cuda'")
    if kind == "cuda" and (not torch.cuda.is_available() or number and int(number) >= torch.cuda.device_count()):
        raise ConfigError(f"device = {device!r}, and torch sees {torch.cuda.device_count()} GPUs here: give device='cpu', or install a "
                          "torch for your GPU")
