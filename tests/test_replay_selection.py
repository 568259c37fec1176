"""Selections: shares, recency and staleness against the weights they stand for, while the store changes under them."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import index as index_module
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.index import EpisodeIndex
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.replay.sampling.windows import Selection, Windows
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import make_episode
from tests.test_replay_sampler import assert_batches_equal

CHUNK = 5
TASKS = ("Lift", "Stack", "Door")

#: Two episodes of every class and task, of different lengths; rollouts have the policy version of their seed.
EPISODES = [
    make_episode(100 * number + 10 * third + i, source, length=8 + 5 * i + 3 * number, success=success, task=task, size=8)
    for number, task in enumerate(TASKS)
    for third, (source, success) in enumerate([("demo", True), ("rollout", True), ("rollout", False)])
    for i in range(2)
]
CLASS_OF = {e.key.name: "demo" if e.key.source == "demo" else "success" if e.success else "failure" for e in EPISODES}


def fill(root, episodes=EPISODES) -> ReplayStore:
    store = ReplayStore(root)
    for episode in episodes:
        store.commit(episode)
    return store


def sampler_of(store, seed=0, **options) -> WindowSampler:
    return WindowSampler(store, chunk=CHUNK, gamma=0.9, seed=seed, **options)


def names_of(sampler, picks) -> list[str]:
    return [sampler.store.index.names[row] for row in picks.rows]


def assert_drawn_as(sampler, selection, weights: dict[str, float], n=12_000):
    """Chi-square of ``n`` windows against windows that weigh ``weights`` by episode (all of an episode's alike)."""
    picks = sampler.pick(n, selection)
    seen = Counter(zip(names_of(sampler, picks), picks.offsets.tolist(), strict=True))
    lengths = {e.key.name: e.length for e in EPISODES}  # all frames: a window at every step
    expected = {(name, t): n * weight for name, weight in weights.items() for t in range(lengths[name])}
    total = sum(expected.values())
    assert set(seen) <= {key for key, value in expected.items() if value}
    chi_square = sum((seen[key] - n * value / total) ** 2 / (n * value / total) for key, value in expected.items() if value)
    freedom = sum(value > 0 for value in expected.values()) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def by_share(classes: dict[str, float], tasks: dict[str, float]) -> dict[str, float]:
    """Weight of a window of each episode: its cell's share over the cell's windows."""
    cells = {}
    for episode in EPISODES:
        cells.setdefault((CLASS_OF[episode.key.name], episode.key.task), []).append(episode)
    weights = {}
    for (name_of_class, task), episodes in cells.items():
        share = classes.get(name_of_class, 0) * tasks.get(task, 0)
        weights.update({e.key.name: share / sum(other.length for other in episodes) for e in episodes})
    return weights


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> ReplayStore:
    return fill(tmp_path_factory.mktemp("store") / "store")


# ---------------------------------------------------------------- shares


def test_no_shares_draw_every_window_alike(filled):
    assert_drawn_as(sampler_of(filled), "all", {e.key.name: 1.0 for e in EPISODES})
    assert_drawn_as(sampler_of(filled), Selection(), {e.key.name: 1.0 for e in EPISODES})


def test_classes_get_their_shares_and_their_windows_are_alike(filled):
    classes = {"demo": 2, "success": 5, "failure": 3}
    windows = Counter()
    for episode in EPISODES:
        windows[CLASS_OF[episode.key.name]] += episode.length
    weights = {name: classes[name_of_class] / windows[name_of_class] for name, name_of_class in CLASS_OF.items()}
    assert_drawn_as(sampler_of(filled), Selection(classes), weights)


def test_tasks_get_their_shares_whatever_the_class(filled):
    tasks = {"Lift": 0.7, "Stack": 0.1, "Door": 0.2}
    windows = Counter()
    for episode in EPISODES:
        windows[episode.key.task] += episode.length
    weights = {e.key.name: tasks[e.key.task] / windows[e.key.task] for e in EPISODES}
    assert_drawn_as(sampler_of(filled), Selection(tasks=tasks), weights)


def test_a_class_of_a_task_gets_the_product(filled):
    classes, tasks = {"success": 0.25, "failure": 0.75}, {"Lift": 3.0, "Door": 1.0}
    assert_drawn_as(sampler_of(filled), Selection(classes, tasks), by_share(classes, tasks))


def test_what_is_missing_leaves_its_share_to_the_others(tmp_path):
    """No failure of Lift and no success of Door: four cells are wanted, two are there."""
    gone = {("failure", "Lift"), ("success", "Door")}
    store = fill(tmp_path / "store", [e for e in EPISODES if (CLASS_OF[e.key.name], e.key.task) not in gone])
    classes, tasks = {"success": 0.5, "failure": 0.5}, {"Lift": 0.8, "Door": 0.2}
    weights = {name: weight for name, weight in by_share(classes, tasks).items() if name in store}
    assert_drawn_as(sampler_of(store), Selection(classes, tasks), weights)


def test_a_share_of_nothing_draws_nothing(filled):
    sampler = sampler_of(filled)
    assert {CLASS_OF[name] for name in names_of(sampler, sampler.pick(500, Selection({"demo": 0.0, "failure": 1.0})))} == {"failure"}
    with pytest.raises(StoreError, match="has no window") as caught:
        only = fill(filled.root.parent / "demos", [e for e in EPISODES if e.key.source == "demo"])
        sampler_of(only).pick(1, Selection({"demo": 0.0, "failure": 1.0}))
    assert "\n" not in str(caught.value)


def test_another_selection_takes_effect_at_once(filled):
    sampler = sampler_of(filled)
    for name_of_class, task in [("demo", "Lift"), ("failure", "Door"), ("demo", "Lift"), ("success", "Stack")]:
        drawn = names_of(sampler, sampler.pick(50, Selection({name_of_class: 1.0}, {task: 1.0})))
        assert {(CLASS_OF[name], name.split("-")[1]) for name in drawn} == {(name_of_class, task)}


def test_the_order_in_which_shares_are_written_does_not_matter(filled):
    left = sampler_of(filled).pick(200, Selection({"demo": 0.2, "failure": 0.8}, {"Lift": 0.5, "Door": 0.5}))
    right = sampler_of(filled).pick(200, Selection({"failure": 0.8, "demo": 0.2}, {"Door": 0.5, "Lift": 0.5}))
    assert np.array_equal(left.rows, right.rows) and np.array_equal(left.offsets, right.offsets)


# ---------------------------------------------------------------- recency and staleness


@pytest.mark.parametrize("half_life", [0.5, 2.0, 100.0])
def test_recent_episodes_weigh_more_by_the_half_life(filled, half_life):
    """Committed in the order of EPISODES, so that the last of a class is its newest."""
    weights = {}
    for name_of_class, share in (("success", 0.5), ("failure", 0.5)):
        names = [name for name, of in CLASS_OF.items() if of == name_of_class][::-1]
        raw = {name: 0.5 ** (age / half_life) for age, name in enumerate(names)}
        total = sum(weight * next(e.length for e in EPISODES if e.key.name == name) for name, weight in raw.items())
        weights.update({name: share * weight / total for name, weight in raw.items()})
    assert_drawn_as(sampler_of(filled), Selection({"success": 1, "failure": 1}, half_life=half_life), weights)


def test_a_tiny_half_life_draws_the_newest_and_an_endless_one_all_alike(filled):
    sampler = sampler_of(filled)
    for half_life in (1e-300, 5e-324, 1e-3):
        assert set(names_of(sampler, sampler.pick(100, Selection(half_life=half_life)))) == {EPISODES[-1].key.name}
    assert_drawn_as(sampler, Selection(half_life=float("inf")), {e.key.name: 1.0 for e in EPISODES})


def test_the_staleness_window_moves_as_new_versions_arrive_and_spares_demos(tmp_path):
    """Rollouts have their seed as policy version, demonstrations have none."""
    store, selection = ReplayStore(tmp_path / "store"), Selection({"demo": 0.5, "success": 0.5}, max_staleness=10)
    demo = make_episode(0, size=8)
    store.commit(demo)
    sampler = sampler_of(store)
    assert set(names_of(sampler, sampler.pick(50, selection))) == {demo.key.name}
    rollouts = [make_episode(seed, "rollout", size=8) for seed in (5, 10, 15, 20, 31)]
    for rollout, fresh in zip(rollouts, [{5}, {5, 10}, {5, 10, 15}, {10, 15, 20}, {31}], strict=True):
        store.commit(rollout)
        sampler.refresh()
        drawn = set(names_of(sampler, sampler.pick(300, selection)))
        assert drawn == {demo.key.name} | {e.key.name for e in rollouts if e.key.seed in fresh}
    # The newest is taken out again: the window moves back to what is there now.
    store.evict([rollouts[-1].key.name], "test")
    sampler.refresh()
    assert set(names_of(sampler, sampler.pick(300, selection))) == {demo.key.name} | {e.key.name for e in rollouts[1:4]}


def test_versions_of_what_is_never_drawn_do_not_move_the_window(tmp_path):
    store = fill(tmp_path / "store", [make_episode(1, "rollout"), make_episode(500, "eval"), make_episode(600, "rollout", invalid="broke")])
    drawn = sampler_of(store).draw(20, Selection(max_staleness=0))
    assert set(drawn.policy_versions) == {1}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"classes": {"demo": float("nan")}}, "must be numbers of at least 0"),
        ({"classes": {"demo": 1.0, "success": float("nan")}}, "must be numbers of at least 0"),
        ({"tasks": {"Lift": -0.5, "Door": 1.0}}, "must be numbers of at least 0"),
        ({"tasks": {"Lift": float("inf")}}, "must be numbers of at least 0"),
        ({"classes": {"demo": 0.0, "failure": 0.0}}, "one of them positive"),
        ({"classes": {}}, "one of them positive"),
        ({"tasks": {"Lift": "much"}}, "must be numbers of at least 0"),
        ({"tasks": {"Lift": None}}, "must be numbers of at least 0"),
        ({"tasks": ["Lift"]}, "by name"),
        ({"classes": {"demos": 1.0}}, "episode class 'demos' is not trained on: use demo, success, failure"),
        ({"max_staleness": -1}, "at least 0"),
        ({"max_staleness": float("nan")}, "at least 0"),
        ({"max_staleness": "3"}, "at least 0"),
        ({"half_life": 0.0}, "positive number of episodes"),
        ({"half_life": float("nan")}, "positive number of episodes"),
        ({"half_life": "long"}, "positive number of episodes"),
    ],
)
def test_impossible_selections_are_one_clear_line(bad, message):
    with pytest.raises(StoreError, match=message) as caught:
        Selection(**bad)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_refused_with_the_tasks_there_are_and_leaves_no_trace(filled):
    sampler, tables = sampler_of(filled), {name: list(filled.index.tables[name].values) for name in index_module.TABLES}
    for _ in range(2):
        with pytest.raises(StoreError, match=r"no episode is of task 'Lfit': the tasks are Door, Lift, Stack$"):
            sampler.pick(1, Selection(tasks={"Lfit": 0.9, "Lift": 0.1}))
    assert tables == {name: filled.index.tables[name].values for name in index_module.TABLES}


