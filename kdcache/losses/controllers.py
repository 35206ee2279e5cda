"""Controllers: small networks that set the weight or the temperature of each sample.

A controller gets no gradient from the training loss, which it would only make small. Those below are trained for what
a step of the student does to the loss on the validation split (`train/controller.py`); `temperature_agent.py` has one
that learns from a reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.losses.options import LossSection, NotNegative, Positive


class Control(NamedTuple):
    """What a controller sets for each sample of a batch.

    Attributes:
        share: [B], a: the loss of a sample is ce_weight (1 - a) CE + kd_weight a w D; None for no such share.
        temperature: [B], of student and teacher; None for that of the loss.
    """

    share: Tensor | None = None
    temperature: Tensor | None = None

    def detach(self) -> Control:
        """Return the same values without a gradient."""
        return Control(*(None if value is None else value.detach() for value in self))


class ControllerOptions(LossSection, ABC):
    """Options of a controller: base class of those below.

    Attributes:
        sets_temperature: whether it sets the temperatures.
    """

    sets_temperature: ClassVar[bool] = False

    kind: str
    lr: Positive = 0.01
    """Learning rate of its optimizer, Adam."""
    weight_decay: NotNegative = 0.0
    """Weight decay of its optimizer."""
    every: Annotated[int, Field(ge=1)] = 1
    """Steps of the student per step of the controller."""

    @property
    def acts_on_label(self) -> bool:
        """Whether it needs the one true class of each sample."""
        return False


class HypergradientOptions(ControllerOptions, ABC):
    """Options of a controller that is trained by a gradient through a step of the student: about four such steps."""

    @property
    def is_trained(self) -> bool:
        """Whether it is trained at all."""
        return True

    @abstractmethod
    def make(self, num_classes: int, class_means: Tensor) -> Controller:
        """Return the network.

        Args:
            num_classes: C.
            class_means: [C, C], mean probabilities of the teacher over the training samples of each class.
        """


class TGeoOptions(HypergradientOptions):
    """`tgeo`: the share of distillation, from the geometry of student, teacher and label."""

    kind: Literal["tgeo"] = "tgeo"
    published: bool = False
    """Leave the controller as it is initialized, as the published code does by mistake."""

    @property
    def acts_on_label(self) -> bool:
        """Whether it needs the one true class of each sample."""
        return True

    @property
    def is_trained(self) -> bool:
        """Whether it is trained at all."""
        return not self.published

    def make(self, num_classes: int, class_means: Tensor) -> Controller:
        """Return a `ShareController`."""
        return ShareController(num_classes, class_means)


class TemperatureRange(ControllerOptions, ABC):
    """Options of a controller that sets temperatures between two bounds."""

    sets_temperature = True

    low: Positive = 1.0
    """Lowest temperature."""
    high: Positive = 10.0
    """Highest temperature."""

    @model_validator(mode="after")
    def _is_a_range(self) -> TemperatureRange:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}: there is nothing between them")
        return self


class InstanceTemperatureOptions(HypergradientOptions, TemperatureRange):
    """`instance_temperature`: the temperature, from the confidence of student and teacher."""

    kind: Literal["instance_temperature"] = "instance_temperature"

    def make(self, num_classes: int, class_means: Tensor) -> Controller:
        """Return a `TemperatureController`."""
        return TemperatureController(self.low, self.high)


class Controller(nn.Module, ABC):
    """A network from the logits and labels of a batch to its `Control`; no gradient flows back to the student."""

    @abstractmethod
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Control:
        """Return what is set for each sample.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            labels: [B] int64, -1 where not known.
        """


def confidences(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the state of each sample that ITKD's agent acts on, [max q, max p, q_1 - q_2], [B, 3], without a gradient.

    ERRATUM. The published code takes `kthvalue(q, 2)` for q_2, the second largest probability of the student; that is
    the second smallest, so that q_1 - q_2 is nearly q_1.

    Source: Zhengbo-Zhang/ITKD@0183c6c, utils/trainer.py, get_observations.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
    """
    first, second = student_logits.detach().softmax(dim=1).topk(2, dim=1).values.T
    largest = teacher_logits.detach().softmax(dim=1).amax(dim=1)
    return torch.stack([first, largest, first - second], dim=1)


