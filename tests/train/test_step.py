"""A step is a step: of the whole batch, however many processes share it, and in however many pieces it is gone through.

The reference is the loop that anybody would write: one network, one batch, one backward pass.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.processes import exit_code
from helpers.teachers import FunctionTeacher
from helpers.tiny import TinyTeacher, tiny_samples
from helpers.trainers import meeting_place, together
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from kdcache.config.schema import DatasetSpec, TrainSpec
from kdcache.config.transform import Transform
from kdcache.data.datasets import load_split
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.losses import Loss, distillation_loss, learned_temperature
from kdcache.models.evaluate import SplitScore, evaluate
from kdcache.models.small import SmallCNN, SmallMLP
from kdcache.train.batches import check_groups
from kdcache.train.loop import AnyEpoch, fit, view_of_epoch
from kdcache.train.optim import rate
from kdcache.train.step import Trainer

# 37 images in batches of 13, 13 and 11; three in ten of them without a label.
COUNT, BATCH, EPOCHS = 37, 13, 2
LABELS = [-1 if i % 10 in (1, 4, 8) else (3 * i + 1) % 10 for i in range(COUNT)]
SPEC = TrainSpec(epochs=EPOCHS, batch_size=BATCH, lr=0.2, max_grad_norm=0.2)
AS_THEY_ARE: Transform = []
MIXUP: Transform = [{"MixUp": {"alpha": 0.5}}]


class Case(NamedTuple):
    loss: dict[str, Any]
    spec: TrainSpec = SPEC
    transform: Transform = AS_THEY_ARE

    @property
    def of(self) -> Loss:
        return Loss.model_validate(self.loss)


SMOOTHED = SPEC.model_copy(update={"label_smoothing": 0.1})
CTKD = {"name": "ctkd", "temperature": {"ramp_epochs": 1.0}}
CASES = {
    "ce, smoothed": Case({"name": "ce"}, SMOOTHED),
    "kd": Case({"name": "kd"}),
    "dtkd": Case({"name": "dtkd", "warmup_epochs": 0.0}),
    "dkd": Case({"name": "dkd", "warmup_epochs": 0.0}),
    "dtd": Case({"name": "dtd"}),
    "cwsm": Case({"name": "cwsm"}),
    "dist": Case({"name": "dist"}),
    "dtd+dist": Case({"name": "dtd+dist"}),
    "cskd": Case({"name": "cskd"}),
    "comparative": Case({"name": "comparative"}),
    "ctkd": Case(CTKD),
    "ctkd+dist": Case({**CTKD, "name": "ctkd+dist"}),
    "kd, mixed": Case({"name": "kd"}, SMOOTHED, MIXUP),
    "dtd+dist, mixed": Case({"name": "dtd+dist"}, SMOOTHED, MIXUP),
    "ce, mixed": Case({"name": "ce"}, SPEC, MIXUP),
}


def samples() -> Samples:
    return tiny_samples(COUNT, labels=LABELS)


def live(ids: Tensor, view: int) -> Tensor:
    with torch.no_grad():
        logits: Tensor = TinyTeacher()(View(samples(), []).__getitems__(ids.tolist()).images)
    return logits / 4


class Double(nn.Module):
    """In float64, so that what differs is no rounding; DTD makes much of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images.double())
        return logits


class Outcome(NamedTuple):
    weights: list[Tensor]
    losses: list[list[float]]
    """Of each step: total, of the labels, of the teacher."""


def order_of(number: int, seed: int = 0) -> Tensor:
    return torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))


