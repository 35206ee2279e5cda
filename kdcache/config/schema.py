"""Pipeline files: what one may say in YAML, and everything that is wrong with one, in one message.

A file describes all three stages; each command reads the sections that it needs. `--set student.train.epochs=5`
replaces a single value. The classes below are the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kdcache.config.section import Section
from kdcache.config.yaml_lines import write_yaml
from kdcache.errors import UsageError
from kdcache.losses.config import Loss, NotNegative, Positive

Count = Annotated[int, Field(ge=1)]

NotNegativeInt = Annotated[int, Field(ge=0)]

Output = NotNegativeInt

Seed = Annotated[int, Field(ge=0, lt=2**32)]

Fraction = Annotated[float, Field(ge=0, lt=1)]

Transform = list[dict[str, dict[str, Any]]]


class DatasetSpec(Section):
    """Where the images and labels come from (`datasets.py`)."""

    name: Literal["digits", "cifar10", "cifar100", "imagenet", "image-folder", "npz"]
    """Which data set."""
    root: str | None = None
    """Folder of the data set, or for `npz` the file; relative to the current folder."""
    validation_fraction: Fraction = 0.1
    """Part of the training images held out for model selection, where the set has no validation split of its own."""
    test_fraction: Fraction = 0.1
    """Part of the images held out for the final test, where the set has no test split of its own."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.name in ("image-folder", "npz") and self.root is None:
            yield ("root", "name"), f"is needed for {self.name}"
        if self.name == "digits" and self.root is not None:
            yield ("root", "name"), "digits comes with kdcache and has no root"
        if self.validation_fraction + self.test_fraction >= 1:
            yield (
                ("validation_fraction", "test_fraction"),
                (f"{self.validation_fraction} and test_fraction {self.test_fraction} leave nothing to train on"),
            )


class TrainSpec(Section):
    """How a network is trained, teacher or student (`fit.py`)."""

    epochs: Count = 30
    """Passes over the training images."""
    batch_size: Count = 64
    """Images a step, of all processes together."""
    gradient_accumulation_steps: Count = 1
    """Pieces that a process goes through a step in, one after the other, where a whole one does not fit its memory."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Which optimizer."""
    lr: Positive = 0.05
    """Highest learning rate."""
    momentum: Fraction = 0.9
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    weight_decay: NotNegative = 5e-4
    """Of every parameter."""
    schedule: Literal["constant", "cosine", "multistep", "onecycle"] = "cosine"
    """How the learning rate changes after the warm-up (`schedule.py`)."""
    warmup_epochs: NotNegative = 0.0
    """Epochs over which the learning rate grows from 0; of onecycle, to its highest (0: three tenths of all)."""
    milestones: list[Count] = Field(default=[])
    """Epochs after which a multistep schedule multiplies the rate by `gamma`."""
    gamma: Positive = 0.1
    """Factor of a multistep schedule."""
    label_smoothing: Fraction = 0.0
    """Of the cross-entropy with the labels."""
    max_grad_norm: Positive | None = None
    """Largest norm of a step's gradient, all parameters together."""
    ema_decay: Fraction | None = None
    """Validate and keep the exponential moving average of the weights, of which so much stays at each step."""
    early_stopping_patience: Count | None = None
    """Stop after so many epochs without a better validation accuracy."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What training computes in: float32, or mixed precision. Validation and test are in float32."""
    channels_last: bool = False
    """Lay images and weights out with the channels last, which convolutions on a GPU are quicker with."""
    compile: bool = False
    """Compile the network with torch.compile."""
    view_order: Literal["cycle", "random"] = "cycle"
    """Which of a cache's views an epoch sees: one after the other, or one drawn with `seed`."""
    labels_per_class: NotNegativeInt | None = None
    """Show the labels of so many training images a class, drawn with `seed`; of the others a student has the teacher's
    logits alone. None shows all."""
    seed: Seed = 0
    """Of the initial weights, the order of the images and the choice of labels."""
    num_workers: NotNegativeInt = 0
    """Processes that load images."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]] = (
        Field(default=[])
    )
    """Who is sent the metrics of each epoch, through accelerate; metrics.csv has them in any case."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if (self.schedule == "multistep") != bool(self.milestones):
            yield ("milestones", "schedule"), "belong to schedule: multistep, which needs at least one"
        if self.warmup_epochs >= self.epochs:
            yield ("warmup_epochs", "epochs"), f"{self.warmup_epochs} leave nothing of {self.epochs} epochs"
        if self.gradient_accumulation_steps > self.batch_size:
            yield (
                ("gradient_accumulation_steps", "batch_size"),
                (f"{self.batch_size} images cannot be split into {self.gradient_accumulation_steps} micro-batches"),
            )


class ModelSpec(Section):
    """Which network (`models/`)."""

    model: str
    """`torchvision:NAME`, `torchvision:NAME@WEIGHTS`, `timm:NAME`, `timm:NAME@TAG`, `hf:FOLDER` (an image classifier
    of transformers), `cifar:NAME`, `small:cnn`, `small:mlp` or `path/file.py:function`."""
    args: dict[str, Any] = Field(default={})
    """Keyword arguments of the network's constructor."""
    weights: str | None = None
    """A checkpoint, safetensors or torch: the teacher that is dumped; what a student starts from, if not at random.
    `PATH#PART` chooses among several state dicts in it, such as `last.pth#state_dict_ema`. A folder is one that
    `save_pretrained` wrote."""
    output: NotNegativeInt | str | None = None
    """Which part of a tuple, dictionary or record that the network returns holds the logits: an index or a name, of
    parts within parts names with dots between. None: the part `logits`, if it does not return a tensor."""

    @property
    def names_weights(self) -> bool:
        """Whether `model` names weights that a library keeps."""
        kind, _, name = self.model.partition(":")
        return kind in ("torchvision", "timm") and "@" in name

    @property
    def has_own_weights(self) -> bool:
        """Whether a teacher of this `model` has weights without a checkpoint: its library's or those of its folder."""
        return self.names_weights or (self.model.startswith("hf:") and self.weights is None)


