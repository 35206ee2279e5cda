"""Pipeline files: what one may say in YAML, and everything that is wrong with one, in one message.

A file describes all three stages; each command reads the sections that it needs. `--set student.train.epochs=5`
replaces a single value. The classes below are the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcache.errors import UsageError
from kdcache.losses.spec import Loss, NotNegative, Positive

Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Transform = list[dict[str, dict[str, Any]]]


class Section(BaseModel):
    """A section of a pipeline file: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DatasetSpec(Section):
    """Where the images and labels come from (`datasets.py`)."""

    name: Literal["digits", "cifar10", "cifar100", "imagenet", "image-folder", "npz"]
    root: str | None = None
    """Folder of the data set, or for `npz` the file; relative to the current folder."""
    validation: Fraction = 0.1
    """Part of the training images held out for model selection, where the set has no validation split of its own."""
    test: Fraction = 0.1
    """Part of the images held out for the final test, where the set has no test split of its own."""

    @model_validator(mode="after")
    def _root_where_needed(self) -> DatasetSpec:
        if self.name in ("image-folder", "npz") and self.root is None:
            raise ValueError(f"dataset.root is needed for {self.name}")
        if self.name == "digits" and self.root is not None:
            raise ValueError("digits comes with kdcache and takes no root")
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave nothing to train on")
        return self


class TrainSpec(Section):
    """How a network is trained, teacher or student (`train.py`)."""

    epochs: Count = 30
    batch_size: Count = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NotNegative = 5e-4
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    milestones: list[Count] = []
    """Epochs after which a multistep schedule multiplies the rate by `decay`."""
    decay: Positive = 0.1
    labels_per_class: NotNegativeInt | None = None
    """Show the labels of so many training images a class, drawn with `seed`; of the others a student has the teacher's
    logits alone. None shows all."""
    seed: NotNegativeInt = 0
    workers: NotNegativeInt = 0

    @model_validator(mode="after")
    def _schedule_agrees(self) -> TrainSpec:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to schedule: multistep, which needs at least one")
        return self


class ModelSpec(Section):
    """Which network (`models/`)."""

    model: str
    """`torchvision:NAME`, `torchvision:NAME@WEIGHTS`, `small:cnn`, `small:mlp` or `path/file.py:function`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""
    weights: str | None = None
    """A checkpoint, safetensors or torch; relative to the current folder."""


class TeacherSpec(ModelSpec):
    """The teacher, and how `train-teacher` makes one: from random weights, whatever `weights` says."""

    train: TrainSpec = TrainSpec()


class StudentSpec(ModelSpec):
    """The student and its training."""

    train: TrainSpec = TrainSpec()


class CacheSpec(Section):
    """What a cache keeps of the teacher's output (`cache/codec.py`)."""

    top_k: Count | Literal["all"] = "all"
    tail: Literal["uniform"] = "uniform"
    """What is known of the classes below the top k."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored log-probabilities."""
    views: Count = 1
    """Seeded augmentations of every image; needs a random transform."""
    seed: NotNegativeInt = 0
    shard_rows: Count | None = None
    """Rows of a shard, the unit that is written at once; None lets kdcache choose."""
    batch_size: Count = 256
    workers: NotNegativeInt = 0
    licence: str = ""
    notes: str = ""


class Pipeline(Section):
    """A whole pipeline file."""

    dataset: DatasetSpec
    transform: Transform | None = None
    """What the teacher sees of a training image, in names of torchvision.transforms.v2; None: the data set's own."""
    eval_transform: Transform | None = None
    """The same for validation and test images."""
    teacher: TeacherSpec | None = None
    cache: CacheSpec = CacheSpec()
    student: StudentSpec | None = None
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))

    def section(self, name: Literal["teacher", "student"]) -> Any:
        """A section that a command cannot do without.

        Raises:
            UsageError: if the file has none.
        """
        found = getattr(self, name)
        if found is None:
            raise UsageError(
                f"the pipeline has no {name!r} section", f"add one, for instance: {name}: {{model: small:cnn}}"
            )
        return found

    def to_yaml(self) -> str:
        """The resolved file, every default spelled out; it reads back to the same pipeline."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


Place = tuple[str | int, ...]


class _PlacedLoader(yaml.SafeLoader):
    """A SafeLoader that remembers the line of every key and refuses a key that is given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.lines: dict[Place, int] = {}

    def read(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return {}
        self._remember(node, ())
        return self.construct_document(node)

    def _remember(self, node: yaml.Node, place: Place) -> None:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
                self.lines[(*place, key.value)] = key.start_mark.line + 1
                self._remember(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._remember(value, (*place, index))


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file, apply `KEY=VALUE` overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: such as `student.train.epochs=5`; the value is read as YAML.

    Raises:
        UsageError: with every problem of the file and of the overrides, each with its line or its `--set`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the pipeline {path}: {_reason(error)}", "give the path of a YAML file") from None
    try:
        loader = _PlacedLoader(text)
        data = loader.read()
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not readable YAML: {_one_line(error)}", "mend the file at that place") from None
    if not isinstance(data, dict):
        raise UsageError(
            f"{path} holds no sections but a {type(data).__name__}", "see pipelines/digits.yaml for the form"
        )
    places: dict[Place, str] = {place: f"{path}:{line}" for place, line in loader.lines.items()}
    for override in overrides:
        _apply(data, override, places)
    return _checked(data, places, str(path))


def _apply(data: dict[str, Any], override: str, places: dict[Place, str]) -> None:
    key, sign, value_text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UsageError(f"--set {override!r} is not KEY=VALUE", "write for instance --set student.train.epochs=5")
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: {_one_line(error)}", "quote the value as YAML asks for") from None
    inner: Any = data
    for part in parts[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override}: {part!r} is a value and has no keys", "see `kdcache COMMAND --help`")
    inner[parts[-1]] = value
    for end in range(1, len(parts)):
        places.setdefault(tuple(parts[:end]), f"--set {override}")
    places[tuple(parts)] = f"--set {override}"


def _checked(data: dict[str, Any], places: dict[Place, str], source: str) -> Pipeline:
    try:
        return Pipeline.model_validate(data)
    except ValidationError as error:
        problems = sorted({_problem(e["loc"], e["msg"], e["type"], places, source) for e in error.errors()})
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UsageError(
        "\n  ".join([f"{count} in the pipeline:", *problems]),
        "mend each of them; README.md lists the keys of a pipeline",
    )


def _problem(loc: Place, message: str, kind: str, places: dict[Place, str], source: str) -> str:
    # pydantic puts the chosen branch of a union into the path; what the user wrote has no such step.
    written: Place = ()
    for step in loc:
        if (*written, step) in places:
            written = (*written, step)
    where = places.get(written, source)
    if kind == "missing":
        written = (*written, loc[-1])
    message = {"extra_forbidden": "unknown key", "missing": "is required"}.get(
        kind, message.removeprefix("Value error, ")
    )
    return f"{where}: {'.'.join(map(str, written))}: {message}" if written else f"{where}: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
