"""What a run goes on from: ``manifest.json`` in its folder, one file for everything that its driver has to know again.

Nothing hangs on the manifest alone. The learner's states say what they hold, the store says which episodes there are, and the manifest says
what neither of them knows: the last policy version, and for each of the last learner states the limiter's counters, the episodes known and
the tickets that were running. A run without a manifest, of an earlier version or damaged, goes on from what is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from pathlib import Path
from typing import Any

from cosmos_ray.config import RunConfig
from cosmos_ray.config.settings import PER_COMMAND, SETTINGS, format_value, value_of
from cosmos_ray.config.stored import read_object
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.files.durable import replace

logger = logging.getLogger(__name__)

FILE = "manifest.json"
FORMAT = 1
POINTS_KEPT = 4  #: of one learner's states: as many as a resume may fall back over
LEARNERS_KEPT = 6  #: learners whose states are kept in mind: two networks of the last three rounds

#: Packages that decide bits: a resume is bit-equal within one set of their versions.
PACKAGES = ("torch", "deepspeed", "ray", "robosuite", "mujoco", "numpy", "pyarrow")

#: Sections, and settings of the run, that do not act on what a learner's state holds.
NOT_TRAINED_WITH = ("inference", "rollout", "planner", "demos", "rollouts", "rounds", "eval_episodes")

COUNTS = ("inserted", "sampled", "stored", "batch", "episodes")  #: numbers of a point


class RunManifest:
    """The manifest of the run in ``folder``, whose settings are ``config``. Its entries:

    ``version``: the last policy version that the run gave away, so that no version is used twice.
    ``stage``, ``round``: what the newest learner state is of.
    ``states``: name of a learner's states -> step -> what goes with the state of that step (see :meth:`saved`).
    ``settings``, ``packages``: what the newest state was made with, so that a resume with others says so.

    One process writes it, the one that holds the run's lock.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.file, self._config = folder / FILE, config
        self._held: dict[str, Any] | None = None

    def read(self) -> dict[str, Any]:
        """The entries; none when there is no manifest, or when it is damaged, which is said once. ConfigError for one of a newer format."""
        if self._held is None:
            try:
                held = read_object(self.file) or {}
                problem = _problem(held)
            except ConfigError as error:
                held, problem = {}, str(error)
            if held.get("format", FORMAT) > FORMAT and not problem:
                raise ConfigError(f"{self.file} is of format {held['format']}, this version reads up to {FORMAT}: use the version that "
                                  "wrote it, or delete it to go on from the learner's states and the store")
            if problem:
                logger.warning("%s; the run goes on from the learner's states and the store", problem)
            self._held = {} if problem else held
        return self._held

    def write(self, **entries: Any) -> None:
        """Add ``entries`` or replace those of before; the file is replaced whole or not at all."""
        self._held = {**self.read(), "format": FORMAT, **entries}
        replace(json.dumps(self._held, indent=1).encode(), self.file)

    def saved(self, state: str, step: int, stage: str, round: int = 1, **point: Any) -> None:
        """Note that the learner ``state`` has saved ``step``, with what a resume from that very step needs.

        ``point`` of a refinement: ``inserted``, ``sampled``, ``stored``, ``batch`` (the limiter's account), ``episodes`` (stored ones that
        the driver knows), ``tickets`` (names of the running ones). To be called after the state itself is durable. Forgets states after
        ``step``: they are of a past that a resume went back behind.
        """
        states = {name: dict(points) for name, points in self.read().get("states", {}).items()}
        points = {int(known): value for known, value in states.pop(state, {}).items() if int(known) < step}
        points[step] = point
        states[state] = {str(known): points[known] for known in sorted(points)[-POINTS_KEPT:]}
        kept = dict(list(states.items())[-LEARNERS_KEPT:])
        self.write(stage=stage, round=round, states=kept, settings=_settings(self._config), packages=installed())

    def point(self, state: str, step: int) -> dict[str, Any] | None:
        """What goes with the newest known state of ``state`` up to ``step``, with its own ``step``; None when none is known.

        A run of an earlier version kept the limiter's account in ``limiter.json`` beside the learner's states.
        """
        points = self.read().get("states", {}).get(state, {})
        known = [int(text) for text in points if int(text) <= step]
        if known:
            return {**points[str(max(known))], "step": max(known)}
        try:
            before = read_object(self.file.parent / "learner" / state / "limiter.json")
        except ConfigError as error:
            logger.warning("%s; learning and collecting are paced from now on", error)
            return None
        names = ("step", *COUNTS[:4])
        if before is None or not all(isinstance(before.get(name), int) for name in names) or before["step"] > step:
            return None
        return {name: before[name] for name in names}

    def differences(self) -> list[str]:
        """What is not as it was when the newest state was saved, one line for settings and one for packages; empty when all is the same."""
        held, lines = self.read(), []
        if changes := _changes(held.get("settings", {}), _settings(self._config)):
            lines.append(f"with other settings than its last state was saved with: {changes}")
        if changes := _changes(held.get("packages", {}), installed()):
            lines.append("with other versions than its last state was saved with, so its bits may differ from an uninterrupted run's: "
                         f"{changes}")
        return lines


def installed() -> dict[str, str]:
    """Versions of Python and of the installed :data:`PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _settings(config: RunConfig) -> dict[str, str]:
    """The settings that training may read, by name, as they would be typed."""
    return {name: format_value(value_of(config, name)) for name, setting in SETTINGS.items()
            if name not in PER_COMMAND and not {name, setting.section} & set(NOT_TRAINED_WITH)}


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """``name old -> new`` of what differs, three of them at most; what one side does not know is left out."""
    differ = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    return ", ".join(differ[:3]) + (f" and {len(differ) - 3} others" if len(differ) > 3 else "")


def _problem(held: dict[str, Any]) -> str:
    """What is wrong with the entries of a manifest; "" if nothing is."""
    kinds = {"format": int, "version": int, "stage": str, "round": int, "states": dict, "settings": dict, "packages": dict}
    for name, kind in kinds.items():
        if name in held and (not isinstance(held[name], kind) or isinstance(held[name], bool)):
            return f"{FILE} is damaged: its {name} is {held[name]!r}"
    for state, points in held.get("states", {}).items():
        if not isinstance(points, dict) or not all(step.isdigit() and isinstance(point, dict) for step, point in points.items()):
            return f"{FILE} is damaged: its states of {state} are {points!r}"
        for point in points.values():
            wrong = [name for name in COUNTS if not isinstance(point.get(name, 0), int)]
            if wrong or not isinstance(point.get("tickets", []), list):
                return f"{FILE} is damaged: its {wrong[0] if wrong else 'tickets'} of {state} is no such thing"
    return ""