class TrainedSpec(ModelSpec):
    """A network that has been trained, and what its outputs stand for."""

    classes: list[Output | Annotated[list[Output], Field(min_length=1)]] | str | None = None
    """Which of the network's outputs stand for the classes of the data set: for each class the number of an output, or
    a list of several, which are joined by logsumexp; or a text file with one line a class. None: its outputs are the
    classes."""
    outputs: Count | None = None
    """How many outputs the network has, where `classes` picks some of them and `model` does not name its weights."""

    def _combinations(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.outputs is not None and self.classes is None:
            yield ("outputs", "classes"), "belongs to classes, which says what the outputs stand for"
        if self.outputs is not None and self.has_own_weights:
            yield ("outputs", "model"), f"cannot be set: {self.model} has as many as it has"
        if self.outputs is None and self.classes is not None and not self.has_own_weights:
            yield ("outputs", "classes", "model"), "is needed beside classes: how many outputs the network has"


class TeacherSpec(TrainedSpec):
    """The teacher, and how `train-teacher` makes one: from random weights, whatever `weights` says."""

    train: TrainSpec = TrainSpec()
    """How `train-teacher` trains it."""


class MemberSpec(TrainedSpec):
    """One of the networks of an ensemble."""

    weight: Positive = 1.0
    """How much it counts."""


class EnsembleSpec(Section):
    """Several networks that are one teacher (`models/ensemble.py`)."""

    ensemble: Annotated[list[MemberSpec], Field(min_length=1)]
    """In place of the keys above: several networks that are one teacher, each with `model`, `args`, `weights`,
    `classes`, `outputs`, and a `weight`, 1 if not said. `teacher: [a, b]` is short for it, the name of a model for
    `{model: NAME}`."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Of an ensemble: the weighted mean of the networks' logits, or of their probabilities."""

    @field_validator("ensemble", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return [{"model": one} if isinstance(one, str) else one for one in given] if isinstance(given, list) else given


class StudentSpec(ModelSpec):
    """The student and its training."""

    transform: Transform | None = None
    """What the student sees of a training image in place of what the teacher saw; only where that was fixed (one view
    and nothing random). The teacher's logits are then of other pixels, as in most published KD code."""
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
    num_workers: NotNegativeInt = 0
    """Processes that load images."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the teacher computes in: float32, or mixed precision (autocast)."""
    channels_last: bool = False
    """Lay images and weights out with the channels last, which convolutions on a GPU are quicker with."""
    compile: bool = False
    """Compile the teacher with torch.compile."""
    license: str = ""
    """Under which the cache may be used; goes into the manifest."""
    notes: str = ""
    """Anything that its users should know; goes into the manifest."""


class JoinSpec(Section):
    """How several caches, `--cache A --cache B`, are one teacher (`cache/joined.py`)."""

    combine: Literal["logits", "probabilities", "confidence"] = "logits"
    """Of several caches: the weighted mean of the teachers' logits, or of their probabilities, or, sample by sample,
    the logits of the teacher whose largest probability, times its weight, is largest."""
    weights: list[Positive] | None = None
    """How much each cache counts, in the order of the command line; None: all the same."""


class Pipeline(Section):
    """A whole pipeline file."""

    dataset: DatasetSpec
    transform: Transform | None = None
    """What the teacher sees of a training image, in names of torchvision.transforms.v2; None: the data set's own."""
    eval_transform: Transform | None = None
    """The same for validation and test images."""
    teacher: TeacherSpec | EnsembleSpec | None = None
    cache: CacheSpec = CacheSpec()
    student: StudentSpec | None = None
    join: JoinSpec = JoinSpec()
    loss: Loss = Field(default_factory=lambda: Loss.model_validate({}))

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        # Chosen here, so that what is wrong is told of the one kind that was meant.
        if given is None or isinstance(given, Section):
            return given
        if isinstance(given, list):
            given = {"ensemble": given}
        several = isinstance(given, dict) and not given.keys().isdisjoint(EnsembleSpec.model_fields)
        return (EnsembleSpec if several else TeacherSpec).model_validate(given)

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
        """The section of a network that is to be trained.

        Raises:
            UsageError: if the file has none, or the teacher there is none that can be trained.
        """
        found = getattr(self, name)
        if found is None:
            raise self._lacks(name)
        if isinstance(found, EnsembleSpec):
            raise UsageError(
                f"the teacher is an ensemble of {len(found.ensemble)}, and one network is trained at a time",
                "train each from a pipeline of its own, and set the `weights` of each here to its checkpoint",
            )
        if isinstance(found, TeacherSpec) and found.classes is not None:
            raise UsageError(
                "teacher.classes picks from the outputs of a network that is already trained",
                "to train one, remove `classes` and `outputs`: it gets one output for each class of the data set",
            )
        return found

    @staticmethod
    def _lacks(name: str) -> UsageError:
        return UsageError(f"the pipeline has no {name!r} section", f"add one, such as {name}: {{model: small:cnn}}")

    def to_yaml(self) -> str:
        """The resolved file, every default spelled out; it reads back to the same pipeline."""
        return write_yaml(self.model_dump())
