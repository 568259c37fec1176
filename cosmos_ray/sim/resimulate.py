"""Simulates a stored episode again from its initial state and actions, and compares every state with the stored one, bit for bit."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cosmos_ray.config import SimConfig, check_ranges
from cosmos_ray.config.tasks import GYM
from cosmos_ray.errors import ConfigError, SimulationError, StoreError
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.sim.make import make
from cosmos_ray.sim.simulation import Simulation

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Divergence:
    """The first step whose state differs.

    ``entries`` of the state's ``size`` numbers differ. Number ``index`` differs most, by ``difference``: 0.0 where only the sign of a
    zero differs, inf where one side is not finite."""

    step: int
    entries: int
    size: int
    index: int
    difference: float


@dataclass(frozen=True)
class Resimulation:
    """Result of simulating an episode again.

    State 0 is the initial state, state ``t`` the state after ``t`` actions. ``steps`` of ``length`` actions ran; fewer when the
    simulation ended early, for the reason in ``stopped``. ``identical``: all states are equal, bit for bit.

    ``reset_divergence`` is the difference between state 0 and a reset with the key's seed (None: no difference). ``reset_checked`` says
    whether this was compared; an episode whose key names another initial state does not begin with a plain reset.

    ``fingerprint_differences`` is ``{entry: (stored, here)}`` for the entries that both have and that differ. ``not_recorded`` lists the
    entries that only one of them has.

    ``compared`` is "states", or "proprioception": of an environment without a state that can be restored, which began again by its seed.
    """

    name: str
    length: int
    steps: int
    identical: bool
    first_divergence: Divergence | None
    reset_checked: bool
    reset_divergence: Divergence | None
    recorded_success: bool
    success: bool
    recorded_invalid: str = ""
    stopped: str = ""
    compared: str = "states"
    fingerprint_differences: dict[str, tuple[str, str]] = field(default_factory=dict)
    not_recorded: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The result for a terminal, most important first."""
        if self.identical:
            lines = [f"{self.name}: identical, {self.length + 1} {self.compared} bit for bit"]
        else:
            lines = [f"{self.name}: not identical, {_where(self.first_divergence, self.length)}"]
        if self.compared != "states":
            lines.append(f"  {self.compared}: the environment has no state that can be restored, so it began again by its seed")
        if self.stopped:
            lines.append(f"  stopped after {self.steps} of {self.length} actions: {self.stopped}")
        if not self.reset_checked:
            lines.append("  reset: not compared, the episode began in an initial state of its own")
        elif self.reset_divergence is None:
            lines.append("  reset: the seed gives the initial state bit for bit")
        else:
            lines.append(f"  reset: the seed gives another initial state, {_where(self.reset_divergence, self.length)}")
        lines.append(f"  outcome: recorded {_outcome(self.recorded_success)}, here {_outcome(self.success)}")
        if self.recorded_invalid:
            lines.append(f"  the simulation broke when recording ({self.recorded_invalid}); the step that broke it is not stored")
        for name, (stored, here) in self.fingerprint_differences.items():
            lines.append(f"  differs: {name} was {stored}, here {here}")
        if not self.fingerprint_differences:
            lines.append("  fingerprint: no recorded entry differs")
        if self.not_recorded:
            lines.append(f"  {NOT_RECORDED}, so not compared: {', '.join(self.not_recorded)}")
        return lines

    def text(self) -> str:
        """:attr:`lines` as one string."""
        return "\n".join(self.lines)


def resimulate(episode: Episode, env: Simulation | None = None) -> Resimulation:
    """Simulate ``episode`` again from its first stored state and compare every state with the stored one.

    Continues after a difference, to learn whether the outcome differs too. Uses ``env`` if given (and leaves it at the end of the
    episode), else an environment made from the stored fingerprint.

    Raises:
        ConfigError: no environment can be made from the fingerprint.
        StoreError: the environment's states or actions have other sizes than the episode's.
    """
    if env is not None:
        return _resimulate(episode, env)
    fingerprint = stored_fingerprint(episode.info, episode.key.name)
    made = make(config_from_fingerprint(fingerprint, episode.key.name), make_seed_of(fingerprint, episode.key.name))
    try:
        return _resimulate(episode, made)
    finally:
        made.close()