def between(low: float, high: float, place: Tensor) -> Tensor:
    """Return low + (high - low) sigmoid(place), [B], of temperatures."""
    return low + (high - low) * place.sigmoid()


def _layers(inputs: int) -> nn.Sequential:
    """Return the perceptron of TGeo-KD's code, to one number per sample."""
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1), nn.Flatten(0)
    )


class ShareController(Controller):
    """The share a of distillation in the loss of a sample (TGeo-KD: Hu et al. 2023, 2312.15112).

        a = sigmoid(MLP([q, p, g, o, (o - q)^2, (g - q)^2, (p - q)^2, (p - g)^2, (o - g)^2]))

    with q and p the probabilities of student and teacher, g the one-hot label, and o the teacher's mean probabilities
    over the training samples of the label's class. Samples without a label have a = 1: they have no cross-entropy.

    ERRATUM. The published code computes a under `no_grad`, so that its controller never gets a gradient and keeps its
    random weights (`published: true` does the same). It also applies softmax twice in its cross-entropies, whose
    input are probabilities; here they are of logits.

    Source: Chengming0501/TGeo-KD@5a69cbe, src/fusion_ratio_bilevel.py (option 3) and src/network.py.
    """

    class_means: Tensor

    def __init__(self, num_classes: int, class_means: Tensor) -> None:
        super().__init__()
        self.layers = _layers(9 * num_classes)
        self.register_buffer("class_means", class_means)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Control:
        """Return the share of each sample; see `Controller.forward`."""
        q, p = student_logits.detach().softmax(dim=1), teacher_logits.detach().softmax(dim=1)
        known = labels.clamp_min(0)
        g, o = F.one_hot(known, q.shape[1]).to(q.dtype), self.class_means[known].to(q.dtype)
        apart = [(o - q).square(), (g - q).square(), (p - q).square(), (p - g).square(), (o - g).square()]
        share = self.layers(torch.cat([q, p, g, o, *apart], dim=1)).sigmoid()
        return Control(share=torch.where(labels < 0, 1.0, share))


class TemperatureController(Controller):
    """The temperature of a sample (after ITKD: Zhang et al. 2024, 2407.00115).

        T = low + (high - low) sigmoid(MLP([max q, max p, q_1 - q_2]))

    with q_1 and q_2 the two largest probabilities of the student. What it is given, and that it is judged by the
    student's later performance, is ITKD's; that it is trained by a gradient is not: there an agent learns from a reward
    (`temperature_agent.py`).

    ERRATUM. The temperatures of the published code, in (0, 10), have no lower bound, so that T^2 KL can vanish; here
    `low` is one. `confidences` names another.

    Source: Zhengbo-Zhang/ITKD@0183c6c, utils/trainer.py.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.layers = _layers(3)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Control:
        """Return the temperature of each sample; see `Controller.forward`."""
        place: Tensor = self.layers(confidences(student_logits, teacher_logits))
        return Control(temperature=between(self.low, self.high, place))


class ClassMeans:
    """The teacher's mean probabilities over the samples of each class, from its logits in parts.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self._sums, self._counts = torch.zeros(num_classes, num_classes), torch.zeros(num_classes)

    def add(self, teacher_logits: Tensor, labels: Tensor) -> None:
        """Add logits [B, C] with their labels [B], on the CPU; those without a label are left out."""
        known = labels >= 0
        self._sums.index_add_(0, labels[known], teacher_logits[known].float().softmax(dim=1))
        self._counts.index_add_(0, labels[known], torch.ones(int(known.sum())))

    def result(self) -> Tensor:
        """Return the means [C, C]; uniform for a class without samples."""
        classes = len(self._counts)
        counted = self._counts.unsqueeze(1)
        return torch.where(counted > 0, self._sums / counted.clamp_min(1), 1 / classes)
