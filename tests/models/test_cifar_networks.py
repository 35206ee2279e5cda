"""The networks of the papers' CIFAR-100 pairs, held against those whose checkpoints they must load."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcache.config.schema import ModelSpec
from kdcache.data.images import ArrayImages
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.models import build_model
from kdcache.models.checks import try_network
from kdcache.models.cifar import NETWORKS

# Of mdistiller's own code (megvii-research/mdistiller at a08d46f, mdistiller/models/cifar), with 100 classes: how many
# parameters, how many tensors in the state dict, the digest of its sorted names and shapes, and the logits of the
# classes 0 and 99 that it computes in float64 for the second image of `images` with the weights of `fill`.
PUBLISHED: dict[str, tuple[int, int, str, float, float]] = {
    "resnet56": (861620, 344, "2fac08358d132b70", -262223.19, -271931.27),
    "resnet110": (1736564, 668, "c6e9176cff1a7fee", -1.9429612e12, 3.9530467e12),
    "resnet32x4": (7433860, 206, "632a5be2e9d2198d", -43403.967, 41284.196),
    "ResNet50": (23705252, 320, "1383964ae529a18c", -7.3221543, 1.0364519),
    "wrn_40_2": (2255156, 227, "cf299ba03b832625", 6601.7754, 150942.08),
    "vgg13": (9462180, 72, "7ff3cbdb2a68220a", 2.548004, 1.5480832),
    "resnet8": (83892, 56, "c7e36ff449432b48", 0.31803621, 0.62514623),
    "resnet14": (181108, 92, "dc881d5570e2148d", -0.58080895, -0.75795737),
    "resnet20": (278324, 128, "649926fcf6240e69", 5.5943515, 3.5151418),
    "resnet32": (472756, 200, "eee1916dfc5fb1e3", -166.81073, -120.75986),
    "resnet44": (667188, 272, "f532b91b42661858", 5918.8302, 5998.9114),
    "resnet8x4": (1233540, 62, "c7572c24d425e097", -0.15412281, 0.66817191),
    "wrn_16_1": (180916, 82, "c86622e01c0182ef", 0.14009501, 0.58743696),
    "wrn_16_2": (703284, 83, "e6a57f3ddf2bbfc4", 0.51841772, 5.2446439),
    "wrn_40_1": (569780, 226, "d0752782d5324ce6", 9.5842903, 353.71082),
    "vgg8": (3965028, 37, "af0a4ac2401e1baa", 1.503781, 0.92425697),
    "vgg11": (9277284, 58, "c01653e99717593a", 1.5346421, 1.0201636),
    "vgg16": (14774436, 93, "671ffc473361af0f", 2.4262272, 1.4412227),
    "vgg19": (20086692, 114, "68d64a6eacb282aa", -1.853323, -1.19807),
    "MobileNetV2": (812836, 320, "da613af71c09a1df", 1.0887257, -2.7001903),
    "ShuffleNetV1": (949258, 296, "a6a7e5aaad503399", -2.1481549, -3.4426954),
    "ShuffleNetV2": (1355528, 338, "453a84f2a0f166f6", 1.3842206, 1.5256643),
}

SOME_NAMES = {
    "resnet56": ["conv1.weight", "layer2.0.downsample.0.weight", "layer3.8.bn2.running_mean", "fc.bias"],
    "resnet8x4": ["layer1.0.downsample.1.weight"],
    "ResNet50": ["layer1.0.shortcut.0.weight", "layer4.2.bn3.bias", "linear.weight"],
    "wrn_40_2": ["block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.weight", "bn1.bias", "fc.weight"],
    "vgg13": ["block0.0.bias", "block0.4.weight", "block4.3.weight", "classifier.bias"],
    "MobileNetV2": ["conv1.0.weight", "blocks.3.3.conv.7.bias", "conv2.1.weight", "classifier.0.weight"],
    "ShuffleNetV1": ["layer2.7.conv3.weight", "linear.bias"],
    "ShuffleNetV2": ["layer1.0.conv5.weight", "layer3.3.bn3.bias", "conv2.weight", "linear.bias"],
}


def network(name: str, classes: int = 100, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    return build_model(ModelSpec(model=f"cifar:{name}"), classes, shape)


def images() -> Tensor:
    return torch.sin(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) * 0.37).reshape(2, 3, 32, 32)


def fill(model: nn.Module) -> None:
    """Weights that every implementation with the same names and shapes gets alike."""
    state = model.state_dict()
    for number, key in enumerate(sorted(state)):
        tensor = state[key]
        wave = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + number).reshape(tensor.shape)
        if tensor.dim() > 1:
            tensor.copy_(wave * (2 / tensor[0].numel()) ** 0.5)
        elif key.endswith("running_var"):
            tensor.copy_(1 + wave / 2)
        elif tensor.dim() == 1:
            tensor.copy_(wave * 0.1 + (0.5 if key.endswith("weight") else 0))


def test_all_published_networks_are_there() -> None:
    assert NETWORKS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_logits_are_the_published_ones(name: str) -> None:
    parameters, tensors, digest, first, last = PUBLISHED[name]
    model = network(name).double().eval()
    state = model.state_dict()
    assert set(SOME_NAMES.get(name, [])) <= state.keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(state) == tensors
    listed = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(state.items()))
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == digest
    fill(model)
    with torch.no_grad():
        logits = model(images())[1]
    assert logits[[0, 99]].tolist() == pytest.approx([first, last], rel=1e-6)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_checkpoint_as_mdistiller_publishes_it_loads_as_it_is(legacy: bool, tmp_path: Path) -> None:
    model = network("resnet8")
    path = tmp_path / "ckpt_epoch_240.pth"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    held = {"epoch": 240, "model": model.state_dict(), "accuracy": torch.tensor(60.0)}
    torch.save({**held, "optimizer": optimizer.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    spec = ModelSpec(model="cifar:resnet8", weights=str(path))
    loaded = build_model(spec, 100, (3, 32, 32), trained=True).eval()
    seen = images().float()
    assert torch.equal(loaded(seen), model.eval()(seen))
    with pytest.raises(MismatchError, match=r"of another shape: fc.weight \[100, 64\], the network has \[10, 64\]"):
        build_model(spec, 10, (3, 32, 32), trained=True)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleNetV1", "ShuffleNetV2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 30, 41), (3, 64, 64)])
def test_images_of_other_sizes_and_grey_ones_are_taken(name: str, shape: tuple[int, int, int]) -> None:
    assert network(name, 7, shape).train()(torch.rand(2, *shape)).shape == (2, 7)


def test_grey_images_are_the_same_as_three_equal_channels() -> None:
    model = network("resnet8").eval()
    gray = torch.rand(2, 1, 32, 32)
    assert torch.equal(model(gray), model(gray.repeat(1, 3, 1, 1)))


def test_what_a_network_cannot_take_is_refused() -> None:
    with pytest.raises(UsageError, match="no network cifar:resnet50") as caught:
        network("resnet50")
    assert "ResNet50" in caught.value.fix
    with pytest.raises(MismatchError, match="takes 1 or 3 channels, the images have 4"):
        network("vgg8", shape=(4, 32, 32))
    with pytest.raises(UsageError, match=r"cannot be built: TypeError: .*'widen'"):
        build_model(ModelSpec(model="cifar:resnet8", args={"widen": 2}), 100, (3, 32, 32))
    samples = Samples(
        "tiny", "train", ArrayImages(torch.rand(1, 3, 7, 7)), torch.zeros(1).int().numpy(), ("0", "1"), []
    )
    with pytest.raises(MismatchError, match=r"the student cannot take images \[3, 7, 7\]"):
        try_network(network("vgg8", 2), View(samples, []), "cpu", "student")


@pytest.mark.parametrize("name", ["resnet20", "ResNet50", "wrn_16_2", "vgg13", "MobileNetV2"])
def test_convolutions_are_drawn_by_the_number_of_their_outputs(name: str) -> None:
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            outputs = module.out_channels * module.kernel_size[0] ** 2  # grouped ones as the authors count them
            assert float(module.weight.detach().std()) == pytest.approx((2 / outputs) ** 0.5, rel=0.1)
