"""The finished rounds of `refine` that a run keeps. Any of them acts, is evaluated, and is gone on from.

``checkpoints/rounds/N`` has the policy ``refined`` of round N and, where the run had one, the network ``planning`` that planned for it.
``checkpoints/refined`` and ``planning`` are the newest. Both names of a network lead to the same files (hard links), so a kept round costs
its weights once.

``round.json`` says which round began last, and on which line of rounds. The file changes in one step, and :meth:`Rounds.settle` brings the
checkpoints to what the file says. So a process that is killed at any instant leaves a round or no round, and the next call does the rest.
"""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cosmos_ray.config.run import rounds_to_keep
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import copy_checkpoint, copy_checkpoints, read_description

logger = logging.getLogger(__name__)

NETWORKS = ("refined", "planning")
"""Checkpoints that a round trains. Every round trains on under the same name, and a checkpoint's description counts the finished rounds."""

PRESENT = "round.json"
BEFORE = "_before"  #: suffix of what the present round began from, in a run from before rounds were kept


@dataclass(frozen=True)
class Present:
    """Where the refinement of a run stands."""

    round: int  #: the round that began last, from 1
    base_version: int  #: of the base policy behind it
    line: int = 0  #: names the line of rounds: 0 the first one, else the version number that going back took
    from_round: int = 0  #: the round that the line goes on from


