"""Whole caches: selected from, merged, counted, compared; held against what the teacher itself says."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pytest
import torch
from helpers.processes import exit_code, in_a_process, start_server, until
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.fidelity import total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.codec import stated_classes, tail_log_mass
from kdcache.cache.inspect.audit import audit
from kdcache.cache.inspect.diff import compare
from kdcache.cache.inspect.summary import take_census
from kdcache.config.cache import CacheSpec
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.curate.merge import merge
from kdcache.curate.recode import derive_shard
from kdcache.curate.select import select
from kdcache.data.images import ArrayImages
from kdcache.data.replay import replay
from kdcache.data.views import View
from kdcache.errors import KdcacheError, MismatchError, UsageError

CLASSES = 12


def spec(**changes: Any) -> CacheSpec:
    return CacheSpec.model_validate(
        {"top_k": "all", "shard_rows": 8, "batch_size": 5, "seed": 3, "pilot_rows": 32, **changes}
    )


SAMPLES = tiny_samples(37, CLASSES)
TEACHER = TinyTeacher(CLASSES)


def dump(out: Path, samples: Samples = SAMPLES, teacher: TinyTeacher = TEACHER, **changes: Any) -> Cache:
    transform = FLIP if changes.get("views", 1) > 1 else []
    return dump_teacher(teacher, samples, out, transform=transform, spec=spec(**changes))


Whole = Callable[..., Cache]


@pytest.fixture(scope="module")
def of_all(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Makes the cache of all samples with some settings, each once; nobody writes to it."""
    made: dict[str, Cache] = {}

    def of(**changes: Any) -> Cache:
        name = repr(sorted(changes.items()))
        if name not in made:
            made[name] = dump(tmp_path_factory.mktemp("whole") / "whole.kdcache", **changes)
        return made[name]

    return of


def part(whole: Samples, ids: range | list[int]) -> Samples:
    assert isinstance(whole.images, ArrayImages)
    which = list(ids)
    pixels = ArrayImages(whole.images.pixels[which])
    return Samples(whole.name, whole.split, pixels, whole.labels[which], whole.class_names, whole.transform)


def logits_of(cache: Cache, view: int = 0) -> Tensor:
    return cache.teacher()(torch.arange(len(cache)), view)


def live(samples: Samples, view: int = 0, views: int = 1) -> Tensor:
    """What the teacher says itself."""
    return TEACHER.forward(View(samples, FLIP if views > 1 else [], 3, view).__getitems__(range(len(samples))).images)


def files_of(cache: Path) -> dict[str, str]:
    return {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file()
    }


def is_sound(cache: Cache) -> None:
    """That it opens, and every file and row of it is well."""
    assert open_cache(cache.path).manifest == cache.manifest
    assert audit(cache.path).failure is None


# select


def test_the_first_views_are_the_same_shards(tmp_path: Path, of_all: Whole) -> None:
    three = of_all(views=3, top_k=3, rank=4)
    one = select(three, tmp_path / "1.kdcache", views=[0])
    is_sound(one)
    assert one.manifest.plan.views.count == 1
    assert torch.equal(logits_of(one), logits_of(three, 0))
    lineage = one.manifest.plan.lineage
    assert lineage is not None
    assert (lineage.operation, lineage.arguments, lineage.parents) == ("select", {"views": 1}, [three.manifest.digest])
    assert replay(one, tiny_samples(37, CLASSES)).rounded == 0


@pytest.mark.parametrize("views", [[1], [1, 2], [0, 2], [], [0, 1, 2, 3]])
def test_other_views_cannot_be_replayed(tmp_path: Path, of_all: Whole, views: list[int]) -> None:
    three = of_all(views=3)
    with pytest.raises(UsageError, match="views"):
        select(three, tmp_path / "1.kdcache", views=views)
    assert not (tmp_path / "1.kdcache").exists()


@pytest.mark.parametrize("count", [1, 8, 13, 36])
def test_the_first_samples_keep_their_random_views(tmp_path: Path, of_all: Whole, count: int) -> None:
    whole = of_all(views=2, top_k=3, rank=4)
    first = select(whole, tmp_path / "first.kdcache", samples=np.arange(count))
    is_sound(first)
    for view in range(2):
        assert torch.equal(logits_of(first, view), logits_of(whole, view)[:count])
    assert replay(first, part(tiny_samples(37, CLASSES), range(count))).checked >= 2


