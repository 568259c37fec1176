"""The client of the bucket that a URI names, and the meaning of the server's errors.

``s3://bucket/prefix`` takes the options ``region``, ``endpoint_override`` (``host:port`` or a URL, for servers that are not AWS) and
``scheme`` (``http`` or ``https``) in its query; ``gs://bucket/prefix`` takes none. Credentials come from the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``), from the profile ``AWS_PROFILE`` in ``~/.aws``, or from the
machine's role; for ``gs://`` from ``GOOGLE_APPLICATION_CREDENTIALS`` or the machine's service account.
"""

from __future__ import annotations

import configparser
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from obstore.exceptions import BaseError
from obstore.store import GCSStore, S3Store

from cosmos_ray.errors import StoreError
from cosmos_ray.uri import uri_problem

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

OPTIONS = ("region", "endpoint_override", "scheme")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # environment variables, the first one that is set counts

_RETRY: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
_TIMEOUT = "10m"  # of a request with its body: an episode over a slow line
# What the servers say that no later try changes.
_FINAL = (
    (re.compile(r"NoSuchBucket|bucket does not exist"), errno.ENXIO, "there is no such bucket: make it, or check the URI"),
    (re.compile(r"169\.254\.|metadata\.google"), errno.EKEYREJECTED,
     "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or GOOGLE_APPLICATION_CREDENTIALS"),
    (re.compile(r"PermissionDenied|Unauthenticated|status code: 40[13]"), errno.EKEYREJECTED,
     "the server refuses this access: check the credentials and what they may do there"),
    (re.compile(r"incorrectly configured region"), errno.ENXIO, "the bucket is in another region: set AWS_REGION, or ?region= in the URI"),
)  # fmt: skip


def open_bucket(uri: str) -> S3Store | GCSStore:
    """A client whose paths are relative to ``uri``; it sends no request yet. StoreError if the URI cannot be used."""
    if problem := uri_problem(uri):
        raise StoreError(problem)
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    bucket, _, prefix = address.partition("/")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = OPTIONS if scheme == "s3" else ()
    if unknown := sorted(set(options) - set(known)):
        there = ", ".join(known) or "none"
        raise StoreError(f"{scheme}://{address} cannot be used as a store: it has no option {unknown[0]!r}, only {there}")
    prefix = unquote(prefix).strip("/")
    try:
        if scheme == "gs":
            return GCSStore(bucket, prefix=prefix or None, client_options={"timeout": _TIMEOUT}, retry_config=_RETRY)
        config: dict[str, Any] = _profile()
        if "region" in options:
            config["region"] = options["region"]
        endpoint = _endpoint(options)
        if endpoint:
            config["endpoint"] = endpoint
        client: ClientConfig = {"timeout": _TIMEOUT, "allow_http": endpoint.startswith("http://")}
        return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=_RETRY, **config)
    except (BaseError, ValueError) as error:
        raise StoreError(f"{scheme}://{address} cannot be used as a store: {_first_line(error)}") from error


@contextmanager
def answers() -> Iterator[None]:
    """Turn the client's errors into OSErrors. Final ones get an error number, which tells them from those that may pass."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        told = f"{type(error).__name__}: {error}"
        for pattern, number, advice in _FINAL:
            if pattern.search(told):
                raise OSError(number, advice) from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "there is no such object") from error
        raise OSError(_first_line(error)) from error


def _endpoint(options: dict[str, str]) -> str:
    """The server's URL; empty for AWS."""
    given = options.get("endpoint_override") or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "")
    if not given or "://" in given:
        return given
    return f"{options.get('scheme', 'https')}://{given}"


def _profile() -> dict[str, str]:
    """Keys and region of the profile in use from the files of the AWS tools, as far as the environment does not give them."""
    name = os.environ.get("AWS_PROFILE", "default")
    home = Path("~/.aws").expanduser()
    keys = _section(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"), name)
    more = _section(os.environ.get("AWS_CONFIG_FILE", home / "config"), name if name == "default" else f"profile {name}")
    found = {}
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        wanted = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key", "session_token": "aws_session_token"}
        found = {ours: value for ours, theirs in wanted.items() if (value := keys.get(theirs) or more.get(theirs))}
    if "region" in more and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & set(os.environ):
        found["region"] = more["region"]
    return found


def _section(file: str | Path, name: str) -> dict[str, str]:
    """A section of a settings file; empty where there is none."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(file)
        return dict(parser[name]) if parser.has_section(name) or name == parser.default_section else {}
    except configparser.Error as error:
        raise StoreError(f"{file} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip()