class Rounds:
    """The rounds of the run in ``folder``."""

    def __init__(self, folder: RunFolder):
        self.folder, self.path = folder, folder.checkpoint("rounds")

    # ---------------------------------------------------------------- what there is

    def present(self, base_version: int) -> Present:
        """Where the refinement of version ``base_version`` of the base policy stands: before its first round, if the run refined another
        one. Without ``round.json``, at the newest round. ConfigError when the file is damaged."""
        try:
            stored = self.folder.read_json(PRESENT)
            found = Present(**{name: int(value) for name, value in stored.items()}) if stored is not None else None
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.folder.path / PRESENT} does not say where the refinement stands ({error.__cause__ or error}): delete "
                              "the file, and `refine` goes on from the newest round") from error
        if found is None:
            before, newest = (self.behind(name, base_version) for name in ("refined" + BEFORE, "refined"))
            return Present(max(before + 1, newest), base_version, self.info("refined", base_version).get("line", 0))
        return found if found.base_version == base_version else Present(1, base_version)

    def numbers(self) -> list[int]:
        """The rounds in ``checkpoints/rounds``, ascending."""
        return sorted(int(part.name) for part in self.path.iterdir() if part.name.isdigit()) if self.path.exists() else []

    def kept(self) -> dict[int, dict[str, Path]]:
        """Every round there is, ascending: its number, and its networks by name. A run from before rounds were kept has two of them."""
        found: dict[int, dict[str, Path]] = {}
        for suffix in (BEFORE, ""):
            networks = self._beside(suffix)
            if "refined" in networks:
                found.setdefault(_round_of(_info(networks["refined"])), networks)
        for number in self.numbers():
            paths = {name: self.path / str(number) / name for name in NETWORKS}
            found[number] = {name: path for name, path in paths.items() if (path / "policy.json").exists()}
        return dict(sorted(found.items()))

    def networks(self, number: int) -> dict[str, Path]:
        """The networks of round ``number`` by name. ConfigError when the run does not keep that round."""
        kept = self.kept()
        if number not in kept:
            there = f"it keeps {listed(list(kept))}" if kept else "it has none: run `refine` first"
            raise ConfigError(f"run {self.folder.path.name!r} keeps no round {number}: {there}")
        return kept[number]

    def asked(self, text: str) -> list[int]:
        """The rounds that ``text`` asks for: a number, or "all". ConfigError for a round that is not kept, and for other texts."""
        if text == "all":
            if not (kept := list(self.kept())):
                raise ConfigError(f"run {self.folder.path.name!r} has no rounds: run `refine` first")
            return kept
        if not text.isdigit():
            raise ConfigError(f"--round {text!r} is neither the number of a round nor 'all'")
        self.networks(int(text))
        return [int(text)]

    def behind(self, checkpoint: str, base_version: int) -> int:
        """How many rounds from base policy ``base_version`` are behind checkpoint ``checkpoint``; 0 where there is none."""
        info = self.info(checkpoint, base_version)
        return _round_of(info) if info else 0

    def info(self, checkpoint: str, base_version: int) -> dict[str, Any]:
        """What a checkpoint says of itself; empty if there is none, or if another base policy is behind it."""
        target = self.folder.checkpoint(checkpoint)
        info = _info(target) if target.exists() else {}
        return info if info.get("base_version") == base_version else {}

    # ---------------------------------------------------------------- what changes

    def begin(self, number: int, base_version: int) -> None:
        """Round ``number`` begins, or goes on."""
        present = self.present(base_version)
        now = replace(present, round=max(present.round, number))
        if self.folder.read_json(PRESENT) != asdict(now):
            self.folder.write_json(PRESENT, asdict(now))

    def go_back(self, number: int, base_version: int) -> None:
        """Leave every round after ``number``, so that the next one goes on from it. What is left moves aside, see :meth:`settle`."""
        present = self.present(base_version)
        if self.behind("refined", base_version) < present.round:
            logger.warning("round %d was not finished: what it has trained is dropped", present.round)
        line = self.folder.next_version()
        self.folder.write_json(PRESENT, asdict(Present(number + 1, base_version, line, number)))
        self.settle(base_version)

    def settle(self, base_version: int) -> None:
        """Bring the checkpoints to what ``round.json`` says: the newest round is kept, rounds of another line or of another base policy
        are moved aside, and ``refined`` and ``planning`` are those of the newest round of this line."""
        present = self.present(base_version)
        self.begin(present.round, base_version)

        def left(info: dict[str, Any]) -> bool:
            return _round_of(info) >= present.round and info.get("line", 0) != present.line

        for suffix in (BEFORE, ""):
            networks = self._beside(suffix)
            if self.info("refined" + suffix, base_version) and "refined" in networks and not left(_info(networks["refined"])):
                self._keep(networks)
        for name in NETWORKS:
            self._discard(self.folder.checkpoint(name + BEFORE))
        self._move_aside([number for number in self.numbers() if (info := _info(self.path / str(number) / "refined"))
                          and (info.get("base_version") != base_version or left(info))])
        for name in NETWORKS:
            info, source = self.info(name, base_version), self.path / str(present.round - 1) / name
            if info and left(info) and source.exists():
                copy_checkpoint(source, self.folder.checkpoint(name))
            elif info and left(info):
                self._discard(self.folder.checkpoint(name))

    def forget(self, keep: str, base_version: int) -> list[int]:
        """Delete the rounds that ``keep`` (setting ``keep_rounds``) does not keep, and return them. The newest round always stays, and the
        one that it began from; with "best", so does a round that was not evaluated."""
        how, most = rounds_to_keep(keep)
        numbers, present = self.numbers(), self.present(base_version).round
        stay = set(numbers)
        if how == "last":
            stay = set(numbers[-most:])
        elif how == "best":
            rates = self._rates()
            stay = {n for n in numbers if n not in rates} | set(sorted(rates, key=lambda n: (rates[n], n))[-most:])
        gone = [number for number in numbers if number not in stay | {present, present - 1}]
        for number in gone:
            self._discard(self.path / str(number))
        if gone:
            logger.warning("deleted %s: keep_rounds is %s", listed(gone), keep)
        return gone

    # ---------------------------------------------------------------- steps

    def _beside(self, suffix: str) -> dict[str, Path]:
        """The networks ``refined`` and ``planning`` of one round under their newest names, by name."""
        found = {name: self.folder.checkpoint(name + suffix) for name in NETWORKS if self.folder.has_policy(name + suffix)}
        if set(found) == set(NETWORKS):
            policy, planning = (_info(found[name]) for name in NETWORKS)
            same_base = planning.get("base_version") == policy.get("base_version")
            if "base_version" not in planning or not same_base or _round_of(planning) > _round_of(policy):
                del found["planning"]  # imported, of another base policy, or of the round that runs
        return found

    def _keep(self, networks: dict[str, Path]) -> None:
        """Keep ``networks`` as the round that they are of, whole or not at all."""
        target = self.path / str(_round_of(_info(networks["refined"])))
        there = {name: path for name in NETWORKS if (path := target / name).exists()}
        if {name: _version(path) for name, path in there.items()} != {name: _version(path) for name, path in networks.items()}:
            if "planning" not in networks and "planning" in there and _version(there["refined"]) == _version(networks["refined"]):
                return  # the next round trains its planning network under that name
            self._discard(target)
            copy_checkpoints(networks, target)

    def _discard(self, path: Path) -> None:
        """Delete a folder: all of it is gone at once under its name."""
        if path.exists():
            unnamed = path.with_name(f".{path.name}.0.tmp")
            shutil.rmtree(unnamed, ignore_errors=True)
            path.rename(unnamed)
            shutil.rmtree(unnamed, ignore_errors=True)

    def _move_aside(self, numbers: list[int]) -> None:
        """Move rounds out of the way, to ``checkpoints/rounds.1`` or the first such name that is free."""
        if not numbers:
            return
        taken = [int(match[1]) for part in self.path.parent.iterdir() if (match := re.fullmatch(r"rounds\.(\d+)", part.name))]
        aside = self.path.with_name(f"rounds.{max(taken, default=0) + 1}")
        aside.mkdir()
        for number in numbers:
            (self.path / str(number)).rename(aside / str(number))
        logger.warning("moved %s to %s", listed(numbers), aside)

    def _rates(self) -> dict[int, float]:
        """The rate of success of every kept round that was evaluated, of its policy without planning."""
        rows = {row["version"]: row["successes"] / row["episodes"]
                for row in self.folder.metrics("evaluate_round") if row["arm"] == "refined"}
        versions = {number: _version(self.path / str(number) / "refined") for number in self.numbers()}
        return {number: rows[version] for number, version in versions.items() if version in rows}


def listed(numbers: list[int]) -> str:
    """Rounds by number, as a sentence names them."""
    *first, last = map(str, numbers)
    return f"rounds {', '.join(first)} and {last}" if first else f"round {last}"


def _info(checkpoint: Path) -> dict[str, Any]:
    return read_description(checkpoint)[2]


def _version(checkpoint: Path) -> int:
    return read_description(checkpoint)[1]


def _round_of(info: dict[str, Any]) -> int:
    """How many rounds are behind a checkpoint. A description without the entry, from before there were rounds, counts as one."""
    return info.get("round", 1)
