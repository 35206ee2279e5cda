"""Google's and Azure's stores: emulators of them on this machine, and what is said where they let nobody in."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import GOLDEN
from helpers.processes import PATIENCE

from kdcache.cache import open_cache
from kdcache.cache.push_pull import pull, push
from kdcache.cache.remote.object_store import Store
from kdcache.errors import IncompleteError, UsageError

# Not the other golden cache, two files of which end in a carriage return: gcp-storage-emulator loses it (and the push
# says then that they have not arrived whole).
DENSE = GOLDEN / "dense-v1.kdcache"
KEY = "a2RjYWNoZQ=="


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def connection(port: int) -> str:
    return f"DefaultEndpointsProtocol=http;AccountName=acct;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:{port}/acct;"


def listening(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(20 * PATIENCE):
        assert process.poll() is None, "the emulator ended"
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the emulator does not listen")


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket."""
    for library in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(library)
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(
        [*command, "--in-memory", "--default-bucket=models"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        listening(process, port)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://models"
        process.kill()


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty container."""
    pytest.importorskip("adlfs")
    from azure.storage.blob import BlobServiceClient

    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("no azurite-blob on the PATH: npm install -g azurite")
    port = free_port()
    monkeypatch.setenv("AZURITE_ACCOUNTS", f"acct:{KEY}")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(port))
    with subprocess.Popen(
        [azurite, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port)],
        stdout=subprocess.DEVNULL,
    ) as process:
        listening(process, port)
        with BlobServiceClient.from_connection_string(connection(port)) as client:
            client.create_container("models").close()
        yield "az://models"
        process.kill()


@pytest.mark.parametrize("cloud", ["google", "azure"])
def test_what_is_pulled_is_what_was_pushed(cloud: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"{request.getfixturevalue(cloud)}/teams/a/teacher.kdcache"
    with pytest.raises(UsageError, match="no cache found at"):
        open_cache(url)
    first, again = push(DENSE, url), push(DENSE, url)
    assert (first.kept, again.files) == (0, 0)
    pulled = pull(url, tmp_path / "pulled", digest=first.digest)
    for path in DENSE.rglob("*"):
        if path.is_file():
            assert (tmp_path / "pulled" / path.relative_to(DENSE)).read_bytes() == path.read_bytes()
    assert open_cache(url).manifest == pulled.manifest


def test_azure_without_an_account_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("adlfs")
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    with pytest.raises(UsageError, match="AZURE_STORAGE_CONNECTION_STRING"):
        Store("az://models/teacher")


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that lets nobody in."""

    def do_GET(self) -> None:
        body = b'{"error": {"code": 403, "message": "not yours"}}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # the library's name
        """Nothing: pytest's output is for other things."""


@pytest.fixture
def refusing() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_who_is_not_let_in_is_told_at_once_to_give_credentials(
    scheme: str, refusing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"gs": "gcsfs", "az": "adlfs"}[scheme])
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{refusing}")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection(refusing))
    with pytest.raises(UsageError, match=r"access to .* is denied(?s:.)*GOOGLE_APPLICATION_CREDENTIALS"):
        Store(f"{scheme}://models/teacher").read("manifest.json", 100)


def test_a_library_that_tries_again_itself_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    store, asked = Store("gs://models/teacher"), []

    def unreachable(path: str, **_: object) -> bytes:
        asked.append(path)
        raise ConnectionError("no route")

    monkeypatch.setattr(store._fs, "cat_file", unreachable)
    with pytest.raises(IncompleteError, match="tried for a minute: no route"):
        store.read("manifest.json", 100)
    assert asked == ["models/teacher/manifest.json"]
