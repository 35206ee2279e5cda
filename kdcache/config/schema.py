"""The schema of pipeline files; all problems of a file are reported in one message.

A file describes all stages, and each command reads the sections that it needs. `--set student.train.epochs=5` replaces
a single value. The docstrings of the fields are the table of keys in docs/PIPELINES.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcache.config.cache import CacheSpec, OutputName, Patches
from kdcache.config.optimizer import Fraction, OptimizerSpec
from kdcache.config.section import Count, NotNegativeInt, Section, Seed
from kdcache.config.transform import Transform, step_names
from kdcache.config.yaml_lines import write_yaml
from kdcache.errors import UsageError, did_you_mean
from kdcache.losses.config import Loss
from kdcache.losses.options import Positive
from kdcache.runtime.user_code import is_user_code, trust

Output = NotNegativeInt

TEXT = "text"
"""Name of the data set of texts, whose pipelines have a schema of their own (`config/text.py`)."""

COME_WITH_KDCACHE = ("digits", "scenes")
"""Data sets that need no files of the user."""

DATASETS = (
    "digits", "cifar10", "cifar100", "imagenet", "image-folder", "npz", "graph",
    "segmentation-folder", "voc", "cityscapes", "sbd", "scenes",
)  # fmt: skip


class DatasetSpec(Section):
    """The data set (`data/datasets.py`)."""

    name: str
    """`digits`, `cifar10`, `cifar100`, `imagenet`, `image-folder`, `npz`, `graph`, `segmentation-folder`, `voc`,
    `cityscapes`, `sbd`, `scenes` or `path/file.py:function`."""
    root: str | None = None
    """Folder of the data set, or for `npz` and `graph` the file; relative to the current folder."""
    args: dict[str, Any] = Field(default={})
    """Keyword arguments of the function, if `name` is `path/file.py:function`."""
    classes: list[str] | str | None = None
    """Of `segmentation-folder`: names of the classes, or a text file with a line per class; None: `classes.txt` in
    `root`."""
    first_class: NotNegativeInt = 0
    """Of `segmentation-folder`: value of the first class in the masks, such as 1 where 0 is ignored."""
    ignore: NotNegativeInt | None = 255
    """Of `segmentation-folder`: value of the pixels of a mask that have no class; None: all have one."""
    palettes: bool = False
    """Of `segmentation-folder`: whether the indices of palette images are classes, as in Pascal VOC."""
    validation_fraction: Fraction = 0.1
    """Fraction of the training images held out for model selection, if the set has no validation split of its own."""
    test_fraction: Fraction = 0.1
    """Fraction of the training images held out for the final test, if the set has no test split of its own."""

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in DATASETS and not is_user_code(name):
            known = (*DATASETS, TEXT)
            raise ValueError(
                f"Input should be {', '.join(map(repr, known))} or path/file.py:function{did_you_mean(name, known)}"
            )
        return name

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.args and not is_user_code(self.name):
            yield ("args", "name"), f"are for path/file.py:function, and {self.name} takes none"
        for key in ("classes", "first_class", "ignore", "palettes"):
            if self.name != "segmentation-folder" and getattr(self, key) != type(self).model_fields[key].default:
                yield (key, "name"), f"belongs to segmentation-folder, and this data set is {self.name}"
        if self.name in ("image-folder", "npz", "graph", "segmentation-folder") and self.root is None:
            yield ("root", "name"), f"is needed for {self.name}"
        if self.name in COME_WITH_KDCACHE and self.root is not None:
            yield ("root", "name"), f"{self.name} comes with kdcache and has no root"
        if self.validation_fraction + self.test_fraction >= 1:
            yield (
                ("validation_fraction", "test_fraction"),
                (f"{self.validation_fraction} and test_fraction {self.test_fraction} leave nothing to train on"),
            )


class TrainSpec(OptimizerSpec):
    """How a network of images is trained, teacher or student (`train/loop.py`)."""

    batch_size: Count = 64
    """Images per step, over all processes."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches that each process splits its part of a step into, if the whole does not fit its memory."""
    early_stopping_patience: Count | None = None
    """Stop after this many epochs without a better validation accuracy, or with `held_out_fraction` without a lower
    loss of the samples that are held out."""
    held_out_fraction: Fraction = 0.0
    """Fraction of the training samples that are held out, for a student without class logits or without a validation
    split: the epoch with the lowest loss on them is selected. Without it, the last epoch is."""
    channels_last: bool = False
    """Channels-last memory format of images and weights, which makes convolutions on a GPU faster."""
    view_order: Literal["cycle", "random"] = "cycle"
    """Which view of a cache an epoch sees: one after the other, or one drawn with `data_seed`."""
    labels_per_class: NotNegativeInt | None = None
    """Number of training images per class whose labels are used, drawn with `seed`; for the others a student has the
    teacher's logits only. None uses all labels."""
    seed: Seed = 0
    """Seed of the initial weights, the order of the images and the choice of labels."""
    data_seed: Seed | None = None
    """Seed of the order of the images, of `view_order: random` and of `student.transform`; None: `seed`."""
    num_workers: NotNegativeInt | Literal["auto"] = "auto"
    """Data-loading processes; auto: as many as there are cores, at most 8, and none for images in memory whose batches
    are transformed at once, nor for data sets of your own."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super()._combinations()
        if self.gradient_accumulation_steps > self.batch_size:
            message = f"{self.batch_size} images cannot be split into {self.gradient_accumulation_steps} micro-batches"
            yield ("gradient_accumulation_steps", "batch_size"), message


class ModelSpec(Section):
    """A network (`models/`)."""

    model: str
    """`torchvision:NAME`, `torchvision:NAME@WEIGHTS`, `timm:NAME`, `timm:NAME@TAG`, `hf:FOLDER` (an image classifier
    or a segmentation network of transformers), `cifar:NAME`, `small:cnn`, `small:mlp`, `small:fcn` or
    `path/file.py:function`."""
    args: dict[str, Any] = Field(default={})
    """Keyword arguments of the network's constructor. With `features_only: true` a network of timm is an encoder, and
    gets a head that says a class of each pixel."""
    weights: str | None = None
    """Checkpoint, safetensors or torch: of the teacher that is dumped; for a student its initial weights. `PATH#PART`
    selects one of several state dicts in it, such as `last.pth#state_dict_ema`. A folder is one that `save_pretrained`
    wrote."""
    output: NotNegativeInt | str | None = None
    """The part of a returned tuple, dictionary or record that holds the logits: an index or a name; a nested part is
    written with dots. None: the part `logits`, if the network does not return a tensor."""

    @property
    def names_weights(self) -> bool:
        """Whether `model` names weights that a library provides."""
        kind, _, name = self.model.partition(":")
        return kind in ("torchvision", "timm") and "@" in name and not self.is_encoder

    @property
    def is_encoder(self) -> bool:
        """Whether `model` is an encoder of timm, and its weights are those of a part of the network."""
        return self.model.startswith("timm:") and bool(self.args.get("features_only"))

    @property
    def has_own_weights(self) -> bool:
        """Whether a teacher of this `model` has weights without a checkpoint: its library's or those of its folder."""
        return self.names_weights or (self.model.startswith("hf:") and self.weights is None)


