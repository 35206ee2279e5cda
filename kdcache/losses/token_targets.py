"""What a teacher said of the next token, for n positions: a head, the mass outside it, and what is known of the tail.

The head are the k largest probabilities of a row at T = 1 with their classes. The tail, all classes outside it, has a
mass at a few temperatures and, with a basis, a shape. In beta = 1 / T the logarithm of the tail's sum

    g(beta) = log sum_tail p_j^beta

is smooth and convex; it is known at the temperatures that a row has masses of, and g(0) is log(V - k). The polynomial
through these points gives the mass at every T >= 1: from T = 1, 4/3, 2, 4 with a mean error below 0.003, where the mass
is 0.2 to 0.9 (SmolLM2-135M and Gemma 3 270M). The mass at T = 1 to the power 1 / T, which DistillKit takes
(`lossfuncs/common.py`, get_target_logprobs), is wrong: it is that of a tail of one class.

Everything here is a pure function of plain tensors; nothing knows of caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import UsageError

NEVER = -1e4
"""Logarithm in nats that stands for a probability of 0: finite, so that 0 times it is 0."""

_LARGEST_LOG_MASS = -(2.0**-24)
"""Log of a tail's mass, at most: the largest negative float16, since a mass of 1 would leave the head none."""

TEMPERATURES = (1.0, 4 / 3, 2.0, 4.0)
"""Temperatures at which a row has the mass of its tail: the polynomial through them is right at all others."""

CAP_ROUNDS = 3
"""Rounds in which mass above the cap is distributed to the other classes of a tail."""


@dataclass(frozen=True)
class TokenTargets:
    """The teacher's distributions for n taught positions.

    A head may have further columns behind its k largest classes, for classes that a source states whatever their rank,
    such as the label. A column that a row does not need repeats the class of its first column with log-probability
    -inf. The tail are the classes that no column states.

    Attributes:
        indices: [n, K] int64, the classes of the head; K = 0 with draws.
        log_probs: [n, K] float32, their log-probabilities at T = 1 in the whole distribution, in nats; the k largest
            first, in descending order.
        tail_log_mass: [n, P] float32, log of the mass outside the head at each of the temperatures.
        temperatures: these temperatures, without repetition; with draws the one that they were drawn at.
        vocabulary_size: V.
        top_k: k; None if all K columns are the largest.
        logsumexp: [n] float32, logsumexp of the raw logits at T = 1; None where it is not known.
        coordinates: [n, R] float32, the tail's logits in the basis; None without a shape.
        basis: [R, V] float32; None without a shape.
        mean: [V] float32: the tail's logits are mean + coordinates @ basis, up to a constant per row.
        draws: ids [n, m] int64 and counts [n, m] float32 of classes drawn from the distribution at `temperatures[0]`,
            with count 0 where a row has fewer; None for a head.
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_mass: Tensor
    temperatures: tuple[float, ...]
    vocabulary_size: int
    top_k: int | None = None
    logsumexp: Tensor | None = None
    coordinates: Tensor | None = None
    basis: Tensor | None = None
    mean: Tensor | None = None
    draws: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, which: slice | Tensor) -> TokenTargets:
        """Return the targets of some positions."""
        return self._changed(self._rows(), lambda part: part[which])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TokenTargets:
        """Return the targets on another device, or in another floating-point type."""

        def moved(part: Tensor) -> Tensor:
            return part.to(device=device, dtype=dtype if part.is_floating_point() else None)

        return self._changed([*self._rows(), "basis", "mean"], moved)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenTargets]) -> TokenTargets:
        """Concatenate parts of one cache in order."""
        first = parts[0]
        columns: dict[str, Any] = {}
        for name in first._rows():
            values = [getattr(part, name) for part in parts]
            pairs = name == "draws"
            columns[name] = tuple(map(torch.cat, zip(*values, strict=True))) if pairs else torch.cat(values)
        return replace(first, **columns)

    @classmethod
    def of_logits(cls, logits: Tensor, top_k: int = 16, temperatures: tuple[float, ...] = TEMPERATURES) -> TokenTargets:
        """Return the head and the mass of the tail of logits that are at hand.

        Args:
            logits: [n, V], raw.
            top_k: k, below V.
            temperatures: at which the mass outside the head is kept.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        largest, indices = logits.topk(top_k, dim=1)
        level = logits.logsumexp(dim=1, keepdim=True)
        rest = logits.scatter(1, indices, -math.inf)
        masses = [(rest / t).logsumexp(dim=1) - (logits / t).logsumexp(dim=1) for t in temperatures]
        mass = torch.stack(masses, dim=1)
        return cls(indices, largest - level, mass, temperatures, logits.shape[1], logsumexp=level.squeeze(1))

    @property
    def has_shape(self) -> bool:
        """Whether the tail's shape is known."""
        return self.coordinates is not None

    def _rows(self) -> list[str]:
        """Return the names of the fields with one entry per position, without those that are None."""
        names = ("indices", "log_probs", "tail_log_mass", "logsumexp", "coordinates", "draws")
        return [name for name in names if getattr(self, name) is not None]

    def _changed(self, names: list[str], function: Callable[[Tensor], Tensor]) -> TokenTargets:
        """Return the targets with some fields replaced by what a function returns of their tensors."""
        given = ((name, getattr(self, name)) for name in names)
        changed: dict[str, Any] = {
            name: tuple(map(function, value)) if isinstance(value, tuple) else function(value)
            for name, value in given
            if value is not None
        }
        return replace(self, **changed)