def by_hand(case: Case) -> Outcome:
    model, theta, train = Double(), learned_temperature(case.of), View(samples(), case.transform)
    learned = [*model.parameters(), *([] if theta is None else [theta])]
    optimizer = SGD(learned, lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses: list[list[float]] = []
    clipped = 0
    for number in range(1, EPOCHS + 1):
        for ids in torch.split(order_of(number), BATCH):
            batch = train.__getitems__(ids.tolist())
            parts = distillation_loss(
                model(batch.images), live(ids, 0), batch.labels, case.of, number, batch.mixed, theta,
                label_smoothing=case.spec.label_smoothing,
            )  # fmt: skip
            optimizer.zero_grad()
            torch.autograd.backward(parts.total)
            clipped += bool(torch.nn.utils.clip_grad_norm_(learned, 0.2) > 0.2)
            optimizer.param_groups[0]["lr"] = 0.2 * rate(len(losses), 3, SPEC)
            optimizer.step()
            losses.append([value.item() for value in parts])
    assert clipped, "no gradient was too large"
    return Outcome([value.detach() for value in learned], losses)


def by_the_trainer(case: Case, accumulate: int) -> Outcome:
    model, train = Double(), View(samples(), case.transform)
    trainer = Trainer(model, case.spec.model_copy(update={"gradient_accumulation_steps": accumulate}), case.of, COUNT)
    steps = [
        step
        for number in range(1, EPOCHS + 1)
        for step in trainer.epoch(train, number, FunctionTeacher(live, COUNT) if case.of.uses_teacher else None)
    ]
    learned = [*model.parameters(), *([] if trainer.theta is None else [trainer.theta])]
    return Outcome([value.detach() for value in learned], [[value.item() for value in step] for step in steps])


def check_same(found: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-6, atol=1e-7)
    assert len(found.losses) == len(expected.losses) == 3 * EPOCHS
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_in_micro_batches_equals_the_step_of_the_whole_batch(name: str, accumulate: int) -> None:
    expected = by_hand(CASES[name])
    first, last = expected.losses[0][0], expected.losses[-1][0]
    assert abs(first - last) > 0.02, "nothing was learned, so the comparison says little"
    check_same(by_the_trainer(CASES[name], accumulate), expected)


@pytest.mark.parametrize("name", ["dtd", "cwsm", "dist", "dtd+dist", "ctkd+dist", "cskd", "comparative"])
def test_a_loss_of_the_batch_gets_the_logits_of_all_micro_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loss, "is_of_the_batch", property(lambda _: False))
    found, expected = by_the_trainer(CASES[name], 3), by_hand(CASES[name])
    gap = max(float((ours - theirs).abs().max()) for ours, theirs in zip(found.weights, expected.weights, strict=True))
    assert gap > 1e-5


def test_mixed_images_whose_partners_alone_lack_labels() -> None:
    labels = torch.ones(COUNT, dtype=torch.int64)
    labels[order_of(1)[:6]] = -1  # all in the first batch
    train = View(samples(), MIXUP, labels=labels)
    spec = TrainSpec(batch_size=BATCH, lr=1e-9)
    steps = Trainer(Double(), spec, Loss.model_validate({"name": "ce"}), COUNT).epoch(train, 1)
    missing = 0
    for step, ids in zip(steps, torch.split(order_of(1), BATCH), strict=True):
        batch = train.__getitems__(ids.tolist())
        assert batch.mixed is not None
        told = torch.zeros(len(ids), 11)
        told[range(len(ids)), batch.labels] += batch.mixed.share
        told[range(len(ids)), batch.mixed.partner_labels] += 1 - batch.mixed.share
        missing += bool((batch.labels >= 0).all() and (batch.mixed.partner_labels < 0).any())
        ce = -(told[:, :10] * Double()(batch.images).log_softmax(dim=1)).sum() / told[:, :10].sum()
        assert step.cross_entropy.item() == pytest.approx(ce.item(), rel=1e-5)
    assert missing, "no batch has all labels of its own and not all of its partners"


