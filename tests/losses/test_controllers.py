"""Controllers of the share and the temperature of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.losses import Loss, distillation_loss
from kdcache.losses.controllers import (
    ClassMeans,
    Control,
    InstanceTemperatureOptions,
    ShareController,
    TemperatureController,
    TGeoOptions,
)

B, C = 9, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(v: Tensor, u: Tensor, labels: Tensor, share: Tensor, temperature: Tensor) -> Tensor:
    """Sample by sample: 0.4 (1 - a) CE + 0.6 a T^2 KL."""
    total = torch.zeros((), dtype=v.dtype)
    for i in range(len(v)):
        p, q = (u[i] / temperature[i]).softmax(0), (v[i] / temperature[i]).softmax(0)
        kl = (p * (p.log() - q.log())).sum()
        total = (
            total + 0.4 * (1 - share[i]) * -v[i].log_softmax(0)[labels[i]] + 0.6 * share[i] * temperature[i] ** 2 * kl
        )
    return total / len(v)


@pytest.mark.parametrize("sets", ["share", "temperature", "both"])
def test_the_loss_of_each_sample_is_controlled(sets: str) -> None:
    v, u, labels = drawn(B, C).requires_grad_(), drawn(B, C, seed=1), torch.arange(B) % C
    share = drawn(B, seed=2).sigmoid().requires_grad_() if sets != "temperature" else None
    temperature = (1 + drawn(B, seed=3).sigmoid() * 5).requires_grad_() if sets != "share" else None
    loss = Loss.model_validate({"name": "kd", "ce_weight": 0.4, "kd_weight": 0.6})
    found = distillation_loss(v, u, labels, loss, control=Control(share, temperature)).total
    by_hand = plain(
        v,
        u,
        labels,
        torch.full((B,), 0.5, dtype=torch.float64) if share is None else share,
        torch.full((B,), 4.0, dtype=torch.float64) if temperature is None else temperature,
    )
    if share is None:  # without a share both terms are there in full
        by_hand = 2 * by_hand
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-12)
    inputs = [value for value in (v, share, temperature) if value is not None]
    for here, there in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(by_hand, inputs), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


def test_the_state_of_tgeo_is_that_of_its_code() -> None:
    """src/fusion_ratio_bilevel.py at 5a69cbe, option 3, with the mean of a class over all samples."""
    v, u, labels = drawn(B, C), drawn(B, C, seed=1), torch.arange(B) % C
    means = ClassMeans(C)
    for part in (slice(0, 5), slice(5, B)):
        means.add(u[part], labels[part])
    controller = ShareController(C, means.result().double()).double()
    student_pred_prob, teacher_pred_prob, gt_prob = (
        v.softmax(1),
        u.softmax(1),
        torch.eye(C, dtype=torch.float64)[labels],
    )
    avg_teacher_pred_prob = torch.zeros(B, C, dtype=torch.float64)
    for i in range(C):
        index = gt_prob[:, i] == 1
        avg_teacher_pred_prob[index] = teacher_pred_prob[index].mean(dim=0)
    dis_os = torch.square(avg_teacher_pred_prob - student_pred_prob)
    dis_gs = torch.square(gt_prob - student_pred_prob)
    dis_ts = torch.square(teacher_pred_prob - student_pred_prob)
    dis_tg = torch.square(teacher_pred_prob - gt_prob)
    dis_og = torch.square(avg_teacher_pred_prob - gt_prob)
    state = torch.cat(
        (student_pred_prob, teacher_pred_prob, gt_prob, avg_teacher_pred_prob, dis_os, dis_gs, dis_ts, dis_tg, dis_og),
        dim=1,
    )
    assert state.shape[1] == 9 * C
    found = controller(v, u, labels).share
    assert found is not None
    torch.testing.assert_close(found, torch.sigmoid(controller.layers(state)), rtol=0, atol=1e-7)


def test_a_sample_without_a_label_is_distilled_alone() -> None:
    controller = ShareController(C, torch.full((C, C), 1 / C)).double()
    share = controller(drawn(3, C), drawn(3, C, seed=1), torch.tensor([0, -1, 2])).share
    assert share is not None and share[1] == 1 and 0 < share[0] < 1
    v, u = drawn(3, C), drawn(3, C, seed=1)
    loss = Loss.model_validate({"name": "kd", "ce_weight": 1.0, "kd_weight": 1.0})
    labels = torch.tensor([0, -1, 2])
    found = distillation_loss(v, u, labels, loss, control=Control(share=share)).total
    of_labels = F.cross_entropy(v[[0, 2]], labels[[0, 2]], reduction="none")
    kl = 16 * F.kl_div((v / 4).log_softmax(1), (u / 4).softmax(1), reduction="none").sum(1)
    expected = ((1 - share[[0, 2]]) * of_labels).mean() + (share * kl).mean()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_temperatures_are_within_their_range_and_see_the_two_largest_probabilities() -> None:
    controller = TemperatureController(2.0, 6.0).double()
    v, u, labels = 5 * drawn(B, C), 5 * drawn(B, C, seed=1), torch.zeros(B, dtype=torch.long)
    found = controller(v, u, labels).temperature
    assert found is not None and bool(((found > 2) & (found < 6)).all())
    ordered = v.softmax(1).sort(dim=1).values
    state = torch.stack([ordered[:, -1], u.softmax(1).max(1).values, ordered[:, -1] - ordered[:, -2]], dim=1)
    torch.testing.assert_close(found, 2 + 4 * torch.sigmoid(controller.layers(state)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [TGeoOptions(), InstanceTemperatureOptions()])
def test_no_gradient_flows_back_to_the_student(options: Any) -> None:
    v, u = drawn(B, C).float().requires_grad_(), drawn(B, C, seed=1).float()
    control = options.make(C, torch.full((C, C), 1 / C))(v, u, torch.arange(B) % C)
    value = next(value for value in control if value is not None)
    assert torch.autograd.grad(value.sum(), v, allow_unused=True)[0] is None
    assert not any(value.requires_grad for value in control.detach() if value is not None)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"name": "ce", "controller": {"kind": "tgeo"}}, "would have no effect"),
        ({"name": "ctkd", "controller": {"kind": "tgeo"}}, "ctkd is learned, and the controller would be too"),
        ({"name": "dtkd", "controller": {"kind": "instance_temperature"}}, "sets the temperatures, and so does dtkd"),
        ({"name": "mse", "controller": {"kind": "instance_temperature"}}, "mse has none of its own per sample"),
        (
            {"name": "kd", "controller": {"kind": "instance_temperature", "low": 5.0, "high": 5.0}},
            "nothing between them",
        ),
        ({"name": "kd", "controller": {"kind": "ppo"}}, "'tgeo', 'instance_temperature', 'itkd'"),
        ({"name": "kd", "controller": {"kind": "tgeo", "low": 1.0}}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(loss: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Loss.model_validate(loss)


def test_a_class_without_samples_has_uniform_means() -> None:
    means = ClassMeans(3)
    means.add(torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 3.0]]), torch.tensor([1, -1]))
    torch.testing.assert_close(
        means.result(),
        torch.stack([torch.full((3,), 1 / 3), torch.tensor([1.0, 2.0, 0.0]).softmax(0), torch.full((3,), 1 / 3)]),
    )
