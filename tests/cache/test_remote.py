"""Caches that are pushed, pulled and opened by URL: they end right, or say what failed, whatever the servers do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.cli import npz_recipe, ok, refused
from helpers.corruption import FORGED, flipped, forge, refresh
from helpers.paths import GOLDEN
from helpers.processes import PATIENCE, in_a_process, until
from helpers.remote_servers import Fault, FileServer, HubServer, ObjectServer, serving
from torch import Tensor

from kdcache import open_cache
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.zarr_store import read_inputs
from kdcache.cache.inspect.audit import audit
from kdcache.cache.push_pull import pull, push
from kdcache.cache.remote import object_store
from kdcache.cache.remote.address import source
from kdcache.cache.remote.mirror import remote_manifest
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, MismatchError, UsageError

pytest.importorskip("aiohttp")

DIGEST = read_manifest(GOLDEN / "lowrank-v1.kdcache" / "manifest.json").digest
DATA = 52
"""Files of that cache without its manifest."""

BUCKET = "s3://bucket/team/c"


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, and second attempts that come at once."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(object_store, "FIRST_WAIT", 0.001)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two views of a cache in two shards, with a card."""
    path = Path(shutil.copytree(GOLDEN / "lowrank-v1.kdcache", tmp_path / "www" / "c"))
    (path / "README.md").write_text("The card.")
    return path


@pytest.fixture
def server(cache: Path) -> Iterator[FileServer]:
    """A web server that has it."""
    with serving(cache.parent) as server:
        yield server


