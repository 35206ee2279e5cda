"""Pipeline files: what one may say in YAML, and everything that is wrong with one, in one message.

A file describes all three stages; each command reads the sections that it needs. `--set student.train.epochs=5`
replaces a single value. The classes below are the whole vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from kdcache.errors import UsageError
from kdcache.losses.spec import Loss, NotNegative, Positive

Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Transform = list[dict[str, dict[str, Any]]]
Place = tuple[str | int, ...]


class Section(BaseModel):
    """A section of a pipeline file: unknown keys, wrong types and impossible combinations are refused, all at once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Keys whose values cannot stand together, and what to say of the first of them."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, given: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        problems: list[tuple[Any, Any, Place]] = []
        bad: set[str | int] = set()
        try:
            section = validate(given)
        except ValidationError as error:
            if not isinstance(given, dict):
                raise
            problems = [(one["type"], one["msg"], one["loc"]) for one in error.errors()]
            bad = {loc[0] for _, _, loc in problems}
            # Combinations of the keys that are well are judged all the same.
            well = {key: given[key] for key in cls.model_fields if key in given and key not in bad}
            section = cls.model_construct(**{"name": None, **well})
        for keys, message in section._combinations():
            if bad.isdisjoint(keys):
                problems.append(("combination", message, keys[:1]))
        if problems:
            details = [InitErrorDetails(type=PydanticCustomError(a, b), loc=c, input=None) for a, b, c in problems]
            raise ValidationError.from_exception_data(cls.__name__, details)
        return section


class DatasetSpec(Section):
    """Where the images and labels come from (`datasets.py`)."""

    name: Literal["digits", "cifar10", "cifar100", "imagenet", "image-folder", "npz"]
    """Which data set."""
    root: str | None = None
    """Folder of the data set, or for `npz` the file; relative to the current folder."""
    validation: Fraction = 0.1
    """Part of the training images held out for model selection, where the set has no validation split of its own."""
    test: Fraction = 0.1
    """Part of the images held out for the final test, where the set has no test split of its own."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.name in ("image-folder", "npz") and self.root is None:
            yield ("root", "name"), f"is needed for {self.name}"
        if self.name == "digits" and self.root is not None:
            yield ("root", "name"), "digits comes with kdcache and has no root"
        if self.validation + self.test >= 1:
            yield ("validation", "test"), f"{self.validation} and test {self.test} leave nothing to train on"


class TrainSpec(Section):
    """How a network is trained, teacher or student (`train.py`)."""

    epochs: Count = 30
    """Passes over the training images."""
    batch_size: Count = 64
    """Images a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Which optimizer."""
    lr: Positive = 0.05
    """Learning rate at the start."""
    momentum: Fraction = 0.9
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    weight_decay: NotNegative = 5e-4
    """Of every parameter."""
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    """How the learning rate falls."""
    milestones: list[Count] = []
    """Epochs after which a multistep schedule multiplies the rate by `decay`."""
    decay: Positive = 0.1
    """Factor of a multistep schedule."""
    labels_per_class: NotNegativeInt | None = None
    """Show the labels of so many training images a class, drawn with `seed`; of the others a student has the teacher's
    logits alone. None shows all."""
    seed: Seed = 0
    """Of the initial weights, the order of the images and the choice of labels."""
    workers: NotNegativeInt = 0
    """Processes that load images."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if (self.schedule == "multistep") != bool(self.milestones):
            yield ("milestones", "schedule"), "belong to schedule: multistep, which needs at least one"


class ModelSpec(Section):
    """Which network (`models/`)."""

    model: str
    """`torchvision:NAME`, `torchvision:NAME@WEIGHTS`, `small:cnn`, `small:mlp` or `path/file.py:function`."""
    args: dict[str, Any] = {}
    """Keyword arguments of the network's constructor."""
    weights: str | None = None
    """A checkpoint, safetensors or torch: the teacher that is dumped; what a student starts from, if not at random."""


class TeacherSpec(ModelSpec):
    """The teacher, and how `train-teacher` makes one: from random weights, whatever `weights` says."""

    train: TrainSpec = TrainSpec()
    """How `train-teacher` trains it."""


class StudentSpec(ModelSpec):
    """The student and its training."""

    train: TrainSpec = TrainSpec()
    """How `train-student` trains it."""


class CacheSpec(Section):
    """What a cache keeps of the teacher's output (`cache/codec.py`)."""

    fidelity: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Mean total variation between decoded and true softmax that is allowed at T = 1, 2 and 4, on pilot rows. By
    default 0.02 is aimed at; a `top_k` of your own comes as near to it as it can."""
    top_k: Count | Literal["all", "auto"] = "auto"
    """How many classes of each row are kept exactly; `auto`: the cheapest within `fidelity`, all up to 64 classes."""
    tail: Literal["lowrank", "uniform"] = "lowrank"
    """What is known of the other classes: their shape in a basis fitted to the teacher, or their mass alone."""
    rank: Count | None = None
    """Coordinates of a lowrank tail; by default the cheapest within `fidelity`."""
    dtype: Literal["uint8", "float16", "float32"] = "float16"
    """Type of the stored log-probabilities; uint8 keeps all classes."""
    pilot_rows: Count = 4096
    """Images that the teacher sees beforehand, to fit the basis and to measure; none where all classes are kept."""
    views: Count = 1
    """Seeded augmentations of every image; needs a random transform."""
    seed: Seed = 0
    """Of the views."""
    shard_rows: Count | None = None
    """Rows of a shard, the unit that is written at once; None lets kdcache choose."""
    batch_size: Count = 256
    """Images that the teacher sees at once."""
    workers: NotNegativeInt = 0
    """Processes that load images."""
    licence: str = ""
    """Under which the cache may be used; goes into the manifest."""
    notes: str = ""
    """Anything that its users should know; goes into the manifest."""


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
            raise UsageError(f"the pipeline has no {name!r} section", f"add one, such as {name}: {{model: small:cnn}}")
        return found

    def to_yaml(self) -> str:
        """The resolved file, every default spelled out; it reads back to the same pipeline."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False)


