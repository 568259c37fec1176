"""A study as a TOML file: arms x training seeds x tasks, and the runs behind the arms. docs/studies.md has the format."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ray.config.alike import differences, own_settings
from cosmos_ray.config.recipes import recipe
from cosmos_ray.config.run import RunConfig, check
from cosmos_ray.config.settings import format_value, nearest, new_config, read_toml, values_of_tree
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import is_uri

STAGES = ("collect", "pretrain", "rollout", "refine")  #: that a study may run before it evaluates, in their order
OWN = ("name", "root", "seed", "address", "init", "replay.store", "repeat")  #: settings that the study chooses for its runs
OF_ARM = ("planner", "inference")  #: sections that an arm may change: evaluations know their settings
MAIN = "main"  #: the run that every study has

KEYS = ("about", "root", "seeds", "base", "pairs", "settings", "tasks", "runs", "arms")
TASK_KEYS, RUN_KEYS, ARM_KEYS = ("recipe", "settings"), ("stages", "init_from", "store_of", "base_of", "same_compute", "settings"), (
    "run", "plays", "settings")


@dataclass(frozen=True)
class Chain:
    """A run of every task and training seed."""

    name: str
    stages: tuple[str, ...]
    init_from: str = ""  #: run whose base policy the training of this one begins from
    store_of: str = ""  #: run whose replay store this one reads
    base_of: str = ""  #: run whose base policy is this one's
    same_compute: bool = False  #: `pretrain` takes as many steps as the refinement of the settings would, at its rate and mixture
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """Runs that must be done before this one begins."""
        return {self.init_from, self.store_of, self.base_of} - {""}


@dataclass(frozen=True)
class StudyArm:
    """What plays the held-out initial states of a run."""

    name: str
    run: str
    plays: str  #: as `evaluate --arms` names it
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of one task and training seed: its stages, then its arms."""

    task: str
    seed: int
    chain: Chain
    config: RunConfig
    arms: tuple[StudyArm, ...]
    needs: tuple[str, ...]  #: names of runs that must be done before

    def made_by(self, arm: StudyArm) -> dict[str, str]:
        """What decides the outcomes of ``arm`` beside the settings of its task, as texts."""
        chain = dataclasses.asdict(self.chain)
        parts = {key: format_value(chain[key]) for key in RUN_KEYS if key != "settings" and chain[key]}
        return {"plays": arm.plays, **parts, **{name: format_value(value) for name, value in {**self.chain.values, **arm.values}.items()}}


@dataclass(frozen=True)
class Study:
    """Everything that a study's file says."""

    name: str
    about: str
    root: str
    seeds: tuple[int, ...]
    tasks: Mapping[str, dict[str, Any]]  #: settings of every task, its recipe's among them
    chains: Mapping[str, Chain]
    arms: Mapping[str, StudyArm]
    base: str  #: arm that every other one is paired with
    pairs: tuple[tuple[str, str], ...]  #: (arm, other) that are paired as well

    def cells(self) -> list[Cell]:
        """All runs of the study; a run comes after those that it needs. ConfigError for settings that cannot work."""
        cells = []
        for task in self.tasks:
            for seed in self.seeds:
                for chain in self.chains.values():
                    arms = tuple(arm for arm in self.arms.values() if arm.run == chain.name)
                    needs = tuple(self.run_name(task, seed, name) for name in self.chains if name in chain.needs)
                    cells.append(Cell(task, seed, chain, self.config(task, seed, chain), arms, needs))
        return cells

    @staticmethod
    def run_name(task: str, seed: int, chain: str) -> str:
        """Name of a run's folder below the root."""
        return f"{task}-{seed}" if chain == MAIN else f"{task}-{seed}-{chain}"

    def config(self, task: str, seed: int, chain: Chain) -> RunConfig:
        """The settings of a run. ConfigError when they cannot work."""
        config = new_config({**self.tasks[task], **chain.values, "name": self.run_name(task, seed, chain.name), "root": self.root,
                             "seed": seed})
        if chain.same_compute:
            main = self.config(task, seed, self.chains[MAIN])
            learner = dataclasses.replace(config.learner, lr=main.learner.refine_lr, base_mix=main.learner.refine_mix,
                                          advantage_temperature=0.0)
            config = dataclasses.replace(config, pretrain_steps=main.rounds * (main.planning_steps + main.refine_steps), planning_steps=0,
                                         learner=learner)
        if chain.init_from:
            config = dataclasses.replace(config, init=str(self._folder(task, seed, chain.init_from) / "checkpoints" / "base"))
        if chain.store_of:
            store = str(self._folder(task, seed, chain.store_of) / "replay")
            config = dataclasses.replace(config, replay=dataclasses.replace(config.replay, store=store))
        check(config)
        return config

    def _folder(self, task: str, seed: int, chain: str) -> Path:
        return Path(self.root) / self.run_name(task, seed, chain)


