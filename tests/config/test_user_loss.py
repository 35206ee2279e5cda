"""A loss from a file of the user: how it is called, what is checked, and what a mistake in it leads to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.paths import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

import kdcache
from kdcache.config.loss import load_function, loss
from kdcache.errors import MismatchError, UsageError
from kdcache.losses.batch import MixedLabels
from kdcache.losses.config import Loss
from kdcache.losses.distillation import distillation_loss

GOOD = """
import torch
from torch.nn import functional as F

def kl(p, q):
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="none", log_target=True).sum(1)

def jeffreys(student_logits, teacher_logits, labels, share=0.5):
    return share * kl(teacher_logits, student_logits) + (1 - share) * kl(student_logits, teacher_logits)

def mean_of_jeffreys(student_logits, teacher_logits, labels, share=0.5):
    return jeffreys(student_logits, teacher_logits, labels, share).mean()

def squares(student_logits, teacher_logits, labels):
    return (student_logits - teacher_logits).square().sum(1)

jeffreys.acts_on_label = False
jeffreys.needs_level = False

class Sharp:
    def __call__(self, student_logits, teacher_logits, labels):
        return student_logits.amax(1)

sharp = Sharp()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_losses.py"
    path.write_text(GOOD)
    return path


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.tensor([0, 1, 2, 3, 4, -1])


def jeffreys(v: Tensor, u: Tensor, share: float) -> Tensor:
    p, q = u.softmax(1), v.softmax(1)
    return (share * p * (p / q).log() + (1 - share) * q * (q / p).log()).sum(1)


@pytest.mark.parametrize("name", ["jeffreys", "mean_of_jeffreys"])
def test_it_gets_raw_logits_and_its_options_and_is_averaged(name: str, file: Path) -> None:
    student, teacher, labels = batch()
    parts = loss(f"{file}:{name}", share=0.3, kd_weight=2.0, ce_weight=0.5)(student, teacher, labels)
    expected = 2 * jeffreys(student, teacher, 0.3).mean() + 0.5 * F.cross_entropy(student, labels, ignore_index=-1)
    torch.testing.assert_close(parts.total, expected)


def test_a_temperature_divides_the_logits_and_its_square_scales_the_values(file: Path) -> None:
    student, teacher, labels = batch()
    parts = loss(f"{file}:jeffreys", tau=4, kd_weight=1, ce_weight=0)(student, teacher, labels)
    torch.testing.assert_close(parts.total, 16 * jeffreys(student / 4, teacher / 4, 0.5).mean())


def test_normalization_and_adjustment_come_before_it(file: Path) -> None:
    student, teacher, labels = batch()
    custom = loss(f"{file}:squares", normalization="z_score", adjustment={"kind": "probability_shift"}, ce_weight=0)
    mse = loss("zscore+ka", divergence={"kind": "mse"}, temperature={"tau": 1.0}, ce_weight=0, kd_weight=9.0)
    torch.testing.assert_close(custom(student, teacher, labels).total, mse(student, teacher, labels).total)


@pytest.mark.parametrize("key", ["sharp", "Sharp()"])
def test_any_callable_will_do_and_others_are_named(key: str, file: Path) -> None:
    if key == "sharp":
        student, teacher, labels = batch()
        parts = loss(f"{file}:sharp", ce_weight=0, kd_weight=1)(student, teacher, labels)
        torch.testing.assert_close(parts.total, student.amax(1).mean())
        return
    with pytest.raises(UsageError, match="has no function 'Sharp\\(\\)'") as caught:
        loss(f"{file}:{key}")
    assert "jeffreys" in caught.value.fix