class _PlacedLoader(yaml.SafeLoader):
    """A SafeLoader that remembers the line of every key and refuses a key that is given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.lines: dict[Place, int] = {}

    def read(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._remember(node, ())
        return self.construct_document(node)

    def _remember(self, node: yaml.Node, place: Place) -> None:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                if name == "?" or (*place, name) in self.lines:
                    problem = "a key is not a word" if name == "?" else f"the key {name!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                self.lines[(*place, name)] = key.start_mark.line + 1
                self._remember(value, (*place, name))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._remember(value, (*place, index))


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes what `_PlacedLoader` would take for a number."""


# YAML 1.1, which PyYAML reads, takes 1e-3 for a word; everybody who writes a learning rate means the number.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _side in (_PlacedLoader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))

# What PyYAML raises: its own kind, and what Python makes of a date with 13 months or of a thousand brackets.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError)


def load_pipeline(path: Path, overrides: Sequence[str] = (), loss: str | None = None) -> Pipeline:
    """Read a pipeline file, apply `KEY=VALUE` overrides, and check all of it.

    Args:
        path: the YAML file.
        overrides: such as `student.train.epochs=5`; the value is read as YAML.
        loss: name of a loss; where the file's is another, its options go with it.

    Raises:
        UsageError: with every problem of the file and of the overrides, each with its line or its `--set`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the pipeline {path}: {reason}", "give the path of a YAML file") from None
    data, lines = _read(text, str(path))
    data = data or {}
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no sections but a {type(data).__name__}", "see pipelines/digits.yaml")
    places: dict[Place, str] = {place: f"{path}:{line}" for place, line in lines.items()}
    if loss is not None and (not isinstance(data.get("loss"), dict) or data["loss"].get("name") != loss):
        data["loss"] = {"name": loss}
        places["loss",] = places["loss", "name"] = f"--loss {loss}"
    for override in overrides:
        _apply(data, override, places)
    return _checked(data, places, str(path))


def _read(text: str, source: str) -> tuple[Any, dict[Place, int]]:
    try:
        loader = _PlacedLoader(text)
        return loader.read(), loader.lines
    except _BAD_YAML as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"{source} is not readable YAML: {why}", "mend it there, or quote what it stumbles over"
        ) from None


def _apply(data: dict[str, Any], override: str, places: dict[Place, str]) -> None:
    key, sign, value_text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise UsageError(f"--set {override!r} is not KEY=VALUE", "write for instance --set student.train.epochs=5")
    value, lines = _read(value_text, f"--set {override}")
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
    for stale in [place for place in places if place[: len(parts)] == tuple(parts)]:
        del places[stale]
    places.update({(*parts, *inside): f"--set {override}" for inside in lines or [()]})


_IN_OUR_WORDS = {"extra_forbidden": "unknown key", "missing": "is required", "model_type": "must have keys of its own"}


def _keys(section: type[BaseModel]) -> set[str]:
    """Every key of a section and of those inside it."""
    found = set(section.model_fields)
    for field in section.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _keys(kind)
    return found


def _checked(data: dict[str, Any], places: dict[Place, str], source: str) -> Pipeline:
    try:
        return Pipeline.model_validate(data)
    except ValidationError as error:
        found: dict[Place, list[str]] = {}
        for one in error.errors():
            # pydantic puts the chosen branch of a union into the path; what the user wrote has no such step.
            written: Place = ()
            for step in one["loc"]:
                if (*written, step) in places:
                    written = (*written, step)
            if one["type"] in ("missing", "combination") and written[-1:] != one["loc"][-1:]:
                written = (*written, one["loc"][-1])
            message = _IN_OUR_WORDS.get(one["type"], one["msg"].removeprefix("Value error, "))
            near = get_close_matches(str(one["loc"][-1]), _keys(Pipeline), cutoff=0.75) if one["loc"] else []
            if one["type"] == "extra_forbidden" and near:
                message += f", did you mean {near[0]}?"
            found.setdefault(written, []).append(message)
    problems = []
    for written, messages in found.items():
        where = places.get(written) or places.get(written[:-1], source)
        problems.append(": ".join([where, *filter(None, [".".join(map(str, written))]), " or ".join(messages)]))
    what = "\n  ".join([f"{len(problems)} problem{'s'[: len(problems) - 1]} in the pipeline:", *problems])
    raise UsageError(what, "mend each of them; README.md lists the keys of a pipeline")
