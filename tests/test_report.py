"""The report: its statistics against brute force, and a page from a real folder and store."""

import base64
import itertools
import json
import re
import shlex
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from cosmos_ray.commands.cli import make_parser
from cosmos_ray.config import PlannerConfig, RunConfig, SimConfig
from cosmos_ray.config.settings import SETTINGS, new_config, parse_values
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.evidence import mcnemar, wilson
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.report.build import write_report
from cosmos_ray.report.contents import training_curves
from cosmos_ray.report.filmstrip import draw_filmstrip, pick, save_filmstrip
from cosmos_ray.report.headline import headline, p_value
from cosmos_ray.report.trace import EpisodeTrace

CAMERAS = ("robot0_eye_in_hand", "agentview")
SEEDS = [2_000_000 + i for i in range(8)]
OUTCOMES = {"base": [0, 0, 0, 1, 1, 0, 1, 0], "refined": [1, 1, 0, 1, 1, 0, 1, 1], "refined + planning": [1, 1, 1, 1, 1, 0, 0, 1]}


def make_trace(decisions=3, candidates=4, cameras=CAMERAS):
    rng = np.random.default_rng(0)
    trace = EpisodeTrace("Lift", SEEDS[0], cameras, candidates, success=True, length=8 * decisions - 2)
    for i in range(decisions):
        trace.steps.append(8 * i)
        for frames in (trace.observed, trace.imagined, trace.happened):
            frames.append(rng.integers(0, 256, (len(cameras), 16, 16, 3)).astype(np.uint8))
        trace.scores.append(rng.uniform(0, 1, candidates).tolist())
        trace.chosen.append(int(np.argmax(trace.scores[-1])))
        trace.values.append(float(rng.uniform(-1, 1)))
    return trace


def make_episode(key, success, version, seed, candidates=1, length=20):
    """A small stored episode whose decisions have values above 0 for successes, below for failures."""
    rng = np.random.default_rng(seed)
    decisions = []
    for step in range(0, length, 8):
        scores = [round(float(s), 4) for s in rng.uniform(0.2, 0.8, candidates)]
        value = round(float((1 if success else -1) * rng.uniform(0.1, 0.9)), 4)
        decisions.append({"step": step, "value": value, "chosen": int(np.argmax(scores)), "scores": scores})
    info = {"decisions": decisions, "candidates": candidates, "fingerprint": {"robosuite": "1.5.2", "model": "<b>ab12</b>"}}
    return Episode(key=key, instruction="lift the cube", cameras=CAMERAS, success=bool(success), episode_return=float(success),
                   timed_out=not success, invalid="", policy_version=version, actions=rng.uniform(-1, 1, (length, 4)),
                   labels=np.zeros((length, 4)), rewards=np.zeros(length), proprio=np.zeros((length + 1, 9)),
                   states=rng.normal(size=(length + 1, 5)), step_versions=np.full(length, version),
                   predicted_values=np.full(length, np.nan), frames={0: [b"jpeg", b"jpeg"]}, info=info)


