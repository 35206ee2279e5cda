"""Canary exposure: the formula by hand, and a teacher that has learned its canaries by heart, from data to report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from hypothesis import given
from hypothesis import strategies as st

from kdcache import open_cache
from kdcache.config.loader import load_pipeline
from kdcache.errors import MismatchError, UsageError
from kdcache.evaluation.exposure import Canaries, chance, exposure, measure_exposure, named_canaries
from kdcache.evaluation.networks import from_pipeline

LOSSES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40)


# The formula.


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], 2.0),  # first of four
        ([0.2, 0.1, 0.3, 0.4], 1.0),  # second
        ([0.9, 0.1, 0.3, 0.4], 0.0),  # last
        ([0.5, 0.5, 0.5, 0.5, 0.5], math.log2(5 / 3)),  # the middle one of five
        ([0.1, 0.1, 0.3, 0.4], math.log2(4 / 1.5)),
        ([0.5], 0.0),
        ([-math.inf, 0.0], 1.0),
        ([math.inf, 0.0], 0.0),
    ],
)
def test_by_hand(losses: list[float], expected: float) -> None:
    assert exposure(torch.tensor(losses), 0) == pytest.approx(expected)


@given(LOSSES, st.integers(0, 39))
def test_it_is_that_of_the_mean_rank_of_a_sort(losses: list[float], canary: int) -> None:
    canary %= len(losses)
    ranks = [rank for rank, loss in enumerate(sorted(losses), 1) if loss == losses[canary]]
    expected = math.log2(len(losses)) - math.log2(sum(ranks) / len(ranks))
    assert exposure(torch.tensor(losses), canary) == pytest.approx(expected)


@given(LOSSES, st.integers(0, 39), st.randoms())
def test_it_depends_on_the_order_of_the_losses_alone(losses: list[float], canary: int, random: Any) -> None:
    canary %= len(losses)
    found = exposure(torch.tensor(losses), canary)
    assert -1e-9 <= found <= math.log2(len(losses)) + 1e-9
    assert exposure(torch.tensor(losses).exp(), canary) == found
    order = random.sample(range(len(losses)), len(losses))
    assert exposure(torch.tensor([losses[index] for index in order]), order.index(canary)) == found


@given(LOSSES, st.integers(0, 39), st.floats(0.5, 20))
def test_a_smaller_loss_is_not_less_exposed(losses: list[float], canary: int, less: float) -> None:
    canary %= len(losses)
    lower = torch.tensor(losses)
    lower[canary] -= less
    assert exposure(lower, canary) >= exposure(torch.tensor(losses), canary)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_by_chance_is_the_mean_over_all_ranks(count: int) -> None:
    losses = torch.arange(count)
    mean = sum(exposure(losses, index) for index in range(count)) / count
    assert chance(count) == pytest.approx(mean)
    assert count < 1000 or chance(10**9) == pytest.approx(math.log2(math.e))


def test_canaries_are_not_compared_with_one_another() -> None:
    canaries = Canaries(np.array([7, 8]), np.array([1, 2, 3]))
    assert canaries.ids.tolist() == [7, 8, 1, 2, 3]
    assert canaries.exposures(torch.tensor([0.2, 0.1, 0.3, 0.15, 0.4])) == [1.0, 2.0]


# From data to report.

DATA = """
import torch
from torch.utils.data import TensorDataset

def make(split, references=True):
    if split == "validation":  # by which an epoch would be selected that does not know the canaries yet
        return None
    random = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    labels = torch.arange(100) % 4
    images = torch.rand(100, 1, 6, 6, generator=random)
    images[torch.arange(100), 0, labels] += 1  # a bright line; the other 12 classes are those of canaries
    if split == "train":
        # Four canaries and 40 references: noise, with random labels.
        count = 44 if references else 4
        noise = torch.Generator().manual_seed(5)
        more, chosen = 2 * torch.rand(44, 1, 6, 6, generator=noise), torch.randint(16, (44,), generator=noise)
        images, labels = torch.cat([images, more[:count]]), torch.cat([labels, chosen[:count]])
    data = TensorDataset(images, labels)
    data.classes = list("abcdefghijklmnop")
    data.privacy = (torch.arange(len(labels)) >= 100).float()
    return data
