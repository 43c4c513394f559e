"""An S3 server in a process of its own, that counts requests and can delay each of them."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "benchmark"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}

# Paths under /-/ are ours, everything else is S3's.
_SERVER = """
import json, logging, os, sys, threading, time
import moto.server
from werkzeug.serving import WSGIRequestHandler, make_server

WSGIRequestHandler.protocol_version = "HTTP/1.1"
logging.getLogger("werkzeug").setLevel(logging.ERROR)
inner, lock = moto.server.DomainDispatcherApplication(moto.server.create_backend_app), threading.Lock()
state = {"delay": 0.0, "requests": 0, "bytes": 0}

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path.startswith("/-/"):
        state["delay"] = float(path[3:])
        found = json.dumps(state).encode()
        state.update(requests=0, bytes=0)
        start_response("200 OK", [("Content-Length", str(len(found)))])
        return [found]
    time.sleep(state["delay"])
    body = b"".join(inner(environ, start_response))
    with lock:
        state["requests"] += 1
        state["bytes"] += len(body)
    return [body]

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.port, flush=True)
# It ends with the process that started it.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
server.serve_forever()
"""


@dataclass(frozen=True)
class Server:
    """A running server; the environment names it to clients."""

    url: str

    def delay(self, seconds: float) -> dict[str, float]:
        """Sets the delay of every request; returns how many requests and bytes there were since the last call."""
        with urllib.request.urlopen(f"{self.url}/-/{seconds}") as answer:
            return json.load(answer)


@contextmanager
def s3_server() -> Iterator[Server]:
    """Starts the server with an empty bucket, and stops it. Clients find it through AWS_* variables."""
    before = dict(os.environ)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            os.environ.update(KEYS, AWS_ENDPOINT_URL=url, AWS_ALLOW_HTTP="true")
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
            yield Server(url)
        finally:
            os.environ.clear()
            os.environ.update(before)
            process.terminate()


def upload(folder: Path, prefix: str) -> None:
    """Copies every file below a folder into the bucket."""
    import obstore

    store = open_bucket(prefix)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(store, path.relative_to(folder).as_posix(), path)


def open_bucket(prefix: str) -> "obstore.store.S3Store":
    """The bucket as obstore's store."""
    from obstore.store import from_url

    return from_url(f"s3://{BUCKET}/{prefix}", client_options={"allow_http": True})
