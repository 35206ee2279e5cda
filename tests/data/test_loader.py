"""Loading processes: how many there are by default, and that they stay."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers.processes import PATIENCE
from helpers.tiny import FLIP, tiny_samples
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import FakeData

from kdcache.config.transform import Transform
from kdcache.data.images import FileImages, Images, ItemImages
from kdcache.data.loader import Loader, automatic_workers, batches
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.models.evaluate import evaluate

TO_FLOAT: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]


def samples_of(images: Images) -> Samples:
    return Samples("noise", "train", images, np.arange(len(images), dtype=np.int32) % 3, ("a", "b", "c"), [])


class ProcessIds(Dataset[Any]):
    """Images of one pixel, the number of the process that loads them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 1, 1), float(os.getpid())), 0


def loaded_by(loader: Loader, cuts: Sequence[Sequence[int]], view: int) -> set[int]:
    return {int(value) for batch in loader.batches(cuts, view) for value in batch.images.flatten()}


def test_processes_stay_from_one_pass_to_the_next() -> None:
    loader = Loader(View(samples_of(ItemImages(ProcessIds(), 12)), FLIP), 2)
    cuts = [[0, 1], [2, 3], [4, 5], [6, 7]]
    first = loaded_by(loader, cuts, 0)
    assert len(first) == 2
    assert os.getpid() not in first
    assert loaded_by(loader, cuts, 1) == first
    assert loaded_by(loader, [[8]], 2) <= first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_left_does_not_disturb_the_next(workers: int) -> None:
    samples = tiny_samples(30)
    loader = Loader(View(samples, FLIP, seed=4), workers)
    left = loader.batches([[0, 1], [2], [3], [4], [5], [6]], 0)
    assert next(left).ids.tolist() == [0, 1]
    for view, cuts in ((3, [[7, 1], [2]]), (1, [[29], [5, 6]])):
        found = list(loader.batches(cuts, view))
        assert [batch.ids.tolist() for batch in found] == cuts
        for batch, cut in zip(found, cuts, strict=True):
            assert torch.equal(batch.images, View(samples, FLIP, seed=4).batch(cut, view).images)


@pytest.fixture
def files(tmp_path: Path) -> FileImages:
    paths = [str(tmp_path / f"{index}.png") for index in range(7)]
    for index, path in enumerate(paths):
        Image.fromarray(np.full((8, 9, 3), 20 * index, np.uint8)).save(path)
    return FileImages(paths)


def test_automatic_workers(files: FileImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.data.loader.available_cores", lambda: 6)
    in_files = View(samples_of(files), TO_FLOAT)
    assert automatic_workers(in_files) == 6
    fake = FakeData(4, (3, 8, 8), 3)
    assert automatic_workers(View(samples_of(ItemImages(fake, 4)), TO_FLOAT)) == 6
    assert automatic_workers(View(samples_of(ItemImages(Subset(fake, [0, 2]), 2)), TO_FLOAT)) == 6
    # In memory and at once: no process. One at a time: processes.
    assert automatic_workers(View(tiny_samples(), FLIP)) == 0
    assert automatic_workers(View(tiny_samples(), [{"RandomErasing": {}}])) == 6
    # What an object of the user holds may not survive a fork.
    assert automatic_workers(View(samples_of(ItemImages(ProcessIds(), 12)), FLIP)) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert automatic_workers(in_files) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert automatic_workers(in_files) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr("kdcache.data.loader.available_cores", lambda: 128)
    assert automatic_workers(in_files) == 8


def test_the_cores_are_those_that_the_process_may_use(files: FileImages) -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not bind processes to cores")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert automatic_workers(View(samples_of(files), TO_FLOAT)) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_automatic_workers_load_the_same_batches(files: FileImages) -> None:
    data = View(samples_of(files), [{"RandomHorizontalFlip": {}}, *TO_FLOAT], seed=2)
    cuts = [[3, 1], [6]]
    for found, cut in zip(batches(data, cuts, "auto", view=5), cuts, strict=True):
        assert torch.equal(found.images, data.batch(cut, 5).images)


class Mean(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))[:, None] * torch.tensor([1.0, 2.0, -1.0])


def test_scores_do_not_depend_on_the_number_of_processes(files: FileImages) -> None:
    samples = samples_of(files)
    scores = [evaluate(Mean(), samples, transform=TO_FLOAT, batch_size=2, num_workers=n) for n in (0, 2)]
    pixels = torch.stack([torch.full((3, 8, 9), 20 * index / 255) for index in range(7)])
    logits, labels = Mean()(pixels), torch.arange(7) % 3
    assert scores[0] == scores[1]
    assert scores[0].accuracy == (logits.argmax(dim=1) == labels).double().mean().item()
    assert scores[0].loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def _load_as_a_daemon(files: FileImages, num_workers: int | Literal["auto"], said: Any) -> None:
    labels = np.zeros(len(files), np.int32)
    view = View(Samples("s", "train", files, labels, ("a", "b"), []), TO_FLOAT)
    try:
        said.send(sum(len(batch.ids) for batch in Loader(view, num_workers).batches([[0, 1], [2]])))
    except UsageError as error:
        said.send(error.what)


@pytest.mark.parametrize(("num_workers", "expected"), [("auto", 3), (0, 3), (2, "num_workers is 2, and this is a dae")])
def test_a_daemonic_process_loads_by_itself(
    num_workers: int | Literal["auto"], expected: int | str, files: FileImages
) -> None:
    """As those of a multiprocessing.Pool are, which cannot start others."""
    here, there = multiprocessing.Pipe()
    arguments = (files, num_workers, there)
    process = multiprocessing.get_context("fork").Process(target=_load_as_a_daemon, args=arguments, daemon=True)
    process.start()
    assert here.poll(PATIENCE)
    said = here.recv()
    process.join()
    assert str(said).startswith(str(expected)), said
