"""dump-teacher for real: interrupted, extended, planned beforehand, in another precision, and never in its own way."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.processes import FORKS, PATIENCE, command_line, exit_code, in_a_process, kill_at, recipe, until
from helpers.tiny import FLIP, OneByOne, TinyTeacher, tiny_samples
from PIL import Image
from torch import Tensor, nn

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.format import zarr_store
from kdcache.cache.format.schema import FileRecord
from kdcache.cache.writer import CacheWriter
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages, FileImages, Images, Picture
from kdcache.data.loader import report_lost_workers
from kdcache.dump.probes import probe_ids
from kdcache.errors import CorruptError, IncompleteError, MismatchError
from kdcache.models.inference import InferenceModel

SPEC = CacheSpec(top_k=3, rank=2, pilot_rows=8, shard_rows=8, batch_size=5, seed=3)
"""Of 37 samples: four shards of 8 rows in batches of 5 and 3, and one shard of 5 rows in one batch."""

SHARDS = [[[0, 1, 2, 3, 4], [5, 6, 7]], [[8, 9, 10, 11, 12], [13, 14, 15]], [[16, 17, 18, 19, 20], [21, 22, 23]]]
SHARDS += [[[24, 25, 26, 27, 28], [29, 30, 31]], [[32, 33, 34, 35, 36]]]
BATCHES = [ids for shard in SHARDS for ids in shard]
LENGTHS = [len(ids) for ids in BATCHES]


class Noticing(TinyTeacher):
    """Its logits depend on the batch that an image comes in; it notes the ids of each."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed=seed)
        self.seen: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images[:, 0, 0, 0] * 8).int().tolist())
        return super().forward(images) - images.mean()


def dump(out: Path, **changes: Any) -> Cache:
    given: dict[str, Any] = {"model": Noticing(), "samples": tiny_samples(), "spec": SPEC, **changes}
    return dump_teacher(given.pop("model"), given.pop("samples"), out, **given)


