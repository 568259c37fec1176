"""The port: FastAPI's routes around :class:`PolicyServer`."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect

from cosmos_ray.deployment import INSTRUCTION
from cosmos_ray.errors import ConfigError, CosmosRayError
from cosmos_ray.serving import wire
from cosmos_ray.serving.core import Answer, Clock, PolicyServer, as_arrays
from cosmos_ray.serving.protocols import VlaEvalSession, aloha_reply, openpi_observation
from cosmos_ray.serving.recorder import Recorder
from cosmos_ray.serving.wire import BadRequest

MAX_BYTES = 64 * 2**20  #: of one request
MAX_TEXT = 1000  #: letters of an instruction
OWN_KEYS = ("return_all_query_results", "futures", "seed", "episode", "executed")  #: of a request that are no part of the observation
NO_TOKEN = "give the server's token as `Authorization: Bearer TOKEN`"
REFUSED = 1008  #: websocket's code for a message that breaks the rules


def make_app(server: PolicyServer, info: dict[str, Any], execute: int, token: str = "", recorder: Recorder | None = None) -> FastAPI:
    """The application.

    Args:
        info: what ``/info`` tells of the policy, and openpi's client gets as metadata.
        execute: actions of a chunk that a client of vla-eval gets before the policy is asked again.
        token: that every request but ``/health`` must bring; "" asks for none.
        recorder: takes the episodes of requests that name one.
    """
    app = FastAPI(title="cosmos_ray", docs_url=None, redoc_url=None, openapi_url=None)

    def allowed(headers: Any) -> bool:
        given = headers.get("authorization", "").partition(" ")[2]
        return not token or hmac.compare_digest(given.encode(), token.encode())

    async def guarded(request: Request, work: Callable[[Any], Awaitable[dict[str, Any] | tuple[dict[str, Any], bool]]]) -> Response:
        """The response to a request with a JSON body; every error is one sentence."""
        try:
            if not allowed(request.headers):
                raise BadRequest(NO_TOKEN, 401)
            body = wire.from_json(await _body(request))
            double = isinstance(body, dict) and body.keys() == {"encoded"}
            reply = await work(wire.from_json(_text(body["encoded"])) if double else body)
            text = wire.to_json(reply, arrays=double or _has_arrays(body))
            return _json(json.dumps(text) if double else text, 200)
        except BadRequest as error:
            return _json(json.dumps({"error": str(error)}), error.status, {"Retry-After": "1"} if error.status == 429 else None)
        except CosmosRayError as error:
            return _json(json.dumps({"error": str(error)}), 422 if isinstance(error, ConfigError) else 500)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def about(request: Request) -> Response:
        if not allowed(request.headers):
            return _json(json.dumps({"error": NO_TOKEN}), 401)
        return _json(json.dumps({**info, **server.status(), "recorded": recorder.recorded if recorder else 0}), 200)

    async def ask(observation: dict[str, Any], own: dict[str, Any]) -> Answer:
        if np.ndim(observation.get("proprio", 0)) > 1:
            raise BadRequest("send one observation, not a batch", 422)
        return await server.ask(observation, own["seed"], own["futures"] is not False)

    @app.post("/act")
    async def act(request: Request) -> Response:
        async def work(body: Any) -> dict[str, Any]:
            own, observation = _parts(body)
            if own["episode"] is None:
                if own["executed"] is not None:
                    raise BadRequest("'executed' goes with 'episode': give both, or leave it out", 422)
                answer = await ask(observation, own)
            elif recorder is None:
                raise BadRequest("this server records nothing: start it with --record, or leave 'episode' out", 422)
            else:
                with recorder.turn(own["episode"], own["executed"]) as record:
                    answer = await ask(observation, own)
                    record(answer)
            return aloha_reply(answer, bool(own["return_all_query_results"]))

        return await guarded(request, work)

    @app.post("/episodes/{name}")
    async def end(name: str, request: Request) -> Response:
        async def work(body: Any) -> dict[str, Any]:
            if recorder is None:
                raise BadRequest("this server records nothing: start it with --record", 404)
            return await recorder.end(name, body)

        return await guarded(request, work)

    async def openpi(socket: WebSocket) -> None:
        async def answer(data: bytes) -> bytes:
            clock, observation = Clock(), openpi_observation(wire.from_msgpack(data))
            seed = observation.pop("seed", None)
            _check_text(observation)
            answer = await server.ask(observation, seed)
            single = len(answer.actions) == 1
            reply = {"actions": answer.actions[0] if single else answer.actions,
                     "value": float(answer.values[0]) if single else answer.values, "server_timing": {"infer_ms": clock.ms}}
            return wire.to_msgpack(reply, bytes_keys=True)

        await _converse(socket, allowed(socket.headers), answer, wire.to_msgpack(info, bytes_keys=True))

    app.websocket("/")(openpi)
    app.websocket("/openpi")(openpi)

    @app.websocket("/vla-eval")
    async def vla_eval(socket: WebSocket) -> None:
        session = VlaEvalSession(server, execute)

        async def answer(data: bytes) -> bytes | None:
            message = wire.from_msgpack(data)
            _check_text(message.get("payload") if isinstance(message, dict) else None)
            reply = await session.reply(message)
            return None if reply is None else wire.to_msgpack(reply, bytes_keys=False)

        await _converse(socket, allowed(socket.headers), answer)

    return app


async def _converse(socket: WebSocket, allowed: bool, answer: Callable[[bytes], Awaitable[bytes | None]],
                    greeting: bytes | None = None) -> None:
    """Answer the messages of a websocket until its client leaves. An error goes out as text, which openpi's client raises."""
    if not allowed:
        await socket.close(REFUSED)  # before it is accepted: HTTP's 403
        return
    await socket.accept()
    try:
        if greeting is not None:
            await socket.send_bytes(greeting)
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            try:
                data = message.get("bytes")
                if data is None:
                    raise BadRequest("send msgpack in binary messages, not text")
                reply = await answer(data)
                if reply is not None:
                    await socket.send_bytes(reply)
            except CosmosRayError as error:
                await socket.send_text(f"error: {error}")
    except (WebSocketDisconnect, RuntimeError):  # starlette's RuntimeError: the client left while the answer was made
        return


async def _body(request: Request) -> bytes:
    """The body of a request, read no further than ``MAX_BYTES``."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:
            raise BadRequest(f"the body is larger than {MAX_BYTES // 2**20} MiB", 413)
        parts.append(part)
    return b"".join(parts)


def _parts(body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a request asks besides its observation, and the observation."""
    if not isinstance(body, dict):
        raise BadRequest(f"a request is a dict with the observation, not a {type(body).__name__}", 422)
    observation = as_arrays({key: value for key, value in body.items() if key not in OWN_KEYS})
    _check_text(observation)
    return {key: body.get(key) for key in OWN_KEYS}, observation


def _check_text(observation: Any) -> None:
    told = observation.get(INSTRUCTION) if isinstance(observation, dict) else None
    if isinstance(told, str) and len(told) > MAX_TEXT:
        raise BadRequest(f"{INSTRUCTION} has {len(told)} letters: send at most {MAX_TEXT}", 422)


def _text(encoded: Any) -> str:
    if not isinstance(encoded, str):
        raise BadRequest("'encoded' holds the request as JSON text")
    return encoded


def _has_arrays(body: Any) -> bool:
    return isinstance(body, dict) and any(hasattr(value, "dtype") for value in body.values())


def _json(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status, headers, media_type="application/json")
