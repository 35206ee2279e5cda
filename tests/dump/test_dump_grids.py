"""Stage one with maps: where they are taken, what is refused, and the same cache whatever happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from helpers.interrupts import StopsAfter
from helpers.tiny import FLIP, tiny_samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdcache import Cache, Samples, dump_teacher
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.inspect.audit import audit
from kdcache.cache.inspect.output_statistics import output_differences, output_statistics
from kdcache.curate.decoded_files import logits_of_cache
from kdcache.curate.merge import merge
from kdcache.curate.select import select
from kdcache.dump.check_teacher import check_identity, compare_outputs
from kdcache.errors import CorruptError, InterruptedRun, KdcacheError, MismatchError, UsageError

IDS = torch.arange(37)
GRID: dict[str, Any] = {"places": "grid"}
EXACT = {"encoding": "float32", **GRID}
SMALL: dict[str, Any] = {"shard_rows": 8, "batch_size": 5, "pilot_rows": 37, "logits": False}
OUTPUTS: dict[str, dict[str, Any]] = {
    "classes": {"kind": "classes", "fidelity": 0.02, **GRID},
    "body": {"source": "body", "fidelity": 0.01, **GRID},
    "depth": {"kind": "score", "compression": "small", **GRID},
    "pooled": {"source": "classes", "pool": "mean"},
}


class Dense(nn.Module):
    """Returns maps [B, 3, 4, 4] and [B, 4, 4] of images [B, 1, 4, 4], and has a module of features [B, 6, 4, 4].

    Args:
        scale: of the maps, which is not a weight.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        torch.manual_seed(4)
        self.body = nn.Conv2d(1, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.relu(self.body(images))
        maps = self.head(features) * 4 * self.scale
        return {"classes": maps, "depth": maps[:, 0], "logits": maps.mean(dim=(2, 3)), "all": features}


def dumped(out: Path, model: Any = None, samples: Samples | None = None, **options: Any) -> Cache:
    return dump_teacher(model or Dense(), samples or tiny_samples(), out, **{"outputs": OUTPUTS, **SMALL, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of an uninterrupted run."""
    return dumped(tmp_path_factory.mktemp("whole") / "whole.kdcache")


def pixels(samples: Samples | None = None) -> Tensor:
    samples = samples or tiny_samples()
    return torch.stack([torch.as_tensor(samples.images.picture(index)) for index in range(len(samples))])


def error_of_classes(cache: Cache, view: int = 0, images: Tensor | None = None) -> float:
    """Mean total variation per place of the maps of classes, against the teacher itself."""
    with torch.no_grad():
        live = Dense()(pixels() if images is None else images)["classes"].double()
    decoded = cache.teacher("classes")(torch.arange(len(live)), view).double()
    return float((live.softmax(1) - decoded.softmax(1)).abs().sum(1).mean()) / 2


def test_maps_are_stored_as_planned(whole: Cache) -> None:
    assert whole.manifest.plan.output_names == ["body", "classes", "depth", "pooled"]
    assert whole.outputs["classes"].shape == (3, 4, 4)
    assert whole.outputs["classes"].level == "unknown"
    assert error_of_classes(whole) < 0.025
    with torch.no_grad():
        live, before = Dense()(pixels()), Dense().body(pixels())
    torch.testing.assert_close(whole.teacher("depth")(IDS), live["depth"][:, None])
    body = whole.teacher("body")(IDS)
    assert (before < 0).any()  # the ReLU that follows works in place
    assert float((body - before).square().sum() / before.var() / before.numel()) < 0.025
    assert whole.teacher("pooled")(IDS).shape == (37, 3)
    assert audit(whole.path).failure is None


def test_chunks_hold_a_few_maps(tmp_path: Path) -> None:
    images = TensorDataset(torch.randn(8, 1, 512, 512), torch.zeros(8, dtype=torch.long))
    model = nn.Conv2d(1, 4, 1)
    options: dict[str, Any] = {"logits": False, "batch_size": 2, "num_workers": 0}
    cache = dump_teacher(model, images, tmp_path / "c.kdcache", outputs={"maps": EXACT}, **options)
    assert cache.manifest.plan.shape.chunk_rows == 1
    assert len(list((cache.path / "commits/0").iterdir())) == 1
    with torch.no_grad():
        expected = model(images.tensors[0][6:7])
    torch.testing.assert_close(cache.teacher("maps", placement="stream")(torch.tensor([6])), expected)


# Where maps are taken.


def color_images(count: int = 12) -> TensorDataset:
    images = torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, torch.arange(count) % 4)


@torch.no_grad()
def test_a_segmentation_network_before_it_enlarges_its_logits(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ).eval()
    images = color_images().tensors[0]
    outputs = {"small": {"source": "classifier", **EXACT}, "out": EXACT}
    options: dict[str, Any] = {"logits": False, "batch_size": 4, "num_workers": 0}
    cache = dump_teacher(model, color_images(), tmp_path / "c.kdcache", outputs=outputs, **options)
    small = cache.teacher("small")(torch.arange(12))
    torch.testing.assert_close(small, model.classifier(model.backbone(images)), rtol=1e-3, atol=1e-4)
    assert small.shape == (12, 5, 8, 12)
    enlarged = nn.functional.interpolate(small, (64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(cache.teacher("out")(torch.arange(12)), enlarged, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_patches_of_a_transformer(tmp_path: Path) -> None:
    """Its tokens are the class token and then the patches, line by line."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=(64, 96), patch_size=16)).eval()
    images = color_images().tensors[0]
    outputs = {"patches": {"source": "last_hidden_state", "patches": [4, 6], **EXACT}}
    options: dict[str, Any] = {"logits": False, "batch_size": 4, "num_workers": 0}
    cache = dump_teacher(model, color_images(), tmp_path / "c.kdcache", outputs=outputs, **options)
    found, tokens = cache.teacher("patches")(torch.arange(12)), model(images).last_hidden_state
    for y, x in ((0, 0), (1, 4), (3, 5)):
        torch.testing.assert_close(found[:, :, y, x], tokens[:, 1 + 6 * y + x], rtol=1e-4, atol=1e-5)
    outputs["patches"]["patches"] = [5, 6]
    with pytest.raises(MismatchError, match=r"\[1, 25, 16\], and places is grid: .* or has the 5 x 6 tokens"):
        dump_teacher(model, color_images(), tmp_path / "d.kdcache", outputs=outputs, **options)


def test_a_network_that_returns_a_map_alone(tmp_path: Path) -> None:
    cache = dumped(tmp_path / "c.kdcache", nn.Conv2d(1, 3, 1), outputs={"maps": {"kind": "classes", **GRID}})
    assert cache.outputs["maps"].shape == (3, 4, 4)


def test_a_function_that_returns_arrays(tmp_path: Path) -> None:
    def maps(images: Tensor) -> dict[str, Any]:
        return {"maps": images.numpy() * 2}

    cache = dumped(tmp_path / "c.kdcache", maps, outputs={"maps": EXACT})
    assert torch.equal(cache.teacher("maps")(IDS), pixels() * 2)


class Soft(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"maps": torch.cat([images, -images], dim=1).softmax(dim=1)}


def test_maps_of_probabilities_are_kept_as_logits_without_their_level(tmp_path: Path) -> None:
    cache = dumped(tmp_path / "c.kdcache", Soft(), outputs={"maps": {"kind": "classes", "fidelity": 0.001, **GRID}})
    expected = Soft()(pixels())["maps"]
    torch.testing.assert_close(cache.teacher("maps")(IDS).softmax(1), expected, rtol=0, atol=0.01)
    assert cache.outputs["maps"].level == "unknown"
    with pytest.raises(UsageError, match="output maps: it is probabilities"):
        dumped(tmp_path / "o.kdcache", Soft(), outputs={"maps": {"kind": "classes", "over_places": True, **GRID}})


# Refused, each with what is wrong and how to fix it.


class Odd(nn.Module):
    """Returns outputs that cannot be kept as maps."""

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {
            "maps": images,
            "batch": images[:, :, : len(images)],
            "whole": images.long(),
            "flat": images.flatten(1),
            "tokens": images[:, 0],
            "nothing": torch.where(images == 2.0, torch.nan, images),
            "wide": images.repeat(1, 65, 1, 1),
            "empty": images[:, :, :0],
        }


REFUSED: list[tuple[dict[str, Any], type[KdcacheError], str]] = [
    ({"batch": EXACT}, MismatchError, r"output batch of the teacher is \[\d, 1, \d, 4\] for \d images"),
    ({"whole": EXACT}, MismatchError, r"the output whole of the teacher is torch.int64 \[1, 1, 4, 4\]"),
    ({"flat": EXACT}, MismatchError, r"\[1, 16\], and places is grid: a map per sample is \[B, C, h, w\]"),
    ({"tokens": EXACT}, MismatchError, r"\[1, 4, 4\], and places is grid"),
    ({"empty": EXACT}, MismatchError, r"\[1, 1, 0, 4\], and places is grid"),
    ({"nothing": EXACT}, CorruptError, "NaN or infinite numbers as the output nothing for sample 16"),
    ({"wide": {"kind": "score", **GRID}}, MismatchError, "wide of the teacher has 65 numbers, and scores are at most"),
    ({"maps": {"kind": "classes", **GRID}}, MismatchError, "has one number, which is not a distribution over classes"),
    ({"maps": {"pool": "mean", **GRID}}, UsageError, "makes one row of all places, and a map keeps them"),
    ({"maps": {"encoding": "int8", **GRID}}, UsageError, "int8 is an encoding of vectors of images"),
    ({"maps": {"kind": "classes", "top_k": 3, **GRID}}, UsageError, "belongs to an output with one row per image"),
    ({"maps": {"kind": "classes", "labels": True, **GRID}}, UsageError, "belongs to an output with one row per image"),
    ({"maps": {"kind": "score", "fidelity": 0.1, **GRID}}, UsageError, "scores are stored exactly, in float32, unless"),
    ({"maps": {"over_places": True}}, UsageError, "belongs to maps: set `places: grid`"),
    ({"maps": {"patches": [2, 2]}}, UsageError, "belongs to maps: set `places: grid`"),
    ({"maps": {"patches": [2], **GRID}}, UsageError, "patches"),
    ({"maps": {"compression": "small"}}, UsageError, "belongs to maps: set `places: grid`"),
    ({"maps": {"encoding": "steps"}}, UsageError, "steps is an encoding of maps"),
    ({"maps": {"places": "run"}}, UsageError, "places"),
    ({"maps": {"encoding": "steps", "fidelity": 1e-30, **GRID}}, UsageError, "steps is not within fidelity 1e-30"),
]  # fmt: skip


@pytest.mark.parametrize(("outputs", "error", "words"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_cannot_be_kept_is_refused(
    outputs: dict[str, Any], error: type[KdcacheError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as refusal:
        dumped(tmp_path / "c.kdcache", Odd(), outputs=outputs)
    assert refusal.value.fix
    assert not (tmp_path / "c.kdcache").exists()


def test_a_map_without_places_says_how_to_keep_it(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as refusal:
        dumped(tmp_path / "c.kdcache", outputs={"classes": {}})
    assert "`places: grid` to keep a map" in refusal.value.fix


class Shrinks(nn.Module):
    """Its grid depends on what it sees, as that of a network does that crops."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        late = bool((images[:, 0, 0, 0] > 3.5).any())
        return {"maps": images[:, :, 1:] if late else images}


def test_a_grid_that_changes_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"was \[B, 1, 4, 4\] before: a map has the same grid for all") as refusal:
        dumped(tmp_path / "c.kdcache", Shrinks(), outputs={"maps": EXACT})
    assert "bring all images to one size" in refusal.value.fix
    cache = dumped(tmp_path / "c.kdcache", Shrinks(), tiny_samples(20), outputs={"maps": EXACT})
    with pytest.raises(MismatchError, match=r"maps of the teacher is \[1, 1, 3, 4\] for 1 image, and was \[B, 1"):
        dumped(tmp_path / "d.kdcache", Shrinks(), grown(), outputs={"maps": EXACT}, extends=cache)


def grown() -> Samples:
    """The first 20 of the tiny samples, and more whose maps are smaller."""
    larger = tiny_samples(50)
    images = torch.cat([pixels(tiny_samples(20)), pixels(larger)[20:]])
    images[20:, 0, 0, 0] = 4.0
    return replace(larger, images=type(larger.images)(images))  # type: ignore[call-arg]


# The same cache, whatever happened.


@pytest.mark.parametrize("batches", [1, 4, 9])
def test_an_interrupted_dump_resumes_to_the_same_cache(batches: int, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dumped(out, progress=StopsAfter(batches))
    assert dumped(out).manifest.digest == whole.manifest.digest


def test_another_teacher_and_other_settings_do_not_resume_it(whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dumped(out, progress=StopsAfter(4))
    with pytest.raises(MismatchError, match="returns other numbers as the output classes"):
        dumped(out, Dense(scale=1.3))
    one = {**OUTPUTS, "depth": {**OUTPUTS["depth"], "source": "depth"}}
    with pytest.raises(MismatchError, match=r"output depth .* has kind, source, pool, labels and places"):
        dumped(out, outputs=one)
    over = {**OUTPUTS, "classes": {**OUTPUTS["classes"], "over_places": True}}
    with pytest.raises(MismatchError, match="over_places"):
        dumped(out, outputs=over)
    assert dumped(out).manifest.digest == whole.manifest.digest


def test_views_extend_to_the_same_cache(tmp_path: Path) -> None:
    one = dumped(tmp_path / "one.kdcache", transform=FLIP)
    two = dumped(tmp_path / "two.kdcache", transform=FLIP, views=2)
    extended = dumped(tmp_path / "more.kdcache", transform=FLIP, views=2, extends=one)
    assert extended.manifest.digest == two.manifest.digest
    views = torch.arange(37) % 2
    mixed = two.teacher("classes")(IDS, views)
    for view in (0, 1):
        assert torch.equal(mixed[views == view], two.teacher("classes")(IDS[views == view], view))


def test_a_teacher_agrees_with_its_own_cache_and_another_does_not(whole: Cache) -> None:
    found = {(one.output, one.measure): one.value for one in compare_outputs(whole, Dense(), tiny_samples())}
    assert 0 < found["classes", "total variation at T = 1"] < 0.025
    assert found["depth", "relative squared error"] < 1e-10
    assert check_identity(whole, Dense(), tiny_samples()) is not None
    with pytest.raises(MismatchError, match="returns other numbers as the output classes"):
        check_identity(whole, Dense(1.3), tiny_samples())
    with pytest.raises(MismatchError, match="the output classes of the teacher is not that of the cache"):
        compare_outputs(whole, Dense(1.3), tiny_samples())


# Caches of caches, and what is said of them.


def test_selected_and_merged_maps_are_those_of_the_parents(whole: Cache, tmp_path: Path) -> None:
    some = select(whole, tmp_path / "some.kdcache", samples=np.array([30, 2, 9]), outputs=["classes", "depth"])
    for name in some.outputs:
        assert torch.equal(some.teacher(name)(torch.arange(3)), whole.teacher(name)(torch.tensor([30, 2, 9])))
    others = select(whole, tmp_path / "others.kdcache", samples=np.array([5, 36]), outputs=["classes", "depth"])
    both = merge([some, others], tmp_path / "both.kdcache")
    again = both.teacher("classes")(torch.arange(5))
    assert torch.equal(again, whole.teacher("classes")(torch.tensor([30, 2, 9, 5, 36])))
    assert audit(both.path).failure is None


def test_caches_of_other_grids_are_not_merged(whole: Cache, tmp_path: Path) -> None:
    small = dumped(tmp_path / "small.kdcache", nn.AvgPool2d(2), outputs={"maps": EXACT})
    large = dumped(tmp_path / "large.kdcache", nn.AvgPool2d(1), outputs={"maps": EXACT})
    small, large = (
        select(cache, tmp_path / f"{first}.kdcache", samples=np.array([first, first + 1]))
        for first, cache in enumerate((small, large))
    )
    with pytest.raises(KdcacheError, match=r"1 x 2 x 2[\s\S]*1 x 4 x 4"):
        merge([small, large], tmp_path / "both.kdcache", reencode=True)


def test_statistics_are_those_of_the_places(whole: Cache, tmp_path: Path) -> None:
    found = {one.output: one for one in output_statistics(whole)}
    rows = whole.teacher("body")(IDS).double().movedim(1, 3).flatten(0, 2).numpy()
    assert found["body"].length == 6
    np.testing.assert_allclose(found["body"].mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-9)
    np.testing.assert_allclose(found["body"].deviation, np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean()), rtol=1e-9)
    other = dumped(tmp_path / "c.kdcache", Dense(1.3))
    apart = {one.output: one for one in output_differences(whole, other)}
    assert apart["depth"].relative_error == pytest.approx(0.09 * _energy(whole.teacher("depth")(IDS)), rel=1e-4)
    assert apart["body"].relative_error == 0


def _energy(values: Tensor) -> float:
    """Squares of the numbers, by their squared distances from their mean."""
    return float(values.double().square().sum() / (values.double() - values.double().mean()).square().sum())


def test_decoded_maps_are_written(whole: Cache, tmp_path: Path) -> None:
    shapes = logits_of_cache(whole, tmp_path / "c.npz")
    assert shapes["classes"] == [37, 3, 4, 4]
    with np.load(tmp_path / "c.npz") as stored:
        np.testing.assert_array_equal(stored["classes"], whole.teacher("classes")(IDS).numpy())


def test_commands_know_maps(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 9, (40, 4, 4), np.uint8)
    np.savez(tmp_path / "tiny.npz", images=images, labels=np.arange(40) % 10)
    code = "from dump.test_dump_grids import Dense\n\n\ndef teacher(num_classes):\n    return Dense()\n"
    (tmp_path / "dense.py").write_text(code)
    path, out = tmp_path / "tiny.yaml", tmp_path / "c.kdcache"
    path.write_text(
        f"dataset: {{name: npz, root: {tmp_path / 'tiny.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{tmp_path / 'dense.py'}:teacher'}}\n"
        "cache:\n  {logits: false, shard_rows: 8, batch_size: 5, num_workers: 0,\n"
        "   outputs: {classes: {kind: classes, places: grid}, body: {places: grid}}}\n"
    )
    planned = json.loads(ok("plan", path, "--device", "cpu", "--json"))
    assert GridEncoding.model_validate(planned["outputs"]["classes"]["encoding"]).shape == (3, 4, 4)
    text = ok("dump-teacher", path, "-o", out, "--device", "cpu", "--dry-run")
    assert "maps of 4 x 4 places, logits of 3 classes each" in text
    assert "per place" in text
    ok("doctor", path)
    ok("dump-teacher", path, "-o", out, "--device", "cpu")
    verified = json.loads(ok("verify", out, path, "--replay", "--teacher", "--device", "cpu", "--json"))
    assert {found["output"] for found in verified["outputs"]} == {"classes", "body"}
    assert "maps of 4 x 4 places, vectors of 6 each from body" not in ok("info", out)
    assert "maps of 4 x 4 places, vectors of 6 each" in ok("info", out)
    assert "# [B, 3, 4, 4] float32" in (out / "README.md").read_text()
    said = refused(2, "convert", tmp_path / "tiny.npz", "--pipeline", path, "-o", tmp_path / "w.kdcache")
    assert "is a map (places: grid)" in said
