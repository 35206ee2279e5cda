"""What the tests of the losses share: drawn batches, the published values, losses by their options, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.paths import REFERENCE
from kdcache.losses import Loss

TAU = st.floats(0.05, 100)
REFERENCES = ["losses_c10.npz", "losses_c100.npz"]
some = settings(max_examples=60, deadline=None)
few = settings(max_examples=12, deadline=None)

Batch = tuple[Tensor, Tensor, Tensor]
Reference = dict[str, Tensor]


def published(name: str) -> Reference:
    with np.load(REFERENCE / name) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Batch:
    """Student's and teacher's logits and labels; the teacher is right on about half of the labeled samples."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    shape = draw(st.integers(1, 8)), draw(st.integers(2, 40))
    student, teacher = (
        torch.randn(shape, generator=generator, dtype=dtype) * draw(st.sampled_from([0.01, 1.0, 10.0]))
        + draw(st.sampled_from([0.0, 20.0, -20.0]))
        for _ in range(2)
    )
    anything = torch.randint(-1, shape[1], shape[:1], generator=generator)
    right = torch.rand(shape[0], generator=generator) < 0.5
    return student, teacher, torch.where(right & (anything >= 0), teacher.argmax(dim=1), anything)


def loss_of(name: str = "kd", **given: Any) -> Loss:
    return Loss.model_validate({"name": name, **given})


def teacher_alone(rule: str = "constant", **options: Any) -> Loss:
    return loss_of(ce_weight=0, kd_weight=1, temperature={"kind": rule, **options})


def with_gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_agree(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_all_agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-9) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_agree(one, other, tolerance)


def unlabeled(logits: Tensor) -> Tensor:
    return torch.full((len(logits),), -1)
