"""``python -m cosmos_ray replay``: every verb on a real store, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.replay import ReplayStore
from tests.test_replay_episode import make_episode


@pytest.fixture
def root(tmp_path):
    store = ReplayStore(tmp_path / "store")
    for seed in range(3):
        store.commit(make_episode(seed, size=32))
    for seed in range(10, 16):
        store.commit(make_episode(seed, source="rollout", chunk=5, success=seed % 2 == 0, size=32))
    return tmp_path / "store"


@pytest.fixture
def replay(root, capsys):
    """Runs a verb on the store: (exit code, lines of standard output, lines of standard error)."""

    def run(*words, store=root):
        code = main(["replay", *words, *([] if store is None else ["--store", str(store)]), "--quiet"])
        out = capsys.readouterr()
        return code, out.out.splitlines(), out.err.splitlines()

    return run


def name_of(seed, **options):
    return make_episode(seed, **options).key.name


def test_ls_lists_oldest_first_and_selects(replay):
    code, lines, _ = replay("ls")
    assert code == 0 and len(lines) == 1 + 9 and lines[1].startswith(name_of(0))
    _, lines, _ = replay("ls", "--class", "failure", "--last", "1")
    assert len(lines) == 2 and lines[1].split()[:2] == [name_of(15, source="rollout"), "failure"]
    _, lines, _ = replay("ls", "--class", "demo", "success", "--json")
    rows = [json.loads(line) for line in lines]
    assert [row["seed"] for row in rows] == [0, 1, 2, 10, 12, 14]
    assert rows[3]["class"] == "success" and rows[3]["frames"] == 4 and Path(rows[3]["path"]).exists()


def test_ls_of_what_is_not_there_names_what_is(replay):
    code, _, errors = replay("ls", "--class", "evaluation")
    assert code == 1 and len(errors) == 1 and "there are classes demo, failure, success and tasks Lift" in errors[0]


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_show_writes_a_picture_or_a_video(replay, tmp_path, suffix):
    target = tmp_path / f"episode{suffix}"
    code, lines, _ = replay("show", "rollout-Lift-00000010", "--to", str(target))
    assert code == 0 and target.stat().st_size > 1000
    assert lines[0].startswith(name_of(10, source="rollout")) and "4 of 13 with frames" in lines[0] and lines[-1] == f"wrote {target}"


def test_show_wants_one_episode_that_is_there(replay):
    code, _, errors = replay("show", "Lift")
    assert code == 1 and "9 episodes" in errors[0] and "give more of the name" in errors[0]
    code, _, errors = replay("show", "nope")
    assert code == 1 and len(errors) == 1 and "`replay ls` lists them" in errors[0]


def test_stats_counts_by_task_and_class(replay):
    _, lines, _ = replay("stats", "--json")
    stats = json.loads(lines[0])
    assert stats["episodes"] == 9 and stats["versions"] == list(range(10, 16))
    counts = {row["class"]: (row["episodes"], row["steps"], row["frames"]) for row in stats["by_task_and_class"]}
    assert counts == {"demo": (3, 36, 39), "success": (3, 36, 12), "failure": (3, 36, 12)}
    assert replay("stats")[1][-1].startswith("9 episodes, ")


def test_verify_names_damage_and_repair_mends_it(replay, root):
    assert replay("verify", "--decode")[0] == 0
    store = ReplayStore(root)
    store.refresh()
    torn, flipped = (Path(next(s.path for s in store.summaries() if s.key.seed == seed)) for seed in (0, 11))
    os.truncate(torn, torn.stat().st_size // 2)
    data = bytearray(flipped.read_bytes())
    frame = make_episode(11, source="rollout", chunk=5, success=False, size=32).frames[5][0]
    data[data.index(frame) + 40] ^= 1
    flipped.write_bytes(data)
    code, lines, _ = replay("verify")
    assert code == 1 and len(lines) == 3
    assert all(any(line.startswith("damaged") and path.name in line for line in lines) for path in (torn, flipped))
    assert torn.exists() and flipped.exists()  # verify changes nothing
    code, lines, _ = replay("repair")
    assert code == 0 and f"salvaged {name_of(11, source='rollout')} without the frames of 1 steps" in lines
    assert replay("verify", "--decode")[0] == 0
    assert json.loads(replay("stats", "--json")[1][0])["episodes"] == 8


def test_evict_shrinks_the_store(replay, root):
    code, lines, _ = replay("evict", "--newest", "2", "--dry-run")
    assert code == 0 and lines[:-1] == [name_of(seed, source="rollout") for seed in (10, 11, 12, 13)]
    assert json.loads(replay("stats", "--json")[1][0])["episodes"] == 9
    assert replay("evict", "--newest", "2")[1][0].startswith("4 of 9 episodes")
    assert json.loads(replay("stats", "--json")[1][0])["episodes"] == 5 and len(list(root.rglob("*.arrow"))) == 5
    assert replay("verify", "--decode")[0] == 0
    assert ReplayStore(root).commit(make_episode(10, source="rollout", chunk=5)) is False  # an evicted key stays taken
    code, _, errors = replay("show", name_of(10, source="rollout"))
    assert code == 1 and "was evicted (retention:" in errors[0]


@pytest.mark.parametrize("format, back", [("lerobot", "lerobot"), ("cosmos", "cosmos"), ("cosmos-demos", "robomimic"), ("parquet", None)])
def test_export_and_import_again(replay, tmp_path, format, back):
    out, other = tmp_path / "out", tmp_path / "other"
    code, lines, _ = replay("export", "--format", format, "--class", "demo", "--frames", "image", "--to", str(out))
    assert code == 0 and lines == [f"3 of 3 episodes written to {out}"]
    code, _, errors = replay("export", "--format", format, "--to", str(out))
    assert code == 1 and "exists: give another path" in errors[0]
    if back:
        paths = [str(out)] if back != "robomimic" else sorted(map(str, out.rglob("*.hdf5")))
        code, lines, _ = replay("import", *paths, "--format", back, store=other)
        assert code == 0 and lines[0] == f"3 episodes imported into {other}, 0 of them were there before"
        assert replay("import", *paths, "--format", back, store=other)[1][0].endswith("3 of them were there before")
        assert json.loads(replay("stats", "--json", store=other)[1][0])["steps"] == 3 * 12


def test_what_an_export_leaves_out_is_named_and_the_exit_code_says_so(replay, tmp_path):
    code, lines, _ = replay("export", "--format", "cosmos", "--to", str(tmp_path / "out"))
    assert code == 1 and len(lines) == 7 and all(line.startswith("skipped rollout-Lift") for line in lines[:6])
    assert lines[-1] == f"3 of 9 episodes written to {tmp_path / 'out'}"


@pytest.mark.parametrize("words, code, message", [
    (["evict"], 1, "needs a bound"),
    (["verify", "--thread", "2"], 2, "unknown flag --thread; did you mean --threads?"),
    (["show"], 2, "the following arguments are required: EPISODE"),
    (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
])  # fmt: skip
def test_wrong_use_is_one_line(replay, words, code, message):
    got, out, errors = replay(*words)
    assert got == code and not out and len(errors) == 1 and message in errors[0]


def test_a_run_or_a_store_that_is_not_there_is_one_line(replay, tmp_path):
    code, _, errors = replay("ls", "--root", str(tmp_path), "--name", "nothing", store=None)
    assert code == 2 and len(errors) == 1 and "there is no run 'nothing'" in errors[0]
    code, _, errors = replay("ls", store=tmp_path)
    assert code == 1 and "is not a replay store" in errors[0]


def test_an_episode_without_a_simulator_cannot_be_simulated_again(replay):
    code, _, errors = replay("replay-episode", name_of(0))
    assert code == 2 and len(errors) == 1


def test_replay_needs_neither_ray_nor_torch():
    code = "import sys, cosmos_ray.replay; sys.exit(any(name in sys.modules for name in ('ray', 'torch', 'robosuite', 'mujoco')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_run_finds_its_store(finished_run, capsys):
    where = ["--root", str(finished_run.parent), "--name", finished_run.name, "--quiet"]
    assert main(["replay", "verify", *where]) == 0
    capsys.readouterr()
    assert main(["replay", "ls", "--class", "evaluation", "--last", "1", "--json", *where]) == 0
    episode = json.loads(capsys.readouterr().out)
    assert main(["replay", "replay-episode", episode["name"], *where]) == 0
    assert "identical" in capsys.readouterr().out


def test_a_recording_without_pictures_says_how_and_is_rendered(replay, tmp_path):
    file = str(Path(__file__).parent / "data/cases/robosuite_raw/demo.hdf5")
    code, lines, _ = replay("import", "--format", "robomimic", file, store=tmp_path / "new")
    assert code == 1 and lines[0].startswith("0 episodes") and any("--render makes them" in line for line in lines)
    code, lines, _ = replay("import", "--format", "robomimic", "--render", "--resize", "32", file, store=tmp_path / "new")
    assert code == 0 and lines[0].startswith("3 episodes")
    assert any("robot0_eye_in_hand 32x32, agentview 32x32" in line for line in lines) and any("rendered from" in line for line in lines)
