"""Rollout workers killed at a steady pace: how many episodes arrive, and how much of the throughput stays."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from jobs.chaos.cells import FLAGS, Campaign
from jobs.chaos.nodes import TwoNodes
from jobs.chaos.watch import Command, rows

#: Whole episodes, several at once, and as many training samples for a control step as the demo has.
LIKE_THE_DEMO = ["--rollout.envs-per-worker", "4", "--rollout.horizon", "160", "--replay.samples-per-insert", "5"]
NODE_AWAY_S = 20.0  #: until the node that was killed joins again


@dataclass
class Collected:
    """A `rollout` or an `evaluate` under kills."""

    wanted: int
    stored: int = 0
    doubled: int = 0
    killed: list[float] = field(default_factory=list)  #: when workers were killed, Unix seconds
    node_killed: float = 0.0
    deaths: list[dict] = field(default_factory=list)  #: rows "death" of the run's metrics
    unnamed: int = 0  #: deaths that the report does not name
    seconds: float = 0.0
    code: int | None = None

    @property
    def right(self) -> bool:
        return self.code == 0 and self.stored == self.wanted and not self.doubled and not self.unnamed and bool(self.node_killed) and len(
            self.deaths) >= len(self.killed) + 1


#: What a command plays: the flags for ``count`` episodes, and the class of these episodes in the store.
PLAYS = {"rollout": (lambda count: ["--rollouts", str(count)], "rollout"),
         "evaluate": (lambda count: ["--eval-episodes", str(count), "--arms", "base"], "eval")}


def stored(run: Path, kind: str) -> Counter[str]:
    """Files of the run's episodes of a class, by the name of the episode."""
    return Counter(file.stem for file in (run / "replay" / "episodes").glob(f"{kind}-*/**/*.arrow"))


def play_under_kills(run: Path, work: Path, stage: str, count: int, every_s: float, seed: int = 0) -> Collected:
    """`rollout` or `evaluate` until the store has ``count`` of its episodes, while a worker is killed every ``every_s`` seconds and the
    second node once."""
    flags, kind = PLAYS[stage]
    done, rng, before = Collected(count), random.Random(seed), len(rows(run, "death"))
    with TwoNodes(work / "nodes") as nodes:
        command = Command(nodes, run, stage, *FLAGS, *flags(count))
        already = len(stored(run, kind))
        command.until("first episode", lambda: len(stored(run, kind)) > already)
        next_kill, back = time.monotonic() + every_s, 0.0
        while not command.ended():
            time.sleep(0.2)
            now = time.monotonic()
            if not done.node_killed and len(stored(run, kind)) > count / 3:
                nodes.kill_second_raylet()
                done.node_killed, back, next_kill = time.time(), now + NODE_AWAY_S, now + every_s
            elif back and now > back:
                nodes.second.kill()
                nodes.add_second()
                back = 0.0
            elif now > next_kill and (workers := command.actors("rollout worker")):
                rng.choice(workers).send_signal(signal.SIGKILL)
                done.killed.append(time.time())
                next_kill = now + every_s
        done.code, done.seconds = command.driver.returncode, round(time.time() - command.began, 1)
        if done.code:
            print(command.said())
        report = Command(nodes, run, "report")
        report.until("end of `report`", report.ended, ends=True)
    counted = stored(run, kind)
    done.stored, done.doubled = len(counted), sum(n - 1 for n in counted.values())
    done.deaths = rows(run, "death")[before:]
    page = (run / "report.html").read_text()
    done.unnamed = sum(row["who"] not in page for row in done.deaths)
    return done


@dataclass
class Throughput:
    """Learner steps and episodes a second, in windows with kills over those without, pair by pair."""

    pairs: list[dict[str, float]] = field(default_factory=list)

    def ratio(self, name: str) -> tuple[float, float, float]:
        """(median, smallest, largest) of the pairs' ratios."""
        ratios = [pair[name] for pair in self.pairs]
        return statistics.median(ratios), min(ratios), max(ratios)


def throughput(run: Path, work: Path, pairs: int, every_s: float) -> Throughput:
    """Of one long `refine`: windows of ``2 * every_s`` seconds in which a rollout worker is killed every ``every_s``, and others beside
    them."""
    done = Throughput()
    with Campaign(run, work, *LIKE_THE_DEMO) as campaign:
        campaign.begin()
        for number in range(pairs):
            rates = {}
            for killing in (False, True) if number % 2 else (True, False):
                campaign.wait_for_all(time.time())
                rates[killing] = _window(campaign, 2 * every_s, every_s if killing else 0.0)
            pair = {name: rates[True][name] / max(rates[False][name], 1e-9) for name in rates[True]}
            done.pairs.append(pair)
            print("  ".join(f"{name} {rates[True][name]:.2f}/s with kills, {rates[False][name]:.2f}/s without: {pair[name]:.2f}"
                            for name in pair), flush=True)
    return done


def _window(campaign: Campaign, seconds: float, every_s: float) -> dict[str, float]:
    began, next_kill = time.time(), time.time() if every_s else float("inf")
    while (now := time.time()) < began + seconds:
        if now >= next_kill and (workers := campaign.command.actors("rollout worker")):
            os.kill(workers[0].pid, signal.SIGKILL)
            next_kill += every_s
        time.sleep(0.1)
    steps = sum(p.name == "step" and began <= p.time < began + seconds for p in campaign.instants.update())
    episodes = [row for row in rows(campaign.run, "refine_episode") if began <= row["time"] < began + seconds]
    return {"learner steps": steps / seconds, "control steps": sum(row["length"] for row in episodes) / seconds}
