"""Stage one with several outputs: where they are taken, what is refused, and the same cache whatever happened."""

from __future__ import annotations

import json
import signal
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import kdcache, ok, refused
from helpers.interrupts import StopsAfter
from helpers.processes import exit_code, in_a_process, kill_at
from helpers.ranks import contents, ranks
from helpers.tiny import FLIP, tiny_samples
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.format.output_records import VectorEncoding
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.data.samples import as_samples
from kdcache.dump.check_teacher import check_identity, compare_outputs
from kdcache.errors import CorruptError, InterruptedRun, KdcacheError, MismatchError, UsageError
from kdcache.models.inference import InferenceModel

IDS = torch.arange(37)
EXACT = {"encoding": "float32"}
SMALL: dict[str, Any] = {"shard_rows": 8, "batch_size": 5, "pilot_rows": 37}
"""Of 37 samples: four shards of 8 rows in batches of 5 and 3, and one shard of 5 rows in one batch."""

OUTPUTS: dict[str, dict[str, Any]] = {
    "features": {"encoding": "klt", "fidelity": 0.01},
    "hidden": {"encoding": "int8"},
    "age": {"kind": "score"},
    "color": {"kind": "classes", "top_k": 2, "tail": "uniform"},
}


class Heads(nn.Module):
    """Returns logits, vectors, scores and the classes of another head, all linear in the images [B, 1, 4, 4].

    Args:
        scale: of the vectors and scores, which is not a weight.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(16, 40, generator=generator) / 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits [B, 10], features [B, 16], hidden [B, 8], age [B] and color [B, 6]."""
        numbers = images.flatten(1) @ self.weight
        return {
            "logits": numbers[:, :10],
            "features": self.scale * numbers[:, 10:26],
            "hidden": numbers[:, 26:34].relu() + 0.1,
            "age": numbers[:, 0] * self.scale,
            "color": numbers[:, 34:40],
        }


