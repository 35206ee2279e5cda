"""Networks of timm as encoders of segmentation networks: their maps, their weights, and the head on them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache import build_model, dump_teacher, load_split, train_student, train_teacher
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.errors import MismatchError, UsageError
from kdcache.models import save_weights
from kdcache.models.teacher import load_teacher

timm: Any = import_module("timm")  # whose types are not whole

# Name, arguments, pixels per place of the largest map.
FAMILIES: list[tuple[str, dict[str, Any], int]] = [
    ("resnet18", {}, 4),
    ("convnext_atto", {}, 4),
    ("tf_efficientnet_lite0", {}, 4),
    ("tf_efficientnet_lite0", {"out_indices": [0, 2]}, 2),
    ("hrnet_w18_small", {}, 4),
    ("mobilenetv4_conv_small", {}, 4),
    ("regnetx_002", {}, 4),
    ("resnet50", {"output_stride": 8}, 4),
    ("fastvit_t8", {}, 4),
    ("mobilevit_xs", {}, 4),
    ("maxvit_tiny_tf_224", {"img_size": [64, 96]}, 4),
    ("swin_tiny_patch4_window7_224", {"img_size": [64, 96]}, 4),
    ("vit_tiny_patch16_224", {"img_size": [64, 96]}, 16),
    ("vit_small_patch14_dinov2", {"img_size": [56, 84]}, 14),
]


def network(name: str, **args: Any) -> nn.Module:
    return build_model({"model": f"timm:{name}", "args": {"features_only": True, **args}}, 5, (3, 64, 96))


@pytest.mark.parametrize(("name", "args", "step"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_family_of_encoders_says_a_class_of_each_place(name: str, args: dict[str, Any], step: int) -> None:
    height, width = args.get("img_size", (64, 96))
    with torch.device("meta"):
        made = network(name, **args)
        assert made(torch.rand(2, 3, height, width)).shape == (2, 5, height // step, width // step)


def test_the_logits_are_those_of_timm_s_maps_and_of_the_head() -> None:
    model = network("test_resnet", width=6, out_indices=[1, 2, 4]).eval()
    images = torch.rand(2, 3, 64, 96)
    maps = timm.create_model("test_resnet", features_only=True, out_indices=[1, 2, 4]).eval()
    maps.load_state_dict(model.encoder.state_dict())  # type: ignore[union-attr]
    head: Any = model.head
    total: Tensor | float = 0.0
    for convolution, one in zip(head.projections, maps(images), strict=True):
        projected = torch.einsum("oi,bihw->bohw", convolution.weight[:, :, 0, 0], one)
        total = total + F.interpolate(projected, (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images), head.classifier(head.features(total)))
    assert head.classifier.weight.shape == (5, 6, 1, 1)


def test_gray_and_small_images_are_taken() -> None:
    model = build_model({"model": "timm:test_resnet", "args": {"features_only": True}}, 5, (1, 16, 16)).eval()
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 5, 8, 8), "it is enlarged to 32 pixels"
    spec = {"model": "timm:test_resnet", "args": {"features_only": True, "in_chans": 4}}
    assert build_model(spec, 5, (4, 64, 96)).eval()(torch.rand(2, 4, 64, 96)).shape == (2, 5, 16, 24)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_encoder_stays_as_it_is(frozen: bool, published: Path) -> None:
    assert published.is_file()
    model = build_model({**SPEC, "args": {"features_only": True, "frozen": frozen}}, 5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    torch.autograd.backward(model(torch.rand(2, 3, 64, 96)).square().mean())
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    of_encoder = {name for name in changed if name.startswith("encoder.")}
    assert (not of_encoder) if frozen else any("running_mean" in name for name in of_encoder)
    assert changed - of_encoder


@pytest.fixture
def published(hub: Path) -> Path:
    """The weights of the network of `SPEC`, where timm's are looked for."""
    hub.mkdir(parents=True)
    path = hub / "test_resnet.r160_in1k.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


SPEC = {"model": "timm:test_resnet@r160_in1k", "args": {"features_only": True, "frozen": True}}


