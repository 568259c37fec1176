"""The replay store's speed against other ways to keep the same episodes, and against the cost of decoding and of the disk.

    pip install -r jobs/requirements-bench.txt                   # the heavy competitors; those missing are left out
    python jobs/bench_replay.py --json replay.json               # some ten minutes on two cores
    python jobs/bench_replay.py --open-100k                      # also how long a store of 100,000 episodes takes to open

A sample is a random window: the frames at t and t + 16 of two cameras as uint8 RGB, 16 actions, proprioception at both ends and
the value. The same episodes (synthetic frames with the JPEG sizes of rendered scenes) are written once in every format, and what
the readers return is compared before anything is timed. Then each is timed in turn with ours, round after round, so that a
ratio compares neighbours in time; it is printed as the median over rounds with the smallest and the largest, and beside it that
of each side's fastest round: where the two are far apart, others used the machine and neither can be trusted. One thread, no
cache of decoded frames, everything in the page cache: storage formats and decoding are compared, not disks.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

sys.path[:0] = [os.getcwd(), os.path.dirname(os.path.abspath(__file__))]  # a job's working directory is the uploaded checkout

import bench_replay_formats as formats  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from bench_replay_formats import CHUNK, GAMMA, Batch, Window, write_durable, write_fsync  # noqa: E402

from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore, WindowBatch, WindowSampler, schema  # noqa: E402
from cosmos_ray.replay.codec import decode_into, decode_jpeg  # noqa: E402
from cosmos_ray.replay.loader import PrefetchLoader  # noqa: E402
from cosmos_ray.replay.sampler import WindowStream  # noqa: E402

MISSING = "not run: pip install -r jobs/requirements-bench.txt"
WRITERS, SHARDS = 8, 256
SETTLE_SECONDS = 11  # directories that changed in the last ten are not yet trusted to stay as they are
PSNR_FLOOR = 24.0  #: dB against the JPEG frames; below it a video reader returns other frames than the ones asked for

#: What the ratios should be: "<" at most, ">" at least.
WANTED = {"vs_hdf5_episode_jpeg": ">5", "vs_h5py_frame_jpeg": ">1.5", "vs_lance": ">1.5", "vs_lerobot_v3": ">10",
          "over_jpeg_decode": "<1.3", "commit_over_write_fsync": "<1.3", "eight_writers_of_fsync": ">0.8",
          "open_100000_episodes_s": "<2"}  # fmt: skip


def progress(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


class Report:
    """Prints each result as it comes and keeps the medians."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.results: dict[str, float] = {}

    def add(self, key: str, above: list[float], below: list[float], detail: str = "") -> None:
        """A ratio of seconds, one of each per round."""
        values = [a / b for a, b in zip(above, below, strict=True)]
        self.results[key] = statistics.median(values)
        wanted = WANTED.get(key, "").replace("<", "at most ").replace(">", "at least ")
        print(f"{key:<28} {self.results[key]:9.3f}  [{min(values):.3f}, {max(values):.3f}]  fastest {min(above) / min(below):.3f}  "
              f"{wanted:<13}  {detail}", flush=True)
        if self.path:
            Path(self.path).write_text(json.dumps(self.results, indent=1))

    def missing(self, key: str) -> None:
        print(f"{key:<28} {MISSING}", flush=True)


# ---------------------------------------------------------------- our side


def sampler_of(root: Path) -> WindowSampler:
    """The sampler as a learner has it, without the cache that would save it the decoding."""
    return WindowSampler(ReplayStore(root, create=False), chunk=CHUNK, gamma=GAMMA, seed=0, frame_cache_bytes=0)


def draw(sampler: WindowSampler, n: int) -> WindowBatch:
    """``n`` random windows."""
    return sampler.draw(n, "demo")


def stream(sampler: WindowSampler, n: int, threads: int) -> PrefetchLoader:
    """A loader of batches of ``n`` windows that ``threads`` threads make ahead; iterate over it and close it."""
    return PrefetchLoader(WindowStream(sampler, n, "demo"), threads=threads, depth=2 * threads)


def windows_of(batch: WindowBatch) -> list[Window]:
    """Which windows those are: a synthetic episode's seed is its number."""
    return [(int(name.rsplit("-", 3)[1]), int(t)) for name, t in zip(batch.episodes, batch.offsets, strict=True)]


# ---------------------------------------------------------------- timing


