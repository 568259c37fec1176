"""Minutes of `refine` on two Ray nodes under a schedule of faults that a seed draws, and the tally of what is left.

    python jobs/chaos/schedule.py --minutes 10 --seed 1

A fault comes once every part has shown that it works: a part is killed or stopped for some seconds, the second node drops out, the
cluster's control store is killed, the newest learner state is torn before the learner dies, or the disk of the run is full for some
seconds. The control store needs `redis-server`, the full disk the right to mount; without them these faults are left out, which the job
says. Prints a line for each fault; the exit status is 1 if anything was lost, doubled, damaged or trained never, did not recover, or if a
stall of more than ten seconds was not explained by the command itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import psutil  # noqa: E402

from jobs.chaos.cells import Campaign  # noqa: E402
from jobs.chaos.loop import make_run, print_books  # noqa: E402
from jobs.chaos.nodes import environment, free_port, kill  # noqa: E402
from jobs.chaos.watch import Books, Command, Stuck, rows  # noqa: E402

HELD_S = 15.0  #: that a part stands still, a node is away, the disk is full
STALL_S = 10.0  #: after which the command must say what it waits for
DISK_MB = 1500  #: of the disk that becomes full
STOPPED = ("rollout worker", "simulator child", "inference actor", "learner rank", "driver")
KILLED = ("rollout worker", "simulator child", "inference actor", "learner rank", "driver")
SAYS = ("waiting for", "goes on after", " died (", "run the same command again", "is not whole", "No space left")


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    part: str = ""
    recovered: bool = False
    seconds: float = float("nan")  #: from its end until every part worked again
    restarted: bool = False  #: the command had ended, and was started again
    explained: bool = True  #: the command said what a stall was
    problem: str = ""


@dataclass
class Tally:
    """All faults, and the books at the end."""

    faults: list[Fault] = field(default_factory=list)
    books: Books | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return bool(self.faults) and self.books is not None and self.books.right and all(f.recovered and f.explained for f in self.faults)


class Schedule(Campaign):
    """Faults on one run; use it with ``with``. ``disk`` is where the run lies on a disk of its own, ``redis`` keeps the control store."""

    def __init__(self, run: Path, work: Path, disk: Path | None, redis: str):
        super().__init__(run, work)
        self.disk, self.nodes.redis = disk, redis
        self._faults: dict[str, Callable[[random.Random, Fault], None]] = {
            "kill": self.kill_part, "stop": self.stop_part, "node away": self.node_away, "torn state": self.torn_state,
            **({"control store": self.control_store} if redis else {}), **({"full disk": self.full_disk} if disk else {})}

    def fault(self, kind: str, rng: random.Random) -> Fault:
        """Bring one fault about and wait until every part works again."""
        fault = Fault(kind)
        try:
            self.ready()
            time.sleep(rng.uniform(0.5, 4.0))
            began, said = time.time(), len(self.command.log.read_text())
            told = len(rows(self.run, "death")) + len(rows(self.run, "wait"))
            log = self.command.log
            self._faults[kind](rng, fault)
            ended = time.time()
            fault.restarted = self.ready(ended)
            fault.recovered, fault.seconds = True, time.time() - ended
            own = fault.part == "driver"  # it could not say anything
            words = log.read_text()[said:]
            fault.explained = own or time.time() - began < HELD_S + STALL_S or any(word in words for word in SAYS) or len(
                rows(self.run, "death")) + len(rows(self.run, "wait")) > told
        except (Stuck, subprocess.TimeoutExpired, RuntimeError) as stuck:
            fault.problem = str(stuck)
        return fault

    def ready(self, after: float = 0.0) -> bool:
        """Wait until every part works, after ``after``; whether the command had to be started again."""
        after, again = after or time.time(), False
        while True:
            if self.command is None or self.command.ended():
                again, self.command = self.command is not None, Command(self.nodes, self.run, "refine", *self.flags)
            try:
                self.wait_for_all(after)
                return again
            except Stuck:
                if not self.command.ended():
                    raise

    # ---------------------------------------------------------------- faults

    def kill_part(self, rng: random.Random, fault: Fault) -> None:
        """SIGKILL."""
        fault.part = rng.choice(KILLED)
        self._strike(fault.part, self._victims(fault.part, 0) if fault.part != "driver" else set())
        if fault.part == "driver":
            self.command.driver.wait()

    def stop_part(self, rng: random.Random, fault: Fault) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        fault.part = rng.choice(STOPPED)
        process = psutil.Process(self.command.driver.pid) if fault.part == "driver" else rng.choice(self._of(fault.part))
        process.suspend()
        time.sleep(HELD_S)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have been replaced
            process.resume()

    def node_away(self, rng: random.Random, fault: Fault) -> None:
        """The raylet of the second node dies; another node joins later."""
        self.nodes.kill_second_raylet()
        time.sleep(HELD_S)
        self.nodes.second.kill()
        self.nodes.add_second()

    def control_store(self, rng: random.Random, fault: Fault) -> None:
        """The cluster's control store dies and starts again from Redis."""
        self.nodes.restart_gcs()

    def torn_state(self, rng: random.Random, fault: Fault) -> None:
        """The newest learner state loses half of a file, then a rank dies."""
        states = sorted((self.run / "learner").rglob("step_*"), key=lambda state: state.name)
        with contextlib.suppress(FileNotFoundError):  # a newer state may just replace it
            for largest in sorted((states[-1].glob("*.safetensors") if states else ()), key=lambda file: file.stat().st_size)[-1:]:
                os.truncate(largest, largest.stat().st_size // 2)
        fault.part = "learner rank"
        kill(self._of("learner rank")[:1])

    def full_disk(self, rng: random.Random, fault: Fault) -> None:
        """No byte is left where the run lies, for a while."""
        ballast = self.disk / "ballast"
        try:
            with contextlib.suppress(OSError), open(ballast, "wb") as file:
                while True:
                    file.write(b"\0" * (1 << 20))
            time.sleep(HELD_S)
        finally:
            ballast.unlink()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of :data:`DISK_MB` at ``folder``; None without the right to mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Address of a Redis server; "" where there is none."""
    server = shutil.which("redis-server")
    if server is None:
        yield ""
        return
    port = free_port()
    process = subprocess.Popen([server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)], env=environment(),
                               stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def play(made: Path, work: Path, minutes: float, seed: int, say: Callable[[Fault], None] = lambda fault: None) -> Tally:
    """Faults for ``minutes`` on a copy of the run ``made``: first one of each kind in a drawn order, then any. Then the run comes to its
    end, and the books are balanced."""
    rng, tally = random.Random(seed), Tally()
    with small_disk(work / "disk") as disk, redis_server(work) as redis:
        run = (disk or work / "runs") / made.name
        shutil.copytree(made, run, symlinks=True)
        tally.left_out = [*([] if disk else ["full disk"]), *([] if redis else ["control store"])]
        with Schedule(run, work, disk, redis) as schedule:
            kinds = list(schedule._faults)
            rng.shuffle(kinds)
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end:
                tally.faults.append(schedule.fault(kinds.pop() if kinds else rng.choice(list(schedule._faults)), rng))
                say(tally.faults[-1])
                if not tally.faults[-1].recovered:
                    break
            schedule.ready()
            schedule.finish()
            tally.books = Books.of(run, whole=True)
    return tally


def show(fault: Fault) -> None:
    outcome = "recovered" if fault.recovered else "NOT RECOVERED"
    print(f"{fault.kind:<14} {fault.part:<16} {outcome:<14} {fault.seconds:6.1f} s  "
          f"{'explained' if fault.explained else 'NOT EXPLAINED'}{'  (command started again)' if fault.restarted else ''}", flush=True)
    if fault.problem:
        print("    " + fault.problem.strip().replace("\n", "\n    "), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults; the start and the end of the run come on top [10]")
    parser.add_argument("--seed", type=int, default=0, help="draws the schedule [0]")
    parser.add_argument("--run", type=Path, help="folder of a run with rollouts, of which a copy is worked on; made when left out")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        work = Path(folder).resolve()
        tally = play((arguments.run or make_run(work / "made")).resolve(), work, arguments.minutes, arguments.seed, show)
    assert tally.books is not None
    print_books(tally.books)
    counted = Counter(fault.kind for fault in tally.faults)
    recovered, silent = sum(fault.recovered for fault in tally.faults), sum(not fault.explained for fault in tally.faults)
    print(f"{len(tally.faults)} faults ({', '.join(f'{n} {kind}' for kind, n in counted.items())}), {recovered} recovered, "
          f"{silent} stalls not explained" + (f"; left out here: {', '.join(tally.left_out)}" if tally.left_out else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(dataclasses.asdict(tally), indent=1) + "\n")
    return 0 if tally.right else 1


if __name__ == "__main__":
    sys.exit(main())
