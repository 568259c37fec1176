"""LIBERO's five suites, as far as a machine without LIBERO's packages knows them, and where those packages are."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class LiberoSuite:
    """One suite of LIBERO (arXiv 2306.03310)."""

    tasks: int  #: their numbers are 0 to tasks - 1, in the official order
    horizon: int  #: control steps before an episode times out, as the public evaluations set it


LIBERO_SUITES = {
    "libero_spatial": LiberoSuite(10, 220), "libero_object": LiberoSuite(10, 280), "libero_goal": LiberoSuite(10, 300),
    "libero_10": LiberoSuite(10, 520), "libero_90": LiberoSuite(90, 400),
}
PUBLISHED_STATES = 50  #: initial states that LIBERO publishes of each task, for evaluation
LIBERO_IMAGE_SIZE = 256  #: pixels a side of the pictures that released policies were trained with


def libero_task(task: str) -> tuple[str, int] | None:
    """Suite and number of a task named like ``libero_spatial/3``; None for the name of a task that is not LIBERO's.

    Raises:
        ConfigError: LIBERO has no such suite, or the suite has no task of that number.
    """
    if not task.startswith("libero_"):
        return None
    suite, _, number = task.partition("/")
    if suite not in LIBERO_SUITES or not re.fullmatch(r"0|[1-9]\d{0,2}", number):
        raise ConfigError(f"sim.task = {task!r} names no task of LIBERO: write suite/number, such as libero_spatial/0; the suites are "
                          f"{', '.join(LIBERO_SUITES)}")
    if int(number) >= (tasks := LIBERO_SUITES[suite].tasks):
        raise ConfigError(f"sim.task = {task!r}: the tasks of {suite} are numbered 0 to {tasks - 1}")
    return suite, int(number)


def check_published(task: str, state: int) -> None:
    """Raise :class:`ConfigError` if evaluation ``state`` (from 0) is of a task of LIBERO that publishes fewer."""
    if libero_task(task) and state >= PUBLISHED_STATES:
        raise ConfigError(f"{task} has {PUBLISHED_STATES} published initial states, and evaluation state {state} was asked for: evaluate "
                          f"at most {PUBLISHED_STATES} episodes per task (eval_episodes)")


def libero_folder() -> Path:
    """The folder of LIBERO's task files, without importing LIBERO.

    Raises:
        ConfigError: the extra ``libero`` is not installed.
    """
    found = importlib.util.find_spec("libero")
    folder = Path(found.origin).parent / "libero" if found is not None and found.origin else None
    if folder is None or not (folder / "bddl_files").is_dir():
        raise ConfigError("LIBERO is not installed, and its tasks need it: pip install 'cosmos-ray[libero]'")
    return folder


@functools.cache
def libero_names(suite: str) -> tuple[str, ...]:
    """The names of a suite's tasks in the official order; their files are named after them. ConfigError as :func:`libero_folder`."""
    text = (libero_folder() / "benchmark" / "libero_suite_task_map.py").read_text(encoding="utf-8")
    return tuple(ast.literal_eval(text.partition("=")[2].strip())[suite])


def libero_instruction(suite: str, number: int) -> str:
    """What LIBERO's benchmark, and so every released policy, calls the task: the words of its name, which for some tasks differ from its
    description file's. ConfigError as :func:`libero_folder`."""
    return words_of_name(libero_names(suite)[number])


def words_of_name(name: str) -> str:
    """The instruction in the name of a LIBERO file; a word with SCENE in it ends the place's name, and the instruction follows."""
    words: list[str] = []
    for word in name.split("_"):
        words = [] if "SCENE" in word else [*words, word]
    return " ".join(words)
