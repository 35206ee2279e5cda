"""Data sets of tensors that are not images: features, token ids, frames; with labels and without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdcache
from kdcache.cache.format.fingerprints import inputs_of
from kdcache.config.schema import DatasetSpec
from kdcache.config.transform import Transform
from kdcache.data.alignment import match_samples
from kdcache.data.datasets import load_split
from kdcache.data.replay import replay
from kdcache.data.samples import Samples, as_samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.progress import Silent

N, C = 40, 3


class TokenTeacher(nn.Module):
    """Mean of the embeddings of token ids [B, L], then classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.classifier = nn.Linear(8, C)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.embedding(ids).mean(dim=1))
        return logits


def _values(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "tokens":
        return torch.randint(50, (N, 7), generator=generator)
    return torch.randn((N, 6) if kind == "features" else (N, 5, 4), generator=generator)


def _teacher(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "tokens":
        return TokenTeacher()
    return nn.Sequential(nn.Flatten(), nn.Linear(6 if kind == "features" else 20, C))


KINDS = pytest.mark.parametrize("kind", ["features", "tokens", "frames"])


@KINDS
@pytest.mark.parametrize("labeled", [True, False])
def test_cache_of_tensors(kind: str, labeled: bool, tmp_path: Path) -> None:
    values, labels = _values(kind), torch.arange(N) % C
    dataset = TensorDataset(values, labels) if labeled else TensorDataset(values)
    teacher = _teacher(kind)
    cache = kdcache.dump_teacher(teacher, dataset, tmp_path / "t.kdcache", batch_size=8)
    with torch.no_grad():
        expected = teacher(values)
    torch.testing.assert_close(cache.teacher()(torch.arange(N)), expected, atol=5e-3, rtol=5e-3)
    assert cache.labels.tolist() == (labels.tolist() if labeled else [-1] * N)
    assert (cache.manifest.summary.teacher_accuracy is None) != labeled
    batch = next(iter(DataLoader(kdcache.CachedDataset(dataset, cache), batch_size=N)))
    assert batch[0].equal(values) and batch[1].tolist() == cache.labels.tolist()
    assert replay(cache, as_samples(dataset) if labeled else _of(cache, dataset)).checked > 0


def _of(cache: kdcache.Cache, dataset: TensorDataset) -> Samples:
    return kdcache.wrap(dataset, cache.num_classes)


@KINDS
def test_resumed_dump_is_the_same_cache(kind: str, tmp_path: Path) -> None:
    values = TensorDataset(_values(kind))
    digests = set()
    for name in ("a", "b"):
        cache = kdcache.dump_teacher(_teacher(kind), values, tmp_path / f"{name}.kdcache", batch_size=8)
        digests.add(cache.manifest.digest)
    again = kdcache.dump_teacher(_teacher(kind), values, tmp_path / "a.kdcache", batch_size=8)
    assert digests == {again.manifest.digest}


@KINDS
def test_samples_are_matched_by_content(kind: str, tmp_path: Path) -> None:
    values = _values(kind)
    cache = kdcache.dump_teacher(_teacher(kind), TensorDataset(values), tmp_path / "t.kdcache", batch_size=8)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))[: N - 4]
    matched = match_samples(cache, _of(cache, TensorDataset(values[order])), Silent())
    assert matched.ids.tolist() == sorted(order.tolist())
    assert matched.view.batch(range(N - 4), 0).images.equal(values[sorted(order.tolist())])


@KINDS
def test_another_value_is_another_sample(kind: str, tmp_path: Path) -> None:
    values = _values(kind)
    cache = kdcache.dump_teacher(_teacher(kind), TensorDataset(values), tmp_path / "t.kdcache", batch_size=8)
    changed = values.clone()
    changed[5].view(-1)[1] += 1
    with pytest.raises(MismatchError, match="first sample 5"):
        kdcache.CachedDataset(TensorDataset(changed), cache)


def test_other_tokens_of_a_step_are_found_by_a_replay(tmp_path: Path) -> None:
    """Exchanged tokens are never taken for rounding: the step of a user that exchanges some is found."""
    step = tmp_path / "steps.py"
    step.write_text("def same(x):\n    return x\nsame.deterministic = True\n")
    transform: Transform = [{f"{step}:same": {}}]
    values = _values("tokens")
    values[:, 0], values[:, 1] = 3, 4
    cache = kdcache.dump_teacher(
        _teacher("tokens"), TensorDataset(values), tmp_path / "t.kdcache", batch_size=8, transform=transform
    )
    kdcache.CachedDataset(TensorDataset(values), cache, transform=transform)
    step.write_text("def same(x):\n    return x[[1, 0, *range(2, len(x))]]\nsame.deterministic = True\n")
    with pytest.raises(MismatchError, match=r"view 0 of sample \d+ is not what the teacher"):
        kdcache.CachedDataset(TensorDataset(values), cache, transform=transform)


