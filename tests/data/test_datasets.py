"""Data sets: the images and labels that their files hold, in a fixed order, split the same way every time."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import pickle
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision import datasets as tv

from kdcache.cache.format.fingerprints import digest_of
from kdcache.config.schema import DatasetSpec
from kdcache.config.transform import Transform
from kdcache.data.datasets import SPLITS, load_held_out, load_split
from kdcache.data.images import ArrayImages, FileImages
from kdcache.data.same_samples import check_same_samples
from kdcache.data.samples import Samples, Split, wrap
from kdcache.data.views import View
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.runtime.package_data import package_data
from kdcache.runtime.progress import Silent, delayed_task

Array = npt.NDArray[Any]
DIGITS = DatasetSpec(name="digits")


def pixels_of(samples: Samples) -> Array:
    """All images as one array [N, channels, H, W]."""
    pictures = [samples.images.picture(index) for index in range(len(samples))]
    return np.stack([np.asarray(picture) for picture in pictures])


def splits_of(spec: DatasetSpec) -> dict[Split, Samples]:
    return {split: load_split(spec, split) for split in SPLITS}


def blake2b_64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# digits


def lines_of_digits() -> list[list[int]]:
    with gzip.open(package_data("data/digits/digits.csv.gz"), "rt") as lines:
        return [[int(float(word)) for word in row] for row in csv.reader(lines)]


def test_digits_are_the_lines_of_the_file_in_order() -> None:
    lines = lines_of_digits()
    splits = splits_of(DIGITS)
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 1000, "validation": 297, "test": 500}
    pixels = np.concatenate([pixels_of(samples) for samples in splits.values()])
    labels = np.concatenate([samples.labels for samples in splits.values()])
    assert labels.tolist() == [line[64] for line in lines]
    assert set(labels.tolist()) == set(range(10))
    assert pixels.shape == (1797, 1, 8, 8)
    assert pixels.dtype == np.uint8
    # The gray levels 0 to 16 of the file, times 15.
    assert (pixels.reshape(-1, 64) == 15 * np.array([line[:64] for line in lines])).all()


def test_the_file_of_digits_is_the_one_of_scikit_learn() -> None:
    # sha256 of sklearn/datasets/data/digits.csv.gz, and its first line as the UCI repository has it.
    data = package_data("data/digits/digits.csv.gz").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
    assert lines_of_digits()[0][:9] == [0, 0, 5, 13, 9, 1, 0, 0, 0]


def test_digits_are_standardized_by_their_own_transform() -> None:
    images = View(load_split(DIGITS, "train"), load_split(DIGITS, "train").transform).__getitems__(range(1000)).images
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


# Content keys and digests


def test_the_key_of_an_array_image_is_a_hash_of_type_shape_and_pixels() -> None:
    samples = load_split(DIGITS, "validation")
    pixels = pixels_of(samples)
    keys = samples.keys()
    assert keys.dtype == np.uint64
    assert keys.tolist() == [blake2b_64(b"|u1(1, 8, 8)" + image.tobytes()) for image in pixels]
    assert len(set(keys.tolist())) == len({image.tobytes() for image in pixels}) > 290
    # Written down once: another version of any library must not change them.
    assert f"{keys[0]:016x} {keys[-1]:016x}" == "a0f7c0e83d3e1a72 c14b13323049ff40"


def test_the_key_of_an_image_file_is_a_hash_of_its_bytes(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{name}.png", seed) for seed, name in enumerate("abc")]
    samples = Samples("mine", "train", FileImages([str(p) for p in paths]), np.zeros(3, np.int32), ("one",), [])
    assert samples.keys().tolist() == [blake2b_64(path.read_bytes()) for path in paths]


@settings(deadline=None)
@given(labels=st.lists(st.integers(-1, 2**31 - 1), max_size=20), seed=st.integers(0, 2**32 - 1))
def test_the_digest_is_sha256_of_keys_then_labels(labels: list[int], seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**64, len(labels), np.uint64)
    data = b"".join(int(key).to_bytes(8, "little") for key in keys)
    data += b"".join(label.to_bytes(4, "little", signed=True) for label in labels)
    assert digest_of(keys, np.array(labels, np.int32)) == "sha256:" + hashlib.sha256(data).hexdigest()
    assert digest_of(keys.astype(">u8"), np.array(labels, ">i4")) == "sha256:" + hashlib.sha256(data).hexdigest()


# Splits that are held out


def ids_held_out(count: int, validation: float, test: float) -> dict[Split, list[int]]:
    """The rule that `datasets.py` states: ids ordered by the hash of their 8 bytes, validation first, then test."""
    order = sorted(range(count), key=lambda i: hashlib.blake2b(i.to_bytes(8, "little"), digest_size=8).digest())
    first, second = round(count * validation), round(count * test)
    return {
        "validation": sorted(order[:first]),
        "test": sorted(order[first : first + second]),
        "train": sorted(order[first + second :]),
    }


def npz(path: Path, **arrays: Array) -> DatasetSpec:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its flags
    return DatasetSpec(name="npz", root=str(path))


def counted(path: Path, count: int, **spec: Any) -> DatasetSpec:
    """A set of `count` one-pixel images; the id of each is written into its two channels."""
    ids = np.arange(count)
    npz(path, images=np.stack([ids % 256, ids // 256], axis=-1).astype(np.uint8).reshape(-1, 1, 1, 2), labels=ids % 3)
    return DatasetSpec(name="npz", root=str(path), **spec)


def ids_of(samples: Samples) -> list[int]:
    low, high = pixels_of(samples).reshape(-1, 2).T.astype(int)
    return list(low + 256 * high)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(5, 600), validation=st.floats(0.0, 0.45), test=st.floats(0.0, 0.45))
def test_held_out_splits_are_disjoint_complete_and_deterministic(
    count: int, validation: float, test: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = counted(tmp_path_factory.getbasetemp() / "c.npz", count, validation_fraction=validation, test_fraction=test)
    expected = ids_held_out(count, validation, test)
    for split in SPLITS:
        if expected[split]:
            samples = load_split(spec, split)
            assert ids_of(samples) == expected[split]
            assert samples.labels.tolist() == [i % 3 for i in expected[split]]
        else:
            with pytest.raises(UsageError, match=f"c/{split} holds no image"):
                load_split(spec, split)
    assert sorted(i for ids in expected.values() for i in ids) == list(range(count))


def test_an_empty_split_is_none(tmp_path: Path) -> None:
    spec = counted(tmp_path / "c.npz", 50, validation_fraction=0.0, test_fraction=0.2)
    assert load_held_out(spec, "validation") is None
    held_out = load_held_out(spec, "test")
    assert held_out is not None
    assert len(held_out) == 10
    assert len(load_split(spec, "train")) == 40
    # A set with a split of its own has it whatever the fraction says.
    own = load_held_out(DatasetSpec(name="digits", validation_fraction=0.0, test_fraction=0.0), "validation")
    assert own is not None
    assert len(own) == 297


# CIFAR, in the layout of the archives of 2009


def cifar_pixels(name: str, rows: int) -> Array:
    return np.random.default_rng(sum(name.encode())).integers(0, 256, (rows, 3072), np.uint8)


def cifar_folder(root: Path, kind: Literal["cifar10", "cifar100"]) -> dict[str, Array]:
    """Files as they come out of the archive: pickled dicts of flat rows, red plane first, and lists of labels."""
    if kind == "cifar10":
        folder, label_key = root / "cifar-10-batches-py", "labels"
        sizes = {**{f"data_batch_{i}": 20 for i in range(1, 6)}, "test_batch": 10}
        meta = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    else:
        folder, label_key, sizes = root / "cifar-100-python", "fine_labels", {"train": 100, "test": 10}
        meta = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    folder.mkdir(parents=True)
    classes = 10 if kind == "cifar10" else 100
    files: dict[str, Any] = dict(meta)
    for name, rows in sizes.items():
        files[name] = {"data": cifar_pixels(name, rows), label_key: [(7 * i + 1) % classes for i in range(rows)]}
    for name, held in files.items():
        (folder / name).write_bytes(pickle.dumps(held, protocol=2))
    return {name: files[name]["data"] for name in sizes}


def trust_md5(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Let torchvision expect the checksums of the generated files; it still compares them."""

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()

    for kind in (tv.CIFAR10, tv.CIFAR100):
        folder = root / kind.base_folder
        if folder.is_dir():
            monkeypatch.setattr(kind, "train_list", [[name, md5(folder / name)] for name, _ in kind.train_list])
            monkeypatch.setattr(kind, "test_list", [[name, md5(folder / name)] for name, _ in kind.test_list])
            meta = {**kind.meta, "md5": md5(folder / kind.meta["filename"])}
            monkeypatch.setattr(kind, "meta", meta)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_files(
    kind: Literal["cifar10", "cifar100"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = cifar_folder(tmp_path, kind)
    trust_md5(monkeypatch, tmp_path)
    classes = 10 if kind == "cifar10" else 100
    splits = splits_of(DatasetSpec(name=kind, root=str(tmp_path)))
    train = np.concatenate([data for name, data in files.items() if name not in ("test", "test_batch")])
    labels = np.concatenate([(7 * np.arange(len(d)) + 1) % classes for d in list(files.values())[:-1]])
    expected = ids_held_out(100, 0.1, 0.0)
    assert len(expected["validation"]) == 10
    for split in ("train", "validation"):
        ids = expected[split]
        assert (pixels_of(splits[split]) == train[ids].reshape(-1, 3, 32, 32)).all()
        assert splits[split].labels.tolist() == labels[ids].tolist()
    assert (pixels_of(splits["test"]) == list(files.values())[-1].reshape(-1, 3, 32, 32)).all()
    assert splits["test"].class_names == tuple(f"class {i}" for i in range(classes))
    assert load_held_out(DatasetSpec(name=kind, root=str(tmp_path), validation_fraction=0.0), "validation") is None
    assert len(load_split(DatasetSpec(name=kind, root=str(tmp_path), validation_fraction=0.0), "train")) == 100


def test_a_test_fraction_takes_no_images_from_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_folder(tmp_path, "cifar10")
    trust_md5(monkeypatch, tmp_path)
    assert len(load_split(DatasetSpec(name="cifar10", root=str(tmp_path), test_fraction=0.5), "train")) == 90
    assert len(load_split(DatasetSpec(name="cifar10", root=str(tmp_path), test_fraction=0.5), "test")) == 10


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(urllib.request, "getproxies", dict)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("kind", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_a_failed_download_names_the_file_to_copy(
    kind: Literal["cifar10", "cifar100"], archive: str, tmp_path: Path
) -> None:
    root = tmp_path / "here"
    with pytest.raises(UsageError, match=f"{kind} is not in {root} and cannot be downloaded: .*Name or") as caught:
        load_split(DatasetSpec(name=kind, root=str(root)), "train")
    assert f"put {archive}.tar.gz (from https://www.cs.toronto.edu/~kriz/cifar.html)" in caught.value.fix
    assert f"into {root}" in caught.value.fix
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("offline")
def test_a_damaged_cifar_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar_folder(tmp_path, "cifar10")
    trust_md5(monkeypatch, tmp_path)
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(UsageError, match="cifar10 is not in"):
        load_split(DatasetSpec(name="cifar10", root=str(tmp_path)), "train")


# Folders of images


def picture(path: Path, seed: int, size: tuple[int, int] = (6, 5)) -> Path:
    """A PNG of random pixels, [height, width]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def folders(root: Path, **splits: int) -> Path:
    """`split=images a class` for the classes ant and bee, and cat with one image fewer; written in another order."""
    for split, count in splits.items():
        for index in reversed(range(count)):
            for label, name in enumerate(("bee", "cat", "ant")):
                if name != "cat" or index:
                    picture(root / split / name / f"{index}.png", 100 * index + label)
    return root


@pytest.mark.parametrize("name", ["image-folder", "imagenet"])
def test_a_folder_is_read_in_the_order_of_its_names(name: Literal["image-folder", "imagenet"], tmp_path: Path) -> None:
    folders(tmp_path, train=8, val=3)
    spec = DatasetSpec(name=name, root=str(tmp_path), validation_fraction=0.0, test_fraction=0.0)
    samples = load_split(spec, "train")
    expected = sorted((tmp_path / "train").rglob("*.png"))
    assert isinstance(samples.images, FileImages)
    assert list(samples.images.paths) == [str(path) for path in expected]
    assert samples.class_names == ("ant", "bee", "cat")
    assert samples.labels.tolist() == [["ant", "bee", "cat"].index(path.parent.name) for path in expected]
    for index, path in enumerate(expected):
        with Image.open(path) as image:
            assert (np.asarray(samples.images.picture(index)) == np.asarray(image)).all()
    assert samples.images.shape() == (3, 6, 5)


def test_an_image_folder_holds_out_the_splits_that_it_lacks(tmp_path: Path) -> None:
    everything = folders(tmp_path / "all", train=20, val=4, test=3)
    some = folders(tmp_path / "some", train=20, validation=4)
    one = folders(tmp_path / "one", train=20)
    sizes = {
        root.name: {split: len(samples) for split, samples in splits_of(spec).items()}
        for root in (everything, some, one)
        for spec in [DatasetSpec(name="image-folder", root=str(root), validation_fraction=0.2, test_fraction=0.1)]
    }
    assert sizes == {
        "all": {"train": 59, "validation": 11, "test": 8},
        "some": {"train": 53, "validation": 11, "test": 6},
        "one": {"train": 41, "validation": 12, "test": 6},
    }
    held = splits_of(DatasetSpec(name="image-folder", root=str(one), validation_fraction=0.2, test_fraction=0.1))
    everyone = sorted((one / "train").rglob("*.png"))
    for split, ids in ids_held_out(59, 0.2, 0.1).items():
        images = held[split].images
        assert isinstance(images, FileImages)
        assert list(images.paths) == [str(everyone[i]) for i in ids]


def test_the_test_split_of_imagenet_is_its_val_folder(tmp_path: Path) -> None:
    folders(tmp_path, train=20, val=4)
    spec = DatasetSpec(name="imagenet", root=str(tmp_path), validation_fraction=0.1)
    sizes = {split: len(samples) for split, samples in splits_of(spec).items()}
    assert sizes == {"train": 53, "validation": 6, "test": 11}
    test = load_split(spec, "test").images
    assert isinstance(test, FileImages)
    assert all(Path(path).is_relative_to(tmp_path / "val") for path in test.paths)
    assert (
        load_held_out(DatasetSpec(name="imagenet", root=str(tmp_path), validation_fraction=0.0), "validation") is None
    )


def test_a_grayscale_or_transparent_file_is_read_as_rgb(tmp_path: Path) -> None:
    gray = np.arange(30, dtype=np.uint8).reshape(5, 6)
    for name in ("train/a/0.png", "train/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
    Image.fromarray(gray).save(tmp_path / "train/a/0.png")
    Image.fromarray(gray).convert("RGBA").save(tmp_path / "train/b/0.png")
    samples = load_split(
        DatasetSpec(name="image-folder", root=str(tmp_path), validation_fraction=0.0, test_fraction=0.0), "train"
    )
    assert (pixels_of(samples) == gray[None, :, :, None]).all()


def refused(kind: type[KdcacheError], code: int, words: str, spec: DatasetSpec, split: Split = "train") -> str:
    with pytest.raises(kind, match=words) as caught:
        load_split(spec, split)
    assert caught.value.exit_code == code
    return caught.value.fix


@pytest.mark.parametrize("name", ["image-folder", "imagenet"])
def test_a_missing_folder_is_reported_with_the_expected_layout(
    name: Literal["image-folder", "imagenet"], tmp_path: Path
) -> None:
    nowhere = DatasetSpec(name=name, root=str(tmp_path / "nowhere"))
    assert "train/" in refused(UsageError, 2, f"folder not found: {tmp_path}/nowhere", nowhere)
    here = DatasetSpec(name=name, root=str(tmp_path))
    assert "one folder of images per class" in refused(UsageError, 2, f"{tmp_path} does not hold {name}", here)
    (tmp_path / "train").mkdir()
    refused(UsageError, 2, "does not hold imagenet" if name == "imagenet" else "find any class folder", here)
    folders(tmp_path, val=2)
    for split in SPLITS:
        refused(UsageError, 2, "find any class folder", here, split)


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    folders(tmp_path, train=2)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    fix = refused(UsageError, 2, "classes dog", DatasetSpec(name="image-folder", root=str(tmp_path)))
    assert "at least one image in each" in fix


def test_other_class_folders_in_another_split_are_named(tmp_path: Path) -> None:
    folders(tmp_path, train=2, val=2)
    picture(tmp_path / "val" / "dog" / "0.png", 0)
    spec = DatasetSpec(name="image-folder", root=str(tmp_path))
    refused(MismatchError, 4, f"{tmp_path}/val has other class folders than {tmp_path}/train: dog", spec, "validation")
    load_split(spec, "train")


def damaged(data: bytes) -> Iterator[bytes]:
    yield b""
    yield b"GIF89a no picture"
    yield data[:40]
    yield data[: len(data) // 2]
    yield data.replace(b"IDAT", b"IDAX")
    yield data[:16] + b"\xff\xff\xff\x7f" * 2 + data[24:]  # a width and height that no memory holds


@pytest.mark.parametrize("which", range(6))
def test_a_broken_image_is_named(which: int, tmp_path: Path) -> None:
    folders(tmp_path, train=2)
    path = tmp_path / "train" / "ant" / "1.png"
    path.write_bytes(list(damaged(path.read_bytes()))[which])
    spec = DatasetSpec(name="image-folder", root=str(tmp_path), validation_fraction=0.0, test_fraction=0.0)
    images = load_split(spec, "train").images
    images.picture(0)
    with pytest.raises(CorruptError, match=f"cannot read the image {path}: .") as caught:
        images.picture(1)
    assert caught.value.exit_code == 5
    path.unlink()
    for read in (images.picture, images.content):
        with pytest.raises(CorruptError, match=f"cannot read the image {path}: .*No such file"):
            read(1)


# npz files


@pytest.mark.parametrize("shape", [(9, 5, 4), (9, 5, 4, 1), (9, 5, 4, 3)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file_holds_grayscale_or_color_images(
    shape: tuple[int, ...], save: Callable[..., None], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.array([0, 1, 2, -1, 2, 1, 0, 1, 2], np.int64)
    save(tmp_path / "mine.npz", images=images, labels=labels)
    samples = load_split(
        DatasetSpec(name="npz", root=str(tmp_path / "mine.npz"), validation_fraction=0.0, test_fraction=0.0), "train"
    )
    assert (samples.name, samples.split, samples.class_names) == ("mine", "train", ("0", "1", "2"))
    assert samples.labels.tolist() == labels.tolist()
    assert samples.labels.dtype == np.int32
    assert (pixels_of(samples).transpose(0, 2, 3, 1) == images.reshape(9, 5, 4, -1)).all()
    assert samples.images.shape() == (shape[3] if len(shape) == 4 else 1, 5, 4)


def test_an_npz_file_may_name_its_classes(tmp_path: Path) -> None:
    images = np.zeros((3, 2, 2), np.uint8)
    spec = npz(tmp_path / "m.npz", images=images, labels=np.array([0, 5, 1]), class_names=np.array(list("abcdef")))
    assert load_split(spec, "train").class_names == ("a", "b", "c", "d", "e", "f")


IMAGES = np.zeros((6, 4, 4), np.uint8)
LABELS = np.arange(6) % 2


@pytest.mark.parametrize(
    ("kind", "words", "arrays"),
    [
        (UsageError, "holds images, not images and labels", {"images": IMAGES}),
        (UsageError, "holds nothing, not images and labels", {}),
        (UsageError, "holds a, b, not images and labels", {"a": IMAGES, "b": LABELS}),
        (UsageError, r"images \[6, 4, 4\] float32", {"images": IMAGES.astype(np.float32), "labels": LABELS}),
        (UsageError, r"images \[6, 16\] uint8", {"images": IMAGES.reshape(6, 16), "labels": LABELS}),
        (UsageError, r"labels \[6\] float64", {"images": IMAGES, "labels": LABELS.astype(float)}),
        (UsageError, r"labels \[6, 1\] int64", {"images": IMAGES, "labels": LABELS[:, None]}),
        (UsageError, r"labels \[6\] bool", {"images": IMAGES, "labels": LABELS > 0}),
        (MismatchError, "6 images and 5 labels", {"images": IMAGES, "labels": LABELS[:5]}),
        (UsageError, "m/train holds no image", {"images": IMAGES[:0], "labels": LABELS[:0]}),
        (
            UsageError,
            r"class_names \[1, 2\]",
            {"images": IMAGES, "labels": LABELS, "class_names": np.array([["a", "b"]])},
        ),
        (UsageError, r"class_names \[\]", {"images": IMAGES, "labels": LABELS, "class_names": np.array("ab")}),
        (
            MismatchError,
            r"sample 1 has label 1, classes run from 0 to 0 \(3 such",
            {"images": IMAGES, "labels": LABELS, "class_names": np.array(["a"])},
        ),
        (MismatchError, "sample 0 has label -2", {"images": IMAGES, "labels": LABELS - 2}),
        (MismatchError, "the label 70 and only 6 images", {"images": IMAGES, "labels": LABELS * 70}),
        (MismatchError, "the label 4294967296 and only 6 images", {"images": IMAGES, "labels": LABELS * 2**32}),
        (
            MismatchError,
            "sample 1 has label 4294967296, classes run from 0 to 1",
            {"images": IMAGES, "labels": LABELS * 2**32, "class_names": np.array(["a", "b"])},
        ),
        (
            MismatchError,
            "sample 1 has label 18446744073709551615",
            {
                "images": IMAGES,
                "labels": LABELS.astype(np.uint64) * np.uint64(2**64 - 1),
                "class_names": np.array(["a"]),
            },
        ),
    ],
)
def test_an_npz_file_that_is_not_images_and_labels_is_refused(
    kind: type[KdcacheError], words: str, arrays: dict[str, Array], tmp_path: Path
) -> None:
    refused(kind, 2 if kind is UsageError else 4, words, npz(tmp_path / "m.npz", **arrays))


def test_a_file_that_is_not_an_npz_is_refused(tmp_path: Path) -> None:
    spec = DatasetSpec(name="npz", root=str(tmp_path / "m.npz"))
    refused(UsageError, 2, f"file not found: {tmp_path}/m.npz", spec)
    for data in (b"", b"images,labels\n", pickle.dumps({"images": 1})):
        (tmp_path / "m.npz").write_bytes(data)
        assert "numpy.savez" in refused(CorruptError, 5, f"cannot read {tmp_path}/m.npz as an npz file", spec)
    with (tmp_path / "m.npz").open("wb") as file:
        np.save(file, IMAGES)
    refused(CorruptError, 5, "not a zip archive", spec)


def test_a_truncated_npz_file_is_refused(tmp_path: Path) -> None:
    spec = npz(tmp_path / "m.npz", images=IMAGES, labels=LABELS)
    data = (tmp_path / "m.npz").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "m.npz").write_bytes(data[:length])
        refused(CorruptError, 5, "cannot read", spec)


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_damaged_npz_file_is_read_correctly_or_refused(
    place: float, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=IMAGES, labels=LABELS)
    data = bytearray(buffer.getvalue())
    data[int(place * len(data))] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(data)
    spec = DatasetSpec(name="npz", root=str(path), validation_fraction=0.0, test_fraction=0.0)
    try:
        samples = load_split(spec, "train")
    except KdcacheError:
        return
    assert (pixels_of(samples)[:, 0] == IMAGES).all()
    assert samples.labels.tolist() == LABELS.tolist()


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_an_object_in_an_npz_file_is_not_unpickled(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    spec = npz(tmp_path / "m.npz", images=np.array([Touch(touched)], object), labels=np.zeros(1, int))
    refused(CorruptError, 5, "cannot read .*allow_pickle", spec)
    assert not touched.exists()


# Any data set of torch


class Pairs(Dataset[tuple[Any, Any]]):
    def __init__(self, images: Sequence[Any], labels: Sequence[Any]) -> None:
        self.items = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index]


COLOUR = np.random.default_rng(3).integers(0, 256, (4, 5, 6, 3), np.uint8)
FOUR = [0, 1, -1, 2]


def as_tensors() -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in COLOUR]


@pytest.mark.parametrize(
    "images",
    [as_tensors(), list(COLOUR), [Image.fromarray(image) for image in COLOUR]],
    ids=["tensors", "arrays", "PIL images"],
)
def test_a_torch_data_set_of_any_images_shows_the_same_pixels(images: Sequence[Any]) -> None:
    transform: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    samples = wrap(Pairs(images, FOUR), 3, "mine", "test", transform, ["a", "b", "c"])
    assert (samples.name, samples.split, samples.class_names) == ("mine", "test", ("a", "b", "c"))
    assert samples.labels.tolist() == FOUR
    assert samples.images.shape() == (3, 5, 6)
    pixels, labels, ids, *_ = View(samples, samples.transform).__getitems__([3, 0])
    assert torch.allclose(pixels, torch.from_numpy(COLOUR[[3, 0]]).permute(0, 3, 1, 2) / 255, atol=1e-7)
    assert (labels.tolist(), ids.tolist()) == ([2, 0], [3, 0])
    keys = samples.keys()
    assert len(set(keys.tolist())) == 4
    assert wrap(Pairs(images, FOUR), 3).keys().tolist() == keys.tolist()


def test_grayscale_arrays_have_one_channel() -> None:
    samples = wrap(Pairs(list(COLOUR[..., 0]), FOUR), 3)
    assert samples.images.shape() == (1, 5, 6)
    assert (pixels_of(samples)[:, 0] == COLOUR[..., 0]).all()
    assert samples.class_names == ("0", "1", "2")
    assert samples.transform == []


def test_a_tensor_data_set_has_the_keys_of_its_arrays() -> None:
    pixels = torch.from_numpy(COLOUR).permute(0, 3, 1, 2).contiguous()
    wrapped = wrap(TensorDataset(pixels, torch.tensor(FOUR)), 3)
    array = Samples("a", "train", ArrayImages(pixels), np.array(FOUR, np.int32), tuple("abc"), [])
    assert wrapped.keys().tolist() == array.keys().tolist()


def test_a_wrapped_data_set_is_checked() -> None:
    def wrong(kind: type[KdcacheError], words: str, labels: Sequence[Any], **options: Any) -> None:
        with pytest.raises(kind, match=words):
            wrap(Pairs(as_tensors(), labels), **{"num_classes": 3, **options})

    wrong(MismatchError, "sample 3 has label 3, classes run from 0 to 2", [0, 1, 2, 3])
    wrong(MismatchError, "sample 1 has label -2", [0, -2, 2, 2])
    wrong(MismatchError, "sample 0 has label 4294967296", [2**32, 0, 0, 0])
    wrong(MismatchError, f"sample 0 has label {2**70}", [2**70, 0, 0, 0])
    wrong(UsageError, "item 2 .* an integer label", [0, 1, 0.5, 2])
    wrong(UsageError, "item 0 .* an integer label", [torch.tensor([0.0, 1.0]), 1, 1, 1])
    wrong(MismatchError, "2 class names for 3 classes", FOUR, class_names=["a", "b"])
    wrong(MismatchError, "0 class names for 3 classes", FOUR, class_names=[])
    assert wrap(TensorDataset(torch.zeros(3, 1, 2, 2)), 3).labels.tolist() == [-1, -1, -1], "it has no labels"
    assert wrap(Pairs(as_tensors(), [0, None, 1, 1]), 3).labels.tolist() == [0, -1, 1, 1]
    with pytest.raises(UsageError, match="dataset/train holds no image"):
        wrap(Pairs([], []), 3)


def test_a_stream_cannot_be_wrapped() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([])

    with pytest.raises(UsageError, match="Stream has no length"):
        wrap(Stream(), 3)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ([[1, 2]], "has an image of type list"),
        (torch.zeros(()), r"has an image of type Tensor \[\]"),
        ("a.png", "has an image of type str"),
    ],
)
def test_an_item_without_an_image_is_refused(image: object, words: str) -> None:
    samples = wrap(Pairs([image], [0]), 1)
    for look in (samples.images.shape, samples.keys, lambda: View(samples, [])[0]):
        with pytest.raises(UsageError, match=f"item 0 of the data set {words}"):
            look()


# The cache's samples, or others


def test_the_same_samples_pass() -> None:
    samples = load_split(DIGITS, "test")
    check_same_samples(samples, samples.keys(), samples.keys().copy(), samples.labels.copy())


def test_other_samples_orders_and_labels_are_distinguished() -> None:
    samples = load_split(DIGITS, "test")
    keys, labels = samples.keys(), samples.labels

    def refusal(cached: Array, cached_labels: Array) -> str:
        with pytest.raises(MismatchError) as caught:
            check_same_samples(samples, keys, cached, cached_labels)
        assert caught.value.exit_code == 4
        return caught.value.what

    assert refusal(keys[:-1], labels[:-1]) == "the cache holds 499 samples, digits/test has 500"
    swapped = np.arange(500)
    swapped[[17, 230]] = [230, 17]
    assert refusal(keys[swapped], labels[swapped]).endswith("in another order, first at sample 17")
    others = keys.copy()
    others[[40, 77]] += np.uint64(1)
    assert refusal(others, labels).startswith(
        "2 of 500 samples of digits/test are not those of the cache, first sample 40"
    )
    relabeled = labels.copy()
    relabeled[[3, 9]] = [(labels[3] + 1) % 10, -1]
    assert refusal(keys, relabeled) == (
        f"sample 3 of digits/test has label {labels[3]}, in the cache {relabeled[3]} (2 labels differ)"
    )


def test_numbers_of_labels_and_images_must_match() -> None:
    with pytest.raises(MismatchError, match="mine/train has 2 images and 3 labels"):
        Samples("mine", "train", ArrayImages(torch.zeros(2, 1, 2, 2)), np.zeros(3, np.int32), ("a",), [])


def test_few_images_have_the_same_key_by_chance() -> None:
    keys = [key for split in SPLITS for key in load_split(DIGITS, split).keys().tolist()]
    assert max(Counter(keys).values()) == 1


# Other fractions held out than the cache was made with


@pytest.mark.parametrize("kind", ["image-folder", "npz", "user"])
@pytest.mark.parametrize(
    ("then", "now"), [((0.2, 0.2), (0.1, 0.2)), ((0.0, 0.1), (0.1, 0.1)), ((0.3, 0.0), (0.1, 0.0))]
)
def test_other_fractions_are_named_as_the_cause(
    kind: str, then: tuple[float, float], now: tuple[float, float], tmp_path: Path
) -> None:
    name, root = kind, tmp_path
    if kind == "image-folder":
        folders(tmp_path, train=20)
    elif kind == "npz":
        root = tmp_path / "a.npz"
        images = np.random.default_rng(0).integers(0, 256, (59, 4, 4), np.uint8)
        np.savez(root, images=images, labels=np.arange(59) % 3)
    else:
        folders(tmp_path / "set", train=20)
        name, root = f"{tmp_path}/data.py:make", tmp_path / "set"
        (tmp_path / "data.py").write_text(
            "from torchvision.datasets import ImageFolder\n"
            "def make(split, root):\n    return ImageFolder(root + '/train') if split == 'train' else None\n"
        )

    def split(fractions: tuple[float, float]) -> Samples:
        validation, test = fractions
        return load_split(name, "train", root=root, validation_fraction=validation, test_fraction=test)

    cached, samples = split(then), split(now)
    with pytest.raises(MismatchError) as caught:
        check_same_samples(samples, samples.keys(), cached.keys(), cached.labels)
    assert f"of 59 images, about {1 - len(cached) / 59:.3g} were held out when it was made" in caught.value.what
    assert f"here validation_fraction {now[0]:g} and test_fraction {now[1]:g}" in caught.value.what
    assert "--set dataset.validation_fraction=" in caught.value.fix


def test_other_images_are_not_explained_by_fractions(tmp_path: Path) -> None:
    folders(tmp_path, train=20)
    samples = load_split("image-folder", "train", root=tmp_path)
    with pytest.raises(MismatchError) as caught:
        check_same_samples(samples, samples.keys(), np.arange(30, dtype=np.uint64), np.zeros(30, np.int32))
    assert "held out" not in caught.value.what
    assert "--allow-missing" in caught.value.fix


def test_a_replaced_image_is_named_with_its_file(tmp_path: Path) -> None:
    folders(tmp_path, train=4)
    spec = DatasetSpec(name="image-folder", root=str(tmp_path), validation_fraction=0.0, test_fraction=0.0)
    before = load_split(spec, "train")
    keys = before.keys()
    path = tmp_path / "train" / "bee" / "2.png"
    picture(path, 12345)
    after = load_split(spec, "train")
    with pytest.raises(MismatchError, match=f"1 of 11 samples .* first sample 6 .*{path}") as caught:
        check_same_samples(after, after.keys(), keys, before.labels)
    assert "--align, or --allow-missing" in caught.value.fix


@pytest.mark.parametrize(
    ("typed", "meant"), [("cifar01", "cifar10"), ("image_folder", "image-folder"), ("digit", "digits")]
)
def test_a_misspelled_name_is_answered_with_the_closest(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {meant}\?"):
        load_split(typed, "train")


def test_content_keys_are_reported_only_if_they_take_long() -> None:
    told: list[str] = []

    class Listening(Silent):
        @contextmanager
        def task(self, what: str, total: int, unit: str) -> Iterator[Any]:
            told.append(f"{what}: {total}")
            with super().task(what, total, unit) as task:
                yield task

    load_split(DIGITS, "test").keys(Listening())
    assert told == []
    for seconds in (0.0, 60.0):
        with delayed_task(Listening(), "work", 3, "images", seconds) as task:
            time.sleep(0.01)
            task.advance(2)
            task.advance(1)
    assert told == ["work: 3"]