SOME = [30, 2, 17, 5, 36, 0, 9, 10, 11, 12]


@pytest.mark.parametrize("kept", [{}, {"top_k": 3, "rank": 4}, {"top_k": 2, "tail": "uniform"}, {"dtype": "uint8"}])
def test_samples_of_any_order_are_rows_as_they_were(tmp_path: Path, of_all: Whole, kept: dict[str, Any]) -> None:
    whole = of_all(**kept)
    some = select(whole, tmp_path / "some.kdcache", samples=np.array(SOME), data=tiny_samples(37, CLASSES))
    is_sound(some)
    before, after = (zarr_store.read_rows(c.path, c.manifest.plan, 0, range(len(c))) for c in (whole, some))
    for name, values in before[torch.tensor(SOME)].arrays().items():
        assert torch.equal(after.arrays()[name], values)
    assert some.sample_keys.tolist() == whole.sample_keys[SOME].tolist()
    assert replay(some, part(tiny_samples(37, CLASSES), SOME)).rounded == 0


def test_samples_are_not_moved_where_a_view_is_drawn_at_random(tmp_path: Path, of_all: Whole) -> None:
    whole = of_all(views=2)
    with pytest.raises(UsageError, match="sample 1 would become sample 0"):
        select(whole, tmp_path / "some.kdcache", samples=np.array([1, 2]))


@pytest.mark.parametrize("samples", [[], [0, 0], [37], [-1, 0]])
def test_samples_that_are_not_there_are_refused(tmp_path: Path, of_all: Whole, samples: list[int]) -> None:
    with pytest.raises(UsageError, match="must be different ordinals from 0 to 36"):
        select(of_all(), tmp_path / "s.kdcache", samples=np.array(samples, np.int64))


def test_missing_fingerprints_want_the_images_and_only_the_right_ones(tmp_path: Path) -> None:
    whole = dump(tmp_path / "whole.kdcache", tiny_samples(64, CLASSES), shard_rows=64)  # a fingerprint of every fourth
    stride = whole.manifest.plan.shape.fingerprint_stride
    assert stride == 4
    odd = np.arange(1, 64, 2)
    with pytest.raises(UsageError, match=r"(?s)would become \d+.* of the new cache have none.*--data"):
        select(whole, tmp_path / "odd.kdcache", samples=odd)
    other = tiny_samples(64, CLASSES)
    assert isinstance(other.images, ArrayImages)
    other.images.pixels[::2] += 1
    with pytest.raises(MismatchError, match="has none of the images"):
        select(whole, tmp_path / "odd.kdcache", samples=odd, data=other)
    made = select(whole, tmp_path / "odd.kdcache", samples=odd, data=tiny_samples(64, CLASSES))
    assert replay(made, part(tiny_samples(64, CLASSES), odd.tolist())).rounded == 0
    # Every fourth has one, and stands where the new cache wants one: nothing need be looked at.
    fours = select(whole, tmp_path / "fours.kdcache", samples=np.arange(0, 64, 4))
    assert replay(fours, part(tiny_samples(64, CLASSES), range(0, 64, 4))).rounded == 0


@pytest.mark.parametrize("kept", [{}, {"top_k": 4, "rank": 6}, {"top_k": 5, "tail": "uniform"}])
def test_fewer_classes_have_the_logits_of_these_classes(tmp_path: Path, of_all: Whole, kept: dict[str, Any]) -> None:
    whole = of_all(views=2, **kept)
    names, places = ["class 7", "class 1", "class 4"], [7, 1, 4]
    three = select(whole, tmp_path / "three.kdcache", classes=names)
    is_sound(three)
    labels = [places.index(label) if label in places else -1 for label in whole.labels.tolist()]
    assert three.labels.tolist() == labels
    assert three.manifest.plan.dataset.class_names == tuple(names)
    assert three.manifest.plan.fidelity is None
    for view in range(2):
        wanted = logits_of(whole, view)[:, places]
        bound = 2**-10 * wanted.log_softmax(dim=1).abs().clamp_min(1) + 2e-3  # float16, and the sum of the logits
        assert ((logits_of(three, view) - wanted).abs() <= bound).all()