def files_of(cache: Path) -> dict[str, str]:
    """Every file of a cache, with the hash of its bytes."""
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["dump-teacher", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of an uninterrupted run."""
    return dump(tmp_path_factory.mktemp("whole") / "whole.kdcache")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "recipe").mkdir()
    return recipe(tmp_path / "recipe")


# Ctrl-C, and errors in workers and in the writer.


def test_ctrl_c_ends_a_run_with_workers_without_waiting_for_them_and_says_how_to_resume(
    pipeline: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "c.kdcache", tmp_path / "said"
    slow = {"SAMPLE": "10", "HAPPENS": "time.sleep(3600)"}
    arguments = ("dump-teacher", pipeline, "-o", out, "--device", "cpu")
    process = in_a_process(command_line, said, slow, *arguments, "--set", "cache.num_workers=2")
    until((out / "commits/0/0.json").exists)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
    assert exit_code(process) == 130
    assert f"interrupted; {out} keeps its finished shards" in said.read_text()
    assert "run it again to resume" in said.read_text()
    assert "Traceback" not in said.read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert kdcache(pipeline, "-o", out).exit_code == 0
    assert kdcache(pipeline, "-o", tmp_path / "once.kdcache").exit_code == 0
    assert files_of(out) == files_of(tmp_path / "once.kdcache")


class Broken(OneByOne):
    """Something happens to the process that loads sample 20."""

    def __init__(self, images: Images, happens: Callable[[], object]) -> None:
        super().__init__(images)
        self.happens = happens

    def picture(self, index: int) -> Picture:
        if index == 20:
            self.happens()
        return super().picture(index)


def crash() -> None:
    raise RuntimeError("a bug in the data set")


def refuse() -> None:
    raise CorruptError("image 20 is damaged", "replace it")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out


def dump_with_a_broken_worker(out: Path, happens: Callable[[], object], told: Connection) -> None:
    given = tiny_samples()
    images = Broken(given.images, happens)
    samples = Samples(given.name, given.split, images, given.labels, given.class_names, [])
    try:
        dump(out, samples=samples, transform=FLIP, spec=SPEC.model_copy(update={"num_workers": 2}))
    except Exception as error:  # noqa: BLE001
        told.send((type(error).__name__, str(error)))


@pytest.mark.parametrize(
    ("happens", "kind", "words"),
    [
        (crash, "RuntimeError", "a bug in the data set"),
        (die, "IncompleteError", "a process that loads images died"),
        (refuse, "CorruptError", "image 20 is damaged"),
    ],
)
def test_what_ends_a_worker_reaches_the_user(
    happens: Callable[[], object], kind: str, words: str, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    here, there = FORKS.Pipe()
    process = in_a_process(dump_with_a_broken_worker, out, happens, there)
    assert exit_code(process) == 0
    assert here.poll(), "the dump ended without an error"
    name, message = here.recv()
    assert name == kind
    assert words in message
    with pytest.raises(IncompleteError):
        open_cache(out)
    again = dump(out, transform=FLIP)
    assert again.manifest.digest == dump(tmp_path / "once.kdcache", transform=FLIP).manifest.digest


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), ()),
        (ConnectionResetError(104, "Connection reset by peer"), (ConnectionError, EOFError)),
        (EOFError(), (ConnectionError, EOFError)),
    ],
)
def test_a_lost_process_is_told_of_whoever_notices_first(error: Exception, ends: tuple[type[Exception], ...]) -> None:
    with pytest.raises(IncompleteError, match=r"a process that loads images died: \S"), report_lost_workers(*ends):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), EOFError("Caught EOFError in DataLoader worker process 0."), OSError("no")]
)
def test_what_the_data_set_raises_is_no_lost_process(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, report_lost_workers(ConnectionError, EOFError):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 3), (errno.EDQUOT, 3), (errno.EACCES, 2)])
def test_what_the_writer_cannot_do_ends_the_run_and_can_be_gone_on_with(
    number: int, code: int, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "c.kdcache", zarr_store.write_shard

    def fail(cache: Path, plan: Any, view: int, shard: int, *rows: Any) -> dict[str, FileRecord]:
        if (view, shard) == (1, 0):
            raise OSError(number, os.strerror(number), "log_probs")
        return write(cache, plan, view, shard, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(zarr_store, "write_shard", fail)
        done = kdcache(pipeline, "-o", out)
    assert done.exit_code == code
    assert f"error: {os.strerror(number)}: log_probs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "commits/1/0.json").exists()
    assert (out / "commits/0/1.json").exists()
    assert kdcache(pipeline, "-o", out).exit_code == 0
    assert kdcache(pipeline, "-o", tmp_path / "once.kdcache").exit_code == 0
    assert files_of(out) == files_of(tmp_path / "once.kdcache")


def test_a_full_disk_is_noticed_at_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_failed = Event()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Pool(ThreadPoolExecutor):
        def submit(self, *given: Any, **named: Any) -> Future[Any]:
            future = super().submit(*given, **named)
            future.add_done_callback(lambda _: has_failed.set())
            return future

    class Waiting(Noticing):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            if self.seen[-1] == BATCHES[2]:
                assert has_failed.wait(PATIENCE)
            return logits

    teacher = Waiting()
    monkeypatch.setattr(CacheWriter, "write", fail)
    monkeypatch.setattr("kdcache.dump.teacher_pass.ThreadPoolExecutor", Pool)
    with pytest.raises(OSError, match="No space left"):
        dump(tmp_path / "c.kdcache", model=teacher)
    assert teacher.seen[-1] in BATCHES[1:3], "the next one at most"


def test_nan_is_noticed_at_the_batch_in_which_it_is(tmp_path: Path) -> None:
    class Spoilt(Noticing):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            logits[images[:, 0, 0, 0] == 17 / 8, 4] = torch.nan
            return logits

    teacher = Spoilt()
    with pytest.raises(CorruptError, match=r"sample 17 \(1 of the 5 images"):
        dump(tmp_path / "c.kdcache", model=teacher)
    assert teacher.seen[-1] == [16, 17, 18, 19, 20], "the rest of its shard, and what follows, is not waited for"


# Going on with something else.

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "precision": ({"precision": "bf16"}, "teacher.precision: fp32, bf16"),
    "layout": ({"channels_last": True}, "teacher.precision: fp32, fp32 channels_last"),
    "compiler": ({"compile": True}, "teacher.precision: fp32, fp32 compiled"),
    "rank": ({"rank": 3}, "request.rank: 2, 3"),
    "tail": ({"rank": None, "tail": "uniform"}, "request.tail: lowrank, uniform"),
    "type": ({"dtype": "float32"}, "request.dtype: float16, float32"),
    "fidelity": ({"fidelity": 0.5}, "request.fidelity: None, 0.5"),
    "pilot": ({"pilot_rows": 9}, "request.pilot_rows: 8, 9"),
    "shards": ({"shard_rows": 16}, "shape.shard_rows: 8, 16"),
    "batches": ({"batch_size": 4}, "batch_size: 5, 4"),
    "seed": ({"seed": 4}, "views.seed: 3, 4"),
    "views": ({"views": 2}, "views.count: 1, 2"),
    "licence": ({"license": "CC0"}, "licence: , CC0"),
}


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that was left when its second shard could not be written."""
    out, write = tmp_path / "begun.kdcache", CacheWriter.write

    def fail(writer: CacheWriter, view: int, shard: int, *rows: Any, **others: Any) -> None:
        if shard:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, view, shard, *rows, **others)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", fail)
        with pytest.raises(OSError, match="No space left"):
            dump(out, transform=FLIP)
    return out