def dumped(out: Path, model: Any = None, samples: Samples | None = None, **options: Any) -> Cache:
    given = {"outputs": OUTPUTS, **SMALL} | options
    return dump_teacher(model or Heads(), samples or tiny_samples(), out, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The cache of an uninterrupted run."""
    return dumped(tmp_path_factory.mktemp("whole") / "whole.kdcache")


def pixels(samples: Samples | None = None) -> Tensor:
    samples = samples or tiny_samples()
    return torch.stack([torch.as_tensor(samples.images.picture(index)) for index in range(len(samples))])


# Where outputs are taken.


def color_images(count: int = 37, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 4)


def check_taken(model: nn.Module, outputs: dict[str, Any], expected: dict[str, Tensor], out: Path, **more: Any) -> None:
    given = {name: {**EXACT, **output} for name, output in outputs.items()}
    cache = dump_teacher(model, color_images(), out, outputs=given, batch_size=16, **more)
    assert list(cache.outputs) == sorted(outputs)
    for name, values in expected.items():
        torch.testing.assert_close(cache.teacher(name)(IDS), values, rtol=1e-4, atol=1e-5, msg=name)


def resnet() -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet18(num_classes=4).eval()
    return network


@torch.no_grad()
def test_modules_of_a_torchvision_network(tmp_path: Path) -> None:
    network, images = resnet(), color_images().tensors[0]
    stem = network.bn1(network.conv1(images))  # type: ignore[operator]
    before = network.maxpool(stem.relu())  # type: ignore[operator]
    layer4 = network.layer4(network.layer3(network.layer2(network.layer1(before))))  # type: ignore[operator]
    pooled = layer4.mean(dim=(2, 3))
    outputs = {
        "deep": {"source": "layer4", "pool": "mean"},
        "average": {"source": "avgpool", "pool": "mean"},
        "features": {},
        # The ReLU that follows it works in place.
        "stem": {"source": "bn1", "pool": "mean"},
        "fc": {},
    }
    expected = {
        "deep": pooled,
        "average": pooled,
        "features": pooled,
        "stem": stem.mean(dim=(2, 3)),
        "fc": network.fc(pooled),  # type: ignore[operator]
    }
    assert (stem.mean(dim=(2, 3)) - stem.relu().mean(dim=(2, 3))).abs().max() > 0.01
    state = list(network.state_dict())
    check_taken(network, outputs, expected, tmp_path / "c.kdcache")
    assert list(network.state_dict()) == state
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_vector_that_is_changed_in_place_later(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).eval()
    with torch.no_grad():
        expected = model[1](color_images().tensors[0].flatten(1))
    assert (expected < 0).any()
    check_taken(model, {"body": {"source": "1"}}, {"body": expected}, tmp_path / "c.kdcache")


@torch.no_grad()
def test_hidden_states_of_a_transformer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=16, num_labels=4, output_hidden_states=True, return_dict=True
    )
    model = transformers.ViTForImageClassification(config).eval()
    returned = model(color_images().tensors[0])
    states = returned.hidden_states
    outputs = {
        "token": {"source": "hidden_states.2", "pool": "first"},
        "mean": {"source": "hidden_states.1", "pool": "mean"},
        "norm": {"source": "vit.layernorm", "pool": "first"},
    }
    expected = {"token": states[2][:, 0], "mean": states[1].mean(dim=1), "norm": model.vit.layernorm(states[2])[:, 0]}
    check_taken(model, outputs, expected, tmp_path / "c.kdcache")


@torch.no_grad()
def test_features_of_a_timm_network(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4).eval()
    features = model.forward_head(model.forward_features(color_images().tensors[0]), pre_logits=True)
    outputs = {"features": {}, "pool": {"source": "global_pool"}}
    check_taken(model, outputs, {"features": features, "pool": features}, tmp_path / "c.kdcache")


Pair = namedtuple("Pair", ["logits", "embedding"])  # as a network may return it


@dataclass
class Record:
    logits: Tensor
    embedding: Tensor


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dictionary": lambda logits, embedding: {"logits": logits, "embedding": embedding},
    "nested": lambda logits, embedding: {"logits": logits, "more": {"embedding": embedding}},
    "tuple": lambda logits, embedding: (logits, embedding),
    "named tuple": Pair,
    "dataclass": Record,
    "double": lambda logits, embedding: {"logits": logits, "embedding": embedding.double()},
    "arrays": lambda logits, embedding: {"logits": logits.numpy(), "embedding": embedding.numpy()},
}
SOURCES: dict[str, Any] = {"nested": "more.embedding", "tuple": 1}


class Returning(nn.Module):
    """Returns logits and an embedding, in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container

    def forward(self, images: Tensor) -> Any:
        flat = images.flatten(1)
        return self.container(flat[:, :4], flat[:, 4:11])


@pytest.mark.parametrize("container", CONTAINERS)
def test_parts_of_what_a_teacher_returns(container: str, tmp_path: Path) -> None:
    network = Returning(CONTAINERS[container])
    model: Any = network.forward if container == "arrays" else network  # a plain function
    options = {"logits": False} if container == "tuple" else {}  # a tuple does not say which part the logits are
    expected = {"embedding": color_images().tensors[0].flatten(1)[:, 4:11]}
    outputs = {"embedding": {"source": SOURCES.get(container)}}
    check_taken(model, outputs, expected, tmp_path / "c.kdcache", **options)


def test_a_teacher_that_returns_an_embedding_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6)).eval()
    images = color_images().tensors[0]
    with torch.no_grad():
        expected = model(images)
    check_taken(model, {"embedding": {}}, {"embedding": expected}, tmp_path / "c.kdcache", logits=False)
    cache = open_cache(tmp_path / "c.kdcache")
    assert cache.manifest.plan.class_encoding is None
    assert cache.manifest.summary.teacher_accuracy is None
    with pytest.raises(MismatchError, match="embedding"):
        cache.teacher()


def test_one_forward_pass_per_batch_gives_all_outputs(tmp_path: Path) -> None:
    class Counting(Heads):
        batches = 0

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            type(self).batches += len(images) == 37
            return super().forward(images)

    dumped(tmp_path / "c.kdcache", Counting(), batch_size=37, shard_rows=37, pilot_rows=30)
    assert Counting.batches == 1


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
@torch.no_grad()
def test_precision_and_memory_format(options: dict[str, Any], tmp_path: Path) -> None:
    network, images = resnet(), color_images().tensors[0]
    outputs = {"deep": {"source": "layer4", "pool": "mean", **EXACT}}
    cache = dump_teacher(network, color_images(), tmp_path / "c.kdcache", outputs=outputs, **options)
    spec = CacheSpec.model_validate({"outputs": outputs, **options})
    live = InferenceModel(network, 4, spec, "cpu").run(images).outputs["deep"]
    torch.testing.assert_close(cache.teacher("deep")(IDS), live, rtol=2e-2, atol=2e-2)
    assert live.dtype == torch.float32


