"""What lies on disk is what the teacher said, to TensorStore as to ourselves; and the cache answers as the teacher."""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import re
import socket
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.caches import Made
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor

from kdcache import Samples, dump_teacher, open_cache
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import canonical
from kdcache.cache.format.sharding import choose_sharding
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages
from kdcache.errors import UsageError

SHARD = 16


def make(
    folder: Path,
    count: int = 37,
    num_classes: int = 10,
    top_k: int | Literal["all"] = "all",
    dtype: Literal["uint8", "float16", "float32"] = "float16",
    views: int = 1,
    labels: list[int] | None = None,
    tail: Literal["uniform", "lowrank"] = "uniform",
    rank: int | None = None,
) -> Made:
    # A batch is a shard here, so that a test that encodes shard by shard does the same arithmetic.
    spec = CacheSpec(
        top_k=top_k, tail=tail, rank=rank, dtype=dtype, views=views, seed=5, shard_rows=SHARD, batch_size=SHARD
    )
    samples, teacher = tiny_samples(count, num_classes, labels), TinyTeacher(num_classes)
    cache = dump_teacher(
        teacher, samples, folder / "made.kdcache", transform=FLIP if views > 1 else None, spec=spec, name="linear"
    )
    return Made(cache, samples, teacher)


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense in float32, one short shard": {"count": 3, "dtype": "float32"},
    "top 3, two views": {"top_k": 3, "views": 2},
    "indices uint16": {"num_classes": 300, "top_k": 5, "count": 20},
    "indices uint32": {"num_classes": 70_000, "top_k": 4, "count": 5},
    "lowrank": {"num_classes": 100, "top_k": 4, "tail": "lowrank", "rank": 6, "views": 2},
    "uint8": {"dtype": "uint8"},
    "some without label": {"top_k": 2, "count": 20, "labels": [-1, 1, 2, 3] * 5},
}


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), **CASES[request.param])


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("two"), dtype="float32", views=2)


READ_WITH_TENSORSTORE = """
import sys
from pathlib import Path
import numpy, tensorstore
store, out = Path(sys.argv[1]), sys.argv[2]
arrays = {}
for folder in (found.parent for found in store.glob("*/zarr.json")):
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}, open=True, read=True
    ).result()
    arrays[folder.name] = opened.read().result()
    arrays[folder.name + ".names"] = numpy.array(opened.domain.labels)
assert not {"zarr", "kdcache"} & set(sys.modules)
numpy.savez(out, **arrays)
"""


def read_with_tensorstore(cache: Path, folder: Path) -> dict[str, npt.NDArray[Any]]:
    out = folder / "arrays.npz"
    subprocess.run([sys.executable, "-c", READ_WITH_TENSORSTORE, cache / "data.zarr", out], check=True)
    with np.load(out) as arrays:
        return dict(arrays)


def basis_of(arrays: dict[str, npt.NDArray[Any]]) -> TailBasis | None:
    if "tail" not in arrays:
        return None
    return TailBasis(*(torch.from_numpy(arrays[f"tail_{part}"]) for part in ("basis", "mean", "scale")))


def test_tensorstore_reads_what_the_teacher_said(made: Made, tmp_path: Path) -> None:
    arrays = read_with_tensorstore(made.cache.path, tmp_path)
    plan = made.cache.manifest.plan
    labels = torch.from_numpy(made.samples.labels).long()
    basis = basis_of(arrays)
    for view in range(plan.views.count):
        logits = made.live(view)
        for start in range(0, len(made.samples), SHARD):
            ids = slice(start, start + SHARD)
            for name, expected in encode(logits[ids], labels[ids], plan.encoding, basis).arrays().items():
                np.testing.assert_array_equal(arrays[name][view, ids], expected.numpy(), err_msg=name)
    np.testing.assert_array_equal(arrays["labels"], made.samples.labels)
    np.testing.assert_array_equal(arrays["sample_keys"], made.samples.keys())
    check_inputs(made, arrays)