def test_going_on_with_any_other_setting_is_refused_with_both_values(begun: Path, tmp_path: Path) -> None:
    before = files_of(begun)
    for changes, words in OTHERS.values():
        spec = SPEC.model_copy(update=changes)
        with pytest.raises(MismatchError) as caught:
            dump(begun, transform=FLIP, spec=spec)
        assert words in [line.strip() for line in caught.value.what.splitlines()]
        assert files_of(begun) == before
    for given, name in (
        ({"transform": [{"RandomHorizontalFlip": {"p": 0.25}}]}, "views.transform"),
        ({"model": Noticing(seed=2)}, "teacher.weights_digest"),
        ({"name": "other"}, "teacher.name"),
    ):
        with pytest.raises(MismatchError, match=f"\n  {name}: .+, .+"):
            dump(begun, **{"transform": FLIP, **given})
        assert files_of(begun) == before
    once = dump(tmp_path / "once.kdcache", transform=FLIP)
    more_workers = SPEC.model_copy(update={"num_workers": 0})
    assert dump(begun, transform=FLIP, spec=more_workers).manifest.digest == once.manifest.digest


# --extend: more views, more samples.

VIEWS = SPEC.model_copy(update={"views": 3})
DENSE = CacheSpec(shard_rows=8, batch_size=5, seed=3)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One view of 37 samples."""
    return dump(tmp_path_factory.mktemp("old") / "old.kdcache", transform=FLIP)


@pytest.fixture(scope="module")
def all_views(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Three views of the same at once."""
    return dump(tmp_path_factory.mktemp("all") / "all.kdcache", transform=FLIP, spec=VIEWS)


def links(one: Path, other: Path) -> list[str]:
    """The files that two caches have in common on the disk."""
    return [name for name in files_of(one) if (other / name).exists() and (one / name).samefile(other / name)]


def of_shards(cache: Cache, view: int, shards: range) -> list[str]:
    """The files that hold the rows of some shards."""
    kept = (json.loads((cache.path / f"commits/{view}/{shard}.json").read_bytes())["files"] for shard in shards)
    return sorted(name for files in kept for name in files)