def stored_fingerprint(info: Any, name: str) -> dict[str, str]:
    """The simulator fingerprint in an episode's ``info``. ConfigError when it has none, as imported episodes have."""
    fingerprint = info.get("fingerprint") if isinstance(info, Mapping) else None
    if not isinstance(fingerprint, Mapping) or not fingerprint:
        raise ConfigError(f"episode {name} has no simulator fingerprint (imported episodes have none): it cannot be simulated here")
    return {str(key): str(value) for key, value in fingerprint.items()}


def config_from_fingerprint(fingerprint: Mapping[str, str], name: str = "") -> SimConfig:
    """The environment's configuration, from its ``fingerprint``: all settings that episodes and pictures depend on.

    All cameras become third-person cameras, in the stored order; the horizon is the task's own. A fingerprint without robots counts as
    a Panda's; the model hash then tells whether that is right. ``name`` is the episode's name, for error messages.

    Raises:
        ConfigError: an entry is missing or malformed; the message names the entry.
    """
    if str(fingerprint.get("task", "")).startswith(GYM):
        return _gym_config(fingerprint, name)
    actions = _entry(fingerprint, "actions", r"([A-Z_]{1,40})/(position|pose)", name)
    render = _entry(fingerprint, "render", r"(\d{1,5})px cell ([0-9.e+-]{1,25})( .*)?", name)
    config = SimConfig(
        task=_entry(fingerprint, "task", r"\w{1,100}(/\d{1,3})?", name)[0],
        robots=tuple(_entry({"robots": "Panda", **fingerprint}, "robots", r"\w{1,60}(,\w{1,60})?", name)[0].split(",")),
        controller=actions[1],
        wrist_cameras=(),
        third_cameras=tuple(_entry(fingerprint, "cameras", r"[^,]+(,[^,]+)*", name)[0].split(",")),
        image_size=int(render[1]),
        actions=actions[2],
        control_freq=int(_entry(fingerprint, "control_freq", r"\d{1,5}", name)[0]),
        placement=_number(fingerprint["placement"] if "placement" in fingerprint else "", "placement", name),
        quality="full" if render[3] == " full" else "fast",
        mesh_cell=_number(render[2], "render", name),
        fast_step=_entry(fingerprint, "stepping", "fused|stock", name)[0] == "fused",
    )
    check_ranges(config, "sim.")
    return config


def _gym_config(fingerprint: Mapping[str, str], name: str) -> SimConfig:
    """The same of a gymnasium environment. The user's settings alone make a module be imported that registers it, never a file."""
    task = _entry(fingerprint, "task", r"gym:[\w./:-]{1,200}", name)[0]
    module = task.removeprefix(GYM).rpartition(":")[0]
    if module and module not in sys.modules:
        raise ConfigError(f"episode {name or '(unnamed)'} was simulated by {task}: name its run (--name), whose sim.task imports {module}")
    config = SimConfig(
        task=task,
        wrist_cameras=(),
        third_cameras=tuple(_entry(fingerprint, "cameras", r"[^,]+(,[^,]+)*", name)[0].split(",")),
        image_size=int(_entry(fingerprint, "render", r"(\d{1,5})px", name)[1]),
    )
    check_ranges(config, "sim.")
    return config


def make_seed_of(fingerprint: Mapping[str, str], name: str = "") -> int:
    """Seed with which the environment's model was made. ConfigError when the fingerprint lacks it."""
    return int(_entry(fingerprint, "make_seed", r"\d{1,18}", name)[0])


