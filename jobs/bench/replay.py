"""The replay store's speed against other ways to keep the same episodes, and against the cost of decoding and of the disk.

    pip install -r jobs/bench/requirements.txt                   # the heavy competitors; those missing are left out
    python jobs/bench/replay.py --json replay.json               # some ten minutes on two cores
    python jobs/bench/replay.py --open-100k                      # also how long a store of 100,000 episodes takes to open

A sample is a random window: the frames at t and t + 16 of two cameras as uint8 RGB, 16 actions, proprioception at both ends and
the value. The same episodes (synthetic frames with the JPEG sizes of rendered scenes) are written once in every format, and what
the readers return is compared before anything is timed. Then each is timed in turn with ours, round after round, so that a
ratio compares neighbours in time; it is printed as the median over rounds with the smallest and the largest, and beside it that
of each side's fastest round: where the two are far apart, others used the machine and neither can be trusted. One thread, no
cache of decoded frames, everything in the page cache: storage formats and decoding are compared, not disks.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

sys.path.insert(0, os.getcwd())  # a job's working directory is the uploaded checkout

import cv2  # noqa: E402
import numpy as np  # noqa: E402

from cosmos_ray.replay import Episode, ReplayStore, WindowBatch, WindowSampler  # noqa: E402
from cosmos_ray.replay.format.codec import decode_into, decode_jpeg  # noqa: E402
from cosmos_ray.replay.sampling.loader import PrefetchLoader  # noqa: E402
from cosmos_ray.replay.sampling.sampler import Picks, WindowStream, draw_from  # noqa: E402
from jobs.bench import replay_formats as formats  # noqa: E402
from jobs.bench.replay_commits import bench_commit, bench_writers, file_of, renamed  # noqa: E402
from jobs.bench.replay_episodes import CHUNK, GAMMA, Batch, Vectors, Window, find_grain, make_episode  # noqa: E402
from jobs.bench.replay_timing import Report, in_turn, pace, progress  # noqa: E402

SETTLE_SECONDS = 11  # directories that changed in the last ten are not yet trusted to stay as they are
PSNR_FLOOR = 24.0  #: dB against the JPEG frames; below it a video reader returns other frames than the ones asked for


# ---------------------------------------------------------------- our side


def sampler_of(root: Path) -> WindowSampler:
    """The sampler as a learner has it, without the cache that would save it the decoding."""
    return WindowSampler(ReplayStore(root, create=False), chunk=CHUNK, gamma=GAMMA, seed=0, frame_cache_bytes=0)


def stream(sampler: WindowSampler, n: int, threads: int) -> PrefetchLoader:
    """A loader of batches of ``n`` windows that ``threads`` threads make ahead; iterate over it and close it."""
    return PrefetchLoader(WindowStream(sampler, n, "demo"), threads=threads, depth=2 * threads)


def windows_of(batch: WindowBatch) -> list[Window]:
    """Which windows those are: a synthetic episode's seed is its number."""
    return [(int(name.rsplit("-", 3)[1]), int(t)) for name, t in zip(batch.episodes, batch.offsets, strict=True)]


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


class Again(WindowStream):
    """Draws like any other stream, but the windows it reads are these."""

    def __init__(self, sampler: WindowSampler, picks: Picks) -> None:
        super().__init__(sampler, len(picks.rows), "demo")
        self._picks = picks

    def pick(self) -> Picks:
        super().pick()
        return self._picks


class Reopened:
    """A reader that can be opened anew: what its library kept of the windows of a pass must not answer the next one."""

    def __init__(self, reader, folder: Path, vectors: Vectors) -> None:
        self._make = lambda: reader(folder, vectors)
        self.reader = self._make()

    def again(self) -> None:
        self.reader.close()
        self.reader = self._make()


