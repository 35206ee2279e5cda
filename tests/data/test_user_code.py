"""Data sets and transform steps from a file of the user, and what a mistake in one leads to."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_samples
from torch import nn

import kdcache
from kdcache.config.schema import DatasetSpec, Pipeline
from kdcache.data.datasets import load_held_out, load_split
from kdcache.data.loader import batches
from kdcache.data.transforms import build_transform, is_drawn, is_random
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.models.teacher import load_teacher
from kdcache.runtime import user_code
from kdcache.runtime.progress import Silent

DATA = """
import torch
from torch.utils.data import TensorDataset

class Named(TensorDataset):
    classes = ["rose", "tulip", "daisy"]

def pairs(count, offset=0):
    images = torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2) + offset
    return images, (torch.arange(count) % 3)

def flowers(split, root=None, offset=0):
    counts = {"train": 100, "test": 20}
    return Named(*pairs(counts[split], offset)) if split in counts else None

def every(split, root=None):
    return TensorDataset(*pairs({"train": 30, "validation": 10, "test": 20}[split]))

def rooted(split, root=None):
    return Named(*pairs(int(root))) if split == "train" else None

def wide(split, root=None):
    return TensorDataset(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 900])) if split == "train" else None

def unnamed(split, root=None):
    data = TensorDataset(*pairs(9))
    data.classes = "rose"
    return data

def lines(split, root=None):
    return [(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 2), "one")] if split == "train" else None
"""


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    """What one test trusts, the next does not."""
    before = set(user_code._trusted)
    yield
    user_code._trusted.clear()
    user_code._trusted.update(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my_data.py"
    path.write_text(DATA)
    return path


def spec(file: Path, name: str, **given: Any) -> DatasetSpec:
    return DatasetSpec(name=f"{file}:{name}", **given)


# Data sets


def test_splits_that_it_lacks_are_held_out_of_its_training_images(data: Path) -> None:
    flowers = spec(data, "flowers", validation_fraction=0.2)
    splits = {split: load_split(flowers, split) for split in ("train", "validation", "test")}
    assert {split: len(samples) for split, samples in splits.items()} == {"train": 80, "validation": 20, "test": 20}
    values = {split: {int(samples.images.picture(i).max()) for i in range(len(samples))}  # type: ignore[union-attr]
              for split, samples in splits.items()}  # fmt: skip
    assert values["train"] | values["validation"] == set(range(100))
    assert not values["train"] & values["validation"]
    for samples in splits.values():
        assert samples.class_names == ("rose", "tulip", "daisy")
        assert samples.name == "my_data.py:flowers"
    assert load_held_out(spec(data, "flowers", validation_fraction=0.0), "validation") is None


def test_splits_of_its_own_are_taken_and_classes_counted(data: Path) -> None:
    every = spec(data, "every")
    assert [len(load_split(every, split)) for split in ("train", "validation", "test")] == [30, 10, 20]
    assert load_split(every, "test").class_names == ("0", "1", "2")


def test_root_and_arguments_are_passed_on(data: Path) -> None:
    assert len(load_split(spec(data, "rooted", root="50", validation_fraction=0.0, test_fraction=0.0), "train")) == 50
    first = load_split(spec(data, "flowers", args={"offset": 7}), "test").images.picture(0)
    assert isinstance(first, torch.Tensor)
    assert first.max() == 7


BAD_DATA = {
    "missing file": (None, "nothing.py:f", r"file not found: .*nothing.py, of the data set"),
    "missing function": ("x = 1", "f", "has no function 'f'"),
    "one argument": (
        "def f(split): ...",
        "f",
        r"my_data.py:1: f\(split\) cannot be called: got an unexpected .* 'root'",
    ),
    "raises": ("def f(split, root=None):\n    return {}[split]", "f", r"raised KeyError: 'train' \(.*my_data.py:2\)"),
    "no training split": ("def f(split, root=None): return None", "f", "returned None for the split 'train'"),
    "an iterator": ("def f(split, root=None): return iter([])", "f", "list_iterator for the split 'train', not a data"),
    "a number": ("def f(split, root=None): return 3", "f", "my_data.py:1: f returned a int for the split 'train'"),
    "nothing in it": ("def f(split, root=None): return []", "f", "empty data set for the split 'train'"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_a_mistake_in_a_data_set_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    text, name, message = BAD_DATA[case]
    if text is not None:
        (tmp_path / "my_data.py").write_text(text)
        name = f"my_data.py:{name}"
    with pytest.raises(UsageError, match=message) as caught:
        load_split(DatasetSpec(name=f"{tmp_path}/{name}", root="here"), "train")
    assert caught.value.fix


def test_a_root_is_passed_only_if_it_is_set(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text("import torch\ndef f(split): return [(torch.zeros(1, 2, 2), 0)] * 9")
    assert len(load_split(DatasetSpec(name=f"{tmp_path}/my_data.py:f"), "test")) == 9


def test_invalid_labels_and_classes_are_refused(data: Path) -> None:
    with pytest.raises(MismatchError, match="label 900 and only 4 images") as caught:
        load_split(spec(data, "wide", validation_fraction=0.0, test_fraction=0.0), "train")
    assert "attribute `classes`" in caught.value.fix
    with pytest.raises(UsageError, match=r"attribute `classes` of .* is a str"):
        load_split(spec(data, "unnamed"), "train")
    with pytest.raises(UsageError, match="item 1 of the data set is not a pair of an image and an integer label"):
        load_split(spec(data, "lines", validation_fraction=0.0, test_fraction=0.0), "train")


def test_names_and_arguments_of_a_data_set_are_checked_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("dataset: {name: mine.txt:f}", "dataset.name: Input should be 'digits', .* or path/file.py:function"),
        ("dataset: {name: digits, args: {a: 1}}", "dataset.args: are for path/file.py:function"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            kdcache.load_pipeline(path)


PIPELINE = """
dataset: {{name: "{folder}/my_data.py:flowers"}}
transform: [{{"{folder}/my_steps.py:plus": {{amount: 2.0}}}}]
teacher: {{model: "{folder}/my_net.py:net"}}
student: {{model: "small:mlp", train: {{epochs: 1}}}}
"""

STEPS = """
import torch

