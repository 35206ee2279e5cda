"""What networks return: tuples, dictionaries and records, in evaluation or training mode; probabilities; precisions."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers.tiny import TinyTeacher, tiny_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models as tv

from kdcache import dump_teacher, train_student, train_teacher
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.data.views import View
from kdcache.errors import CorruptError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.models import ChosenOutputs, Ensemble, build_model, weights_digest
from kdcache.models.checks import check_logits, log_probabilities, output_scale, try_network, try_training
from kdcache.models.evaluate import evaluate
from kdcache.models.inference import InferenceModel, try_teacher
from kdcache.models.outputs import logits_of
from kdcache.models.teacher import load_teacher

LOGITS = torch.arange(6.0).reshape(2, 3)
OTHER = torch.zeros(2, 5)


class Named(NamedTuple):
    logits: Any
    aux: Any = None


@dataclass
class Record:
    aux: Any
    logits: Any


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Returns(nn.Module):
    """Returns what a function makes of the logits of a linear network; in training mode something else, if given."""

    def __init__(
        self, shape: Callable[[Tensor], Any], in_training: Callable[[Tensor], Any] | None = None, classes: int = 10
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(16, classes)
        self.shape, self.in_training = shape, in_training or shape

    def forward(self, images: Tensor) -> Any:
        return (self.in_training if self.training else self.shape)(self.linear(images.flatten(1)))


def refused(kind: type[KdcacheError], words: str, make: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(kind, match=words) as caught:
        make(*args, **options)
    return caught.value.fix


def model_output() -> Any:
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=LOGITS, hidden_states=(OTHER,))


# Which part


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"aux": OTHER, "logits": LOGITS},
        collections.OrderedDict(logits=LOGITS),
        Named(LOGITS, OTHER),
        Record(OTHER, LOGITS),
        SimpleNamespace(logits=LOGITS),
        Slots(LOGITS),
        tv.GoogLeNetOutputs(LOGITS, OTHER, OTHER),
        tv.inception.InceptionOutputs(LOGITS, OTHER),
        model_output,
    ],
)
def test_a_part_called_logits_is_taken_unasked(output: Any) -> None:
    output = output() if output is model_output else output
    assert logits_of(output) is LOGITS
    assert check_logits(output, 2, 3, "teacher") is LOGITS


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ((OTHER, LOGITS), 1),
        ([LOGITS, OTHER], 0),
        ({"out": LOGITS, "logits": OTHER}, "out"),
        ({"head.fine": LOGITS}, "head.fine"),
        ({"head": {"fine": LOGITS}}, "head.fine"),
        ({"heads": [OTHER, LOGITS]}, "heads.1"),
        (((OTHER, LOGITS), OTHER), "0.1"),
        (Named(OTHER, LOGITS), "aux"),
        (Named(OTHER, LOGITS), 1),
        (Record(LOGITS, OTHER), "aux"),
        ({0: LOGITS}, 0),
    ],
)
def test_another_part_is_named(output: Any, part: int | str) -> None:
    assert logits_of(output, part) is LOGITS


@pytest.mark.parametrize(
    ("output", "part", "words", "fix"),
    [
        ((LOGITS, OTHER), None, r"returned a tuple: 0 \[2, 3\]; 1 \[2, 5\]", "such as `output: 0`"),
        ({"a": LOGITS}, None, r"returned a dict: a \[2, 3\]", "such as `output: a`"),
        ((LOGITS, OTHER), 2, "`output: 2` has no such part: it holds 0", "such as `output: 0`"),
        (
            Record(OTHER, LOGITS),
            "head",
            r"`output: head` has no such part: it holds aux \[2, 5\]; logits",
            "output: aux",
        ),
        ({"a": {"b": LOGITS}}, "a", "`output: a` has a dict there", "let it return logits"),
        ({"logits": [LOGITS]}, None, "returned a dict: logits a list", "let it return logits"),
        (None, None, "returned a NoneType", "let it return logits"),
        ("text", None, "returned a str", "let it return logits"),
        (
            {"out": torch.zeros(2, 3, 8, 8), "aux": torch.zeros(2, 3, 8, 8)},
            None,
            "returned a dict: out",
            "segmentation",
        ),
        ((torch.zeros(2, 3, 8, 8),), None, "returned a tuple: 0", "segmentation"),
    ],
)
def test_what_holds_no_such_part_is_refused(output: Any, part: int | str | None, words: str, fix: str) -> None:
    assert fix in refused(MismatchError, f"the network {words}|and {words}", logits_of, output, part)


def test_a_segmentation_network_is_refused_by_name() -> None:
    for output in (torch.zeros(1, 10, 4, 4), {"logits": torch.zeros(1, 10, 4, 4)}):
        assert "segmentation" in refused(
            MismatchError, r"returned \[1, 10, 4, 4\]", check_logits, output, 1, 10, "teacher"
        )


# Networks that are built


FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, kind):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
        self.kind = kind

    def forward(self, images):
        one, other = self.body(images), self.head(images)
        if self.kind == "always":
            return {"one": one, "other": other}
        if self.kind == "deit":
            return (one, other) if self.training else (one + other) / 2
        return {"logits": one, "other": other} if self.training else one

def make(num_classes, kind="always"):
    torch.manual_seed(0)
    return Net(num_classes, kind)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return f"{path}:make"


def digits(**sections: Any) -> Pipeline:
    return Pipeline.model_validate({"dataset": {"name": "digits"}, **sections})


def student(file: str, **keys: Any) -> Pipeline:
    train = {"epochs": 1, "batch_size": 256, **keys.pop("train", {})}
    return digits(student={"model": file, "train": train, **keys}, loss={"name": "ce"})


def test_the_named_part_is_what_a_network_returns_in_both_modes(file: str) -> None:
    parts = {}
    for part in ("one", "other"):
        torch.manual_seed(0)
        model = build_model(ModelSpec(model=file, output=part), 10, (1, 8, 8))
        for mode in (True, False):
            parts[part] = model.train(mode)(torch.ones(2, 1, 8, 8))
            assert parts[part].shape == (2, 10)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(torch.ones(2, 1, 8, 8)), parts[part])
    assert not torch.equal(parts["one"], parts["other"])


def test_the_hook_leaves_the_network_s_state_and_digest_as_they_are(file: str) -> None:
    torch.manual_seed(0)
    hooked = build_model(ModelSpec(model=file, output="one"), 10, (1, 8, 8))
    torch.manual_seed(0)
    plain = build_model(ModelSpec(model=file, output="other"), 10, (1, 8, 8))
    plain._forward_hooks.clear()
    assert weights_digest(hooked) == weights_digest(plain)


@pytest.mark.parametrize(
    ("kind", "output"), [("always", "one"), ("always", "other"), ("deit", 0), ("deit", 1), ("logits", None)]
)
def test_a_student_that_returns_more_than_logits_is_trained(file: str, kind: str, output: Any, tmp_path: Path) -> None:
    result = train_student(student(file, args={"kind": kind}, output=output), None, tmp_path / "run")
    assert result.test is not None


@pytest.mark.parametrize(("kind", "words"), [("always", "returned a dict"), ("deit", "returned a tuple")])
def test_a_student_whose_part_is_not_named_is_refused_before_training(
    file: str, kind: str, words: str, tmp_path: Path
) -> None:
    fix = refused(MismatchError, words, train_student, student(file, args={"kind": kind}), None, tmp_path / "run")
    assert "`output: " in fix
    assert not (tmp_path / "run").exists()


def test_the_part_of_a_teacher_is_in_its_record(file: str) -> None:
    identities = []
    for output in (None, "one", "other"):
        pipeline = digits(teacher={"model": file, "args": {"kind": "always"}, "output": output})
        identities.append(load_teacher(pipeline).identity)
    assert [identity.arguments for identity in identities] == [
        {"kind": "always"},
        {"args": {"kind": "always"}, "output": "one"},
        {"args": {"kind": "always"}, "output": "other"},
    ]


def test_members_and_chosen_outputs_may_be_parts(file: str) -> None:
    members = [{"model": file, "args": {"kind": "always"}, "output": part} for part in ("one", "other")]
    loaded = load_teacher(digits(teacher=members))
    assert loaded.model.eval()(torch.ones(2, 1, 8, 8)).shape == (2, 10)
    wrapped = Returns(lambda logits: {"logits": logits})
    assert Ensemble([wrapped, wrapped], [1, 1], "logits", "ab", 10)(torch.ones(2, 1, 4, 4)).shape == (2, 10)
    assert ChosenOutputs(wrapped, 10, [[3], [4, 5]])(torch.ones(2, 1, 4, 4)).shape == (2, 2)


def test_torchscript_has_its_usual_part_taken_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from typing import Dict\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(16, 10)\n"
        "    def forward(self, images) -> Dict[str, torch.Tensor]:\n"
        "        return {'logits': self.linear(images.flatten(1))}\n"
        "def make(num_classes):\n"
        "    return torch.jit.load('NET')\n".replace("NET", str(tmp_path / "net.ts"))
    )
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("scripted_net", tmp_path / "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scripted_net"] = module
    spec.loader.exec_module(module)
    with pytest.warns((FutureWarning, DeprecationWarning)):
        torch.jit.script(module.Net().eval()).save(str(tmp_path / "net.ts"))
    with pytest.warns((FutureWarning, DeprecationWarning)):
        model = build_model(ModelSpec(model=f"{tmp_path}/net.py:make"), 10, (1, 4, 4))
        refused(
            MismatchError,
            "`output: a`",
            build_model,
            ModelSpec(model=f"{tmp_path}/net.py:make", output="a"),
            10,
            (1, 4, 4),
        )
    cache = dump_teacher(model, tiny_samples(), tmp_path / "c.kdcache", spec=CacheSpec(dtype="float32"))
    assert cache.manifest.plan.teacher.level is None


# In Python


def test_a_network_in_python_may_return_its_logits_among_other_things(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, samples = Returns(lambda logits: Record(None, logits)), tiny_samples()
    cache = dump_teacher(model, samples, tmp_path / "c.kdcache", spec=CacheSpec(dtype="float32"))
    images = torch.stack([torch.as_tensor(samples.images.picture(i)) for i in range(len(samples))])
    expected = model(images).logits.detach()
    assert torch.allclose(cache.teacher()(torch.arange(len(samples))), expected, atol=1e-5)
    plain = Returns(lambda logits: logits)
    plain.load_state_dict(model.state_dict())
    assert evaluate(model, View(samples, [])) == evaluate(plain, View(samples, []))


# Training mode


def view(shape: tuple[int, int, int] = (1, 4, 4), count: int = 8) -> View:
    import numpy as np

    from kdcache.data.images import ArrayImages
    from kdcache.data.samples import Samples

    pixels = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(10)))
    return View(Samples("mine", "train", ArrayImages(pixels), np.arange(count, dtype=np.int32) % 10, names, []), [])


class Normalized(nn.Module):
    """A network with batch normalization, dropout and a list of its random draws."""

    def __init__(self, kind: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), kind(10), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Any:
        return self.body(images)


def test_trying_the_training_mode_leaves_no_trace() -> None:
    model = Normalized()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        try_training(model, view(), "student", 4)
        assert model.training is mode
        assert all(module.training is mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("train", [{"batch_size": 1}, {"batch_size": 4, "gradient_accumulation_steps": 4}])
def test_batch_normalization_of_one_image_is_a_message(train: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    for norm in ("nn.BatchNorm1d(num_classes)", "nn.SyncBatchNorm(num_classes)", "nn.LazyBatchNorm1d()"):
        path.write_text(
            "from torch import nn\n"
            "def make(num_classes):\n"
            f"    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes), {norm})\n"
        )
        pipeline = student(f"{path}:make", train=train)
        if "Sync" in norm:
            continue  # on a GPU alone
        fix = refused(
            UsageError, "batch normalization needs at least two", train_student, pipeline, None, tmp_path / "r"
        )
        assert fix == "raise train.batch_size, or lower train.gradient_accumulation_steps"
        assert not (tmp_path / "r").exists()


def test_networks_that_cannot_be_trained_are_refused() -> None:
    frozen = Normalized().requires_grad_(False)
    for model in (TinyTeacher(), frozen, nn.Sequential(nn.Flatten(), nn.Identity())):
        refused(UsageError, "has no parameters that can be trained", try_training, model, view(), "student", 4)
    wide = Returns(lambda logits: logits, lambda logits: logits[:, :5])
    refused(MismatchError, r"the student in training mode returned \[2, 5\]", try_training, wide, view(), "student", 4)

    def fails(logits: Tensor) -> Tensor:
        raise RuntimeError("needs targets in training")

    failing = Returns(lambda logits: logits, fails)
    refused(MismatchError, "needs targets in training", try_training, failing, view(), "student", 4)
    sparse = Returns(lambda logits: logits)
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    refused(MismatchError, "table, a tensor that is sparse, which", try_training, sparse, view(), "student", 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # their initialization is to change
@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("inception_v3", 32)])
def test_auxiliary_heads_are_left_aside_in_training(name: str, side: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec(model=f"torchvision:{name}", args={"aux_logits": True}), 10, (3, side, side))
        for mode in (True, False):
            assert model.train(mode)(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_a_teacher_with_auxiliary_heads_is_trained_and_dumped(file: str, tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 256}
    pipeline = digits(teacher={"model": file, "args": {"kind": "logits"}, "train": train})
    train_teacher(pipeline, tmp_path / "teacher")
    weights = f"{tmp_path}/teacher/model.safetensors"
    loaded = load_teacher(digits(teacher={"model": file, "args": {"kind": "logits"}, "weights": weights}))
    cache = dump_teacher(loaded.model, loaded.samples, tmp_path / "c.kdcache", transform=loaded.transform)
    assert cache.manifest.plan.teacher.level is None


# Precision


class Low(nn.Module):
    """A network whose weights are of a low precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 10).to(dtype)

    def forward(self, images: Tensor) -> Any:
        return self.linear(images.flatten(1))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_a_teacher_of_low_precision_runs_as_the_pass_does(dtype: torch.dtype, precision: Any, tmp_path: Path) -> None:
    spec = CacheSpec(precision=precision)
    cache = dump_teacher(Low(dtype), tiny_samples(), tmp_path / "c.kdcache", spec=spec)
    assert cache.manifest.plan.teacher.precision == precision
    words = f"the teacher's weights are {str(dtype).removeprefix('torch.')}, and cache.precision is fp32"
    fix = refused(MismatchError, words, dump_teacher, Low(dtype), tiny_samples(), tmp_path / "d.kdcache")
    assert f"set cache.precision to {precision}" in fix
    assert "model.float()" in fix