@given(n=st.integers(1, 40), dims=st.integers(1, 3))
def test_sketches_of_tensors_follow_their_definition(n: int, dims: int) -> None:
    values = torch.randn(3, *([1] * (dims - 1)), n, generator=torch.Generator().manual_seed(n))
    if values.ndim == 4:
        return
    sketches = inputs_of(values).sketches
    flat = values.reshape(3, -1).double().numpy() * (1 + np.arange(n) % 7)
    expected = [
        [row[p * n // 8 : -(-(p + 1) * n // 8)].mean() for p in range(8)] for row in flat
    ]  # docs/FORMAT.md, section 6.3
    np.testing.assert_allclose(sketches, np.array(expected, np.float32), rtol=1e-6, atol=1e-7)


def test_sketches_of_integers_are_hashes() -> None:
    tokens = torch.tensor([[1, 2, 3], [1, 3, 2]])
    first, second = inputs_of(tokens).sketches
    assert np.abs(first - second).max() > 1e-3
    assert inputs_of(tokens.int().long()).fingerprints.tolist() == inputs_of(tokens).fingerprints.tolist()
    assert len(inputs_of(tokens[:0]).fingerprints) == len(inputs_of(torch.empty(0, 4)).sketches) == 0


def test_npz_of_tensors(tmp_path: Path) -> None:
    x, y = _values("features").numpy(), np.arange(N) % C
    np.savez(tmp_path / "d.npz", x=x, y=y)
    np.savez(tmp_path / "unlabeled.npz", x=_values("tokens").numpy())
    train, test = (load_split(DatasetSpec(name="npz", root=str(tmp_path / "d.npz")), s) for s in ("train", "test"))
    assert (len(train), len(test), train.num_classes, train.images.shape()) == (32, 4, C, (6,))
    read = View(train, train.transform)[0].images[0].numpy()
    assert any(np.array_equal(read, row) for row in x)
    unlabeled = load_split("npz", "train", root=tmp_path / "unlabeled.npz")
    assert (unlabeled.class_names, set(unlabeled.labels.tolist())) == ((), {-1})
    assert View(unlabeled, []).batch([0, 1], 0).images.dtype == torch.int64


@pytest.mark.parametrize(
    ("arrays", "error", "what"),
    [
        ({"x": np.zeros(3)}, UsageError, r"x \[3\] float64"),
        ({"x": np.zeros((3, 0))}, UsageError, r"x \[3, 0\]"),
        ({"x": np.array([["a"], ["b"]])}, UsageError, r"x \[2, 1\] <U1"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8)}, UsageError, "are they images"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, UsageError, r"y \[3\] float64"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, MismatchError, "3 samples x and 2 labels y"),
        ({"x": np.zeros((3, 2)), "y": np.array([0, 1, -2])}, MismatchError, "sample 2 has label -2"),
    ],
)
def test_wrong_npz_files(tmp_path: Path, arrays: dict[str, Any], error: type[Exception], what: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(error, match=what):
        load_split("npz", "train", root=tmp_path / "d.npz")


def test_steps_for_images_are_refused(tmp_path: Path) -> None:
    x = _values("features")
    steps = [{"Normalize": {"mean": [0.5], "std": [0.5]}}]
    np.savez(tmp_path / "d.npz", x=x.numpy())
    for samples in (kdcache.wrap(TensorDataset(x), 1), load_split("npz", "train", root=tmp_path / "d.npz")):
        with pytest.raises(UsageError, match=r"tensors \[6\], and the step Normalize"):
            View(samples, steps).batch([0, 1], 0)


def test_tensors_of_several_shapes_are_refused() -> None:
    samples = kdcache.wrap([(torch.zeros(3), 0), (torch.zeros(4), 0)], 1)  # type: ignore[arg-type]  # a list will do
    with pytest.raises(UsageError, match=r"different shapes: \[3\] and \[4\]"):
        View(samples, []).batch([0, 1], 0)


def test_items_without_labels() -> None:
    x = torch.zeros(3)
    samples = as_samples([x, (x, None), (x,), (x, -1), [x, 2], x.numpy()])  # type: ignore[arg-type]  # as above
    assert samples.labels.tolist() == [-1, -1, -1, -1, 2, -1]
