"""The losses of outputs with one row per sample: the options of each, and their names by the kind of the output.

To add one, write its function in `vectors.py` or `scores.py`, and list it here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import Tensor

from kdcache.losses import scores, vectors
from kdcache.losses.batch import BatchTotals
from kdcache.losses.options import LossSection, NotNegative, Positive

OutputKind = Literal["vector", "score", "classes"]


class OutputLossOptions(LossSection):
    """The loss of one output: base class of those below.

    Attributes:
        compute: the function.
        kinds: outputs that it is defined for.
        same_width: whether both vectors must have the same length; a learned linear map then brings the student's to
            that of the teacher.
        width: the only length that it is defined for; None for any.
        of_sums: whether it is a loss of the batch that takes `batch_sum`.
        of_rows: whether it is a loss of the batch that takes `batch_rows`.
        of_groups: whether it compares several scores: those of a sample, or the single scores of a group of samples.
        places: of what outputs: one row per sample, or `grid`, a map.
        needs_level: whether it needs the level of class logits.
        needs_maps: whether it is a loss of label maps.
    """

    compute: ClassVar[Callable[..., Tensor]]
    kinds: ClassVar[tuple[OutputKind, ...]] = ("vector",)
    same_width: ClassVar[bool] = True
    width: ClassVar[int | None] = None
    of_sums: ClassVar[bool] = False
    of_rows: ClassVar[bool] = False
    of_groups: ClassVar[bool] = False
    places: ClassVar[Literal["one", "grid"]] = "one"
    needs_level: ClassVar[bool] = False
    needs_maps: ClassVar[bool] = False

    name: str
    weight: NotNegative = 1.0
    """Factor of this loss in the sum."""

    @property
    def reads_maps(self) -> bool:
        """Whether it needs label maps, because of its kind or its options."""
        return self.needs_maps

    @property
    def mask_source(self) -> str | None:
        """The output of the student that says which places of a map count; None without."""
        return None

    @property
    def uses_batch(self) -> bool:
        """Whether the loss of a sample depends on the other samples of its batch."""
        return self.of_sums or self.of_rows

    def values(
        self, student: Tensor, teacher: Tensor, totals: BatchTotals | None = None, group_size: int = 1
    ) -> Tensor:
        """Return the loss of each sample, [B], before its weight.

        Args:
            student: [B, D].
            teacher: [B, D]; [B, D'] for a loss of the relations between samples.
            totals: of the batch that the samples are part of; None if they are the whole batch.
            group_size: K, of consecutive samples that belong together. For a loss of several scores a group with one
                score per sample is one row of K scores, and its loss is that of each of its samples.
        """
        if self.of_groups and group_size > 1 and teacher.shape[1] == 1:
            rows = student.reshape(-1, group_size), teacher.reshape(-1, group_size)
            return self.values(*rows, totals).repeat_interleave(group_size)
        options: dict[str, Any] = {key: value for key, value in self if key not in ("name", "weight")}
        if totals is not None and self.of_sums:
            options["batch_sum"] = totals.sum
        if totals is not None and self.of_rows:
            options["batch_rows"] = totals.all_rows
        return type(self).compute(student, teacher, **options)


class MSE(OutputLossOptions):
    """`mse`: mean squared error."""

    compute = staticmethod(vectors.mse)
    kinds = ("vector", "score")
    name: Literal["mse"]


class L1(OutputLossOptions):
    """`l1`: mean absolute error."""

    compute = staticmethod(vectors.l1)
    kinds = ("vector", "score")
    name: Literal["l1"]


class SmoothL1(OutputLossOptions):
    """`smooth_l1`: quadratic near 0, linear beyond."""

    compute = staticmethod(vectors.smooth_l1)
    kinds = ("vector", "score")
    name: Literal["smooth_l1"]
    beta: Positive = 1.0
    """Difference at which it becomes linear."""


class Cosine(OutputLossOptions):
    """`cosine`: 1 - cosine."""

    compute = staticmethod(vectors.cosine)
    name: Literal["cosine"]


class LEAF(OutputLossOptions):
    """`leaf`: squared distance."""

    compute = staticmethod(vectors.leaf)
    name: Literal["leaf"]
    normalize: bool = False
    """Divide the student's vector by its length."""


class RKD(OutputLossOptions):
    """`rkd`: distances and angles between samples."""

    compute = staticmethod(vectors.rkd)
    same_width = False
    of_rows = True
    name: Literal["rkd"]
    distance_weight: NotNegative = 25.0
    """Weight of the distances of pairs."""
    angle_weight: NotNegative = 50.0
    """Weight of the angles of triples."""

    @model_validator(mode="after")
    def _compares_something(self) -> RKD:
        if not self.distance_weight and not self.angle_weight:
            raise ValueError("distance_weight and angle_weight are both 0: raise one, or remove this loss")
        return self


class SP(OutputLossOptions):
    """`sp`: similarities of samples."""

    compute = staticmethod(vectors.similarity_preserving)
    same_width = False
    of_rows = True
    name: Literal["sp"]


class PKT(OutputLossOptions):
    """`pkt`: probabilities of samples to choose each other."""

    compute = staticmethod(vectors.probabilistic_transfer)
    same_width = False
    of_rows = True
    name: Literal["pkt"]


class MarginMSE(OutputLossOptions):
    """`margin_mse`: margins between a positive and a negative passage."""

    compute = staticmethod(scores.margin_mse)
    kinds = ("score",)
    width = 2
    of_groups = True
    name: Literal["margin_mse"]


class ListKL(OutputLossOptions):
    """`list_kl`: KL divergence over the candidates of a query."""

    compute = staticmethod(scores.list_kl)
    kinds = ("score",)
    of_groups = True
    name: Literal["list_kl"]
    tau: Positive = 1.0
    """Temperature."""


class KD(OutputLossOptions):
    """`kd`: KL divergence of the softened probabilities of another head, times the squared temperature."""

    compute = staticmethod(scores.list_kl)
    kinds = ("classes",)
    name: Literal["kd"]
    tau: Positive = 4.0
    """Temperature."""


class CCC(OutputLossOptions):
    """`ccc`: 1 - concordance correlation of the batch."""

    compute = staticmethod(scores.concordance)
    kinds = ("score",)
    of_sums = True
    name: Literal["ccc"]


OUTPUT_LOSSES: dict[str, type[OutputLossOptions]] = {
    "mse": MSE,
    "l1": L1,
    "smooth_l1": SmoothL1,
    "cosine": Cosine,
    "leaf": LEAF,
    "rkd": RKD,
    "sp": SP,
    "pkt": PKT,
    "margin_mse": MarginMSE,
    "list_kl": ListKL,
    "ccc": CCC,
    "kd": KD,
}