# What is stored.


def test_outputs_are_stored_as_planned(whole: Cache) -> None:
    live = Heads()(pixels())
    plan = whole.manifest.plan
    assert list(plan.named_outputs) == sorted(OUTPUTS)
    assert torch.equal(whole.teacher("age")(IDS), live["age"].unsqueeze(1).detach())
    decoded = whole.teacher("features")(IDS)
    encoding = plan.named_outputs["features"].encoding
    assert isinstance(encoding, VectorEncoding)
    assert encoding.codec == "klt"
    assert 1 - torch.cosine_similarity(decoded, live["features"].detach()).mean() < 0.01
    best = live["color"].topk(2).indices
    assert torch.equal(whole.teacher("color")(IDS).topk(2).indices, best)
    assert audit(whole.path).failure is None
    assert open_cache(whole.path).manifest.digest == whole.manifest.digest


class SoftHead(nn.Module):
    """Its second head returns probabilities, or their logarithms; the numbers of the first are logits."""

    def __init__(self, logarithms: bool, factor: float = 1.0) -> None:
        super().__init__()
        self.logarithms, self.factor = logarithms, factor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        numbers = images.flatten(1) * self.factor
        color = numbers[:, 4:9].log_softmax(1)
        return {"logits": numbers[:, :4], "color": color if self.logarithms else color.exp()}


@pytest.mark.parametrize("logarithms", [False, True])
def test_probabilities_of_another_head_are_not_taken_for_logits(logarithms: bool, tmp_path: Path) -> None:
    outputs = {"color": {"kind": "classes"}}
    cache = dump_teacher(SoftHead(logarithms), color_images(), tmp_path / "c.kdcache", outputs=outputs, batch_size=16)
    expected = color_images().tensors[0].flatten(1)[:, 4:9].softmax(1)
    torch.testing.assert_close(cache.teacher("color")(IDS).softmax(1), expected, rtol=0, atol=2e-3)
    assert cache.manifest.plan.named_outputs["color"].level == "unknown"
    assert cache.manifest.plan.teacher.level is None
    check_identity(cache, SoftHead(logarithms), as_given(cache))


def as_given(cache: Cache) -> Samples:
    return replace(as_samples(color_images()), class_names=cache.manifest.plan.dataset.class_names)


def test_probabilities_that_have_underflowed_are_refused(tmp_path: Path) -> None:
    outputs = {"color": {"kind": "classes"}}
    with pytest.raises(MismatchError, match=r"returns as the output color probabilities .* underflowed"):
        dump_teacher(SoftHead(False, 1e3), color_images(), tmp_path / "c.kdcache", outputs=outputs)