def test_training_starts_from_the_named_weights_of_the_encoder(
    published: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model: Any = build_model(SPEC, 5)
    found = timm.create_model("test_resnet", features_only=True)
    found.load_state_dict({key: value for key, value in load_file(published).items() if key in found.state_dict()})
    images = torch.rand(2, 3, 64, 96)
    for one, other in zip(model.encoder.eval()(images), found.eval()(images)[1:], strict=True):
        assert torch.equal(one, other)
    assert capfd.readouterr() == ("", ""), "timm lists the weights of its classifier"


def test_a_checkpoint_of_the_whole_network_needs_no_weights_of_the_encoder(published: Path, tmp_path: Path) -> None:
    model = build_model(SPEC, 5).eval()
    save_weights(model, tmp_path / "whole.safetensors")
    published.unlink()
    again = build_model({**SPEC, "weights": str(tmp_path / "whole.safetensors")}, 5, trained=True).eval()
    images = torch.rand(2, 3, 64, 96)
    assert torch.equal(model(images), again(images))
    with pytest.raises(UsageError, match="weights of timm:test_resnet@r160_in1k are not on this machine"):
        build_model(SPEC, 5)


def test_a_checkpoint_of_an_encoder_says_that_it_is_one(tmp_path: Path) -> None:
    save_weights(network("test_resnet"), tmp_path / "whole.safetensors")
    with pytest.raises(MismatchError) as caught:
        build_model({"model": "timm:test_resnet", "weights": str(tmp_path / "whole.safetensors")}, 5, trained=True)
    assert "add `args: {features_only: true}`" in caught.value.fix


def test_a_file_without_some_of_the_weights_is_refused(published: Path) -> None:
    whole = load_file(published)
    save_file({key: value for key, value in whole.items() if not key.startswith("layer2")}, published)
    with pytest.raises(MismatchError, match=r"weights of timm:test_resnet@r160_in1k lacks \d+ tensors of .*layer2"):
        build_model(SPEC, 5)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"width": 0}, r"head of timm:test_resnet \(`args:`\):\n  width: "),
        ({"frozen": "maybe"}, r"  frozen: Input should be a valid boolean"),
        ({"widht": 3}, "unexpected keyword argument 'widht'"),
        ({"out_indices": [9]}, r"has 5 maps, at 1/2, 1/4, 1/8, 1/16, 1/32 .* out_indices is \[9\]"),
        ({"frozen": True}, "is frozen, and has random weights"),
        ({"features_only": False}, "width in the args of timm:test_resnet is of the head of an encoder"),
    ],
)
def test_arguments_that_the_head_or_the_encoder_do_not_take(args: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        network("test_resnet", **{"width": 8, **args})
    assert ("did you mean width?" in caught.value.fix) == ("widht" in args)


def test_images_of_another_size_than_a_transformer_takes_are_refused_with_the_argument() -> None:
    with pytest.raises(MismatchError, match="made for images of 160 x 160 pixels, and these have 64 x 96") as caught:
        network("test_vit")(torch.rand(1, 3, 64, 96))
    assert "img_size: [64, 96]" in caught.value.fix


def test_a_teacher_with_a_new_head_is_not_dumped(published: Path) -> None:
    assert published.is_file()
    with pytest.raises(UsageError, match=r"the teacher timm:test_resnet@r160_in1k has no weights"):
        build_model(SPEC, 5, trained=True)


def pipeline(**teacher: Any) -> Pipeline:
    train = {"epochs": 1, "batch_size": 60, "num_workers": 0}
    outputs = {"pixels": {"kind": "classes", "places": "grid", "source": "head.classifier"}}
    return Pipeline.model_validate(
        {
            "dataset": {"name": "scenes"},
            "teacher": {**SPEC, "train": train, **teacher},
            "cache": {"logits": False, "outputs": outputs, "num_workers": 0},
            "student": {"model": "timm:test_resnet", "args": {"features_only": True, "width": 8}, "train": train},
            "loss": {"name": "kd"},
        }
    )


def test_teacher_and_student_are_trained_through_a_cache(published: Path, tmp_path: Path) -> None:
    taught = train_teacher(pipeline(), tmp_path / "teacher")
    published.unlink()
    complete = pipeline(weights=str(tmp_path / "teacher" / "model.safetensors"))
    loaded = load_teacher(complete)
    images = torch.rand(2, 3, 48, 96)
    assert torch.equal(loaded.model.eval()(images), taught.model.eval()(images))
    cache = dump_teacher(
        loaded.model,
        load_split(complete.dataset, "train"),
        tmp_path / "c.kdcache",
        name=loaded.identity,
        transform=loaded.transform,
        spec=complete.cache,
    )
    assert cache.teacher("pixels")(torch.arange(2)).shape == (2, 8, 12, 24)
    student = train_student(complete, cache, tmp_path / "student")
    assert student.test is not None
    assert 0 < student.test.mean_iou < 1  # type: ignore[union-attr]


def test_a_classifier_is_told_how_to_become_an_encoder() -> None:
    spec = ModelSpec(model="timm:test_resnet")
    classifier = pipeline().model_copy(update={"teacher": pipeline().section("teacher").model_copy(update=dict(spec))})
    with pytest.raises(MismatchError) as caught:
        train_teacher(classifier, Path("never"))
    assert "args: {features_only: true}" in caught.value.fix
