"""Resumable learner state: every ZeRO stage and precision reads what every other wrote, and what is not whole is passed over or refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.learner.slices import optimised
from cosmos_ray.weights import pack
from tests import test_learner
from tests.conftest import file_system
from tests.test_learner import core_on, losses

store = test_learner.store  # the fixture
LAYOUTS = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def core_of(root, layout: tuple[int, str], **changes) -> LearnerCore:
    stage, precision = layout
    return core_on(root, zero_stage=stage, precision=precision, **{"ema": 0.0 if stage == 3 else 0.9, **changes})


def numbers(core: LearnerCore) -> dict[str, np.ndarray | float]:
    """Weights and moments in float32 by name, AdamW's step, and the published weights."""
    pieces, step = optimised(core.engine, core.policy.net, core.config.zero_stage, 0)
    return {**{f"{piece.kind} {piece.name}": piece.numbers.clone().numpy() for piece in pieces}, "step": step}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_same_layout_resumes_bit_for_bit(alone, store, tmp_path, layout):
    def run(root, folder):
        whole = core_of(root, layout, loader_threads=1, accumulate=2)
        losses(whole, 2)
        whole.save(folder)
        resumed = core_of(root, layout, loader_threads=1, accumulate=2)
        assert resumed.load(folder) and resumed.step_count == 2
        before = same(numbers(resumed), numbers(whole))
        return before, losses(whole, 2) == losses(resumed, 2), same(numbers(resumed), numbers(whole)), [
            core.weights(1).checksum for core in (whole, resumed)]

    before, trained, after, (left, right) = alone(run, store.root, tmp_path / "state")
    assert before and trained and after and left == right


def test_every_layout_goes_on_with_the_weights_and_moments_of_every_other(alone, store, tmp_path):
    """The state goes round: each layout reads what the one before wrote, and writes it again."""

    def run(root, folder):
        first = core_of(root, (1, "fp32"), ema=0.0)
        losses(first, 2)
        first.save(folder / "0")
        wanted, wrong = numbers(first), []
        for i, layout in enumerate([*LAYOUTS, *reversed(LAYOUTS), LAYOUTS[0]]):
            core = core_of(root, layout, ema=0.0)
            assert core.load(folder / str(i)) and core.step_count == 2
            rounded = torch.bfloat16 if layout[1] == "bf16" else torch.float32
            acts = {f"weight {name}": p for name, p in core.policy.net.named_parameters()} if layout[0] < 3 else {}
            if not same(numbers(core), wanted) or any(
                    not torch.equal(p.detach().flatten(), torch.tensor(wanted[name]).to(rounded)) for name, p in acts.items()):
                wrong.append(layout)
            core.save(folder / str(i + 1))
            if not np.isfinite(losses(core, 1)).all():
                wrong.append(layout)
        return wrong, sorted(name.split()[0] for name in wanted)

    wrong, kinds = alone(run, store.root, tmp_path)
    assert not wrong and {"weight", "exp_avg", "exp_avg_sq", "step"} == set(kinds)


def test_training_goes_on_in_another_stage_as_it_would_have_in_its_own(alone, store, tmp_path):
    def run(root, folder):
        whole = core_of(root, (1, "fp32"))
        losses(whole, 3)
        whole.save(folder)
        other = core_of(root, (0, "fp32"))
        other.load(folder)
        return losses(whole, 3), losses(other, 3), *(np.concatenate(core.weights(1).data).view(np.float32) for core in (whole, other))

    ours, theirs, left, right = alone(run, store.root, tmp_path / "state")
    assert ours == pytest.approx(theirs, rel=1e-5) and np.allclose(left, right, atol=1e-5)


def test_an_average_begins_where_the_state_has_none_and_is_left_out_where_nobody_wants_it(alone, store, tmp_path):
    def run(root, folder):
        plain, kept = core_on(root, ema=0.0), core_on(root, ema=0.9)
        for core, name in ((plain, "plain"), (kept, "kept")):
            losses(core, 2)
            core.save(folder / name)
        begins, without = core_on(root, ema=0.9), core_on(root, ema=0.0)
        begins.load(folder / "plain")
        without.load(folder / "kept")
        raw = pack(kept.policy.net.named_parameters(), 1)
        return [weights.checksum for weights in (plain.weights(1), begins.weights(1), raw, without.weights(1))]

    plain, begins, raw, without = alone(run, store.root, tmp_path)
    assert plain == begins and raw == without


def test_state_of_other_adapters_is_refused_with_both_ways_out(alone, store, tmp_path):
    def run(root, folder):
        core_on(root, lora_rank=0).save(folder)
        with pytest.raises(CheckpointError) as error:
            core_on(root, lora_rank=4).load(folder)
        return str(error.value)

    message = alone(run, store.root, tmp_path / "state")
    assert "written with learner.lora_rank 0, not 4: give --learner.lora-rank 0 to continue" in message
    assert f"or delete {tmp_path / 'state'} to begin this stage anew" in message and len(message.splitlines()) == 1


def test_state_of_an_earlier_version_is_refused_with_both_ways_out(alone, store, tmp_path):
    folder = tmp_path / "state"
    (folder / "step_00000003").mkdir(parents=True)
    (folder / "step_00000003" / "mp_rank_00_model_states.pt").write_bytes(b"a pickle")
    (folder / "latest").write_text("step_00000003")

    def run(root, folder):
        with pytest.raises(CheckpointError) as error:
            core_on(root).load(folder)
        return str(error.value)

    message = alone(run, store.root, folder)
    assert "by an earlier version of cosmos_ray: finish this stage with that version, or delete" in message and "\n" not in message