def test_shards_are_laid_out_by_the_size_of_all_outputs(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            wide = torch.linspace(0, 1, 2**19).expand(len(images), -1)
            return {"logits": images.flatten(1)[:, :10], "wide": wide}

    cache = dump_teacher(Wide(), tiny_samples(2), tmp_path / "c.kdcache", outputs={"wide": EXACT}, batch_size=2)
    assert cache.manifest.plan.shape.shard_rows * 4 * 2**19 <= 2**30


# Data sets without classes.


def test_samples_need_no_classes_if_the_class_logits_are_not_kept(tmp_path: Path) -> None:
    samples = replace(tiny_samples(), labels=np.full(37, -1, np.int32), class_names=())
    outputs = {"features": EXACT, "age": {"kind": "score"}}
    cache = dumped(tmp_path / "c.kdcache", samples=samples, outputs=outputs, logits=False)
    torch.testing.assert_close(cache.teacher("features")(IDS), Heads()(pixels())["features"].detach())
    assert audit(cache.path).failure is None
    assert compare_outputs(cache, Heads(), samples, rows=16)[0].value == 0
    check_identity(cache, Heads(), samples)
    again = dumped(tmp_path / "c.kdcache", samples=samples, outputs=outputs, logits=False)
    assert again.manifest.digest == cache.manifest.digest


# Refused, each with what is wrong and how to fix it.


class Odd(nn.Module):
    """Returns outputs that cannot be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Any]:
        numbers = self.body(self.body(images.flatten(1)))
        return {
            "logits": numbers[:, :10],
            "whole": numbers[:, :3].long(),
            "nothing": torch.where(images[:, 0, 0, :1] == 2.0, torch.nan, numbers[:, :3]),
            "batch": numbers[:, : len(images)],
            "map": images,
            "tokens": images[:, 0],
            "text": "text",
            "wide": numbers.repeat(1, 5),
            "one": numbers[:, 0],
            "half": numbers[: len(images) // 2 + 1],
        }


REFUSED: list[tuple[dict[str, Any], type[KdcacheError], str]] = [
    ({"feature": {}}, MismatchError, "does not give the output feature: it has no part or module 'feature'"),
    ({"f": {"source": "text"}}, MismatchError, "text is a str, not a tensor"),
    ({"f": {"source": 3}}, MismatchError, r"no part or module 3; it returns logits \[1, 10\], whole \[1, 3\]"),
    ({"f": {"source": "wid"}}, MismatchError, "'wid', did you mean wide"),
    ({"f": {"source": "body"}}, MismatchError, "the module body of the teacher ran 2 times in one forward pass"),
    ({"whole": {}}, MismatchError, r"the output whole of the teacher is torch.int64 \[1, 3\]"),
    ({"batch": {}}, MismatchError, r"output batch of the teacher is \[\d+, \d+\] for \d+ images, and was \[B, \d+\]"),
    ({"half": {}}, MismatchError, r"output half of the teacher is \[\d+, 16\] for \d+ images"),
    ({"map": {}}, MismatchError, r"\[1, 1, 4, 4\], and pool is none: a vector per sample is \[B, D\]"),
    ({"tokens": {}}, MismatchError, r"\[1, 4, 4\], and pool is none"),
    ({"map": {"pool": "first"}}, MismatchError, r"\[1, 1, 4, 4\], and pool is first"),
    ({"wide": {"kind": "score"}}, MismatchError, "wide of the teacher has 80 numbers, and scores are at most 64"),
    ({"one": {"kind": "classes"}}, MismatchError, "one of the teacher has one number, which is not a distribution"),
    ({"wide": {"kind": "classes", "labels": True}}, MismatchError, "wide has 80 classes and the data set 10"),
    ({"nothing": {}}, CorruptError, "NaN or infinite numbers as the output nothing for sample 16"),
    ({"logits": {}}, UsageError, "logits is the name of the class logits"),
    ({"A b": {}}, UsageError, "A b"),
    (
        {"f": {"sorce": "body"}},
        UsageError,
        r"outputs.f.sorce: unknown key, did you mean source\?",
    ),
    ({"f": {"kind": "score", "fidelity": 0.1}}, UsageError, "scores are stored exactly"),
    ({"f": {"kind": "score", "encoding": "int8"}}, UsageError, "belongs to an output of kind vector"),
    ({"f": {"top_k": 3}}, UsageError, "belongs to an output of kind classes"),
    ({"f": {"kind": "classes", "encoding": "klt"}}, UsageError, "belongs to an output of kind vector"),
]


def test_logits_that_are_kept_are_no_other_output_too(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    outputs: dict[str, Any] = {"hidden": {}}
    with pytest.raises(MismatchError, match="does not give the output hidden: it has no part or module 'hidden'"):
        dump_teacher(network, color_images(), tmp_path / "c.kdcache", outputs=outputs)
    assert not (tmp_path / "c.kdcache").exists()
    cache = dump_teacher(network, color_images(), tmp_path / "c.kdcache", outputs=outputs, logits=False)
    assert cache.outputs["hidden"].channels == 10


@pytest.mark.parametrize(("outputs", "error", "words"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_what_cannot_be_kept_is_refused(
    outputs: dict[str, Any], error: type[KdcacheError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as refused:
        dumped(tmp_path / "c.kdcache", Odd(), outputs=outputs)
    assert refused.value.fix
    assert not (tmp_path / "c.kdcache").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logits": False, "outputs": {}}, "false leaves nothing to keep"),
        ({"compile": True}, "true cannot be combined with outputs"),
    ],
)
def test_options_that_contradict_outputs_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        dumped(tmp_path / "c.kdcache", **options)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_modules_of_a_script_are_refused(tmp_path: Path) -> None:
    script = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)))
    with pytest.raises(MismatchError, match="outputs cannot be taken of the teacher"):
        dumped(tmp_path / "c.kdcache", script, outputs={"features": {"source": "1"}})


# The same cache, whatever happened.


@pytest.mark.parametrize("batches", [1, 4, 9])
def test_an_interrupted_dump_resumes_to_the_same_cache(batches: int, whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dumped(out, progress=StopsAfter(batches))
    assert not (out / "manifest.json").exists()
    assert dumped(out).manifest.digest == whole.manifest.digest


def killed_at_a_commit(out: Path) -> None:
    kill_at(out, "/commits/0/2.json.partial", True)
    dumped(out)


def test_a_killed_dump_resumes_to_the_same_cache(whole: Cache, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    assert exit_code(in_a_process(killed_at_a_commit, out)) == -signal.SIGKILL
    assert sorted(path.name for path in (out / "commits" / "0").iterdir()) == ["0.json", "1.json", "2.json"]
    assert dumped(out).manifest.digest == whole.manifest.digest


def dump_with_workers(workers: int, out: Path) -> None:
    dumped(out, num_workers=workers, views=2, transform=FLIP)


def test_digest_does_not_depend_on_workers_and_views_extend_to_it(tmp_path: Path) -> None:
    for workers in (0, 2):
        assert exit_code(in_a_process(dump_with_workers, workers, tmp_path / str(workers))) == 0
    alone, shared = (open_cache(tmp_path / str(workers)) for workers in (0, 2))
    assert shared.manifest.digest == alone.manifest.digest
    one = dumped(tmp_path / "one.kdcache", transform=FLIP)
    two = dumped(tmp_path / "two.kdcache", views=2, transform=FLIP, extends=one)
    assert two.manifest.digest == alone.manifest.digest
    assert not torch.equal(two.teacher("features")(IDS, 0), two.teacher("features")(IDS, 1))


def test_more_samples_extend_all_outputs(whole: Cache, tmp_path: Path) -> None:
    larger = tiny_samples(50)
    generated = torch.cat([pixels(), pixels(larger)[37:]])
    samples = replace(larger, images=type(larger.images)(generated))  # type: ignore[call-arg]
    extended = dumped(tmp_path / "c.kdcache", samples=samples, extends=whole)
    live = Heads()(generated)
    assert torch.equal(extended.teacher("features")(IDS), whole.teacher("features")(IDS))
    torch.testing.assert_close(extended.teacher("age")(torch.arange(50)), live["age"].unsqueeze(1).detach())
    assert audit(extended.path).failure is None


# Another teacher, or other settings.


def test_a_teacher_of_other_features_is_recognized(whole: Cache, tmp_path: Path) -> None:
    other = Heads(scale=1.3)
    assert torch.equal(other(pixels())["logits"], Heads()(pixels())["logits"])
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dumped(out, progress=StopsAfter(4))
    with pytest.raises(MismatchError, match=r"returns other numbers as the output age, .* number 0"):
        dumped(out, other)
    with pytest.raises(MismatchError, match="returns other numbers as the output age"):
        check_identity(whole, other, tiny_samples())
    with pytest.raises(MismatchError, match="in view 0 the output age of the teacher is not that of the cache"):
        compare_outputs(whole, other, tiny_samples())
    with pytest.raises(MismatchError, match="returns other numbers as the output age"):
        dumped(tmp_path / "two.kdcache", other, samples=tiny_samples(50), extends=whole, views=1)


def test_a_teacher_agrees_with_its_own_cache(whole: Cache) -> None:
    agreements = {(found.output, found.measure): found for found in compare_outputs(whole, Heads(), tiny_samples())}
    assert agreements["age", "relative squared error"].value < 1e-10
    assert 0 < agreements["features", "1 - cosine"].value < 0.01
    assert 0 < agreements["hidden", "relative squared error"].value < 1e-3
    assert agreements["color", "total variation at T = 1"].value < 0.5
    assert {found.rows for found in agreements.values()} == {37}
    assert check_identity(whole, Heads(), tiny_samples()) is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outputs": {**OUTPUTS, "hidden": {"encoding": "float16"}}}, r"outputs\.hidden\.request.*\n?.*int8.*float16"),
        ({"outputs": {**OUTPUTS, "hidden": {"encoding": "int8", "source": "features"}}}, "hidden .* has kind, source"),
        ({"outputs": {"age": {"kind": "score"}}}, "keeps the outputs logits, age, color, features, hidden, and these"),
        ({"logits": False}, "and these settings age, color, features, hidden"),
        ({"outputs": {}}, "and these settings logits"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    options: dict[str, Any], words: str, whole: Cache, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dumped(out, progress=StopsAfter(4))
    with pytest.raises(MismatchError, match=words):
        dumped(out, **options)
    with pytest.raises(KdcacheError, match=words):
        dumped(whole.path, **options)
    assert dumped(out).manifest.digest == whole.manifest.digest


# On the command line, and with several ranks.


def pipeline(folder: Path) -> Path:
    """Write a pipeline whose teacher gives the outputs of `Heads`; shards of 8, two views."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 9, (40, 4, 4), np.uint8)
    np.savez(folder / "tiny.npz", images=images, labels=np.arange(40) % 10)
    (folder / "heads.py").write_text(
        "from dump.test_dump_outputs import Heads\n\n\ndef teacher(num_classes):\n    return Heads()\n"
    )
    path = folder / "tiny.yaml"
    path.write_text(
        f"dataset: {{name: npz, root: {folder / 'tiny.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [RandomHorizontalFlip: {p: 0.5}, ToDtype: {dtype: float32}]\n"
        "eval_transform: [ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'heads.py'}:teacher'}}\n"
        "cache:\n"
        "  {pilot_rows: 40, shard_rows: 8, batch_size: 5, views: 2, seed: 3, num_workers: 0,\n"
        "   outputs: {features: {encoding: klt, fidelity: 0.05}, hidden: {encoding: int8}, age: {kind: score}}}\n"
    )
    return path


def test_commands_know_outputs(tmp_path: Path) -> None:
    path, out = pipeline(tmp_path), tmp_path / "c.kdcache"
    planned = json.loads(ok("plan", path, "--device", "cpu", "--json"))
    assert list(planned["outputs"]) == ["age", "features", "hidden"]
    sizes = [output["bytes_per_row"] for output in planned["outputs"].values()]
    assert all(size > 0 for size in sizes)
    assert planned["bytes_per_row"] > sum(sizes)
    text = ok("dump-teacher", path, "-o", out, "--device", "cpu", "--dry-run")
    shown = {line.split(maxsplit=2)[1]: line for line in text.splitlines() if line.startswith("output ")}
    for name, output in planned["outputs"].items():
        assert f"{output['bytes_per_row']:.1f} bytes per row" in shown[name]
    assert not out.exists()
    ok("doctor", path)
    ok("dump-teacher", path, "-o", out, "--device", "cpu")
    verified = json.loads(ok("verify", out, path, "--replay", "--teacher", "--device", "cpu", "--json"))
    assert {(found["view"], found["output"]) for found in verified["outputs"]} == {
        (view, name) for view in (0, 1) for name in ("age", "features", "hidden")
    }
    table = ok("verify", out, path, "--teacher", "--device", "cpu")
    assert "Cached outputs against those of the live teacher, 40 rows per view" in table
    assert "is complete: nothing to do" in kdcache("dump-teacher", path, "-o", out, "--device", "cpu").stderr
    without = ["--set", "cache.logits=false"]
    ok("doctor", path, *without)
    ok("dump-teacher", path, *without, "-o", tmp_path / "v.kdcache", "--device", "cpu")
    ok("verify", tmp_path / "v.kdcache", path, *without, "--teacher", "--device", "cpu")
    said = refused(4, "dump-teacher", path, "--set", "cache.outputs.age.source=ages", "-o", tmp_path / "w.kdcache")
    assert "'ages', did you mean age" in said


def test_two_ranks_one_of_which_is_killed_make_the_same_cache(tmp_path: Path) -> None:
    path, alone = pipeline(tmp_path), tmp_path / "alone.kdcache"
    ok("dump-teacher", path, "-o", alone, "--device", "cpu")
    out = tmp_path / "together" / "c.kdcache"
    out.parent.mkdir()
    with ranks(2, path, out, ("/commits/0/1.json.partial", True)) as processes:
        codes = {exit_code(process) for process in processes}
    assert -signal.SIGKILL in codes
    assert not (out / "manifest.json").exists()
    with ranks(2, path, out) as processes:
        assert [exit_code(process) for process in processes] == [0, 0]
    assert contents(out) == contents(alone)
