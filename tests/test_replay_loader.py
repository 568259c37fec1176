"""Batches made ahead in threads: the same ones, in the same order, whatever happens in between."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.sampling.loader import PrefetchLoader
from cosmos_ray.replay.sampling.sampler import WindowSampler, WindowStream
from cosmos_ray.replay.sampling.windows import Selection
from cosmos_ray.replay.store import ReplayStore
from tests.test_replay_episode import make_episode
from tests.test_replay_sampler import assert_batches_equal

EPISODES = [
    *(make_episode(seed, length=6 + seed) for seed in range(6)),
    *(make_episode(100 + seed, "rollout", length=9, success=seed % 2 == 0) for seed in range(4)),
]
CHUNK = 5
ROOT = Path(__file__).parents[1]


def fill(root, episodes=EPISODES) -> ReplayStore:
    store = ReplayStore(root)
    for episode in episodes:
        store.commit(episode)
    return store


def stream_of(store, n=6, what="all", seed=0, **options) -> WindowStream:
    return WindowStream(WindowSampler(store, chunk=CHUNK, gamma=0.9, seed=seed, **options), n, what)


def plain(stream):
    """The next batch of a stream without any thread."""
    return stream.sampler.draw(stream.n, stream.what)


def assert_same_stream(loader, stream, batches=6):
    for _ in range(batches):
        assert_batches_equal(next(loader), plain(stream))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("replay-loader")]


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> ReplayStore:
    return fill(tmp_path_factory.mktemp("store") / "store")


# ---------------------------------------------------------------- the same batches


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_batches_are_those_of_the_plain_stream_in_order(filled, threads, depth):
    """With a cache of frames far too small, so that threads fill and empty it at once."""
    made = stream_of(filled, frame_cache_bytes=40_000)
    with PrefetchLoader(made, threads=threads, depth=depth) as loader:
        assert_same_stream(loader, stream_of(filled, frame_cache_bytes=0), 12)


def test_a_snapshot_continues_while_batches_are_in_flight(filled):
    with PrefetchLoader(stream_of(filled, what="rollout"), threads=2, depth=4) as loader:
        for _ in range(5):
            next(loader)
        state = json.loads(json.dumps(loader.source.sampler.state_dict(loader.snapshot())))
        rest = [next(loader) for _ in range(5)]
    for resumed in (stream_of(ReplayStore(filled.root, create=False), what="rollout", seed=9) for _ in range(2)):
        resumed.sampler.load_state_dict(state)
        for batch in rest:
            assert_batches_equal(batch, plain(resumed))
    resumed.sampler.load_state_dict(state)
    with PrefetchLoader(resumed, threads=3, depth=2) as loader:
        for batch in rest:
            assert_batches_equal(batch, next(loader))


def test_a_closed_loader_leaves_the_stream_after_the_last_batch_returned(filled):
    made, reference = stream_of(filled), stream_of(filled)
    with PrefetchLoader(made, threads=2, depth=5) as loader:
        assert_same_stream(loader, reference, 3)
    assert_batches_equal(plain(made), plain(reference))


def test_batches_do_not_share_memory(filled):
    with PrefetchLoader(stream_of(filled), threads=2, depth=3) as loader:
        batches = [next(loader) for _ in range(6)]
    kept = [batch.images.copy() for batch in batches]
    batches[0].images[:] = 0
    assert all(np.array_equal(batch.images, images) for batch, images in zip(batches[1:], kept[1:], strict=True))


# ---------------------------------------------------------------- changes while it runs


def test_another_selection_shows_after_at_most_depth_batches(filled):
    depth = 3
    stream = stream_of(filled, what=Selection({"demo": 1.0}))
    with PrefetchLoader(stream, threads=2, depth=depth) as loader:
        assert set(next(loader).sources) == {"demo"}
        stream.what = Selection({"failure": 1.0})
        sources = [set(next(loader).sources) for _ in range(depth + 4)]
    assert sources[depth:] == [{"rollout"}] * 4
    assert sources == sorted(sources, key=lambda source: source != {"demo"})  # and never goes back


def test_after_a_refresh_and_a_restart_new_episodes_count_from_the_next_batch(tmp_path):
    stores = [fill(tmp_path / name, EPISODES[:3]) for name in ("made", "plain")]
    made, reference = map(stream_of, stores)
    with PrefetchLoader(made, threads=2, depth=4) as loader:
        assert_same_stream(loader, reference, 3)
        for number, stream in enumerate((made, reference)):
            for episode in EPISODES[3:]:
                stores[number].commit(episode)
            assert stream.sampler.refresh() == len(EPISODES) - 3
        loader.restart()
        assert_same_stream(loader, reference, 6)


def test_an_episode_that_is_evicted_while_batches_with_it_are_in_flight_is_left_out(tmp_path):
    store = fill(tmp_path / "store", EPISODES[:2])
    with PrefetchLoader(stream_of(store, n=20), threads=2, depth=3) as loader:
        next(loader)
        store.evict([EPISODES[0].key.name], "test")
        later = [next(loader) for _ in range(8)]
    assert all(set(batch.episodes) == {EPISODES[1].key.name} for batch in later[3:])
    assert not store.quarantine.entries()


# ---------------------------------------------------------------- damage


def damage(store, name):
    """Turn one bit of a frame, so that only decoding this episode finds it."""
    path = next(store.root.rglob(f"{name}.arrow"))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xd8\xff") + 300
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("threads, depth", [(1, 1), (2, 4), (4, 8)])
def test_a_damaged_episode_costs_only_itself_and_the_stream_is_the_plain_one(tmp_path, threads, depth):
    """Every frame of it is damaged, so that the first window of it is found, whichever that is."""
    victim = EPISODES[1].key.name
    streams = []
    for name in ("made", "plain"):
        fill(tmp_path / name)
        path = next((tmp_path / name).rglob(f"{victim}.arrow"))
        path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
        streams.append(stream_of(ReplayStore(tmp_path / name, create=False), n=4))
    made, reference = streams
    with PrefetchLoader(made, threads=threads, depth=depth) as loader:
        assert_same_stream(loader, reference, 25)
    for stream in streams:
        store = stream.sampler.store
        assert [entry["file"] for entry in store.quarantine.entries()] and victim not in store


def test_damage_found_in_the_first_batch_leaves_the_stream_of_a_store_that_never_had_it(tmp_path):
    victims = {EPISODES[1].key.name, EPISODES[4].key.name}
    fill(tmp_path / "made")
    for name in victims:
        path = next((tmp_path / "made").rglob(f"{name}.arrow"))
        path.write_bytes(path.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    store = ReplayStore(tmp_path / "made", create=False)
    never = fill(tmp_path / "never", [e for e in EPISODES if e.key.name not in victims])
    with PrefetchLoader(stream_of(store, n=200), threads=3, depth=4) as loader:
        assert_same_stream(loader, stream_of(never, n=200), 4)
    assert len(store.quarantine.entries()) == 2 and not victims & set(store.keys())


def test_one_wrong_bit_of_one_frame_is_found_in_a_thread(tmp_path):
    store = fill(tmp_path / "store", EPISODES[:2])
    damage(store, EPISODES[0].key.name)
    with PrefetchLoader(stream_of(ReplayStore(store.root, create=False), n=50), threads=2, depth=2) as loader:
        assert set(next(loader).episodes) == {EPISODES[1].key.name}
        (entry,) = loader.source.sampler.store.quarantine.entries()
    assert "does not match its checksum" in entry["reason"]


# ---------------------------------------------------------------- errors that are no damage


@pytest.mark.parametrize("threads, depth", [(1, 1), (2, 3), (4, 8)])
def test_mixed_image_sizes_reach_the_consumer_and_nothing_hangs(tmp_path, threads, depth):
    store = fill(tmp_path / "store", [make_episode(0, size=16), make_episode(1, size=32)])
    loader = PrefetchLoader(stream_of(store, n=50), threads=threads, depth=depth)
    for _ in range(3):
        with pytest.raises(StoreError, match="keep one robot and image size to a store") as caught:
            next(loader)
        assert "\n" not in str(caught.value)
    loader.close()
    assert not store.quarantine.entries() and len(store) == 2


def test_an_error_that_passes_costs_no_batch(filled):
    """As a file server that does not answer for a while: the batch that failed is the one that comes next."""

    class Flaky(WindowStream):
        failing = False

        def build(self, plan, empty=np.empty):
            if self.failing:
                raise OSError("no answer")
            return super().build(plan, empty)

    made, reference = Flaky(stream_of(filled).sampler, 6), stream_of(filled)
    with PrefetchLoader(made, threads=2, depth=3) as loader:
        assert_same_stream(loader, reference, 2)
        made.failing = True
        loader.restart()
        for _ in range(3):
            with pytest.raises(OSError, match="no answer"):
                next(loader)
        made.failing = False
        assert_same_stream(loader, reference, 4)


@pytest.mark.parametrize(
    "nothing, message",
    [(Selection(tasks={"Nothing": 1.0}), "of task 'Nothing': the tasks are Lift"), ("failure", "'failure' of .* has no window")],
)
def test_a_selection_without_windows_is_an_error_only_after_the_batches_before_it(tmp_path, nothing, message):
    """And the one that replaces it continues the stream, as if nothing had been asked for in between."""
    store = fill(tmp_path / "store", EPISODES[:6])
    made, reference = stream_of(store), stream_of(store)
    with PrefetchLoader(made, threads=2, depth=4) as loader:
        assert_same_stream(loader, reference, 1)
        made.what = nothing
        assert_same_stream(loader, reference, 3)
        for _ in range(2):
            with pytest.raises(StoreError, match=message):
                next(loader)
        made.what = reference.what = "demo"
        assert_same_stream(loader, reference, 5)


def test_an_empty_store_is_an_error_until_something_is_in_it(tmp_path):
    store = ReplayStore(tmp_path / "store")
    stream = stream_of(store)
    with PrefetchLoader(stream, threads=2, depth=2) as loader:
        with pytest.raises(StoreError, match="collect episodes"):
            next(loader)
        store.commit(EPISODES[0])
        stream.sampler.refresh()
        assert set(next(loader).episodes) == {EPISODES[0].key.name}


# ---------------------------------------------------------------- the end


def test_close_leaves_no_thread_and_a_closed_loader_says_so(filled):
    loader = PrefetchLoader(stream_of(filled), threads=4, depth=8)
    next(loader)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()
    state = loader.snapshot()
    with pytest.raises(StoreError, match="closed"):
        next(loader)
    assert loader.snapshot() == state


def test_a_forgotten_loader_ends_its_threads(filled):
    loader = PrefetchLoader(stream_of(filled), threads=3, depth=6)
    next(loader)
    threads, gone = loader_threads(), weakref.ref(loader)
    del loader
    gc.collect()
    assert threads and gone() is None
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.parametrize("end", ["pass", "del loader", "raise SystemExit(0)"])
def test_the_interpreter_ends_with_a_loader_that_was_never_closed(filled, end):
    program = f"""
        from cosmos_ray.replay.sampling.loader import PrefetchLoader
        from cosmos_ray.replay.sampling.sampler import ReplayStore, WindowSampler, WindowStream
        sampler = WindowSampler(ReplayStore({str(filled.root)!r}, create=False), chunk=5, gamma=0.9, seed=0)
        loader = PrefetchLoader(WindowStream(sampler, 64), threads=3, depth=6)
        print(len(next(loader)))
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "64\n", "")