def test_of_many_classes_a_basis_is_planned_anew(tmp_path: Path) -> None:
    samples = tiny_samples(37, 100)
    whole = dump(tmp_path / "whole.kdcache", samples, TinyTeacher(100), dtype="float32")
    names = [f"class {c}" for c in range(99, 9, -1)]
    fewer = select(whole, tmp_path / "fewer.kdcache", classes=names, top_k=3)
    is_sound(fewer)
    assert (fewer.manifest.plan.encoding.top_k, fewer.manifest.plan.encoding.tail) == (3, "lowrank")
    assert fewer.manifest.plan.fidelity is not None  # every logit of the parent is exact
    wanted = logits_of(whole)[:, list(range(99, 9, -1))]
    assert float(total_variation(wanted, logits_of(fewer), 1).mean()) < 0.05


@pytest.mark.parametrize("tail", [{"rank": 6}, {"tail": "uniform"}])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shorter_head_is_that_of_a_dump_with_so_many(
    tmp_path: Path, of_all: Whole, tail: dict[str, Any], dtype: str
) -> None:
    samples = tiny_samples(37, CLASSES)
    longer = of_all(views=2, top_k=6, dtype=dtype, **tail)
    shorter = select(longer, tmp_path / "2.kdcache", top_k=2)
    dumped = of_all(views=2, top_k=2, dtype=dtype, **tail)
    is_sound(shorter)
    for view in range(2):
        made, direct = (zarr_store.read_rows(c.path, c.manifest.plan, view, range(37)) for c in (shorter, dumped))
        assert torch.equal(made.log_probs, direct.log_probs)
        assert made.indices is not None
        assert direct.indices is not None
        assert torch.equal(made.indices, direct.indices)
        assert torch.equal(made.logsumexp, direct.logsumexp)
        assert torch.equal(made.statistics[:, :4], direct.statistics[:, :4])
        # The masses of the teacher itself, at every temperature, as nearly as float16 tells them.
        logits, labels = live(samples, view, 2).double(), torch.from_numpy(samples.labels).long()
        stated = stated_classes(logits.float(), labels, 2)
        for place, t in enumerate((1, 2, 4, 8), start=4):
            mass = tail_log_mass(logits, stated, t).exp()
            assert (made.statistics[:, place].double().exp() - mass).abs().max() < 4e-3


def test_a_longer_head_than_there_is_is_refused(tmp_path: Path, of_all: Whole) -> None:
    with pytest.raises(UsageError, match="top_k 4 is more than"):
        select(of_all(top_k=3, rank=4), tmp_path / "4.kdcache", top_k=4)
    with pytest.raises(UsageError, match="class 'cat' not found"):
        select(of_all(), tmp_path / "4.kdcache", classes=["class 1", "cat"])
    with pytest.raises(UsageError, match="nothing is selected"):
        select(of_all(), tmp_path / "4.kdcache")


# merge


@pytest.mark.parametrize("kept", [{}, {"top_k": 2, "tail": "uniform"}, {"dtype": "uint8"}])
@pytest.mark.parametrize("cut", [16, 21])
def test_parts_of_a_data_set_are_the_cache_of_the_whole(
    tmp_path: Path, of_all: Whole, kept: dict[str, Any], cut: int
) -> None:
    samples = tiny_samples(37, CLASSES)
    whole = of_all(**kept)
    parts = [
        dump(tmp_path / "a.kdcache", part(samples, range(cut)), license="MIT", **kept),
        dump(tmp_path / "b.kdcache", part(samples, range(cut, 37)), license="CC0-1.0", notes="b", **kept),
    ]
    together = merge(parts, tmp_path / "ab.kdcache")
    is_sound(together)
    assert torch.equal(logits_of(together), logits_of(whole))
    assert together.manifest.plan.dataset == whole.manifest.plan.dataset
    assert together.manifest.summary == whole.manifest.summary
    assert (together.manifest.plan.licence, together.manifest.plan.notes) == ("MIT AND CC0-1.0", "b")
    assert replay(together, samples).rounded == 0
    lineage = together.manifest.plan.lineage
    assert lineage is not None
    assert lineage.parents == [one.manifest.digest for one in parts]


