"""Ray's authentication by token: a token of its own for a private Ray, and whether a cluster takes ours."""

from __future__ import annotations

import os
import secrets

import grpc
from ray._raylet import AuthenticationTokenLoader, Config

from cosmos_ray.errors import ConfigError

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
PROBE_S = 4.0  #: for a cluster to answer the question who it is
HOW = f"set {MODE}=token and {TOKEN_FILE} to a file with the cluster's token"


def use_private_token() -> None:
    """Protect the Ray that this process starts next by a token that only its own processes know.

    Ray would write a token into the user's home, which then turns authentication on for every other Ray of the user. Left to itself it
    would also take a token that is there, and every process with that token could join.
    """
    os.environ[MODE], os.environ[TOKEN] = "token", secrets.token_hex(32)
    _read_again()


def check_accepted(address: str, found: bool) -> None:
    """Ask the Ray at ``address``, host:port, who it is. ConfigError when it refuses us, or is no Ray.

    A Ray that was ``found`` on this machine is given a token that is at hand; one at an address that the user typed only if the user says
    so by ``RAY_AUTH_MODE``. Leaves a cluster that is silent, or that speaks TLS, to Ray.
    """
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return
    _read_again()
    tokens = AuthenticationTokenLoader.instance()
    by_mode = os.environ.get(MODE, "").lower() == "token"
    if _answer(address, {}) is not grpc.StatusCode.UNAUTHENTICATED:
        return
    if not tokens.has_token(ignore_auth_mode=True):
        raise ConfigError(f"the Ray cluster at {address} asks for authentication and there is no token here: {HOW}")
    if not by_mode and not found:
        raise ConfigError(f"the Ray cluster at {address} asks for authentication, which is off here: {HOW}")
    os.environ[MODE] = "token"
    _read_again()
    if _answer(address, tokens.get_token_for_http_header()) is grpc.StatusCode.UNAUTHENTICATED:
        raise ConfigError(f"the Ray cluster at {address} refuses the token of {_source()} (authentication): {HOW}")


def _source() -> str:
    """Where Ray takes the token from."""
    if os.environ.get(TOKEN):
        return f"${TOKEN}"
    return os.environ.get(TOKEN_FILE) or "~/.ray/auth_token"


def _answer(address: str, headers: dict[str, str]) -> grpc.StatusCode:
    """Status of the simplest question to the cluster's head. ConfigError when what answers is no head of Ray."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=PROBE_S, metadata=[(name.lower(), value) for name, value in headers.items()])
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.DEADLINE_EXCEEDED):
                return code
            raise ConfigError(f"no Ray cluster answers at {address}, but something else ({code.name.lower()}): give the port of the "
                              "head, 6379 unless `ray start` was told another") from error
    return grpc.StatusCode.OK


def _read_again() -> None:
    """Ray reads the variables once and keeps what they said."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
