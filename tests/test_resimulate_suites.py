"""A hundred stored episodes of every LIBERO suite, simulated again bit for bit: in other environments, another order and other company."""

import dataclasses

import numpy as np
import pytest

from cosmos_ray.config import SimConfig
from cosmos_ray.inference.messages import ActReply
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.make import make
from cosmos_ray.sim.resimulate import resimulate
from cosmos_ray.sim.simulators import Simulators

EPISODES, STEPS = 100, 32


class Wandering:
    """Answers with a chunk that is drawn from the seed alone and leads the hand down among the objects."""

    def submit(self, request):
        return request

    def result(self, request):
        actions = []
        for seed in request.seeds:
            rng = np.random.default_rng(int(seed) % 2**63)
            chunk = np.clip(rng.uniform(-1, 1, (1, 7)) + rng.normal(0, 0.5, (8, 7)), -1, 1)
            chunk[:, 2] = -np.abs(chunk[:, 2])
            actions.append(chunk)
        actions, n = np.array(actions, np.float32), len(request.seeds)
        return ActReply(actions, np.zeros(n, np.float32), np.zeros((n, 1), np.float32), np.zeros(n, np.int64), 1, actions[:, None])


@pytest.mark.slow  # two minutes a suite
@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"])
def test_a_hundred_stored_episodes_of_a_suite_are_simulated_again_bit_for_bit(suite, tmp_path):
    tasks = [f"{suite}/{number}" for number in (range(10) if suite != "libero_90" else range(0, 90, 9))]
    each = [dataclasses.replace(SimConfig(task=task), image_size=32, quality="fast") for task in tasks]
    store = ReplayStore(tmp_path)
    core = RolloutCore(Simulators([make(each[0])], each, count=3), store, Wandering(), steps=1)
    # Neighbours are of several tasks; half of the states are those that LIBERO publishes.
    tickets = []
    for i in np.random.default_rng(0).permutation(EPISODES).tolist():
        purpose = ("eval", "rollout")[i % 2]
        key = EpisodeKey("run", tasks[i // 10], purpose, state_seed(purpose, 0, i % 10))
        tickets.append(EpisodeTicket(key, noise_seed=i, horizon=STEPS))
    waiting, done = tickets, 0
    while done < EPISODES:
        done += len(core.advance(waiting, 5.0))
        waiting = []
    core.close()
    store.refresh()
    assert len(store) == EPISODES
    identical = moved = 0
    for config in reversed(each):
        env = make(config)
        for ticket in sorted((t for t in tickets if t.key.task == config.task), key=lambda t: t.noise_seed):
            episode = store.read(ticket.key.name)
            found = resimulate(episode, env)
            assert found.identical and found.reset_checked and found.reset_divergence is None, found.text()
            identical += 1
            moved += not np.array_equal(episode.states[0], episode.states[-1])
        env.close()
    assert identical == EPISODES and moved == EPISODES
