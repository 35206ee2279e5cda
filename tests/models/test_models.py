"""Networks by name, and their checkpoints: torchvision's stay torchvision's, and what does not fit is named."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import sys
import textwrap
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models as tv

from kdcache.config.schema import DatasetSpec, ModelSpec
from kdcache.data.datasets import load_split
from kdcache.data.images import ArrayImages
from kdcache.data.samples import Samples
from kdcache.data.transforms import build_transform
from kdcache.data.views import View
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.models import build_model, load_weights, preset_transform, save_weights, weights_digest
from kdcache.models.checks import check_logits, try_network
from kdcache.models.evaluate import evaluate

timm: Any = import_module("timm")  # whose types are not whole
GRAY = (1, 8, 8)


def network(model: str, classes: int = 7, shape: tuple[int, int, int] = GRAY, **spec: Any) -> nn.Module:
    return build_model(ModelSpec(model=model, **spec), classes, shape, trained="weights" in spec)


def refused(kind: type[KdcacheError], words: str, make: Callable[..., object], *args: Any, **options: Any) -> str:
    """The fix of the error that `make` raises."""
    with pytest.raises(kind, match=words) as caught:
        make(*args, **options)
    assert caught.value.exit_code == {UsageError: 2, MismatchError: 4, CorruptError: 5}[kind]
    return caught.value.fix


# torchvision


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vgg11"])
def test_a_torchvision_network_takes_small_grey_images_and_stays_itself(name: str) -> None:
    quick = {"init_weights": False} if name == "vgg11" else {}  # its 130 million weights take seconds to draw
    model = network(f"torchvision:{name}", args=quick).eval()
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 7)
    assert model(torch.rand(2, 3, 40, 33)).shape == (2, 7)
    with torch.device("meta"):
        own = tv.get_model(name, num_classes=7)
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert list(model.state_dict()) == list(shapes)


def test_large_color_images_reach_the_network_unchanged() -> None:
    model = network("torchvision:squeezenet1_1", shape=(3, 40, 40)).eval()
    with torch.random.fork_rng():
        own = tv.squeezenet1_1(num_classes=7).eval()
    own.load_state_dict(model.state_dict())
    for shape in [(2, 3, 40, 40), (2, 3, 32, 57)]:
        images = torch.rand(shape)
        assert torch.equal(model(images), own(images))


def test_small_grey_images_are_repeated_and_enlarged() -> None:
    model = network("torchvision:squeezenet1_1").eval()
    own = copy.deepcopy(model)
    own._forward_pre_hooks.clear()
    images = torch.rand(2, 1, 8, 8)
    # Bilinear, as Pillow enlarges a picture of floats.
    large = [
        np.asarray(Image.fromarray(image[0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)) for image in images
    ]
    assert torch.allclose(model(images), own(torch.from_numpy(np.stack(large))[:, None].repeat(1, 3, 1, 1)), atol=1e-5)


# One of each family; on the meta device there are shapes and no numbers, so that even the largest is built at once.
FAMILIES = ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
            "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x0_5",
            "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "vit_h_14"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_torchvision_takes_small_grey_images(name: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception_v3 announce another initialization
        model = network(f"torchvision:{name}")
        for mode in (True, False):
            assert model.train(mode)(torch.rand(2, 1, 8, 8)).shape == (2, 7)


def test_images_of_every_size_are_enlarged_to_the_size_that_a_transformer_takes() -> None:
    with torch.device("meta"):
        default = network("torchvision:vit_b_32").eval()
        small = network("torchvision:vit_b_32", args={"image_size": 64}).eval()
        # Of these, 224 / side * side is less than 224 in floating point.
        for side in (1, 31, 55, 71, 83, 95, 107, 111, 142, 190, 222, 224):
            assert default(torch.rand(1, 1, side, side)).shape == (1, 7)
        assert small(torch.rand(1, 1, 8, 8)).shape == (1, 7)
        with pytest.raises(AssertionError, match="Wrong image width"):
            default(torch.rand(1, 1, 8, 16))


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        ("resnet18", {}, "unknown model 'resnet18'"),
        ("resnet18@IMAGENET1K_V1", {}, "unknown model 'resnet18@IMAGENET1K_V1'"),
        ("torchvision:resnet19", {}, "no network 'resnet19' that classifies images"),
        ("torchvision:", {}, "no network ''"),
        ("torchvision:raft_small", {}, "no network 'raft_small' that classifies images"),
        ("torchvision:resnet50@BEST", {}, "no weights 'BEST' of resnet50\nfix: it has IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:resnet50@", {}, "no weights '' of resnet50"),
        ("timm:resnet19", {}, "timm has no network 'resnet19'"),
        ("timm:", {}, "timm has no network ''"),
        ("timm:hf-hub:timm/resnet18", {}, "timm has no network 'hf-hub:timm/resnet18'"),
        ("timm:resnet18@best", {}, "timm has no weights 'best' of resnet18\nfix: it has a1_in1k, "),
        ("timm:resnet18@", {}, "timm has no weights '' of resnet18"),
        ("timm:resnet18.a1_in1k", {}, "names weights in timm's notation\nfix: write timm:resnet18@a1_in1k instead"),
        ("timm:vit_base_patch14_dinov2@lvd142m", {}, "are of a network without classes"),
        (
            "timm:resnet18",
            {"num_classes": 3},
            "cannot be built: `args:` sets 'num_classes' to 3, and kdcache sets it to 7",
        ),
        (
            "timm:resnet18",
            {"pretrained": True},
            "cannot be built: `args:` sets 'pretrained' to True, and kdcache sets it to False",
        ),
        ("timm:resnet18", {"depth": 3}, r"cannot be built: TypeError: .*'depth' \(.*:\d+\)"),
        ("torchvision:resnet18", {"depth": 3}, r"cannot be built: TypeError: .*'depth' \(.*:\d+\)"),
        (
            "torchvision:resnet18",
            {"num_classes": 3},
            "cannot be built: `args:` sets 'num_classes' to 3, and kdcache sets it to 7",
        ),
        ("torchvision:resnet18", {"groups": 2}, "cannot be built: ValueError: "),
        ("torchvision:resnet18", {"width_per_group": 0}, "cannot be built: ValueError: BasicBlock"),
        ("small:rnn", {}, "no small network 'rnn'"),
        ("small:cnn", {"width": -1}, "cannot be built: RuntimeError: .*negative dimension"),
        ("small:mlp", {"height": 3}, "cannot be built: `args:` sets 'height' to 3, and kdcache sets it to 8"),
    ],
)
def test_a_network_that_cannot_be_is_refused(model: str, args: dict[str, Any], words: str) -> None:
    assert refused(UsageError, words, network, model, args=args)


def test_networks_of_libraries_take_one_or_three_channels() -> None:
    for model in ("torchvision:resnet18", "timm:resnet18"):
        refused(MismatchError, "takes 1 or 3 channels, the images have 4", network, model, shape=(4, 8, 8))
    words = "takes 1 or 4 channels, the images have 3"
    refused(MismatchError, words, network, "timm:resnet18", shape=(3, 8, 8), args={"in_chans": 4})


# timm


def test_a_timm_network_takes_small_grey_images_and_stays_itself() -> None:
    model = network("timm:test_resnet").eval()
    own = timm.create_model("test_resnet", num_classes=7).eval()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in own.state_dict().items()
    }
    own.load_state_dict(model.state_dict())
    large = torch.rand(2, 3, 40, 33)
    assert torch.equal(model(large), own(large))
    gray = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(gray), own(nn.functional.interpolate(gray.repeat(1, 3, 1, 1), (32, 32), mode="bilinear")))


def test_a_timm_network_of_other_channels_takes_images_that_have_them() -> None:
    for channels in (1, 4):
        model = network("timm:test_resnet", shape=(channels, 40, 40), args={"in_chans": channels})
        assert model(torch.rand(2, channels, 40, 40)).shape == (2, 7)


# Convolutions, those that take images of one size only, and those whose strides want large ones.
TIMM_FAMILIES = ["resnet18", "convnext_tiny", "efficientnet_b0", "mobilenetv4_conv_small", "regnetx_002", "nfnet_f0",
                 "vit_base_patch16_224", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224", "mixer_b16_224",
                 "swinv2_tiny_window8_256", "maxvit_tiny_tf_224", "levit_128", "coat_tiny", "hiera_tiny_224",
                 "eva02_tiny_patch14_224", "gcvit_tiny", "mobilevit_xs", "fastvit_t8", "twins_pcpvt_small"]  # fmt: skip


@pytest.mark.parametrize("name", TIMM_FAMILIES)
def test_every_family_of_timm_takes_small_grey_images(name: str) -> None:
    with torch.device("meta"):
        assert network(f"timm:{name}").eval()(torch.rand(2, 1, 8, 8)).shape == (2, 7)


def test_a_timm_network_made_for_another_size_gets_images_of_it() -> None:
    with torch.device("meta"):
        for size in (64, [64, 96]):
            model = network("timm:vit_base_patch16_224", args={"img_size": size}).eval()
            assert model(torch.rand(2, 1, 8, 8 if size == 64 else 12)).shape == (2, 7)


def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for make in (network, lambda model: preset_transform(ModelSpec(model=model))):
        fix = refused(UsageError, "need the library timm", make, "timm:resnet18@a1_in1k")
        assert fix == "pip install 'kdcache[timm]'"
    assert "pip install 'kdcache[timm]'" in refused(UsageError, "need the library timm", network, "timm:resnet18")


# torchvision's weights


def trained(model: str, classes: int = 1000) -> nn.Module:
    return build_model(ModelSpec(model=model), classes, (3, 64, 64), trained=True)


def test_weights_that_cannot_be_downloaded_say_what_to_put_where(hub: Path) -> None:
    words = "weights of torchvision:squeezenet1_1@IMAGENET1K_V1 are not on this machine .*Name or service not known"
    fix = refused(UsageError, words, trained, "torchvision:squeezenet1_1@IMAGENET1K_V1")
    url = tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    assert fix == f"put {url} into {hub}"
    assert [path for path in hub.parent.rglob("*") if path.is_file()] == []


def test_weights_that_were_put_there_are_loaded(hub: Path) -> None:
    own = tv.squeezenet1_1()
    hub.mkdir(parents=True)
    path = hub / tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(own.state_dict(), path)
    model = trained("torchvision:squeezenet1_1@IMAGENET1K_V1")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), own.eval()(images))
    path.write_bytes(path.read_bytes()[:1000])
    refused(UsageError, "cannot be downloaded: .", trained, "torchvision:squeezenet1_1@IMAGENET1K_V1")


def test_weights_of_other_classes_are_refused_before_they_are_downloaded() -> None:
    for name, classes in [
        ("torchvision:resnet50@IMAGENET1K_V2", 1000),
        ("torchvision:vit_l_16@IMAGENET1K_SWAG_LINEAR_V1", 1000),
        ("timm:resnet18@a1_in1k", 1000),
        ("timm:vit_tiny_patch16_224@augreg_in21k", 21843),
    ]:
        words = f"{name} has {classes:,} classes, the data set has 10"
        assert "teacher.classes" in refused(MismatchError, words, trained, name, 10)


HUGGING_FACE = "https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors"


def test_timm_s_weights_that_cannot_be_downloaded_say_what_to_put_where(hub: Path) -> None:
    words = "weights of timm:test_resnet@r160_in1k are not on this machine and cannot be downloaded: .*cache"
    fix = refused(UsageError, words, trained, "timm:test_resnet@r160_in1k")
    assert fix == f"put {HUGGING_FACE} into {hub}, as test_resnet.r160_in1k.safetensors"
    fix = refused(UsageError, "cannot be downloaded: .*not known", trained, "timm:legacy_seresnet18@in1k")
    assert fix.endswith(f"/seresnet18-4bb0ce65.pth into {hub}, as seresnet18-4bb0ce65.pth")
    assert [path for path in hub.parent.rglob("*") if path.is_file()] == []


def test_timm_s_weights_that_were_put_there_are_loaded(hub: Path) -> None:
    own = timm.create_model("test_resnet")
    hub.mkdir(parents=True)
    path = hub / "test_resnet.r160_in1k.safetensors"
    save_file(own.state_dict(), path)
    model = trained("timm:test_resnet@r160_in1k")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), own.eval()(images))
    assert weights_digest(model) == weights_digest(own)
    assert "state_dict" not in vars(model)["pretrained_cfg"]
    path.write_bytes(path.read_bytes()[:1000])
    refused(CorruptError, f"cannot read the checkpoint {path}", trained, "timm:test_resnet@r160_in1k")
    save_file({"conv1.weight": torch.zeros(1)}, path)
    refused(UsageError, "cannot be built: .*", trained, "timm:test_resnet@r160_in1k")


def test_a_checkpoint_of_a_timm_network_is_loaded(tmp_path: Path) -> None:
    made = network("timm:test_resnet")
    save_weights(made, tmp_path / "net.safetensors")
    assert same(network("timm:test_resnet", weights=str(tmp_path / "net.safetensors")), made)


def test_training_from_scratch_takes_no_trained_weights() -> None:
    words = "names trained weights, and training starts from random ones"
    fix = refused(UsageError, words, network, "torchvision:resnet18@IMAGENET1K_V1", 1000)
    assert "torchvision:resnet18," in fix


def test_a_teacher_without_weights_is_refused(tmp_path: Path) -> None:
    for model in ("small:cnn", "torchvision:resnet18", "timm:resnet18"):
        assert "train-teacher" in refused(UsageError, "has no weights", trained, model)
    # A name that is not known is the first thing to report.
    refused(UsageError, "no small network 'a@b'", trained, "small:a@b")
    refused(UsageError, "did you mean mobilenet_v3_small", trained, "torchvision:mobilenet_v3_smal")
    refused(UsageError, "no network 'resnet1O'", trained, "timm:resnet1O")


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))


def test_the_preset_of_resnet50_v2_resizes_to_232() -> None:
    steps = preset_transform(ModelSpec(model="torchvision:resnet50@IMAGENET1K_V2"))
    assert steps is not None
    assert steps[:2] == [{"Resize": {"size": [232], "interpolation": "bilinear"}}, {"CenterCrop": {"size": 224}}]


def test_the_preset_of_every_torchvision_weights_is_torchvision_s_own() -> None:
    # Many weights share a preset; each is tried once.
    presets = {
        repr(weights.transforms()): (f"torchvision:{name}@{weights.name}", weights)
        for name in tv.list_models(module=tv)
        for weights in tv.get_model_weights(name)
    }
    assert len(presets) > 20
    for name, weights in presets.values():
        steps = preset_transform(ModelSpec(model=name))
        assert steps is not None
        ours, theirs = build_transform(steps)(PHOTO), weights.transforms()(PHOTO)
        assert ours.shape == theirs.shape
        # Torchvision divides by 255 there and multiplies by 1 / 255 here: the last bit may differ.
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6, name


def test_the_preset_of_every_timm_weights_is_timm_s_own() -> None:
    presets = {}
    for full in timm.list_pretrained():
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(full).to_dict())
        if config["input_size"][1] <= 256 or config["crop_mode"] == "border":  # the others only take longer
            presets[repr(config)] = full, config
    assert len(presets) > 50
    refusals = 0
    for full, config in presets.values():
        spec = ModelSpec(model="timm:" + full.replace(".", "@", 1))
        if config["crop_mode"] == "border":
            refused(UsageError, "torchvision has no transform like", preset_transform, spec)
            refusals += 1
            continue
        steps = preset_transform(spec)
        assert steps is not None
        ours, theirs = build_transform(steps)(PHOTO), timm.data.create_transform(**config)(PHOTO)
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-6, full
    assert 0 < refusals < len(presets) / 5


def test_the_preset_of_a_timm_network_for_another_size_is_of_that_size() -> None:
    for size in (384, [384, 384]):
        steps = preset_transform(ModelSpec(model="timm:vit_base_patch16_224@augreg_in21k", args={"img_size": size}))
        assert steps is not None
        assert build_transform(steps)(PHOTO).shape == (3, 384, 384)


def test_what_names_no_weights_has_no_preset() -> None:
    for model in ("torchvision:resnet50", "timm:resnet50", "small:cnn", "a@b.py:make"):
        assert preset_transform(ModelSpec(model=model)) is None


# Networks of our own, and of the user


@pytest.mark.parametrize("model", ["small:cnn", "small:mlp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 24), (5, 9, 7)])
def test_the_small_networks_take_any_images(model: str, shape: tuple[int, int, int]) -> None:
    narrow, wide = (network(model, 4, shape, args={"width": width}) for width in (4, 16))
    assert narrow(torch.rand(6, *shape)).shape == wide(torch.rand(6, *shape)).shape == (6, 4)
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in wide.parameters())


def python(folder: Path, text: str) -> str:
    path = folder / "net.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_function_in_a_file_makes_the_network(tmp_path: Path) -> None:
    path = python(
        tmp_path,
        """
        from __future__ import annotations
        from dataclasses import dataclass
        import torch

        @dataclass
        class Options:
            bias: bool

        def make(num_classes: int, bias: bool = True) -> torch.nn.Module:
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes, bias=Options(bias).bias))
        """,
    )
    model = network(f"{path}:make", args={"bias": False})
    assert list(model.state_dict()) == ["1.weight"]
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 7)


@pytest.mark.parametrize(
    ("text", "words", "fix"),
    [
        ("def make(num_classes):\n    return 'net'", "returned a str", "return a torch.nn.Module"),
        ("def make(num_classes):\n    return 1 / 0", r"ZeroDivisionError: division by zero \(.*net.py:2\)", "function"),
        ("def make(n):\n    return n", "TypeError: .*missing 1 required positional argument: 'n'", "args"),
        ("def make(num_classes):\n    open('/nowhere/at/all')", "FileNotFoundError: .*nowhere", "function"),
        ("def other(): pass\nclass Net: pass\n_x = print", "net.py has no function 'make'", "it has: other, Net"),
        ("make = 3", "net.py has no function 'make'", "it has: none"),
        (
            "import nothing_of_that_name",
            r"net.py cannot be run: ModuleNotFoundError: .*nothing_of.* \(.*net.py:1\)",
            "correct that file",
        ),
        (
            "x = 1\ndef make(:",
            r"net.py cannot be run: SyntaxError: .*net.py, line 2.* \(.*net.py:2\)",
            "correct that file",
        ),
        ("x = {}\nx['a']", r"net.py cannot be run: KeyError: 'a' \(.*net.py:2\)", "correct that file"),
    ],
)
def test_a_file_that_makes_no_network_is_refused(text: str, words: str, fix: str, tmp_path: Path) -> None:
    assert fix in refused(UsageError, words, network, f"{python(tmp_path, text)}:make")


def test_a_function_in_a_file_may_use_our_own_errors(tmp_path: Path) -> None:
    path = python(
        tmp_path,
        """
        from pathlib import Path
        from kdcache.models import load_weights

        def make(num_classes):
            load_weights(None, Path("no.safetensors"))
        """,
    )
    with pytest.raises(UsageError) as caught:
        network(f"{path}:make")
    assert caught.value.what == "checkpoint not found: no.safetensors"


def test_a_file_or_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(UsageError, f"file not found: {tmp_path}/no.py, of the model", network, f"{tmp_path}/no.py:make")
    path = python(tmp_path, "def make(num_classes): pass")
    refused(UsageError, "has no function ''", network, path)


# Checkpoints


class Everything(nn.Module):
    """Parameters and buffers of several types, one of them a scalar and one empty."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=random))
        self.low = nn.Parameter(torch.randn(5, generator=random).to(torch.bfloat16))
        self.register_buffer("count", torch.randint(9, (), generator=random))
        self.register_buffer("mask", torch.rand(6, generator=random) > 0.5)
        self.register_buffer("table", torch.randint(-9, 9, (2, 2), generator=random).to(torch.int16))
        self.register_buffer("empty", torch.zeros(0, 3))


