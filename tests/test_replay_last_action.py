"""Files with as many observations as actions: all of our windows are those of the public cosmos-policy loader."""

import dataclasses

import numpy as np

from cosmos_ray.replay import ReplayStore, WindowSampler
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED
from cosmos_ray.replay.sampling.returns import value_targets
from tests.test_replay_episode import make_episode

CHUNK, GAMMA = 5, 0.99


def public_windows(actions, proprio, frames, score):
    """What the public loader makes of ``T`` observations and actions at every ``t``, from its published rules: the chunk is filled up with
    the last action, the future observation is at most the last one, its return has no step to go at the last observation."""
    steps = len(actions)
    for t in range(steps):
        chunk = [actions[min(t + k, steps - 1)] for k in range(CHUNK)]
        future = min(t + CHUNK, steps - 1)
        rewards = [0.0] * (steps - 1) + [score]
        value = 2 * sum(GAMMA**i * reward for i, reward in enumerate(rewards[future:])) - 1
        yield np.array(chunk), proprio[t], proprio[future], frames[t], frames[future], value


def our_windows(store, name, steps):
    """The windows that start at every ``t`` of an episode, drawn by our sampler."""
    sampler = WindowSampler(store, chunk=CHUNK, gamma=GAMMA, seed=0)
    found = {}
    while len(found) < steps:
        batch = sampler.draw(64, "all")
        found |= {int(batch.offsets[i]): (batch, i) for i in range(64) if batch.episodes[i] == name}
    return [found[t] for t in range(steps)]


def assert_windows_are_the_public_ones(store, name, actions, proprio, frames, score=1.0):
    """``frames`` are ``[step][camera]`` pictures (H, W, 3) uint8 in the order of the episode's cameras."""
    assert store.view(name).length == len(actions)
    windows = our_windows(store, name, len(actions))
    for (batch, i), (chunk, now, future, shown, shown_later, value) in zip(
        windows, public_windows(actions, proprio, frames, score), strict=True
    ):
        assert np.array_equal(batch.actions[i], chunk) and np.array_equal(batch.labels[i], chunk)
        assert np.array_equal(batch.proprio[i], now) and np.array_equal(batch.future_proprio[i], future)
        assert np.array_equal(batch.images[i], np.stack(shown)) and np.array_equal(batch.future_images[i], np.stack(shown_later))
        assert np.isclose(batch.value[i], value, atol=1e-6)


def repeated(episode, score=None):
    """The episode as a file without the state after the last action has it."""
    last = episode.length
    episode.proprio[last], episode.states[last], episode.frames[last] = episode.proprio[-2], episode.states[-2], episode.frames[last - 1]
    return dataclasses.replace(episode, labels=episode.actions, info={LAST_STATE_REPEATED: True}, score=score)


def test_an_episode_whose_last_state_repeats_gives_the_public_windows(tmp_path):
    for seed, score in ((0, None), (1, 0.4)):
        episode = repeated(make_episode(seed, "rollout", success=score is None), score)
        store = ReplayStore(tmp_path / f"store{seed}")
        store.commit(episode)
        frames = [[decode_jpeg(jpeg) for jpeg in episode.frames[t]] for t in range(episode.length)]
        assert_windows_are_the_public_ones(store, episode.key.name, episode.actions, episode.proprio, frames, score or 1.0)


def test_an_episode_without_the_mark_keeps_its_targets(tmp_path):
    """Stores that an earlier version filled: the state after the last action is there, and the value counts to it."""
    episode = make_episode(0)
    store = ReplayStore(tmp_path / "store")
    store.commit(episode)
    wanted = value_targets(episode.length, 1.0, GAMMA)
    for t, (batch, i) in enumerate(our_windows(store, episode.key.name, episode.length)):
        assert np.isclose(batch.value[i], wanted[min(t + CHUNK, episode.length)])
    assert wanted[-1] == 1.0 and wanted[-2] < 1.0
    assert value_targets(3, 1.0, 0.5, last_seen=2).tolist() == [-0.5, 0.0, 1.0, 1.0]
