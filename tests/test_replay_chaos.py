"""The replay store under fire, briefly: the same code as `make chaos-replay`, and that it notices what it is there to notice."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cosmos_ray.replay import ReplayStore
from jobs.chaos.case import FAULTS, Case
from jobs.chaos.corruptions import build_stores, damage, examine, judge, scratch_directory
from jobs.chaos.episodes import difference, key_of, make_episode
from jobs.chaos.kills import KillRun

ROOT = Path(__file__).resolve().parent.parent


def test_kills_and_corruptions_lose_double_and_crash_nothing(tmp_path):
    """In a process of its own, because it forks: that wants no threads."""
    size = ["--kills", "20", "--corruptions", "40", "--seed", "0"]
    command = [sys.executable, "jobs/chaos/replay.py", *size, "--json", tmp_path / "tally.json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tally = json.loads((tmp_path / "tally.json").read_text())
    kills, corruptions = tally["kills"], tally["corruptions"]
    assert kills["kills"]["writer"] + kills["kills"]["reader"] >= 20 and kills["acknowledged"] >= 20
    assert kills["commits"] >= 2 * kills["acknowledged"]  # every episode was offered twice
    assert corruptions["cases"] == 40 == corruptions["named"] + corruptions["harmless"] and corruptions["named"] > 20


@pytest.fixture
def run(tmp_path):
    """A run whose writers have acknowledged four episodes, not counted yet."""
    run = KillRun(tmp_path / "store", 0)
    store = ReplayStore(tmp_path / "store")
    for number in range(4):
        run.new[number] += store.commit(make_episode(number))
        run.acknowledged.add(number)
    return run


def path_of(root, number):
    return next((root / "episodes").rglob(f"{key_of(number).name}.arrow"))


def test_tally_of_a_whole_store_has_no_violation(run):
    run.count()
    assert run.tally.acknowledged == 4 and not any(run.tally.violations.values())


def test_tally_notices_a_lost_episode(run):
    path_of(run.root, 2).unlink()
    run.count()
    assert +run.tally.violations == {"acknowledged episodes lost": 1} and key_of(2).name in run.tally.details[0]


def test_tally_notices_a_torn_file_and_a_commit_that_was_new_twice(run):
    os.truncate(path_of(run.root, 1), 1000)
    run.new[3] += 1
    run.count()
    assert +run.tally.violations == {"acknowledged episodes lost": 1, "torn files visible": 1, "duplicates": 1}


def test_tally_notices_other_content_and_strays(run):
    other = make_episode(0)
    other.actions[0, 0] += 1
    path_of(run.root, 0).unlink()
    ReplayStore(run.root).commit(other)
    stray = path_of(run.root, 1).with_name(".x.arrow.1-ab.tmp")
    stray.write_bytes(b"half")
    os.utime(stray, (1_000_000, 1_000_000))
    run.count()
    assert +run.tally.violations == {"wrong content": 1} and run.tally.stray_temporaries == 1
    assert "actions" in run.tally.details[0]


@pytest.fixture(scope="module")
def stores():
    with tempfile.TemporaryDirectory(dir=scratch_directory()) as work:
        yield Path(work), build_stores(Path(work))


def check(stores, change, variant="plain"):
    """What the judge says after ``change(case)`` of the file of one episode."""
    work, paths = stores[0], stores[1][variant]
    root = work / f"copy-{len(list(work.iterdir()))}"
    shutil.copytree(work / variant, root, symlinks=True)
    victim = key_of(1).name
    case = Case(random.Random(0), root, root / paths[victim])
    change(case)
    made = {"file": paths[victim], "about": case.about, "foreign": case.foreign, "log_counts": False, "valid": ""}
    victims = [name for name, path in paths.items() if path == paths[victim]]
    return judge(made, examine(root, list(paths), victims, random.Random(0)), list(paths), victims)


@pytest.mark.parametrize("variant", ["plain", "indexed"])
def test_healthy_stores_pass(stores, variant):
    assert check(stores, lambda case: None, variant) == (False, [])


def test_torn_file_is_named(stores):
    assert check(stores, lambda case: os.truncate(case.path, 500)) == (True, [])


def test_judge_notices_an_episode_that_is_gone_without_a_word(stores):
    _, problems = check(stores, lambda case: case.path.unlink())
    assert len(problems) == 1 and "is gone and nothing names it" in problems[0]


def test_judge_notices_other_content(stores):
    def replace(case):
        other = make_episode(1)
        other.rewards[0] += 1
        case.path.unlink()
        ReplayStore(case.root).commit(other)

    _, problems = check(stores, replace)
    assert any("is read, with another rewards" in problem for problem in problems)


def test_judge_notices_damage_to_an_episode_that_was_left_alone(stores):
    _, problems = check(stores, lambda case: os.truncate(path_of(case.root, 2), 500))
    assert any(f"the healthy {key_of(2).name} reads as" in problem for problem in problems)


def test_every_fault_changes_the_store(stores):
    """A fault that does nothing would always pass."""
    work, paths = stores
    for fault in sorted(FAULTS):
        for seed in range(5):
            root = work / f"{fault}-{seed}"
            shutil.copytree(work / "indexed", root, symlinks=True)
            case = Case(random.Random(seed), root, root / paths["indexed"][key_of(1).name])
            before = snapshot(root)
            damage(fault, case)
            changed = snapshot(root) != before
            shutil.rmtree(root)
            if changed:
                break
        else:
            pytest.fail(f"{fault} changes nothing")


def snapshot(root):
    """Every path with its content, where it has some of a sensible size."""
    def content(path):
        return path.read_bytes() if path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 26 else None

    return {path: content(path) for path in root.rglob("*")}


def test_episodes_are_a_function_of_their_number():
    assert not any(difference(make_episode(number), number) for number in range(12))
    assert all(difference(make_episode(number), number + 12) for number in range(12))
