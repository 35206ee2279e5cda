"""A loss as a callable of logits and labels, for training loops other than kdcache's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcache.errors import UsageError, counted, indices_below
from kdcache.losses.batch import batch_totals, of_step
from kdcache.losses.chunked_head import batch_statistics, chunked_loss
from kdcache.losses.config import Loss
from kdcache.losses.distillation import LossParts, distillation_loss, learned_temperature
from kdcache.losses.lm_head import LMHead, check_positions
from kdcache.losses.token_loss import check_token_loss
from kdcache.losses.token_targets import TokenTargets


class DistillationLoss(nn.Module):
    """A loss of student logits, teacher logits and labels; `kdcache.loss` makes one.

        loss = kdcache.loss("dtkd", tau=4)
        parts = loss(student_logits, teacher_logits, labels, epoch=1)
        parts.total.backward()

    It is a `torch.nn.Module` without parameters, except for CTKD: its learned temperature is one parameter, which the
    optimizer must get beside those of the student, and which must be on their device:

        loss = kdcache.loss("ctkd").to(device)
        optimizer = SGD([*student.parameters(), *loss.parameters()], lr=0.05)

    Attributes:
        name: such as "dtkd" or "ka+dtd".
        uses_teacher: whether the teacher's logits enter it; False for "ce".
        needs_level: the part of it that changes with a constant added to a row of the teacher's logits, such as "the
            temperature dtkd"; None if no part does. Logits that are known as log-probabilities only have no level.
        options: all options, as the `loss` section of a pipeline file has them.
    """

    def __init__(self, options: Loss) -> None:
        super().__init__()
        self.options = options
        self.theta = learned_temperature(options)

    @property
    def name(self) -> str:
        """The loss name."""
        return self.options.name

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's logits enter the loss."""
        return self.options.uses_teacher

    @property
    def needs_level(self) -> str | None:
        """The part that changes with a constant added to a row of the teacher's logits; None if no part does."""
        return self.options.needs_level

    def extra_repr(self) -> str:
        """Return the name, for `repr`."""
        return repr(self.name)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        epoch: float | None = None,
        edges: Tensor | None = None,
    ) -> LossParts:
        """Return the loss of a batch, `total` to differentiate, and its parts.

        Nothing is changed in place, and no gradient flows to `teacher_logits` unless they require one.

        Args:
            student_logits: [B, C] raw logits (no softmax), floating point; half precision is computed in float32.
            teacher_logits: [B, C] raw logits of the same samples and classes on the same device, computed or from a
                cache; None for a loss that does not use a teacher.
            labels: [B] integer class indices from 0 to C - 1, or -1 for an unlabeled sample, which then has the
                distillation term alone.
            epoch: the current epoch, counted from 1, for losses that change during training: the warm-up of dtkd and
                dkd, the ramp of ctkd. None for the loss after both.
            edges: for ff_g2m, [2, E] int64: pairs of positions in the batch that an edge of the graph joins, (source,
                target), as `edges_among` returns them.

        Returns:
            Scalars: `total`, `cross_entropy` (nats, before its weight), `distillation` (before the warm-up), and the
            mean temperatures `student_temperature` and `teacher_temperature`.

        Raises:
            UsageError: if a shape, a type, a label or the epoch is not as described; nothing is broadcast.
        """
        _check_logits(student_logits, "student_logits")
        if self.options.tail != "stored":
            raise UsageError(
                f"tail is {self.options.tail!r}, and logits have their tail", "remove it, or use of_tokens"
            )
        _check_epoch(epoch)
        _check_labels(labels, student_logits)
        if self.uses_teacher:
            if teacher_logits is None:
                raise UsageError(
                    f"the loss {self.name!r} needs the teacher's logits", "pass them, such as teacher(ids, views)"
                )
            _check_logits(teacher_logits, "teacher_logits")
            if teacher_logits.shape != student_logits.shape:
                raise UsageError(
                    f"teacher_logits are {list(teacher_logits.shape)}, student_logits {list(student_logits.shape)}",
                    "pass logits [B, C] of the same samples and the same classes",
                )
        whole = None
        if edges is not None or self.options.uses_edges:
            whole = batch_totals(labels)._replace(edges=self._checked_edges(edges, len(student_logits)))
        return distillation_loss(student_logits, teacher_logits, labels, self.options, epoch, None, self.theta, whole)

    def of_tokens(
        self,
        hidden: Tensor,
        head: LMHead,
        labels: Tensor,
        targets: TokenTargets | None,
        epoch: float | None = None,
        count: Tensor | int | None = None,
        statistics: list[Tensor] | None = None,
    ) -> LossParts:
        """Return the loss of the taught positions of a language model, without its logits [n, V] at once.

        `total` may be differentiated once, with respect to the hidden states and the head.

        Args:
            hidden: [n, d], the student's last hidden states at the positions, packed and ordered as you like.
            head: the student's last layer.
            labels: [n] int64, the next token of each position, -1 where not known.
            targets: the teacher's, of the same positions; None for a loss that does not use a teacher.
            epoch: as for logits.
            count: taught positions in all micro-batches and processes of the optimizer step, such as
                `num_items_in_batch` of transformers: the losses of its parts then add up to that of the step. None if
                these positions are all of it.
            statistics: for dtd and cwsm, the sums over all parts of the step of what `statistics_of_tokens` returns for
                each; None if these positions are all of it.

        Raises:
            UsageError: for a loss that is not defined for tokens, or needs what the targets do not have; for shapes
                that are not as described.
        """
        _check_epoch(epoch)
        check_token_loss(self.options, targets)
        check_positions(hidden, head, labels, targets)
        whole = None if count is None else of_step(count)
        return chunked_loss(
            hidden, head, labels, targets, self.options, epoch, self.theta, whole, statistics=statistics
        )

    def statistics_of_tokens(self, hidden: Tensor, head: LMHead, targets: TokenTargets) -> list[Tensor]:
        """Return the sums over taught positions that dtd and cwsm need of a whole step; an empty list for the others.

        Args: as for `of_tokens`.
        """
        check_token_loss(self.options, targets)
        return batch_statistics(hidden, head, targets, self.options)

    def _checked_edges(self, edges: Tensor | None, count: int) -> Tensor:
        """Return the edges [2, E] of a batch of `count` samples, for a loss that compares their ends."""
        if not self.options.uses_edges:
            raise UsageError(f"the loss {self.name!r} does not use edges", "leave them out, or take ff_g2m")
        if edges is None:
            raise UsageError(
                f"the loss {self.name!r} compares nodes that an edge joins, and there are no edges",
                "pass edges=[2, E], pairs of positions in the batch; or take kd, which needs none",
            )
        if not isinstance(edges, Tensor) or edges.ndim != 2 or len(edges) != 2 or edges.dtype != torch.int64:
            shape = f"{edges.dtype} {list(edges.shape)}" if isinstance(edges, Tensor) else f"a {type(edges).__name__}"
            raise UsageError(f"edges are {shape}", "pass an int64 tensor [2, E]: row 0 the sources, row 1 the targets")
        outside = ((edges < 0) | (edges >= count)).any(dim=0)
        if edges.device.type == "cpu" and bool(outside.any()):
            first = int(outside.nonzero()[0])
            raise UsageError(
                f"edge {first} joins {int(edges[0, first])} and {int(edges[1, first])}, and the batch has {count} "
                "samples",
                "pass positions in the batch, not numbers of nodes: edges_among(edges, nodes, count)",
            )
        return edges


