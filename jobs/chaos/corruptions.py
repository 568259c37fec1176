"""Copies of a healthy store, each damaged in one way, and what a reader makes of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.format.schema import NewerSchema
from cosmos_ray.replay.upkeep.repair import repair, verify
from jobs.chaos import damage_bytes, damage_content, damage_places  # noqa: F401 - they fill FAULTS
from jobs.chaos.case import FAULTS, Case
from jobs.chaos.child import Child
from jobs.chaos.episodes import difference, draw_and_check, key_of, make_episode, number_of, open_sampler

EPISODES = 12
EVICTED = 2  # beyond these, where a store can evict
MEMORY = 4 << 30  # bytes of address space a reader may take
SECONDS = 30  # of its own computing
WALL_SECONDS = 120.0  # and of waiting for something: long, because a machine may be busy with other work
DRAWS = 3
LONGEST = 2000  # characters of one error or reason


@dataclasses.dataclass
class Failure:
    fault: str
    seed: int
    file: str
    problems: list[str]


@dataclasses.dataclass
class CorruptionTally:
    cases: int = 0
    faults: int = 0  # different ones
    named: int = 0  # reported by the name of the file
    harmless: int = 0  # every episode read bit for bit the same
    seconds: float = 0.0
    failures: list[Failure] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


class CorruptionRun:
    """``only`` restricts the run to one fault. Case ``i`` depends on ``seed + i`` and its fault alone."""

    def __init__(self, work: Path, seed: int, only: str | None = None) -> None:
        self.work, self.seed = work, seed
        self.log = str(work.with_name(work.name + ".log"))
        self.faults = [only] if only else random.Random(0).sample(sorted(FAULTS), len(FAULTS))
        work.mkdir(parents=True)
        self._run(lambda say: say(json.dumps(build_stores(work))), "building the healthy stores")
        self.stores: dict[str, dict[str, str]] = json.loads(self._output)

    def run(self, cases: int) -> CorruptionTally:
        """Damage and read ``cases`` copies, the faults in turn."""
        tally, started = CorruptionTally(faults=min(cases, len(self.faults))), time.monotonic()
        for number in range(cases):
            self.one(self.faults[number % len(self.faults)], self.seed + number, tally)
            if (number + 1) % 50 == 0:
                spent = time.monotonic() - started
                print(f"corruptions {number + 1}/{cases}, {len(tally.failures)} violations, {spent:.0f} s", file=sys.stderr)
        tally.seconds = round(time.monotonic() - started, 1)
        return tally

    def one(self, fault: str, seed: int, tally: CorruptionTally) -> None:
        """One case, which is added to ``tally``."""
        rng = random.Random(f"{fault}/{seed}")
        variant = rng.choice(sorted(self.stores))
        paths = self.stores[variant]  # episode -> its file, relative to the store
        root = self.work / f"case-{fault}-{seed}"
        shutil.copytree(self.work / variant, root, symlinks=True)
        case = Case(rng, root, root / rng.choice(sorted(set(paths.values()))))
        problems = self._run(lambda say: say(json.dumps(damage(fault, case))), f"damaging ({fault})", limited=False)
        if problems:
            raise RuntimeError(f"{fault} with seed {seed} cannot do its damage: {problems[0]}")
        made = json.loads(self._output)
        victims = [name for name, path in paths.items() if path == made["file"] and made["about"] == "episode"]
        problems = self._run(lambda say: say(json.dumps(examine(root, list(paths), victims, rng))), "reading")
        named = False
        if not problems:
            named, problems = judge(made, json.loads(self._output), list(paths), victims)
        tally.cases += 1
        tally.named += named and not problems
        tally.harmless += not named and not problems
        if problems:
            tally.failures.append(Failure(fault, seed, f"{made['file']} of the {variant} store", problems))
        shutil.rmtree(root)

    def _run(self, work: Callable, what: str, limited: bool = True) -> list[str]:
        """Do it in a child; what went wrong, if anything. Its last line is ``_output``."""
        def within_limits(say: Callable[[str], None]) -> None:
            if limited:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            work(say)

        child, started = Child(within_limits, self.log), time.monotonic()
        while not child.ended():
            select.select([child.pipe], [], [], 0.02)
            child.read()
            if time.monotonic() - started > WALL_SECONDS and child.kill():
                return [f"{what} hangs: not done after {WALL_SECONDS:.0f} s"]
        if child.status in (-signal.SIGXCPU, -signal.SIGKILL):
            return [f"{what} hangs: not done after {SECONDS} s of computing"]
        if child.status != 0:
            return [f"{what} crashed the process: {child.error()}"]
        self._output = child.lines[-1]
        return []


def scratch_directory() -> str | None:
    """A file system in memory, if there is one: nothing here is worth an fsync."""
    memory = "/dev/shm"
    return memory if os.path.isdir(memory) and os.access(memory, os.W_OK) else None


def build_stores(work: Path) -> dict[str, dict[str, str]]:
    """Healthy stores in ``work``, and for each where its episodes lie: as written, and with a manifest that is relied upon and a few
    evictions."""
    paths = {}
    for variant in ("plain", "indexed"):
        store = ReplayStore(work / variant)
        for number in range(EPISODES + EVICTED * (variant != "plain")):
            store.commit(make_episode(number))
        store.evict([key_of(number).name for number in range(EPISODES, EPISODES + EVICTED)], "chaos")
        for path in (work / variant).rglob("*"):
            if path.is_dir():
                os.utime(path, (1_600_000_000, 1_600_000_000))  # long settled: what the manifest knows is not listed again
        store = ReplayStore(work / variant)
        store.refresh()
        if variant != "plain":
            store.save_manifest()
        paths[variant] = {s.name: str(Path(s.path).relative_to(work / variant)) for s in store.summaries()}
    return paths


def damage(fault: str, case: Case) -> dict:
    """Do the damage; what has to come of it, as plain values."""
    FAULTS[fault](case)
    file = os.path.relpath(case.path, case.root)
    return {"file": file, "about": case.about, "foreign": case.foreign, "log_counts": case.log_counts, "valid": case.valid}


def describe(step: str, error: Exception) -> dict:
    """What was raised in ``step``, as plain values; the end of the traceback where it is not an error for users."""
    text, expected = str(error), isinstance(error, StoreError)
    return {
        "step": step,
        "expected": expected,
        "text": text[:LONGEST],
        "length": len(text),
        "lines": text.count("\n") + 1,
        "missing": isinstance(error.__cause__, FileNotFoundError),
        "newer": isinstance(error, NewerSchema),
        "traceback": "" if expected else "".join(traceback.format_exception(error, limit=-3))[-1200:].strip(),
    }


class Examination:
    """A reader of a damaged store, and everything it met."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.errors: list[dict] = []  # what was raised
        self.read: dict[str, list[str]] = {}  # episode -> "same", the field that differs, or "error", of every attempt
        self.wrong: list[str] = []
        self.logged: list[str] = []

    def as_dict(self) -> dict:
        return {"errors": self.errors, "read": self.read, "wrong": self.wrong, "logged": self.logged}

    def attempt(self, step: str, work: Callable[[], object]) -> object:
        """The result of ``work``, or None; what it raises is noted."""
        try:
            return work()
        except Exception as error:
            self.errors.append(describe(step, error))
            return None

    def read_all(self, store: ReplayStore, names: list[str]) -> None:
        for name in names:
            episode = self.attempt(f"read {name}", lambda name=name: store.read(name))
            self.read.setdefault(name, []).append("error" if episode is None else difference(episode, number_of(name)) or "same")

    def draw(self, store: ReplayStore, seed: int) -> None:
        sampler = self.attempt("open the sampler", lambda: open_sampler(store, seed))
        for turn in range(DRAWS if sampler is not None else 0):
            wrong = self.attempt(f"draw {turn}", lambda: draw_and_check(sampler, 24))
            if wrong:
                self.wrong.append(str(wrong))