def test_parts_in_other_bases_are_encoded_anew_only_if_that_is_said(tmp_path: Path) -> None:
    samples = tiny_samples(37, CLASSES)
    kept: dict[str, Any] = {"top_k": 3, "rank": 9}
    parts = [
        dump(tmp_path / "a.kdcache", part(samples, range(20)), **kept),
        dump(tmp_path / "b.kdcache", part(samples, range(20, 37)), **kept),
    ]
    with pytest.raises(MismatchError, match=r"have another basis than.*\n.*--reencode"):
        merge(parts, tmp_path / "ab.kdcache")
    together = merge(parts, tmp_path / "ab.kdcache", reencode=True)
    is_sound(together)
    apart = torch.cat([logits_of(one) for one in parts])
    assert float(total_variation(apart, logits_of(together), 1).mean()) < 0.02
    before = zarr_store.read_rows(parts[1].path, parts[1].manifest.plan, 0, range(17))
    after = zarr_store.read_rows(together.path, together.manifest.plan, 0, range(20, 37))
    assert torch.equal(after.log_probs, before.log_probs)
    assert torch.equal(after.statistics[:, :4], before.statistics[:, :4])


def test_what_does_not_belong_together_is_refused_with_the_reason(tmp_path: Path) -> None:
    samples = tiny_samples(37, CLASSES)
    first, last = part(samples, range(20)), part(samples, range(20, 37))
    a, out = dump(tmp_path / "a.kdcache", first), tmp_path / "out.kdcache"
    refused: list[tuple[Cache, type[KdcacheError], str]] = [
        (dump(tmp_path / "again.kdcache", first), UsageError, "the same samples, with the same seed"),
        (dump(tmp_path / "seed.kdcache", first, seed=4), UsageError, "different seeds, but a cache has one seed"),
        (dump(tmp_path / "t.kdcache", last, TinyTeacher(CLASSES, 2)), MismatchError, "teacher.weights_digest"),
        (dump(tmp_path / "c.kdcache", replace(last, class_names=last.class_names[::-1])), MismatchError, "classes"),
        (dump(tmp_path / "v.kdcache", last, views=2), MismatchError, "transform"),
    ]
    for other, kind, why in refused:
        with pytest.raises(kind, match=why):
            merge([a, other], out)
    random = [dump(tmp_path / f"r{n}.kdcache", one, views=2) for n, one in enumerate((first, last))]
    with pytest.raises(UsageError, match=r"would get ordinals from 20.*could not be replayed"):
        merge(random, out)
    assert not out.exists()


# summarize and diff


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kept", [{"dtype": "float32"}, {"top_k": 3, "rank": 4, "dtype": "float32"}])
def test_a_census_counts_what_the_teacher_says(tmp_path: Path, kept: dict[str, Any], views: int) -> None:
    labels = [-1 if i % 5 == 3 else (3 * i + 1) % (CLASSES - 1) for i in range(37)]
    samples = tiny_samples(37, CLASSES, labels)
    cache = dump(tmp_path / "c.kdcache", samples, views=views, **kept)
    census = take_census(cache, worst=4, threshold=1.0)
    logits = torch.stack([live(samples, view, views) for view in range(views)])  # [V, N, C]
    log_probs, truth = logits.log_softmax(dim=2), torch.tensor(labels)
    top, sharpness = log_probs.max(dim=2), logits.logsumexp(dim=2)
    assert census.rows == 37 * views
    for number, of_class in enumerate(census.classes):
        mine = truth == number
        assert of_class.samples == int(mine.sum())
        if not mine.any():
            assert of_class.accuracy is of_class.confidence is of_class.sharpness is None
            continue
        assert of_class.accuracy == pytest.approx(float((top.indices[:, mine] == number).float().mean()))
        assert of_class.confidence == pytest.approx(float(top.values[:, mine].exp().mean()), abs=1e-6)
        assert of_class.sharpness == pytest.approx(float(sharpness[:, mine].mean()), abs=1e-5)
    ordered = sharpness.flatten().sort().values
    for share, value in census.quantiles.items():
        rank = share * len(ordered)
        assert ordered[max(int(np.ceil(rank)) - 1, 0)] == pytest.approx(value, abs=1 / 256 + 1e-6)
    assert sum(census.sharpness.values()) == sum(census.confidence) == 37 * views
    confidence = np.histogram(top.values.exp().numpy(), bins=50, range=(0, 1))[0]
    assert np.abs(np.array(census.confidence) - confidence).sum() <= 2  # rounding at the edges of bins
    known = (truth >= 0).nonzero().squeeze(1)
    of_label = log_probs.gather(2, truth.clamp_min(0).expand(views, 37).unsqueeze(2)).squeeze(2).double()
    hardest = known[of_label.mean(dim=0)[known].argsort()][:4]
    assert [one.id for one in census.hardest] == hardest.tolist()
    assert [one.key for one in census.hardest] == [f"{key:016x}" for key in samples.keys()[hardest.numpy()]]
    margins = (top.values.double() - of_label).mean(dim=0)[known]
    # A label's log-probability is kept in float16: those that are within its rounding of the threshold may count or not
    assert int((margins >= 1.01).sum()) <= census.suspected <= int((margins >= 0.99).sum())
    assert census.suspected > 4
    np.testing.assert_allclose(
        [one.margin for one in census.suspects], margins.sort(descending=True).values[:4], rtol=1e-3
    )
    names = samples.class_names
    for one in census.hardest if views == 1 else []:
        assert (one.label, one.top) == (names[labels[one.id]], names[int(top.indices[0, one.id])])