class Drawing(nn.Module):
    """Batch norm and dropout, and a memory of what came out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 10)
        )
        self.said: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        self.said.append(logits.detach().clone())
        return logits


def test_both_passes_over_the_micro_batches_are_equal_and_leave_the_state_of_one() -> None:
    model, train = Drawing(), View(samples(), [])
    twin = copy.deepcopy(model)
    trainer = Trainer(model, TrainSpec(batch_size=COUNT, gradient_accumulation_steps=3), CASES["dtd+dist"].of, COUNT)
    torch.manual_seed(6)
    trainer.epoch(train, 1, FunctionTeacher(live, COUNT))
    ended = torch.get_rng_state()
    assert len(model.said) == 6
    for first, second in zip(model.said[:3], model.said[3:], strict=True):
        assert torch.equal(first, second)
    torch.manual_seed(6)
    for ids in torch.tensor_split(order_of(1), 3):
        twin(train.__getitems__(ids.tolist()).images)
    assert torch.equal(torch.get_rng_state(), ended)
    for said, expected in zip(model.said[3:], twin.said, strict=True):
        torch.testing.assert_close(said, expected)
    for value, expected in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(value, expected)


def test_smoothed_labels_are_those_of_torch() -> None:
    train, spec = View(samples(), []), SMOOTHED.model_copy(update={"gradient_accumulation_steps": 3})
    steps = Trainer(Double(), spec, CASES["ce, smoothed"].of, COUNT).epoch(train, 1)
    batch = train.__getitems__(order_of(1)[:BATCH].tolist())
    expected = F.cross_entropy(Double()(batch.images), batch.labels, ignore_index=-1, label_smoothing=0.1)
    assert steps[0].total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"a batch of 2 images cannot be divided into 3 micro-batches \(1 processes, "
    ) as caught:
        Trainer(Double(), TrainSpec(batch_size=3, gradient_accumulation_steps=3), CASES["kd"].of, 2)
    assert "lower train.gradient_accumulation_steps" in caught.value.fix


def in_pairs() -> Loss:
    return Loss.model_validate({"name": "comparative", "divergence": {"group_size": 2}})


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulate", "size"), [(37, 13, 1, 13), (37, 12, 3, 37 - 36), (21, 10, 2, 1)]
)
def test_a_batch_without_whole_groups_is_refused(count: int, batch_size: int, accumulate: int, size: int) -> None:
    spec = TrainSpec(batch_size=batch_size, gradient_accumulation_steps=accumulate)
    if size == 1 and accumulate > 1:  # the last batch is left out
        assert Trainer(Double(), spec, in_pairs(), count).steps == count // batch_size
        return
    with pytest.raises(UsageError, match=rf"^a batch of {size} images cannot be divided into groups of 2 ") as caught:
        Trainer(Double(), spec, in_pairs(), count)
    assert "group_size 1" in caught.value.fix


@pytest.mark.parametrize(
    ("sizes", "ranks", "words"), [([3, 3], 1, ""), ([2, 4], 2, ""), ([3, 3], 2, "micro-batch of 3")]
)
def test_a_group_is_in_one_process(sizes: list[int], ranks: int, words: str) -> None:
    cuts = [tuple(torch.zeros(size) for size in sizes)]
    if not words:
        check_groups(cuts, ranks, in_pairs())
        return
    with pytest.raises(UsageError, match=words):
        check_groups(cuts, ranks, in_pairs())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_groups_that_micro_batches_divide_are_those_of_the_batch(accumulate: int) -> None:
    spec = TrainSpec(batch_size=10, gradient_accumulation_steps=accumulate)  # in three: 4, 3 and 3
    model, train = Double(), View(samples(), [])
    ids = torch.randperm(20, generator=torch.Generator().manual_seed(1))[:10]
    batch = train.__getitems__(ids.tolist())
    apart = Double()(batch.images) - live(ids, 0)
    means = [(apart[i] + apart[i + 1]) / 2 for i in range(0, 10, 2)]
    pairs = [(a - b).square().mean() for a, b in itertools.permutations(means, 2)]
    expected = torch.stack(pairs).mean().item()
    step = Trainer(model, spec, in_pairs(), 20).epoch(train, 1, FunctionTeacher(live, 20))[0]
    assert step.distillation.item() == pytest.approx(expected, rel=1e-6)


def noisy_outcome(seed: int) -> list[Tensor]:
    model, train = Double(), View(samples(), [])
    trainer = Trainer(model, SPEC, Loss.model_validate({"name": "noisy"}), COUNT)
    torch.manual_seed(seed)
    trainer.epoch(train, 1, FunctionTeacher(live, COUNT))
    return [value.detach() for value in model.parameters()]


def test_the_noise_of_a_teacher_is_drawn_from_the_generator_of_training() -> None:
    for one, same, other in zip(noisy_outcome(1), noisy_outcome(1), noisy_outcome(2), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_a_short_last_batch_with_micro_batches_of_one_is_left_out() -> None:
    def steps(count: int, batch_size: int, accumulate: int) -> int:
        spec = TrainSpec(batch_size=batch_size, gradient_accumulation_steps=accumulate)
        return Trainer(Double(), spec, CASES["kd"].of, count).steps

    assert [steps(count, 13, 3) for count in (18, 19, 26)] == [1, 2, 2]
    assert [steps(count, 4, 4) for count in (35, 36, 3 + 1)] == [8, 9, 1]
    assert steps(9, 1, 1) == 9


# Several processes.

SHARED = ["ce, smoothed", "kd", "dkd", "dtd+dist", "ctkd", "ctkd+dist", "kd, mixed", "cskd", "comparative"]


def as_a_rank(rank: int, environment: dict[str, str], out: Path, names: list[str], pieces: list[int]) -> None:
    os.environ.update(environment)
    found = {(name, accumulate): by_the_trainer(CASES[name], accumulate) for name in names for accumulate in pieces}
    torch.save({key: tuple(outcome) for key, outcome in found.items()}, out / f"{rank}.pt")


@pytest.mark.parametrize(("count", "pieces", "names"), [(2, [1, 2], SHARED), (3, [1], ["dtd+dist", "kd, mixed"])])
def test_processes_that_share_a_batch_give_what_one_gives(
    count: int, pieces: list[int], names: list[str], tmp_path: Path
) -> None:
    store = meeting_place()
    processes = together(store, count, as_a_rank, tmp_path, names, pieces)
    assert [exit_code(process) for process in processes] == [0] * count
    for name in names:
        expected = by_hand(CASES[name])
        for accumulate in pieces:
            for rank in range(count):
                found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name, accumulate]
                check_same(Outcome(*found), expected)


# What else a step does.


def digits() -> Samples:
    return load_split(DatasetSpec(name="digits"), "train")


def test_the_average_is_that_of_the_weights_and_of_running_statistics_and_integers_are_copied() -> None:
    """Decay 0.9, at which torch's own mean of two equal integers is often one less."""

    class Indexed(Drawing):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(100))

    model, train, steps = Indexed(), View(samples(), []), []
    spec = TrainSpec(batch_size=BATCH, lr=0.5, ema_decay=0.9)
    trainer = Trainer(model, spec, CASES["ce, smoothed"].of, COUNT)

    def keep() -> None:
        steps.append(copy.deepcopy(model.state_dict()))

    for number in (1, 2):
        trainer.epoch(train, number, on_step=keep)
        keep()  # of the last step it is not told
    expected = steps[0]
    for now in steps[1:]:
        for name, value in now.items():
            expected[name] = 0.9 * expected[name] + 0.1 * value if value.is_floating_point() else value
    assert len(steps) == 6
    for name, value in trainer.selected.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        if value.numel() > 1 and value.is_floating_point():
            assert not torch.allclose(value, steps[-1][name], rtol=1e-3), "the average is the last of them"
    assert set(trainer.selected.model.state_dict()) == set(model.state_dict())