def test_more_views_give_the_cache_of_all_of_them_at_once(old: Cache, all_views: Cache, tmp_path: Path) -> None:
    before, teacher = files_of(old.path), Noticing()
    more = dump(tmp_path / "more.kdcache", model=teacher, transform=FLIP, spec=VIEWS, extends=old)
    assert more.manifest.digest == all_views.manifest.digest
    assert files_of(more.path) == files_of(all_views.path)
    assert links(more.path, old.path) == of_shards(old, 0, range(5))
    checks = [1, LENGTHS[0], *([1] * len(probe_ids(37)))]  # a trial, a batch of the old cache and the probes
    assert [len(ids) for ids in teacher.seen] == [*checks, *2 * LENGTHS], "after these, the new views alone"
    assert files_of(old.path) == before
    open_cache(old.path)


def test_shards_are_copied_where_they_cannot_be_linked(
    old: Cache, all_views: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def from_another_disk(source: Path, *rest: Any) -> None:
        if str(source).startswith(str(old.path)):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, *rest)

    monkeypatch.setattr(os, "link", from_another_disk)
    more = dump(tmp_path / "more.kdcache", transform=FLIP, spec=VIEWS, extends=old)
    assert files_of(more.path) == files_of(all_views.path)
    assert links(more.path, old.path) == []


def test_more_samples_take_over_every_full_shard(tmp_path: Path) -> None:
    spec = DENSE.model_copy(update={"views": 2})
    old = dump(tmp_path / "old.kdcache", transform=FLIP, spec=spec)
    at_once = dump(tmp_path / "once.kdcache", transform=FLIP, spec=spec, samples=tiny_samples(53))
    before, teacher = files_of(old.path), Noticing()
    more = dump(
        tmp_path / "more.kdcache", model=teacher, transform=FLIP, spec=spec, samples=tiny_samples(53), extends=old
    )
    assert files_of(more.path) == files_of(at_once.path)
    assert links(more.path, old.path) == sorted(of_shards(old, 0, range(4)) + of_shards(old, 1, range(4)))
    checks = 1 + LENGTHS[0] + len(probe_ids(53))  # images: a trial, a batch of the old cache and the probes
    assert sum(len(ids) for ids in teacher.seen) == checks + 2 * (53 - 32)
    assert files_of(old.path) == before


def test_more_views_and_samples_at_once(tmp_path: Path) -> None:
    old = dump(tmp_path / "old.kdcache", transform=FLIP, spec=DENSE)
    larger: dict[str, Any] = {
        "transform": FLIP,
        "spec": DENSE.model_copy(update={"views": 2}),
        "samples": tiny_samples(41),
    }
    at_once = dump(tmp_path / "once.kdcache", **larger)
    more = dump(tmp_path / "more.kdcache", **larger, extends=old)
    assert files_of(more.path) == files_of(at_once.path)
    assert links(more.path, old.path) == of_shards(old, 0, range(4))


def test_extending_on_the_command_line(tmp_path: Path) -> None:
    for count in (20, 30):
        (tmp_path / str(count)).mkdir()
    small, large = (recipe(tmp_path / str(count), count) for count in (20, 30))
    dense = ("--top-k", "all", "--set", "cache.rank=null")
    assert kdcache(small, *dense, "-o", tmp_path / "small.kdcache").exit_code == 0
    more = kdcache(large, *dense, "-o", tmp_path / "large.kdcache", "--extend", tmp_path / "small.kdcache")
    assert more.exit_code == 0, more.stderr
    assert f"4 shards taken from {tmp_path / 'small.kdcache'}" in more.stderr
    assert kdcache(large, *dense, "-o", tmp_path / "once.kdcache").exit_code == 0
    assert files_of(tmp_path / "large.kdcache") == files_of(tmp_path / "once.kdcache")


