"""What every import shares, driven by readers that yield episodes: the checks against the store, the cameras, the summary."""

import dataclasses

import numpy as np
import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.exchange.importing import ImportOptions, Skip, import_episodes
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from tests.test_replay_episode import CAMERAS, make_episode


@pytest.fixture
def store(tmp_path):
    return ReplayStore(tmp_path / "store")


def taken(tmp_path, store, *found, paths=1, **options):
    """Import what a reader finds in each of some files."""
    files = [tmp_path / f"file{number}" for number in range(paths)]
    for file in files:
        file.touch()

    def read(path, options, notes):
        notes.say("a note")
        for item in found:
            if isinstance(item, StoreError):
                raise item
            yield item

    return import_episodes(read, files, store, ImportOptions(**options))


def changed(episode, **fields):
    return dataclasses.replace(episode, **fields)


def sized(seed, height, width):
    episode = make_episode(seed)
    picture = encode_jpeg(np.full((height, width, 3), seed, np.uint8))
    return changed(episode, frames={t: [picture, picture] for t in episode.frames})


def without_rate(episode):
    return changed(episode, info={})


def test_the_summary_says_what_came_in(tmp_path, store):
    two = changed(make_episode(1), info={"control_freq": 25, "instructions": [[0, "lift"], [3, "hold"]]}, instruction="lift")
    done = taken(tmp_path, store, changed(make_episode(0), info={"control_freq": 25}), two, Skip("demo_7", "it is torn"))
    text = done.text("STORE")
    assert (done.episodes, done.known, done.instructions) == (2, 0, {"lift the cube 0": 1, "lift": 1, "hold": 1})
    assert text.splitlines() == [
        "2 episodes imported into STORE, 0 of them were there before", "  tasks: Lift (2)", "  instruction of 1: 'hold'",
        "  instruction of 1: 'lift'", "  instruction of 1: 'lift the cube 0'",
        f"  cameras, height x width: {CAMERAS[0]} 16x16, {CAMERAS[1]} 16x16",
        f"  {two.actions.shape[1]} numbers per action, {two.proprio.shape[1]} of proprioception, 25 control steps per second",
        "  note: a note", "  left out demo_7: it is torn",
    ]  # fmt: skip


def test_many_left_out_for_one_reason_are_one_line(tmp_path, store):
    done = taken(tmp_path, store, make_episode(0), *(Skip(f"demo_{n}", "it is torn") for n in range(9)))
    assert "left out demo_0, demo_1, demo_2, demo_3, demo_4 and 4 more: it is torn" in done.text("STORE")


@pytest.mark.parametrize("change, message", [
    (lambda e: changed(e, actions=e.actions[:, :3], labels=e.labels[:, :3]), "it has 3 numbers per action, and the store's 4"),
    (lambda e: changed(e, proprio=e.proprio[:, :8]), "it has 8 numbers of proprioception, and the store's 9"),
    (lambda e: changed(e, info={"control_freq": 10}), "it has 10 control steps per second, and the store's 20"),
    (lambda e: changed(e, cameras=("front", "wrist")), f"its cameras are wrist, front, and the store's {', '.join(CAMERAS)}: give --re"),
    (lambda e: sized(e.key.seed, 32, 32), "its frames are 32x32, and the store's 16x16: give --resize 16"),
    (lambda e: changed(e, frames={}), "it has no pictures"),
], ids=["actions", "proprio", "rate", "cameras", "size", "no pictures"])  # fmt: skip
def test_what_does_not_fit_the_store_is_refused_and_nothing_is_stored(tmp_path, store, change, message):
    store.commit(changed(make_episode(0), info={"control_freq": 20}))
    odd, good = (changed(make_episode(seed), info={"control_freq": 20}) for seed in (1, 2))
    with pytest.raises(StoreError, match="nothing was imported") as error:
        taken(tmp_path, store, change(odd), good)
    assert message in str(error.value) and "\n" not in str(error.value) and len(store) == 1
    # Behind one that fits it is left out, and the others come in.
    done = taken(tmp_path, store, good, change(odd))
    assert done.episodes == 1 and message.partition(", and")[0] in done.skipped[0][1] and len(store) == 2
    assert len(WindowSampler(store, chunk=3, gamma=0.9, seed=0).draw(16)) == 16


