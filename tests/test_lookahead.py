"""Plans of two and three chunks: against a plain serial planner, and where looking ahead must choose otherwise."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, PlannerConfig, RunConfig, check
from cosmos_ray.errors import ConfigError
from cosmos_ray.model import sampling
from cosmos_ray.model.latents import action_frame, current_latents, next_state, read_actions, read_future_proprio, renormalized
from cosmos_ray.planning.best_of_n import best_of_n
from cosmos_ray.planning.lookahead import best
from jobs.bench import serial_planner
from tests.test_planning import STEPS, demo_policy, observed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy():
    return demo_policy()


PLANS = {
    "depth 2": PlannerConfig(candidates=3, depth=2),
    "depth 3, branches": PlannerConfig(candidates=2, depth=3, branch=2),
    "ensembles": PlannerConfig(candidates=2, depth=2, branch=2, futures=2, future_steps=2, value_samples=2, value_steps=2, aggregate="lcb"),
    "Q(s, a)": PlannerConfig(candidates=3, depth=2, branch=2, rank_by="action", value_samples=2),
    "both, beam over futures": PlannerConfig(candidates=3, depth=2, beam=2, futures=2, rank_by="both"),
    "depth 3, beam": PlannerConfig(candidates=4, depth=3, branch=2, beam=2),
    "joint": PlannerConfig(candidates=3, depth=2, branch=2, beam=2, rank_by="joint", futures=3),
}


@pytest.mark.parametrize("config", PLANS.values(), ids=PLANS)
def test_a_look_ahead_is_that_of_one_chunk_future_and_value_after_another(policy, config):
    known, text, seeds = observed(policy, 2)
    decision = best_of_n(policy, known, text, seeds, STEPS, config)
    for row, seed in enumerate(seeds.tolist()):
        chosen, actions, worths = serial_planner.plan(policy, known[row : row + 1], text.take(torch.tensor([row])), seed, STEPS, config)
        kept = torch.tensor(worths).isfinite()
        assert decision.chosen[row] == chosen and torch.equal(decision.actions[row], actions)
        torch.testing.assert_close(decision.scores[row][kept], torch.tensor(worths)[kept])
        assert not config.beam or (~kept).any()
    assert ((decision.scores >= 0) & (decision.scores <= 1)).all()


def test_rows_of_a_look_ahead_do_not_depend_on_their_batch(policy):
    known, text, seeds = observed(policy, 3)
    config = PlannerConfig(candidates=3, depth=3, branch=2, beam=2)
    together = best_of_n(policy, known, text, seeds, STEPS, config)
    for row in range(3):
        this = slice(row, row + 1)
        alone = best_of_n(policy, known[this], text.take(torch.tensor([row])), seeds[this], STEPS, config)
        for name, value in vars(alone).items():
            assert value is None or torch.equal(getattr(together, name)[this], value), name


def test_the_next_state_is_the_imagined_one_with_its_own_proprioception(policy):
    """The public code keeps the real proprioception in the imagined state (method 4.3)."""
    known, text, seeds = observed(policy, 2)
    imagined = sampling.imagine(policy, known, text, seeds, 1)
    felt = read_future_proprio(policy, imagined)
    state, layout = next_state(policy, imagined), policy.layout
    seen = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8)
    really = current_latents(policy, seen, felt.numpy())
    torch.testing.assert_close(state[:, :, layout.proprio], really[:, :, layout.proprio])
    assert not torch.allclose(state[:, :, layout.proprio], known[:, :, layout.proprio], atol=0.1)
    assert torch.equal(state[:, :, list(layout.images)], imagined[:, :, list(layout.future_images)])
    assert torch.equal(state[:, :, 0], known[:, :, 0]) and not state[:, :, layout.action:].any()


class Maze:
    """A world of numbers that the network of a policy stands in for: the place x is the first number of proprioception, a chunk is worth
    its first action. From 0 the chunks are +0.1 and +0.2; from 0.1 one can go on to 0.9, from 0.2 no further than 0.3."""

    def __init__(self, policy, monkeypatch):
        self.policy, self.proposed = policy, 0
        for name in ("act", "imagine", "evaluate"):
            monkeypatch.setattr(sampling, name, getattr(self, name))

    def at(self, latents, frame):
        return self.policy.proprio_scale.restore(latents[:, :, frame].flatten(1)[:, :9])[:, 0]

    def with_place(self, latents, frame, x):
        latents = latents.clone()
        felt = self.policy.proprio_scale.normalize(torch.zeros(len(x), 9) + x[:, None])
        latents[:, :, frame] = felt.repeat(1, 200)[:, :latents[0, :, 0].numel()].view(-1, *latents[:, :, 0].shape[1:])
        return latents

    def act(self, policy, known, text, seeds, steps):
        first = len(seeds) // len(known)
        x = self.at(known, policy.layout.proprio).repeat_interleave(first)
        query = torch.arange(len(seeds)) % first
        step = torch.where(x < 0.05, 0.1 + 0.1 * query, torch.where(x < 0.15, 0.8, 0.1))
        chunks = torch.zeros(len(seeds), 8, 4)
        chunks[:, 0, 0] = step
        latents = known.repeat_interleave(first, 0)
        latents[:, :, policy.layout.action] = action_frame(policy, chunks)
        return latents

    def imagine(self, policy, latents, text, seeds, steps):
        x = self.at(latents, policy.layout.proprio) + read_actions(policy, latents)[:, 0, 0]
        return self.with_place(latents, policy.layout.future_proprio, x)

    def evaluate(self, policy, given, seeds, steps):
        return self.at(given.known, policy.layout.future_proprio) * 2 - 1


def test_two_chunks_ahead_the_slower_start_wins(policy, monkeypatch):
    """Depth 1 takes the chunk that gets furthest; depth 2 sees that the other one leads on."""
    known, text, seeds = observed(policy, 2)
    maze = Maze(policy, monkeypatch)
    known = maze.with_place(known, policy.layout.proprio, torch.zeros(2))
    at_once, ahead, further = (best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=2, depth=n)) for n in (1, 2, 3))
    assert (at_once.chosen.tolist(), ahead.chosen.tolist(), further.chosen.tolist()) == ([1, 1], [0, 0], [0, 0])
    torch.testing.assert_close(at_once.scores, torch.tensor([[0.1, 0.2]] * 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(ahead.scores, torch.tensor([[0.9, 0.3]] * 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(ahead.actions[:, 0, 0], torch.full((2,), 0.1), atol=1e-3, rtol=0)


def test_every_future_counts_and_the_best_chunk_of_each(policy, monkeypatch):
    """The public code keeps the value of the last branch alone (method 4.3): here it is the worst one."""
    known, text, seeds = observed(policy, 1)
    values = iter([torch.tensor([0.9, 0.1, 0.5, 0.3])])
    monkeypatch.setattr("cosmos_ray.planning.lookahead._judge", lambda *_: next(values))
    decision = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=1, depth=2, branch=2, futures=2))
    torch.testing.assert_close(decision.scores, torch.tensor([[0.7]]))


def test_a_planning_network_of_other_statistics_imagines_and_the_policy_proposes(policy, monkeypatch):
    """The policy sees an imagined state in its own normalisation."""
    network, proposed_from, imagined = demo_policy(), [], []
    network.set_statistics(np.full(4, -1.0), np.linspace(1, 4, 4), np.full(9, -3.0), np.linspace(0, 8, 9))
    act, imagine = sampling.act, sampling.imagine
    monkeypatch.setattr(sampling, "act", lambda policy, *rest: proposed_from.append((policy, rest[0].clone())) or act(policy, *rest))
    monkeypatch.setattr(sampling, "imagine", lambda *given: imagined.append((given[0], imagine(*given))) or imagined[-1][1])
    known, text, seeds = observed(policy, 2)
    best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=3, depth=2), (network, text))
    assert [who for who, _ in proposed_from] == [policy, policy] and all(who is network for who, _ in imagined)
    state = renormalized(next_state(network, imagined[0][1]), network, policy)
    assert torch.equal(proposed_from[1][1], state) and len(state) == 6
    felt = read_future_proprio(network, imagined[0][1])
    torch.testing.assert_close(policy.proprio_scale.restore(state[:, :, 1].flatten(1)[:, :9]), felt, atol=1e-4, rtol=1e-4)


def test_the_beam_keeps_the_first_of_equals():
    assert best(torch.tensor([[0.1, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]), 2).tolist() == [1, 2, 4, 5, 10, 11]
    assert best(torch.tensor([[0.1, 0.5]]), 7).tolist() == [0, 1]


def test_a_beam_looks_further_into_so_many_plans_and_no_others(policy, monkeypatch):
    rows = []
    act = sampling.act
    monkeypatch.setattr(sampling, "act", lambda *arguments: rows.append(len(arguments[3])) or act(*arguments))
    known, text, seeds = observed(policy, 2)
    decision = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=5, depth=3, branch=3, beam=2))
    assert rows == [10, 2 * 2 * 3, 2 * 2 * 3] and decision.scores.shape == (2, 5)
    assert torch.equal(decision.candidates[[0, 1], decision.chosen], decision.actions)


@pytest.mark.parametrize("change, words", [
    ({"branch": 2}, "planner.branch = 2 acts where a plan looks further than one chunk: set planner.depth to 2 or 3"),
    ({"beam": 4}, "planner.beam = 4 acts where"),
    ({"depth": 4}, "planner.depth = 4 is out of range"),
    ({"depth": 2, "rank_by": "medoid"}, "planner.rank_by = 'medoid' asks no value.*set planner.depth to 1"),
    ({"depth": 2, "early_rejection": True}, "planner.early_rejection compares the candidates of one chunk"),
    ({"depth": 3, "beam": 2, "futures": 3}, "planner.beam = 2 keeps single plans"),
])  # fmt: skip
def test_settings_that_do_not_go_with_a_look_ahead_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        check(RunConfig(planner=PlannerConfig(**change), learner=LearnerConfig(value_mode="both")))
    check(RunConfig(planner=dataclasses.replace(PlannerConfig(depth=2, branch=2, beam=3, futures=3))))
