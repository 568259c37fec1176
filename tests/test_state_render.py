"""Frames rendered again from stored simulator states: the very bytes that a live episode would have stored."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.errors import SimulationError, StoreError
from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.simulation import start
from cosmos_ray.sim.state_render import StateRenderer

CONFIGS = {
    "Lift": (SimConfig(placement=0.1, fast_step=False), 7),  # stock stepping, wider placement, cube size of another make seed
    "Door": (SimConfig(task="Door", third_cameras=("frontview", "agentview"), image_size=48), 0),  # the door is placed by editing the model
}


@pytest.fixture(scope="module")
def episodes() -> dict[str, Episode]:
    return {task: record(config, make_seed, seed=21) for task, (config, make_seed) in CONFIGS.items()}


@pytest.fixture(scope="module")
def renderer():
    made = StateRenderer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def lenient():
    made = StateRenderer(strict=False)
    yield made
    made.close()


def record(config: SimConfig, make_seed: int, seed: int, steps: int = 10) -> Episode:
    """A live episode with a frame at every step."""
    env = Environment(config, make_seed)
    trajectory = start(env, seed)
    chunk = np.random.default_rng(seed).uniform(-1, 1, (steps, env.action_dim)).astype(np.float32)
    env.execute(chunk, trajectory, render_at=tuple(range(1, steps + 1)))
    info = {"horizon": env.horizon, "fingerprint": env.fingerprint}
    env.close()
    return Episode.from_trajectory(trajectory, EpisodeKey("run", env.task, "rollout", seed), policy_version=0, info=info)


def stripped(episode: Episode, keep: tuple[int, ...] = (0,)) -> Episode:
    bare = copy.deepcopy(episode)
    bare.frames = {step: bare.frames[step] for step in keep}
    return bare


@pytest.mark.parametrize("task", CONFIGS)
def test_stripped_frames_come_back_byte_for_byte(episodes, renderer, task, tmp_path):
    episode = episodes[task]
    store = ReplayStore(tmp_path / "store")
    store.commit(stripped(episode))
    view = store.view(episode.key.name)
    steps = [10, 3, 0, 7]
    made = renderer(view, steps)
    assert list(made) == steps
    assert made == {step: episode.frames[step] for step in steps}
    assert len({images[-1] for images in made.values()}) == len(steps)  # the pictures differ, so equality says something


def test_an_episode_in_memory_and_one_without_any_frame_render_too(episodes, renderer):
    bare = stripped(episodes["Door"], keep=())
    assert renderer.render(bare, range(11)) == episodes["Door"].frames


def test_environments_are_shared_between_episodes_and_bounded(episodes):
    renderer = StateRenderer(environments=1)
    renderer(episodes["Lift"], [1])
    (first,) = renderer._environments.values()
    other = copy.deepcopy(episodes["Lift"])
    other.info["fingerprint"] = {**other.info["fingerprint"], "cpu": "another", "numpy": "1.0"}
    assert renderer(other, [2])[2] == episodes["Lift"].frames[2]
    assert list(renderer._environments.values()) == [first]
    assert renderer(episodes["Door"], [4])[4] == episodes["Door"].frames[4]
    assert len(renderer._environments) == 1 and first not in renderer._environments.values()
    renderer.close()
    assert not renderer._environments


@pytest.mark.parametrize("entry, value", [("mujoco", "3.0.0"), ("robosuite", "1.4.0"), ("model", "0123456789abcdef"), ("gl", "glx")])
def test_another_simulator_is_refused_unless_told_otherwise(episodes, renderer, lenient, entry, value):
    other = stripped(episodes["Lift"])
    other.info = {"fingerprint": {**other.info["fingerprint"], entry: value}}
    with pytest.raises(StoreError, match=f"{entry} was {value}, here "):
        renderer(other, [1])
    assert lenient(other, [1])[1] == episodes["Lift"].frames[1]


def test_fingerprints_of_before_the_backend_was_recorded_are_accepted(episodes, renderer):
    old = stripped(episodes["Lift"])
    old.info = {"fingerprint": {k: v for k, v in old.info["fingerprint"].items() if k not in ("gl", "robots", "cpu", "simd", "platform")}}
    assert renderer(old, [6])[6] == episodes["Lift"].frames[6]


def test_a_driver_that_draws_other_pixels_is_noticed_by_a_stored_frame(episodes, renderer, lenient):
    """One pixel of the stored frame is changed, as another driver might have drawn it: the fingerprint cannot know."""
    other = stripped(episodes["Lift"])
    del other.info["fingerprint"]["robots"]  # another fingerprint, of which nothing is proven yet
    picture = decode_jpeg(other.frames[0][1])
    picture[20, 20] = 255 - picture[20, 20]
    other.frames[0][1] = encode_jpeg(picture)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"at step 0, .* % of the pixels differ"):
            renderer(other, [1])
    assert lenient(other, [1])[1] == episodes["Lift"].frames[1]


def test_what_cannot_be_rendered_is_refused_in_one_line(episodes, renderer):
    episode = episodes["Door"]
    imported = stripped(episode)
    imported.info = {}
    narrow = stripped(episode)
    narrow.states = narrow.states[:, :-1].copy()
    renamed = stripped(episode)
    renamed.cameras = ("left", "right")
    cases = ((imported, 0, "no simulator fingerprint"), (narrow, 0, "numbers per state"), (renamed, 0, "stores cameras left, right"),
             (episode, 11, "no step 11"), (episode, -1, "no step -1"))
    for wrong, step, message in cases:
        with pytest.raises(StoreError, match=message) as caught:
            renderer(wrong, [step])
        assert "\n" not in str(caught.value)


def test_a_call_from_another_thread_is_refused_not_wrong(episodes, renderer):
    renderer(episodes["Lift"], [0])
    errors = []

    def call() -> None:
        try:
            renderer(episodes["Lift"], [1])
        except SimulationError as error:
            errors.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]
    assert renderer(episodes["Lift"], [1])[1] == episodes["Lift"].frames[1]