def head_log_probs(targets: TokenTargets) -> Tensor:
    """Return the head's log-probabilities at T = 1, [n, K], at least `NEVER`: 0 times -inf would be NaN."""
    return targets.log_probs.clamp_min(NEVER)


def log_tail_sum(targets: TokenTargets, temperature: float | Tensor) -> Tensor:
    """Return g(1 / T) = log sum_tail p_j^(1 / T), [n, 1], p the probabilities at T = 1; `NEVER` of an empty tail.

    At a temperature that the rows have a mass of it is that mass. Between them, and above the largest, it is the
    polynomial through all of them and g(0). Below T = 1 it is the tangent at T = 1, a lower bound of a convex function;
    its slope, the mean log-probability of the tail, is at most the last of the head.

    Args:
        targets: with a head.
        temperature: T, or one per row [n, 1]; differentiable.

    Raises:
        UsageError: for another T than the one that rows have a mass of.
    """
    check_temperature(targets, temperature)
    nodes = [0.0, *(1 / t for t in targets.temperatures)]
    values, is_empty = _values_at_nodes(targets)
    beta = 1 / _column(temperature, targets)
    if len(targets.temperatures) == 1:
        found = values[:, 1:].expand(-1, 1)
    else:
        inside = beta.clamp_max(1.0)
        terms = [values[:, [i]] * _lagrange(nodes, i, inside) for i in range(len(nodes))]
        found = torch.stack(terms).sum(dim=0)
        slopes = values.new_tensor([_slope_at_1(nodes, i) for i in range(len(nodes))])
        slope = torch.minimum((values @ slopes).unsqueeze(1), last_of_head(targets))
        found = found + slope * (beta - 1).clamp_min(0.0)
    return torch.where(is_empty, NEVER, found)


def check_temperature(targets: TokenTargets, temperature: float | Tensor) -> None:
    """Check that the rows know the mass of their tail at a temperature.

    Raises:
        UsageError: if they have a mass at one temperature only, and it is another.
    """
    if len(targets.temperatures) > 1:
        return
    (known,) = targets.temperatures
    others = torch.as_tensor(temperature).flatten()
    others = others[(others - known).abs() > 1e-6 * known]
    if len(others):
        raise other_temperature(targets, f"T = {float(others[0]):g}")


def other_temperature(targets: TokenTargets, asked: str) -> UsageError:
    """Return the error for a temperature that rows do not know the mass of their tail at.

    Args:
        targets: with one temperature.
        asked: the other one, in words.
    """
    (known,) = targets.temperatures
    if targets.draws is not None:
        origin, others = (
            "were drawn",
            "dump the teacher with cache.tail=lowrank or ghost, or cache.temperature of this T",
        )
    else:
        origin = "state the mass outside their head"
        others = "dump the teacher itself: rows of kdcache have the mass at T = 1, 4/3, 2 and 4"
    return UsageError(
        f"{asked} is asked of rows that {origin} at T = {known:g} only",
        f"set loss.temperature={{kind: constant, tau: {known:g}}}, or {others}",
    )


