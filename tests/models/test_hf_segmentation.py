"""`hf:FOLDER` of networks of semantic segmentation, beside what transformers computes of them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kdcache
from kdcache.config.schema import ModelSpec
from kdcache.errors import MismatchError, UsageError
from kdcache.models import build_model, outputs_of
from kdcache.models.build import categories_of

transformers: Any = pytest.importorskip("transformers")

CLASSES = ("road", "sky", "car", "pole", "tree", "person")

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
VIT = {**TINY, "image_size": 64, "patch_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "Segformer": {
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    },
    "Beit": {**VIT, "out_indices": [1, 2, 3, 4]},
    "DPT": {
        **VIT,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "is_hybrid": False,
    },
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 64},
    "MobileViTV2": {"width_multiplier": 0.25, "aspp_out_channels": 16, "image_size": 64},
}


def made(path: Path, kind: str = "Segformer") -> Path:
    """A folder as `save_pretrained` writes it."""
    names = dict(enumerate(CLASSES))
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], id2label=names)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForSemanticSegmentation")(config).save_pretrained(path)
    return path


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """Images of noise with maps of classes, 255 where there is none."""

    classes = CLASSES

    def __init__(self, count: int = 6, side: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(count, 3, side, side, generator=generator)
        maps = torch.randint(len(CLASSES), (count, side // 8, side // 8), generator=generator)
        self.maps = maps.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
        self.maps[:, :5] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.maps[index]


def trained(path: Path, classes: int = len(CLASSES)) -> nn.Module:
    return build_model(ModelSpec(model=f"hf:{path}"), classes, (3, 64, 64), trained=True).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_and_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path / "net", kind)
    own = getattr(transformers, f"{kind}ForSemanticSegmentation").from_pretrained(path).eval()
    model, data = trained(path), Scenes()
    torch.testing.assert_close(model(data.images), own(data.images).logits)
    maps = data.maps.long()
    said = own(data.images)
    enlarged = nn.functional.interpolate(said.logits.double(), maps.shape[1:], mode="bilinear", align_corners=False)
    loss = nn.functional.cross_entropy(enlarged, maps, ignore_index=255)
    size = tuple(maps.shape[1:])
    processor = transformers.SegformerImageProcessor()
    predicted = torch.stack(processor.post_process_semantic_segmentation(said, [size] * len(maps)))
    found = kdcache.evaluate(model, data, batch_size=6)
    known = maps != 255
    assert found.accuracy == pytest.approx(float((predicted == maps)[known].double().mean()))
    assert found.loss == pytest.approx(float(loss), rel=1e-5)


def test_names_and_number_of_classes_are_known_and_compared(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    spec = ModelSpec(model=f"hf:{path}")
    assert outputs_of(spec) == len(CLASSES) and categories_of(spec) == list(CLASSES)
    with pytest.raises(MismatchError, match="has 6 classes, the data set has 7"):
        trained(path, 7)
    student = build_model(spec, 7, (3, 64, 64)).eval()
    assert student(torch.rand(1, 3, 64, 64)).shape == (1, 7, 16, 16)


def test_a_classifier_of_the_same_type_stays_a_classifier(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(**KINDS["Segformer"], num_labels=6)
    transformers.SegformerForImageClassification(config).save_pretrained(tmp_path / "net")
    assert trained(tmp_path / "net")(torch.rand(2, 3, 64, 64)).shape == (2, 6)


def test_a_network_of_queries_is_refused(tmp_path: Path) -> None:
    transformers.MaskFormerConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="which is not an image classifier or a network of semantic segmentation"):
        trained(tmp_path)


@torch.no_grad()
def test_a_folder_is_the_teacher_and_the_student_of_maps(tmp_path: Path) -> None:
    path = made(tmp_path / "net")
    data = Scenes(8)
    outputs = {"pixels": {"kind": "classes", "places": "grid", "source": "logits", "over_places": True}}
    options: dict[str, Any] = {"logits": False, "batch_size": 4, "num_workers": 0, "progress": None}
    cache = kdcache.dump_teacher(trained(path), data, tmp_path / "c.kdcache", outputs=outputs, **options)
    own = transformers.SegformerForSemanticSegmentation.from_pretrained(path).eval()
    wanted = own(data.images).logits
    stored = cache.teacher("pixels")(torch.arange(8))
    variation = (stored.softmax(1) - wanted.softmax(1)).abs().sum(1).mean() / 2
    assert stored.shape == (8, 6, 16, 16) and float(variation) <= 0.005
