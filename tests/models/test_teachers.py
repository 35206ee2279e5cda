"""Teachers that are more than one network of the data set's classes: ensembles, and outputs that are chosen."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from helpers.paths import ROOT
from helpers.tiny import TinyTeacher, tiny_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models as tv

from kdcache import dump_teacher
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import ModelSpec, Pipeline
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.models import (
    ChosenOutputs,
    Ensemble,
    build_model,
    compare_names,
    outputs_of,
    read_groups,
    record_of_groups,
    save_weights,
    weights_digest,
)
from kdcache.models.teacher import LoadedTeacher, TeacherIdentity, load_teacher
from kdcache.runtime.progress import Silent

Array = npt.NDArray[np.float64]
Combine = Literal["logits", "probabilities"]


class FixedLogits(nn.Module):
    """FixedLogits the same logits [B, C] of whatever it is shown."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(np.asarray(logits), dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        return self.get_buffer("logits")


def ensemble(members: Sequence[nn.Module], classes: int, weights: Sequence[float] = (1, 1), **how: Any) -> Ensemble:
    names = [f"net{number}" for number in range(len(members))]
    return Ensemble(members, weights, how.get("combine", "logits"), names, classes)


def logsumexp(logits: Array) -> Array:
    largest = logits.max(axis=-1, keepdims=True)
    summed: Array = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)) + largest
    return summed


def softmax(logits: Array) -> Array:
    return np.exp(logits - logsumexp(logits))


# Ensembles

several = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(0, 999))


@settings(deadline=None, max_examples=60)
@given(shape=several, scale=st.sampled_from([1.0, 30.0]), weights=st.lists(st.floats(0.1, 9), min_size=4, max_size=4))
def test_an_ensemble_says_the_weighted_mean_of_logits_or_of_probabilities(
    shape: tuple[int, int, int, int], scale: float, weights: list[float]
) -> None:
    members, batch, classes, seed = shape
    logits = (scale * np.random.default_rng(seed).normal(size=(members, batch, classes))).astype(np.float32)
    share = (np.array(weights[:members]) / sum(weights[:members]))[:, None, None]
    exact = logits.astype(np.float64)
    for combine in ("logits", "probabilities"):
        teacher = ensemble([FixedLogits(one) for one in logits], classes, weights[:members], combine=combine)
        found = teacher(torch.zeros(batch, 1, 2, 2)).numpy().astype(np.float64)
        if combine == "logits":
            assert np.allclose(found, (share * exact).sum(axis=0), rtol=1e-5, atol=1e-5 * scale)
        else:
            assert np.allclose(softmax(found), (share * softmax(exact)).sum(axis=0), rtol=1e-4, atol=1e-7)
            # As sharp as its members on average, which DTKD depends on.
            assert np.allclose(logsumexp(found), (share * logsumexp(exact)).sum(axis=0), rtol=1e-5, atol=1e-5 * scale)


def test_probabilities_that_underflow_are_still_told_apart() -> None:
    teacher = ensemble(
        [FixedLogits([[1000.0, 0.0, -1000.0]]), FixedLogits([[1000.0, -500.0, 0.0]])], 3, combine="probabilities"
    )
    expected = torch.tensor([[1000.0, -math.log(2), -math.log(2)]])
    assert torch.allclose(teacher(torch.zeros(1, 1, 2, 2)), expected, atol=1e-4)  # whose last bits are of 1000


def test_members_in_half_precision_are_combined_in_float32() -> None:
    class Half(FixedLogits):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).half()

    found = ensemble([Half([[2048.0, 0.0]]), Half([[2050.0, 0.0]])], 2)(torch.zeros(1, 1, 2, 2))
    assert found.dtype == torch.float32
    assert found.tolist() == [[2049.0, 0.0]]  # which float16 has not


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (torch.zeros(2, 1), r"teacher's member net1 returned \[2, 1\] for 2 images"),  # which would broadcast
        (torch.zeros(1, 3), r"teacher's member net1 returned \[1, 3\] for 2 images"),
        (torch.zeros(2, 4), r"teacher's member net1 returned \[2, 4\] for 2 images"),
        ((torch.zeros(2, 3),), "teacher's member net1 returned a tuple"),
    ],
)
def test_a_member_that_does_not_fit_is_named(says: object, words: str) -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> object:
            return says

    with pytest.raises(MismatchError, match=words):
        ensemble([FixedLogits(np.zeros((2, 3))), Odd()], 3)(torch.zeros(2, 1, 2, 2))


