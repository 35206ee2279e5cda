"""Data sets whose samples are trained on in groups: npz files, data sets of the user, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from kdcache.config.schema import DatasetSpec
from kdcache.data.alignment import Alignment, apply_alignment
from kdcache.data.datasets import load_split
from kdcache.data.sample_groups import groups_among
from kdcache.data.samples import wrap
from kdcache.errors import KdcacheError, MismatchError, UsageError

N = 6
X = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2)
NAMES = np.array([f"q{i}\tp{i}" for i in range(N)])


def spec_of(path: Path, fraction: float = 0.0, **arrays: Any) -> DatasetSpec:
    np.savez(path, x=X, **arrays)
    return DatasetSpec(name="npz", root=str(path), validation_fraction=fraction, test_fraction=0.0)


def test_groups_and_names_of_an_npz_file(tmp_path: Path) -> None:
    groups = np.array([[0, 5], [3, 2], [0, 1]], np.uint16)
    samples = load_split(spec_of(tmp_path / "pairs.npz", groups=groups, sample_names=NAMES), "train")
    assert samples.groups is not None and samples.groups.dtype == np.int64
    assert samples.groups.tolist() == groups.tolist()
    assert (samples.group_size, samples.per_epoch, len(samples)) == (2, 6, N)
    assert samples.sample_names is not None and samples.sample_names.tolist() == NAMES.tolist()


def test_images_may_be_grouped_too(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=np.zeros((N, 4, 4), np.uint8), labels=np.arange(N) % 2, groups=[[0, 1, 2], [3, 4, 5]])
    assert load_split("npz", "train", root=path, validation_fraction=0, test_fraction=0).group_size == 3


def test_samples_that_are_held_out_take_their_groups_with_them(tmp_path: Path) -> None:
    groups = np.array([[i, j] for i in range(N) for j in range(N) if i != j])
    spec = spec_of(tmp_path / "pairs.npz", 0.34, groups=groups, sample_names=NAMES)
    samples, held_out = load_split(spec, "train"), load_split(spec, "validation")
    assert len(samples) == 4 and samples.groups is not None
    assert sorted(map(tuple, samples.groups.tolist())) == [(i, j) for i in range(4) for j in range(4) if i != j]
    assert samples.notes == (
        f"18 of 30 groups of {tmp_path / 'pairs.npz'} have samples that are not in this split, and are left out",
    )
    assert held_out.groups is None and held_out.sample_names is not None
    assert samples.sample_names is not None
    assert {*samples.sample_names.tolist(), *held_out.sample_names.tolist()} == {*NAMES.tolist()}


def test_no_group_left_is_an_error(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "pairs.npz", 0.5, groups=[[0, 1, 2, 3, 4, 5]])
    with pytest.raises(MismatchError, match=r"1 of 1 groups .* not in this split") as raised:
        load_split(spec, "train")
    assert "dataset.validation_fraction and dataset.test_fraction to 0" in raised.value.fix


WRONG: list[tuple[Any, type[KdcacheError], str]] = [
    ([[0, 6]], MismatchError, r"group 0 of .* is of the samples \[0, 6\], and there are 6 samples"),
    ([[0, 1], [2, -1]], MismatchError, r"group 1 of .* is of the samples \[2, -1\]"),
    ([[0, 1], [3, 3]], MismatchError, r"group 1 of .* has a sample twice: \[3, 3\]"),
    ([0, 1], UsageError, r"has groups \[2\] int64"),
    ([[0], [1]], UsageError, r"has groups \[2, 1\]"),
    (np.zeros((0, 2), np.int64), UsageError, r"has groups \[0, 2\]"),
    ([[0.0, 1.0]], UsageError, "float64"),
]


@pytest.mark.parametrize(("groups", "error", "words"), WRONG)
def test_wrong_groups(groups: Any, error: type[KdcacheError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        load_split(spec_of(tmp_path / "pairs.npz", groups=np.asarray(groups)), "train")
    dataset = TensorDataset(torch.from_numpy(X))
    dataset.groups = groups  # type: ignore[attr-defined]
    with pytest.raises(error, match=words):
        wrap(dataset, 0)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (NAMES[:5], UsageError, r"6 samples and sample_names \[5\]"),
        (np.arange(N), UsageError, r"sample_names \[6\] int64"),
        (np.array(["a", "b", "a", "c", "d", "e"]), MismatchError, "have the name 'a'"),
    ],
)
def test_wrong_names(names: npt.NDArray[Any], error: type[KdcacheError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        load_split(spec_of(tmp_path / "pairs.npz", sample_names=names), "train")


_CODE = """
import torch
from torch.utils.data import TensorDataset

def pairs(split, root=None):
    dataset = TensorDataset(torch.arange(12.0).reshape(6, 2))
    dataset.groups = [[0, 1], [2, 3], [4, 5], [0, 5], [1, 4]]
    dataset.sample_names = [f"pair {i}" for i in range(6)]
    return dataset if split == "train" else None
"""


@pytest.mark.parametrize("fraction", [0.0, 0.17])
def test_groups_of_a_data_set_of_the_user(fraction: float, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(_CODE)
    name = f"{tmp_path / 'mine.py'}:pairs"
    samples = load_split(DatasetSpec(name=name, validation_fraction=fraction, test_fraction=0.0), "train")
    assert samples.groups is not None and samples.sample_names is not None
    named = [[str(samples.sample_names[member]) for member in group] for group in samples.groups]
    every = [[0, 1], [2, 3], [4, 5], [0, 5], [1, 4]]
    held_out = {f"pair {i}" for i in range(6)} - {*samples.sample_names.tolist()}
    assert len(held_out) == round(6 * fraction)
    wanted = [[f"pair {member}" for member in group] for group in every]
    assert named == [group for group in wanted if not held_out.intersection(group)]


@given(st.permutations(range(N)), st.integers(2, N))
def test_groups_follow_their_samples(order: list[int], kept: int) -> None:
    groups = np.array([[i, j, k] for i in range(N) for j in range(N) for k in range(N) if len({i, j, k}) == 3])
    positions = np.array(order[:kept])
    wanted = [group for group in groups.tolist() if {*group} <= {*positions.tolist()}]
    if not wanted:
        with pytest.raises(MismatchError):
            groups_among(groups, positions, N, "data")
        return
    found = groups_among(groups, positions, N, "data").groups
    assert found is not None and positions[found].tolist() == wanted


def test_aligned_samples_keep_their_groups(tmp_path: Path) -> None:
    """A cache has the samples in another order, without sample 4."""
    samples = load_split(spec_of(tmp_path / "pairs.npz", groups=[[0, 5], [4, 2], [3, 1]], sample_names=NAMES), "train")
    positions = np.array([5, 3, 0, 1, 2])
    aligned = apply_alignment(samples, Alignment(np.arange(5), positions, np.array([5]), np.array([4])))
    assert aligned.groups is not None and aligned.sample_names is not None
    names = aligned.sample_names
    assert [[names[i] for i in group] for group in aligned.groups] == [[NAMES[0], NAMES[5]], [NAMES[3], NAMES[1]]]
    assert "1 of 3 groups" in aligned.notes[0]