MISTAKES = {
    "returns a number": ("    return 3.0", r"my_losses.py:3: mine returned a float, not a tensor"),
    "returns a matrix": ("    return v - u", r"mine returned torch.float64 \[6, 10\] for 6 samples"),
    "returns integers": ("    return (v > u).sum(1)", r"mine returned torch.int64 \[6\] for 6 samples"),
    "returns another batch": ("    return v[:3].sum(1)", r"mine returned torch.float64 \[3\] for 6 samples"),
    "returns nothing": ("    v.sum(1)", r"mine returned a NoneType, not a tensor"),
    "detaches": ("    return v.detach().sum(1)", r"mine returned values without a gradient with respect to student"),
    "raises": ("    x = v.sum(1)\n    return x / {}['a']", r"raised KeyError: 'a' \(.*my_losses.py:5\)"),
    "raises inside torch": ("    return v @ u", r"raised RuntimeError: .*\(.*my_losses.py:4\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_inside_is_named_with_file_and_line(mistake: str, tmp_path: Path) -> None:
    body, message = MISTAKES[mistake]
    (tmp_path / "my_losses.py").write_text(f"import torch\n\ndef mine(v, u, labels):\n{body}\n")
    with pytest.raises(UsageError, match=message) as caught:
        loss(f"{tmp_path}/my_losses.py:mine")(*batch())
    assert "function(student_logits [B, C], teacher_logits [B, C], labels [B], **options)" in caught.value.fix


SIGNATURES = {
    "too few arguments": (
        "def mine(v, u): return v",
        {},
        r"my_losses.py:1: mine\(v, u\) cannot be called: too many",
    ),
    "an option that it needs": ("def mine(v, u, labels, share): ...", {}, "missing a required argument: 'share'"),
    "an unknown option": ("def mine(v, u, labels): ...", {"share": 1}, "got an unexpected keyword argument 'share'"),
    "no function": ("mine = 3", {}, "has no function 'mine'"),
    "another name": ("def other(): ...", {}, "has no function 'mine'"),
    "syntax": ("x = 1\ndef mine(:", {}, r"my_losses.py cannot be run: SyntaxError: .*my_losses.py:2\)"),
    "error at import": ("x = 1\nimport nothing_of_this_name", {}, r"ModuleNotFoundError: .*my_losses.py:2\)"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_wrong_file_or_signature_is_refused_before_any_batch(case: str, tmp_path: Path) -> None:
    text, options, message = SIGNATURES[case]
    (tmp_path / "my_losses.py").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        loss(f"{tmp_path}/my_losses.py:mine", **options)
    assert caught.value.exit_code == 2
    assert caught.value.fix


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"file not found: {tmp_path}/no.py, of the loss") as caught:
        loss(f"{tmp_path}/no.py:mine")
    assert "current folder" in caught.value.fix


@pytest.mark.parametrize(
    "given", [{"temperature": {"kind": "dtkd"}}, {"temperature": {"kind": "ctkd"}}, {"ce_weight": -1}]
)
def test_what_does_not_go_with_it_is_refused(given: dict[str, Any], file: Path) -> None:
    with pytest.raises(UsageError, match=r"needs a constant temperature|greater than or equal to 0"):
        loss(f"{file}:jeffreys", **given)


def test_its_traits_are_those_that_it_names_and_else_the_careful_ones(file: Path) -> None:
    assert loss(f"{file}:jeffreys").needs_level is None
    assert loss(f"{file}:jeffreys").options.acts_on_label is None
    squares = loss(f"{file}:squares")
    assert "needs_level = False" in (squares.needs_level or "")
    student, teacher, labels = batch()
    mixed = MixedLabels(labels, torch.full((6,), 0.5))
    with pytest.raises(ValueError, match="squares, unless it has an attribute acts_on_label = False, needs one label"):
        distillation_loss(student, teacher, labels, squares.options, mixed=mixed)


def test_the_section_reads_back_with_and_without_its_short_form(file: Path) -> None:
    short = Loss.model_validate({"name": f"{file}:jeffreys", "share": 0.3, "ce_weight": 0.2})
    assert Loss.model_validate(short.model_dump()) == short
    assert short.model_dump()["divergence"] == {
        "kind": "function", "function": f"{file}:jeffreys", "options": {"share": 0.3}
    }  # fmt: skip
    with pytest.raises(ValueError, match="is not loaded"):
        distillation_loss(*batch(), short)
    assert load_function(short).divergence.bind() is not None


def pipeline(file: Path, *overrides: str) -> kdcache.Pipeline:
    recipe = ROOT / "pipelines" / "digits.yaml"
    section = f"loss={{name: '{file}:jeffreys', share: 0.3}}"
    return kdcache.load_pipeline(recipe, ["student.train.epochs=2", section, *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> kdcache.Cache:
    samples = kdcache.load_split(kdcache.load_pipeline(ROOT / "pipelines" / "digits.yaml").dataset, "train")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return kdcache.dump_teacher(model, samples, tmp_path_factory.mktemp("cache") / "digits.kdcache")


def test_a_student_is_trained_with_it(file: Path, cache: kdcache.Cache, tmp_path: Path) -> None:
    result = kdcache.train_student(pipeline(file), cache, tmp_path / "run")
    assert result.test is not None
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["loss"] == f"{file}:jeffreys"
    resolved = kdcache.load_pipeline(tmp_path / "run" / "resolved.yaml")
    assert resolved.loss == pipeline(file).loss


def test_a_missing_option_is_refused_before_training(file: Path, cache: kdcache.Cache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unexpected keyword argument 'sharp'"):
        kdcache.train_student(pipeline(file, "loss.sharp=1"), cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_code(
    file: Path, cache: kdcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdcache.train.run_folder.Run.finish", interrupted)
    with pytest.raises(kdcache.InterruptedRun, match="interrupted"):
        kdcache.train_student(pipeline(file), cache, tmp_path / "run")
    monkeypatch.undo()
    file.write_text(GOOD + "# changed\n")
    with pytest.raises(MismatchError, match=r"code.*was sha256:.*is sha256:"):
        kdcache.train_student(pipeline(file), cache, tmp_path / "run")
    file.write_text(GOOD)
    assert kdcache.train_student(pipeline(file), cache, tmp_path / "run").test is not None