"""
CANARIES, REFERENCES = np.arange(100, 104), np.arange(104, 144)
NAMED = Canaries(CANARIES, REFERENCES)
OPTIONS = ("--canaries", "100-103", "--references", "104-143")


class Made(NamedTuple):
    pipeline: Path
    cache: Path
    student: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A teacher that was trained until it knows its canaries, its cache on these and references, and a student."""
    folder = tmp_path_factory.mktemp("canaries")
    (folder / "data.py").write_text(DATA)
    for name, references in (("with", "true"), ("without", "false")):
        (folder / f"{name}.yaml").write_text(
            f"dataset: {{name: '{folder / 'data.py'}:make', args: {{references: {references}}}, "
            "validation_fraction: 0}\n"
            "teacher:\n  model: small:mlp\n"
            f"  weights: {folder / 't' / 'model.safetensors'}\n"
            "  train: {epochs: 150, lr: 0.01, optimizer: adamw}\n"
            "student: {model: 'small:mlp', train: {epochs: 3}}\n"
        )
    ok("train-teacher", folder / "without.yaml", "-o", folder / "t")
    made = Made(folder / "with.yaml", folder / "c.kdcache", folder / "s")
    ok("dump-teacher", made.pipeline, "-o", made.cache)
    ok("train-student", made.pipeline, "--cache", made.cache, "--loss", "kd", "-o", made.student)
    return made


def by_rows(cache: Path) -> list[float]:
    """The exposure of the canaries in a cache, from its rows."""
    opened = open_cache(cache)
    ids = np.concatenate([CANARIES, REFERENCES])
    probabilities = opened.teacher()(torch.from_numpy(ids)).double().softmax(1).numpy()
    losses = -np.log(probabilities[np.arange(44), opened.labels[ids]])
    ranks = [1 + int((losses[4:] < loss).sum()) for loss in losses[:4]]
    return [math.log2(41 / rank) for rank in ranks]


def test_of_teacher_student_and_cache(made: Made) -> None:
    arguments = ("--pipeline", made.pipeline, "--network", "teacher", made.student, "--cache", made.cache)
    found = json.loads(ok("evaluate", *arguments, *OPTIONS, "--json"))["exposures"]
    assert found["candidates"] == 41
    teacher, student, cache = found["measured"]
    assert (student["name"], cache["name"]) == (str(made.student), str(made.cache))
    assert cache["canaries"] == pytest.approx(by_rows(made.cache))
    # The teacher knows them, and its cache says what it says, up to its float16 rows.
    assert teacher["mean"] > 3 > found["by_chance"] + 1
    assert cache["mean"] == pytest.approx(teacher["mean"], abs=0.5)
    assert all(0 <= bits <= math.log2(41) for one in found["measured"] for bits in one["canaries"])
    shown = ok("evaluate", *arguments, *OPTIONS)
    assert "Canary exposure, 4 canaries" in shown and "among R = 41 candidates: at most 5.36" in shown