# ---------------------------------------------------------------- what is not whole


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[int(at * (len(data) - 1))] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "numbers torn": (lambda tag: truncate(tag / "rank0.safetensors"), r"rank0.safetensors has \d+ of \d+ bytes"),
    "numbers empty": (lambda tag: (tag / "rank0.safetensors").write_bytes(b""), r"rank0.safetensors has 0 of \d+ bytes"),
    "numbers missing": (lambda tag: (tag / "rank0.safetensors").unlink(), "rank0.safetensors cannot be read: No such file"),
    "a bit of the numbers": (lambda tag: flip(tag / "rank0.safetensors"), "rank0.safetensors does not match its checksum"),
    "a bit of their names": (lambda tag: flip(tag / "rank0.safetensors", 0.001), "rank0.safetensors does not match its checksum"),
    "position torn": (lambda tag: truncate(tag / "rank0.json"), r"rank0.json has \d+ of \d+ bytes"),
    "a bit of the position": (lambda tag: flip(tag / "rank0.json"), "rank0.json does not match its checksum"),
    "description torn": (lambda tag: truncate(tag / "state.json"), "state.json cannot be read"),
    "a digit of the description": (lambda tag: (tag / "state.json").write_text(
        (tag / "state.json").read_text().replace('"step": 2', '"step": 3')), "state.json does not match its checksum"),
    "description missing": (lambda tag: (tag / "state.json").unlink(), "was not finished"),
    "directory empty": (lambda tag: [file.unlink() for file in tag.iterdir()], "was not finished"),
}


@pytest.fixture(scope="module")
def two_states(alone, store, tmp_path_factory):
    """A folder of the states after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("learner") / "state"

    def run(root, folder):
        core = core_on(root)
        for _ in range(2):
            core.step()
            core.save(folder)

    alone(run, store.root, folder)
    return folder


def load(root, folder):
    core = core_on(root)
    try:
        return core.load(folder), core.step_count, core.passed_over
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_state_is_resumed_from_and_a_newer_one_is_named(alone, store, two_states, tmp_path, damage):
    folder = tmp_path / "state"
    shutil.copytree(two_states, folder)
    spoil, reason = DAMAGE[damage]
    spoil(folder / "step_00000002")
    resumed, step, (note,) = alone(load, store.root, folder)
    assert resumed and step == 1 and note.startswith("step_00000002 ") and "\n" not in note
    assert re.search(reason, note), note


def test_states_all_of_which_are_damaged_are_refused_in_one_line(alone, store, two_states, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(two_states, folder)
    for state in folder.iterdir():
        truncate(state / "rank0.safetensors")
    message = alone(load, store.root, folder)
    assert "\n" not in message and "step_00000002 is damaged (rank0.safetensors has" in message and "step_00000001 is damaged" in message
    assert f"delete {folder} to begin this stage anew" in message and "--fresh" not in message


def test_a_first_save_that_was_killed_is_no_state_yet(alone, store, two_states, tmp_path):
    shutil.copytree(two_states / "step_00000001", tmp_path / "state" / "step_00000001")
    (tmp_path / "state" / "step_00000001" / "state.json").unlink()
    assert alone(load, store.root, tmp_path / "state") == (False, 0, ["step_00000001 was not finished"])


def test_a_damaged_state_is_written_anew_when_training_comes_there_again(alone, store, two_states, tmp_path):
    folder = tmp_path / "state"
    shutil.copytree(two_states, folder)
    flip(folder / "step_00000002" / "rank0.safetensors")

    def run(root, folder):
        core = core_on(root)
        core.load(folder)
        core.step()
        core.save(folder)

    alone(run, store.root, folder)
    assert alone(load, store.root, folder) == (True, 2, [])
    again, before = [(states / "step_00000002" / "rank0.safetensors").read_bytes() for states in (folder, two_states)]
    assert again == before


def test_the_last_two_whole_states_are_kept(alone, store, tmp_path):
    def run(root, folder):
        core = core_on(root)
        for _ in range(3):
            core.step()
            core.save(folder)
        (folder / "step_00000009").mkdir()  # a save of another process that was killed
        core.step()
        core.save(folder)
        return core_on(root).load(folder)

    assert alone(run, store.root, tmp_path / "state")
    assert sorted(p.name for p in (tmp_path / "state").glob("step_*")) == ["step_00000003", "step_00000004"]
    assert json.loads((tmp_path / "state" / "step_00000004" / "state.json").read_text())["state"]["step"] == 4


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    with file_system(tmp_path / "disk", "24m") as mounted:
        yield mounted


def test_a_full_disk_is_one_clear_error_and_the_state_of_before_is_resumed_from(alone, store, small_disk):
    def run(root, disk):
        core = core_on(root)
        core.step()
        core.save(disk / "state")
        room = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(room - 200_000))
        core.step()
        with pytest.raises(CheckpointError) as error:
            core.save(disk / "state")
        again = core_on(root)
        resumed = again.load(disk / "state"), again.step_count, sorted(p.name for p in (disk / "state").glob("step_*"))
        (disk / "filler").unlink()
        core.step()
        core.save(disk / "state")
        return str(error.value), resumed, core_on(root).load(disk / "state")

    message, resumed, after = alone(run, store.root, small_disk)
    assert "learner state cannot be written to" in message and "make room there and run the same command again" in message
    assert "\n" not in message and resumed == (True, 1, ["step_00000001"]) and after
