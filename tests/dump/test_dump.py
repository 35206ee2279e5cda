"""Stage one through Python: the same cache every time, whatever happened on the way; and bad input is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.interrupts import StopsAfter
from helpers.processes import exit_code, in_a_process
from helpers.tiny import FLIP, OneByOne, TinyTeacher, tiny_samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.format.schema import canonical
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages
from kdcache.dump.probes import probe_ids
from kdcache.errors import CorruptError, IncompleteError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.runtime.progress import Silent, Task

SPEC = CacheSpec(top_k=3, tail="uniform", pilot_rows=1, shard_rows=8, batch_size=5)
"""Of 37 samples: four shards of 8 rows in batches of 5 and 3, and one shard of 5 rows in one batch."""

BATCHES = [range(s, min(s + 5, e)) for e in (8, 16, 24, 32, 37) for s in range(8 * ((e - 1) // 8), e, 5)]

PROBES = [[sample] for sample in probe_ids(37)]


def files_of(cache: Path) -> dict[str, str]:
    """Every file of a cache, with the hash of its bytes."""
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


class BatchMinded(TinyTeacher):
    """Its logits depend, in every bit, on the batch that an image comes in; and it notes the ids of each batch."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed=seed)
        self.seen: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images[:, 0, 0, 0] * 8).int().tolist())
        return super().forward(images) - images.mean()


class Listening(Silent):
    """A progress reporter that keeps the messages."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def dump(out: Path, **changes: Any) -> Cache:
    given: dict[str, Any] = {"model": BatchMinded(), "samples": tiny_samples(), "spec": SPEC} | changes
    return dump_teacher(given.pop("model"), given.pop("samples"), out, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of an uninterrupted run."""
    return dump(tmp_path_factory.mktemp("whole") / "whole.kdcache")


# The root digest.


def test_two_runs_leave_the_same_bytes(whole: Cache, tmp_path: Path) -> None:
    again = dump(tmp_path / "deep" / "folder" / "again.kdcache")
    assert again.manifest.digest == whole.manifest.digest
    assert files_of(again.path) == files_of(whole.path)


def dump_with(workers: int, out: Path) -> None:
    spec = CacheSpec(views=2, shard_rows=8, batch_size=3, num_workers=workers)
    dump_teacher(TinyTeacher(), tiny_samples(37), out, transform=FLIP, spec=spec)


def test_digest_does_not_depend_on_workers(tmp_path: Path) -> None:
    for workers in (0, 2):
        # In a process of its own, which has no threads yet when DataLoader forks it.
        assert exit_code(in_a_process(dump_with, workers, tmp_path / str(workers))) == 0
    alone, shared = (open_cache(tmp_path / str(workers)).manifest.digest for workers in (0, 2))
    assert shared == alone


