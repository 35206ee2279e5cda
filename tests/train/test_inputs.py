"""What students are taught: by several caches at once, by their own earlier generation, and on pixels of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner, Result
from helpers.paths import ROOT
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor
from torch.nn import functional as F

from kdcache import Cache, dump_teacher, load_pipeline, open_cache, train_student
from kdcache.cache.joined_teacher import JoinedTeacher
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import Pipeline
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import Batch, View
from kdcache.errors import MismatchError, UsageError
from kdcache.models.ensemble import Ensemble
from kdcache.models.small import SmallCNN, SmallMLP
from kdcache.runtime.progress import Silent
from kdcache.train.inputs import FixedImagesTeacher, inputs_from_caches

RECIPE = ROOT / "pipelines" / "digits.yaml"
DENSE = CacheSpec(dtype="float32", views=2, seed=5)
IDS = torch.tensor([3, 36, 0, 11, 11, 20, 7])
NETWORKS = [TinyTeacher(seed=seed) for seed in (1, 2, 3)]

Combined = Literal["logits", "probabilities"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    """Of three teachers, in two views of 37 images; all that they said."""
    folder = tmp_path_factory.mktemp("caches")
    return [
        dump_teacher(network, tiny_samples(), folder / f"{number}.kdcache", transform=FLIP, spec=DENSE)
        for number, network in enumerate(NETWORKS)
    ]


def images(view: int, ids: Tensor = IDS) -> Tensor:
    return View(tiny_samples(), FLIP, DENSE.seed, view).__getitems__(ids.tolist()).images


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("weights", [None, [1.0, 1.0, 1.0], [3.0, 0.5, 1.5]])
def test_caches_joined_are_the_ensemble_of_their_networks(
    combine: Combined, weights: list[float] | None, caches: list[Cache]
) -> None:
    joined = JoinedTeacher([cache.teacher() for cache in caches], weights, combine)
    together = Ensemble(NETWORKS, weights or [1.0] * 3, combine, ["a", "b", "c"], 10)
    for view in range(2):
        torch.testing.assert_close(joined(IDS, view), together(images(view)), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(joined(IDS, 0), joined(IDS, 1), atol=0.1)


@pytest.mark.parametrize("weights", [None, [1.0, 0.8, 1.2]])
def test_the_most_confident_teacher_of_each_sample_is_used(weights: list[float] | None, caches: list[Cache]) -> None:
    ids = torch.arange(37)
    joined = JoinedTeacher([cache.teacher() for cache in caches], weights, "confidence")
    said = [network(images(1, ids)) for network in NETWORKS]
    heard = []
    for row in range(37):
        sure = [
            weight * float(logits[row].softmax(dim=0).max())
            for weight, logits in zip(weights or [1.0] * 3, said, strict=True)
        ]
        heard.append(sure.index(max(sure)))
    torch.testing.assert_close(
        joined(ids, 1), torch.stack([said[who][row] for row, who in enumerate(heard)]), rtol=1e-4, atol=1e-4
    )
    assert len(set(heard)) > 1


def test_the_first_of_equally_confident_teachers_is_used() -> None:
    def of(logits: list[list[float]]) -> Any:
        return lambda ids, view: torch.tensor(logits)[ids]

    a, b = [[2.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]
    for first, second in ((a, b), (b, a)):
        joined = JoinedTeacher([of(first), of(second)], None, "confidence")
        assert joined(torch.tensor([0])).tolist() == first


@pytest.mark.parametrize("combine", ["logits", "probabilities", "confidence"])
@pytest.mark.parametrize("weights", [None, [2.0, 0.5, 1.0]])
def test_every_place_of_maps_is_joined_as_a_sample(
    combine: Literal["logits", "probabilities", "confidence"], weights: list[float] | None
) -> None:
    torch.manual_seed(0)
    sizes = [(2, 3), (4, 6), (4, 3)]
    said = [3 * torch.randn(5, 4, *size) for size in sizes]
    teachers: list[Any] = [lambda ids, view, maps=maps: maps[ids] for maps in said]
    ids = torch.tensor([4, 0])
    joined = JoinedTeacher(teachers, weights, combine)(ids)
    enlarged = [F.interpolate(maps, (4, 6), mode="bilinear", align_corners=False)[ids] for maps in said]
    rows = [maps.permute(0, 2, 3, 1).reshape(-1, 4) for maps in enlarged]
    of_rows: list[Any] = [lambda ids, view, logits=logits: logits[ids] for logits in rows]
    expected = JoinedTeacher(of_rows, weights, combine)(torch.arange(2 * 24))
    torch.testing.assert_close(joined, expected.view(2, 4, 6, 4).permute(0, 3, 1, 2))


@pytest.mark.parametrize("places", [("mmap", "stream"), ("stream", "host"), ("mmap", "mmap")])
def test_joined_teachers_on_disk_share_one_block_order(
    places: tuple[Literal["mmap", "stream", "host"], ...], caches: list[Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers = [cache.teacher(placement=place) for cache, place in zip(caches, places, strict=False)]
    joined = JoinedTeacher(teachers)
    leader = teachers[places.index("stream") if "stream" in places else 0]
    order = joined.order(torch.Generator().manual_seed(3))
    assert order.tolist() == leader.order(torch.Generator().manual_seed(3)).tolist()
    assert sorted(order.tolist()) == list(range(37))
    cuts = torch.split(order, 8)
    for view in (1, 0):
        joined.prefetch((cut for cut in cuts), view)
        for cut in cuts:
            expected = (NETWORKS[0](images(view, cut)) + NETWORKS[1](images(view, cut))) / 2
            torch.testing.assert_close(joined(cut, view), expected, rtol=1e-4, atol=1e-4)


def test_there_is_one_weight_per_cache(caches: list[Cache]) -> None:
    with pytest.raises(UsageError, match="2 weights were given for 3 caches") as caught:
        JoinedTeacher([cache.teacher() for cache in caches], [1.0, 2.0])
    assert "join.weights" in caught.value.fix


# On digits, by the command line.


def pipeline(*overrides: str) -> Pipeline:
    return load_pipeline(RECIPE, ["student.train.epochs=2", *overrides])


def digits() -> Samples:
    return load_split(pipeline().dataset, "train")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def train(out: Path, *arguments: object) -> Result:
    return command("train-student", RECIPE, "-o", out, "--set", "student.train.epochs=2", *arguments)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Cache]:
    folder = tmp_path_factory.mktemp("two")
    made = []
    torch.manual_seed(0)
    for number, network in enumerate((SmallCNN(10, 1, width=4), SmallMLP(10, 1, 8, 8))):
        spec = CacheSpec(dtype="float32")
        made.append(dump_teacher(network, digits(), folder / f"{number}.kdcache", spec=spec))
    return made


def test_a_student_of_two_caches(two: list[Cache], tmp_path: Path) -> None:
    paths = [part for cache in two for part in ("--cache", cache.path)]
    for combine in ("probabilities", "confidence"):
        done = train(tmp_path / combine, *paths, "--set", f"join.combine={combine}", "--set", "join.weights=[2, 1]")
        assert done.exit_code == 0, done.output
        metrics = json.loads((tmp_path / combine / "metrics.json").read_text())
        assert metrics["caches"] == [cache.manifest.digest for cache in two]
        assert len(metrics["replay"]) == len(metrics["placement"]) == 2
        join = load_pipeline(tmp_path / combine / "resolved.yaml").join
        assert (join.combine, join.weights) == (combine, [2.0, 1.0])
    refused = train(tmp_path / "run", *paths, "--set", "join.weights=[2, 1, 1]")
    assert refused.exit_code == 2
    assert "3 weights were given for 2 caches" in refused.stderr
    assert not list(tmp_path.glob("run*"))


def test_two_copies_of_a_cache_are_equal_to_one(two: list[Cache], tmp_path: Path) -> None:
    one = train_student(pipeline(), two[0], tmp_path / "one")
    both = train_student(pipeline("join.weights=[3, 1]"), [two[0], two[0]], tmp_path / "both")
    for ours, theirs in zip(both.model.parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    other = train_student(pipeline(), [two[0], two[1]], tmp_path / "other")
    assert not all(
        torch.allclose(ours, theirs, atol=1e-3)
        for ours, theirs in zip(other.model.parameters(), one.model.parameters(), strict=True)
    )


def test_caches_of_other_views_are_not_joined(two: list[Cache], tmp_path: Path) -> None:
    fixed = two[0].manifest.plan.views.transform
    flipped = [*FLIP, *fixed]
    spec = CacheSpec(views=2, dtype="float32")
    others = [
        dump_teacher(SmallMLP(10, 1, 8, 8), digits(), tmp_path / name, transform=flipped, spec=made)
        for name, made in (("a", spec), ("b", spec.model_copy(update={"seed": 1})))
    ]
    for pair in ([two[0], others[0]], others):
        with pytest.raises(MismatchError, match="has other views than") as caught:
            inputs_from_caches(pipeline(), pair)
        assert "same transform, seed and number of views" in caught.value.fix


def test_a_student_is_the_teacher_of_the_next_generation(two: list[Cache], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, "--cache", two[0].path).exit_code == 0
    student = ["teacher.model=small:mlp", "teacher.args={}", f"teacher.weights={first / 'model.safetensors'}"]
    sets = [part for given in [*student, "cache.dtype=float32"] for part in ("--set", given)]
    dumped = command("dump-teacher", RECIPE, "-o", tmp_path / "g1.kdcache", *sets)
    assert dumped.exit_code == 0, dumped.output
    network = SmallMLP(10, 1, 8, 8)
    from kdcache.models.checkpoints import load_weights

    load_weights(network, first / "model.safetensors")
    seen, ids = View(digits(), digits().transform), torch.tensor([5, 999, 17])
    generation = open_cache(tmp_path / "g1.kdcache")
    torch.testing.assert_close(
        generation.teacher()(ids), network(seen.__getitems__(ids.tolist()).images), rtol=1e-4, atol=1e-4
    )
    assert train(second, "--cache", generation.path).exit_code == 0
    assert json.loads((second / "metrics.json").read_text())["caches"] == [generation.manifest.digest]


# Pixels of the student's own.

FLOAT = "{ToDtype: {dtype: float32, scale: true}}"
CROPPED = f"student.transform=[{{RandomCrop: {{size: 8, padding: 2}}}}, {FLOAT}]"


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, Any, Batch]]:
    """Every batch that anyone looks at: of which split, in which view, through which transform."""
    batches: list[tuple[str, int, Any, Batch]] = []
    original = View.batch

    def watched(data: View, ids: Sequence[int], view: int) -> Batch:
        batch = original(data, ids, view)
        batches.append((data.samples.split, view, data.transform, batch))
        return batch

    monkeypatch.setattr(View, "batch", watched)
    return batches


def test_a_student_may_augment_the_images_of_a_fixed_view(
    two: list[Cache], tmp_path: Path, shown: list[tuple[str, int, Any, Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    teacher_of: Callable[..., Tensor] = type(two[0].teacher()).__call__

    def watched(teacher: Any, ids: Tensor, view: int = 0) -> Tensor:
        asked.append(view)
        return teacher_of(teacher, ids, view)

    monkeypatch.setattr(type(two[0].teacher()), "__call__", watched)
    heard, resolved = Heard(), pipeline(CROPPED, "student.train.epochs=3", "student.train.batch_size=250")
    train_student(resolved, two[0], tmp_path / "run", progress=heard)
    assert set(asked) == {0}
    assert any("the teacher did not see these pixels" in line for line in heard.lines)
    used = load_pipeline(tmp_path / "run" / "resolved.yaml")
    assert used.student is not None and resolved.student is not None
    assert used.student.transform == resolved.student.transform
    assert used.transform == two[0].manifest.plan.views.transform
    assert used.eval_transform == [{"ToDtype": {"dtype": "float32", "scale": True}}], "the student's own fixed steps"
    assert {str(how) for split, _, how, _ in shown if split != "train"} == {str(used.eval_transform)}
    epochs: dict[int, dict[int, Tensor]] = {0: {}, 1: {}, 2: {}}
    for split, view, how, batch in shown:
        if split == "train" and how == used.student.transform and len(batch.ids) == 250:
            epochs[view].update(zip(batch.ids.tolist(), batch.images, strict=True))
    assert [len(epoch) for epoch in epochs.values()] == [1000] * 3
    same = sum(
        bool(torch.equal(epochs[0][i], epochs[1][i]) or torch.equal(epochs[1][i], epochs[2][i])) for i in epochs[0]
    )
    assert same < 200, "of 25 crops in either epoch, two are seldom the same"


def test_a_fixed_transform_of_the_student_is_one_view(two: list[Cache], tmp_path: Path) -> None:
    result = train_student(pipeline(f"student.transform=[{FLOAT}]"), two[0], tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[2].startswith("2,0,")
    assert result.test is not None


def test_training_on_labels_alone_allows_any_transform(tmp_path: Path) -> None:
    mixing = f"student.transform=[{FLOAT}, {{MixUp: {{alpha: 0.5}}}}]"
    result = train_student(pipeline(mixing, "loss.name=ce"), None, tmp_path / "run")
    assert result.test is not None


def test_a_student_transform_is_refused_for_random_or_mixed_views(two: list[Cache], tmp_path: Path) -> None:
    flipped = [*FLIP, *two[0].manifest.plan.views.transform]

    def refused(words: str, fix: str, cache: Cache, *overrides: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            train_student(pipeline(*overrides), cache, tmp_path / "run")
        assert fix in caught.value.fix
        assert not list(tmp_path.glob("run*"))

    for views in (1, 2):
        out, spec = tmp_path / f"{views}.kdcache", CacheSpec(views=views)
        random = dump_teacher(SmallMLP(10, 1, 8, 8), digits(), out, transform=flipped, spec=spec)
        words = f"student.transform is for a teacher of fixed images, and the cache has {views} views of"
        refused(words, "remove student.transform", random, CROPPED, f"eval_transform=[{FLOAT}]")
    mixing = f"student.transform=[{FLOAT}, {{CutMix: {{alpha: 1.0}}}}]"
    refused("student.transform mixes images", "at the end of `transform`", two[0], mixing)


def test_a_teacher_of_one_fixed_view_returns_it_for_every_view(two: list[Cache]) -> None:
    teacher = two[0].teacher()
    fixed = FixedImagesTeacher(teacher)
    ids = torch.tensor([4, 2, 900])
    assert torch.equal(fixed(ids, 17), teacher(ids, 0))
    order = fixed.order(torch.Generator().manual_seed(1))
    assert torch.equal(order, teacher.order(torch.Generator().manual_seed(1)))
    fixed.prefetch([ids], 17)
    with pytest.raises(UsageError, match="the cache has no view 17"):
        teacher.prefetch([ids], 17)