def check_inputs(made: Made, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """That fingerprints and sketches are those of what the teacher saw."""
    plan = made.cache.manifest.plan
    for view in range(plan.views.count):
        images = made.images(view)[:: plan.shape.fingerprint_stride]
        crcs = [zlib.crc32(image.numpy().astype("<f4").tobytes()) for image in images]
        np.testing.assert_array_equal(arrays["fingerprints"][view], crcs)
        parts = images.reshape(-1, 2, 2, 4).mean(2)  # two rows of parts; of columns there are just four
        np.testing.assert_array_equal(arrays["sketches"][view], parts.flatten(1))


def test_arrays_are_as_the_format_has_them(made: Made, tmp_path: Path) -> None:
    arrays = read_with_tensorstore(made.cache.path, tmp_path)
    plan = made.cache.manifest.plan
    v, n, k, c = plan.views.count, len(made.samples), plan.encoding.top_k, made.samples.num_classes
    assert plan.shape.fingerprint_stride == 1, "shards of 16 rows leave every image a fingerprint"
    columns = ["label_log_prob", "logit_mean", "logit_std", "entropy"]
    if k < c:
        columns += ["tail_log_mass_t1", "tail_log_mass_t2", "tail_log_mass_t4", "tail_log_mass_t8"]
    if plan.encoding.dtype == "uint8":
        columns += ["log_prob_max", "log_prob_range"]
    row = ("view", "sample", "column")
    expected = {
        "log_probs": (plan.encoding.dtype, (v, n, k), row),
        "logsumexp": ("float32", (v, n), row[:2]),
        "statistics": ("float16", (v, n, len(columns)), row),
        "fingerprints": ("uint32", (v, n), ("view", "fingerprint")),
        "sketches": ("float32", (v, n, 8), ("view", "fingerprint", "part")),
        "labels": ("int32", (n,), row[1:2]),
        "sample_keys": ("uint64", (n,), row[1:2]),
    }
    if k < c:
        expected["indices"] = ("uint8" if c <= 256 else "uint16" if c <= 65536 else "uint32", (v, n, k), row)
    if r := plan.encoding.rank:
        expected["tail"] = ("int8", (v, n, r), row)
        expected["tail_basis"] = ("float16", (r, c), ("component", "class"))
        expected["tail_mean"] = ("float32", (c,), ("class",))
        expected["tail_scale"] = ("float32", (r,), ("component",))
    found = {
        name: (array.dtype.name, array.shape, tuple(arrays[f"{name}.names"]))
        for name, array in arrays.items()
        if not name.endswith(".names")
    }
    assert found == expected
    metadata = json.loads((made.cache.path / "data.zarr/statistics/zarr.json").read_text())
    assert metadata["attributes"] == {"columns": columns}


def compression(array: Path) -> tuple[Any, ...]:
    """("zstd",) or ("blosc", compressor, shuffle, typesize). In all else all arrays are alike."""
    metadata = json.loads((array / "zarr.json").read_text())
    assert (metadata["zarr_format"], metadata["node_type"]) == (3, "array")
    (sharding,) = metadata["codecs"]
    assert sharding["name"] == "sharding_indexed"
    shard = sharding["configuration"]
    assert shard["index_location"] == "end"
    of_index, *after_it = shard["index_codecs"]
    first, compressor, last = shard["codecs"]
    assert [codec["name"] for codec in after_it] == [last["name"]] == ["crc32c"]
    for codec in (of_index, first):
        assert codec["name"] == "bytes", "and no transpose before it"
        assert codec.get("configuration", {"endian": "little"}) == {"endian": "little"}, "a byte has no end"
    told = compressor["configuration"]
    return compressor["name"], *(told[key] for key in ("cname", "shuffle", "typesize") if key in told)


def test_rows_are_shuffled_and_compressed_and_all_chunks_end_in_a_checksum(made: Made) -> None:
    store = made.cache.path / "data.zarr"
    group = json.loads((store / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    encoding = made.cache.manifest.plan.encoding
    k, c = encoding.top_k, encoding.num_classes
    # The bytes of a number are shuffled, and where a number is a byte, those of a row.
    typesizes = {
        "log_probs": {"uint8": k, "float16": 2, "float32": 4}[encoding.dtype],
        "logsumexp": 4,
        "statistics": 2,
    }
    if not encoding.dense:
        typesizes["indices"] = k if c <= 256 else 2 if c <= 65_536 else 4
    if encoding.rank:
        typesizes["tail"] = encoding.rank
    expected: dict[str, tuple[Any, ...]] = {
        name: ("blosc", "zstd", "shuffle", typesize) for name, typesize in typesizes.items()
    }
    basis = ("tail_basis", "tail_mean", "tail_scale") if encoding.rank else ()
    expected |= dict.fromkeys(("fingerprints", "sketches", "labels", "sample_keys", *basis), ("zstd",))
    assert {path.parent.name: compression(path.parent) for path in store.glob("*/zarr.json")} == expected
    for name, typesize in typesizes.items():
        # Blosc's own header, as a writer need not do what it says in the metadata: flags 1 and 4 are a shuffle of bytes
        # and one of bits.
        header = next(path for path in (store / name / "c/0").rglob("*") if path.is_file()).read_bytes()
        assert (header[2] & 0b101, header[3]) == (0b001, typesize)


@pytest.mark.parametrize(("num_classes", "typesize"), [(255, 255), (256, 1)])
def test_rows_of_bytes_are_shuffled_up_to_the_width_that_blosc_takes(
    num_classes: int, typesize: int, tmp_path: Path
) -> None:
    made = make(tmp_path, 2, num_classes, dtype="uint8")
    assert compression(made.cache.path / "data.zarr/log_probs") == ("blosc", "zstd", "shuffle", typesize)
    labels = torch.from_numpy(made.samples.labels).long()
    stored = read_with_tensorstore(made.cache.path, tmp_path)["log_probs"][0]
    np.testing.assert_array_equal(stored, encode(made.live(), labels, made.cache.manifest.plan.encoding).log_probs)


@pytest.mark.parametrize("num_classes", [256, 257, 65_536, 65_537])
def test_the_last_class_has_an_index_on_both_sides_of_a_wider_type(num_classes: int, tmp_path: Path) -> None:
    samples, teacher = tiny_samples(2, num_classes), TinyTeacher(num_classes)
    teacher.weight[:] = 0
    teacher.weight[:, -1] = torch.as_tensor(samples.images.picture(0)).flatten()
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache", spec=CacheSpec(top_k=1, tail="uniform"))
    assert cache.teacher()(torch.tensor([0])).argmax().item() == num_classes - 1
    stored = read_with_tensorstore(cache.path, tmp_path)["indices"]
    assert stored[0, 0, 0] == num_classes - 1
    assert stored.dtype == {256: np.uint8, 257: np.uint16, 65_536: np.uint16, 65_537: np.uint32}[num_classes]


def test_a_shard_of_nothing_but_zeros_is_a_file(tmp_path: Path) -> None:
    teacher = TinyTeacher(2)
    teacher.weight[:] = 0
    samples = Samples("black", "train", ArrayImages(torch.zeros(6, 1, 4, 4)), np.zeros(6, np.int32), ("a", "b"), [])
    cache = dump_teacher(
        teacher, samples, tmp_path / "zeros.kdcache", spec=CacheSpec(top_k=1, tail="uniform", shard_rows=2)
    )
    arrays = read_with_tensorstore(cache.path, tmp_path)
    for name in ("indices/c/0/{}/0", "sketches/c/0/{}/0", "labels/c/{}"):
        assert all((cache.path / "data.zarr" / name.format(shard)).stat().st_size for shard in range(3))
        assert not arrays[name.split("/")[0]].any()


def test_shards_of_several_chunks(tmp_path: Path) -> None:
    # As large as those of a large set: the index of eight chunks is longer than the whole file of fingerprints.
    samples, teacher = tiny_samples(135_536, 3), TinyTeacher(3)
    spec = CacheSpec(top_k=2, tail="uniform", shard_rows=120_000, batch_size=20_000)
    made = Made(dump_teacher(teacher, samples, tmp_path / "large.kdcache", spec=spec), samples, teacher)
    shape = made.cache.manifest.plan.shape
    assert (shape.shard_rows, shape.chunk_rows, shape.fingerprint_stride) == (131_072, 16_384, 8192)
    rows, inputs = (
        {path.name: path.stat().st_size for path in (made.cache.path / f"data.zarr/{name}/c/0").iterdir()}
        for name in ("logsumexp", "fingerprints")
    )
    assert rows.keys() == inputs.keys() == {"0", "1"}
    assert max(inputs.values()) < 8 * 16
    logits = made.live()
    arrays = read_with_tensorstore(made.cache.path, tmp_path)
    np.testing.assert_allclose(arrays["logsumexp"][0], logits.double().logsumexp(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(arrays["indices"][0, :, 0], logits.argmax(1))
    np.testing.assert_array_equal(arrays["sample_keys"], samples.keys())
    check_inputs(made, arrays)


@pytest.mark.parametrize("count", [1, 1000, 9000, 60_000, 1_281_167, 14_000_000])
def test_shards_are_several_and_neither_huge_nor_many(count: int) -> None:
    shape = choose_sharding(count, row_bytes=32)
    assert shape.chunk_rows <= 16_384
    assert shape.shard_rows <= 131_072
    assert -(-count // shape.shard_rows) >= min(4, count // 1024)
    assert -(-count // shape.shard_rows) <= max(8, count // 100_000)


@pytest.mark.parametrize("shard_rows", [None, 100, 100_000])
def test_shards_of_wide_rows_fit_into_memory(shard_rows: int | None) -> None:
    # Every one of 70,000 classes in float32, of a large set: blosc refuses buffers of 2 GiB.
    shape = choose_sharding(1_000_000, row_bytes=70_000 * 4, shard_rows=shard_rows)
    assert shape.chunk_rows * 70_000 * 4 <= 2**30
    assert shape.shard_rows >= (shard_rows or 1000)
    assert shape.shard_rows <= (shard_rows + shape.chunk_rows if shard_rows else 2**30 // (70_000 * 4))


# The cache is a teacher.


def test_dense_float32_is_the_live_teacher(two_views: Made) -> None:
    teacher = two_views.cache.teacher()
    for view in range(2):
        torch.testing.assert_close(teacher(torch.arange(37), view), two_views.live(view), rtol=0, atol=1e-5)
    assert not torch.equal(two_views.live(0), two_views.live(1))


def test_dense_float16_is_the_live_teacher_to_its_precision(tmp_path: Path) -> None:
    made = make(tmp_path, dtype="float16")
    live = made.live()
    error = (made.cache.teacher()(torch.arange(37)) - live).abs()
    assert bool((error <= live.log_softmax(1).abs() * 2**-10 + 1e-5).all())
    assert error.max() > 1e-5, "stored in float32 after all"


def test_top_k_keeps_head_and_label(tmp_path: Path) -> None:
    made = make(tmp_path, top_k=3)
    live, cached = made.live(), made.cache.teacher()(torch.arange(37))
    stated = live.sort(descending=True, stable=True).indices[:, :3]
    label = torch.from_numpy(made.samples.labels).long().unsqueeze(1)
    assert bool((stated != label).all(1).any()), "a label outside the head is wanted here"
    for classes in (stated, label):
        error = (cached.gather(1, classes) - live.gather(1, classes)).abs()
        assert bool((error <= live.log_softmax(1).gather(1, classes).abs() * 2**-10 + 1e-5).all())
    torch.testing.assert_close(cached.logsumexp(1), live.logsumexp(1), rtol=0, atol=1e-3)


def test_teacher_is_decode_of_encode(made: Made) -> None:
    plan = made.cache.manifest.plan
    labels = torch.from_numpy(made.samples.labels).long()
    teacher = made.cache.teacher()
    for view in range(plan.views.count):
        basis = teacher.basis
        rows = encode(made.live(view), labels, plan.encoding, basis)
        expected = decode(rows, labels, plan.encoding, basis)
        torch.testing.assert_close(teacher(torch.arange(len(labels)), view), expected, rtol=1e-5, atol=1e-5)


def test_ids_in_any_order_and_any_number_of_times(tmp_path: Path) -> None:
    made = make(tmp_path, top_k=3, views=2)
    teacher = made.cache.teacher()
    everything = teacher(torch.arange(37), 1)
    for ids in (torch.randperm(37), torch.tensor([36, 0, 36, 17, 17]), torch.tensor([5], dtype=torch.int32)):
        assert torch.equal(teacher(ids, 1), everything[ids.long()])
    assert teacher(torch.empty(0, dtype=torch.int64)).shape == (0, 10)


@pytest.mark.parametrize(
    ("ids", "view", "words"),
    [
        (torch.tensor([0, 37]), 0, "0 to 36"),
        (torch.tensor([-1]), 0, "-1"),
        (torch.tensor([0]), 2, "no view 2"),
        (torch.tensor([0]), -1, "no view -1"),
        (torch.ones(37, dtype=torch.bool), 0, "bool"),
        (torch.tensor([0.0]), 0, "float32"),
        (torch.tensor([[0]]), 0, r"\[1, 1\]"),
    ],
    ids=str,
)
def test_ids_and_views_that_are_not_there_are_refused(ids: Tensor, view: int, words: str, two_views: Made) -> None:
    teacher = two_views.cache.teacher()
    with pytest.raises(UsageError, match=words):
        teacher(ids, view)


def test_views_are_flips_of_the_image_and_differ(two_views: Made) -> None:
    # RandomHorizontalFlip has two outcomes: both must occur, in each view, and not at the same samples.
    pixels = torch.stack([torch.as_tensor(two_views.samples.images.picture(i)) for i in range(37)])
    straight, flipped = two_views.teacher(pixels), two_views.teacher(pixels.flip(3))
    teacher = two_views.cache.teacher()
    was_flipped = []
    for view in range(2):
        cached = teacher(torch.arange(37), view)
        is_straight = (cached - straight).abs().amax(1) < 1e-5
        is_flipped = (cached - flipped).abs().amax(1) < 1e-5
        assert bool((is_straight ^ is_flipped).all())
        assert 5 < int(is_flipped.sum()) < 32
        was_flipped.append(is_flipped)
    assert not torch.equal(*was_flipped)


# The manifest.


def test_manifest_says_what_was_done(tmp_path: Path) -> None:
    samples, teacher = tiny_samples(), TinyTeacher()
    spec = CacheSpec(top_k=3, tail="uniform", views=2, seed=5, shard_rows=16, license="CC0-1.0", notes="for a test")
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache", name="linear", transform=FLIP, spec=spec)
    said = json.loads((cache.path / "manifest.json").read_text())
    plan, weights = said["plan"], teacher.weight.numpy()
    assert plan["format"] == "kdcache"
    assert plan["teacher"] == {
        "name": "linear",
        "arguments": {},
        "code_digest": None,
        "weights_digest": "sha256:"
        + hashlib.sha256(b"weight\0torch.float32\0[16, 10]\0" + weights.tobytes()).hexdigest(),
        "parameters": 0,
        "precision": "fp32",
    }
    contents = [b"<f4(1, 4, 4)" + torch.as_tensor(samples.images.picture(i)).numpy().tobytes() for i in range(37)]
    keys = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    assert plan["dataset"] == {
        "name": "tiny",
        "split": "train",
        "samples": 37,
        "class_names": [f"class {c}" for c in range(10)],
        "digest": "sha256:" + hashlib.sha256(keys + samples.labels.astype("<i4").tobytes()).hexdigest(),
    }
    assert cache.sample_keys.tobytes() == keys
    assert plan["views"] == {"count": 2, "seed": 5, "transform": FLIP}
    assert plan["encoding"] == {"num_classes": 10, "top_k": 3, "tail": "uniform", "rank": 0, "dtype": "float16"}
    assert plan["fidelity"]["rows"] == 10
    assert list(plan["fidelity"]["total_variation"]) == ["1", "2", "4", "8"]
    assert {name: plan["versions"][name] for name in ("kdcache", "torch", "numpy", "zarr")} == {
        name: version(name) for name in ("kdcache", "torch", "numpy", "zarr")
    }
    assert (plan["licence"], plan["notes"]) == ("CC0-1.0", "for a test")


def test_summary_is_that_of_the_live_teacher(tmp_path: Path) -> None:
    made = make(tmp_path, top_k=3, views=2, labels=[-1, *(i % 10 for i in range(36))])
    live = torch.stack([made.live(0), made.live(1)]).double()
    labels = torch.from_numpy(made.samples.labels)
    summary = made.cache.manifest.summary
    known = labels >= 0
    assert summary.teacher_accuracy == pytest.approx((live.argmax(2) == labels)[:, known].double().mean().item())
    assert summary.mean_sharpness == pytest.approx(live.logsumexp(2).mean().item(), rel=1e-6)
    assert summary.mean_top_probability == pytest.approx(live.softmax(2).amax(2).mean().item(), rel=1e-3)
    entropy = -(live.softmax(2) * live.log_softmax(2)).sum(2)
    assert summary.mean_entropy == pytest.approx(entropy.mean().item(), rel=1e-3)


class Immense(TinyTeacher):
    """Two rows in three have logits of about 1e15, above or below zero, which drown the others in a plain sum."""

    def forward(self, images: Tensor) -> Tensor:
        ids = (images[:, 0, 0, 0] * 8).int()
        return super().forward(images) + 1e15 * (ids % 3 - 1).unsqueeze(1)


def test_the_sums_of_the_summary_are_exact(tmp_path: Path) -> None:
    # The root digest covers them: they must not depend on the order in which a machine adds up.
    cache = dump_teacher(Immense(), tiny_samples(3000), tmp_path / "c.kdcache", spec=CacheSpec(shard_rows=3000))
    stored = read_with_tensorstore(cache.path, tmp_path)["logsumexp"][0].astype(np.float64)
    assert cache.manifest.summary.mean_sharpness == math.fsum(stored) / 3000
    assert stored.sum() / 3000 != math.fsum(stored) / 3000, "an easy sum shows nothing"


def test_without_labels_there_is_no_accuracy(tmp_path: Path) -> None:
    made = make(tmp_path, labels=[-1] * 37)
    assert made.cache.manifest.summary.teacher_accuracy is None
    torch.testing.assert_close(made.cache.teacher()(torch.arange(37)), made.live(), rtol=0, atol=0.02)


def test_manifest_covers_every_file_and_itself(made: Made) -> None:
    path = made.cache.path
    on_disk = {found.relative_to(path).as_posix(): found for found in path.rglob("*") if found.is_file()}
    manifest_path = on_disk.pop("manifest.json")
    card = on_disk.pop("README.md"), on_disk.pop("card.png")  # both follow from the cache
    text = manifest_path.read_bytes()
    said = json.loads(text)
    assert said["files"] == {
        name: {"size": found.stat().st_size, "sha256": hashlib.sha256(found.read_bytes()).hexdigest()}
        for name, found in on_disk.items()
    }
    digest = said["digest"].removeprefix("sha256:")
    assert hashlib.sha256(text.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    sizes = [found.stat().st_size for found in path.rglob("*") if found.is_file() and found not in card]
    assert made.cache.bytes_on_disk == sum(sizes)


def test_manifest_reads_back_as_it_was_written(made: Made) -> None:
    path = made.cache.path / "manifest.json"
    manifest = read_manifest(path)
    assert manifest == made.cache.manifest
    assert canonical(manifest) == path.read_bytes()


def test_nothing_tells_whose_machine_it_was(made: Made) -> None:
    texts = [path.read_text() for path in made.cache.path.rglob("*.json")]
    assert len(texts) > 5
    for text in texts:
        for telling in (str(made.cache.path.parent), str(Path.home()), str(Path.cwd())):
            assert telling not in text
        for telling in (getpass.getuser(), socket.gethostname()):
            assert not re.search(rf"\b{re.escape(telling)}\b", text)
        assert not re.search(r'"/[^"]', text), "an absolute path"


def test_a_cache_opens_after_it_was_moved(tmp_path: Path) -> None:
    made = make(tmp_path)
    before = made.cache.teacher()(torch.arange(37))
    moved = made.cache.path.rename(tmp_path / "elsewhere")
    cache = open_cache(str(moved))
    assert len(cache) == 37
    assert cache.num_classes == 10
    assert cache.manifest.digest == made.cache.manifest.digest
    assert torch.equal(cache.teacher()(torch.arange(37)), before)