def _check_epoch(epoch: float | None) -> None:
    """Check that an epoch is counted from 1."""
    if epoch is not None and not epoch > 0:
        raise UsageError(f"the epoch is {epoch}", "count epochs from 1, or leave it out for the loss after warm-up")


def _check_logits(logits: object, name: str) -> None:
    """Check that an argument is a floating-point tensor [B, C]."""
    if not isinstance(logits, Tensor):
        raise UsageError(f"{name} is a {type(logits).__name__}", "pass logits, a floating-point tensor [B, C]")
    if logits.ndim != 2 or not logits.is_floating_point():
        raise UsageError(f"{name} are {logits.dtype} {list(logits.shape)}", "pass logits, floating point [B, C]")


def _check_labels(labels: object, logits: Tensor) -> None:
    """Check that labels are class indices [B] of logits [B, C]."""
    size, classes = logits.shape
    if not isinstance(labels, Tensor):
        raise UsageError(f"labels is a {type(labels).__name__}", "pass class indices, an int64 tensor [B]")
    if labels.is_floating_point() and labels.shape == logits.shape:
        raise UsageError(
            f"labels are {labels.dtype} {list(labels.shape)}, which looks like soft labels",
            "pass class indices [B] as labels, and soft labels as teacher_logits=probabilities.log()",
        )
    if labels.shape != (size,) or labels.is_floating_point() or labels.dtype.itemsize < 2:
        raise UsageError(
            f"labels are {labels.dtype} {list(labels.shape)} for student_logits {list(logits.shape)}",
            f"pass class indices, an int64 tensor [{size}], -1 where not known",
        )
    # On a GPU the values are not looked at: that would wait for all work before.
    if labels.device.type == "cpu" and size and not (int(labels.min()) >= -1 and int(labels.max()) < classes):
        raise UsageError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, and the logits have "
            f"{counted(classes, 'class', 'classes')}",
            f"pass class indices {indices_below(classes)}, or -1 for a sample without a label",
        )