def repainted(samples: Samples) -> Samples:
    assert isinstance(samples.images, ArrayImages)
    samples.images.pixels[20, 0, 3, 3] += 2**-6
    return samples


def relabeled(count: int) -> Samples:
    labels = tiny_samples(count).labels.tolist()
    labels[20] = (labels[20] + 1) % 10
    return tiny_samples(count, labels=labels)


NO_EXTENSION: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "seed": (lambda: {"spec": VIEWS.model_copy(update={"seed": 4})}, "views.seed: 3, 4"),
    "teacher": (lambda: {"model": Noticing(seed=2)}, "teacher.weights_digest: sha256:.*, sha256:"),
    "transform": (lambda: {"transform": [{"RandomHorizontalFlip": {"p": 0.25}}]}, "views.transform: .*0.5.*, .*0.25"),
    "k": (lambda: {"spec": VIEWS.model_copy(update={"top_k": 4})}, "request.top_k: 3, 4"),
    "rank": (lambda: {"spec": VIEWS.model_copy(update={"rank": 3})}, "request.rank: 2, 3"),
    "precision": (lambda: {"spec": VIEWS.model_copy(update={"precision": "fp16"})}, "teacher.precision: fp32, fp16"),
    "batches": (lambda: {"spec": VIEWS.model_copy(update={"batch_size": 4})}, "batch_size: 5, 4"),
    "nothing more": (lambda: {"spec": SPEC}, "has 1 view of 37 samples; 1 of 37 are requested"),
    "fewer samples": (lambda: {"samples": tiny_samples(36)}, "has 1 view of 37 samples; 3 of 36 are requested"),
    "an image": (lambda: {"samples": repainted(tiny_samples(53))}, "sample 20 is not the one that .* has there"),
    "a label": (lambda: {"samples": relabeled(53)}, "sample 20 is not the one that .* has there, or has another"),
    "an image of as many": (lambda: {"samples": repainted(tiny_samples())}, "sample 20 is not the one that"),
}


@pytest.mark.parametrize("what", NO_EXTENSION)
def test_what_is_no_extension_is_refused(what: str, old: Cache, tmp_path: Path) -> None:
    changes, words = NO_EXTENSION[what]
    before = files_of(old.path)
    with pytest.raises(MismatchError, match=words) as caught:
        dump(tmp_path / "more.kdcache", **({"transform": FLIP, "spec": VIEWS, "extends": old} | changes()))
    assert "delete" not in caught.value.fix, "the old cache is well"
    assert list(tmp_path.iterdir()) == []
    assert files_of(old.path) == before


def extend_until_killed(old: Path, out: Path, commit: str, after: bool) -> None:
    kill_at(out, commit, after)
    dump(out, transform=FLIP, spec=VIEWS, extends=open_cache(old))


def test_killed_while_it_takes_shards_over_it_goes_on(old: Cache, all_views: Cache, tmp_path: Path) -> None:
    before, out = files_of(old.path), tmp_path / "more.kdcache"
    commits = [".partial", *(f"/commits/0/{shard}.json.partial" for shard in (0, 2, 4)), "/commits/1/0.json.partial"]
    for commit in commits:
        for after in (False, True):
            process = in_a_process(extend_until_killed, old.path, out, commit, after)
            assert exit_code(process) == -signal.SIGKILL
            assert files_of(old.path) == before
    more = dump(out, transform=FLIP, spec=VIEWS, extends=old)
    assert files_of(out) == files_of(all_views.path)
    assert links(more.path, old.path) == of_shards(old, 0, range(5))
    assert files_of(old.path) == before


# --dry-run, and disks that are too small.


