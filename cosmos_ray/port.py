"""A port of this process: who may come in, and a server on it until the process is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from cosmos_ray.errors import ConfigError

TOKEN = "COSMOS_RAY_TOKEN"


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str, brings: str) -> str:
    """The token that requests must bring, ``brings`` says how. ConfigError where an address beyond this machine has none."""
    token = os.environ.get(TOKEN, "").strip()
    if not is_local(host) and len(token) < 16:
        raise ConfigError(f"--host {host} lets other machines in: set ${TOKEN} to a secret of at least 16 letters, which every request "
                          f"must bring as {brings}, or serve on 127.0.0.1")
    return token


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the port from now on. ConfigError."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port} is no port: give one from 1 to 65535, or 0 for a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio sends without delay; else every reply waits 40 ms for the client's acknowledgement.
        listening = socket.socket(found[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(found[4])
        listening.listen(1024)  # whoever asks before the server runs waits
    except OSError as error:
        raise ConfigError(f"cannot serve on {host}:{port} ({error.strerror or error}): give another --host or --port") from error
    with listening:
        yield listening


def address(host: str, listening: socket.socket) -> str:
    """``host:port`` as a URL has it."""
    return f"{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"


def serve_until_told(app: Any, listening: socket.socket, **settings: Any) -> None:
    """Run the application on a bound socket until Ctrl-C or SIGTERM. ``settings`` are uvicorn's.

    ``app.state.ending`` is True from then on: replies that last as long as their client wants end themselves.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.ending = True
            super().handle_exit(sig, frame)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Ctrl-C and SIGTERM end the server and nothing else; an exception could be lost in whatever runs at the moment."""
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    server = Server(uvicorn.Config(app, log_level="warning", lifespan="off", **settings))
    with contextlib.suppress(KeyboardInterrupt):  # before the server had its handlers
        asyncio.run(server.serve(sockets=[listening]))