def timed(call, seconds: float, clock, average) -> float:
    """Seconds a call takes by ``clock``, the ``average`` over as many as fill ``seconds``."""
    calls, began = [], time.perf_counter()
    while time.perf_counter() - began < seconds or not calls:
        start = clock()
        call()
        calls.append(clock() - start)
    return average(calls)


def in_turn(first, second, options, average=statistics.median) -> tuple[list[float], list[float]]:
    """Seconds of the two calls in every round, each first in every other one.

    A round counts its median call, so that one that was interrupted by another program does not decide it.
    """
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(options.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            clock = time.process_time if options.cpu_time and average is statistics.median else time.perf_counter
            times[side].append(timed((first, second)[side], options.seconds, clock, average))
    return times


# ---------------------------------------------------------------- samples


def check_same(key: str, ours: WindowBatch, theirs: Batch) -> float:
    """SystemExit unless both sides return the same windows; PSNR in dB of the frames, inf where they are equal to the bit."""
    for name, value in theirs.items():
        mine = getattr(ours, name)
        same = value.shape == mine.shape and value.dtype == mine.dtype
        if not same or (not np.array_equal(value, mine) and "images" not in name):
            raise SystemExit(f"{key} returns other {name} than our store: there is nothing to compare")
    errors = [np.mean((theirs[name].astype(np.float32) - getattr(ours, name)) ** 2) for name in ("images", "future_images")]
    psnr = 10 * np.log10(255**2 / max(np.mean(errors), 1e-12)) if any(errors) else np.inf
    if psnr < (PSNR_FLOOR if "lerobot" in key else np.inf):
        raise SystemExit(f"{key} returns other frames than our store ({psnr:.1f} dB): there is nothing to compare")
    return float(psnr)


def bench_samples(options, report: Report, folder: Path, episodes: list[Episode], size: int, suffix: str) -> None:
    """Ours against every format that is there, and against decoding alone."""
    sampler, vectors, n = sampler_of(folder / "store"), formats.Vectors(episodes, size), options.batch
    rng, last = np.random.default_rng(1), {}

    def ours() -> None:
        last["batch"] = draw(sampler, n)

    def chosen() -> list[Window]:
        numbers = rng.integers(0, len(episodes), n)
        return [(int(e), int(rng.integers(episodes[e].length))) for e in numbers]

    for key, (reader, part, module) in formats.COMPETITORS.items():
        if not formats.installed(module):
            report.missing(key + suffix)
            continue
        progress(f"{size} px: {key}")
        theirs = reader(folder / part, vectors)
        ours()
        psnr = check_same(key, last["batch"], theirs.read(windows_of(last["batch"])))
        drawn = [chosen() for _ in range(50)]
        turn = iter(range(10**9))
        mine, other = in_turn(ours, lambda t=theirs, d=drawn, i=turn: t.read(d[next(i) % 50]), options)
        theirs.close()
        report.add(key + suffix, other, mine, f"{per_sample(mine, n)} to {per_sample(other, n)} us, "
                   + ("the same pixels" if np.isinf(psnr) else f"{psnr:.1f} dB, by PyAV"))

    memory = np.empty((size, size, 3), np.uint8)

    def decode_alone() -> None:
        for number, t in windows_of(last["batch"]):
            frames, future = episodes[number].frames, min(t + CHUNK, episodes[number].length)
            for jpeg in (*frames[t], *frames[future]):
                decode_into(jpeg, memory)

    progress(f"{size} px: decoding alone")
    ours()
    mine, decoding = in_turn(ours, decode_alone, options)
    report.add("over_jpeg_decode" + suffix, mine, decoding, f"{per_sample(mine, n)} over {per_sample(decoding, n)} us")

    progress(f"{size} px: two threads")
    with stream(sampler, n, 1) as one, stream(sampler_of(folder / "store"), n, 2) as two:
        single, double = in_turn(lambda: next(one), lambda: next(two), options, statistics.fmean)  # what is ahead comes in bursts
    report.add("threads_two_over_one" + suffix, single, double,
               f"{n / statistics.median(double):.0f} to {n / statistics.median(single):.0f} samples/s")


def per_sample(times: list[float], n: int) -> str:
    return f"{statistics.median(times) / n * 1e6:.0f}"


# ---------------------------------------------------------------- commits


def renamed(episode: Episode, run: str, seed: int, **values) -> Episode:
    """The same episode under another key."""
    return replace(episode, key=EpisodeKey(run, episode.key.task, episode.key.source, seed), **values)


def file_of(episode: Episode) -> bytes:
    """What a commit of ``episode`` writes."""
    sink = pa.BufferOutputStream()
    schema.write(schema.encode(episode)[0], sink)
    return sink.getvalue().to_pybytes()


def settled_store(root: Path, episode: Episode) -> ReplayStore:
    """A store whose directories are there, as after its first thousand episodes; those it holds are short."""
    store, short, seen, seed = ReplayStore(root), formats.make_episode(0, 16, 2, 0.0), set(), 0
    while len(seen) < SHARDS:
        shard = store.path(EpisodeKey("settle", episode.key.task, episode.key.source, seed).name).split("/")[-2]
        if shard not in seen:
            seen.add(shard)
            store.commit(renamed(short, "settle", seed))
        seed += 1
    return store


def bench_commit(options, report: Report, folder: Path, episodes: list[Episode], suffix: str) -> None:
    """Episode by episode: our commit, and the same bytes written to a new file."""
    progress("commit")
    store, plain = settled_store(folder / "commits", episodes[0]), folder / "plain"
    plain.mkdir()
    times: dict[str, list[float]] = {"commit": [], "write_fsync": [], "durable_write": []}
    rotation = list(times)
    for number in range(options.commits + 1):
        episode = renamed(episodes[number % len(episodes)], "commit", number)
        data = file_of(episode)
        for name in rotation[number % 3 :] + rotation[: number % 3]:
            began = time.perf_counter()
            if name == "commit":
                store.commit(episode)
            elif name == "write_fsync":
                write_fsync(data, plain / f"{number}.fsync")
            else:
                write_durable(data, plain / f"{number}.durable")
            times[name].append(time.perf_counter() - began)
        for path in plain.iterdir():
            path.unlink()
    committed = statistics.median(times["commit"][1:])
    for name in ("write_fsync", "durable_write"):
        report.add(f"commit_over_{name}{suffix}", times["commit"][1:], times[name][1:], f"{committed * 1e3:.1f} over "
                   f"{statistics.median(times[name][1:]) * 1e3:.1f} ms, {len(data) / 1e6:.1f} MB")
    shutil.rmtree(folder / "commits")


def writer(pipe, number: int, root: Path, episode: Episode, count: int) -> None:
    """One of the writing processes: ``count`` commits or plain writes whenever told."""
    cv2.setNumThreads(1)
    store, data = ReplayStore(root, create=False), file_of(episode)
    plain = root.parent / f"plain{number}"
    plain.mkdir()
    pipe.send("ready")
    for kind, turn in iter(pipe.recv, None):
        for i in range(count):
            if kind == "commit":
                store.commit(renamed(episode, f"writer{number}", turn * count + i))
            else:
                write_fsync(data, plain / str(i))
        pipe.send(len(data) * count)
        shutil.rmtree(plain)
        plain.mkdir()


def bench_writers(options, report: Report, folder: Path, episode: Episode, suffix: str) -> None:
    """Processes that commit at the same time against the same ones that write and sync the same bytes, and a count of what is there."""
    root = folder / "writers"
    before = len(settled_store(root, episode))
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(WRITERS):
        progress(f"writer {number + 1}/{WRITERS} starts")
        here, there = context.Pipe()
        processes.append(context.Process(target=writer, args=(there, number, root, episode, options.per_writer), daemon=True))
        processes[-1].start()
        there.close()  # else a dead writer is waited for
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    times: dict[str, list[float]] = {"commit": [], "fsync": []}
    rounds = min(options.rounds, 5)  # some gigabytes
    for turn in range(rounds):
        progress(f"{WRITERS} writers, round {turn + 1}/{rounds}")
        for kind in ("commit", "fsync") if turn % 2 == 0 else ("fsync", "commit"):
            os.sync()
            began = time.perf_counter()
            for pipe in pipes:
                pipe.send((kind, turn))
            written = sum(pipe.recv() for pipe in pipes)
            times[kind].append(time.perf_counter() - began)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    found = ReplayStore(root, create=False)
    found.refresh()
    lost = before + WRITERS * options.per_writer * rounds - len(found)
    if lost:
        raise SystemExit(f"{WRITERS} writers: {lost} episodes are missing of those that were acknowledged")
    ours, plain = (written / statistics.median(times[kind]) / 1e6 for kind in ("commit", "fsync"))
    report.add(f"eight_writers_of_fsync{suffix}", times["fsync"], times["commit"],
               f"{ours:.0f} of {plain:.0f} MB/s, {len(found) - before} commits, none lost")
    shutil.rmtree(root)
    for number in range(WRITERS):
        shutil.rmtree(folder / f"plain{number}")


# ---------------------------------------------------------------- opening


def bench_open(report: Report, folder: Path, count: int) -> None:
    """Seconds until a process knows every episode of a large store without its manifest, then with it, then only as far as a
    sampler needs to draw.

    The files are real but written without sync, which is what makes them in minutes; 20 steps, small frames at three of them.
    """
    root, short = folder / "large", formats.make_episode(0, 16, 20, 0.0)
    store, began = ReplayStore(root), time.perf_counter()
    for seed in range(count):
        episode = renamed(short, "large", seed, frames={t: short.frames[t] for t in (0, 16, 20)})
        path = root / store.path(episode.key.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_of(episode))
        if seed % 10_000 == 9_999:
            progress(f"{seed + 1:,}/{count:,} episodes, {time.perf_counter() - began:.0f} s")
    time.sleep(SETTLE_SECONDS)

    def know_all() -> int:
        store = ReplayStore(root, create=False)
        return len(store.refresh())

    def know_enough() -> int:
        return sampler_of(root).counts()["demo"].episodes

    for how, call, times in (("_without_manifest", know_all, 1), ("", know_all, 5), ("_to_sample", know_enough, 5)):
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            known = call()
            seconds.append(time.perf_counter() - began)
            if known != count:
                raise SystemExit(f"the store knows {known} of {count} episodes")
        report.add(f"open_{count}_episodes{how}_s", seconds, [1.0] * times, "seconds, not a ratio")
        if how == "_without_manifest":
            store = ReplayStore(root, create=False)
            store.refresh()
            store.save_manifest()
    shutil.rmtree(root)


# ---------------------------------------------------------------- the whole


def machine(folder: Path) -> str:
    """What the figures were measured on."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = []
    for package in ("numpy", "opencv-python", "pyarrow", "h5py", "pillow", "pylance", "av"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return (f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
            f"{', '.join(versions)}; load {os.getloadavg()[0]:.1f}; files in {folder.parent}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=lambda s: [int(x) for x in s.split(",")], default=[224, 64],
                        help="pixels; the figures of the sizes after the first get it as a suffix")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--length", type=int, default=200, help="actions of an episode")
    parser.add_argument("--batch", type=int, default=16, help="windows per draw")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.3, help="that one timing of one side takes")
    parser.add_argument("--commits", type=int, default=30, help="commits to time")
    parser.add_argument("--per-writer", type=int, default=4, help="commits of each of the eight writers in a round")
    parser.add_argument("--open-100k", action="store_true", help="also open a store of 100,000 episodes (a few minutes)")
    parser.add_argument("--open-episodes", type=int, default=100_000, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the files go, on the disk to be measured; a new folder in it, deleted at the end")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the CPU seconds of this process in place of the clock's where one thread reads, for a machine that "
                             "others use at the same time")
    parser.add_argument("--same-decoder", action="store_true",
                        help="let every JPEG reader but the public loader's use our JPEG decoder in place of OpenCV's, so that only "
                             "storage differs")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    if options.same_decoder:
        formats.decode = decode_jpeg
    report = Report(options.json)
    with tempfile.TemporaryDirectory(prefix="bench-replay-", dir=options.folder) as name:
        print(machine(Path(name)), flush=True)
        for place, size in enumerate(options.size):
            folder, suffix = Path(name) / str(size), f"_{size}" if place else ""
            folder.mkdir()
            grain = formats.find_grain(size)
            progress(f"{size} px: making {options.episodes} episodes")
            episodes = [formats.make_episode(seed, size, options.length, grain) for seed in range(options.episodes)]
            jpegs = [len(jpeg) for episode in episodes for images in episode.frames.values() for jpeg in images]
            print(f"\n{size} px: {len(episodes)} episodes of {options.length} steps, 2 cameras, JPEG of {np.mean(jpegs) / 1e3:.1f} kB; "
                  "median [smallest, largest] over rounds", flush=True)
            store = ReplayStore(folder / "store")
            for number, episode in enumerate(episodes):
                progress(f"{size} px: committing episode {number + 1}/{len(episodes)}")
                store.commit(episode)
            formats.write_all(folder, episodes, size, lambda text, size=size: progress(f"{size} px: {text}"))
            bench_samples(options, report, folder, episodes, size, suffix)
            bench_commit(options, report, folder, episodes, suffix)
            bench_writers(options, report, folder, episodes[0], suffix)
            shutil.rmtree(folder)
        if options.open_100k:
            print()
            bench_open(report, Path(name), options.open_episodes)


if __name__ == "__main__":
    main()