def plus(image, amount=1.0):
    return image + amount
plus.deterministic = True

def noise(image, amount=1.0):
    return image + amount * torch.rand(())

class Times:
    deterministic = True
    def __init__(self, factor):
        self.factor = factor
    def __call__(self, image):
        return image * self.factor
"""


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    path = tmp_path / "my_steps.py"
    path.write_text(STEPS)
    return path


def trusting(transform: list[dict[str, dict[str, Any]]]) -> list[dict[str, dict[str, Any]]]:
    user_code.trust(name for step in transform for name in step)
    return transform


# Transform steps


def test_functions_and_classes_are_called_on_one_image(steps: Path) -> None:
    transform = trusting([{f"{steps}:plus": {"amount": 2.0}}, {f"{steps}:Times": {"factor": 3.0}}])
    samples = tiny_samples()
    assert not is_random(transform)
    plain, seen = View(samples, []), View(samples, transform)
    assert torch.equal(seen.__getitems__([3, 5]).images, (plain.__getitems__([3, 5]).images + 2) * 3)


def test_a_step_is_random_unless_it_says_otherwise_and_then_seeded(steps: Path) -> None:
    transform = trusting([{f"{steps}:noise": {}}])
    assert is_random(transform)
    assert is_drawn(transform)
    view = View(tiny_samples(), transform, seed=3)
    first = view.__getitems__([3, 5]).images
    assert torch.equal(first, view.__getitems__([3, 5]).images)
    assert torch.equal(first, next(batches(view, [[3, 5]], 1)).images)
    view = View(tiny_samples(), transform, seed=3, view=1)
    assert not torch.equal(first, view.__getitems__([3, 5]).images)


def test_a_step_may_be_inside_another_step(steps: Path) -> None:
    transform = [{"RandomApply": {"p": 1.0, "transforms": [{f"{steps}:plus": {"amount": 2.0}}]}}]
    Pipeline.model_validate({"dataset": {"name": "digits"}, "transform": transform})
    assert build_transform(transform)(torch.zeros(1, 2, 2)).max() == 2


BAD_STEPS = {
    "missing file": (None, {}, r"file not found: .*my_steps.py, of the transform step"),
    "missing function": ("x = 1", {}, "has no function 'f'"),
    "an unknown argument": ("def f(image): ...", {"a": 1}, r"my_steps.py:1: f\(image\) cannot be called: got an unexp"),
    "an argument that it needs": ("def f(image, a): ...", {}, "missing a required argument: 'a'"),
    "a class that is not callable": ("class f: ...", {}, "my_steps.py:1: f makes objects that cannot be called"),
    "a class that raises": ("class f:\n  def __init__(self): 1 / 0", {}, r"ZeroDivisionError.*my_steps.py:2\)"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_an_invalid_step_is_refused_when_it_is_built(case: str, tmp_path: Path) -> None:
    text, arguments, message = BAD_STEPS[case]
    if text is not None:
        (tmp_path / "my_steps.py").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        build_transform(trusting([{f"{tmp_path}/my_steps.py:f": arguments}]))
    assert caught.value.fix


BAD_RESULTS = {
    "nothing": ("pass", "my_steps.py:1: f returned a NoneType, not a tensor"),
    "a vector": ("return image.flatten()", r"f returned a Tensor \[.*\], not a tensor \[channels, H, W\]"),
    "an array": ("return image.numpy()", "f returned a ndarray, not a tensor"),
    "raises": ("return image['a']", r"f raised .*\(.*my_steps.py:2\)"),
}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_result_that_is_not_an_image_is_reported_with_file_and_line(case: str, tmp_path: Path) -> None:
    body, message = BAD_RESULTS[case]
    (tmp_path / "my_steps.py").write_text(f"def f(image):\n    {body}\n")
    view = View(tiny_samples(), trusting([{f"{tmp_path}/my_steps.py:f": {}}]))
    with pytest.raises(UsageError, match=message):
        view.__getitems__([0])


def test_a_step_reaches_a_spawned_worker(steps: Path, tmp_path: Path) -> None:
    step = build_transform(trusting([{f"{steps}:plus": {"amount": 2.0}}]))
    (tmp_path / "step.pkl").write_bytes(pickle.dumps(step))
    script = "import pickle, sys, torch; print(pickle.load(open(sys.argv[1], 'rb'))(torch.zeros(1, 2, 2)).max().item())"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "step.pkl")],
                          env=os.environ, capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert done.stdout == "2.0\n", done.stderr


# All of them, from the teacher to the student


@pytest.fixture
def recipe(data: Path, steps: Path, tmp_path: Path) -> Path:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\ndef net(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(PIPELINE.format(folder=tmp_path))
    return path


def dumped(recipe: Path) -> kdcache.Cache:
    pipeline = kdcache.load_pipeline(recipe)
    samples = load_split(pipeline.dataset, "train")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    out = recipe.parent / "mine.kdcache"
    return kdcache.dump_teacher(model, samples, out, transform=pipeline.transform)


def test_a_teacher_is_dumped_and_a_student_trained_with_user_code(recipe: Path, steps: Path) -> None:
    cache = dumped(recipe)
    views = cache.manifest.plan.views
    assert views.transform == [{f"{steps}:plus": {"amount": 2.0}}]
    assert cache.manifest.plan.dataset.name == "my_data.py:flowers"
    assert cache.manifest.plan.dataset.class_names == ("rose", "tulip", "daisy")
    result = kdcache.train_student(kdcache.load_pipeline(recipe), cache, recipe.parent / "run")
    assert result.test is not None


def test_a_cache_alone_does_not_decide_what_is_run(recipe: Path, steps: Path, tmp_path: Path) -> None:
    cache = dumped(recipe)
    samples = load_split(kdcache.load_pipeline(recipe).dataset, "train")
    user_code._trusted.clear()
    steps.write_text("raise SystemExit('this must not run')")
    assert is_random(cache.manifest.plan.views.transform)
    for transform in ("transform: null", "transform: [{Normalize: {mean: [0.0], std: [1.0]}}]"):
        own = tmp_path / "own.yaml"
        lines = [transform if line.startswith("transform:") else line for line in recipe.read_text().splitlines()]
        own.write_text("\n".join(lines))
        with pytest.raises(kdcache.KdcacheError, match=r"code that is not part of the cache|not that of the cache"):
            kdcache.train_student(kdcache.load_pipeline(own), cache, tmp_path / "run")
    with pytest.raises(UsageError, match=r"my_steps\.py:plus, code that is not part of the cache") as caught:
        kdcache.CachedDataset(samples, cache)
    assert "transform" in caught.value.fix
    steps.write_text(STEPS)
    own_transform = [{f"{steps}:plus": {"amount": 2.0}}]
    assert len(kdcache.CachedDataset(samples, cache, transform=own_transform)) == len(samples)


def test_a_changed_user_step_is_detected(recipe: Path, steps: Path, tmp_path: Path) -> None:
    cache = dumped(recipe)
    steps.write_text(STEPS.replace("image + amount\n", "image + 2 * amount\n"))
    with pytest.raises(MismatchError, match=r"is not what the teacher of .* saw"):
        kdcache.train_student(kdcache.load_pipeline(recipe), cache, tmp_path / "run")


SIBLINGS = {
    "my_data.py": "from pictures import flowers\n",
    "pictures.py": DATA,
    "my_steps.py": "from amounts import AMOUNT\ndef plus(image): return image + AMOUNT\nplus.deterministic = True\n",
    "amounts.py": "AMOUNT = 2.0\n",
    "my_net.py": "from layers import net\n",
    "layers.py": "import torch\nfrom torch import nn\n"
    "def net(num_classes):\n    torch.manual_seed(0)\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))\n",
    "my_loss.py": "from distances import distance\n"
    "def loss(student_logits, teacher_logits, labels): return distance(student_logits, teacher_logits)\n",
    "distances.py": "def distance(a, b): return (a - b).square().mean(dim=1)\n",
}


class StopsAtTheTest(Silent):
    """Interrupts a run after its training."""

    def task(self, what: str, total: int, unit: str) -> Any:
        if what == "test":
            raise KeyboardInterrupt
        return super().task(what, total, unit)


def test_a_run_is_not_resumed_with_other_modules_beside_any_of_its_files(tmp_path: Path) -> None:
    for name, text in SIBLINGS.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f'dataset: {{name: "{tmp_path}/my_data.py:flowers"}}\ntransform: [{{"{tmp_path}/my_steps.py:plus": {{}}}}]\n'
        f'student: {{model: "{tmp_path}/my_net.py:net", train: {{epochs: 1}}}}\n'
        f'loss: {{name: "{tmp_path}/my_loss.py:loss"}}\n'
    )
    pipeline = kdcache.load_pipeline(path)
    samples = load_split(pipeline.dataset, "train")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    cache = kdcache.dump_teacher(model, samples, tmp_path / "mine.kdcache", transform=pipeline.transform)
    with pytest.raises(kdcache.InterruptedRun, match="interrupted"):
        kdcache.train_student(pipeline, cache, tmp_path / "run", progress=StopsAtTheTest())
    for name in ("pictures.py", "amounts.py", "layers.py", "distances.py"):
        (tmp_path / name).write_text(SIBLINGS[name] + "# changed\n")
        with pytest.raises(MismatchError, match=r"another run that was interrupted: code\..*was sha256:.*is sha256:"):
            kdcache.train_student(pipeline, cache, tmp_path / "run")
        (tmp_path / name).write_text(SIBLINGS[name])
    (tmp_path / "unrelated.py").write_text("1 / 0")
    assert kdcache.train_student(pipeline, cache, tmp_path / "run").test is not None


def test_the_record_of_a_teacher_depends_on_the_modules_beside_its_file(tmp_path: Path) -> None:
    for name, text in SIBLINGS.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f'dataset: {{name: "{tmp_path}/my_data.py:flowers"}}\nteacher: {{model: "{tmp_path}/my_net.py:net"}}\n'
    )
    pipeline = kdcache.load_pipeline(path)
    digests = [load_teacher(pipeline).identity.code_digest]
    (tmp_path / "layers.py").write_text(SIBLINGS["layers.py"].replace("nn.Flatten()", "nn.Flatten(1)"))
    digests.append(load_teacher(pipeline).identity.code_digest)
    (tmp_path / "distances.py").write_text("")
    digests.append(load_teacher(pipeline).identity.code_digest)
    assert digests[0] != digests[1] == digests[2]
