"""Teachers without their smallest weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from helpers.paths import ROOT
from torch import nn

import kdcache
from kdcache.config.schema import Pipeline
from kdcache.errors import UsageError
from kdcache.models import build_model, weights_digest
from kdcache.models.prune import prune
from kdcache.models.small import SmallCNN
from kdcache.models.teacher import load_teacher


@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("name", ["small", "resnet8", "linear"])
def test_each_layer_loses_its_smallest_weights_and_keeps_the_others(name: str, fraction: float) -> None:
    torch.manual_seed(1)
    networks: dict[str, nn.Module] = {
        "small": SmallCNN(10, channels=1),
        "resnet8": build_model("cifar:resnet8", 100),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    }
    network = networks[name]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    digest = weights_digest(network)
    prune(network, fraction)
    assert network.state_dict().keys() == before.keys()
    assert weights_digest(network) != digest
    layers = {f"{key}.weight" for key, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    for key, value in network.state_dict().items():
        old = before[key].numpy()
        if key in layers:
            limit = np.sort(np.abs(old), axis=None)[round(fraction * old.size)]
            old = np.where(np.abs(old) < limit, 0, old)
        np.testing.assert_array_equal(value.numpy(), old)


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(UsageError, match="no convolution and no linear layer") as caught:
        prune(nn.Flatten(), 0.1)
    assert caught.value.fix


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "teacher.pt"
    torch.manual_seed(2)
    torch.save(SmallCNN(10, channels=1).state_dict(), path)
    return path


def pipeline(*overrides: str) -> Pipeline:
    return kdcache.load_pipeline(ROOT / "pipelines" / "digits.yaml", list(overrides))


def test_a_pruned_teacher_is_another_teacher(weights: Path, tmp_path: Path) -> None:
    recipe, out = ROOT / "pipelines" / "digits.yaml", tmp_path / "teacher.kdcache"
    dump = ["dump-teacher", recipe, "--set", "teacher.model=small:cnn", "--set", f"teacher.weights={weights}", "-o"]
    ok(*dump, out)
    assert "teacher.weights_digest" in refused(2, *dump, out, "--set", "teacher.prune=0.1")
    ok(*dump, tmp_path / "pruned.kdcache", "--set", "teacher.prune=0.1")
    whole, pruned = (kdcache.open_cache(path).manifest.plan.teacher for path in (out, tmp_path / "pruned.kdcache"))
    assert pruned.weights_digest != whole.weights_digest
    assert pruned.arguments == {"args": whole.arguments, "prune": 0.1}


def test_a_teacher_and_its_pruned_self_are_an_ensemble(weights: Path) -> None:
    member = f"model: small:cnn, weights: {weights}"
    given = f"teacher={{ensemble: [{{{member}, weight: 0.7}}, {{{member}, prune: 0.1, weight: 0.3}}]}}"
    images = torch.rand(4, 1, 8, 8)
    both, whole, pruned = (
        load_teacher(pipeline(*overrides)).model.eval()
        for overrides in (
            [given],
            ["teacher.model=small:cnn", f"teacher.weights={weights}"],
            ["teacher.model=small:cnn", f"teacher.weights={weights}", "teacher.prune=0.1"],
        )
    )
    with torch.no_grad():
        expected = 0.7 * whole(images) + 0.3 * pruned(images)
        torch.testing.assert_close(both(images), expected)
        assert not torch.allclose(whole(images), pruned(images))
