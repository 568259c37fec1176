"""Kills at every step of a round's end and of going back. As in tests/test_rounds.py, a round writes its checkpoints at once."""

import os
import shutil
import signal

import pytest

from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.model.exchange.files import recover
from cosmos_ray.rounds import Rounds
from cosmos_ray.stages import refine as stage
from tests.test_replay_storage import die, in_child
from tests.test_rounds import make_run, opened, refined, train_at_once, version, versions

run = pytest.fixture(make_run, name="run")
trained = pytest.fixture(train_at_once, name="trained", autouse=True)


def die_at_rename(number: int) -> None:
    """Have this process killed before its rename ``number`` (from 0): only renames make or take away a name here."""
    left = [number]

    def counted(original):
        def rename(*arguments, **options):
            if left[0] == 0:
                die()
            left[0] -= 1
            return original(*arguments, **options)

        return rename

    for name in ("rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("back", [None, 1])
def test_a_kill_at_any_step_leaves_a_round_or_none_and_the_same_command_goes_on(run, tmp_path, back):
    """Rounds 2 and 3 on top of round 1, or a line of their own after going back; killed before every rename in turn."""
    run = refined(run, 1 if back is None else 3)
    was = versions(run)
    run.folder.close()
    for number in range(100):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "demo", root / "demo")
        for name in ("refined", "planning"):  # links, as they were
            shutil.rmtree(root / "demo" / "checkpoints" / name)
            last = 1 if back is None else 3
            shutil.copytree(root / "demo" / "checkpoints" / "rounds" / str(last) / name, root / "demo" / "checkpoints" / name)

        def act(root=root, number=number):
            mine = opened(root, rounds=3)
            die_at_rename(number)
            stage.refine(mine, from_round=back)

        status = in_child(act)
        again = opened(root, rounds=3)
        for networks in Rounds(again.folder).kept().values():
            for path in networks.values():
                assert (path / "model.safetensors").exists() and read_description(path)[2]["round"] >= 1
        assert all(set(Rounds(again.folder).networks(n)) == {"refined", "planning"} for n in Rounds(again.folder).numbers())  # whole
        assert versions(again)[1] == was[1]  # no round of before is lost
        stage.refine(again, from_round=back if status else None)
        after = versions(again)
        assert list(after) == [1, 2, 3] and after[1] == was[1]
        assert {name: version(again, name) for name in ("refined", "planning")} == after[3]
        present = Rounds(again.folder).present(1)
        assert present.round == 3 and (present.line > 0) == (back is not None)
        infos = [read_description(path)[2] for n in (2, 3) for path in Rounds(again.folder).networks(n).values()]
        assert {info.get("line", 0) for info in infos} == {present.line}
        if back is not None:
            left = {int(p.parent.name): read_description(p)[1] for p in again.folder.path.glob("checkpoints/rounds.*/*/refined")}
            assert left.items() >= {2: was[2]["refined"], 3: was[3]["refined"]}.items() or status == -signal.SIGKILL
            held = {read_description(p)[1] for p in again.folder.path.glob("checkpoints/rounds.*/*/refined")}
            assert held >= {was[2]["refined"], was[3]["refined"]}
        assert not [p.name for p in again.folder.path.glob("checkpoints/**/.*")]
        again.folder.close()
        shutil.rmtree(root)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 10


def test_a_checkpoint_whose_replacement_was_killed_between_two_renames_comes_back(run):
    folder = run.folder.checkpoint("base").parent
    shutil.copytree(folder / "base", folder / ".base.77.tmp")
    (folder / "base").rename(folder / ".base.77.old")
    shutil.copytree(folder / ".base.77.tmp", folder / "other")
    shutil.copytree(folder / ".base.77.tmp", folder / ".other.77.old")
    recover(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "other"] and run.folder.has_policy("base")