@pytest.mark.parametrize("name", ["actions", "labels", "proprio", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_left_out(tmp_path, store, name, value):
    odd = make_episode(0)
    getattr(odd, name)[2] = value
    done = taken(tmp_path, store, odd, make_episode(1))
    assert done.episodes == 1 and done.skipped == (("episode 0 of file0", f"{name} has a number that is not finite at step 2"),)


def test_frames_that_are_no_pictures_are_left_out(tmp_path, store):
    odd = make_episode(0)
    odd.frames[1] = [b"no JPEG", odd.frames[1][1]]
    assert f"the frame of {CAMERAS[0]} at step 1 is no JPEG image" in taken(tmp_path, store, odd).skipped[0][1]


def test_unequal_frames_are_resized_by_area(tmp_path, store):
    done = taken(tmp_path, store, sized(200, 48, 64), resize=24)
    assert set(done.sizes.values()) == {(24, 24)}
    shown = decode_jpeg(store.view(store.keys()[0]).stored_frame(CAMERAS[0], 0))
    assert shown.shape == (24, 24, 3) and np.abs(shown.astype(int) - 200).max() < 3


def test_cameras_are_chosen_renamed_and_ordered(tmp_path, store):
    episode = changed(make_episode(0), cameras=("front", "cam1"))
    done = taken(tmp_path, store, episode, rename_camera={"cam1": "wrist"})
    assert list(done.sizes) == ["wrist", "front"]
    assert store.read(store.keys()[0]).frames[0] == episode.frames[0][::-1]
    alone = ReplayStore(tmp_path / "alone")
    assert list(taken(tmp_path, alone, episode, cameras=("front",)).sizes) == ["front"]
    assert alone.read(alone.keys()[0]).frames[0] == episode.frames[0][:1]


def test_the_stores_order_of_cameras_holds(tmp_path, store):
    store.commit(changed(make_episode(0), cameras=("a", "b")))
    taken(tmp_path, store, changed(make_episode(1), cameras=("b", "a")))
    (name,) = [name for name in store.keys() if store.view(name).summary.key.seed == 1]
    assert store.view(name).cameras == ("a", "b") and store.read(name).frames[0] == make_episode(1).frames[0][::-1]


@pytest.mark.parametrize("options, message", [
    ({"cameras": ("top",)}, "--cameras names top, and the cameras of the file are"),
    ({"rename_camera": {"top": "a"}}, "--rename-camera names top, and the cameras of the file are"),
    ({"rename_camera": {CAMERAS[0]: CAMERAS[1]}}, "one name"),
])  # fmt: skip
def test_camera_options_that_cannot_be_met_are_one_line(tmp_path, store, options, message):
    with pytest.raises(StoreError, match=message):
        taken(tmp_path, store, make_episode(0), **options)
    assert len(store) == 0


def test_a_later_episode_without_a_camera_that_was_asked_for_is_left_out(tmp_path, store):
    episodes = [changed(make_episode(0), cameras=("front", "cam1")), changed(make_episode(1), cameras=("side", "cam1")),
                changed(make_episode(2), cameras=("front", "cam2"))]
    done = taken(tmp_path, store, *episodes, cameras=("front",))
    assert done.episodes == len(store) == 2
    assert done.skipped == (("episode 1 of file0", "--cameras names front, and the cameras of the file are side, cam1"),)


@pytest.mark.parametrize("options", [{"resize": -1}, {"resize": 10**6}, {"control_freq": -1.0}, {"control_freq": float("nan")}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        ImportOptions(**options)


def test_a_rate_that_the_file_does_not_say_can_be_given(tmp_path, store):
    assert taken(tmp_path, store, without_rate(make_episode(0)), control_freq=15).embodiment.control_freq == 15
    assert store.read(store.keys()[0]).info["control_freq"] == 15
    other = ReplayStore(tmp_path / "other")
    assert "control steps per second not known" in taken(tmp_path, other, without_rate(make_episode(0))).text("STORE")


def test_one_of_several_files_may_be_of_another_kind(tmp_path, store):
    with pytest.raises(StoreError, match="no such format"):
        taken(tmp_path, store, StoreError("no such format"))
    done = taken(tmp_path, store, make_episode(0), StoreError("no such format"), paths=2)
    assert done.episodes == 2 and done.known == 1 and [why for _, why in done.skipped] == ["no such format"] * 2


def test_a_path_that_is_not_there_is_named_before_anything_is_read(tmp_path, store):
    with pytest.raises(StoreError, match="nowhere does not exist"):
        import_episodes(lambda *_: iter([make_episode(0)]), [tmp_path, tmp_path / "nowhere"], store)
    assert len(store) == 0


def test_known_episodes_of_another_content_are_said(tmp_path, store):
    taken(tmp_path, store, make_episode(0), make_episode(1))
    done = taken(tmp_path, store, make_episode(0), changed(make_episode(1), instruction="push"))
    assert done.known == 2 and "episodes that were there before with other texts or frames, and stay as they were: 1" in done.text("STORE")


def test_evicted_episodes_come_in_again_when_they_are_imported_again(tmp_path, store):
    taken(tmp_path, store, make_episode(0), make_episode(1))
    store.evict([make_episode(1).key.name], "upside down")
    mended = changed(make_episode(1), instruction="push")
    done = taken(tmp_path, store, make_episode(0), mended)
    assert (done.episodes, done.known, len(store)) == (2, 1, 2)
    assert any("had been evicted, and came in anew under another name: 1" in note for note in done.notes)
    again = taken(tmp_path, store, make_episode(0), mended)
    assert (again.known, len(store)) == (2, 2) and not any("evicted" in note for note in again.notes)


def test_an_episode_without_text_is_said(tmp_path, store):
    done = taken(tmp_path, store, changed(make_episode(0), instruction=""))
    assert "episodes without text: 1; --instruction gives them one" in done.notes


def test_flags_that_are_no_pairs_are_one_line(tmp_path, capsys):
    for flag in ("--key", "--rename-camera"):
        code = main(["replay", "import", str(tmp_path), "--format", "lerobot", "--store", str(tmp_path / "s"), flag, "observation.state"])
        assert code == 2 and f"{flag} 'observation.state' is not of the form" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_instructions_that_are_no_ranges_are_refused_at_the_commit():
    for odd in ([[1, "late"]], [[0, "a"], [0, "b"]], [["0", "a"]], "text", [[0, 7]]):
        with pytest.raises(StoreError, match="are not .first step, text."):
            changed(make_episode(0), info={"instructions": odd})
