"""A function whose network has other random weights in every process cannot be the teacher of a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import kdcache
from kdcache.errors import UsageError
from kdcache.models.repeatable_weights import built_with_same_weights

RANDOM = {
    "torch's generator": "return torch.nn.Linear(4, num_classes)",
    "NumPy's generator": "net.weight.data = torch.tensor(numpy.random.randn(num_classes, 4)).float()\n    return net",
    "Python's generator": "net.weight.data.fill_(random.random())\n    return net",
    "one layer of several": (
        "torch.manual_seed(0)\n    body = torch.nn.Linear(4, 4)\n    torch.seed()\n"
        "    return torch.nn.Sequential(body, torch.nn.Linear(4, num_classes))"
    ),
    "a buffer": "net.register_buffer('noise', torch.rand(3))\n    return net",
}
SAME = {
    "nothing drawn": "return net",
    "a seed of its own": "torch.manual_seed(3)\n    return torch.nn.Linear(4, num_classes)",
    "initialized, then loaded": (
        "made = torch.nn.Linear(4, num_classes)\n    made.load_state_dict(state)\n    return made"
    ),
    "a generator of its own": (
        "own = torch.Generator().manual_seed(1)\n"
        "    net.weight.data = torch.randn(num_classes, 4, generator=own)\n    return net"
    ),
    "one network each time": "return kept",
}
HEAD = """import random
import numpy, torch
state = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
kept = torch.nn.Linear(4, 3)
def make(num_classes):
    net = torch.nn.utils.skip_init(torch.nn.Linear, 4, num_classes)
    net.load_state_dict(state)
    """


def built(tmp_path: Path, body: str, trained: bool = True) -> nn.Module:
    """Return the network of a function with a body."""
    (tmp_path / "net.py").write_text(HEAD + body + "\n")
    return kdcache.build_model(f"{tmp_path}/net.py:make", num_classes=3, shape=(4,), trained=trained)


@pytest.mark.parametrize("body", RANDOM.values(), ids=RANDOM)
def test_random_weights_are_refused_as_a_teacher_only(tmp_path: Path, body: str) -> None:
    with pytest.raises(UsageError, match=r"other random weights each time it is called: .*\nfix: set `weights:`"):
        built(tmp_path, body)
    assert isinstance(built(tmp_path, body, trained=False), nn.Module)


@pytest.mark.parametrize("body", SAME.values(), ids=SAME)
def test_weights_that_are_the_same_each_time_are_taken(tmp_path: Path, body: str) -> None:
    assert isinstance(built(tmp_path, body), nn.Module)


def test_weights_of_a_checkpoint_make_up_for_random_ones(tmp_path: Path) -> None:
    given = nn.Linear(4, 3)
    torch.save(given.state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.py").write_text(HEAD + RANDOM["torch's generator"] + "\n")
    spec = {"model": f"{tmp_path}/net.py:make", "weights": str(tmp_path / "w.pt")}
    network = kdcache.build_model(spec, num_classes=3, shape=(4,), trained=True)
    assert torch.equal(network.state_dict()["weight"], given.weight)


def test_the_first_part_that_differs_and_the_number_of_others_are_named() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    with pytest.raises(UsageError, match=r"it is called: 0\.weight and 3 others"):
        built_with_same_weights(net, "net.py:net", "fix")


def test_what_is_drawn_afterwards_does_not_depend_on_the_second_call() -> None:
    def drawn_after(make: Callable[[], nn.Module]) -> torch.Tensor:
        torch.manual_seed(5)
        make()
        return torch.rand(3)

    def loaded() -> nn.Module:
        net = nn.Linear(2, 2)
        for parameter in net.parameters():
            nn.init.ones_(parameter)
        return net

    assert torch.equal(drawn_after(loaded), drawn_after(lambda: built_with_same_weights(loaded, "n", "fix")))
