"""`hf:FOLDER`: image classifiers of transformers from configurations, with and without weights and processors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdcache import dump_teacher, train_student
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.data.transforms import build_transform
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.models import build_model, outputs_of, preset_transform, save_weights, weights_digest
from kdcache.models.teacher import load_teacher

transformers: Any = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}

SIZES: dict[str, dict[str, Any]] = {
    "ViT": TINY,
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32},
    "DeiT": TINY,
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 32},
}  # fmt: skip


def made(path: Path, kind: str = "ViT", classes: int = 10, processor: Any = None, **options: Any) -> Path:
    """A folder as `save_pretrained` writes it."""
    config = getattr(transformers, f"{kind}Config")(**SIZES[kind], num_labels=classes, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
    model.save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return path


def trained(path: Path, classes: int = 10, **keys: Any) -> nn.Module:
    return build_model(ModelSpec(model=f"hf:{path}", **keys), classes, (3, 32, 32), trained=True)


def refused(kind: type[KdcacheError], words: str, make: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(kind, match=words) as caught:
        make(*args, **options)
    return caught.value.fix


@pytest.mark.parametrize("kind", SIZES)
def test_the_folder_s_network_and_weights_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path / "net", kind)
    own = getattr(transformers, f"{kind}ForImageClassification").from_pretrained(path).eval()
    model = trained(path).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), own(images).logits)
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert weights_digest(model) == weights_digest(own)


def test_half_precision_and_shards_are_read(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    model = transformers.ViTForImageClassification.from_pretrained(path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert weights_digest(trained(tmp_path / "shards")) == weights_digest(trained(path))
    model.half().save_pretrained(tmp_path / "half")
    half = trained(tmp_path / "half")
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_a_student_starts_from_random_weights_or_from_those_of_a_folder(tmp_path: Path) -> None:
    path = made(tmp_path / "net", classes=7)
    spec = ModelSpec(model=f"hf:{path}")
    one, other = (build_model(spec, 10, (1, 8, 8)) for _ in range(2))
    assert weights_digest(one) != weights_digest(other)
    assert one.eval()(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    started = build_model(ModelSpec(model=f"hf:{path}", weights=str(path)), 7, (1, 8, 8), trained=True)
    assert weights_digest(started) == weights_digest(trained(path, 7))
    # Of other classes, its head does not fit.
    for weights in (path, path / "model.safetensors"):
        words = r"of another shape: classifier.bias \[7\], the network has \[10\]; classifier.weight \[7, 16\]"
        assert "these classes" in refused(MismatchError, words, trained, path, 10, weights=str(weights))


def test_arguments_change_the_configuration(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    spec = ModelSpec(model=f"hf:{path}", args={"num_hidden_layers": 3})
    assert len(build_model(spec, 10, (3, 32, 32)).state_dict()) > len(trained(path).state_dict())
    fix = refused(UsageError, "has no depth, width", trained, path, args={"depth": 3, "width": 2})
    assert "config.json" in fix


def test_the_classes_of_the_folder_are_known(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    path = made(tmp_path / "net", classes=7, processor=processor)
    assert outputs_of(ModelSpec(model=f"hf:{path}")) == 7
    fix = refused(MismatchError, "has 7 classes, the data set has 10", trained, path)
    assert "teacher.classes" in fix
    pipeline = Pipeline.model_validate(
        {"dataset": {"name": "digits"}, "teacher": {"model": f"hf:{path}", "classes": [0, 1, 2]}}
    )
    refused(MismatchError, "has 3 entries, the data set has 10", load_teacher, pipeline)


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    names = [str(9 - number) for number in range(10)]
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: 9 - int(name) for name in names}}
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    path = made(tmp_path / "net", processor=processor, **labels)
    pipeline = Pipeline.model_validate({"dataset": {"name": "digits"}, "teacher": {"model": f"hf:{path}"}})
    refused(MismatchError, "in another order", load_teacher, pipeline)


def test_a_folder_is_a_teacher_and_its_configuration_tells_it_apart(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    digests = []
    for activation in ("gelu", "relu"):
        path = made(tmp_path / activation / "net", processor=processor, hidden_act=activation)
        pipeline = Pipeline.model_validate({"dataset": {"name": "digits"}, "teacher": {"model": f"hf:{path}"}})
        loaded = load_teacher(pipeline)
        assert loaded.identity.name == "net"
        assert loaded.identity.code_digest is not None
        digests.append(loaded.identity.code_digest)
        assert [next(iter(step)) for step in loaded.transform] == ["ToImage", "Resize", "ToDtype", "Normalize"]
    assert digests[0] != digests[1]
    few = loaded.samples
    cache = dump_teacher(loaded.model, few, tmp_path / "c.kdcache", name=loaded.identity, transform=loaded.transform)
    assert cache.manifest.plan.teacher.code_digest == digests[1]


def test_a_student_is_trained(tmp_path: Path) -> None:
    path = made(tmp_path / "net", "ResNet")
    student = {"model": f"hf:{path}", "train": {"epochs": 1, "batch_size": 256}}
    pipeline = Pipeline.model_validate({"dataset": {"name": "digits"}, "student": student, "loss": {"name": "ce"}})
    result = train_student(pipeline, None, tmp_path / "run")
    again = build_model(ModelSpec(model=f"hf:{path}", weights=str(result.checkpoint)), 10, (1, 8, 8), trained=True)
    assert weights_digest(again) == weights_digest(result.model)
    save_weights(again, tmp_path / "again.safetensors")


# What is refused


def configured(text: str) -> Callable[[Path], Any]:
    return lambda path: (path / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda path: (path / "config.json").unlink(), UsageError, "file not found: .*config.json"),
        (configured("{"), CorruptError, "is not the configuration"),
        (configured("[]"), UsageError, "transformers cannot read"),
        (configured('{"architecture": "resnet18"}'), CorruptError, "is not the configuration"),
        (configured('{"model_type": "nothing_of_that"}'), UsageError, "transformers cannot read"),
        (configured('{"model_type": "bert"}'), UsageError, "a bert network, which is not an image classifier"),
        (lambda path: (path / "model.safetensors").unlink(), MismatchError, "the weights in .* cannot be loaded"),
        (
            lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:900]),
            MismatchError,
            "the weights in .* cannot be loaded",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_classifier_is_refused(
    change: Callable[[Path], Any], kind: type[KdcacheError], words: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "net")
    change(path)
    refused(kind, words, trained, path)


def test_a_body_without_its_head_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    transformers.ViTForImageClassification.from_pretrained(path).vit.save_pretrained(tmp_path / "body")
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    refused(MismatchError, "missing: classifier.bias; classifier.weight", trained, tmp_path / "body")


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    (path / "own.py").write_text("raise SystemExit('run')")
    config = json.loads((path / "config.json").read_text())
    auto = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Net"}
    for model_type in ("vit", "own"):
        (path / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto}))
        if model_type == "own":
            refused(UsageError, "transformers cannot read", trained, path)
        else:
            assert isinstance(trained(path), transformers.ViTForImageClassification)


def test_without_transformers_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "net")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused(UsageError, "need the library transformers", trained, path) == "pip install 'kdcache[transformers]'"


# Processors


def photograph(height: int, width: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViTImageProcessor", {}),
    "ViT, bicubic": ("ViTImageProcessor", {"resample": 3, "size": {"height": 40, "width": 30}}),
    "ViT, not normalized": ("ViTImageProcessor", {"do_normalize": False}),
    "ViT, not rescaled": ("ViTImageProcessor", {"do_rescale": False, "do_normalize": False}),
    "ViT, not resized": ("ViTImageProcessor", {"do_resize": False}),
    "DeiT": ("DeiTImageProcessor", {}),
    "BiT": ("BitImageProcessor", {}),
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 100}, "crop_size": 80}),
    "SigLIP": ("SiglipImageProcessor", {}),
    "ConvNext, large": ("ConvNextImageProcessor", {}),
    "ConvNext, small": ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    "EfficientNet": ("EfficientNetImageProcessor", {}),
    "EfficientNet, offset": ("EfficientNetImageProcessor", {"rescale_factor": 1 / 127.5, "rescale_offset": True,
                                                            "include_top": False}),
    "BEiT": ("BeitImageProcessor", {}),
    "MobileNetV2": ("MobileNetV2ImageProcessor", {}),
    "LeViT": ("LevitImageProcessor", {}),
    "PoolFormer": ("PoolFormerImageProcessor", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_s_transform_makes_its_pixels(name: str, tmp_path: Path) -> None:
    kind, options = PROCESSORS[name]
    processor = getattr(transformers, kind)(**options)
    path = made(tmp_path / "net", processor=processor)
    transform = preset_transform(ModelSpec(model=f"hf:{path}"))
    assert transform is not None
    json.dumps(transform)  # as a plan has it
    apply = build_transform(transform)
    deviations = torch.tensor(processor.image_std if processor.do_normalize else [1.0] * 3)[:, None, None]
    for seed, (height, width) in enumerate([(90, 120), (120, 90), (300, 301), (64, 64), (500, 333)]):
        image = photograph(height, width, seed)
        wanted = torch.as_tensor(np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0]))
        found = apply(image)
        assert found.shape == wanted.shape
        levels = 255 * deviations * (found - wanted).abs()
        if not processor.do_rescale:
            levels = levels / 255
        assert levels.max() <= 2


@pytest.mark.parametrize("kind", ["MobileViTImageProcessor", "PerceiverImageProcessor"])
def test_a_processor_that_no_transform_matches_is_refused(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path / "net", processor=getattr(transformers, kind)())
    fix = refused(
        UsageError, f"{kind} of .* cannot be expressed by transforms", preset_transform, ModelSpec(model=f"hf:{path}")
    )
    assert "`transform`" in fix


def test_a_folder_without_a_processor_asks_for_the_transform(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    spec = ModelSpec(model=f"hf:{path}")
    assert "`transform`" in refused(UsageError, "has no preprocessor_config.json", preset_transform, spec)
    (path / "preprocessor_config.json").write_text("{")
    refused(UsageError, "cannot read the image processor", preset_transform, spec)
    # Trained here, on images as the data set has them.
    assert preset_transform(ModelSpec(model=f"hf:{path}", weights="run/model.safetensors")) is None