class TrainedSpec(ModelSpec):
    """A trained network, and the classes that its outputs stand for."""

    classes: list[Output | Annotated[list[Output], Field(min_length=1)]] | str | None = None
    """The network's outputs for the classes of the data set: for each class the index of an output, or a list of
    several, which are joined by logsumexp; or a text file with a line per class. None: the outputs are the classes."""
    outputs: Count | None = None
    """Number of outputs of the network, if `classes` is set and `model` does not name weights."""
    prune: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of the weights, the smallest of each convolution and linear layer, that are 0 when it is dumped."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.outputs is not None and self.classes is None:
            yield ("outputs", "classes"), "belongs to classes, which says what the outputs stand for"
        if self.outputs is not None and self.has_own_weights:
            yield ("outputs", "model"), f"cannot be set: {self.model} has a fixed number of outputs"
        if self.outputs is None and self.classes is not None and not self.has_own_weights:
            yield ("outputs", "classes", "model"), "is needed with classes: the number of outputs of the network"


class TeacherSpec(TrainedSpec):
    """The teacher, and how `train-teacher` trains one: from random weights, whatever `weights` is."""

    train: TrainSpec = TrainSpec()
    """How `train-teacher` trains it."""


class MemberSpec(TrainedSpec):
    """One of the networks of an ensemble."""

    weight: Positive = 1.0
    """Weight of the network in the ensemble."""