def test_the_ema_weights_are_validated_and_saved() -> None:
    train = View(digits(), digits().transform)
    model, rows = SmallMLP(10, 1, 8, 8), list[AnyEpoch]()
    frozen = copy.deepcopy(model)
    spec = TrainSpec(epochs=1, ema_decay=0.999999, batch_size=1000)
    done = fit(model, train, train, spec, CASES["ce, smoothed"].of, on_epoch=rows.append)
    # One step: the average begins with the weights after it.
    assert evaluate(model, train) == SplitScore(done.best.validation_accuracy or 0, done.best.validation_loss or 0)
    fit(frozen, train, train, spec.model_copy(update={"epochs": 2, "ema_decay": 0.999999}), CASES["ce, smoothed"].of)
    for ours, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_early_stopping_after_patience_epochs_without_improvement() -> None:
    seen = View(digits(), digits().transform)
    rows: list[AnyEpoch] = []
    # After the first step, which is 0.5 long, none moves a weight: no epoch is better than the first.
    spec = TrainSpec.model_validate(
        {"epochs": 20, "early_stopping_patience": 3, "batch_size": 500, "lr": 0.5, "momentum": 0, "weight_decay": 0,
         "schedule": "multistep", "milestones": [1], "gamma": 1e-12}
    )  # fmt: skip
    torch.manual_seed(0)
    done = fit(SmallMLP(10, 1, 8, 8), seen, seen, spec, CASES["ce, smoothed"].of, on_epoch=rows.append)
    assert [row.epoch for row in rows] == [1, 2, 3, 4]
    assert done.best.epoch == 1
    assert len({row.validation_accuracy for row in rows}) == 1


def test_without_a_validation_split_patience_never_ends_a_run() -> None:
    spec = TrainSpec(epochs=4, early_stopping_patience=1, batch_size=BATCH)
    done = fit(Double(), View(samples(), []), None, spec, CASES["ce, smoothed"].of)
    assert (len(done.epochs), done.best.epoch) == (4, 4)


def test_random_views_are_drawn_with_the_seed_and_cycled_ones_come_in_turn() -> None:
    def views(seed: int, count: int, order: str = "random") -> list[int]:
        spec = TrainSpec.model_validate({"seed": seed, "view_order": order})
        return [view_of_epoch(epoch, count, spec) for epoch in range(1, 101)]

    assert views(0, 3, "cycle") == [*(3 * [0, 1, 2] * 11), 0]
    assert set(views(0, 3)) == {0, 1, 2}
    assert views(0, 3) == views(0, 3) != views(1, 3)
    assert min(views(0, 3).count(view) for view in range(3)) > 15
    assert [view_of_epoch(epoch, None, TrainSpec(view_order="random")) for epoch in (1, 2, 9)] == [0, 1, 8]


