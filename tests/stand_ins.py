"""What stands in for services in tests, on free ports of this machine."""

import json
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler

import pytest


class JsonHandler(BaseHTTPRequestHandler):
    """Reads bodies and answers JSON."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, told, code=200):
        """Send JSON, or a string as plain text."""
        raw = told.encode() if isinstance(told, str) else json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(told, str) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def s3():
    """An S3 server whose address and keys are in the environment: its file system, and what ends it early."""
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    names |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as end:
        end.callback(running.stop)
        for name, value in names.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3fs.S3FileSystem(), end.close
        s3fs.S3FileSystem.clear_instance_cache()