def test_labels_that_were_changed_are_the_suspects(tmp_path: Path) -> None:
    right = live(SAMPLES).argmax(dim=1)
    changed = right.clone()
    changed[[4, 20, 33]] = live(SAMPLES).argmin(dim=1)[[4, 20, 33]]
    cache = dump(tmp_path / "c.kdcache", replace(SAMPLES, labels=changed.numpy().astype(np.int32)))
    census = take_census(cache)
    assert {one.id for one in census.suspects} == {4, 20, 33}
    assert {one.top for one in census.suspects} == {SAMPLES.class_names[int(right[i])] for i in (4, 20, 33)}


def test_two_teachers_are_compared_row_by_row(tmp_path: Path, of_all: Whole) -> None:
    other = dump(tmp_path / "o.kdcache", SAMPLES, TinyTeacher(CLASSES, 2), top_k="all", dtype="float32", shard_rows=16)
    found = compare(of_all(dtype="float32"), other, worst=3)
    differ = {key: (one, two) for key, one, two in found.manifest}
    assert differ["shape.shard_rows"] == (8, 16)
    assert {"teacher.weights_digest", "digest", "summary.mean_sharpness"} <= set(differ)
    assert "dataset.digest" not in differ
    mine, theirs = live(SAMPLES), logits_of(other)
    agreement = found.agreement
    assert agreement is not None
    assert agreement.rows == 37
    assert agreement.same_class == float((mine.argmax(dim=1) == theirs.argmax(dim=1)).double().mean())
    for variation in agreement.variations:
        values = total_variation(mine, theirs, variation.temperature)
        assert variation.mean == pytest.approx(float(values.mean()), abs=1e-5)
        for share, value in variation.quantiles.items():
            assert values.sort().values[int(np.ceil(share * 37)) - 1] == pytest.approx(value, abs=1.1e-3)
    at_1 = total_variation(mine, theirs, 1)
    assert [row.id for row in agreement.worst] == at_1.topk(3).indices.tolist()
    assert [row.total_variation for row in agreement.worst] == pytest.approx(at_1.topk(3).values.tolist(), abs=1e-5)


def test_a_cache_does_not_differ_from_itself_and_others_say_why_not(tmp_path: Path, of_all: Whole) -> None:
    cache = of_all(views=2)
    same = compare(cache, cache)
    assert (same.manifest, same.why_not) == ([], None)
    assert same.agreement is not None
    assert (same.agreement.rows, same.agreement.same_class, same.agreement.variations[0].mean) == (74, 1, 0)
    fewer = select(cache, tmp_path / "fewer.kdcache", samples=np.arange(9))
    assert compare(cache, fewer).why_not == "they have different samples or another order: 37 and 9, 9 of them in both"
    two = select(cache, tmp_path / "two.kdcache", classes=["class 1", "class 2"])
    assert compare(cache, two).why_not == "they have 12 and 2 classes"


# Interrupted, and shared out.


def _select_and_die(parent: Path, out: Path) -> None:
    """Killed as it puts the third marker in place."""
    renamed = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal renamed
        if event == "os.rename" and "/commits/" in str(args[0]):
            renamed += 1
            if renamed == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    select(open_cache(parent), out, top_k=2)


def test_a_killed_selection_is_no_cache_and_goes_on_where_it_was(tmp_path: Path, of_all: Whole) -> None:
    whole = of_all(top_k=3, rank=4)
    out = tmp_path / "out.kdcache"
    assert exit_code(in_a_process(_select_and_die, whole.path, out)) == -signal.SIGKILL
    with pytest.raises(KdcacheError, match="not sealed: 3 of its 5"):
        open_cache(out)
    with pytest.raises(MismatchError, match=r"lineage.arguments"):
        select(whole, out, samples=np.arange(30), top_k=2)
    markers = {path: path.stat().st_mtime_ns for path in out.glob("commits/0/?.json")}
    made = select(whole, out, top_k=2)
    assert {path: path.stat().st_mtime_ns for path in markers} == markers
    once = select(whole, tmp_path / "once.kdcache", top_k=2)
    assert made.manifest == once.manifest
    assert files_of(out) == files_of(once.path)