def examine(root: Path, names: list[str], victims: list[str], rng: random.Random) -> dict:
    """Everything a reader does with a store, in either order, and what it met, as plain values."""
    seen = Examination(root)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.logged.append(record.getMessage()[:LONGEST])
    logging.getLogger().addHandler(handler)
    try:
        return _examine(seen, root, names, victims, rng)
    finally:
        logging.getLogger().removeHandler(handler)


def _examine(seen: Examination, root: Path, names: list[str], victims: list[str], rng: random.Random) -> dict:
    report = {"opened": False, "entries": [], "new": {}, "verified": None, "unknown": []}
    store = seen.attempt("open the store", lambda: ReplayStore(root, create=False))
    if store is None:
        seen.attempt("open the store to write", lambda: ReplayStore(root))
        return report | seen.as_dict()
    report["opened"] = True
    if rng.random() < 0.5:
        found = seen.attempt("verify", lambda: verify(store, decode=True))
        report["verified"] = [[problem.path, problem.fault, problem.reason[:LONGEST]] for problem in found.problems] if found else None
    seen.attempt("refresh", store.refresh)
    reads = [lambda: seen.draw(store, 0), lambda: seen.read_all(store, names)]
    for read in rng.sample(reads, 2):
        read()
    # A second process; the keys of what was damaged are free for another commit.
    store = seen.attempt("open the store again", lambda: ReplayStore(root, create=False)) or store
    seen.attempt("refresh again", store.refresh)
    for name in victims:
        report["new"][name] = seen.attempt(f"commit {name}", lambda name=name: store.commit(make_episode(number_of(name))))
    seen.draw(store, 1)
    seen.read_all(store, names)
    report["entries"] = seen.attempt("list the quarantine", store.quarantine.entries) or []
    report["unknown"] = sorted(set(store.keys()) - set(names))
    # What repair makes of the damaged file is its own matter; the others must come out of it as they went in.
    seen.attempt("repair", lambda: repair(root))
    store = seen.attempt("open the store after repair", lambda: ReplayStore(root, create=False)) or store
    seen.attempt("refresh after repair", store.refresh)
    seen.read_all(store, [name for name in names if name not in victims])
    return report | seen.as_dict()


