"""Writers, readers and maintenance on one store, killed at random instants and started again, and the tally of what is left."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.files.durable import TEMPORARY
from cosmos_ray.replay.upkeep.repair import Repair, Verification, repair, verify
from jobs.chaos.child import Child
from jobs.chaos.episodes import difference, draw_and_check, key_of, make_episode, number_of, open_sampler

#: What a maintenance process does besides opening and refreshing. Each has to be safe beside writers and readers, and when it is
#: killed, and answers with what it found wrong, or "".
OPERATIONS: dict[str, Callable[[ReplayStore], str]] = {
    "save_manifest": lambda store: str(store.save_manifest() or ""),
    "verify": lambda store: problems_of(verify(store)),
    "repair": lambda store: problems_of(repair(store.root)),
    "evict": lambda store: store.evict([name for name in store.keys() if expendable(number_of(name))][:5], "chaos") and "",
}

PAUSES = {"writer": 0.03, "reader": 0.3, "maintenance": 1.0}  # seconds, at most, between what is waited for and the kill
REPORTS = {"writer": 6, "reader": 2, "maintenance": 2}  # at most so many lines of a process are waited for before


def expendable(number: int) -> bool:
    """Episodes that maintenance may evict; nobody else may lose one."""
    return number % 11 == 5


def problems_of(found: Verification | Repair) -> str:
    """The damage that verify found or repair put away. Killed processes leave strays and files of evicted episodes, which is none."""
    problems = found.problems if isinstance(found, Verification) else found.quarantined
    return "; ".join(f"{p.path} {p.fault}: {p.reason}" for p in problems if p.fault not in ("stray", "evicted"))


def refuse_unnamed_files() -> None:
    """From here on this process has a file system without O_TMPFILE, as NFS is: it writes to temporary names."""
    opened = os.open

    def refuse(path, flags, *arguments, **keywords):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return opened(path, flags, *arguments, **keywords)

    os.open = refuse


@dataclass
class KillTally:
    """What was done and what went wrong; every count under ``violations`` must be 0."""

    kills: Counter = field(default_factory=Counter)
    starts: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)
    acknowledged: int = 0  # different keys
    commits: int = 0  # acknowledgements
    reply_lost: int = 0  # episodes whose writer was killed between the commit and its acknowledgement
    evicted: int = 0
    stray_temporaries: int = 0  # found and quarantined
    seconds: float = 0.0
    violations: Counter = field(default_factory=lambda: Counter(dict.fromkeys(
        ("acknowledged episodes lost", "duplicates", "vanished for a reader", "crashes", "wrong content", "torn files visible",
         "strays not quarantined"), 0)))
    details: list[str] = field(default_factory=list)

    def violation(self, rule: str, detail: str) -> None:
        self.violations[rule] += 1
        self.details.append(f"{rule}: {detail}")

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Slot:
    """The place of one process at a time: what it does next, and when it is killed."""

    def __init__(self, role: str, number: int) -> None:
        self.role, self.number = role, number
        self.position = 0  # writers: index of the next episode in their sequence
        self.furthest = 0  # writers: how many of the sequence were acknowledged, also before they were set back
        self.child: Child | None = None
        self.taken = 0  # lines of the child that are noted
        self.reports = 0
        self.kill_at: float | None = None

    def plan(self, rng: random.Random) -> None:
        """Choose the instant of the kill: a pause after the n-th report, or after the start."""
        self.reports = rng.choice((0, *range(1, REPORTS[self.role] + 1)))
        self.pause = rng.uniform(0, PAUSES[self.role])
        self.kill_at = None
        self.heard(0)

    def heard(self, reports: int) -> None:
        self.reports -= reports
        if self.reports <= 0 and self.kill_at is None:
            self.kill_at = time.monotonic() + self.pause


class KillRun:
    """The run itself. Writers come in pairs: both of a pair offer the same episodes in the same order."""

    def __init__(self, root: Path, seed: int, *, writers: int = 4, readers: int = 2, maintenance: int = 2) -> None:
        self.root, self.rng = root, random.Random(seed)
        self.log = str(root.with_name(root.name + ".log"))
        self.tally = KillTally()
        self.new: Counter[int] = Counter()  # episode -> how often it was acknowledged as new
        self.acknowledged: set[int] = set()
        self.slots = [Slot(role, i) for role, n in (("writer", writers + writers % 2), ("reader", readers), ("maintenance", maintenance))
                      for i in range(n)]
        self.writers = [slot for slot in self.slots if slot.role == "writer"]
        ReplayStore(root)

    def run(self, kills: int) -> KillTally:
        """Kill until ``kills`` writers and readers are killed (maintenance besides), let the writers finish, and count."""
        started = time.monotonic()
        for slot in self.slots:
            self._start(slot)
        shown = 0
        while (done := self.tally.kills["writer"] + self.tally.kills["reader"]) < kills:
            self._listen()
            now = time.monotonic()
            for slot in self.slots:
                if slot.child.ended():
                    self._crashed(slot)
                elif slot.kill_at is not None and slot.kill_at <= now:
                    self._kill(slot)
                else:
                    continue
                self._start(slot)
            if done >= shown + 50:
                shown = done
                print(f"kills {done}/{kills}, {len(self.acknowledged)} episodes, {now - started:.0f} s", file=sys.stderr)
            if self.tally.violations["crashes"] > 20 + kills:
                break  # nothing works: the first ones say why
        for slot in self.slots:
            self._kill(slot)
        self._finish()
        self.count()
        self.tally.seconds = round(time.monotonic() - started, 1)
        return self.tally

    # ---------------------------------------------------------------- processes

    def _start(self, slot: Slot) -> None:
        seed = self.rng.getrandbits(32)
        if slot.role == "writer":
            # Half of the time beside its partner, over what both have offered: they race for keys, and repeat old commits.
            partner = self.writers[slot.number ^ 1]
            start = min(slot.position, partner.position) if self.rng.random() < 0.5 else slot.position
            slot.position = start
            work = self._writer(slot, start, None)
        elif slot.role == "reader":
            work = self._reader(seed)
        else:
            work = self._maintenance(seed)
        self.tally.starts[slot.role] += 1
        self._fork(slot, work)
        slot.plan(self.rng)

    def _fork(self, slot: Slot, work: Callable) -> None:
        slot.child, slot.taken = Child(work, self.log), 0

    def _episode(self, slot: Slot, position: int) -> int:
        """Episodes of one pair of writers are those of one remainder."""
        pairs = len(self.writers) // 2
        return position * pairs + slot.number // 2

    def _writer(self, slot: Slot, start: int, stop: int | None) -> Callable:
        def work(say: Callable[[str], None]) -> None:
            if slot.number % 2:
                refuse_unnamed_files()
            store = ReplayStore(self.root, create=False)
            position = start
            while stop is None or position < stop:
                number = self._episode(slot, position)
                say(f"committed {position} {number} {int(store.commit(make_episode(number)))}")
                position += 1

        return work

    def _reader(self, seed: int) -> Callable:
        def work(say: Callable[[str], None]) -> None:
            rng = random.Random(seed)
            store = ReplayStore(self.root, create=False)
            sampler = open_sampler(store, seed)
            before: set[str] = set()
            while True:
                sampler.refresh()
                names = store.keys()
                for name in before.difference(names):
                    if not expendable(number_of(name)):
                        sampler.refresh()
                        say(f"vanished {name}, {'' if name in store.keys() else 'not '}back after another refresh")
                before = set(names)
                wrong = draw_and_check(sampler, 8)
                for name in rng.sample(names, min(6, len(names))):
                    try:
                        wrong = wrong or difference(store.read(name), number_of(name))
                    except StoreError as error:
                        if not (expendable(number_of(name)) and isinstance(error.__cause__, FileNotFoundError)):
                            raise
                say(f"wrong {wrong}" if wrong else f"read {len(names)}")

        return work

    def _maintenance(self, seed: int) -> Callable:
        def work(say: Callable[[str], None]) -> None:
            rng = random.Random(seed)
            while True:
                store = ReplayStore(self.root, create=False)
                store.refresh()
                say("did refresh")
                for name in ("save_manifest", *rng.sample(sorted(OPERATIONS), 2)):
                    wrong = OPERATIONS[name](store)
                    say(f"wrong {name}: {wrong}" if wrong else f"did {name}")

        return work

    # ---------------------------------------------------------------- what they report

    def _listen(self) -> None:
        """Take in reports until one arrives, a kill is due, or for 50 ms at most."""
        due = min((slot.kill_at for slot in self.slots if slot.kill_at is not None), default=time.monotonic() + 0.05)
        ready, _, _ = select.select([slot.child.pipe for slot in self.slots], [], [], min(0.05, max(0.0, due - time.monotonic())))
        for slot in self.slots:
            if slot.child.pipe in ready:
                slot.child.read()
                slot.heard(self._take(slot))

    def _take(self, slot: Slot) -> int:
        """Note the lines of this slot's process that were not noted yet; how many."""
        lines = slot.child.lines[slot.taken :]
        slot.taken += len(lines)
        for line in lines:
            what, _, rest = line.partition(" ")
            if what == "committed":
                position, number, new = map(int, rest.split())
                self.tally.commits += 1
                self.acknowledged.add(number)
                self.new[number] += new
                slot.position = max(slot.position, position + 1)
                slot.furthest = max(slot.furthest, position + 1)
            elif what == "wrong":
                self.tally.violation("wrong content", f"found while writers run: {rest}")
            elif what == "vanished":
                self.tally.violation("vanished for a reader", rest)
            elif what == "did":
                self.tally.operations[rest] += 1
        return len(lines)

    def _kill(self, slot: Slot) -> None:
        if slot.child.kill():
            self._take(slot)
            self.tally.kills[slot.role] += 1
        else:
            self._crashed(slot)

    def _crashed(self, slot: Slot) -> None:
        self._take(slot)
        self.tally.violation("crashes", f"{slot.role} ended by itself: {slot.child.error()}")

    def _finish(self) -> None:
        """Let every writer offer what its partner has offered and it has not, undisturbed."""
        for slot in self.writers:
            stop = max(slot.furthest, self.writers[slot.number ^ 1].furthest)
            self._fork(slot, self._writer(slot, slot.position, stop))
        for slot in self.writers:
            while not slot.child.ended():
                select.select([slot.child.pipe], [], [], 0.05)
                slot.child.read()
            self._take(slot)
            if slot.child.status != 0:
                self._crashed(slot)

    # ---------------------------------------------------------------- the tally

    def count(self) -> None:
        """Compare what lies in the store with what was acknowledged."""
        tally = self.tally
        tally.acknowledged = len(self.acknowledged)
        store = ReplayStore(self.root, create=False, stray_seconds=0.0)
        names = [summary.name for summary in store.refresh()]
        for name, count in Counter(names).items():
            if count > 1:
                tally.violation("duplicates", f"{name} is listed {count} times")
        for stem, count in Counter(path.stem for path in (self.root / "episodes").rglob("*.arrow")).items():
            if count > 1:
                tally.violation("duplicates", f"{count} files are named {stem}")
        for number, count in self.new.items():
            if count > 1:
                tally.violation("duplicates", f"{key_of(number).name} was acknowledged as new {count} times")
        found = {number_of(name) for name in names}
        for number in sorted(self.acknowledged - found):
            if expendable(number) and store.evicted(key_of(number).name) is not None:
                tally.evicted += 1
            else:
                tally.violation("acknowledged episodes lost", key_of(number).name)
        tally.reply_lost = sum(not self.new[number] for number in found)
        for name in names:
            try:
                wrong = difference(store.read(name), number_of(name))
            except StoreError as error:
                wrong = str(error)
            if wrong:
                tally.violation("wrong content", f"{name}: {wrong}")
        self._count_strays(store)

    def _count_strays(self, store: ReplayStore) -> None:
        for entry in store.quarantine.entries():
            if entry["file"].endswith(TEMPORARY):
                self.tally.stray_temporaries += 1
            else:
                self.tally.violation("torn files visible", json.dumps(entry))
        for path in (self.root / "episodes").rglob("*"):
            if not path.is_dir() and path.suffix != ".arrow":
                self.tally.violation("strays not quarantined", os.fspath(path))