def test_an_ensemble_s_digest_tells_members_their_order_their_weights_and_how_they_combine() -> None:
    def made(
        seeds: tuple[int, ...], weights: Sequence[float] = (1, 1), combine: Combine = "logits", mean: float = 0
    ) -> str:
        members = []
        for seed in seeds:
            torch.manual_seed(seed)
            members.append(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)))
        members[0].get_buffer("2.running_mean").fill_(mean)
        model = ensemble(members, 3, weights, combine=combine)
        assert sum(p.numel() for p in model.parameters()) == len(seeds) * (4 * 3 + 3 + 2 * 3)
        return weights_digest(model)

    with torch.random.fork_rng():
        assert made((1, 2)) == made((1, 2))
        others = [
            made((1, 2)),
            made((2, 1)),
            made((1, 3)),
            made((1, 1)),
            made((1, 2), (1, 2)),
            made((1, 2), (2, 1)),
            made((2, 1), (2, 1)),
            made((1, 2), combine="probabilities"),
            made((1, 2), mean=0.5),
            made((1, 2, 3), (1, 1, 1)),
        ]
        assert len(set(others)) == len(others)
        assert made((1, 2), (2, 4)) == made((1, 2), (1, 2))  # the same network


def test_an_ensemble_is_cached_as_any_teacher(tmp_path: Path) -> None:
    samples = tiny_samples()
    model = ensemble([TinyTeacher(seed=1), TinyTeacher(seed=2)], 10, [3, 1])
    spec = CacheSpec(dtype="float32", shard_rows=8, batch_size=5)
    cache = dump_teacher(model, samples, tmp_path / "a.kdcache", spec=spec)
    images = torch.stack([torch.as_tensor(samples.images.picture(i)) for i in range(len(samples))])
    expected = 0.75 * TinyTeacher(seed=1)(images) + 0.25 * TinyTeacher(seed=2)(images)
    assert torch.allclose(cache.teacher()(torch.arange(len(samples))), expected, atol=1e-5)
    assert cache.manifest.plan.teacher.weights_digest == weights_digest(model)


# Outputs that are chosen


@st.composite
def groupings(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    outputs = draw(st.integers(2, 12))
    order = draw(st.permutations(range(outputs)))
    cuts = sorted(draw(st.sets(st.integers(1, outputs - 1), max_size=5)))
    parts = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, outputs], strict=True)]
    return outputs, parts[: draw(st.integers(1, len(parts)))]


@settings(deadline=None)
@given(grouping=groupings(), batch=st.integers(1, 3), seed=st.integers(0, 999))
def test_a_class_has_the_probability_of_its_outputs_among_those_that_are_chosen(
    grouping: tuple[int, list[list[int]]], batch: int, seed: int
) -> None:
    outputs, groups = grouping
    logits = (9 * np.random.default_rng(seed).normal(size=(batch, outputs))).astype(np.float32)
    found = ChosenOutputs(FixedLogits(logits), outputs, groups)(torch.zeros(batch, 1, 2, 2)).numpy()
    probabilities = softmax(logits.astype(np.float64))
    of_class = np.stack([probabilities[:, group].sum(axis=1) for group in groups], axis=1)
    expected = of_class / of_class.sum(axis=1, keepdims=True)
    assert np.allclose(softmax(found.astype(np.float64)), expected, rtol=1e-4, atol=1e-9)
    for number, group in enumerate(groups):
        if len(group) == 1:
            assert np.array_equal(found[:, number], logits[:, group[0]])


def test_the_digest_tells_one_choice_of_outputs_from_another() -> None:
    network = FixedLogits(np.zeros((1, 6)))
    choices: list[list[list[int]]] = [
        [[0], [1], [2]], [[0], [2], [1]], [[0], [1], [3]], [[0, 1], [2], [3]], [[2], [0, 1], [3]], [[0, 2], [1], [3]],
    ]  # fmt: skip
    digests = {weights_digest(ChosenOutputs(network, 6, groups)) for groups in choices}
    assert len(digests | {weights_digest(network)}) == len(choices) + 1


def test_a_network_with_other_outputs_than_it_is_said_to_have_is_refused() -> None:
    for says, words in [
        (np.zeros((2, 4)), r"returned \[2, 4\] for 2 images, not \[2, 5\]"),
        (None, "returned a tuple: 0"),
    ]:
        network = nn.Identity() if says is None else FixedLogits(says)
        images = (torch.zeros(2, 5), torch.zeros(2, 5)) if says is None else torch.zeros(2, 1, 2, 2)
        with pytest.raises(MismatchError, match=words) as caught:
            ChosenOutputs(network, 5, [[0], [1]])(images)
        assert ("`output: 0`" if says is None else "teacher.outputs") in caught.value.fix