def judge(made: dict, report: dict, names: list[str], victims: list[str]) -> tuple[bool, list[str]]:
    """Whether the damage was named, and what was wrong."""
    problems, shown = [], set()
    for error in report["errors"]:
        if not error["expected"]:
            if error["traceback"] not in shown:
                problems.append(f"{error['step']} raised another error than StoreError:\n{error['traceback']}")
            shown.add(error["traceback"])
        elif error["lines"] > 1 or error["length"] > LONGEST:
            problems.append(f"{error['step']}: the message is not one short line but {error['lines']} lines, {error['length']} characters: "
                            f"{error['text'][:200]!r}")
    if not report["opened"]:
        named = made["about"] == "marker" and all("store.json" in error["text"] for error in report["errors"])
        if not named:
            problems += [f"the store does not open: {error['text'][:300]}" for error in report["errors"][:1]]
        return named, problems
    problems += [f"drawn: {wrong}" for wrong in report["wrong"][:2]]
    problems += judge_healthy(report, [name for name in names if name not in victims])
    marks = {os.path.basename(made["file"]), *victims}
    named = is_named(report, marks, made["log_counts"])
    for name in victims:
        problems += judge_victim(name, made, report, named)
    reported = [entry for entry in report["entries"] if isinstance(entry, dict)]
    for foreign in made["foreign"]:
        if not any(foreign in str(entry.get("file", "")) for entry in reported):
            problems.append(f"the foreign {foreign!r} is not in the quarantine's list; logged: {report['logged'][:2]}")
        named = True
    for entry in reported:
        if len(str(entry.get("reason", ""))) > LONGEST:
            problems.append(f"a reason of {len(entry['reason'])} characters in the quarantine's list: {entry['reason'][:100]}")
    if report["unknown"]:
        problems.append(f"an episode that nobody committed is listed: {report['unknown'][:2]}")
    if report["verified"] is not None:
        problems += judge_verification(made, report, victims)
    # What cannot be drawn for ever must say of whom.
    last = [error for error in report["errors"] if error["step"] in (f"draw {DRAWS - 1}", "open the sampler")]
    problems += [f"draws are impossible: {error['text'][:300]}" for error in last[:1]]
    return named, list(dict.fromkeys(problems))


def judge_healthy(report: dict, healthy: list[str]) -> list[str]:
    problems: list[str] = []
    for name in healthy:
        if set(report["read"].get(name, ["never read"])) != {"same"}:
            said = [error["text"][:300] for error in report["errors"] if error["step"] == f"read {name}"]
            problems.append(f"the healthy {name} reads as {report['read'].get(name)} (at first, again, after repair) {said[:1]}")
    for error in report["errors"]:
        if error["step"].startswith("refresh"):
            problems.append(f"{error['step']} fails, so no new episode is found: {error['text'][:300]}")
    return problems[:3]


def judge_verification(made: dict, report: dict, victims: list[str]) -> list[str]:
    """Verify, which ran before anything was read, must know of what readers met, and of nothing else."""
    about = [os.path.basename(made["file"]), *made["foreign"], *victims]
    others = [problem for problem in report["verified"] if not any(mark in problem[0] for mark in about)]
    problems = [f"verify blames {path}, which is not damaged: {fault}, {reason[:200]}" for path, fault, reason in others[:1]]
    if any("error" in report["read"][name][:1] for name in victims) and len(others) == len(report["verified"]):
        problems.append("verify does not name the damaged file")
    return problems


def judge_victim(name: str, made: dict, report: dict, named: bool) -> list[str]:
    first, second = report["read"][name]
    if made["valid"] and named and first == made["valid"]:
        first = "same"  # only who decodes it can tell
    problems = []
    for turn, outcome in (("", first), (" after it was committed again", second)):
        if outcome not in ("same", "error"):
            problems.append(f"the damaged {name} is read{turn}, with another {outcome}")
    if first == "error" and not named:
        said = [error["text"][:200] for error in report["errors"] if error["step"] == f"read {name}"]
        problems.append(f"the damaged {name} is gone and nothing names it; {said[:1]}, logged: {report['logged'][:2]}")
    if second == "error":
        newer = any(error["newer"] for error in report["errors"] if error["step"] == f"read {name}")
        refused = any(error["step"] == f"commit {name}" for error in report["errors"])
        if not newer and not refused:
            problems.append(f"commit of {name} answers {report['new'][name]}, and the episode cannot be read")
    return problems


def is_named(report: dict, marks: set[str], log_counts: bool) -> bool:
    """Whether a quarantine entry or an error that is more than "no such file" has one of ``marks``."""
    texts = [str(entry.get("file", "")) + str(entry.get("reason", "")) for entry in report["entries"] if isinstance(entry, dict)]
    texts += [error["text"] for error in report["errors"] if error["expected"] and not error["missing"]]
    if log_counts:
        texts += report["logged"]
    return any(mark in text for mark in marks for text in texts)