def compare_fingerprints(stored: Mapping[str, str], here: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """``{entry: (stored, here)}`` of the entries that both have and that differ, and the entries that only one of them has."""
    names = [*here, *(name for name in stored if name not in here)]
    differing = {n: (str(stored[n]), str(here[n])) for n in names if n in stored and n in here and str(stored[n]) != str(here[n])}
    return differing, tuple(n for n in names if n not in stored or n not in here)


def _entry(fingerprint: Mapping[str, str], entry: str, pattern: str, name: str) -> re.Match:
    value = fingerprint.get(entry)
    match = re.fullmatch(pattern, str(value)) if value is not None else None
    if match is None:
        what = "is missing" if value is None else f"is {str(value)[:60]!r}"
        raise ConfigError(f"fingerprint of episode {name or '(unnamed)'}: entry {entry!r} {what}, so its simulator cannot be made again")
    return match


def _number(text: str, entry: str, name: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"fingerprint of episode {name or '(unnamed)'}: entry {entry!r} has {text[:60]!r} for a number, so its simulator cannot be "
            "made again"
        ) from error


def _resimulate(episode: Episode, env: Simulation) -> Resimulation:
    _check_sizes(episode, env)
    seeded = not getattr(episode.key, "initial_state", "")
    env.horizon = _horizon(episode)
    if not env.restorable and not seeded:
        raise ConfigError(f"episode {episode.key.name} began in a state of its own, and {env.task} has none that can be restored")
    recorded = episode.states if env.restorable else episode.proprio.astype(np.float64)

    def differs(step: int) -> Divergence | None:
        return _divergence(step, env.state() if env.restorable else env.proprio().astype(np.float64), recorded[step])

    env.reset(episode.key.seed)
    reset_divergence = differs(0) if seeded else None
    if env.restorable:
        env.restore(episode.states[0])
    first = differs(0)
    steps, stopped = 0, ""
    for action in episode.actions:
        try:
            env.step(action)
        except SimulationError as error:
            stopped = str(error)
            break
        steps += 1
        first = first or differs(steps)
    stored = episode.info.get("fingerprint")
    differences, missing = compare_fingerprints(stored if isinstance(stored, Mapping) else {}, env.fingerprint)
    return Resimulation(
        name=episode.key.name,
        length=episode.length,
        steps=steps,
        identical=first is None and steps == episode.length,
        first_divergence=first,
        reset_checked=seeded,
        reset_divergence=reset_divergence,
        recorded_success=episode.success,
        success=env.success,
        recorded_invalid=episode.invalid,
        stopped=stopped,
        fingerprint_differences=differences,
        not_recorded=missing,
        compared="states" if env.restorable else "proprioception",
    )


def _check_sizes(episode: Episode, env: Simulation) -> None:
    sizes = (("state", episode.states.shape[1], env.state_dim), ("action", episode.actions.shape[1], env.action_dim))
    for what, theirs, ours in sizes:
        if theirs != ours:
            raise StoreError(
                f"episode {episode.key.name} has {theirs} numbers per {what}, the environment of {env.task} here {ours}: it was recorded "
                "with another task, robot, action space or version of robosuite"
            )


def _horizon(episode: Episode) -> int:
    """Horizon of the recording. The last state of a timed-out episode shows it."""
    horizon = episode.info.get("horizon")
    if isinstance(horizon, int) and horizon > 0:
        return horizon
    return episode.length if episode.timed_out else episode.length + 1


def _divergence(step: int, here: np.ndarray, stored: np.ndarray) -> Divergence | None:
    """The difference of two states (S,) float64, bit by bit; None when there is none."""
    changed = np.flatnonzero(here.view(np.uint64) != stored.view(np.uint64))
    if not len(changed):
        return None
    with np.errstate(invalid="ignore"):
        difference = np.abs(here[changed] - stored[changed])
    difference[np.isnan(difference)] = np.inf
    largest = int(np.argmax(difference))
    return Divergence(step, len(changed), len(stored), int(changed[largest]), float(difference[largest]))


def _where(divergence: Divergence | None, length: int) -> str:
    if divergence is None:
        return "though every state that was reached is"
    return (
        f"first at step {divergence.step} of {length}: {divergence.entries} of {divergence.size} numbers differ, number {divergence.index} "
        f"by the most, {divergence.difference:.3g}"
    )


def _outcome(success: bool) -> str:
    return "success" if success else "no success"
