"""A real S3 server in this process, which counts what it is asked, can go away and come back, and can be told to refuse."""

import threading
import uuid

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _Quiet(WSGIRequestHandler):
    def log(self, *arguments):
        pass


class S3Server:
    """``requests`` are those since it was last cleared, as "METHOD key?query"; ``refuse`` is the S3 error code of every answer."""

    def __init__(self):
        self.requests, self.refuse, self.port = [], "", 0
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

    def uri(self, path, credentials="key:secret"):
        """``bucket/prefix`` as a URI."""
        return f"s3://{credentials}@{path}?scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"

    def _answer(self, environ, start_response):
        method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
        self.requests.append(f"{method} {environ['PATH_INFO']}?{query}")
        if self.refuse:
            body = f"<?xml version='1.0'?><Error><Code>{self.refuse}</Code><Message>no</Message></Error>".encode()
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]
        return self._application(environ, start_response)