def read_study(path: Path, root: str | None = None) -> Study:
    """The study of a file, with its runs below ``root`` [what the file says, else runs/NAME]. ConfigError names the key and its line."""
    return _Reader(path).study(root)


def read_settings(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON or TOML hold them, by name. ConfigError as for a config file."""
    return values_of_tree(path, tree, OLD_NAMES)


class _Reader:
    """Reads one file; every complaint names the key and its line."""

    def __init__(self, path: Path):
        self.path, self.tree = path, read_toml(path)
        self.lines = _lines(path.read_text())

    def study(self, root: str | None) -> Study:
        tree = self.tree
        self.known((), tree, KEYS)
        common = self.settings((), tree)
        tasks = {name: self.task(name, table, common) for name, table in self.table("tasks", required=True).items()}
        chains = {MAIN: Chain(MAIN, STAGES)}
        for name, table in self.table("runs").items():
            chains[name] = self.chain(name, table, chains)
        arms = {name: self.arm(name, table, chains) for name, table in self.table("arms", required=True).items()}
        seeds = tree.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
            raise self.error(("seeds",), "must be a list of different whole numbers, such as [0, 1]")
        base = tree.get("base", next(iter(arms)))
        pairs = tree.get("pairs", [])
        for key, names in (("base", [base]), *(("pairs", pair) for pair in pairs)):
            if not isinstance(names, list) or key == "pairs" and len(names) != 2:
                raise self.error((key,), 'must be a list of pairs of arms, such as [["refined", "base"]]')
            for name in names:
                if name not in arms:
                    raise self.error((key,), f"names no arm {name!r}{nearest(str(name), arms)}")
        for key in ("about", "root"):
            if not isinstance(tree.get(key, ""), str):
                raise self.error((key,), "must be a text")
        where = root or tree.get("root") or f"runs/{self.path.stem}"
        if is_uri(where) and any(chain.needs for chain in chains.values()):
            raise ConfigError(f"{self.path}: runs that begin from other runs need a folder that all nodes see, and {where} is a bucket: "
                              "give another --root")
        where = where if is_uri(where) else str(Path(where).expanduser().absolute())
        study = Study(self.path.stem, tree.get("about", ""), where, tuple(seeds), tasks, chains, arms, base, tuple(map(tuple, pairs)))
        try:
            study.cells()
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from error
        return study

    def task(self, name: str, table: Any, common: dict[str, Any]) -> dict[str, Any]:
        self.known(("tasks", name), table, TASK_KEYS)
        try:
            base = recipe(table["recipe"]) if "recipe" in table else {}
        except ConfigError as error:
            raise self.error(("tasks", name, "recipe"), f": {error}") from error
        return {**base, **common, **self.settings(("tasks", name), table)}

    def chain(self, name: str, table: Any, before: Mapping[str, Chain]) -> Chain:
        at = ("runs", name)
        self.known(at, table, RUN_KEYS)
        stages = table.get("stages", list(STAGES))
        if not isinstance(stages, list) or [stage for stage in STAGES if stage in stages] != stages:
            raise self.error((*at, "stages"), f"must be some of {', '.join(STAGES)}, in this order")
        for key in ("init_from", "store_of", "base_of"):
            if key in table and (table[key] not in before or table[key] == name):
                raise self.error((*at, key), f"names no run {table[key]!r} above this one; there are {', '.join(before)}")
        if type(table.get("same_compute", False)) is not bool:
            raise self.error((*at, "same_compute"), "must be true or false")
        if table.get("base_of") and "pretrain" in stages:
            raise self.error((*at, "base_of"), "gives the run its base policy: leave `pretrain` out of its stages, or use init_from")
        links = {key: table.get(key, "") for key in ("init_from", "store_of", "base_of")}
        return Chain(name, tuple(stages), **links, same_compute=table.get("same_compute", False), values=self.settings(at, table))

    def arm(self, name: str, table: Any, chains: Mapping[str, Chain]) -> StudyArm:
        at = ("arms", name)
        self.known(at, table, ARM_KEYS)
        run, plays = table.get("run", MAIN), table.get("plays", name)
        if run not in chains:
            raise self.error((*at, "run"), f"names no run {run!r}{nearest(str(run), chains)}")
        if not isinstance(plays, str):
            raise self.error((*at, "plays"), "must be a text, such as 'refined + planning'")
        values = self.settings(at, table)
        for setting in values:
            if setting.partition(".")[0] not in OF_ARM:
                raise self.error((*at, "settings", *setting.split(".")), "is a setting of a run, not of an arm: give the arm a run of its "
                                                                         "own in [runs]")
        return StudyArm(name, run, plays, values)

    def settings(self, at: tuple[str, ...], table: dict[str, Any]) -> dict[str, Any]:
        """The settings of a table, each checked by itself."""
        tree = table.get("settings", {})
        values: dict[str, Any] = {}
        if not isinstance(tree, dict):
            raise self.error((*at, "settings"), "must be a table of settings")
        for key, value in tree.items():
            for name, one in ({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}).items():
                place = (*at, "settings", *name.split("."))
                if name in OWN:
                    raise self.error(place, "is chosen by the study for its runs")
                try:
                    values |= read_settings(self.path, {name: one})
                except ConfigError as error:
                    raise ConfigError(f"{self.at(place)}{str(error).removeprefix(str(self.path))}") from error
        return values

    def table(self, key: str, required: bool = False) -> dict[str, Any]:
        found = self.tree.get(key, {})
        if not isinstance(found, dict) or required and not found:
            raise self.error((key,), f"is missing: a study needs a table such as [{key}.NAME]" if key not in self.tree
                             else f"must have tables such as [{key}.NAME]")
        return found

    def known(self, at: tuple[str, ...], table: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(table, dict):
            raise self.error(at, "must be a table")
        for key in table:
            if key not in keys:
                raise self.error((*at, key), f"is unknown{nearest(key, keys) or '; there are ' + ', '.join(keys)}")

    def at(self, key: tuple[str, ...]) -> str:
        line = next((self.lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
        return str(self.path) if line is None else f"{self.path}, line {line}"

    def error(self, key: tuple[str, ...], text: str) -> ConfigError:
        return ConfigError(f"{self.at(key)}: {'.'.join(key)} {text}".replace(" : ", ": "))


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """The line of every key of a TOML file, as far as keys begin lines."""
    found: dict[tuple[str, ...], int] = {}
    header: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        try:
            if word.startswith("[") and "=" not in word.partition("#")[0]:
                key = header = _path(tomllib.loads(word))
            elif "=" in word and not word.startswith("#"):
                key = (*header, *_path(tomllib.loads(f"{word.partition('=')[0]} = 0")))
            else:
                continue
        except tomllib.TOMLDecodeError:
            continue  # a line within a value
        for n in range(1, len(key) + 1):
            found.setdefault(key[:n], number)
    return found


def _path(tree: Any) -> tuple[str, ...]:
    """The keys down a tree of single branches."""
    if isinstance(tree, dict) and len(tree) == 1:
        key, below = next(iter(tree.items()))
        return (key, *_path(below))
    return ()


def task_settings(study: Study, task: str) -> dict[str, str]:
    """What a study sets for the main run of a task, by name, as texts."""
    return own_settings(study.config(task, study.seeds[0], study.chains[MAIN]))


def same_result(cell: Cell, before: RunConfig) -> tuple[str, str, str] | None:
    """The first setting in which the run that exists ``before`` gives other results than the cell, as (name, theirs, ours)."""
    replay = dataclasses.replace(cell.config.replay, store=before.replay.store)
    ours = dataclasses.replace(cell.config, planner=before.planner, init=before.init, replay=replay)
    for name, (theirs, mine) in differences(before, ours).items():
        return name, theirs, mine
    return None

