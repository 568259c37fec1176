"""Aggregation of value samples and best-of-N planning."""

import dataclasses

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, ModelConfig, PlannerConfig, RunConfig, check
from cosmos_ray.config.settings import SETTINGS
from cosmos_ray.errors import ConfigError
from cosmos_ray.model import sampling
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import action_frame, current_latents, read_actions
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.spec import make_spec
from cosmos_ray.planning.aggregate import AGGREGATIONS, THRESHOLD, aggregate
from cosmos_ray.planning.best_of_n import act_directly, best_of_n
from cosmos_ray.planning.proposals import propose
from cosmos_ray.planning.scoring import score, step_ladder
from cosmos_ray.planning.selectors import agreement
from jobs.bench import serial_planner
from tests.test_model import CAMERAS

STEPS = 2

pytestmark = pytest.mark.usefixtures("one_thread")


def demo_policy(cameras: tuple[str, ...] = CAMERAS) -> CosmosPolicy:
    """An untrained policy of the demo's dimensions whose output is not zero.

    Of these dimensions because bit-identity across batch sizes is a property of the matrix kernels, which a BLAS chooses by
    shape: with a quarter of the tokens a lone row takes another kernel and its last bits differ.
    """
    policy = build(make_spec(ModelConfig(), cameras, action_dim=4, proprio_dim=9), seed=1)
    rng = np.random.default_rng(0)
    policy.tokenizer.fit(torch.from_numpy(rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
    policy.set_statistics(np.full(4, -2.0), np.full(4, 3.0), np.full(9, -1.0), np.full(9, 1.0))
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    return policy.eval()


@pytest.fixture
def policy():
    return demo_policy()


def observed(policy, n: int, seed: int = 0):
    """(known latents, text, seeds) of ``n`` different observations."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 2, 64, 64, 3), dtype=np.uint8)
    proprio = rng.uniform(-1, 1, (n, 9)).astype(np.float32)
    text = policy.embed([f"lift the cube {i}" for i in range(n)])
    return current_latents(policy, images, proprio), text, torch.from_numpy(rng.integers(0, 2**62, n))


# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize("scheme, values, expected", [
    ("average", [0.0, 0.5, 1.0], 0.5),
    ("average", [0.04], 0.04),
    ("lcb", [0.2, 0.6], 0.4 - 0.08**0.5),  # the samples' standard deviation, n - 1, as the public code has it
    ("lcb", [0.1, 0.5, 0.6, 0.9], 0.525 - (0.3275 / 3) ** 0.5),
    ("lcb", [0.0, 0.0, 1.0], 0.0),  # 1/3 - 0.58 is below 0
    ("lcb", [0.7], 0.7),  # one sample has no deviation, where the public code's is not a number
    ("lcb_population", [0.2, 0.6], 0.2),  # what earlier versions called lcb
    ("success_vote", [0.04, 0.06, 0.9, 0.0], 0.5),
    ("success_vote", [THRESHOLD], 0.0),  # the threshold itself is no success
    ("majority_mean", [0.2, 0.4, 0.0, 0.0], 0.3),  # half is enough; the values below the threshold do not dilute the mean
    ("majority_mean", [0.9, 0.9, 0.0, 0.0, 0.0], 0.0),  # a minority counts for exactly nothing
    ("majority_mean", [0.05, 0.05], 0.0),
    ("majority_mean", [0.0, 0.0], 0.0),
    ("majority_mean", [1.0, 1.0], 1.0),
])  # fmt: skip
def test_aggregation_table(scheme, values, expected):
    score = aggregate(torch.tensor(values), scheme)
    assert score.shape == ()
    assert score.item() == (0 if expected == 0 else pytest.approx(expected, abs=1e-6))


@pytest.mark.parametrize("scheme", AGGREGATIONS)
def test_aggregation_works_along_the_last_axis_only(scheme):
    values = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    scores = aggregate(values, scheme)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores[2, 1], aggregate(values[2, 1], scheme))


def test_an_unknown_aggregation_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'median'.*average, lcb, lcb_population, success_vote, majority_mean"):
        aggregate(torch.zeros(2), "median")


def test_the_planner_setting_offers_exactly_the_aggregations():
    assert set(SETTINGS["planner.aggregate"].choices) == set(AGGREGATIONS)


@pytest.mark.parametrize("longest, count, expected", [
    (5, 3, [1, 3, 5]), (5, 5, [1, 2, 3, 4, 5]), (5, 1, [5]), (1, 4, [1, 1, 1, 1]), (10, 2, [1, 10]),
])  # fmt: skip
def test_step_ladder(longest, count, expected):
    assert step_ladder(longest, count) == expected


@pytest.mark.parametrize("longest, count, rounded, truncated", [
    (5, 3, [1, 3, 5], [1, 3, 5]), (10, 3, [1, 6, 10], [1, 5, 10]), (10, 4, [1, 4, 7, 10], [1, 4, 7, 10]),
    (8, 3, [1, 4, 8], [1, 4, 8]), (6, 5, [1, 2, 4, 5, 6], [1, 2, 3, 4, 6]), (5, 1, [5], [5]),
])  # fmt: skip
def test_the_public_code_rounds_a_ladder_down(longest, count, rounded, truncated):
    assert (step_ladder(longest, count), step_ladder(longest, count, "truncated")) == (rounded, truncated)


def test_a_truncated_ladder_acts(policy, monkeypatch):
    asked = []
    monkeypatch.setattr("cosmos_ray.planning.scoring.step_ladder", lambda *arguments: asked.append(arguments) or [1] * arguments[1])
    config = PlannerConfig(candidates=2, futures=3, future_steps=10, value_samples=3, value_steps=10, ladder="truncated")
    known, text, seeds = observed(policy, 1)
    best_of_n(policy, known, text, seeds, 1, config)
    assert {arguments[2] for arguments in asked} == {"truncated"}


# ---------------------------------------------------------------- planning


def test_one_candidate_is_the_policy_itself(policy):
    known, text, seeds = observed(policy, 2)
    planned = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=1))
    direct = act_directly(policy, known, text, seeds, STEPS)
    assert torch.equal(planned.actions, direct.actions) and torch.equal(planned.values, direct.values)
    assert planned.chosen.tolist() == [0, 0] and planned.scores.shape == (2, 1)


def test_candidate_0_keeps_the_callers_seed_and_the_others_do_not(policy):
    known, text, seeds = observed(policy, 2)
    planned = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=4))
    direct = act_directly(policy, known, text, seeds, STEPS)
    assert torch.equal(planned.candidates[:, 0], direct.actions)
    flat = planned.candidates.flatten(0, 1).flatten(1)
    assert len({tuple(row) for row in flat.tolist()}) == 8


def test_ties_change_nothing(policy, monkeypatch):
    known, text, seeds = observed(policy, 2)
    monkeypatch.setattr(sampling, "evaluate", lambda policy, given, *_: torch.full((len(given),), 0.25))
    planned = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=4))
    assert torch.equal(planned.actions, act_directly(policy, known, text, seeds, STEPS).actions)


@pytest.mark.parametrize("config", [
    PlannerConfig(candidates=3),
    PlannerConfig(candidates=3, rank_by="action", value_samples=3, value_steps=3),
    PlannerConfig(candidates=2, futures=2, future_steps=2, value_samples=2, value_steps=2, aggregate="lcb"),
    PlannerConfig(candidates=4, spread=0.3),
    PlannerConfig(candidates=4, rank_by="joint"),
], ids=["V(s')", "Q(s, a)", "ensembles", "spread", "joint"])  # fmt: skip
def test_rows_do_not_depend_on_their_batch(policy, config):
    known, text, seeds = observed(policy, 3)
    together = best_of_n(policy, known, text, seeds, STEPS, config)
    for row in range(3):
        this = slice(row, row + 1)
        alone = best_of_n(policy, known[this], dataclasses.replace(text, rows=text.rows[this]), seeds[this], STEPS, config)
        for name, value in vars(alone).items():
            assert value is None or torch.equal(getattr(together, name)[row : row + 1], value), name


def test_spread_moves_every_second_candidate_by_a_constant_and_no_gripper(policy):
    known, text, seeds = observed(policy, 3)
    plain, moved = (propose(policy, known, text, seeds, STEPS, 5, spread) for spread in (0.0, 0.3))
    before, after = (proposals.actions.view(3, 5, 8, 4) for proposals in (plain, moved))
    assert torch.equal(after[:, ::2], before[:, ::2])  # the policy's own chunk among them
    assert torch.equal(after[:, 1::2, :, 3], before[:, 1::2, :, 3].clamp(-1, 1))
    offset, inside = after[:, 1::2] - before[:, 1::2], after[:, 1::2].abs() < 1
    for axis in range(3):
        for row in offset[..., axis][inside[..., axis].all(-1)]:
            assert row.abs().max() > 1e-4 and torch.allclose(row, row[:1].expand(8), atol=1e-5)
    assert after[:, 1::2].abs().max() <= 1 and inside.any()
    assert torch.equal(moved.latents[:, :, policy.layout.action], action_frame(policy, moved.actions))  # the world model is asked about it


@pytest.mark.parametrize("value", ["future", "action", "both", "joint"])
@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_the_chosen_candidate_has_the_best_score_and_is_executed(policy, value, aggregate):
    known, text, seeds = observed(policy, 4)
    config = PlannerConfig(candidates=5, rank_by=value, value_samples=3, value_steps=2, aggregate=aggregate)
    decision = best_of_n(policy, known, text, seeds, STEPS, config)
    rows = torch.arange(4)
    assert decision.scores.shape == (4, 5) and decision.candidates.shape == (4, 5, 8, 4)
    assert torch.equal(decision.scores[rows, decision.chosen], decision.scores.max(1).values)
    assert torch.equal(decision.candidates[rows, decision.chosen], decision.actions)
    assert ((decision.scores >= 0) & (decision.scores <= 1)).all()


@pytest.mark.parametrize("value", ["future", "action"])
def test_planning_finds_the_best_candidate_under_a_known_value(policy, value, monkeypatch):
    """With a value function that prefers a large first action entry, that candidate must win, row by row."""
    known, text, seeds = observed(policy, 6)
    monkeypatch.setattr(sampling, "evaluate", lambda policy, given, seeds, _: torch.tanh(
        read_actions(policy, given.known)[:, 0, 0]).repeat_interleave(len(seeds) // len(given)))
    decision = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=8, rank_by=value, value_samples=2))
    first = decision.candidates[:, :, 0, 0]
    assert torch.equal(decision.chosen, first.argmax(1)) and len(set(decision.chosen.tolist())) > 1
    assert torch.equal(decision.actions[:, 0, 0], first.max(1).values)


@pytest.mark.parametrize("value, sample_type", [("future", SampleType.VALUE_FUTURE), ("action", SampleType.VALUE_ACTION)])
def test_the_value_mode_decides_what_is_imagined_and_valued(policy, value, sample_type, monkeypatch):
    imagined, valued = [], []
    imagine, evaluate = sampling.imagine, sampling.evaluate

    def imagine_and_note(policy, latents, text, seeds, steps):
        imagined.append((steps, len(latents)))
        return imagine(policy, latents, text, seeds, steps)

    def evaluate_and_note(policy, given, seeds, steps):
        valued.append((given.sample_type, steps, len(seeds), tuple(seeds.tolist())))
        return evaluate(policy, given, seeds, steps)

    monkeypatch.setattr(sampling, "imagine", imagine_and_note)
    monkeypatch.setattr(sampling, "evaluate", evaluate_and_note)
    known, text, seeds = observed(policy, 2)
    config = PlannerConfig(candidates=2, rank_by=value, futures=3, future_steps=5, value_samples=5, value_steps=5)
    best_of_n(policy, known, text, seeds, STEPS, config)
    futures = 3 if value == "future" else 1  # Q(s, a) asks about the chunk itself, nothing is imagined
    assert imagined == ([(1, 4), (3, 4), (5, 4)] if value == "future" else [])
    assert [v[:3] for v in valued] == [(sample_type, steps, 4 * futures) for steps in (1, 2, 3, 4, 5)]
    drawn = [seed for *_, seeds in valued for seed in seeds]
    assert len(set(drawn)) == len(drawn) // 2  # no two value samples of a candidate share their noise, the two candidates do


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_ranking_by_both_values_is_ranking_by_their_mean(policy, aggregate):
    known, text, seeds = observed(policy, 3)
    config = PlannerConfig(candidates=4, value_samples=3, value_steps=2, aggregate=aggregate)
    future, action, both = (best_of_n(policy, known, text, seeds, STEPS, dataclasses.replace(config, rank_by=value))
                            for value in ("future", "action", "both"))
    assert torch.equal(both.scores, (future.scores + action.scores) / 2) and torch.equal(both.chosen, both.scores.argmax(1))


def test_the_joint_value_ranks_as_the_public_code_does_one_candidate_after_another(policy, monkeypatch):
    """Public code with `ar_future_prediction` and `ar_value_prediction` False: query after query, the first highest generated value."""
    known, text, seeds = observed(policy, 3)
    for name in ("imagine", "evaluate"):
        monkeypatch.setattr(sampling, name, lambda *_: pytest.fail("the joint value takes no further evaluation"))
    config, network = PlannerConfig(candidates=6, rank_by="joint", futures=3, value_samples=5), (demo_policy(), text)
    decision = best_of_n(policy, known, text, seeds, STEPS, config, network)
    as_one_after_another(policy, known, text, seeds, config, decision)
    assert len(set(decision.chosen.tolist())) > 1 and len(set(decision.scores.flatten().tolist())) > 6
    assert torch.equal(decision.scores[torch.arange(3), decision.chosen], probability(decision.values))


def as_one_after_another(policy, known, text, seeds, config, decision):
    """Every row is what the serial planner makes of it, candidate by candidate."""
    for row, seed in enumerate(seeds.tolist()):
        chosen, actions, scores = serial_planner.plan(policy, known[row : row + 1], text.take(torch.tensor([row])), seed, STEPS, config)
        torch.testing.assert_close(decision.scores[row], torch.tensor(scores))
        assert decision.chosen[row] == chosen and torch.equal(decision.actions[row], actions)


@pytest.mark.parametrize("rank_by, aggregate", [("future", "majority_mean"), ("action", "average"), ("both", "lcb")])
def test_a_plan_is_that_of_one_candidate_future_and_value_after_another(policy, rank_by, aggregate):
    known, text, seeds = observed(policy, 2)
    config = PlannerConfig(candidates=4, rank_by=rank_by, futures=3, future_steps=5, value_samples=5, value_steps=5, aggregate=aggregate)
    as_one_after_another(policy, known, text, seeds, config, best_of_n(policy, known, text, seeds, STEPS, config))


def test_a_joint_value_of_a_candidate_that_was_moved_is_refused():
    check(RunConfig(planner=PlannerConfig(rank_by="joint"), learner=LearnerConfig(value_mode="action")))  # any value_mode trains it
    with pytest.raises(ConfigError, match=r"planner.spread = 0.1 moves candidates after their joint value .*: set it to 0, or"):
        check(RunConfig(planner=PlannerConfig(rank_by="joint", spread=0.1)))


@pytest.mark.parametrize("value", ["future", "action", "both"])
def test_a_planning_network_may_value_the_policys_candidates(policy, value):
    known, text, seeds = observed(policy, 2)
    config, instructions = PlannerConfig(candidates=4, rank_by=value), ["lift the cube 0", "lift the cube 1"]
    network = demo_policy()
    for p in network.net.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    alone = best_of_n(policy, known, text, seeds, STEPS, config)
    planned = best_of_n(policy, known, text, seeds, STEPS, config, (network, network.embed(instructions)))
    assert torch.equal(alone.candidates, planned.candidates) and not torch.equal(alone.scores, planned.scores)
    proposals = propose(policy, known, text, seeds, STEPS, 4)
    futures, scores = score(network, dataclasses.replace(proposals, text=network.embed(instructions).repeat_interleave(4)), config)
    assert torch.equal(planned.scores, scores.view(2, 4)) and torch.equal(planned.chosen, planned.scores.argmax(1))
    assert torch.equal(planned.latents, futures[torch.arange(2) * 4 + planned.chosen])
    itself = best_of_n(policy, known, text, seeds, STEPS, config, (policy, text))
    assert torch.equal(itself.scores, alone.scores) and torch.equal(itself.actions, alone.actions)


def test_a_planning_network_of_other_statistics_sees_state_and_chunk_in_its_own(policy, monkeypatch):
    """What it is asked about is the state and the chunk of the robot, whatever range each checkpoint was normalised by."""
    network, given = demo_policy(), []
    network.set_statistics(np.full(4, -1.0), np.linspace(1, 4, 4), np.full(9, -3.0), np.linspace(0, 8, 9))
    imagine = sampling.imagine
    monkeypatch.setattr(sampling, "imagine", lambda policy, seen, *rest: given.append(seen.clone()) or imagine(policy, seen, *rest))
    rng = np.random.default_rng(4)
    images, proprio = rng.integers(0, 256, (2, 2, 64, 64, 3), dtype=np.uint8), rng.uniform(-1, 1, (2, 9)).astype(np.float32)
    known, text = current_latents(policy, images, proprio), policy.embed(["lift the cube"] * 2)
    decision = best_of_n(policy, known, text, torch.tensor([3, 4]), STEPS, PlannerConfig(candidates=3), (network, text))
    seen, theirs = given[0], current_latents(network, images, proprio).repeat_interleave(3, 0)
    layout, chunks = network.layout, decision.candidates.flatten(0, 1)
    torch.testing.assert_close(seen[:, :, : layout.action], theirs[:, :, : layout.action], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[:, :, layout.action], action_frame(network, chunks), atol=1e-4, rtol=1e-5)
    assert not torch.allclose(action_frame(network, chunks), action_frame(policy, chunks), atol=0.1)


def test_equal_step_counts_share_a_batch_with_noise_of_their_own(policy, monkeypatch):
    known, text, seeds = observed(policy, 2)
    batches = []
    evaluate = sampling.evaluate
    monkeypatch.setattr(sampling, "evaluate", lambda *arguments: batches.append(arguments[2].tolist()) or evaluate(*arguments))
    best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=3, value_samples=4, value_steps=1))
    assert len(batches) == 1 and len(batches[0]) == 2 * 3 * 4 and len(set(batches[0])) == 2 * 4


def test_the_middle_of_the_largest_group_agrees_best():
    points = torch.tensor([[0.0], [10.0], [10.1], [10.3], [10.15], [9.9]])
    scores = agreement(torch.cat((points, points.flip(0))), 6).view(2, 6)
    assert scores.argmax(1).tolist() == [2, 3] and torch.equal(scores[1], scores[0].flip(0))
    assert ((scores >= 0) & (scores <= 1)).all()
    assert agreement(points[:3], 1).tolist() == [1, 1, 1]
    assert agreement(torch.zeros(4, 2), 4).argmax() == 0  # all the same: the first


@pytest.mark.parametrize("rank_by", ["random", "medoid", "consensus"])
def test_a_control_asks_for_no_value(policy, rank_by, monkeypatch):
    monkeypatch.setattr(sampling, "evaluate", lambda *_: pytest.fail("a control asks for no value"))
    imagined = []
    imagine = sampling.imagine
    monkeypatch.setattr(sampling, "imagine", lambda *arguments: imagined.append(len(arguments[1])) or imagine(*arguments))
    known, text, seeds = observed(policy, 6)
    decision = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=5, rank_by=rank_by))
    assert imagined == ([30] if rank_by == "consensus" else [])
    assert torch.equal(decision.chosen, decision.scores.argmax(1)) and len(set(decision.chosen.tolist())) > 1
    rows = torch.arange(6)
    assert torch.equal(decision.actions, decision.candidates[rows, decision.chosen])
    if rank_by == "medoid":
        assert torch.equal(decision.scores, agreement(decision.candidates.flatten(0, 1), 5).view(6, 5))
    check(RunConfig(planner=PlannerConfig(rank_by=rank_by), learner=LearnerConfig(value_mode="action")))


def test_candidates_are_compared_under_the_same_noise(policy, monkeypatch):
    """Equal chunks get equal scores: what tells candidates apart is what they do, not the noise of their values."""
    known, text, seeds = observed(policy, 3)
    act = sampling.act
    monkeypatch.setattr(sampling, "act", lambda policy, known, text, seeds, steps: act(
        policy, known, text, seeds[::4].repeat_interleave(4), steps))  # four times the same
    for value in ("future", "action"):
        scores = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=4, rank_by=value, futures=2)).scores
        assert torch.equal(scores, scores[:, :1].expand(3, 4)) and len(set(scores[:, 0].tolist())) == 3


def test_the_world_model_is_asked_about_the_chunk_that_is_executed(policy, monkeypatch):
    """The ACTION frame given to it is the averaged chunk, tiled as in training, not the raw generated frame."""
    given = []
    imagine = sampling.imagine
    monkeypatch.setattr(sampling, "imagine", lambda policy, latents, *rest: given.append(latents.clone())
                        or imagine(policy, latents, *rest))
    known, text, seeds = observed(policy, 2)
    decision = best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=3))
    expected = action_frame(policy, decision.candidates.flatten(0, 1))
    assert torch.equal(given[0][:, :, policy.layout.action], expected)
    assert torch.equal(decision.latents[:, :, policy.layout.action], expected.unflatten(0, (2, 3))[torch.arange(2), decision.chosen])


def test_planning_leaves_its_inputs_alone(policy):
    known, text, seeds = observed(policy, 2)
    copies = known.clone(), text.rows.clone(), text.tokens.clone(), seeds.clone()
    best_of_n(policy, known, text, seeds, STEPS, PlannerConfig(candidates=1, rank_by="action"))
    assert all(map(torch.equal, copies, (known, text.rows, text.tokens, seeds)))
