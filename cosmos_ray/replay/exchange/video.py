"""Video files to be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_native_id
from typing import Any, cast

import av
from av.container import OutputContainer
from av.video.stream import VideoStream


def open_video(
    path: str | Path, codec: str, rate: Any, shape: tuple[int, int], options: dict[str, str]
) -> tuple[OutputContainer, VideoStream]:
    """A new mp4 file and its open encoder, for frames of ``shape`` (height, width) in RGB at ``rate`` per second."""
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder writes its settings to the terminal otherwise
    container = av.open(str(path), "w", format="mp4")
    stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
    stream.height, stream.width = shape
    stream.pix_fmt = "yuv420p"
    with _same_scheduling():
        stream.codec_context.open()
    return container, stream


@contextmanager
def _same_scheduling() -> Iterator[None]:
    """Undo what is done to the scheduling of this process's threads, and give that of the calling thread to new ones.

    The AV1 encoder (SVT-AV1), where it runs as root, makes the thread that opens it and all of its own real-time ones of the
    highest priority. Every thread and process that is started from there inherits that, and nothing else gets the processor.
    """
    before = {thread: _scheduling(thread) for thread in _threads()}
    mine = before.get(get_native_id())
    try:
        yield
    finally:
        for thread in _threads():
            wanted = before.get(thread, mine)
            if wanted and wanted != _scheduling(thread):
                with suppress(ProcessLookupError):
                    os.sched_setscheduler(thread, wanted[0], os.sched_param(wanted[1]))


def _threads() -> list[int]:
    """The threads of this process; none where the system does not say."""
    with suppress(FileNotFoundError):
        return [int(name) for name in os.listdir("/proc/self/task")]
    return []


def _scheduling(thread: int) -> tuple[int, int] | None:
    """Policy and priority; None if the thread is gone."""
    with suppress(ProcessLookupError):
        return os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
    return None
