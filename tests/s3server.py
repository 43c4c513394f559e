"""A real S3 protocol server on this machine (moto, in a process of its own) and a proxy that makes its network bad."""

import http.client
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_REGION": "us-east-1"}
NO_STORE = "obstore and moto are needed: pip install -e '.[s3,test]'"

# One request at a time: moto checks the condition of a put and stores the object in two steps, a store does it in one.
SERVER = """
import os, sys, threading
import moto.server
from werkzeug.serving import WSGIRequestHandler, make_server

class Quiet(WSGIRequestHandler):
    def log(self, *args, **kwargs):
        pass

inner, lock = moto.server.DomainDispatcherApplication(moto.server.create_backend_app), threading.Lock()

def app(environ, start_response):
    with lock:
        return list(inner(environ, start_response))

server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
print(server.port, flush=True)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
server.serve_forever()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """Runs the server; gives the URL of its endpoint. It ends with this block, or with this process."""
    pytest.importorskip("obstore", reason=NO_STORE)
    pytest.importorskip("moto", reason=NO_STORE)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "moto did not start within 60 s"
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def s3_environment(endpoint: str) -> Iterator[None]:
    """Credentials and endpoint in this process's environment, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}).items():
            patch.setenv(name, value)
        yield


def make_bucket(endpoint: str, name: str) -> str:
    """Makes a bucket; gives its URL."""
    ask(endpoint, "PUT", f"/{name}")
    return f"s3://{name}"


def ask(endpoint: str, method: str, path: str, body: bytes = b"") -> bytes:
    """One plain request to the server, past the code under test."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
    try:
        # moto asks who it is, and does not check the signature.
        scope = f"{ENVIRONMENT['AWS_ACCESS_KEY_ID']}/20260101/us-east-1/s3/aws4_request"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"}
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status < 300, (answer.status, data)
        return data
    finally:
        connection.close()


@dataclass
class Proxy:
    """A proxy before an S3 server.

    `fault(method, path)` names what happens to a request: "" (nothing), a status such as "503", "reset" (closed before
    the server sees it), "lost" (the server does it, then it is closed), "lost 500" (the server does it, the answer says
    500), "cut" (half of the body, then closed). `seconds` is added to every request. `requests` are those that came,
    faults included; `peak` is the most at once.
    """

    server: str
    endpoint: str = ""
    seconds: float = 0.0
    fault: Callable[[str, str], str] = lambda method, path: ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    open: int = 0
    peak: int = 0


@contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """Runs a proxy before `server`."""
    state, lock = Proxy(server), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                state.requests.append((self.command, self.path))
                state.open += 1
                state.peak = max(state.peak, state.open)
            try:
                time.sleep(state.seconds)
                self._serve(body, state.fault(self.command, self.path))
            finally:
                with lock:
                    state.open -= 1

        def _serve(self, body: bytes, fault: str) -> None:
            if fault == "reset":
                return self._reset()
            if fault.isdigit():
                return self._answer(int(fault), {}, b"", 0)
            upstream = http.client.HTTPConnection(urlsplit(state.server).netloc, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            try:
                upstream.request(self.command, self.path, body=body, headers=headers)
                found = upstream.getresponse()
                data, headers = found.read(), dict(found.getheaders())
            finally:
                upstream.close()
            if fault.startswith("lost"):
                return self._answer(500, {}, b"", 0) if fault == "lost 500" else self._reset()
            size = int(headers.get("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
            self._answer(found.status, headers, data[: len(data) // 2] if fault == "cut" else data, size)
            if fault == "cut":
                self._reset()
            return None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any

        def _answer(self, status: int, headers: dict[str, str], data: bytes, size: int) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(data)

        def _reset(self) -> None:
            self.wfile.flush()
            # Closed with a reset, not with an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

        def finish(self) -> None:
            with suppress(OSError):
                super().finish()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

        def shutdown_request(self, request: Any) -> None:
            with suppress(OSError):
                super().shutdown_request(request)

    listening = Server(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