def _values_at_nodes(targets: TokenTargets) -> tuple[Tensor, Tensor]:
    """Return g at beta = 0 and at the temperatures, [n, 1 + P], and whether the tail is empty, [n, 1].

    A mass m at T belongs to the distribution at T; beside the head's sum there, the tail's sum is m / (1 - m) of it.
    """
    betas = targets.log_probs.new_tensor([1 / t for t in targets.temperatures])
    head = head_log_probs(targets)
    of_head = (head.unsqueeze(2) * betas).logsumexp(dim=1)
    mass = targets.tail_log_mass.clamp(NEVER, _LARGEST_LOG_MASS)
    outside = targets.vocabulary_size - (targets.log_probs > NEVER).sum(dim=1, keepdim=True)
    is_empty = outside == 0
    first = outside.clamp_min(1).to(head.dtype).log()
    return torch.cat([first, mass - torch.log(-torch.expm1(mass)) + of_head], dim=1), is_empty


def _lagrange(nodes: list[float], i: int, x: Tensor) -> Tensor:
    """Return the i-th Lagrange polynomial of some nodes at x."""
    product = torch.ones_like(x)
    for j, node in enumerate(nodes):
        if j != i:
            product = product * ((x - node) / (nodes[i] - node))
    return product


def _slope_at_1(nodes: list[float], i: int) -> float:
    """Return the derivative of the i-th Lagrange polynomial at 1."""
    others = [node for j, node in enumerate(nodes) if j != i]
    total = 0.0
    for left_out in range(len(others)):
        total += math.prod(1 - node for j, node in enumerate(others) if j != left_out)
    return total / math.prod(nodes[i] - node for node in others)


def _column(temperature: float | Tensor, targets: TokenTargets) -> Tensor:
    """Return a temperature as a tensor that broadcasts with [n, 1]."""
    if isinstance(temperature, Tensor):
        return temperature
    return targets.log_probs.new_full((1, 1), temperature)


def last_of_head(targets: TokenTargets) -> Tensor:
    """Return the smallest of the k largest log-probabilities, [n, 1], which no class of the tail exceeds."""
    return head_log_probs(targets)[:, [(targets.top_k or targets.log_probs.shape[1]) - 1]]


def head_and_tail(targets: TokenTargets, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the head [n, K] and of the whole tail [n, 1] at a temperature; they add up to 1.

    Args: as `log_tail_sum`.
    """
    head = head_log_probs(targets) / _column(temperature, targets)
    both = torch.cat([head, log_tail_sum(targets, temperature)], dim=1).log_softmax(dim=1)
    return both[:, :-1], both[:, -1:]


def tail_shape(targets: TokenTargets) -> Tensor:
    """Return the logits that the tail's coordinates stand for, [n, V], up to a constant per row.

    Raises:
        ValueError: for targets without coordinates.
    """
    if targets.coordinates is None or targets.basis is None or targets.mean is None:
        raise ValueError("the targets have no coordinates")
    return torch.addmm(targets.mean, targets.coordinates, targets.basis)


def scaled_logits(targets: TokenTargets, temperature: float | Tensor, student_scaled: Tensor | None = None) -> Tensor:
    """Return the teacher's logits divided by a temperature, [n, V], whose tail has the mass that it has there.

    The tail has the shape of its coordinates, and no class above the last of the head; or that of the student, which is
    not differentiated: forward and reverse KL and Jensen-Shannon then have the value and the gradient of K + 1 classes,
    the last of them the tail. Without either it is uniform, which is right for the maximum and the logsumexp of a row.

    Where the level (`logsumexp`) is not known it is 0.

    Args:
        targets: with a head.
        temperature: T, or one per row [n, 1]; differentiable.
        student_scaled: [n, V], the student's logits divided by its temperature, for a tail with their shape.
    """
    if targets.draws is not None:
        raise ValueError("draws have no logits")
    beta = 1 / _column(temperature, targets)
    head, tail = head_log_probs(targets) * beta, log_tail_sum(targets, temperature)
    indices = targets.indices
    if student_scaled is not None:
        shape = student_scaled.detach()
    elif targets.has_shape:
        shape = tail_shape(targets) * beta
    else:
        shape = head.new_zeros(len(targets), targets.vocabulary_size)
    shape = shape.scatter(1, indices, NEVER)
    rows = shape + (tail - shape.logsumexp(dim=1, keepdim=True))
    if student_scaled is None:
        cap = last_of_head(targets) * beta
        for _ in range(CAP_ROUNDS if targets.has_shape else 0):
            rows = rows.minimum(cap)
            rows = rows + (tail - rows.logsumexp(dim=1, keepdim=True))
        rows = rows.minimum(cap)
    # A column that a row does not need repeats its first class.
    stated = torch.where(targets.log_probs > NEVER, head, head[:, :1])
    rows = rows.scatter(1, indices, stated)
    return rows if targets.logsumexp is None else rows + targets.logsumexp.unsqueeze(1) * beta