def test_an_epoch_sees_the_view_that_was_drawn_for_it() -> None:
    asked: list[int] = []

    def answers(ids: Tensor, view: int) -> Tensor:
        asked.append(view)
        return torch.zeros(len(ids), 10)

    spec = TrainSpec(epochs=8, batch_size=COUNT, view_order="random", seed=4)
    train = View(samples(), [])
    done = fit(Double(), train, None, spec, CASES["kd"].of, teacher=FunctionTeacher(answers, COUNT), views=5)
    assert asked == [row.view for row in done.epochs] == [view_of_epoch(epoch, 5, spec) for epoch in range(1, 9)]
    assert len(set(asked)) > 2


# Precision, layout, compilation.


class Watched(nn.Module):
    """Predictions what its layers compute in, while it is trained and while it is validated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.network = SmallCNN(10, 1, width=4)
        self.dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        self.dtypes[self.training].add(logits.dtype)
        return logits


def test_bf16_is_for_training_alone_and_the_network_stays_as_it_was() -> None:
    train = View(digits(), digits().transform)
    seen: list[set[torch.dtype]] = []
    for precision in ("fp32", "bf16", "fp32"):
        model = Watched()
        zeros = FunctionTeacher(lambda ids, _: torch.zeros(len(ids), 10), len(train))
        spec = TrainSpec.model_validate({"epochs": 2, "batch_size": 100, "precision": precision, "ema_decay": 0.5})
        done = fit(model, train, train, spec, CASES["kd"].of, teacher=zeros)
        assert done.epochs[-1].cross_entropy < 2.3
        assert model.dtypes == {
            True: {torch.bfloat16 if precision == "bf16" else torch.float32}, False: set()
        }, "validated is the average, a copy"  # fmt: skip
        assert "forward" not in vars(model)
        assert type(model) is Watched
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        seen.append(model.dtypes[True])
        assert model.eval()(train[0].images).dtype == torch.float32
    assert seen == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


def test_validation_of_a_bf16_run_is_in_float32() -> None:
    train, model = View(digits(), digits().transform), Watched()
    fit(model, train, train, TrainSpec(epochs=1, precision="bf16"), CASES["ce, smoothed"].of)
    assert model.dtypes == {True: {torch.bfloat16}, False: {torch.float32}}


def test_fp16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="fp16 needs a GPU") as caught:
        Trainer(Double(), TrainSpec(precision="fp16"), CASES["kd"].of, COUNT)
    assert "bf16" in caught.value.fix


def trained_convolutions(**options: Any) -> tuple[SmallCNN, list[AnyEpoch]]:
    torch.manual_seed(3)
    model = SmallCNN(10, 1, width=4)
    spec = TrainSpec.model_validate({"epochs": 1, "batch_size": 200, **options})
    train = View(digits(), digits().transform)
    return model, fit(model, train, None, spec, CASES["ce, smoothed"].of).epochs


def test_channels_last_is_another_layout_of_the_same() -> None:
    (plain, rows), (laid_out, others) = trained_convolutions(), trained_convolutions(channels_last=True)
    (kernel, other), last = (next(m.features[3].parameters()) for m in (laid_out, plain)), torch.channels_last
    assert kernel.is_contiguous(memory_format=last) and not other.is_contiguous(memory_format=last)
    assert others[0].loss == pytest.approx(rows[0].loss, rel=1e-4)
    for value, expected in zip(laid_out.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo asks for it, and hides it elsewhere
def test_compile_compiles_the_network_in_place_and_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    functions: list[object] = []
    compile_function = torch.compile

    def of_function(function: Any, **options: Any) -> Any:
        functions.append(function)
        return compile_function(function, **{"backend": "eager"} | options)

    monkeypatch.setattr(torch, "compile", of_function)
    real: Callable[..., None] = nn.Module.compile

    def watched(module: nn.Module, **_: object) -> None:
        compiled.append(module)
        real(module, backend="eager")  # needs no compiler

    monkeypatch.setattr(nn.Module, "compile", watched)
    (plain, rows), none = trained_convolutions(), len(compiled)
    model, others = trained_convolutions(compile=True)
    assert (none, compiled) == (0, [model])
    assert functions.count(distillation_loss) == 1
    assert list(model.state_dict()) == list(plain.state_dict())
    assert others[0].loss == pytest.approx(rows[0].loss, rel=1e-5)