@pytest.fixture(scope="session")
def objects() -> Iterator[ObjectServer]:
    """An S3 server with an empty bucket."""
    for library in ("moto", "s3fs"):
        pytest.importorskip(library)
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def bucket(objects: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """The same, made empty again, with what boto needs to find it."""
    for name, value in aws(objects).items():
        monkeypatch.setenv(name, value)
    objects.fault = lambda method, path: None
    objects.reset("bucket")
    return objects


def aws(server: ObjectServer) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def logits(path: str | Path, view: int = 0) -> Tensor:
    opened = open_cache(path)
    read_inputs(opened.path, opened.manifest.plan, view)
    return opened.teacher()(torch.arange(len(opened)), view)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, the card too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def puts(server: ObjectServer) -> Counter[str]:
    return Counter({path: count for (method, path), count in server.asked.items() if method == "PUT"})


# What is pushed is what is pulled.


@pytest.mark.parametrize("where", ["s3", "file"])
def test_what_is_pulled_is_what_was_pushed(where: str, cache: Path, tmp_path: Path, bucket: ObjectServer) -> None:
    url = BUCKET if where == "s3" else f"file://{tmp_path / 'shared' / 'c'}"
    pushed = push(cache, url)
    size = sum(map(len, contents(cache).values()))
    assert pushed == (DIGEST, DATA + 2, size, 0)
    pulled = pull(url, tmp_path / "pulled", digest=DIGEST)
    assert contents(tmp_path / "pulled") == contents(cache)
    assert (pulled.manifest.digest, pulled.views) == (DIGEST, (0, 1))
    for view in (0, 1):
        assert torch.equal(logits(url, view), logits(cache, view))


def test_it_is_read_in_three_requests_and_a_second_use_takes_no_data(server: FileServer, cache: Path) -> None:
    url = f"{server.url}/c"
    assert remote_manifest(source(url))[0] == read_manifest(cache / "manifest.json")
    assert server.asked == {"/c/manifest.json": 1}
    server.asked.clear()
    first = open_cache(url)
    assert server.data_requests() == DATA
    assert server.asked.total() - DATA <= 3
    assert set(server.asked.values()) == {1}
    server.asked.clear()
    assert open_cache(url).path == first.path
    assert (server.data_requests(), server.asked.total() <= 3) == (0, True)
    server.asked.clear()
    for pinned in (open_cache(f"{url}#{DIGEST}"), open_cache(url, digest=DIGEST)):
        assert pinned.path == first.path
    assert not server.asked


def test_only_the_views_that_are_asked_for_are_fetched(server: FileServer, cache: Path, tmp_path: Path) -> None:
    url, folder = f"{server.url}/c", tmp_path / "pulled"
    assert pull(url, folder, views=[1]).views == (1,)
    assert not [path for path in server.asked if "/c/0/" in path and "/tail" not in path.replace("/tail/c", "")
                and "labels" not in path and "sample_keys" not in path]  # fmt: skip
    here = open_cache(folder)
    assert here.views == (1,)
    ids = torch.arange(len(here))
    for placement in ("host", "mmap", "stream"):
        teacher = here.teacher(placement=placement)
        assert torch.equal(teacher(ids, 1), open_cache(cache).teacher()(ids, 1))
        with pytest.raises(UsageError, match="view 0 was not opened: views 1 of 2 are"):
            teacher(ids, 0)
    with pytest.raises(IncompleteError, match="holds view 1 of 2, not view 0"):
        open_cache(folder, views=[0, 1])
    with pytest.raises(UsageError, match=r"views \[7\] are not in this cache of 2 views"):
        open_cache(url, views=[7])
    found = audit(folder)
    assert found.problems == []
    assert isinstance(found.failure, IncompleteError)
    before = server.asked.copy()
    assert pull(url, folder).views == (0, 1)
    again = {path for path, count in server.asked.items() if count > before[path] and path in before}
    assert again <= {"/c/manifest.json", "/c/manifest.json.sig", "/c/README.md", "/c/card.png"}
    assert contents(folder) == contents(cache)
    assert audit(folder).failure is None


def test_the_first_views_are_as_many_as_there_are(server: FileServer, cache: Path) -> None:
    assert open_cache(f"{server.url}/c", views=1).views == (0,)
    assert open_cache(f"{server.url}/c", views=30).views == (0, 1)
    assert open_cache(cache, views=1).views == (0,)


def test_a_mirror_that_was_damaged_is_mended(server: FileServer, cache: Path) -> None:
    url = f"{server.url}/c#{DIGEST}"
    mirrored = open_cache(url).path
    for name in ("data.zarr/log_probs/c/0/0/0", "manifest.json"):
        (mirrored / name).write_bytes(flipped((mirrored / name).read_bytes(), 10))
        server.asked.clear()
        open_cache(url)
        assert server.data_requests() == name.startswith("data.zarr")
        assert (mirrored / name).read_bytes() == (cache / name).read_bytes()


# Pinning.


def test_another_digest_than_the_pinned_one_is_refused(server: FileServer, cache: Path, tmp_path: Path) -> None:
    url, other = f"{server.url}/c", "sha256:" + "ab" * 32
    calls: list[Callable[[], object]] = [
        lambda: pull(url, tmp_path / "x", digest=other),
        lambda: pull(f"{url}#{other}", tmp_path / "x"),
        lambda: open_cache(url, digest=other),
        lambda: open_cache(f"{cache}#{other}"),
    ]
    for call in calls:
        with pytest.raises(MismatchError) as caught:
            call()
        assert DIGEST in caught.value.what
        assert other in caught.value.what
    assert server.data_requests() == 0
    assert not (tmp_path / "x").exists()
    assert open_cache(f"{cache}#{DIGEST}").manifest.digest == DIGEST
    for nonsense in (f"{url}#sha256:12", f"{url}#sha256:{'AB' * 32}"):
        with pytest.raises(UsageError, match="is not a digest"):
            open_cache(nonsense)
    with pytest.raises(UsageError, match="pass one digest"):
        open_cache(f"{url}#{DIGEST}", digest=other)


# Pushing.


def test_pushing_the_same_again_does_nothing(cache: Path, bucket: ObjectServer) -> None:
    push(cache, BUCKET)
    bucket.asked.clear()
    assert push(cache, BUCKET) == (DIGEST, 0, 0, DATA + 1)
    assert not puts(bucket)
    (cache / "README.md").write_text("Another card.")
    assert push(cache, BUCKET) == (DIGEST, 1, len("Another card."), DATA + 1)
    assert set(puts(bucket)) == {"/bucket/team/c/README.md"}


def test_the_manifest_comes_last(cache: Path, bucket: ObjectServer) -> None:
    push(cache, BUCKET)
    order = [path for method, path in bucket.asked if method == "PUT"]
    assert order[0] == "/bucket/team/c/pushing"
    assert order[-1] == "/bucket/team/c/manifest.json"
    assert len(order) == DATA + 3
    assert ("DELETE", "/bucket/team/c/pushing") in bucket.asked


def test_another_cache_is_never_pushed_over(cache: Path, tmp_path: Path, bucket: ObjectServer) -> None:
    push(cache, BUCKET)
    dense = GOLDEN / "dense-v1.kdcache"
    bucket.asked.clear()
    with pytest.raises(MismatchError) as caught:
        push(dense, BUCKET)
    assert DIGEST in caught.value.what
    assert open_cache(dense).manifest.digest in caught.value.what
    assert not puts(bucket)


def test_what_is_not_whole_is_not_pushed(cache: Path, tmp_path: Path, server: FileServer) -> None:
    url = f"file://{tmp_path / 'shared'}"
    part = tmp_path / "part"
    pull(f"{server.url}/c", part, views=[0])
    with pytest.raises(IncompleteError, match="holds view 0 of 2, not view 1"):
        push(part, url)
    with pytest.raises(UsageError, match="is read-only"):
        push(cache, f"{server.url}/d")
    (cache / "data.zarr/tail/c/0/0/0").write_bytes(b"")
    with pytest.raises(CorruptError, match="tail/c/0/0/0 has 0 bytes"):
        push(cache, url)
    (cache / "manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"manifest\.json is missing"):
        push(cache, url)
    assert not (tmp_path / "shared").exists()


def push_in(environment: dict[str, str], cache: Path, url: str) -> None:
    os.environ.update(environment)
    push(cache, url)


@pytest.mark.parametrize("at", [1, 20, DATA + 3])
def test_a_push_that_is_killed_goes_on(at: int, cache: Path, tmp_path: Path, bucket: ObjectServer) -> None:
    process = in_a_process(push_in, aws(bucket), cache, BUCKET)
    arrived: list[str] = []

    def kill(method: str, path: str) -> str | None:
        if method == "PUT":
            arrived.append(path)
            if len(arrived) >= at:
                os.kill(process.pid or 0, signal.SIGKILL)
                return "500 Internal Server Error"
        return None

    bucket.fault = kill
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    bucket.fault = lambda method, path: None
    there = {f"/{path}" for path in fsspec.filesystem("s3", skip_instance_cache=True).find("bucket/team/c")}
    assert len(there) <= at - 1
    assert "/bucket/team/c/manifest.json" not in there
    with pytest.raises((IncompleteError, UsageError), match="still being pushed" if there else "no cache found"):
        open_cache(BUCKET)
    if there:
        with pytest.raises(MismatchError, match="a part of another cache"):
            push(GOLDEN / "dense-v1.kdcache", BUCKET)
    bucket.asked.clear()
    done = push(cache, BUCKET)
    # What had arrived is not put there again, but for what no digest covers.
    assert not {path for path in puts(bucket) if "/data.zarr/" in path or "/commits/" in path} & there
    assert done.kept == len([path for path in there if "/data.zarr/" in path or "/commits/" in path])
    assert contents(pull(BUCKET, tmp_path / "pulled").path) == contents(cache)
    assert not bucket.asked["GET", "/bucket/team/c/pushing"] > 2


def killed_while_pushing(cache: Path, url: str, at: int) -> None:
    from kdcache.cache.remote import object_store as those

    put, count = those.Store._put, iter(range(10**6))

    def put_or_die(self: object_store.Store, name: str, content: Path | bytes) -> None:
        if next(count) == at:
            folder = Path(self._path(name)).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{Path(name).name}.partial").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, name, content)

    those.Store._put = put_or_die  # type: ignore[method-assign]
    push(cache, url)


@pytest.mark.parametrize("at", [0, 7, DATA + 2])
def test_a_push_to_a_folder_that_is_killed_goes_on(at: int, cache: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'shared'}"
    process = in_a_process(killed_while_pushing, cache, url, at)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(KdcacheError, match=r"still being pushed|no cache found"):
        open_cache(url)
    push(cache, url)
    assert contents(pull(url, tmp_path / "pulled").path) == contents(cache)


# Servers that do not do what they should.

HEAL: dict[str, Fault] = {
    "503": lambda path, before: "503" if before < 3 else None,
    "dropped": lambda path, before: "drop" if before < 2 else None,
    "cut": lambda path, before: "cut" if before < 1 and "data.zarr" in path else None,
    "slow": lambda path, before: "slow",
    "other bytes once": lambda path, before: b"\0" * 100 if before < 1 and "data.zarr" in path else None,
}


@pytest.mark.parametrize("how", HEAL)
def test_a_fault_that_passes_is_overcome(how: str, server: FileServer, cache: Path, tmp_path: Path) -> None:
    server.fault = HEAL[how]
    assert contents(pull(f"{server.url}/c", tmp_path / "pulled").path) == contents(cache)


NAME = "data.zarr/log_probs/c/1/0/0"
STAY: dict[str, tuple[str | bytes, type[KdcacheError], str]] = {
    "503": ("503", IncompleteError, "could not be reached, tried 6 times: 503"),
    "dropped": ("drop", IncompleteError, "could not be reached"),
    "cut": ("cut", CorruptError, "has .* bytes, its manifest declares .*"),
    "wrong": (b"\1", CorruptError, "has 1 bytes"),
    "longer": (b"\1" * 10**5, CorruptError, "has more than"),
    "endless": ("endless", CorruptError, "has more than"),
    "gone": ("404", CorruptError, "is listed in the manifest and not found at .*"),
    "refused": ("refuse", UsageError, "access to .* is denied"),
}


@pytest.mark.parametrize("how", STAY)
def test_a_fault_that_stays_is_named_and_nothing_wrong_is_used(
    how: str, server: FileServer, cache: Path, tmp_path: Path
) -> None:
    url, folder = f"{server.url}/c", tmp_path / "pulled"
    fault, kind, words = STAY[how]
    server.fault = lambda path, before: fault if path.endswith(NAME) else None
    calls: list[Callable[[], object]] = [lambda: pull(url, folder), lambda: open_cache(url)]
    for call in calls:
        with pytest.raises(kind, match=rf"(?s){NAME}.*{words}|{words}.*{NAME}") as caught:
            call()
        assert caught.value.fix
    assert not (folder / NAME).exists()
    assert not (folder / "manifest.json").exists()
    with pytest.raises(IncompleteError, match=r"the pull to .* is unfinished"):
        open_cache(folder)
    with pytest.raises(UsageError, match=r"exists and is not a cache|is inside"):
        pull(url, folder / "data.zarr")
    # All that did come is right, and is not fetched again.
    for name, data in contents(folder).items():
        assert name == "pulling" or data == (cache / name).read_bytes()
    came = {path for path in contents(folder) if path != "pulling"}
    server.fault = lambda path, before: None
    server.asked.clear()
    assert contents(pull(url, folder).path) == contents(cache)
    assert not {path.removeprefix("/c/") for path in server.asked} & came


def test_a_manifest_that_comes_wrong_is_refused(server: FileServer, cache: Path, tmp_path: Path) -> None:
    right = (cache / "manifest.json").read_bytes()
    for wrong in (b"", b"{}", right[:-1], flipped(right, 200), right + b" "):
        server.fault = lambda path, before, sent=wrong: sent if path.endswith("manifest.json") else None  # type: ignore[misc]
        with pytest.raises(CorruptError, match=rf"{server.url}/c/manifest\.json is damaged"):
            pull(f"{server.url}/c", tmp_path / "pulled")
    assert server.data_requests() == 0
    with pytest.raises(UsageError, match="no cache found at"):
        pull(f"{server.url}/elsewhere", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_server_that_is_not_there(tmp_path: Path, cache: Path) -> None:
    with serving(cache) as server:
        url = server.url
    with pytest.raises(IncompleteError, match="could not be reached"):
        open_cache(url)


def test_an_s3_server_that_is_busy_is_asked_again(
    cache: Path, tmp_path: Path, bucket: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache, BUCKET)
    bucket.asked.clear()
    seen: Counter[str] = Counter()

    def busy(method: str, path: str) -> str | None:
        seen[path] += 1
        return "503 Slow Down" if path.endswith("c/0/0/0") and seen[path] == 1 else None

    bucket.fault = busy
    assert contents(pull(BUCKET, tmp_path / "pulled").path) == contents(cache)


def pull_in(home: str, url: str, folder: Path | None) -> None:
    os.environ["KDCACHE_HOME"] = home
    open_cache(url) if folder is None else pull(url, folder)


@pytest.mark.parametrize("at", [1, 30])
def test_a_pull_that_is_killed_goes_on(at: int, server: FileServer, cache: Path, tmp_path: Path) -> None:
    url, folder = f"{server.url}/c", tmp_path / "pulled"
    process = in_a_process(pull_in, str(tmp_path / "home"), url, folder)

    def kill(path: str, before: int) -> str | None:
        if server.data_requests() >= at:
            process.kill()
            return "503"
        return None

    server.fault = kill
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    came = {f"/c/{name}" for name in contents(folder) if not name.startswith(("incoming-", "pulling"))}
    with pytest.raises(IncompleteError, match=r"the pull to .* is unfinished"):
        open_cache(folder)
    server.fault = lambda path, before: None
    server.asked.clear()
    pull(url, folder)
    assert not came & set(server.asked)
    assert contents(folder) == contents(cache)


@pytest.mark.parametrize("shared", ["mirror", "folder"])
def test_two_processes_pull_the_same_at_once(shared: str, server: FileServer, cache: Path, tmp_path: Path) -> None:
    server.latency = 0.01
    folder = tmp_path / "pulled" if shared == "folder" else None
    processes = [in_a_process(pull_in, str(tmp_path / "home"), f"{server.url}/c", folder) for _ in range(2)]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert server.data_requests() == DATA, "the second finds what the first has fetched"
    assert torch.equal(logits(folder or f"{server.url}/c"), logits(cache))


# Hostile caches: the digests fit, and what they vouch for is meant to do harm.


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_is_refused_before_anything_is_fetched(
    what: str, server: FileServer, cache: Path, tmp_path: Path
) -> None:
    forge(cache, FORGED[what])
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    with pytest.raises(CorruptError):
        logits(pull(f"{server.url}/c", tmp_path / "pulled").path)
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "pulled")}
    # What was hashed of the pulled cache is remembered.
    after = {path for path in after if not path.is_relative_to(tmp_path / "home/verified")}
    assert {path for path in after if cache not in path.parents} <= before | {tmp_path / "home"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def inner(codecs: object) -> Callable[[Path], None]:
    """Other codecs of the chunks of an array."""

    def change(cache: Path) -> None:
        path = cache / "data.zarr/log_probs/zarr.json"
        metadata = json.loads(path.read_bytes())
        metadata["codecs"][0]["configuration"]["codecs"] = codecs
        path.write_text(json.dumps(metadata))

    return change


def consolidated(cache: Path) -> None:
    """Metadata of all arrays together, which say something else of one than it says itself."""
    metadata = {path.parent.name: json.loads(path.read_bytes()) for path in (cache / "data.zarr").glob("*/zarr.json")}
    metadata["log_probs"]["codecs"][0]["configuration"]["codecs"][1] = {"name": "gzip", "configuration": {"level": 1}}
    group = cache / "data.zarr/zarr.json"
    content = json.loads(group.read_bytes())
    content["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    group.write_text(json.dumps(content))


def packed(name: str, chunk: bytes) -> Callable[[Path], None]:
    """A shard whose first chunk is this, with right checksums everywhere, followed by the others as they were."""

    def change(cache: Path) -> None:
        import google_crc32c

        def sealed(data: bytes) -> bytes:
            return data + int(google_crc32c.value(data)).to_bytes(4, "little")

        path = cache / "data.zarr" / name
        data = path.read_bytes()
        metadata = json.loads((cache / "data.zarr" / name.split("/", maxsplit=1)[0] / "zarr.json").read_bytes())
        whole = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        one = metadata["codecs"][0]["configuration"]["chunk_shape"]
        index = 16
        for extent, part in zip(whole, one, strict=True):
            index *= extent // part
        entries = data[-index - 4 : -4]
        body = data[: -index - 4]
        bomb = sealed(chunk)
        first = len(body).to_bytes(8, "little") + len(bomb).to_bytes(8, "little")
        path.write_bytes(body + bomb + sealed(first + entries[16:]))

    return change


def zstd(size: int, frames: int = 1) -> bytes:
    """`size` zeros, `frames` times one after the other."""
    from numcodecs import Zstd

    return bytes(Zstd(level=3).encode(bytes(size))) * frames


def blosc(size: int) -> bytes:
    from numcodecs import Blosc

    return bytes(Blosc(cname="zstd").encode(bytes(size)))


BOMB = 2**24
GZIP = {"name": "gzip", "configuration": {"level": 1}}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "codec gzip": (inner([LITTLE, GZIP, {"name": "crc32c"}]), "other codecs"),
    "codec unknown": (inner([LITTLE, {"name": "rm -rf"}, {"name": "crc32c"}]), "other codecs"),
    "codec of numcodecs": (
        inner([LITTLE, {"name": "numcodecs.zlib", "configuration": {}}, {"name": "crc32c"}]),
        "other codecs",
    ),
    "codec of a pickle": (inner([{"name": "numcodecs.pickle", "configuration": {}}]), "other codecs"),
    "codecs in codecs": (inner([[[[]]]]), "other codecs"),
    "codecs no list": (inner({"name": "bytes"}), "other codecs"),
    "blosc bomb": (packed("log_probs/c/0/0/0", blosc(BOMB)), "unpacks to"),
    "blosc that lies": (packed("log_probs/c/0/0/0", b"\2\1\x93\2" + b"\xff\xff\xff\x7f" * 3), "unpacks to"),
    "blosc cut short": (packed("log_probs/c/0/0/0", b"\2\1\x93"), "unpacks to"),
    "zstd bomb": (packed("labels/c/0", zstd(BOMB)), "unpacks to"),
    "zstd bomb of the inputs": (packed("sketches/c/0/0/0", zstd(BOMB)), "unpacks to"),
    "zstd bomb of the basis": (packed("tail_mean/c/0", zstd(BOMB)), "unpacks to"),
    "zstd frame after frame": (packed("labels/c/0", zstd(32) + zstd(2**20, 32)), "unpacks to"),
    "zstd of no stated size": (packed("labels/c/0", b"\x28\xb5\x2f\xfd\x00\x58\x03\x00\x00\x00"), "unpacks to"),
    "zstd that is none": (packed("labels/c/0", b"\0" * 40), "unpacks to"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_store_can_only_fail(what: str, server: FileServer, cache: Path, tmp_path: Path) -> None:
    change, words = HOSTILE[what]
    change(cache)
    refresh(cache)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError, match=words):
            for view in (0, 1):
                logits(pull(f"{server.url}/c", tmp_path / "pulled").path, view)
        assert tracemalloc.get_traced_memory()[1] < BOMB // 2
    finally:
        tracemalloc.stop()


def test_what_a_group_says_of_its_arrays_is_not_believed(server: FileServer, cache: Path) -> None:
    right = logits(cache)
    consolidated(cache)
    refresh(cache)
    assert torch.equal(logits(f"{server.url}/c"), right)


def test_an_index_that_points_elsewhere_is_refused(server: FileServer, cache: Path, tmp_path: Path) -> None:
    import google_crc32c

    path = cache / "data.zarr/logsumexp/c/0/0"
    data = path.read_bytes()
    entries = json.loads((cache / "data.zarr/logsumexp/zarr.json").read_bytes())
    chunks = entries["chunk_grid"]["configuration"]["chunk_shape"][1] // 8
    index = data[-16 * chunks - 4 : -4]
    for first in ((2**40, 20), (0, 2**40)):
        other = b"".join(number.to_bytes(8, "little") for number in first) + index[16:]
        body = data[: -16 * chunks - 4]
        path.write_bytes(body + other + google_crc32c.value(other).to_bytes(4, "little"))
        refresh(cache)
        with pytest.raises(CorruptError, match=r"chunk 0 of .*logsumexp/c/0/0"):
            logits(pull(f"{server.url}/c", tmp_path / str(first[1])).path)


def test_what_does_not_fit_on_the_disk_is_not_begun(
    server: FileServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.cache.remote.mirror.free_disk", lambda folder: 1000)
    with pytest.raises(IncompleteError, match="MB are free in"):
        open_cache(f"{server.url}/c")
    assert server.data_requests() == 0


def test_sizes_that_no_shard_has_are_refused(server: FileServer, cache: Path) -> None:
    for name, size in ((NAME, 10**7), ("data.zarr/zarr.json", 10**8), ("commits/0/0.json", 10**8)):
        kept = (cache / "manifest.json").read_bytes()
        forge(cache, lambda manifest, of=name, to=size: manifest["files"][of].update(size=to))  # type: ignore[misc]
        with pytest.raises(CorruptError, match=f"{name} is too large"):
            open_cache(f"{server.url}/c")
        (cache / "manifest.json").write_bytes(kept)
    assert server.data_requests() == 0


def test_links_at_the_source_bring_no_other_files(cache: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for others")
    (cache / NAME).unlink()
    (cache / NAME).symlink_to(secret)
    with pytest.raises(CorruptError, match=NAME):
        pull(f"file://{cache}", tmp_path / "pulled")
    assert secret.read_text() == "not for others"
    assert not (tmp_path / "pulled" / NAME).exists()


# The Hugging Face Hub, or as much of it as there is on loopback.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with an empty data set team/set."""
    pytest.importorskip("huggingface_hub")
    server = HubServer("team/set")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.close()


@pytest.mark.parametrize("inside", ["", "/digits"])
def test_a_data_set_of_the_hub(inside: str, hub: HubServer, cache: Path, tmp_path: Path) -> None:
    url = f"hf://datasets/team/set{inside}"
    with pytest.raises(UsageError, match="no cache found at hf://datasets/team/set"):
        open_cache(url)
    hub.files[".gitattributes"] = b"*.bin filter=lfs"
    assert push(cache, url).files == DATA + 2
    manifest = f"{inside}/manifest.json".lstrip("/")
    assert [manifest] in hub.commits
    assert len(hub.commits) == 5, "the marker, the files, the card, the manifest, and no marker"
    assert set(hub.files) == {f"{inside}/{name}".lstrip("/") for name in contents(cache)} | {".gitattributes"}
    assert contents(pull(url, tmp_path / "pulled").path) == contents(cache)
    assert torch.equal(logits(f"{url}#{DIGEST}"), logits(cache))
    hub.commits.clear()
    assert push(cache, url).files == 0
    assert not hub.commits


def test_a_push_to_the_hub_that_was_interrupted_goes_on(
    hub: HubServer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "hf://datasets/team/set"
    monkeypatch.setattr("kdcache.cache.remote.hf_hub._COMMIT", 10)
    answer = hub.post
    monkeypatch.setattr(hub, "post", lambda path, body: None if len(hub.commits) == 4 else answer(path, body))
    with pytest.raises(UsageError, match="the Hub rejected the request for team/set"):
        push(cache, url)
    with pytest.raises(IncompleteError, match="still being pushed"):
        open_cache(url)
    monkeypatch.setattr(hub, "post", answer)
    assert push(cache, url).kept == 30
    assert contents(pull(url, tmp_path / "pulled").path) == contents(cache)


# Folders, URLs and libraries.


def test_a_folder_that_is_something_else_is_left_alone(server: FileServer, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("Dear")
    with pytest.raises(UsageError, match="exists and is not a cache"):
        pull(f"{server.url}/c", tmp_path / "mine")
    other = shutil.copytree(GOLDEN / "dense-v1.kdcache", tmp_path / "other")
    kept = contents(other)
    with pytest.raises(MismatchError, match="another cache"):
        pull(f"{server.url}/c", other)
    with pytest.raises(UsageError, match="is inside the cache"):
        pull(f"{server.url}/c", other / "commits" / "new")
    assert contents(other) == kept
    assert contents(tmp_path / "mine") == {"letter": b"Dear"}


@pytest.mark.parametrize("url", ["ftp://x/y", "s3://", "hf://models/x/y", "hf://datasets/x", "memory://x"])
def test_urls_that_no_cache_has(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a URL of a supported store|is not a dataset repository of the Hub"):
        pull(url, tmp_path / "x")


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    for scheme, extra in (("s3", "s3"), ("gs", "gs"), ("az", "az"), ("https", "http")):
        with pytest.raises(UsageError, match="cannot be reached: Install s3fs") as caught:
            open_cache(f"{scheme}://a/b")
        assert caught.value.fix == f"pip install 'kdcache[{extra}]'"


# Commands.


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's cache of sixty images, by the commands."""
    folder = tmp_path_factory.mktemp("work")
    recipe = npz_recipe(folder)
    ok("train-teacher", recipe, "-o", folder / "t", "--device", "cpu")
    ok("dump-teacher", recipe, "-o", folder / "c.kdcache", "--device", "cpu")
    return folder


def test_commands_take_urls(work: Path, tmp_path: Path) -> None:
    recipe, device = work / "mine.yaml", ["--device", "cpu"]
    digest = json.loads(ok("info", work / "c.kdcache", "--json"))["digest"]
    pushed = json.loads(ok("push", work / "c.kdcache", f"file://{tmp_path / 'www' / 'c'}", "--json"))
    assert pushed["pinned"] == f"file://{tmp_path / 'www' / 'c'}#{digest}"
    other = "sha256:" + "0" * 64
    with serving(tmp_path / "www") as server:
        url = f"{server.url}/c"
        assert json.loads(ok("info", url, "--json"))["digest"] == digest
        assert digest in ok("info", url, "--digest", digest)
        assert server.data_requests() == 0
        for command in (["info", url], ["verify", url], ["pull", url, tmp_path / "no"],
                        ["train-student", recipe, "-o", tmp_path / "no", "--cache", url, *device],
                        ["sweep", recipe, "-o", tmp_path / "no", "--cache", url, *device]):  # fmt: skip
            said = refused(4, *command, "--digest", other)
            assert digest in said
            assert other in said
        assert server.data_requests() == 0
        ok("train-student", recipe, "-o", tmp_path / "s", "--cache", url, "--digest", digest, *device)
        ok("train-student", recipe, "-o", tmp_path / "here", "--cache", work / "c.kdcache", *device)
        weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("s", "here")]
        assert weights[0] == weights[1]
        ok("sweep", recipe, "-o", tmp_path / "w", "--cache", f"{url}#{digest}", "--seeds", 1, *device)
        ok("evaluate", tmp_path / "s", "--cache", url, *device)
        assert "no problems" in ok("verify", url, recipe, "--replay", "--digest", digest)
        fetched = {path: count for path, count in server.asked.items() if "/data.zarr/" in path}
        assert set(fetched.values()) == {1}
        told = json.loads(ok("pull", url, tmp_path / "pulled", "--views", "0", "--json"))
        assert told == {"cache": str(tmp_path / "pulled"), "digest": digest, "views": [0]}
        assert "views" in ok("pull", url)
    assert "--views must be an index or a range" in refused(2, "pull", url, "--views", "one")
    assert "is not a URL" in refused(2, "pull", work / "c.kdcache")
    assert "--digest is for one cache" in refused(
        2, "train-student", recipe, "-o", tmp_path / "no", "--cache", url, "--cache", url, "--digest", digest, *device
    )


def test_ctrl_c_keeps_what_has_come(server: FileServer, cache: Path, tmp_path: Path) -> None:
    server.fault = lambda path, before: "slow"
    server.latency = 0.02
    process = in_a_process(pull_in, str(tmp_path / "home"), f"{server.url}/c", tmp_path / "pulled")
    until(lambda: server.data_requests() > 20)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == 1
    assert (tmp_path / "pulled" / "pulling").is_file()
    assert not list((tmp_path / "pulled").glob("incoming-*"))
    pull(f"{server.url}/c", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(cache)