class OneLogitOff(BatchMinded):
    """The same weights, and one logit of one sample a little different."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        logits[images[:, 0, 0, 0] == 20 / 8, 4] += 2**-6
        return logits


def relabeled() -> Samples:
    labels = tiny_samples().labels.tolist()
    labels[20] = (labels[20] + 1) % 10
    return tiny_samples(labels=labels)


def repainted(which: int | slice = 20) -> Samples:
    samples = tiny_samples()
    assert isinstance(samples.images, ArrayImages)
    samples.images.pixels[which, 0, 3, 3] += 2**-6
    return samples


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "one logit": lambda: {"model": OneLogitOff()},
    "one label": lambda: {"samples": relabeled()},
    "one pixel": lambda: {"samples": repainted()},
    "transform": lambda: {"transform": [{"Identity": {}}]},
    "seed": lambda: {"spec": SPEC.model_copy(update={"seed": 1})},
    "k": lambda: {"spec": SPEC.model_copy(update={"top_k": 4})},
    "type": lambda: {"spec": SPEC.model_copy(update={"dtype": "float32"})},
    "name of the teacher": lambda: {"name": "other"},
    "notes": lambda: {"spec": SPEC.model_copy(update={"notes": "other"})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_tells_caches_apart_that_differ_in_one_thing(change: str, whole: Cache, tmp_path: Path) -> None:
    assert dump(tmp_path / "other.kdcache", **CHANGES[change]()).manifest.digest != whole.manifest.digest


# Going on.


def test_batches_are_cut_inside_shards(tmp_path: Path) -> None:
    teacher = BatchMinded()
    dump(tmp_path / "c.kdcache", model=teacher)
    assert teacher.seen[:2] == [[0], [35]], "a trial and the pilot"
    assert teacher.seen[2:] == [*PROBES, *(list(batch) for batch in BATCHES)]


@pytest.mark.parametrize("done", range(1, len(BATCHES) + 1))
def test_interrupted_after_any_batch_it_goes_on_to_the_same_cache(done: int, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun, match="keeps its finished shards") as caught:
        dump(out, progress=StopsAfter(done))
    assert caught.value.exit_code == 130
    finished = sum(batch.stop in (8, 16, 24, 32, 37) for batch in BATCHES[: done - 1])
    with pytest.raises(IncompleteError, match=f"{5 - finished} of its 5 shards are missing") as refused:
        open_cache(out)
    assert refused.value.exit_code == 3
    assert f"kdcache dump-teacher PIPELINE -o {out}" in refused.value.fix

    teacher = BatchMinded()
    cache = dump(out, model=teacher)
    assert teacher.seen[1:] == [*PROBES, *(list(batch) for batch in BATCHES if batch.start >= 8 * finished)]
    assert cache.manifest.digest == whole.manifest.digest
    assert files_of(out) == files_of(whole.path)
    assert list(tmp_path.iterdir()) == [out]


def test_going_on_says_how_much_is_left(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        dump(tmp_path / "c.kdcache", progress=StopsAfter(3))
    listener = Listening()
    dump(tmp_path / "c.kdcache", progress=listener)
    assert listener.said[0] == f"resuming {tmp_path / 'c.kdcache'}: 4 of 5 shards remain"
    assert listener.said[-1].startswith("time: ")


def test_views_go_on_where_they_stood(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"views": 2})
    once = dump(tmp_path / "once.kdcache", spec=spec, transform=FLIP)
    out = tmp_path / "c.kdcache"
    for batches in (5, 4, 3):
        with pytest.raises(InterruptedRun):
            dump(out, spec=spec, transform=FLIP, progress=StopsAfter(batches))
    assert dump(out, spec=spec, transform=FLIP).manifest.digest == once.manifest.digest
    assert files_of(out) == files_of(once.path)


OTHERS: dict[str, tuple[Callable[[], dict[str, Any]], str, str, str]] = {
    "k": (lambda: {"spec": SPEC.model_copy(update={"top_k": 4})}, "request.top_k", "3", "4"),
    "all": (lambda: {"spec": SPEC.model_copy(update={"top_k": "all"})}, "request.top_k", "3", "all"),
    "weights": (
        lambda: {"model": BatchMinded(seed=2)},
        "teacher.weights_digest",
        hashlib.sha256(b"weight\0torch.float32\0[16, 10]\0" + TinyTeacher(seed=1).weight.numpy().tobytes()).hexdigest(),
        hashlib.sha256(b"weight\0torch.float32\0[16, 10]\0" + TinyTeacher(seed=2).weight.numpy().tobytes()).hexdigest(),
    ),
    "seed": (lambda: {"spec": SPEC.model_copy(update={"seed": 77})}, "views.seed", "0", "77"),
    "transform": (lambda: {"transform": [{"Identity": {}}]}, "views.transform", "[]", "Identity"),
    "batches": (lambda: {"spec": SPEC.model_copy(update={"batch_size": 4})}, "batch_size", "5", "4"),
    "label": (lambda: {"samples": relabeled()}, "dataset.digest", "sha256:", "sha256:"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_going_on_with_another_setting_is_refused_with_both_values(what: str, whole: Cache, tmp_path: Path) -> None:
    change, key, then, now = OTHERS[what]
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dump(out, progress=StopsAfter(5))
    before = files_of(out)
    with pytest.raises(MismatchError, match=key) as caught:
        dump(out, **change())
    (line,) = (line for line in caught.value.what.splitlines() if line.strip().startswith(f"{key}:"))
    assert then in line.partition(", ")[0]
    assert now in line.partition(", ")[2]
    assert files_of(out) == before
    assert dump(out).manifest.digest == whole.manifest.digest


def test_a_tuple_in_a_transform_is_the_list_that_is_read_back(tmp_path: Path) -> None:
    transform: Any = [{"Normalize": {"mean": (0.5,), "std": (0.25,)}}]
    with pytest.raises(InterruptedRun):
        dump(tmp_path / "c.kdcache", transform=transform, progress=StopsAfter(5))
    cache = dump(tmp_path / "c.kdcache", transform=transform)
    assert cache.manifest.plan.views.transform == [{"Normalize": {"mean": [0.5], "std": [0.25]}}]


# What is in the way.


def test_the_same_call_on_a_sealed_cache_returns_it(whole: Cache) -> None:
    before = files_of(whole.path)
    teacher, listener = BatchMinded(), Listening()
    again = dump(whole.path, model=teacher, progress=listener)
    assert again.manifest == whole.manifest
    assert f"{whole.path} is complete: nothing to do" in listener.said
    assert files_of(whole.path) == before
    assert teacher.seen == [], "the teacher does not run"


@pytest.mark.parametrize("what", [*OTHERS, "image"])
def test_a_sealed_cache_is_not_overwritten_with_other_settings(what: str, whole: Cache) -> None:
    before = files_of(whole.path)
    change = OTHERS[what][0]() if what in OTHERS else {"samples": repainted()}
    key = OTHERS[what][1] if what in OTHERS else "dataset.digest"
    with pytest.raises(UsageError, match="already a sealed cache, with other settings") as caught:
        dump(whole.path, **change)
    assert f"\n  {key}: " in caught.value.what
    assert caught.value.exit_code == 2
    assert files_of(whole.path) == before


def test_a_card_that_a_killed_run_did_not_write_is_written(whole: Cache, tmp_path: Path) -> None:
    out = dump(tmp_path / "c.kdcache").path
    for leftover in ("README.md", "card.png"):
        (out / leftover).unlink()
    (out / "plan.json").write_bytes(canonical(whole.manifest.plan))
    (out / "writer.lock").touch()
    assert dump(out).manifest == whole.manifest
    assert files_of(out) == files_of(whole.path)


def test_a_sealed_cache_that_is_damaged_is_not_complete(tmp_path: Path) -> None:
    out = dump(tmp_path / "c.kdcache").path
    path = out / "data.zarr/log_probs/c/0/1/0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match="log_probs/c/0/1/0"):
        dump(out)


# Images that were replaced.


def test_after_an_image_was_replaced_only_its_shard_is_made_again(tmp_path: Path) -> None:
    once = dump(tmp_path / "once.kdcache", samples=repainted())
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dump(out, progress=StopsAfter(9))
    teacher, listener = BatchMinded(), Listening()
    cache = dump(out, model=teacher, samples=repainted(), progress=listener)
    assert f"images changed since {out} was begun: 1 finished shard will be made again" in listener.said
    again = [list(batch) for batch in BATCHES if batch.start in range(16, 24) or batch.start >= 32]
    assert teacher.seen[1:] == [*PROBES, *again]
    assert cache.manifest.digest == once.manifest.digest
    assert files_of(out) == files_of(once.path)


@pytest.mark.parametrize("killed_after", ["marker", "plan"])
def test_replacing_images_is_resumed_after_a_kill(killed_after: str, tmp_path: Path) -> None:
    once = dump(tmp_path / "once.kdcache", samples=repainted())
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dump(out, progress=StopsAfter(9))
    (out / "commits/0/2.json").unlink()
    if killed_after == "plan":
        (out / "plan.json").write_bytes(canonical(once.manifest.plan))
    assert dump(out, samples=repainted()).manifest.digest == once.manifest.digest
    assert files_of(out) == files_of(once.path)


NOT_REPLACED: dict[str, tuple[dict[str, Any], Callable[[], Samples], str]] = {
    "labels": ({}, relabeled, "1 labels changed, first that of sample 20"),
    "the pilot": (
        {"spec": SPEC.model_copy(update={"pilot_rows": 37})},
        repainted,
        "1 images changed, first sample 20; sample 20 is in the pilot",
    ),
    "mixed views": ({"transform": [{"MixUp": {"alpha": 1.0}}]}, repainted, "the views mix images"),
    "every shard": (
        {"spec": SPEC.model_copy(update={"top_k": "all"})},
        lambda: repainted(slice(None)),
        "images of every finished shard changed",
    ),
}


@pytest.mark.parametrize("what", NOT_REPLACED)
def test_where_more_depends_on_a_replaced_image_it_is_refused(what: str, tmp_path: Path) -> None:
    changes, samples, words = NOT_REPLACED[what]
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dump(out, progress=StopsAfter(9), **changes)
    before = files_of(out)
    with pytest.raises(MismatchError, match=r"dataset.digest: sha256:.*, sha256:") as caught:
        dump(out, samples=samples(), **changes)
    assert words in caught.value.what
    assert files_of(out) == before


def test_an_ordinary_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("Dear")
    with pytest.raises(UsageError, match="exists and is not a cache"):
        dump(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("Dear")
    with pytest.raises(UsageError, match="exists and is not a cache"):
        dump(tmp_path / "letter")
    assert (tmp_path / "letter").read_text() == "Dear"


# Teachers and settings that cannot be used.


class Wrapped(nn.Module):
    """A teacher whose output is passed through a function of (logits, ids)."""

    def __init__(self, change: Callable[[Tensor, Tensor], object], num_classes: int = 10) -> None:
        super().__init__()
        self.inner, self.change = TinyTeacher(num_classes), change

    def forward(self, images: Tensor) -> object:
        return self.change(self.inner(images), images[:, 0, 0, 0] * 8)


def spoil(sample: int, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    def change(logits: Tensor, ids: Tensor) -> Tensor:
        logits[ids == sample, 7] = value
        return logits

    return change


def fail_at(sample: int, error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    def change(logits: Tensor, ids: Tensor) -> Tensor:
        if sample in ids:
            raise error
        return logits

    return change


@pytest.mark.parametrize(("sample", "value"), [(0, np.nan), (31, np.nan), (36, np.inf), (31, -np.inf)])
def test_a_logit_that_is_no_number_is_refused_by_its_sample(sample: int, value: float, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=rf"sample {sample} \(1 of the") as caught:
        dump(tmp_path / "c.kdcache", model=Wrapped(spoil(sample, value)))
    assert caught.value.exit_code == 5
    check_kept(tmp_path / "c.kdcache", finished=sample // 8)
    assert dump(tmp_path / "c.kdcache", model=Wrapped(lambda logits, _: logits)).manifest.summary


def check_kept(out: Path, finished: int) -> None:
    """Check that a failed run has kept its finished shards; without any, nothing is left."""
    if not finished:
        assert list(out.parent.iterdir()) == []
        return
    with pytest.raises(IncompleteError, match=f"{5 - finished} of its 5 shards are missing"):
        open_cache(out)


WRONG: dict[str, tuple[nn.Module, str]] = {
    "classes": (TinyTeacher(11), r"returned \[1, 11\] for 1 image, the data set has 10 classes"),
    "tuple": (Wrapped(lambda logits, _: (logits, logits)), "returned a tuple"),
    "dictionary": (Wrapped(lambda logits, _: {"out": logits}), "returned a dict"),
    "one dimension": (Wrapped(lambda logits, _: logits.flatten()), r"returned \[10\]"),
    "three dimensions": (Wrapped(lambda logits, _: logits[..., None]), r"returned \[1, 10, 1\]"),
    "images": (nn.Conv2d(3, 10, 1), r"cannot take images \[1, 4, 4\]"),
    "one batch": (
        Wrapped(lambda logits, ids: logits[1:] if 30 in ids else logits),
        r"returned \[2, 10\] for 3 images",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_teacher_that_does_not_return_logits_is_refused(what: str, tmp_path: Path) -> None:
    model, words = WRONG[what]
    with pytest.raises(MismatchError, match=words) as caught:
        dump(tmp_path / "c.kdcache", model=model)
    assert caught.value.exit_code == 4
    check_kept(tmp_path / "c.kdcache", finished=3 if what == "one batch" else 0)


@pytest.mark.parametrize(("largest", "outputs"), [(5, 4), (10, 10), (12, 3)])
def test_a_label_beyond_the_teachers_outputs_is_named(largest: int, outputs: int, tmp_path: Path) -> None:
    labels = torch.zeros(20, dtype=torch.int64)
    labels[[7, 9]] = largest
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))
    words = (
        f"sample 7 has label {largest}, and the teacher returns the logits of {outputs} classes \\(2 such samples\\)"
    )
    with pytest.raises(MismatchError, match=words):
        dump_teacher(net, TensorDataset(torch.rand(20, 3, 4, 4), labels), tmp_path / "c.kdcache")
    assert not (tmp_path / "c.kdcache").exists()


def test_a_crash_of_the_teacher_comes_through_and_the_cache_can_be_gone_on_with(tmp_path: Path) -> None:
    crash = RuntimeError("out of memory")
    with pytest.raises(RuntimeError) as caught:
        dump(tmp_path / "c.kdcache", model=Wrapped(fail_at(30, crash)))
    assert caught.value is crash
    with pytest.raises(IncompleteError, match="2 of its 5 shards"):
        open_cache(tmp_path / "c.kdcache")
    once = dump(tmp_path / "once.kdcache", model=Wrapped(lambda logits, _: logits))
    again = dump(tmp_path / "c.kdcache", model=Wrapped(lambda logits, _: logits))
    assert again.manifest.digest == once.manifest.digest


def test_a_spoiled_run_does_not_take_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        dump(tmp_path / "c.kdcache", model=Wrapped(lambda logits, _: logits), progress=StopsAfter(5))
    before = files_of(tmp_path / "c.kdcache")
    with pytest.raises(CorruptError, match="sample 31"):
        dump(tmp_path / "c.kdcache", model=Wrapped(spoil(31, float("nan"))))
    assert before.items() <= files_of(tmp_path / "c.kdcache").items()
    assert dump(tmp_path / "c.kdcache", model=Wrapped(lambda logits, _: logits)).manifest.summary


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec": CacheSpec(top_k=11)}, "top_k 11 is larger than the number of classes, 10"),
        ({"spec": CacheSpec(views=2)}, "would all be the same"),
        ({"transform": [{"NoSuchThing": {}}]}, "NoSuchThing"),
        ({"transform": [{"ToDtype": {"dtype": torch.float32}}]}, "this transform: .* JSON"),
        ({"transform": [{"Normalize": {"mean": [float("nan")], "std": [1.0]}}]}, "this transform: .* JSON"),
        ({"spec": CacheSpec(), "samples": tiny_samples(num_classes=1), "model": TinyTeacher(1)}, "one class"),
    ],
    ids=lambda given: given.replace(" ", "-")[:20] if isinstance(given, str) else "",
)
def test_settings_that_do_not_fit_leave_nothing_behind(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        dump(tmp_path / "c.kdcache", **({"spec": SPEC} | changes))
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_transform_that_fails_late_keeps_the_finished_shards(tmp_path: Path) -> None:
    class Holed(OneByOne):
        def picture(self, index: int) -> Tensor:
            picture = super().picture(index)
            assert isinstance(picture, Tensor)
            return picture[:, : 2 if index == 31 else 4]

    given = tiny_samples()
    samples = Samples("holed", "train", Holed(given.images), given.labels, given.class_names, FLIP)
    with pytest.raises(KdcacheError):
        dump(tmp_path / "c.kdcache", samples=samples)
    check_kept(tmp_path / "c.kdcache", finished=3)


def test_ctrl_c_before_the_first_row_leaves_nothing_behind(tmp_path: Path) -> None:
    class Impatient(Silent):
        @contextmanager
        def task(self, what: str, total: int, unit: str) -> Iterator[Task]:
            raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        dump(tmp_path / "c.kdcache", progress=Impatient())
    assert list(tmp_path.iterdir()) == []


def test_the_teacher_runs_in_evaluation_mode_and_without_gradients(tmp_path: Path) -> None:
    noticed: set[tuple[bool, bool]] = set()

    class Noticing(TinyTeacher):
        def forward(self, images: Tensor) -> Tensor:
            noticed.add((self.training, torch.is_grad_enabled()))
            return super().forward(images)

    dump(tmp_path / "c.kdcache", model=Noticing().train())
    assert noticed == {(False, False)}


def test_a_teacher_in_half_precision_is_kept_as_it_is(tmp_path: Path) -> None:
    half = Wrapped(lambda logits, _: logits.bfloat16())
    spec = CacheSpec(dtype="float32", shard_rows=8)
    cache = dump(tmp_path / "c.kdcache", model=half, spec=spec)
    pixels = torch.stack([torch.as_tensor(tiny_samples().images.picture(i)) for i in range(37)])
    expected = TinyTeacher()(pixels).bfloat16().float()
    torch.testing.assert_close(cache.teacher()(torch.arange(37)), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cache.labels, tiny_samples().labels)
