"""The page's port: FastAPI's routes around what the room knows, and the thread that follows the files."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError, CosmosRayError, StoreError
from cosmos_ray.watch.episodes import Episodes, Filter
from cosmos_ray.watch.now import Now
from cosmos_ray.watch.rendering import Rendering
from cosmos_ray.watch.values import compare, groups, value_panel

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
EVERY_S = 1.0  #: between two looks at the files
ALIVE_S = 10.0  #: between two snapshots while nothing happens: rates fall
COOKIE = "cosmos_ray_watch"
LOCAL = ("localhost", "127.0.0.1", "[::1]")  #: names under which a browser on this machine asks

#: No script, style or picture from anywhere else, no frame around the page.
HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
                                      "form-action 'none'",
           "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}


class Watch:
    """The data behind the page, and the thread that brings it up to date every :data:`EVERY_S` seconds.

    ``folder`` and ``config`` are those of the run, None of a bare store. StoreError if ``store`` is none.
    """

    def __init__(self, store: str, folder: Path | None = None, config: RunConfig | None = None) -> None:
        self.episodes = Episodes(store)
        self.now = Now(self.episodes, folder, config)
        self.rendering = Rendering(store, config.sim.task if config else "")
        self.lock = threading.Lock()  #: around rendering, which is not thread-safe
        self._changed = False  #: since the last snapshot
        self.revision, self.text = 0, json.dumps(self.now.snapshot() | {"trouble": ""})  #: the snapshot and its number
        self._told = 0.0
        self.trouble = ""  #: why the files cannot be read at the moment
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)

    def begin(self) -> None:
        """Start following."""
        self._thread.start()

    def update(self) -> None:
        """One look at the files. What cannot be read now is told on the page and tried again."""
        try:
            self._changed |= self.now.update() | self.episodes.update()
            trouble = ""
        except (CosmosRayError, OSError) as error:
            trouble = str(error)
        told = time.monotonic() - self._told
        if self._changed and told >= EVERY_S or trouble != self.trouble or told >= ALIVE_S:
            if trouble and trouble != self.trouble:
                logger.warning("the page waits: %s", trouble)
            self.trouble, self._told, self._changed = trouble, time.monotonic(), False
            self.text = json.dumps({**self.now.snapshot(), "trouble": trouble})
            self.revision += 1

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.update()
            self._stop.wait(0.05 if self.episodes.unread else EVERY_S)

    def close(self) -> None:
        """End the thread and the rendering child."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self.lock:
            self.rendering.close()


def make_app(watch: Watch, token: str = "", hosts: tuple[str, ...] = LOCAL) -> FastAPI:
    """The application.

    Args:
        token: that every request must bring, as ``?token=`` once (a cookie keeps it) or as ``Authorization: Bearer``; "" asks for none.
        hosts: names that a browser may ask for where there is no token, so that no page of another site reads this one through a name
            that it points here.
    """
    app = FastAPI(title="cosmos_ray watch", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        response = _refusal(request, token, hosts)
        if response is None:
            try:
                response = await go_on(request)
            except ConfigError as error:
                response = _json({"error": str(error)}, 422)
            except CosmosRayError as error:
                response = _json({"error": str(error)}, 404 if isinstance(error, StoreError) else 500)
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    def static(name: str) -> Callable[[], Response]:
        return lambda: Response((PAGE / name).read_bytes(), media_type=TYPES[name.rpartition(".")[2]])

    for file in sorted(PAGE.iterdir()):
        app.get("/" if file.name == "index.html" else f"/{file.name}")(static(file.name))

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/state")
    def state() -> Response:
        return Response(watch.text, media_type="application/json")

    @app.get("/api/events")
    async def events(request: Request) -> Response:
        async def lines() -> AsyncIterator[str]:
            seen = -1
            while not getattr(app.state, "ending", False) and not await request.is_disconnected():
                if watch.revision != seen:
                    seen = watch.revision
                    yield f"event: state\ndata: {watch.text}\n\n"
                await asyncio.sleep(0.25)

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @app.get("/api/episodes")
    def listed(request: Request) -> Response:
        return _json(watch.episodes.page(_filter(request), _whole(request, "page") or 0))

    @app.get("/api/episodes/{name}")
    def one(name: str) -> Response:
        with watch.lock:
            rendered = watch.rendering.status(name)
        return _json({**watch.episodes.detail(name), "rendered": rendered})

    @app.get("/api/episodes/{name}/frames/{camera}/{step}")
    def frame(name: str, camera: int, step: int) -> Response:
        jpeg = watch.episodes.frame(name, camera, step)
        if jpeg is None:
            with watch.lock:
                jpeg = watch.rendering.frame(name, camera, step)
        if jpeg is None:
            raise StoreError(f"episode {name} has no picture of step {step}")
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    @app.post("/api/episodes/{name}/render")
    def render(name: str, request: Request) -> Response:
        if request.headers.get("x-watch") != "1":  # a page of another site cannot send it
            raise ConfigError("send the header X-Watch: 1")
        watch.episodes.view(name)
        with watch.lock:
            return _json(watch.rendering.begin(name))

    @app.get("/api/value")
    def value(request: Request) -> Response:
        return _json(value_panel(watch.episodes, _filter(request)))

    @app.get("/api/groups")
    def evaluated() -> Response:
        return _json({"groups": groups(watch.episodes), "unread": watch.episodes.unread})

    @app.get("/api/compare")
    def compared(a: str, b: str) -> Response:
        return _json(compare(watch.episodes, a, b))

    return app


def _refusal(request: Request, token: str, hosts: tuple[str, ...]) -> Response | None:
    """The answer to a request that may not come in; None for one that may. The token in the address moves into a cookie."""
    if not token:
        name = request.headers.get("host", "").rpartition(":")[0] or request.headers.get("host", "")
        return None if name in hosts else _json({"error": f"ask for {hosts[0]}, not for {name[:100]!r}"}, 403)
    asked = parse_qs(request.url.query)
    given = asked.pop("token", [""])[0]
    if given and hmac.compare_digest(given.encode(), token.encode()):
        query = urlencode(asked, doseq=True)
        moved = RedirectResponse(request.url.path + (f"?{query}" if query else ""), 303)
        moved.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return moved
    bearer = request.headers.get("authorization", "").partition(" ")[2]
    if any(hmac.compare_digest(held.encode(), token.encode()) for held in (bearer, request.cookies.get(COOKIE, ""))):
        return None
    return _json({"error": "give the page's token: open /?token=TOKEN, or send `Authorization: Bearer TOKEN`"}, 401)


def _filter(request: Request) -> Filter:
    asked = request.query_params
    return Filter(**{key: asked.get(key, "") for key in ("source", "task", "outcome", "arm")}, version=_whole(request, "version"),
                  low=_share(request, "low", 0.0), high=_share(request, "high", 1.0))


def _whole(request: Request, key: str) -> int | None:
    text = request.query_params.get(key, "")
    try:
        return int(text[:20]) if text else None
    except ValueError as error:
        raise ConfigError(f"{key}={text[:40]!r} is no whole number") from error


def _share(request: Request, key: str, default: float) -> float:
    text = request.query_params.get(key, "")
    try:
        return float(text[:30]) if text else default
    except ValueError as error:
        raise ConfigError(f"{key}={text[:40]!r} is no number") from error


def _json(data: Any, status: int = 200) -> Response:
    return Response(json.dumps(data), status, media_type="application/json")
