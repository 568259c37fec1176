"""The speed of commits, of one process and of eight, against plain writes of the same bytes."""

import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore
from cosmos_ray.replay.format import schema
from jobs.bench.replay_episodes import make_episode
from jobs.bench.replay_timing import Report, progress

WRITERS, SHARDS = 8, 256


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
    store, short, seen, seed = ReplayStore(root), make_episode(0, 16, 2, 0.0), set(), 0
    while len(seen) < SHARDS:
        shard = store.path(EpisodeKey("settle", episode.key.task, episode.key.source, seed).name).split("/")[-2]
        if shard not in seen:
            seen.add(shard)
            store.commit(renamed(short, "settle", seed))
        seed += 1
    return store


def bench_commit(options, report: Report, folder: Path, episodes: list[Episode], suffix: str) -> None:
    """Episode by episode: our commit, and the same bytes written to a new file. Of each, the fastest pass counts here too."""
    progress("commit")
    store, plain = settled_store(folder / "commits", episodes[0]), folder / "plain"
    plain.mkdir()
    times: dict[str, list[float]] = {"commit": [], "write_fsync": [], "durable_write": []}
    rotation, seed = list(times), 0
    for _ in range(options.rounds):
        fastest = {name: np.full(options.commits, np.inf) for name in times}
        for turn in range(options.passes * options.commits):
            seed += 1
            number = turn % options.commits
            episode = renamed(episodes[number % len(episodes)], "commit", seed)
            data = file_of(episode)
            for name in rotation[turn % 3 :] + rotation[: turn % 3]:
                began = time.perf_counter()
                if name == "commit":
                    store.commit(episode)
                elif name == "write_fsync":
                    write_fsync(data, plain / f"{seed}.fsync")
                else:
                    write_durable(data, plain / f"{seed}.durable")
                fastest[name][number] = min(fastest[name][number], time.perf_counter() - began)
            for path in plain.iterdir():
                path.unlink()
        for name, seconds in fastest.items():
            times[name].append(float(seconds.sum()))
    committed = statistics.median(times["commit"]) / options.commits
    for name in ("write_fsync", "durable_write"):
        report.add(f"commit_over_{name}{suffix}", times["commit"], times[name], f"{committed * 1e3:.1f} over "
                   f"{statistics.median(times[name]) / options.commits * 1e3:.1f} ms, {len(data) / 1e6:.1f} MB")
    shutil.rmtree(folder / "commits")


def writer(pipe, number: int, root: Path, episode: Episode, count: int) -> None:
    """One of the writing processes: ``count`` commits or plain writes whenever told."""
    cv2.setNumThreads(1)
    store, data = ReplayStore(root, create=False), file_of(episode)
    plain = root.parent / f"plain{number}"
    plain.mkdir()
    pipe.send("ready")
    for operation, turn in iter(pipe.recv, None):
        for i in range(count):
            if operation == "commit":
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
        for operation in ("commit", "fsync") if turn % 2 == 0 else ("fsync", "commit"):
            os.sync()
            began = time.perf_counter()
            for pipe in pipes:
                pipe.send((operation, turn))
            written = sum(pipe.recv() for pipe in pipes)
            times[operation].append(time.perf_counter() - began)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    found = ReplayStore(root, create=False)
    found.refresh()
    lost = before + WRITERS * options.per_writer * rounds - len(found)
    if lost:
        raise SystemExit(f"{WRITERS} writers: {lost} episodes are missing of those that were acknowledged")
    ours, plain = (written / statistics.median(times[operation]) / 1e6 for operation in ("commit", "fsync"))
    report.add(f"eight_writers_of_fsync{suffix}", times["fsync"], times["commit"],
               f"{ours:.0f} of {plain:.0f} MB/s, {len(found) - before} commits, none lost")
    shutil.rmtree(root)
    for number in range(WRITERS):
        shutil.rmtree(folder / f"plain{number}")


# ---------------------------------------------------------------- plain files


def write_fsync(data: bytes, path: Path) -> None:
    """A new file, synced; its name is not."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_durable(data: bytes, path: Path) -> None:
    """The same under a temporary name, renamed, and the directory synced: what is needed for it to be there after a crash."""
    temporary = path.with_suffix(".tmp")
    write_fsync(data, temporary)
    os.rename(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