def test_a_dry_run_says_what_the_cache_would_be_and_writes_nothing(pipeline: Path, home: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*")), sorted(home.rglob("*"))
    out = tmp_path / "deep" / "c.kdcache"
    done = kdcache(pipeline, "-o", out, "--dry-run")
    assert done.exit_code == 0, done.stderr
    said = dict(line.split(None, 1) for line in done.stdout.splitlines() if line.startswith(("chosen", "size", "time")))
    assert said["chosen"].startswith("top 3, rank 2")
    assert "for 24 rows" in said["size"]
    assert "rows/s on this device" in said["time"]
    as_json = json.loads(kdcache(pipeline, "-o", out, "--dry-run", "--json").stdout)
    assert (as_json["encoding"]["top_k"], as_json["encoding"]["rank"]) == (3, 2)
    assert as_json["rows"] == 24
    assert as_json["rows_per_second"] > 0
    assert as_json["bytes"] == round(as_json["bytes_per_row"] * 24 + as_json["bytes_besides_rows"])
    assert (sorted(tmp_path.rglob("*")), sorted(home.rglob("*"))) == before

    # Where every class is kept there is nothing to plan, but the teacher is timed all the same.
    dense = json.loads(kdcache(pipeline, "-o", out, "--dry-run", "--json", "--top-k", "all").stdout)
    assert dense["encoding"]["top_k"] == 10
    assert dense["rows_per_second"] > 0
    assert kdcache(pipeline, "-o", out).exit_code == 0
    assert as_json["bytes"] == pytest.approx(open_cache(out).bytes_on_disk, rel=0.1)
    made = open_cache(out).manifest.plan
    assert as_json["encoding"] == made.encoding.model_dump()


def test_a_dry_run_refuses_what_the_run_would_refuse(pipeline: Path, whole: Cache) -> None:
    done = kdcache(pipeline, "-o", whole.path, "--dry-run")
    assert done.exit_code == 2
    assert "already a sealed cache" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("options", [(), ("--top-k", "all")])
def test_a_disk_that_cannot_hold_the_cache_is_refused_early(
    options: tuple[str, ...], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.dump.estimate.free_disk", lambda _: 100)
    before = sorted(tmp_path.rglob("*"))
    for more in (("--dry-run",), ("--dry-run", "--json"), ()):
        done = kdcache(pipeline, "-o", tmp_path / "c.kdcache", *options, *more)
        assert done.exit_code == 3
        assert "0.000 GB are free there" in done.stderr
        assert ("--json" in more) == bool(done.stdout)
    assert sorted(tmp_path.rglob("*")) == before


# Precision, memory format, compilation.


class Convolutions(nn.Module):
    """A network of which mixed precision takes hold, for images [1, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 10)
        )
        self.types: set[torch.dtype] = set()
        self.is_channels_last: set[bool] = set()
        self.layers[2].register_forward_hook(self.notice)

    def notice(self, layer: nn.Module, images: tuple[Tensor], logits: Tensor) -> None:
        self.types.add(logits.dtype)
        self.is_channels_last.add(images[0].is_contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, 4, 4] -> logits [B, 10]."""
        logits: Tensor = self.layers(images)
        return logits


EXACT = CacheSpec(dtype="float32", shard_rows=16, batch_size=8)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_is_near_float32_and_recorded(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = Convolutions(), torch.arange(37)
    cache = dump(tmp_path / "c.kdcache", model=model, spec=EXACT.model_copy(update={"precision": precision}))
    assert model.types == {dtype}, "the trial on the first image runs as the pass does"
    with torch.no_grad():
        expected = Convolutions()(torch.stack([torch.as_tensor(tiny_samples().images.picture(i)) for i in ids]))
    logits = cache.teacher()(ids)
    scale = float(expected.std())
    assert float((logits - expected).abs().max()) < 16 * torch.finfo(dtype).eps * scale
    assert not torch.allclose(logits, expected, rtol=0, atol=1e-6)
    assert cache.manifest.plan.teacher.precision == precision


def test_channels_last_is_the_same_network(tmp_path: Path) -> None:
    plain = dump(tmp_path / "plain.kdcache", model=Convolutions(), spec=EXACT)
    model, ids = Convolutions(), torch.arange(37)
    spec = EXACT.model_copy(update={"channels_last": True})
    cache = dump(tmp_path / "c.kdcache", model=model, spec=spec)
    teacher = cache.manifest.plan.teacher
    assert teacher.weights_digest == plain.manifest.plan.teacher.weights_digest
    assert teacher.precision == "fp32 channels_last"
    assert True in model.is_channels_last
    torch.testing.assert_close(cache.teacher()(ids), plain.teacher()(ids), rtol=0, atol=1e-5)


def test_a_compiled_teacher_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = Noticing(), []

    def compiled(images: Tensor) -> Tensor:
        rows.append(len(images))
        logits: Tensor = model(images)
        return logits + 1

    monkeypatch.setattr(torch, "compile", lambda given: compiled if given is model else None)
    plain = dump(tmp_path / "plain.kdcache", spec=EXACT)
    cache = dump(tmp_path / "c.kdcache", model=model, spec=EXACT.model_copy(update={"compile": True}))
    assert rows == [8, 8, 8, 8, 5]
    torch.testing.assert_close(cache.teacher()(torch.arange(37)), plain.teacher()(torch.arange(37)) + 1)
    assert cache.manifest.plan.teacher.precision == "fp32 compiled"


def test_logits_come_back_in_float32_whatever_the_network_returns() -> None:
    running = InferenceModel(TinyTeacher().bfloat16(), 10, CacheSpec(precision="bf16"), "cpu")
    logits = running(torch.ones(2, 1, 4, 4, dtype=torch.bfloat16))
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


# Side by side, and in the memory of a few shards.


def test_the_teacher_goes_on_while_shards_are_written_but_not_for_ever(
    whole: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, write = Noticing(), CacheWriter.write
    begins, may_end, written = Event(), Event(), []

    def blocked(writer: CacheWriter, view: int, shard: int, *rows: Any, **others: Any) -> None:
        begins.set()
        assert may_end.wait(PATIENCE)
        write(writer, view, shard, *rows, **others)
        written.append(shard)

    monkeypatch.setattr(CacheWriter, "write", blocked)
    made: list[Cache] = []
    thread = Thread(target=lambda: made.append(dump(tmp_path / "c.kdcache", model=teacher)))
    thread.start()
    assert begins.wait(PATIENCE)
    beforehand = 1 + 2 + len(probe_ids(37))  # batches: a trial, the pilot and the probes
    try:
        until(lambda: len(teacher.seen) >= beforehand + 6)
        time.sleep(0.3)
        assert teacher.seen[beforehand:] == BATCHES[:6], "of three shards: one is written, two wait"
        assert written == []
    finally:
        may_end.set()
        thread.join(PATIENCE)
    assert teacher.seen[beforehand:] == BATCHES
    assert written == [0, 1, 2, 3, 4]
    assert made[0].manifest.digest == whole.manifest.digest


CLASSES = 4000
M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3


class Made(OneByOne):
    """As many images as one likes, none of them in memory."""

    def __init__(self, count: int) -> None:
        super().__init__(ArrayImages(torch.empty(count, 1, 4, 4, device="meta")))

    def picture(self, index: int) -> Tensor:
        return torch.full((1, 4, 4), index % 64 / 8)

    def content(self, index: int) -> bytes:
        return index.to_bytes(8, "little")


MAPS = {"logits": False, "outputs": {"map": {"kind": "vector", "places": "grid", "encoding": "float32"}}}
ROWS = {"top_k": "all", "dtype": "float32"}


class Mapped(nn.Module):
    """As many numbers as a row of all classes, on 4 x 4 places."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"map": images * torch.arange(1, CLASSES // 16 + 1)[:, None, None]}


def dump_many(out: Path, count: int, views: int, maps: bool, told: Connection) -> None:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)  # threads would keep memory of their own, more with time
    mallopt(M_MMAP_THRESHOLD, 2**16)  # and freed blocks above a threshold that grows would be kept
    names = tuple(map(str, range(CLASSES)))
    samples = Samples("made", "train", Made(count), np.zeros(count, np.int32), names, [])
    options = MAPS if maps else ROWS
    spec = CacheSpec.model_validate({**options, "views": views, "shard_rows": 64, "batch_size": 32})
    teacher = Mapped() if maps else TinyTeacher(CLASSES)
    dump_teacher(teacher, samples, out, transform=[{"RandomCrop": {"size": 4}}], spec=spec)
    told.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its peak, in its units")
@pytest.mark.parametrize("maps", [False, True], ids=["rows", "maps"])
def test_peak_memory_does_not_grow_with_samples_or_views(maps: bool, tmp_path: Path) -> None:
    def peak(count: int, views: int) -> int:
        here, there = FORKS.Pipe()
        process = in_a_process(dump_many, tmp_path / f"{count}-{views}.kdcache", count, views, maps, there)
        assert exit_code(process) == 0
        return int(here.recv())

    few, many_samples, many_views = peak(256, 1), peak(2560, 1), peak(256, 10)
    more_rows = (2560 - 256) * 4 * CLASSES
    assert many_samples - few < more_rows / 2
    assert many_views - few < more_rows / 2


# Content keys that are kept.


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileImages:
    """Five small pictures, and a folder of one's own to keep their keys in."""
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "kept"))
    paths = []
    for number in range(5):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(paths[-1])
    return FileImages(paths)


def of_files(images: FileImages) -> Samples:
    return Samples("files", "train", images, np.zeros(len(images), np.int32), ("a", "b"), [])


def expected_keys(images: FileImages) -> list[int]:
    contents = [Path(path).read_bytes() for path in images.paths]
    return [int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") for data in contents]


def not_read(_: FileImages, index: int) -> bytes:
    raise AssertionError(f"image {index} is read")


def test_keys_of_files_are_computed_once(images: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_files(images).keys().tolist() == expected_keys(images)
    monkeypatch.setattr(FileImages, "content", not_read)
    assert of_files(images).keys().tolist() == expected_keys(images)
    with pytest.raises(AssertionError, match="image 0 is read"):
        of_files(FileImages(images.paths[:4])).keys()
    with pytest.raises(AssertionError, match="image 0 is read"):
        of_files(FileImages(images.paths[::-1])).keys()


def test_keys_are_computed_anew_when_a_file_has_changed_whatever_its_times_say(images: FileImages) -> None:
    before = of_files(images).keys()
    path = Path(images.paths[3])
    then, data = path.stat(), path.read_bytes()
    until(lambda: clock_of_files(path) > then.st_ctime_ns)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    after = of_files(images).keys()
    assert np.flatnonzero(before != after).tolist() == [3]
    assert after.tolist() == expected_keys(images)


def clock_of_files(beside: Path) -> int:
    """What time it is to the file system, which does not look at its clock as often."""
    probe = beside.with_suffix(".probe")
    probe.write_bytes(b"")
    return probe.stat().st_ctime_ns


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[8:]],
    ids=["empty", "short", "flipped", "a key less"],
)
def test_kept_keys_that_are_damaged_are_not_used(damage: Callable[[bytes], bytes], images: FileImages) -> None:
    of_files(images).keys()
    (kept,) = (Path(os.environ["KDCACHE_HOME"]) / "keys").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert of_files(images).keys().tolist() == expected_keys(images)
    assert kept.read_bytes() == whole, "and are kept again"


def test_a_home_that_cannot_be_written_to_does_no_harm(images: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", images.paths[0])  # a file
    assert of_files(images).keys().tolist() == expected_keys(images)
    monkeypatch.setenv("KDCACHE_HOME", "/proc/kdcache")  # nobody makes a folder there, root neither
    assert of_files(images).keys().tolist() == expected_keys(images)