def bench_samples(options, report: Report, folder: Path, episodes: list[Episode], size: int, suffix: str) -> None:
    """Ours against every format that is there, and against decoding alone."""
    sampler, vectors, n = sampler_of(folder / "store"), Vectors(episodes, size), options.batch
    picks = [sampler.pick(n, "demo") for _ in range(options.batches)]
    windows = [windows_of(sampler.build(p)) for p in picks]
    ours, count = [partial(draw_from, Again(sampler, p)) for p in picks], n * len(picks)
    for key, (reader, part, module) in formats.COMPETITORS.items():
        if not formats.installed(module):
            report.missing(key + suffix)
            continue
        progress(f"{size} px: {key}")
        theirs = Reopened(reader, folder / part, vectors)
        psnr = check_same(key, sampler.build(picks[0]), theirs.reader.read(windows[0]))
        asked = windows if reader.batched else [[window] for batch in windows for window in batch]  # one by one: nothing is gained by more
        mine, other = in_turn(ours, [lambda t=theirs, a=a: t.reader.read(a) for a in asked], options, theirs.again)
        theirs.reader.close()
        report.add(key + suffix, other, mine, f"{per_sample(mine, count)} to {per_sample(other, count)} us, "
                   + ("the same pixels" if np.isinf(psnr) else f"{psnr:.1f} dB, by PyAV"))

    memory = np.empty((size, size, 3), np.uint8)

    def decode_alone(batch: list[Window]) -> None:
        for number, t in batch:
            frames, future = episodes[number].frames, min(t + CHUNK, episodes[number].length)
            for jpeg in (*frames[t], *frames[future]):
                decode_into(jpeg, memory)

    progress(f"{size} px: decoding alone")
    mine, decoding = in_turn(ours, [lambda b=b: decode_alone(b) for b in windows], options)
    report.add("over_jpeg_decode" + suffix, mine, decoding, f"{per_sample(mine, count)} over {per_sample(decoding, count)} us")

    progress(f"{size} px: two threads")
    with stream(sampler, n, 1) as one, stream(sampler_of(folder / "store"), n, 2) as two:
        next(one), next(two)
        rounds = [(pace(lambda: next(one), options.seconds), pace(lambda: next(two), options.seconds)) for _ in range(options.rounds)]
    single, double = (list(times) for times in zip(*rounds, strict=True))
    report.add("threads_two_over_one" + suffix, single, double,
               f"{n / statistics.median(double):.0f} to {n / statistics.median(single):.0f} samples/s")


def per_sample(times: list[float], count: int) -> str:
    return f"{statistics.median(times) / count * 1e6:.0f}"


# ---------------------------------------------------------------- opening


def bench_open(report: Report, folder: Path, count: int) -> None:
    """Seconds until a process knows every episode of a large store without its manifest, then with it, then only as far as a
    sampler needs to draw.

    The files are real but written without sync, which is what makes them in minutes; 20 steps, small frames at three of them.
    """
    root, short = folder / "large", make_episode(0, 16, 20, 0.0)
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
    parser.add_argument("--batch", type=int, default=4, help="windows per draw")
    parser.add_argument("--batches", type=int, default=8, help="draws that a pass reads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=5, help="passes of a round, of which the fastest counts, call by call")
    parser.add_argument("--seconds", type=float, default=1.0, help="that one timing of loader threads takes")
    parser.add_argument("--commits", type=int, default=4, help="commits of a pass")
    parser.add_argument("--per-writer", type=int, default=4, help="commits of each of the eight writers in a round")
    parser.add_argument("--open-100k", action="store_true", help="also open a store of 100,000 episodes (a few minutes)")
    parser.add_argument("--open-episodes", type=int, default=100_000, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the files go, on the disk to be measured; a new folder in it, deleted at the end")
    parser.add_argument("--json", metavar="FILE", help="write the median ratios")
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
            grain = find_grain(size)
            progress(f"{size} px: making {options.episodes} episodes")
            episodes = [make_episode(seed, size, options.length, grain) for seed in range(options.episodes)]
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
