"""Servers on loopback that caches are pulled from and pushed to, and what goes wrong with them."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[[str, int], str | bytes | None]
"""(path, how often it was asked for before) -> what goes wrong; None for nothing, bytes to send instead."""


class FileServer:
    """A plain HTTP server of a folder, with range requests.

    Attributes:
        url: of it.
        asked: how often each path was asked for.
        fault: what goes wrong with a request: "503", "404", "drop" (a connection that ends in the middle), "cut" (a
            body that is too short and says so), "slow", "endless", "refuse" (403), or a body of other bytes.
    """

    def __init__(self, folder: Path, latency: float = 0) -> None:
        self.folder, self.latency = folder, latency
        self.asked: Counter[str] = Counter()
        self.fault: Fault = lambda path, before: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def data_requests(self) -> int:
        """Requests for anything but what is said about the cache."""
        return sum(count for path, count in self.asked.items() if "/data.zarr/" in path or "/commits/" in path)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server._lock:
                    before = server.asked[self.path]
                    server.asked[self.path] += 1
                time.sleep(server.latency)
                file = server.folder / self.path.lstrip("/")
                fault = server.fault(self.path, before)
                if fault == "refuse":
                    self.send_error(403)
                elif fault == "503":
                    self.send_error(503)
                elif fault == "404" or not file.is_file():
                    self.send_error(404)
                else:
                    self._send(fault if isinstance(fault, bytes) else file.read_bytes(), fault)

            def _send(self, data: bytes, fault: str | bytes | None) -> None:
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked:
                    data = data[int(asked[1]) : int(asked[2] or len(data)) + 1]
                self.send_response(206 if asked else 200)
                if fault == "endless":
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.close_connection = True
                    for _ in range(2**12):  # 256 MiB: more than any test's file by far
                        self.wfile.write(bytes(2**16))
                    return
                sent = data[: len(data) // 2] if fault in ("drop", "cut") else data
                self.send_header("Content-Length", str(len(sent if fault == "cut" else data)))
                self.end_headers()
                if fault == "slow":
                    for start in range(0, len(sent), max(len(sent) // 8, 1)):
                        self.wfile.write(sent[start : start + max(len(sent) // 8, 1)])
                        time.sleep(0.01)
                else:
                    self.wfile.write(sent)
                if fault == "drop":
                    self.close_connection = True

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the other side has had enough
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class ObjectServer:
    """An S3 server (moto's), whose requests are counted, and refused if `fault` says so.

    Attributes:
        endpoint: its URL, for AWS_ENDPOINT_URL.
        asked: how often each method was used on each path.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import ThreadedWSGIServer

        self._application = DomainDispatcherApplication(create_backend_app)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self._server = ThreadedWSGIServer("127.0.0.1", 0, self._answer)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.asked[method, path] += 1
        if (status := self.fault(method, path)) is not None:
            start_response(status, [("Content-Length", "0")])
            return [b""]
        return self._application(environ, start_response)

    def reset(self, bucket: str) -> None:
        """Forget everything, and make an empty bucket."""
        self.fault = lambda method, path: None
        connection = HTTPConnection("127.0.0.1", self._port)
        for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{bucket}")):
            connection.request(method, path)
            assert connection.getresponse().read() is not None
        connection.close()
        self.asked.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class HubServer:
    """As much of the Hugging Face Hub as a push and a pull of small files need: one data set, in memory.

    Attributes:
        url: for HF_ENDPOINT.
        files: by path.
        commits: the paths of each, in their order.
    """

    def __init__(self, repository: str) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self._of = f"datasets/{repository}"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes) -> object:
        """The answer to a request of the Hub's API."""
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"/api/{self._of}/preupload/main":
            named = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]}
        if path == f"/api/{self._of}/commit/main":
            changes = [json.loads(line) for line in body.splitlines()]
            self.commits.append([])
            for change in changes[1:]:
                name = change["value"]["path"]
                self.commits[-1].append(name)
                if change["key"] == "deletedFile":
                    del self.files[name]
                else:
                    self.files[name] = base64.b64decode(change["value"]["content"])
            commit = f"{self.url}/{self._of}/commit/{'0' * 40}"
            return {"success": True, "commitOid": "0" * 40, "commitUrl": commit, "hookOutput": ""}
        return None

    def get(self, path: str) -> bytes | None:
        """What a GET brings: a file, or the list of all."""
        if path == f"/api/{self._of}/tree/main":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()
            ]
            return json.dumps(listed).encode()
        return self.files.get(path.removeprefix(f"/{self._of}/resolve/main/"))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(server.get(self.path.partition("?")[0]))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = server.post(self.path.partition("?")[0], body)
                self._send(None if answer is None else json.dumps(answer).encode())

            def _send(self, data: bytes | None) -> None:
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A file server for as long as it is needed."""
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.close()
