"""A real S3 server in this process, which counts what it is asked, can go away and come back, and can be told to refuse."""

import contextlib
import threading
import uuid

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from cosmos_ray.replay import ReplayStore
from tests.test_replay_episode import make_episode


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments):
        pass


#: What a client of the server has in its environment.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


class S3Server:
    """``requests`` are those since it was last cleared, as "METHOD key?query"; ``refuse`` is the S3 error code of every answer.

    Its library checks ``If-None-Match`` and writes without a lock; real servers do both at once. So one PUT runs at a time.
    """

    def __init__(self):
        self.requests, self.refuse, self.port = [], "", 0
        self._putting = threading.Lock()
        self._application = DomainDispatcherApplication(create_backend_app)
        self.start()
        self._client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1",
                                    aws_access_key_id="key", aws_secret_access_key="secret")  # fmt: skip

    def start(self):
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self):
        """Refuse connections from now on; what is stored stays."""
        self._server.shutdown()
        self._server.server_close()

    def new_bucket(self):
        bucket = f"b{uuid.uuid4().hex[:12]}"
        self._client.create_bucket(Bucket=bucket)
        return bucket

    def uri(self, path):
        """``bucket/prefix`` as a URI."""
        return f"s3://{path}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"

    def _answer(self, environ, start_response):
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        self.requests.append(f"{method} {environ['PATH_INFO']}?{query}")
        if self.refuse:
            body = f"<?xml version='1.0'?><Error><Code>{self.refuse}</Code><Message>no</Message></Error>".encode()
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]
        with self._putting if method == "PUT" else contextlib.nullcontext():
            return self._application(environ, start_response)


NAMES = [make_episode(seed).key.name for seed in range(10)]


def running_server():
    """For a fixture of a module."""
    made = S3Server()
    yield made
    made.stop()


def fresh_uri(server, tmp_path, monkeypatch):
    """For a fixture: a fresh bucket, and a fresh local cache."""
    for name, value in {**CREDENTIALS, "COSMOS_RAY_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    uri = server.uri(f"{server.new_bucket()}/runs/replay")
    server.requests.clear()
    return uri


def fill(store, seeds=range(4)):
    for seed in seeds:
        assert store.commit(make_episode(seed)) is True


def opened(uri):
    store = ReplayStore(uri, create=False)
    store.refresh()
    return store


def episode_objects(store):
    return store.storage._list("episodes")
