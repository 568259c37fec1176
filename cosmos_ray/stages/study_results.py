"""A study's file of results: what every arm reached on every initial state, by task and training seed. One writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from cosmos_ray.config.study import Cell, Study, task_settings
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.report.study_table import summarise, table


class StudyResults:
    """``TO/NAME.json``, and the same as tables in ``TO/NAME.md``. Several commands may write to it, each seed or task in its turn."""

    def __init__(self, study: Study, to: Path):
        self.study, self.file, self.page = study, to / f"{study.name}.json", to / f"{study.name}.md"

    def check(self) -> None:
        """ConfigError when the file holds results of other settings: they would be lost, or pass for results of these."""
        held = read_results(self.file)
        for task in self.study.tasks:
            _check_settings(held, task, task_settings(self.study, task), self.file)
            made_by = held.get(task, {}).get("made_by", {})
            for cell in self.study.cells():
                for arm in cell.arms if cell.task == task else ():
                    if arm.name in made_by and made_by[arm.name] != cell.made_by(arm):
                        raise ConfigError(f"arm {arm.name!r} of {task} in {self.file} was made by {made_by[arm.name]}, not by "
                                          f"{cell.made_by(arm)}: give another --to, or give the arm another name")

    def missing(self, cell: Cell) -> bool:
        """Whether the file lacks an arm of ``cell``. A cell without arms is there for other cells."""
        found = read_results(self.file).get(cell.task, {}).get("outcomes", {}).get(str(cell.seed), {})
        return any(len(found.get(arm.name, "")) != cell.config.eval_episodes for arm in cell.arms)

    def add(self, cell: Cell, found: dict[str, str]) -> None:
        """Keep the outcomes of some arms of ``cell``, a text of 0, 1 and "-" each."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with changing(self.file) as held:
            entry = held.get(cell.task, {})
            outcomes = {int(seed): arms for seed, arms in entry.get("outcomes", {}).items()}
            outcomes.setdefault(cell.seed, {}).update(found)
            made_by = entry.get("made_by", {}) | {arm.name: cell.made_by(arm) for arm in cell.arms if arm.name in found}
            held[cell.task] = self._entry(outcomes, task_settings(self.study, cell.task), made_by)
            replace((self.text(held) + "\n").encode(), self.page)

    def text(self, held: dict[str, dict] | None = None) -> str:
        """The tables, as Markdown."""
        held = read_results(self.file) if held is None else held
        return "\n".join(table(task, entry, self.study.base) for task, entry in held.items())

    def _entry(self, outcomes: dict[int, dict[str, str]], settings: dict[str, str], made_by: dict[str, dict]) -> dict:
        names = [*self.study.arms, *{arm: 0 for arms in outcomes.values() for arm in arms if arm not in self.study.arms}]
        ordered = {seed: {arm: outcomes[seed][arm] for arm in names if arm in outcomes[seed]} for seed in sorted(outcomes)}
        return {**summarise(list(ordered.values()), names, self.study.base, self.study.pairs), "seeds": list(ordered), "settings": settings,
                "made_by": {arm: made_by[arm] for arm in names if arm in made_by},
                "outcomes": {str(seed): arms for seed, arms in ordered.items()}}


def read_results(file: Path) -> dict[str, dict]:
    """The entries of a file of results; none while there is no file. ConfigError when the file holds something else."""
    try:
        results = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the results in {file}: {error}; mend it, or give another --to") from error
    if not isinstance(results, dict):
        raise ConfigError(f"{file} is not a file of results: give another --to")
    return results


@contextlib.contextmanager
def changing(file: Path) -> Iterator[dict[str, dict]]:
    """The entries of a file of results, to change. They are written at the end, and no other study writes meanwhile."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(file)
        yield results
        replace((json.dumps(results, indent=1) + "\n").encode(), file)
    finally:
        os.close(folder)


def _check_settings(held: dict[str, dict], task: str, settings: dict[str, str], file: Path) -> None:
    """ConfigError when the entry of ``task`` has other settings. Names that settings had before are read."""
    if task not in held:
        return
    entry = held[task]
    if "outcomes" not in entry:
        raise ConfigError(f"{task} in {file} is of an older version, which did not keep its outcomes: give another --to, or move the file "
                          "aside")
    studied = {OLD_NAMES.get(key, key): value for key, value in entry["settings"].items()}
    for key in sorted(studied.keys() | settings.keys()):
        theirs, ours = (values.get(key, "its default") for values in (studied, settings))
        if theirs != ours:
            raise ConfigError(f"{task} in {file} was studied with {key} = {theirs}, not {ours}: give another --to")
