"""Exact early rejection: the same choice from fewer values."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.planning.aggregate import AGGREGATIONS, THRESHOLD, aggregate
from cosmos_ray.planning.best_of_n import best_of_n
from cosmos_ray.planning.rejection import beaten, bounds
from tests.test_planning import demo_policy, observed

PAPER = PlannerConfig(candidates=8, futures=3, future_steps=5, value_samples=5, value_steps=5, aggregate="majority_mean")

pytestmark = pytest.mark.usefixtures("one_thread")


def tables(count: int, n: int, seed: int = 0) -> torch.Tensor:
    """(count, n) values of many kinds: spread out, close to 0 and to 1, at the threshold, all equal."""
    g = torch.Generator().manual_seed(seed)
    kinds = [torch.rand(count, n, generator=g), torch.rand(count, n, generator=g).round(), torch.rand(count, n, generator=g) * 0.1,
             0.9 + torch.rand(count, n, generator=g) * 0.1, torch.rand(count, 1, generator=g).expand(count, n),
             torch.full((count, n), THRESHOLD), torch.rand(count, n, generator=g) ** 8]
    return torch.stack(kinds)[torch.randint(len(kinds), (count,), generator=g), torch.arange(count)]


@pytest.mark.parametrize("scheme", AGGREGATIONS)
@pytest.mark.parametrize("n", [1, 2, 5, 15])
def test_no_completion_leaves_the_bounds(scheme, n):
    full, others = tables(500, n), tables(500, n, seed=1)
    for drawn in range(n + 1):
        low, high = bounds(torch.cat((full[:, :drawn], torch.full((500, n - drawn), torch.nan)), 1), scheme)
        assert ((0 <= low) & (low <= high + 1e-6) & (high <= 1)).all()
        for rest in (full, others, torch.zeros_like(full), torch.ones_like(full), torch.full_like(full, THRESHOLD + 1e-4)):
            score = aggregate(torch.cat((full[:, :drawn], rest[:, drawn:]), 1), scheme)
            assert (score >= low - 1e-6).all() and (score <= high + 1e-6).all(), (drawn, score, low, high)


@pytest.mark.parametrize("scheme", AGGREGATIONS)
def test_bounds_of_all_values_are_the_score(scheme):
    full = tables(500, 5)
    low, high = bounds(full, scheme)
    torch.testing.assert_close(low, aggregate(full, scheme))
    torch.testing.assert_close(high, aggregate(full, scheme))


def test_a_majority_that_cannot_be_reached_any_more_ends_a_candidate_at_0():
    values = torch.tensor([0.01] * 8 + [torch.nan] * 7)
    assert bounds(values, "majority_mean")[1] == 0
    assert bounds(torch.tensor([0.01] * 7 + [torch.nan] * 8), "majority_mean")[1] == 1


def test_what_beats_a_candidate():
    low, high = torch.tensor([[0.2, 0.0, 0.6, 0.0]]), torch.tensor([[0.7, 0.5, 0.9, 0.0]])
    assert beaten(low, high).tolist() == [[False, True, False, True]]
    nothing = torch.zeros(1, 3)
    assert beaten(nothing, nothing).tolist() == [[False, True, True]]  # all at 0: the first candidate keeps ties


@pytest.mark.parametrize("rank_by", ["future", "action", "both"])
@pytest.mark.parametrize("scheme", AGGREGATIONS)
def test_any_table_of_values_gives_the_same_choice(rank_by, scheme, monkeypatch):
    """60 decisions among 8 candidates; the values come from a table, by candidate, seed and evaluations."""
    policy, b, n = demo_policy(), 60, 8
    known, text, _ = observed(policy, 1)
    known, text, seeds = known.repeat(b, 1, 1, 1, 1), text.repeat(b), torch.arange(b)
    name = torch.arange(b * n).float()  # a candidate's name stands in its latents
    table = tables(b * n, 97).numpy()
    asked = []

    def act(policy, latents, *_):
        latents = latents.repeat_interleave(n, 0)
        latents[:, 0, policy.layout.value, 0, 0] = name
        return latents

    def evaluate(policy, given, seeds, steps):
        asked.append(len(seeds) * steps)
        names = given.known[:, 0, policy.layout.value, 0, 0].long().numpy().repeat(len(seeds) // len(given))
        return torch.from_numpy(table[names, (seeds.numpy() + int(given.sample_type)) % 97] * 2 - 1)

    monkeypatch.setattr(sampling, "act", act)
    monkeypatch.setattr(sampling, "imagine", lambda policy, latents, *_: latents.clone())
    monkeypatch.setattr(sampling, "evaluate", evaluate)
    config = dataclasses.replace(PAPER, rank_by=rank_by, aggregate=scheme)
    whole = best_of_n(policy, known, text, seeds, 1, config)
    work, asked[:] = sum(asked), []
    certain = best_of_n(policy, known, text, seeds, 1, dataclasses.replace(config, early_rejection=True))
    assert torch.equal(certain.chosen, whole.chosen) and torch.equal(certain.actions, whole.actions)
    assert len(set(whole.chosen.tolist())) > n // 2
    assert torch.equal(certain.scores.argmax(1), certain.chosen)
    assert sum(asked) < 0.95 * work
    assert ((certain.scores >= 0) & (certain.scores <= 1)).all()


@pytest.mark.parametrize("rank_by", ["future", "action", "both"])
def test_a_network_chooses_the_same_with_rejection(rank_by, monkeypatch):
    policy = demo_policy()
    known, text, seeds = observed(policy, 3)
    config = dataclasses.replace(PAPER, rank_by=rank_by)
    rows = []
    evaluate = sampling.evaluate
    monkeypatch.setattr(sampling, "evaluate", lambda *arguments: rows.append(len(arguments[2])) or evaluate(*arguments))
    whole = best_of_n(policy, known, text, seeds, 1, config)
    work, rows[:] = sum(rows), []
    certain = best_of_n(policy, known, text, seeds, 1, dataclasses.replace(config, early_rejection=True))
    assert torch.equal(certain.chosen, whole.chosen) and torch.equal(certain.actions, whole.actions)
    assert torch.equal(certain.latents, whole.latents) and sum(rows) <= work
    complete = (certain.scores - whole.scores).abs() < 1e-6
    assert (complete | (certain.scores <= certain.scores.max(1, keepdim=True).values)).all()


def test_values_that_settle_it_early_end_all_work(monkeypatch):
    """One candidate far ahead: after the votes of 8 of 15 values the seven others are out, and nothing more is imagined or valued."""
    policy = demo_policy()
    known, text, seeds = observed(policy, 1)
    imagined, valued = [], []
    imagine = sampling.imagine
    monkeypatch.setattr(sampling, "imagine", lambda *arguments: imagined.append(arguments[4]) or imagine(*arguments))

    def evaluate(policy, given, seeds, steps):
        valued.append((steps, len(seeds)))
        return torch.where(torch.arange(len(seeds)) == 2, 0.8, -1.0)

    monkeypatch.setattr(sampling, "evaluate", evaluate)
    decision = best_of_n(policy, known, text, seeds, 1, dataclasses.replace(PAPER, early_rejection=True))
    assert decision.chosen.tolist() == [2]
    assert imagined == [1, 3] and valued == [(steps, 8) for steps in (1, 2, 3, 4, 5, 1, 2, 3)]
    assert probability(torch.tensor(0.8)) == pytest.approx(0.9) and decision.scores[0, 2] > 0.4
    assert decision.scores[0, [0, 1, 3, 4, 5, 6, 7]].tolist() == [0] * 7
    assert np.isfinite(decision.scores.numpy()).all()