def test_a_damaged_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    whole = dump(tmp_path / "whole.kdcache", top_k=3, rank=4)
    (whole.path / "data.zarr/tail/c/0/3/0").write_bytes(b"")
    with pytest.raises(KdcacheError, match="too small"):
        select(whole, tmp_path / "out.kdcache", top_k=2)
    assert not (tmp_path / "out.kdcache").exists()


def test_processes_count_as_threads_do(of_all: Whole) -> None:
    whole = of_all(top_k=3, rank=4)
    assert take_census(whole, scheduler="processes") == take_census(whole)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers in processes of their own, which are forks of the server of the other tests."""
    start_server()  # before dask says what it is to import
    with (
        dask.config.set(
            {"distributed.comm.timeouts.connect": "10s", "distributed.worker.multiprocessing-method": "forkserver"}
        ),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as running,  # type: ignore[no-untyped-call]
    ):
        yield running


def test_a_cluster_makes_the_same_caches(tmp_path: Path, cluster: Any) -> None:
    samples = tiny_samples(37, CLASSES)
    kept: dict[str, Any] = {"top_k": 2, "tail": "uniform"}
    parts = [
        dump(tmp_path / f"{n}.kdcache", part(samples, ids), **kept) for n, ids in enumerate((range(9), range(9, 37)))
    ]
    address = cluster.scheduler_address
    there = merge(parts, tmp_path / "there.kdcache", scheduler=address)
    assert there.manifest == merge(parts, tmp_path / "here.kdcache").manifest
    fewer = ["class 1", "class 2"]
    there = select(there, tmp_path / "fewer there.kdcache", classes=fewer, scheduler=address)
    assert (
        there.manifest
        == select(open_cache(tmp_path / "here.kdcache"), tmp_path / "fewer here.kdcache", classes=fewer).manifest
    )
    assert take_census(parts[0], scheduler=address) == take_census(parts[0])
    assert compare(parts[0], parts[0], scheduler=address) == compare(parts[0], parts[0])
    logits = np.random.default_rng(0).normal(0, 3, (37, CLASSES)).astype(np.float32)
    np.save(tmp_path / "mine.npy", logits)
    spec = CacheSpec(shard_rows=8)
    there = cache_of_logits(
        tmp_path / "mine.npy", samples, tmp_path / "mine there.kdcache", spec=spec, scheduler=address
    )
    here = cache_of_logits(tmp_path / "mine.npy", samples, tmp_path / "mine here.kdcache", spec=spec)
    assert there.manifest == here.manifest


def _write_and_die(fuse: Path, *arguments: Any) -> None:
    """Write a shard; whoever does so first is killed when its rows are there, and its marker is not."""
    try:
        fuse.unlink()
    except FileNotFoundError:
        derive_shard(*arguments)
        return

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and "/commits/" in str(args[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    derive_shard(*arguments)


def test_what_a_killed_worker_had_begun_another_one_does_again(
    tmp_path: Path, of_all: Whole, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = of_all(top_k=3, rank=4)
    once = select(whole, tmp_path / "once.kdcache", top_k=2)
    fuse = tmp_path / "fuse"
    fuse.touch()
    workers = set(cluster.scheduler_info["workers"])
    monkeypatch.setattr("kdcache.curate.derive.derive_shard", partial(_write_and_die, fuse))
    made = select(whole, tmp_path / "made.kdcache", top_k=2, scheduler=cluster.scheduler_address)
    assert not fuse.exists()
    until(lambda: set(cluster.scheduler_info["workers"]) != workers)
    assert made.manifest == once.manifest
    assert files_of(made.path) == files_of(once.path)


def test_a_scheduler_that_is_not_there_is_said(tmp_path: Path, of_all: Whole) -> None:
    whole = of_all(top_k=3, rank=4)
    with pytest.raises(UsageError, match="no dask scheduler answers at 'thread'"):
        select(whole, tmp_path / "out.kdcache", top_k=2, scheduler="thread")
    assert not (tmp_path / "out.kdcache").exists()