def save_torch(state: Any, path: Path) -> None:
    torch.save(state, path)


def save_legacy(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_safe(state: Any, path: Path) -> None:
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)


def save_pickle(held: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(held, protocol=2))


FORMATS = [(save_torch, "net.pt"), (save_legacy, "net.pth"), (save_safe, "net.safetensors")]


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(
        mine[key].dtype == its[key].dtype and torch.equal(mine[key], its[key]) for key in mine
    )


@pytest.mark.parametrize(("save", "name"), FORMATS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_in_any_format_gives_the_weights_back(
    save: Callable[[Any, Path], None], name: str, prefix: str, tmp_path: Path
) -> None:
    save({prefix + key: value for key, value in Everything(1).state_dict().items()}, tmp_path / name)
    model = Everything(2)
    assert not same(model, Everything(1))
    load_weights(model, tmp_path / name)
    assert same(model, Everything(1))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_may_be_wrapped_with_other_things(wrapper: str, tmp_path: Path) -> None:
    torch.save({wrapper: Everything(1).state_dict(), "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "net.pt")
    model = Everything(2)
    load_weights(model, tmp_path / "net.pt")
    assert same(model, Everything(1))


def test_a_network_with_a_part_called_module_keeps_its_name(tmp_path: Path) -> None:
    def wrapped(seed: int) -> nn.Module:
        return nn.ModuleDict({"module": Everything(seed)})

    torch.save(wrapped(1).state_dict(), tmp_path / "net.pt")
    model = wrapped(2)
    load_weights(model, tmp_path / "net.pt")
    assert same(model, wrapped(1))


def test_saved_weights_are_safetensors_and_nothing_else_is_left(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight  # two names for one tensor
    for name, model in (("one", Everything(1)), ("tied", tied)):
        save_weights(model, tmp_path / f"{name}.safetensors")
        stored = load_file(tmp_path / f"{name}.safetensors")
        assert stored.keys() == model.state_dict().keys()
        assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "tied.safetensors"]


def test_a_teacher_is_built_with_its_checkpoint(tmp_path: Path) -> None:
    made = network("small:cnn", args={"width": 4})
    save_weights(made, tmp_path / "net.safetensors")
    assert same(network("small:cnn", args={"width": 4}, weights=str(tmp_path / "net.safetensors")), made)
    words = r"of another shape: .*\[4, 1, 3, 3\], the network has \[8, 1, 3, 3\]"
    refused(MismatchError, words, network, "small:cnn", args={"width": 8}, weights=str(tmp_path / "net.safetensors"))


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        assert "train-teacher" in refused(UsageError, f"checkpoint not found: {path}", load_weights, Everything(), path)


def test_a_checkpoint_that_does_not_fit_names_the_first_keys(tmp_path: Path) -> None:
    state = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]).state_dict()
    state["0.weight"] = torch.zeros(5, 2)
    del state["1.bias"]
    state.update({f"extra{i}": torch.zeros(1) for i in range(5)})
    torch.save(state, tmp_path / "net.pt")
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    before = copy.deepcopy(model)
    with pytest.raises(MismatchError) as caught:
        load_weights(model, tmp_path / "net.pt")
    assert caught.value.what.splitlines() == [
        f"the checkpoint {tmp_path}/net.pt does not fit the network:",
        "  missing: 1.bias",
        "  unexpected: extra0; extra1; extra2 and 2 more",
        "  of another shape: 0.weight [5, 2], the network has [2, 2]",
    ]
    assert caught.value.exit_code == 4
    assert same(model, before)


@pytest.mark.parametrize(("save", "name"), FORMATS)
def test_a_truncated_checkpoint_is_refused(save: Callable[[Any, Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    save(Everything(1).state_dict(), path)
    data = path.read_bytes()
    model = Everything(2)
    for length in [*range(0, len(data) - 1, max(1, len(data) // 40)), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(CorruptError, f"cannot read the checkpoint {path}: .", load_weights, model, path)
    assert same(model, Everything(2))


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), which=st.integers(0, 2))
def test_a_damaged_checkpoint_is_never_a_crash(
    place: float, byte: int, which: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save, name = FORMATS[which]
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    save(Everything(1).state_dict(), path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] = byte
    path.write_bytes(data)
    try:
        load_weights(Everything(2), path)
    except KdcacheError as error:
        assert error.exit_code in (4, 5)  # either is right, and so is no error


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [save_torch, save_legacy, save_pickle])
def test_code_in_a_checkpoint_is_refused_and_not_run(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    save({"weight": torch.zeros(1), "code": Touch(touched)}, tmp_path / "net.pt")
    words = r"holds more than tensors \(\S+\), which is not loaded"
    fix = refused(CorruptError, words, load_weights, Everything(), tmp_path / "net.pt")
    assert "torch.save(model.state_dict(), path)" in fix
    assert not touched.exists()


@pytest.mark.parametrize("held", [[1, 2], {"epoch": 3}, {0: torch.zeros(1)}, torch.zeros(3), {"state_dict": {"a": 1}}])
def test_a_checkpoint_of_something_else_is_refused(held: object, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "net.pt")
    refused(CorruptError, "holds no state dict of tensors", load_weights, Everything(), tmp_path / "net.pt")


# Digests of weights


def documented_digest(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes, sorted by name, as the docstring says; bytes by way of Python."""
    sha = hashlib.sha256()
    for key in sorted(model.state_dict()):
        value = model.state_dict()[key]
        sha.update(f"{key}\0{value.dtype}\0{list(value.shape)}\0".encode())
        sha.update(bytes(value.clone().untyped_storage().tolist()))
    return "sha256:" + sha.hexdigest()


def test_the_digest_is_that_of_names_types_shapes_and_bytes() -> None:
    for model in (Everything(1), network("small:cnn", args={"width": 2})):
        assert weights_digest(model) == documented_digest(model)


@pytest.mark.parametrize(("save", "name"), FORMATS)
def test_the_digest_does_not_depend_on_the_file(save: Callable[[Any, Path], None], name: str, tmp_path: Path) -> None:
    state = Everything(1).state_dict()
    save(dict(reversed(state.items())), tmp_path / name)
    model = Everything(2)
    load_weights(model, tmp_path / name)
    assert weights_digest(model) == weights_digest(Everything(1)) != weights_digest(Everything(2))


def test_the_digest_changes_with_every_parameter_and_buffer() -> None:
    seen = {weights_digest(Everything(1))}
    for key, value in Everything(1).state_dict().items():
        if not value.numel():
            continue
        model = Everything(1)
        held = model.state_dict()[key].view(-1)
        held[-1] = ~held[-1] if held.dtype == torch.bool else held[-1] + 1
        seen.add(weights_digest(model))
    renamed = nn.Module()
    renamed.register_buffer("a", torch.zeros(2, 3))
    for buffer in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3)):
        other = nn.Module()
        other.register_buffer("a" if buffer.shape == (3, 2) or buffer.dtype == torch.int32 else "b", buffer)
        assert weights_digest(other) != weights_digest(renamed)
    assert len(seen) == 6


def test_the_digest_does_not_see_how_a_tensor_lies_in_memory() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(one.state_dict())
    other.weight = nn.Parameter(one.weight.detach().t().contiguous().t())
    assert not other.weight.is_contiguous()
    assert weights_digest(one) == weights_digest(other)


# How good a network is


class Table(nn.Module):
    """Predictions of each image the row of a table that its first pixel names."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen_training: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen_training.append(self.training)
        return self.logits[images[:, 0, 0, 0].long()]


def numbered(labels: list[int], classes: int) -> View:
    pixels = torch.arange(len(labels), dtype=torch.float32).reshape(-1, 1, 1, 1)
    names = tuple(str(c) for c in range(classes))
    return View(Samples("mine", "test", ArrayImages(pixels), np.array(labels, np.int32), names, []), [])


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(-1, 4), min_size=1, max_size=30), seed=st.integers(0, 999), batch=st.integers(1, 9))
def test_accuracy_and_loss_are_those_of_a_plain_count(labels: list[int], seed: int, batch: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(len(labels), 5)).astype(np.float32)
    model = Table(torch.from_numpy(logits)).train()
    known = [i for i, label in enumerate(labels) if label >= 0]
    if not known:
        refused(UsageError, "no sample of mine/test has a label", evaluate, model, numbered(labels, 5))
        return
    score = evaluate(model, numbered(labels, 5), batch_size=batch)
    right = sum(int(np.argmax(logits[i]) == labels[i]) for i in known)
    loss = sum(np.log(np.exp(logits[i].astype(float)).sum()) - logits[i, labels[i]] for i in known)
    assert score.accuracy == right / len(known)
    assert score.loss == pytest.approx(loss / len(known), rel=1e-5)
    assert model.training
    assert not any(model.seen_training)


def test_a_network_that_does_not_fit_is_found_on_the_first_image() -> None:
    view = View(
        load_split(DatasetSpec(name="digits"), "test"), load_split(DatasetSpec(name="digits"), "test").transform
    )
    try_network(network("small:cnn", 10), view, "cpu", "student")
    refused(
        MismatchError,
        r"the student cannot take images \[1, 8, 8\]",
        try_network,
        nn.Linear(3, 10),
        view,
        "cpu",
        "student",
    )
    words = r"the teacher returned \[1, 7\] for 1 image, the data set has 10 classes"
    refused(MismatchError, words, try_network, network("small:cnn", 7), view, "cpu", "teacher")
    with torch.device("meta"):
        transformer = tv.vit_b_32(num_classes=10)  # of torchvision's own, without our enlarging of images
    refused(
        MismatchError, "cannot take images .*: Wrong image height", try_network, transformer, view, "meta", "teacher"
    )


def test_what_is_no_logits_is_refused() -> None:
    logits = torch.zeros(4, 3)
    assert check_logits(logits, 4, 3, "teacher") is logits
    for other, words in [
        ((logits,), "returned a tuple"),
        ({"out": logits}, "returned a dict"),
        (None, "returned a NoneType"),
        (torch.zeros(3, 4), r"returned \[3, 4\] for 4 images"),
        (torch.zeros(4, 3, 1), r"returned \[4, 3, 1\]"),
        (torch.zeros(3), r"returned \[3\]"),
    ]:
        refused(MismatchError, f"the teacher {words}", check_logits, other, 4, 3, "teacher")