def test_classes_are_a_list_or_a_file_of_the_same(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("7\n0 3\t5 \n20840\n\n")
    assert read_groups([7, [0, 3, 5], 20840], 21841, 3) == read_groups(str(path), 21841, 3) == [[7], [0, 3, 5], [20840]]


@pytest.mark.parametrize(
    ("classes", "kind", "words"),
    [
        ([0, 1], MismatchError, "teacher.classes has 2 entries, the data set has 3 classes"),
        ([0, 1, 2, 3], MismatchError, "teacher.classes has 4 entries, the data set has 3 classes"),
        ([], MismatchError, "teacher.classes has 0 entries"),
        ([0, [1, 5], 2], MismatchError, "gives class 1 the output 5, the network has outputs 0 to 4"),
        ([0, 1, 0], UsageError, "gives output 0 to more than one class: 0, 2"),
        ([0, [1, 2], 2], UsageError, "gives output 2 to more than one class: 1, 2"),
        ([0, [1, 2, 1], 3], UsageError, "gives class 1 output 1 twice"),
        ("0\n1\n", MismatchError, r"teacher.classes \(.*map.txt\) has 2 entries"),
        ("", MismatchError, r"teacher.classes \(.*map.txt\) has 0 entries"),
        ("0\n\n2\n", UsageError, "map.txt:2: '' is not the index of an output"),
        ("0\n1\ntench 3\n", UsageError, "map.txt:3: 'tench 3' is not the index of an output"),
        ("0\n-1\n2\n", UsageError, "map.txt:2: '-1' is not"),
        ("0\n1.0\n2\n", UsageError, r"map.txt:2: '1.0' is not"),
        (b"0\n\xff\n2\n", UsageError, "map.txt: it is not UTF-8 text"),
        (None, UsageError, "map.txt: No such file"),
    ],
)
def test_classes_that_cannot_be_are_refused(
    classes: list[int | list[int]] | str | bytes | None, kind: type[KdcacheError], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "map.txt"
    if isinstance(classes, str | bytes):
        path.write_bytes(classes if isinstance(classes, bytes) else classes.encode())
    with pytest.raises(kind, match=words):
        read_groups(classes if isinstance(classes, list) else str(path), 5, 3)


def test_the_record_tells_every_choice_from_every_other() -> None:
    assert record_of_groups([[3], [1, 2]]) == [3, [1, 2]]
    long = [[c] for c in range(65)]
    records = [record_of_groups(groups) for groups in (long, [*long[:-1], [65]], [long[1], long[0], *long[2:]])]
    assert all(isinstance(record, str) and len(record) == len("sha256:") + 64 for record in records)
    assert len(set(map(str, records))) == 3
    assert record_of_groups(long[:64]) == list(range(64))


# Names of classes

SQUEEZENET = "torchvision:squeezenet1_1@IMAGENET1K_V1"
IMAGENET = tuple(tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])


def remark(names: Sequence[str], groups: list[list[int]] | None = None, model: str = SQUEEZENET) -> str | None:
    return compare_names(ModelSpec(model=model), groups, tuple(names))


def test_classes_of_the_same_names_are_no_remark() -> None:
    assert remark(IMAGENET) is None
    assert remark([name.upper().replace(" ", "_") for name in IMAGENET]) is None
    assert remark([IMAGENET[7], f"{IMAGENET[0]} / {IMAGENET[1]}"], [[7], [0, 1]]) is None
    for silent in ("timm:resnet18@a1_in1k", "torchvision:resnet18", "small:cnn"):
        assert remark(["x"] * 1000, model=silent) is None


def test_classes_of_other_names_are_a_remark() -> None:
    said = remark(["tench, Tinca tinca", *IMAGENET[1:]])
    assert said is not None
    assert said.startswith("note: 1 of 1000 classes have another name: class 0 is 'tench, Tinca tinca' in the data set")
    assert "and 'tench' in torchvision:squeezenet1_1" in said
    said = remark(["cat", "dog"], [[281, 282], [207]])
    assert said is not None
    assert "2 of 2" in said
    assert "'tabby / tiger cat'" in said


def test_the_same_classes_in_another_order_are_refused() -> None:
    swapped = [IMAGENET[1], IMAGENET[0], *IMAGENET[2:]]
    with pytest.raises(
        MismatchError, match="in another order: class 0 is 'goldfish' in the data set and 'tench'"
    ) as bad:
        remark(swapped)
    assert "teacher.classes" in bad.value.fix
    assert remark(swapped, [[1], [0], *([c] for c in range(2, 1000))]) is None
    with pytest.raises(MismatchError, match="in another order"):
        remark([IMAGENET[1], IMAGENET[0]], [[0], [1]])


# Through a pipeline


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tv.SqueezeNet:
    """What lies on this machine as torchvision's weights of a squeezenet."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = tv.squeezenet1_1().eval()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(own.state_dict(), folder / tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    return own


def nets(folder: Path) -> str:
    """A file whose function makes a linear network of `num_classes` outputs from a seed."""
    path = folder / "nets.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch

            def linear(num_classes, seed=0):
                net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))
                for parameter in net.parameters():
                    parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
                return net

            def stubborn(num_classes):
                return linear(12)
            """
        )
    )
    return str(path)