def test_an_error_of_another_kind_is_not_blamed_on_the_precision() -> None:
    class Broken(Low):
        def forward(self, images: Tensor) -> Any:
            raise RuntimeError("no")

    refused(MismatchError, "cannot take images .*: no", try_teacher, Broken(torch.float16), view(), CacheSpec(), "cpu")


# Probabilities


rows = st.tuples(st.integers(1, 40), st.integers(2, 300), st.sampled_from([0.1, 1.0, 10.0]), st.integers(0, 999))


@settings(deadline=None, max_examples=100)
@given(rows=rows, dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_probabilities_and_their_logarithms_are_told_from_logits(
    rows: tuple[int, int, float, int], dtype: torch.dtype
) -> None:
    count, classes, scale, seed = rows
    logits = scale * torch.randn(count + 1, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert output_scale(logits.to(dtype)) == "logits"
    assert output_scale(logits.softmax(dim=1).to(dtype)) == "probabilities"
    assert output_scale(logits.log_softmax(dim=1).to(dtype)) == "log-probabilities"
    if dtype in (torch.float32, torch.float64):  # in others, two rows of two classes may look like it by chance
        assert output_scale(logits.sigmoid().to(dtype)) == "logits"
        assert output_scale((logits - logits.amax(dim=1, keepdim=True)).to(dtype) - 0.5) == "logits"


def test_what_is_neither_is_taken_for_logits() -> None:
    one_hot_plus = torch.eye(3)
    one_hot_plus[0, 1] = 0.5
    for outputs in (torch.zeros(4, 3), torch.full((4, 3), torch.nan), torch.full((2, 3), -torch.inf), one_hot_plus):
        assert output_scale(outputs) == "logits"
    assert output_scale(torch.eye(3)) == "probabilities"
    assert output_scale(torch.eye(3).log()) == "log-probabilities"


def test_probabilities_that_were_rounded_before_are_found() -> None:
    rounded = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).softmax(dim=1).bfloat16().float()
    assert output_scale(rounded) == "logits"
    assert output_scale(rounded, torch.bfloat16) == "probabilities"


class Ends(TinyTeacher):
    """The tiny teacher, with a last layer."""

    def __init__(self, last: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.last, self.scale = last, scale

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.scale * super().forward(images))


def soft(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def log_soft(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1)


@pytest.mark.parametrize("last", [soft, log_soft, nn.Softmax(1), nn.LogSoftmax(1), lambda x: x.double().softmax(1)])
@pytest.mark.parametrize("top_k", ["all", 3])
def test_of_a_teacher_that_ends_in_softmax_the_level_is_unknown(last: Any, top_k: Any, tmp_path: Path) -> None:
    spec = CacheSpec(dtype="float32", top_k=top_k, tail="uniform", shard_rows=8, batch_size=5)
    plain = dump_teacher(Ends(lambda x: x), tiny_samples(), tmp_path / "a.kdcache", spec=spec)
    cache = dump_teacher(Ends(last), tiny_samples(), tmp_path / "b.kdcache", spec=spec)
    assert plain.manifest.plan.teacher.level is None
    assert cache.manifest.plan.teacher.level == "unknown"
    ids = torch.arange(37)
    assert torch.allclose(cache.teacher()(ids).softmax(1), plain.teacher()(ids).softmax(1), atol=1e-5)


def test_probabilities_that_have_underflowed_are_refused(tmp_path: Path) -> None:
    for last in (lambda x: x.softmax(1), lambda x: x.softmax(1).half()):
        out = tmp_path / "c.kdcache"
        fix = refused(
            MismatchError,
            "returns probabilities .* have underflowed",
            dump_teacher,
            Ends(last, 200),
            tiny_samples(),
            out,
        )
        assert "leave out its last layer, a Softmax" in fix
        assert not out.exists()
    low = Ends(lambda x: x.softmax(1).half(), 8)
    refused(MismatchError, "have underflowed", dump_teacher, low, tiny_samples(), tmp_path / "c.kdcache")


def test_probabilities_that_underflow_later_are_found_at_their_row(tmp_path: Path) -> None:
    samples = tiny_samples()

    class Late(nn.Module):
        """Sure of one sample alone, which is not among the first ones."""

        def __init__(self) -> None:
            super().__init__()
            self.tiny = TinyTeacher()

        def forward(self, images: Tensor) -> Any:
            sure = (images[:, 0, 0, 0] * 8).round() == 33
            return (self.tiny(images) * torch.where(sure, 500.0, 1.0)[:, None]).softmax(dim=1)

    spec = CacheSpec(shard_rows=8, batch_size=4)
    fix = refused(CorruptError, "for sample 33", dump_teacher, Late(), samples, tmp_path / "c.kdcache", spec=spec)
    assert "Softmax" in fix


def test_a_dump_of_probabilities_resumes_to_the_same_cache(tmp_path: Path) -> None:
    class Stops(Ends):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            Stops.calls += 1
            if Stops.calls > 6:
                raise KeyboardInterrupt
            return super().forward(images)

    spec = CacheSpec(dtype="float32", shard_rows=8, batch_size=4)
    whole = dump_teacher(Ends(soft), tiny_samples(), tmp_path / "a.kdcache", spec=spec)
    with pytest.raises(InterruptedRun):
        dump_teacher(Stops(soft), tiny_samples(), tmp_path / "b.kdcache", spec=spec)
    resumed = dump_teacher(Ends(soft), tiny_samples(), tmp_path / "b.kdcache", spec=spec)
    assert resumed.manifest.digest == whole.manifest.digest


def test_an_inference_model_returns_log_probabilities() -> None:
    images = torch.stack([torch.as_tensor(tiny_samples().images.picture(i)) for i in range(5)])
    running = InferenceModel(Ends(soft), 10, CacheSpec(), "cpu")
    assert running.level is None
    assert torch.allclose(running(images), Ends(log_soft)(images), atol=1e-5)
    assert running.level == "unknown"
    assert torch.equal(log_probabilities(torch.tensor([[0.0, 1.0], [1e-40, 1.0]])).isinf().sum(), torch.tensor(2))


def test_try_network_passes_the_part_of_a_network() -> None:
    try_network(Returns(lambda logits: {"logits": logits}), view(), "cpu", "student")


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_a_teacher_in_the_mode_that_it_was_exported_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Returns(lambda logits: logits).eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.rand(2, 1, 4, 4),), dynamic_shapes=({0: batch},))
    exported = program.module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    spec = CacheSpec(dtype="float32")
    one = dump_teacher(exported, tiny_samples(), tmp_path / "a.kdcache", spec=spec)
    other = dump_teacher(model, tiny_samples(), tmp_path / "b.kdcache", spec=spec)
    ids = torch.arange(37)
    assert torch.allclose(one.teacher()(ids), other.teacher()(ids), atol=1e-5)