def make_run(tmp_path, arms=("base", "refined", "refined + planning"), name="small", metrics=True):
    """A run folder as the stages leave it."""
    config = RunConfig(name=name, root=str(tmp_path), eval_episodes=len(SEEDS), planner=PlannerConfig(candidates=4))
    folder = RunFolder(config)
    store = folder.store()
    table = {}
    for version, arm in enumerate(arms, 1):
        planner = {"candidates": 4, "value": "future"} if "planning" in arm else None
        keys = [EpisodeKey(f"{folder.identity.key}:{arm}:0a1b2c3d4e", "Lift", "eval", seed) for seed in SEEDS]
        for i, (key, won) in enumerate(zip(keys, OUTCOMES[arm], strict=True)):
            store.commit(make_episode(key, won, min(version, 2), 10 * version + i, candidates=4 if planner else 1))
        wins = sum(OUTCOMES[arm])
        low, high = wilson(wins, len(SEEDS))
        table[arm] = {"successes": wins, "episodes": len(SEEDS), "rate": wins / len(SEEDS), "low": low, "high": high,
                      "mean_steps_of_successes": 20.0 if wins else None, "policy_version": min(version, 2), "planner": planner,
                      "invalid": 0, "outcomes": OUTCOMES[arm], "episode_names": [k.name for k in keys]}
    pairs = []
    for arm in arms[1:]:
        won = sum(b > a for a, b in zip(OUTCOMES[arms[0]], OUTCOMES[arm], strict=True))
        lost = sum(b < a for a, b in zip(OUTCOMES[arms[0]], OUTCOMES[arm], strict=True))
        pairs.append({"arm": arm, "against": arms[0], "won": won, "lost": lost, "gain_points": 100 * (won - lost) / 8,
                      "p": mcnemar(won, lost)})
    folder.write_json("evaluation.json", {"task": "Lift", "seeds": SEEDS, "arms": table, "pairs": pairs})
    if metrics:
        store.commit(make_episode(EpisodeKey(folder.identity.key, "Lift", "demo", 0), True, -1, 0))
        for i in range(6):
            store.commit(make_episode(EpisodeKey(folder.identity.key, "Lift", "rollout", 1_000_000 + i), i % 2, 1 + i // 3, i))
        for stage, step in itertools.product(("pretrain", "refine"), (25, 50, 75)):
            folder.record(stage, step=step, loss=9.0 / step, action=0.3, future=0.2, value=0.1, grad_norm=float("nan"), lr=1e-3)
        folder.record("collect", demonstrations=1, new=1, failed=0, workers_replaced=0)
        folder.record("demo", name="collect", seconds=90.0, peak_memory_mb=812)
        folder.record("demo", name="collect", seconds=30.0, peak_memory_mb=640)
    return folder, config


class Page(HTMLParser):
    """Tables by id as rows of cell texts, and everything the page would load."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.tags, self._table, self._cell = {}, [], [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.loads += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "action", "poster")]
        if tag == "table":
            self._table = self.tables.setdefault(attrs.get("id"), [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None
        elif tag == "table":
            self._table = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)


def pngs(page):
    return [base64.b64decode(load.split(",", 1)[1]) for load in page.loads]


# ---------------------------------------------------------------- headline


def arm(name, successes, candidates=0):
    return {"name": name, "successes": successes, "episodes": 60, "rate": successes / 60, "low": 0.1, "high": 0.9, "candidates": candidates}


def compared(won, lost, p, planning=True):
    return {"arm": "refined + planning" if planning else "refined", "against": "refined" if planning else "base", "won": won, "lost": lost,
            "gain_points": 100 * (won - lost) / 60, "p": p, "headline": True}


@pytest.mark.parametrize("counts, planned, expected", [
    ((0, 0, 1.0), 44, "Best-of-8 planning changed no outcome: 44/60 against 44/60."),
    ((3, 3, 1.0), 44, "Best-of-8 planning changed nothing measurable: 44/60 against 44/60 (won 3, lost 3, p = 1.00)."),
    ((5, 3, 0.727), 46, "Best-of-8 planning changed nothing measurable: 46/60 against 44/60, a gain of 3.3 points within chance "
                        "(won 5, lost 3, p = 0.73)."),
    ((12, 1, 0.0034), 55, "Best-of-8 planning raised success by 18.3 points: 55/60 against 44/60 (won 12, lost 1, p = 0.003)."),
    ((0, 14, 0.00012), 30, "Best-of-8 planning lowered success by 23.3 points: 30/60 against 44/60 (won 0, lost 14, p < 0.001)."),
])
def test_headline_claims_no_more_than_the_counts(counts, planned, expected):
    arms = [arm("base", 20), arm("refined", 44), arm("refined + planning", planned, candidates=8)]
    assert headline(arms, [compared(*counts)]) == expected


def test_headline_of_refinement_and_of_a_lone_arm():
    arms = [arm("base", 50), arm("refined", 36)]
    assert headline(arms, [compared(1, 15, 0.0005, planning=False)]).startswith("The refined policy is worse than the base policy by 23.3")
    assert headline(arms[:1], []) == ("The base policy succeeds in 50 of 60 held-out episodes (83 %, 95 % interval 10 to 90 %); "
                                      "there is nothing to compare it with yet.")
    assert [p_value(p) for p in (0.0001, 0.0512, 0.5)] == ["< 0.001", "= 0.051", "= 0.50"]


# ---------------------------------------------------------------- page


def test_page_shows_the_numbers_of_the_json(tmp_path):
    folder, config = make_run(tmp_path)
    report = write_report(folder, config, make_trace())
    text = folder.report.read_text()
    assert json.loads((folder.path / "report.json").read_text()) == json.loads(json.dumps(report))
    page = Page(text)
    rows = page.tables["arms"][1:]
    assert len(rows) == len(report["arms"]) == 3
    for row, entry in zip(rows, report["arms"], strict=True):
        assert row[:4] == [entry["name"], f"{entry['successes']}/{entry['episodes']}", f"{100 * entry['rate']:.1f} %",
                           f"{100 * entry['low']:.1f} % to {100 * entry['high']:.1f} %"]
        if entry["paired"]:
            assert row[6:8] == [f"{entry['paired']['gain_points']:+.1f} points", f"{entry['paired']['won']} / {entry['paired']['lost']}"]
    assert [e["successes"] for e in report["arms"]] == [3, 6, 6]
    assert report["headline"] in text
    assert "Best-of-4 planning changed nothing measurable: 6/8 against 6/8 (won 1, lost 1, p = 1.00)." in report["headline"]
    for row in page.tables["values"][1:]:
        entry = report["values"][row[0]]
        assert row[1:4] == [str(entry["episodes"]), str(entry["decisions"]), f"{entry['auc']:.3f}"]
    assert page.tables["stages"][1:] == [["collect", "2.0", "812"], ["total", "2.0", ""]]
    assert [row[2] for row in page.tables["store"][1:]] == ["1", "3", "3", "24", "31"]
    folder.close()


def test_page_is_self_contained_and_its_images_decode(tmp_path):
    folder, config = make_run(tmp_path)
    write_report(folder, config, make_trace(decisions=12))
    text = folder.report.read_text()
    page = Page(text)
    assert len(page.loads) == 6 and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'src="data:[^"]*"', "", text))
    for data in pngs(page):
        assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).std() > 1
        assert len(data) < 1_500_000
    assert not list(folder.path.glob(".*.tmp"))
    folder.close()


def test_diagnostics_come_from_the_stored_decisions(tmp_path):
    folder, config = make_run(tmp_path)
    report = write_report(folder, config, None)
    store = folder.store()
    planned = [store.read(n).info["decisions"] for n in report["arms"][2]["episode_names"]]
    decisions = [d for episode in planned for d in episode]
    assert report["planning"]["decisions"] == len(decisions) == 24
    assert report["planning"]["share_not_first"] == pytest.approx(np.mean([d["chosen"] != 0 for d in decisions]))
    assert report["planning"]["mean_spread"] == pytest.approx(np.mean([max(d["scores"]) - min(d["scores"]) for d in decisions]))
    assert sum(report["planning"]["picks"]) == 24
    assert list(report["values"]) == ["rollouts", "evaluation, base", "evaluation, refined", "all"]
    assert report["values"]["all"]["auc"] == 1.0  # make_episode gives successes the higher values
    assert report["values"]["rollouts"]["decisions"] == 18
    ends = [config.replay.gamma ** max(0, 20 - step - config.model.chunk) for step in (0, 8, 16)]
    assert report["values"]["rollouts"]["mean_target"] == pytest.approx(np.mean(ends) / 2)
    assert [(r["version"], r["successes"], r["episodes"]) for r in report["rollouts_by_version"]] == [(1, 1, 3), (2, 2, 3)]
    folder.close()


def test_report_without_refinement_metrics_or_trace(tmp_path):
    folder, config = make_run(tmp_path, arms=("base",), metrics=False)
    report = write_report(folder, config, None)
    page = Page(folder.report.read_text())
    assert report["training"] == {} and report["planning"] is None and report["imagination"] is None and report["stage_times"] == []
    assert [row[0] for row in page.tables["arms"][1:]] == ["base"]
    assert len(pngs(page)) == 2  # arms and calibration
    assert "there is nothing to compare it with yet" in report["headline"]
    folder.close()


def test_no_evaluation_yet_is_one_clear_line(tmp_path):
    config = RunConfig(name="empty", root=str(tmp_path))
    folder = RunFolder(config)
    with pytest.raises(ConfigError, match="run `evaluate` first") as caught:
        write_report(folder, config, None)
    assert "\n" not in str(caught.value)
    assert not folder.report.exists() and not (folder.path / "report.json").exists()
    (folder.path / "evaluation.json").write_text('{"arms": {')
    with pytest.raises(StoreError, match="run `evaluate` again"):
        write_report(folder, config, None)
    folder.close()


def test_torn_metrics_line_and_a_repeated_step_are_survived(tmp_path):
    folder, config = make_run(tmp_path)
    folder.record("pretrain", step=75, loss=0.5)  # a resumed stage logs this step again
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "pretrain", "step": 100, "lo')
    report = write_report(folder, config, None)
    assert report["training"]["pretrain"]["step"] == [25, 50, 75]
    assert report["training"]["pretrain"]["loss"] == pytest.approx([0.36, 0.18, 0.5])
    assert report["training"]["refine"]["grad_norm"] == [None] * 3
    assert "NaN" not in (folder.path / "report.json").read_text()
    folder.close()


def test_steps_of_later_rounds_go_on_counting(tmp_path):
    folder, _ = make_run(tmp_path)
    for number, step in ((2, 25), (2, 50), (2, 50), (3, 25), (3, 50)):
        folder.record("refine", step=step, round=number, loss=float(step))
    curve = training_curves(folder)["refine"]
    assert curve["step"] == [25, 50, 75, 100, 125, 150, 175] and curve["loss"][3:] == [25, 50, 25, 50]
    folder.record("refine", step=25, round=1, loss=0.5)  # from another base policy: the later rounds are not its own
    assert training_curves(folder)["refine"]["step"] == [25, 50, 75]


def test_rounds_are_a_table_and_a_chart_once_there_are_two(tmp_path):
    folder, config = make_run(tmp_path)
    row = {"base_version": 1, "version": 2, "episodes": 8}
    folder.record("evaluate_round", round=0, arm="base", successes=3, low=0.1, high=0.7, **row)
    folder.record("evaluate_round", round=1, arm="refined", successes=6, low=0.4, high=0.9, **row)
    assert [r["round"] for r in write_report(folder, config, None)["rounds"]] == [0, 1]
    alone = Page(folder.report.read_text())
    assert "rounds" not in alone.tables  # the table of the arms says it
    folder.record("evaluate_round", round=2, arm="refined + planning", successes=7, low=0.5, high=1.0, **{**row, "version": 5})
    write_report(folder, config, None)
    page = Page(folder.report.read_text())
    assert len(pngs(page)) == len(pngs(alone)) + 1
    assert page.tables["rounds"][1:] == [
        ["0", "base", "2", "3/8", "37.5 %", "10.0 % to 70.0 %"], ["1", "refined", "2", "6/8", "75.0 %", "40.0 % to 90.0 %"],
        ["1", "rollouts collected", "", "3/6", "50.0 %", "18.8 % to 81.2 %"],
        ["2", "refined + planning", "5", "7/8", "87.5 %", "50.0 % to 100.0 %"]]
    folder.close()


def test_special_characters_are_escaped(tmp_path):
    folder, config = make_run(tmp_path, name='<script>alert("x")&')
    write_report(folder, config, None)
    text = folder.report.read_text()
    assert "script" not in Page(text).tags and "<b>ab12" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&amp;" in text and "&lt;b&gt;ab12&lt;/b&gt;" in text
    folder.close()


def test_episode_lost_since_the_evaluation_is_said_not_hidden(tmp_path):
    folder, config = make_run(tmp_path)
    names = json.loads((folder.path / "evaluation.json").read_text())["arms"]["base"]["episode_names"]
    paths = {s.name: s.path for s in folder.store().summaries()}
    with open(paths[names[0]], "r+b") as file:
        file.truncate(100)
    report = write_report(folder, config, None)
    assert report["missing_episodes"] == 1 and report["store"]["quarantined"] == 1
    assert report["values"]["evaluation, base"]["episodes"] == len(SEEDS) - 1
    assert "1 evaluated episodes are not in the store any more" in folder.report.read_text()
    folder.close()


def test_commands_repeat_the_settings(tmp_path):
    folder, _ = make_run(tmp_path, name="it's mine")
    config = RunConfig(name="it's mine", root=str(tmp_path), eval_episodes=8, seed=3, sim=SimConfig(placement=0.05, wrist_cameras=()))
    report = write_report(folder, config, None)
    for entry in report["commands"]:
        words = shlex.split(entry["command"])
        assert words[:3] == ["python", "-m", "cosmos_ray"]
        flags = {k: v for k, v in vars(make_parser().parse_args(words[3:])).items() if k in SETTINGS}
        again = new_config(parse_values({**flags, "repeat": None, "plan_seed": None}))
        assert again == config
    assert report["commands"][1]["command"].endswith("--repeat 5")
    folder.close()


# ---------------------------------------------------------------- filmstrip


@pytest.mark.parametrize("decisions, candidates, cameras", [(1, 1, CAMERAS[:1]), (3, 8, CAMERAS), (20, 64, CAMERAS)])
def test_filmstrip_is_drawn_and_saved(tmp_path, decisions, candidates, cameras):
    trace = make_trace(decisions, candidates, cameras)
    figure = draw_filmstrip(trace)
    assert isinstance(figure, Figure)
    images = [axis for axis in figure.axes if axis.images]
    assert len(images) == 3 * len(cameras) * min(decisions, 8)
    save_filmstrip(trace, tmp_path / "strip.png")
    saved = cv2.imread(str(tmp_path / "strip.png"))
    assert saved.shape[1] > 1500 and [p.name for p in tmp_path.iterdir()] == ["strip.png"]


def test_filmstrip_pairs_imagined_with_what_happened():
    trace = make_trace(12)
    shown = [axis.images[0].get_array() for axis in draw_filmstrip(trace).axes if axis.images]
    for column, index in enumerate(pick(12, 8)):
        for camera in range(2):
            cells = shown[6 * column + 3 * camera :][:3]
            for cell, frames in zip(cells, (trace.observed, trace.imagined, trace.happened), strict=True):
                assert np.array_equal(cell, frames[index][camera])


def test_picked_decisions_keep_both_ends():
    assert pick(3, 8) == [0, 1, 2] and pick(1, 8) == [0]
    for count in (9, 20, 100):
        chosen = pick(count, 8)
        assert len(chosen) == 8 and chosen[0] == 0 and chosen[-1] == count - 1


def test_filmstrip_of_no_decision_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no decision"):
        save_filmstrip(make_trace(0), tmp_path / "strip.png")