class EnsembleSpec(Section):
    """An ensemble of networks as one teacher (`models/ensemble.py`)."""

    ensemble: Annotated[list[MemberSpec], Field(min_length=1)]
    """Instead of the keys above: networks that are one teacher, each with the keys above and `weight` (default 1).
    `teacher: [a, b]` is short for it, and the name of a model for `{model: NAME}`."""
    combine: Literal["logits", "probabilities"] = "logits"
    """For an ensemble: weighted mean of the networks' logits, or of their probabilities."""

    @field_validator("ensemble", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return [{"model": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


class StudentOutputSpec(Section):
    """An output of the student that a loss compares with that of the teacher."""

    source: NotNegativeInt | str | None = None
    """What it is in the student: an index or a name in what it returns, or the name of a module, such as `layer4` or
    `"5"`. None: its own name; for `features`, if neither has that name, the input of the last linear layer."""
    pool: Literal["none", "mean", "first"] = "none"
    """How [B, D, H, W] or [B, L, D] becomes [B, D]: the mean over all places, or the first of L; `none` refuses it."""
    patches: Patches | None = None
    """For a loss of maps: h and w of the places of [B, L, D], as in `cache.outputs`."""


class StudentSpec(ModelSpec):
    """The student and its training."""

    transform: Transform | None = None
    """Transform of the student's training images instead of the teacher's; only if the teacher saw fixed images (one
    view, nothing random). The teacher's logits then belong to other pixels, as in most published KD code."""
    outputs: dict[OutputName, StudentOutputSpec] = Field(default={})
    """Where the outputs are taken that `loss` compares with those of the teacher, by name, each with the keys below.
    An output that is not named here is taken by its name."""
    train: TrainSpec = TrainSpec()
    """How `train-student` trains it."""


class JoinSpec(Section):
    """How several caches, `--cache A --cache B`, are one teacher (`cache/joined_teacher.py`)."""

    combine: Literal["logits", "probabilities", "confidence"] = "logits"
    """For several caches: weighted mean of the teachers' logits, or of their probabilities, or per sample the logits of
    the teacher with the largest product of top probability and weight."""
    weights: list[Positive] | None = None
    """Weight of each cache, in the order of the command line; None: equal weights."""


class Pipeline(Section):
    """A whole pipeline file."""

    dataset: DatasetSpec
    transform: Transform | None = None
    """Transform of the training images that the teacher sees: a list of steps, each a name of
    torchvision.transforms.v2 or `path/file.py:function` with its arguments. None: the data set's own."""
    eval_transform: Transform | None = None
    """Transform of validation and test images."""
    teacher: TeacherSpec | EnsembleSpec | None = None
    cache: CacheSpec = CacheSpec()
    student: StudentSpec | None = None
    join: JoinSpec = JoinSpec()
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        # Chosen here, so that errors are about the kind that was meant.
        if given is None or isinstance(given, Section):
            return given
        if isinstance(given, list):
            given = {"ensemble": given}
        several = isinstance(given, dict) and not given.keys().isdisjoint(EnsembleSpec.model_fields)
        return (EnsembleSpec if several else TeacherSpec).model_validate(given)

    @model_validator(mode="after")
    def _trust_own_code(self) -> Pipeline:
        own = self.student.transform if self.student is not None else None
        for transform in (self.transform, self.eval_transform, own):
            trust(step_names(transform))
        return self

    @property
    def members(self) -> list[TrainedSpec]:
        """The networks of the teacher: one, or those of an ensemble.

        Raises:
            UsageError: if the file has no teacher.
        """
        if self.teacher is None:
            raise self._lacks("teacher")
        return [*self.teacher.ensemble] if isinstance(self.teacher, EnsembleSpec) else [self.teacher]

    def section(self, name: Literal["teacher", "student"]) -> Any:
        """Return the section of a network that is to be trained.

        Raises:
            UsageError: if the file has no such section, or the teacher in it cannot be trained.
        """
        section = getattr(self, name)
        if section is None:
            raise self._lacks(name)
        if isinstance(section, EnsembleSpec):
            raise UsageError(
                f"the teacher is an ensemble of {len(section.ensemble)}, and one network is trained at a time",
                "train each with its own pipeline, and set the `weights` of each here to its checkpoint",
            )
        if isinstance(section, TeacherSpec) and section.classes is not None:
            raise UsageError(
                "teacher.classes selects outputs of a network that is already trained",
                "to train one, remove `classes` and `outputs`: it gets one output for each class of the data set",
            )
        return section

    @staticmethod
    def _lacks(name: str) -> UsageError:
        return UsageError(f"the pipeline has no {name!r} section", f"add one, such as {name}: {{model: small:cnn}}")

    def to_yaml(self) -> str:
        """Return the resolved file with all defaults, which reads back to the same pipeline."""
        return write_yaml(self.model_dump())