def test_noise_lowers_the_exposure_of_a_cache(made: Made, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(bytes(range(32)))
    noise = f"cache.noise={{sigma: 3, temperature: 8, key: {tmp_path / 'k'}}}"
    ok("dump-teacher", made.pipeline, "-o", tmp_path / "n.kdcache", "--set", noise)
    networks = [from_pipeline(load_pipeline(made.pipeline), "teacher", None)]
    teacher, noisy = measure_exposure(networks, NAMED, open_cache(tmp_path / "n.kdcache")).measured
    assert noisy.bits == pytest.approx(by_rows(tmp_path / "n.kdcache"))
    # The noise is of the folder's name, too: of 4 random ranks among 41, a mean above 4 bits is 3 cases in 10,000.
    assert teacher.mean > 4 > noisy.mean


def test_a_report_has_them(made: Made, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    found = json.loads(ok("report", made.student, "--cache", made.cache, *OPTIONS, "-o", page, "--json"))["exposures"]
    assert [one["name"] for one in found["measured"]] == [str(made.student), str(made.cache)]
    assert "Canary exposure" in page.read_text(encoding="utf-8")
    assert f"{found['measured'][1]['mean']:.2f}" in page.read_text(encoding="utf-8")
    ok("report", made.student, "-o", tmp_path / "without.html")
    assert "Canary exposure" not in (tmp_path / "without.html").read_text(encoding="utf-8")


def test_ids_are_those_of_the_cache_where_the_data_set_has_another_order(made: Made, tmp_path: Path) -> None:
    text = DATA.replace(
        "    data = TensorDataset", "    images, labels = images.flip(0), labels.flip(0)\n    data = TensorDataset"
    )
    (tmp_path / "data.py").write_text(text)
    pipeline = load_pipeline(made.pipeline, [f"dataset.name={tmp_path / 'data.py'}:make"])
    canaries = NAMED
    cache = open_cache(made.cache)
    here, there = (
        measure_exposure([from_pipeline(given, "teacher", None)], canaries, cache).measured
        for given in (load_pipeline(made.pipeline), pipeline)
    )
    assert [one.bits for one in here] == [one.bits for one in there]


@pytest.mark.parametrize(
    ("canaries", "references", "words"),
    [
        ([], [1], "no canaries"),
        ([1], [], "no references"),
        ([1, 2], [2, 3], "sample 2 is named twice"),
        ([1, 1], [3], "sample 1 is named twice"),
        ([1], [3, 4, 3], "sample 3 is named twice"),
    ],
)
def test_names_that_are_refused(canaries: list[int], references: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        named_canaries(np.array(canaries, np.int64), np.array(references, np.int64))


@pytest.mark.parametrize("wrong", [144, 2**62, -1])
def test_ids_that_are_not_there(wrong: int, made: Made) -> None:
    networks = [from_pipeline(load_pipeline(made.pipeline), "teacher", None)]
    for cache in (None, open_cache(made.cache)):
        for named in (Canaries(np.array([wrong]), REFERENCES), Canaries(CANARIES, np.array([1, wrong]))):
            with pytest.raises(MismatchError, match=f"{wrong} is not the id .* 144 samples"):
                measure_exposure(networks, named, cache)


def test_samples_without_labels_or_that_are_missing(made: Made, tmp_path: Path) -> None:
    changes = {"unlabeled": "labels[120] = -1", "missing": "images, labels = images[:120], labels[:120]"}
    for name, change in changes.items():
        changed = f"    if split == 'train':\n        {change}\n    data = TensorDataset"
        (tmp_path / f"{name}.py").write_text(DATA.replace("    data = TensorDataset", changed))
    for name, cache, words in (
        ("unlabeled", None, "sample 120 has no label"),
        ("missing", open_cache(made.cache), "sample 120 of .* is not in"),
        ("missing", None, "120 is not the id"),
    ):
        pipeline = load_pipeline(made.pipeline, [f"dataset.name={tmp_path / name}.py:make"])
        with pytest.raises(MismatchError, match=words):
            measure_exposure([from_pipeline(pipeline, "teacher", None)], NAMED, cache)


def test_ids_on_the_command_line(made: Made, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("\n".join(map(str, REFERENCES)))
    files = ("--canaries", "100-103", "--references", tmp_path / "ids", "--json")
    found = [
        json.loads(ok("evaluate", made.student, *options))["exposures"] for options in ((*OPTIONS, "--json"), files)
    ]
    assert found[0] == found[1]
    (tmp_path / "wrong").write_text("1\ntwo\n")
    for options, words in (
        (("--canaries", "1"), "--canaries needs --references"),
        (("--references", "1-3"), "--references needs --canaries"),
        (("--canaries", "x", "--references", "1-3"), "--canaries must be an index or a range"),
        (("--canaries", "1", "--references", "3-1"), "--references 3-1 ends before it begins"),
        (("--canaries", "2", "--references", "1-3"), "sample 2 is named twice"),
        (("--canaries", "0", "--references", tmp_path / "wrong"), "'two', which is not a sample id"),
    ):
        assert words in refused(2, "evaluate", made.student, *options)
        assert words in refused(2, "report", made.student, "-o", tmp_path / "r.html", *options)
    assert "exposures" not in json.loads(ok("evaluate", made.student, "--json"))