def test_a_change_of_the_callers_shares_passes_no_check_by(filled):
    shares = {"demo": 1.0}
    selection = Selection(shares)
    shares["demo"] = float("nan")
    assert selection == Selection({"demo": 1.0}) and len(sampler_of(filled).pick(3, selection).rows) == 3


def test_a_known_task_whose_episodes_are_gone_leaves_its_share(tmp_path):
    store = fill(tmp_path / "store")
    sampler, selection = sampler_of(store), Selection(tasks={"Lift": 0.5, "Door": 0.5})
    store.evict([e.key.name for e in EPISODES if e.key.task == "Door"], "test")
    sampler.refresh()
    assert {name.split("-")[1] for name in names_of(sampler, sampler.pick(100, selection))} == {"Lift"}


# ---------------------------------------------------------------- reproducible

SELECTIONS = {
    "all": "all",
    "classes": Selection({"demo": 0.3, "success": 0.3, "failure": 0.4}),
    "tasks": Selection(tasks={"Lift": 0.3, "Door": 0.7}),
    "both, not stale": Selection({"demo": 0.5, "success": 0.5}, {"Lift": 0.5, "Stack": 0.5}, max_staleness=150),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_draws_depend_on_the_seed_not_on_the_order_of_commits(tmp_path, filled, selection):
    shuffled = [EPISODES[i] for i in np.random.default_rng(1).permutation(len(EPISODES))]
    left, right = sampler_of(filled, seed=7), sampler_of(fill(tmp_path / "store", shuffled), seed=7)
    for _ in range(3):
        assert_batches_equal(left.draw(40, selection), right.draw(40, selection))
    assert not np.array_equal(sampler_of(filled, seed=8).pick(40, selection).rows, sampler_of(filled, seed=7).pick(40, selection).rows)


def test_draws_do_not_depend_on_when_the_episodes_were_taken_in(tmp_path):
    """All at once, one by one, or with some that came and went in between."""
    whole = sampler_of(fill(tmp_path / "whole"), seed=3)
    store = ReplayStore(tmp_path / "grown")
    grown = sampler_of(store, seed=3)
    passing = [make_episode(900 + i, "rollout", length=9, task="Lift", size=8) for i in range(3)]
    for number, episode in enumerate([*EPISODES[5:], *passing, *EPISODES[:5]]):
        store.commit(episode)
        if number % 4 == 0:
            grown.refresh()
    store.evict([e.key.name for e in passing], "test")
    grown.refresh()
    assert grown.counts() == whole.counts()
    for selection in SELECTIONS.values():
        assert_batches_equal(whole.draw(40, selection), grown.draw(40, selection))


def test_equal_sort_keys_do_not_bring_the_order_of_commits_back(monkeypatch):
    """The keys are hashes: here they all collide, and names must decide."""
    monkeypatch.setattr(index_module, "sort_key", lambda summary: 7)
    orders = []
    for episodes in (EPISODES, EPISODES[::-1]):
        index = EpisodeIndex()
        windows = Windows(index, CHUNK)
        for episode in episodes:
            index.add(summary_of(episode))
            windows.update()
        orders.append([index.names[row] for row in windows.cell(None, None, Selection()).rows])
    assert orders[0] == orders[1] == sorted(e.key.name for e in EPISODES)


def summary_of(episode):
    batch, header = schema.encode(episode)
    return schema.summarise(header, batch.num_rows, batch.nbytes, "")


def test_a_stream_of_selections_resumes_in_its_middle(filled):
    wanted = [SELECTIONS["classes"], SELECTIONS["tasks"], "rollout", replace(SELECTIONS["classes"], half_life=3.0)]
    first = sampler_of(filled, seed=5)
    for what in wanted:
        first.draw(13, what)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = sampler_of(ReplayStore(filled.root, create=False), seed=99)
    resumed.load_state_dict(state)
    for what in wanted * 2:
        assert_batches_equal(first.draw(13, what), resumed.draw(13, what))


def test_shares_of_any_size_multiply(filled):
    huge = Selection({"demo": 1e300, "success": 3e300}, {"Lift": 1e300, "Door": 1e300})
    small = Selection({"demo": 1.0, "success": 3.0}, {"Lift": 1.0, "Door": 1.0})
    picks = [sampler_of(filled, 3).pick(50, selection) for selection in (huge, small)]
    assert np.array_equal(picks[0].rows, picks[1].rows) and np.array_equal(picks[0].offsets, picks[1].offsets)


@pytest.mark.parametrize("n", [0, -1])
def test_no_windows_are_no_draw(filled, n):
    with pytest.raises(StoreError, match=f"^{n} windows cannot be drawn"):
        sampler_of(filled).draw(n, "all")


def test_a_draw_that_fails_is_as_if_it_had_not_been_tried(tmp_path, filled):
    root = filled.root
    plain, tried = sampler_of(filled, 5), sampler_of(ReplayStore(root), 5)
    with pytest.raises(StoreError, match=r"^Selection\(.*has no window"):
        tried.draw(8, Selection({"failure": 1.0}, {"Lift": 1.0}, max_staleness=0))
    assert_batches_equal(plain.draw(8), tried.draw(8))


def test_a_draw_that_breaks_off_while_reading_is_as_if_it_had_not_been_tried(tmp_path):
    store = fill(tmp_path, EPISODES[:3])
    store.commit(make_episode(7, length=9, size=16))  # of another picture size
    plain, tried = sampler_of(store, 5), sampler_of(store, 5)
    state = tried.snapshot()
    with pytest.raises(StoreError, match="keep one robot and image size"):
        tried.draw(64)
    assert tried.snapshot() == state and np.array_equal(plain.pick(8).rows, tried.pick(8).rows)
