"""The privacy of samples: from npz files and data sets of the user, wherever samples are selected or reordered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from kdcache.config.schema import DatasetSpec
from kdcache.data.alignment import Alignment, apply_alignment
from kdcache.data.datasets import load_split
from kdcache.data.samples import wrap
from kdcache.errors import KdcacheError, MismatchError, UsageError

N = 8
X = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2)
PRIVACY = np.arange(N) / 8
"""The privacy of a sample tells which one it is."""


def test_of_npz_files_of_tensors_and_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, privacy=PRIVACY.astype(np.float32))
    np.savez(
        tmp_path / "i.npz", images=np.zeros((N, 4, 4), np.uint8), labels=np.arange(N) % 2, privacy=np.arange(N) % 2 == 0
    )
    for name, expected in (("x", PRIVACY), ("i", (np.arange(N) + 1) % 2)):
        samples = load_split("npz", "train", root=tmp_path / f"{name}.npz", validation_fraction=0, test_fraction=0)
        assert samples.privacy is not None and samples.privacy.dtype == np.float64
        assert samples.privacy.tolist() == expected.tolist()


def test_samples_that_are_held_out_keep_theirs(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, privacy=PRIVACY)
    spec = DatasetSpec(name="npz", root=str(tmp_path / "x.npz"), validation_fraction=0.25, test_fraction=0.0)
    for split in ("train", "validation"):
        samples = load_split(spec, split)
        rows = [samples.images.picture(index) for index in range(len(samples))]
        assert samples.privacy is not None
        assert samples.privacy.tolist() == [float(torch.as_tensor(row)[0]) / 16 for row in rows]


class Private(TensorDataset):
    """A data set of the user with the attribute."""

    privacy: ClassVar = [0.0, 1.0, 0.5]


def test_of_a_data_set_of_the_user_and_in_another_order() -> None:
    samples = wrap(Private(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])), 2)
    assert samples.privacy is not None and samples.privacy.tolist() == [0, 1, 0.5]
    none = np.empty(0, np.int64)
    aligned = apply_alignment(samples, Alignment(np.array([0, 2]), np.array([2, 0]), none, none))
    assert aligned.privacy is not None and aligned.privacy.tolist() == [0.5, 0]
    assert wrap(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 0])), 2).privacy is None


def test_of_a_function_of_the_user_with_samples_held_out(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def make(split, root=None):\n"
        "    if split != 'train':\n        return None\n"
        "    data = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10) % 2)\n"
        "    data.privacy = torch.arange(10) / 16\n"
        "    return data\n"
    )
    name = f"{tmp_path / 'data.py'}:make"
    samples = load_split(name, "train", validation_fraction=0.3, test_fraction=0)
    assert len(samples) == 7 and samples.privacy is not None
    assert samples.privacy.tolist() == [float(torch.as_tensor(samples.images.picture(i))[0]) / 32 for i in range(7)]


@pytest.mark.parametrize(
    ("privacy", "error", "words"),
    [
        (PRIVACY[:-1], UsageError, r"8 samples and privacy \[7\]"),
        (PRIVACY[:, None], UsageError, r"privacy \[8, 1\]"),
        (np.float64(0.5), UsageError, r"privacy \[\]"),
        (np.array(["a"] * N), UsageError, "<U1"),
        (PRIVACY.astype(complex), UsageError, "complex"),
        (np.where(np.arange(N) == 3, -0.1, PRIVACY), MismatchError, "sample 3 .* -0.1"),
        (np.where(np.arange(N) == 5, 1.5, PRIVACY), MismatchError, "sample 5 .* 1.5"),
        (np.where(np.arange(N) == 2, np.nan, PRIVACY), MismatchError, "sample 2 .* nan"),
        (np.arange(N), MismatchError, "sample 2 .*6 such"),
    ],
)
def test_what_is_not_privacy_is_refused(privacy: Any, error: type[KdcacheError], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X, privacy=privacy)
    with pytest.raises(error, match=words):
        load_split("npz", "train", root=tmp_path / "x.npz")