@pytest.mark.parametrize("last", [soft, log_soft, nn.Softmax(1), nn.LogSoftmax(1), lambda x: x.double().softmax(1)])
def test_a_network_that_ends_in_softmax_is_evaluated_as_the_one_without(last: Any) -> None:
    samples = tiny_samples()
    one, other = (evaluate(Ends(end, 3.0), samples, batch_size=8) for end in (lambda x: x, last))
    assert one.accuracy == other.accuracy
    assert other.loss == pytest.approx(one.loss, rel=1e-5)


def test_probabilities_that_have_underflowed_are_evaluated_as_the_smallest_number() -> None:
    score = evaluate(Ends(soft, 1000.0), tiny_samples())
    assert 10 < score.loss < 88
    assert score.accuracy == evaluate(Ends(lambda x: x, 1000.0), tiny_samples()).accuracy


class Computed:
    """An output whose logits are a property."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.features = value, value.flatten()

    @property
    def logits(self) -> Tensor:
        return self.value


@dataclass(slots=True)
class WithSlots:
    prediction: Tensor
    loss: float | None = None


Heads = collections.namedtuple("Heads", ["main", "auxiliary"])

MORE_OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], int | str | None]] = {
    "a property": (Computed, None),
    "a named tuple by name": (lambda x: Heads(x, -x), "main"),
    "a named tuple by index": (lambda x: Heads(x, -x), 0),
    "a record by name": (lambda x: WithSlots(x, 0.5), "prediction"),
    "a list of auxiliary outputs": (lambda x: [x, -x, 2 * x], 0),
    "the last of them": (lambda x: [-x, 2 * x, x], 2),
    "a number as a string": (lambda x: {"0": x, "1": -x}, 0),
    "a list of lists": (lambda x: [[-x, x], [x]], "0.1"),
    "a mapping that is not a dictionary": (lambda x: collections.UserDict({"logits": x, "aux": -x}), None),
    "a record in a dictionary": (lambda x: {"head": WithSlots(x), "other": -x}, "head.prediction"),
}


@pytest.mark.parametrize("kind", MORE_OUTPUTS)
def test_the_logits_are_taken_out_of_whatever_holds_them(kind: str) -> None:
    make, part = MORE_OUTPUTS[kind]
    logits = torch.rand(4, 10)
    assert torch.equal(logits_of(make(logits), part), logits)


def test_a_part_that_is_misspelled_is_answered_with_a_similar_one() -> None:
    for output, part, meant in (
        (WithSlots(torch.rand(2, 3)), "predictions", "prediction"),
        ({"logits_main": torch.rand(2, 3), "x": torch.rand(2)}, "logit_main", "logits_main"),
        (Heads(torch.rand(2, 3), torch.rand(2, 3)), "auxillary", "auxiliary"),
    ):
        with pytest.raises(MismatchError, match=rf"has no such part, did you mean {meant}\?"):
            logits_of(output, part)