class Listens(Silent):
    """A listener that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def loaded(teacher: Any, listener: Listens | None = None, **sections: Any) -> LoadedTeacher:
    given = {"dataset": {"name": "digits"}, "teacher": teacher, **sections}
    return load_teacher(Pipeline.model_validate(given), listener)


IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_list_of_teachers_is_loaded_as_their_ensemble(tmp_path: Path) -> None:
    path = nets(tmp_path)
    small = build_model(ModelSpec(model="small:mlp", args={"width": 3}), 10, (1, 8, 8))
    save_weights(small, tmp_path / "mlp.safetensors")
    first = {"model": f"{path}:linear", "args": {"seed": 5}, "weight": 3.0}
    second = {"model": "small:mlp", "args": {"width": 3}, "weights": str(tmp_path / "mlp.safetensors")}
    found = loaded([first, second])
    linear = loaded({"model": first["model"], "args": first["args"]})
    with torch.no_grad():
        expected = 0.75 * linear.model(IMAGES) + 0.25 * small(IMAGES)
        assert torch.allclose(found.model(IMAGES), expected, atol=1e-6)
    assert found.identity.name == "nets.py:linear + small:mlp"
    assert found.identity.code_digest is None
    assert found.identity.arguments == {
        "combine": "logits",
        "members": [
            {**linear.identity._asdict(), "weight": 3.0},
            {"name": "small:mlp", "arguments": {"width": 3}, "code_digest": None, "weight": 1.0},
        ],
    }
    assert linear.identity.code_digest is not None
    assert json.loads(json.dumps(found.identity.arguments)) == found.identity.arguments
    blended = loaded({"ensemble": [first, second], "combine": "probabilities"})
    with torch.no_grad():
        expected = 0.75 * linear.model(IMAGES).softmax(dim=1) + 0.25 * small(IMAGES).softmax(dim=1)
        assert torch.allclose(blended.model(IMAGES).softmax(dim=1), expected, atol=1e-6)
    assert blended.identity.arguments["combine"] == "probabilities"


def test_a_teacher_of_other_classes_is_loaded_with_those_that_are_chosen(
    weights: tv.SqueezeNet, tmp_path: Path
) -> None:
    listener = Listens()
    choice = [100 * c for c in range(9)] + [[1, 2]]
    found = loaded({"model": SQUEEZENET, "classes": choice}, listener)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        logits = weights(images)
        said = found.model.eval()(images)
    assert torch.equal(said[:, :9], logits[:, 0:900:100])
    assert torch.allclose(said[:, 9], torch.logaddexp(logits[:, 1], logits[:, 2]))
    assert found.identity == TeacherIdentity(
        "torchvision:squeezenet1_1@IMAGENET1K_V1".rpartition("/")[2],
        {"args": {}, "outputs": 1000, "classes": choice},
        None,
    )
    assert listener.said == [remark("0123456789", [c if isinstance(c, list) else [c] for c in choice])]
    path = tmp_path / "map.txt"
    path.write_text("\n".join(str(c) if isinstance(c, int) else "1 2" for c in choice))
    assert loaded({"model": SQUEEZENET, "classes": str(path)}).identity == found.identity


def test_a_checkpoint_of_other_classes_says_how_many_outputs_it_has(tmp_path: Path) -> None:
    made = build_model(ModelSpec(model="small:cnn", args={"width": 2}), 21841, (1, 8, 8)).eval()
    save_weights(made, tmp_path / "net.safetensors")
    choice = [21840 - c for c in range(10)]
    spec = {"model": "small:cnn", "args": {"width": 2}, "weights": str(tmp_path / "net.safetensors")}
    found = loaded({**spec, "classes": choice, "outputs": 21841})
    with torch.no_grad():
        assert torch.equal(found.model.eval()(IMAGES), made(IMAGES)[:, choice])
    assert found.identity.arguments == {"args": {"width": 2}, "outputs": 21841, "classes": choice}
    with pytest.raises(MismatchError, match="of another shape: "):
        loaded({**spec, "classes": choice, "outputs": 21843})


def test_a_function_that_makes_other_outputs_than_it_is_asked_for_is_refused(tmp_path: Path) -> None:
    found = loaded({"model": f"{nets(tmp_path)}:stubborn", "classes": list(range(10)), "outputs": 11})
    with pytest.raises(MismatchError, match=r"returned \[3, 12\] for 3 images, not \[3, 11\]"):
        found.model(IMAGES)


def test_members_that_want_images_prepared_in_other_ways_need_a_transform(
    weights: tv.SqueezeNet, tmp_path: Path
) -> None:
    teacher = [{"model": SQUEEZENET, "classes": list(range(10))}, f"{nets(tmp_path)}:linear"]
    with pytest.raises(
        MismatchError, match=r"need different transforms\n  torchvision:squeeze.*Resize.*\n .*nets"
    ) as bad:
        loaded(teacher)
    assert "transform" in bad.value.fix
    transform = [{"ToDtype": {"dtype": "float32", "scale": True}}]
    assert loaded(teacher, transform=transform).transform == transform
    alike = loaded([teacher[0], {**teacher[0], "classes": list(range(10, 20))}])  # type: ignore[dict-item]  # a section
    assert alike.transform == loaded(teacher[0]).transform
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 64)
        expected = weights(images)[:, :20].reshape(2, 10).mean(dim=0)
        assert torch.allclose(alike.model.eval()(images)[0], expected, atol=1e-6)


def pipeline_file(folder: Path, teacher: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(f"dataset: {{name: digits}}\nteacher: {teacher}\n")
    return path


def test_an_ensemble_goes_through_the_command_line(tmp_path: Path) -> None:
    path = pipeline_file(tmp_path, f"[{{model: {nets(tmp_path)}:linear, weight: 2}}, {nets(tmp_path)}:linear]")
    out = tmp_path / "a.kdcache"
    command = ["dump-teacher", str(path), "-o", str(out), "--device", "cpu", "--set", "teacher.0.args.seed=3"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    record = json.loads((out / "manifest.json").read_text())["plan"]["teacher"]
    assert record["name"] == "nets.py:linear + nets.py:linear"
    assert [member["arguments"] for member in record["arguments"]["members"]] == [{"seed": 3}, {}]
    assert record["parameters"] == 2 * (64 * 10 + 10)
    same = CliRunner().invoke(main, ["verify", str(out), str(path), "--teacher", *command[-4:]])
    assert same.exit_code == 0, same.output
    swapped = [
        *command[-4:],
        "--set",
        "teacher.0.weight=1",
        "--set",
        "teacher.1={model: " + nets(tmp_path) + ":linear}",
    ]
    other = CliRunner().invoke(main, ["verify", str(out), str(path), "--teacher", *swapped])
    assert other.exit_code == 4, other.output


def test_training_refuses_what_is_no_single_network(tmp_path: Path) -> None:
    for teacher, words in [
        ("[small:cnn, small:mlp]", "ensemble of 2"),
        ("{model: small:cnn, classes: [0], outputs: 3}", "teacher.classes"),
    ]:
        path = pipeline_file(tmp_path, teacher)
        done = CliRunner().invoke(main, ["train-teacher", str(path), "-o", str(tmp_path / "run")])
        assert done.exit_code == 2
        assert words in done.output
        assert not list(tmp_path.glob("run*"))


PIPELINES = (ROOT / "docs" / "PIPELINES.md").read_text(encoding="utf-8")


def test_the_teachers_of_the_documentation_exist(tmp_path: Path) -> None:
    blocks = [rest.partition("```")[0] for rest in PIPELINES.split("```yaml\n")[1:]]
    block = next(block for block in blocks if "ensemble:" in block)
    (tmp_path / "pipeline.yaml").write_text(f"dataset: {{name: imagenet}}\n{block}")
    outputs = [outputs_of(member) for member in load_pipeline(tmp_path / "pipeline.yaml").members]
    assert len(outputs) == 2
    assert all(outputs)
