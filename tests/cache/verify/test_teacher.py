"""The teacher, run again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.caches import Made
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor

from kdcache import dump_teacher
from kdcache.config.cache import CacheSpec
from kdcache.dump.check_teacher import compare_with_teacher
from kdcache.errors import MismatchError
from kdcache.models import weights_digest


class Mirrored(TinyTeacher):
    """The same weights, and another use of them."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flip(3))


class OneClassFarBelow(TinyTeacher):
    """In 255ths of their range, its logits are hardly told apart."""

    def forward(self, images: Tensor) -> Tensor:
        return 0.2 * super().forward(images) - 300 * (torch.arange(10) == 9)


def dense_figures(live: Tensor, cached: Tensor, t: float) -> list[float]:
    """What `TeacherAgreement` holds of a view at a temperature, from logits in float64."""
    live, cached = live.double(), cached.double()
    p, p_cached = (np.exp(x.numpy() / t) / np.exp(x.numpy() / t).sum(axis=1, keepdims=True) for x in (live, cached))
    gradients = []
    for logits in (live, cached):
        student = torch.zeros_like(live, requires_grad=True)
        log_q = (student / t).log_softmax(1)
        (t * t * torch.nn.functional.kl_div(log_q, (logits / t).softmax(1), reduction="sum")).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        gradients.append(student.grad)
    return [
        float(np.abs(p - p_cached).sum(axis=1).mean() / 2),
        float((p * np.log(p / p_cached)).sum(axis=1).mean()),
        float((live.argmax(1) == cached.argmax(1)).double().mean()),
        float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    ]


@pytest.mark.parametrize(("tail", "rank"), [("lowrank", 3), ("uniform", None)])
def test_figures_against_the_live_teacher_are_those_of_the_dense_logits(
    tail: str, rank: int | None, tmp_path: Path
) -> None:
    samples, teacher = tiny_samples(), TinyTeacher()
    spec = CacheSpec.model_validate({"top_k": 2, "tail": tail, "rank": rank, "views": 2, "shard_rows": 8})
    made = Made(dump_teacher(teacher, samples, tmp_path / "c.kdcache", transform=FLIP, spec=spec), samples, teacher)
    found = compare_with_teacher(made.cache, teacher, samples, rows=1000)
    assert [(one.view, one.temperature, one.rows) for one in found] == [
        (v, t, 37) for v in (0, 1) for t in (1, 2, 4, 8)
    ]
    answers = made.cache.teacher()
    for one in found:
        expected = dense_figures(made.live(one.view), answers(torch.arange(37), one.view), one.temperature)
        assert list(one[3:]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(one.total_variation for one in found) > 1e-3, "a cache without loss shows nothing"


def test_rows_that_the_teacher_runs_on_are_spread(tmp_path: Path) -> None:
    samples, teacher = tiny_samples(), TinyTeacher()
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache")
    shown: list[int] = []
    teacher.register_forward_pre_hook(lambda _, given: shown.extend((given[0][:, 0, 0, 0] * 8).int().tolist()))
    assert {one.rows for one in compare_with_teacher(cache, teacher, samples, rows=5)} == {5}
    assert [sample * 5 // 37 for sample in shown] == [0, 1, 2, 3, 4]


def test_a_teacher_of_other_weights_is_refused(seen: Made) -> None:
    other = TinyTeacher(seed=2)
    with pytest.raises(MismatchError) as caught:
        compare_with_teacher(seen.cache, other, seen.samples)
    assert weights_digest(other) in caught.value.what
    assert seen.cache.manifest.plan.teacher.weights_digest in caught.value.what


def test_a_teacher_of_other_behavior_is_refused(seen: Made) -> None:
    with pytest.raises(MismatchError, match="in view 0 the teacher's logits are not those of the cache") as caught:
        compare_with_teacher(seen.cache, Mirrored(), seen.samples)
    live, cached = Mirrored()(seen.images(0)), seen.live(0)
    variation = (live.softmax(1) - cached.softmax(1)).abs().sum(1).mean() / 2
    same = (live.argmax(1) == cached.argmax(1)).float().mean()
    assert f"{variation:.4f} at T = 1, the same class in {same:.1%} of 100 rows" in caught.value.what


def test_what_an_encoding_loses_accuses_no_teacher(tmp_path: Path) -> None:
    samples, teacher = tiny_samples(), OneClassFarBelow()
    cache = dump_teacher(teacher, samples, tmp_path / "c.kdcache", spec=CacheSpec(dtype="uint8"))
    found = compare_with_teacher(cache, teacher, samples)
    assert found[0].total_variation > 0.05
    cached = cache.teacher()(torch.arange(37))
    live = Made(cache, samples, teacher).live()
    assert list(found[0][3:]) == pytest.approx(dense_figures(live, cached, 1), rel=1e-3)