@pytest.mark.parametrize("options", [{"threads": 0}, {"depth": 0}, {"threads": -1}])
def test_impossible_settings_are_refused(filled, options):
    with pytest.raises(ConfigError, match="at least one thread and one batch ahead"):
        PrefetchLoader(stream_of(filled), **options)


# ---------------------------------------------------------------- torch


def test_pinning_without_a_gpu_is_one_clear_line(filled):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="need a GPU and torch finds none: load with pin=False") as caught:
        PrefetchLoader(stream_of(filled), pin=True)
    assert "\n" not in str(caught.value) and not loader_threads()


def test_pinned_batches_are_pinned_and_the_same(filled):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with PrefetchLoader(stream_of(filled), threads=2, depth=2, pin=True) as loader:
        batch = next(loader)
        assert_batches_equal(batch, plain(stream_of(filled)))
    assert torch.from_numpy(batch.images).is_pinned()
    assert np.array_equal(torch.from_numpy(batch.images).to("cuda", non_blocking=True).cpu(), batch.images)


def test_tensors_are_made_of_a_batch_without_a_copy(filled):
    torch = pytest.importorskip("torch")
    with PrefetchLoader(stream_of(filled), threads=2, depth=2) as loader:
        batch = next(loader)
    for name in ("images", "future_images", "proprio", "future_proprio", "actions", "labels", "value", "offsets"):
        array = getattr(batch, name)
        tensor = torch.from_numpy(array)
        assert tensor.data_ptr() == array.ctypes.data and tuple(tensor.shape) == array.shape, name
        assert array.flags.writeable and array.flags.c_contiguous, name


def test_a_loader_needs_no_torch(filled):
    """The store is read where torch is not installed; there, pinning is refused in one line."""
    program = f"""
        import sys
        sys.modules["torch"] = None
        from cosmos_ray.replay.sampling.loader import PrefetchLoader
        from cosmos_ray.replay.sampling.sampler import ReplayStore, WindowSampler, WindowStream
        stream = WindowStream(WindowSampler(ReplayStore({str(filled.root)!r}, create=False), chunk=5, gamma=0.9, seed=0), 6)
        with PrefetchLoader(stream) as loader:
            print(len(next(loader)))
        PrefetchLoader(stream, pin=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout == "6\n"
    assert done.stderr.strip().splitlines()[-1].endswith("pinned batches need torch, which is not installed: load with pin=False")
