"""Encode logits [B, C] as rows and decode them, in plain torch, on any device (docs/FORMAT.md, sections 4 and 5).

A row stores the k largest log-probabilities at T = 1 and their classes (the head), the log-probability of the true
class whatever its rank, the logsumexp (log-probability + logsumexp = raw logit), and statistics of the whole
distribution. Log-probabilities lose ten times less in float16 than raw logits: those of the large probabilities are
close to 0, where float16 is most precise.

The tail consists of the classes that the row does not state individually: neither in the head nor the label. Its mass
is stored at T = 1, 2, 4, 8; its shape, with the `lowrank` policy, is R coordinates in a basis that was fitted to this
teacher (`tail_basis.py`). Decoding does not use the masses at T > 1, so that they can measure the decoding error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.cache.format.encoding import TAIL_TEMPERATURES, Encoding
from kdcache.cache.format.named_tensors import NamedTensors
from kdcache.cache.format.row_reductions import finite_rows, largest_classes, logsumexp_in_place, standard_deviation
from kdcache.cache.format.tail_basis import TailBasis, fit_coordinates, round_coordinates
from kdcache.errors import CorruptError

_DTYPES = {"float16": torch.float16, "float32": torch.float32}

_MIN_RANGE = 1e-4
"""Range of log-probabilities in nats by which uint8 encoding divides, at least (docs/FORMAT.md, section 4.1)."""

_HALF_PRECISION = 2.0**-11
"""Largest relative rounding error of float16 (docs/FORMAT.md, section 5)."""

_TINY = 1e-30
"""Smallest divisor, against division by zero (docs/FORMAT.md, section 5)."""

_MIN_LOG_PROB = -1e4
"""Log-probability in nats, at least, in the entropy (docs/FORMAT.md, section 4.2)."""

_CAP_ROUNDS = 3
"""Rounds in which mass above the cap is distributed to other classes (docs/FORMAT.md, section 5)."""

_MAX_LOST_MASS = 5e-4
"""Share of a tail's mass that may be missing after these rounds (docs/FORMAT.md, section 5)."""

_MIN_THRESHOLD = math.exp(-40)
"""Probability relative to the cap, at least, from which classes are raised to it (docs/FORMAT.md, section 5)."""

_SIGN_BIT = -(2**31)
"""The sign bit of a float32, as the value of an int32."""

_LOWEST_STEP = -0x7F7FFFFF
"""The lowest finite float32, as `_as_steps` returns it."""

_MIN_LOG_RATIO = -80
"""Log of a probability relative to the cap, at least, in these rounds (docs/FORMAT.md, section 5)."""


def index_dtype(num_classes: int) -> torch.dtype:
    """Return the smallest type for class indices that torch can gather on every device (not uint16 or uint32)."""
    return torch.uint8 if num_classes <= 2**8 else torch.int16 if num_classes <= 2**15 else torch.int32


@dataclass(frozen=True)
class Rows(NamedTensors):
    """Encoded logits of B samples.

    Attributes:
        log_probs: [B, k] float16 or float32, at T = 1; descending, or in class order if k = C. If k = C also uint8, the
            distance below the row's maximum in 255ths of the row's range.
        indices: [B, k] uint8, int16 or int32, the classes of `log_probs`; None if k = C.
        logsumexp: [B] float32, logsumexp of the raw logits (DTKD's sharpness).
        statistics: [B, S] float16, columns named by `Encoding.statistics`.
        tail: [B, R] int8, coordinates in the teacher's basis; None without a `lowrank` tail.
    """

    log_probs: Tensor
    indices: Tensor | None
    logsumexp: Tensor
    statistics: Tensor
    tail: Tensor | None = None


def not_finite(logits: Tensor) -> Tensor:
    """Return the positions in the batch of rows with NaN or infinite logits, [n] int64."""
    return (~finite_rows(logits)).nonzero().squeeze(1)


def encode(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Rows:
    """Encode a batch of the teacher's raw logits.

    Args:
        logits: [B, C] of any floating type; converted to float32.
        labels: [B] int64, -1 if unknown.
        encoding: k, tail and types.
        basis: basis of the teacher's tail, on the device of the logits, if the tail is `lowrank`.

    Raises:
        CorruptError: if a logit is NaN or infinite in float32, or the shape is wrong.
    """
    if logits.shape != (len(labels), encoding.num_classes):
        raise CorruptError(
            f"logits {list(logits.shape)} for {len(labels)} labels and {encoding.num_classes} classes", "pass [B, C]"
        )
    logits = logits.float()
    if len(bad := not_finite(logits)):
        raise CorruptError(f"row {bad[0].item()} of the batch holds NaN or infinite logits", "check the teacher")
    return encode_finite(logits, labels, encoding, basis)


def encode_finite(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Rows:
    """Encode logits [B, C] float32 whose rows are finite, or checked later, without waiting for the GPU."""
    log_probs = logits.log_softmax(dim=1)
    known = labels >= 0
    label = labels.clamp_min(0).unsqueeze(1)
    columns = {
        "label_log_prob": log_probs.gather(1, label).squeeze(1).where(known, 0.0),
        "logit_mean": logits.mean(dim=1),
        "logit_std": standard_deviation(logits),
        # A probability of 0 has a logarithm of -inf.
        "entropy": -log_probs.exp().mul_(log_probs.clamp_min(_MIN_LOG_PROB)).sum(dim=1),
    }
    indices = tail = None
    if encoding.dense:
        head = log_probs
    else:
        order = largest_classes(logits, encoding.top_k)
        head, indices = log_probs.gather(1, order), order.to(index_dtype(encoding.num_classes))
        stated_indices = torch.cat([order, label.where(known.unsqueeze(1), order[:, :1])], dim=1)
        for t in TAIL_TEMPERATURES:
            scaled = log_probs.clone() if t == 1 else (logits / t).log_softmax(dim=1)
            columns[f"tail_log_mass_t{t}"] = logsumexp_in_place(scaled.scatter_(1, stated_indices, -math.inf))
        if basis is not None:
            stated = stated_at(order, labels, encoding.num_classes)
            tail = round_coordinates(fit_coordinates(logits, stated, basis.basis, basis.mean), basis.scale)
    if encoding.dtype == "uint8":
        columns["log_prob_max"] = log_probs.amax(dim=1)
        columns["log_prob_range"] = columns["log_prob_max"] - log_probs.amin(dim=1)
    statistics = _to_finite(torch.stack([columns[name] for name in encoding.statistics], dim=1), torch.float16)
    if encoding.dtype == "uint8":
        top, spread = (_column(statistics, encoding, name) for name in ("log_prob_max", "log_prob_range"))
        stored = ((top - log_probs) / spread.clamp_min(_MIN_RANGE) * 255).round().clamp(0, 255).to(torch.uint8)
    else:
        stored = _to_finite(head, _DTYPES[encoding.dtype])
    return Rows(stored, indices, logits.logsumexp(dim=1), statistics, tail)


def stated_at(indices: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the classes that rows state individually, [B, C] bool: the head at `indices` [B, k], and known labels."""
    none = torch.zeros(len(indices), classes, dtype=torch.bool, device=indices.device)
    label, known = labels.clamp_min(0).unsqueeze(1), (labels >= 0).unsqueeze(1)
    return none.scatter(1, indices.long(), True) | none.scatter(1, label, known)


def stated_classes(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """Return the classes that rows of logits state individually, [B, C] bool: the `top_k` largest and the label."""
    return stated_at(largest_classes(logits, top_k), labels, logits.shape[1])


def tail_log_mass(logits: Tensor, stated: Tensor, temperature: float) -> Tensor:
    """Return the log of the softmax's mass at a temperature over the classes not stated, [B]; -inf without any."""
    return logsumexp_in_place((logits / temperature).log_softmax(dim=1).masked_fill_(stated, -math.inf))


def _column(statistics: Tensor, encoding: Encoding, name: str) -> Tensor:
    return statistics[:, encoding.statistics.index(name)].float().unsqueeze(1)


def _to_finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def decode(rows: Rows, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Tensor:
    """Decode rows to logits [B, C] float32, an approximation of those that the teacher returned.

    Head and label have at most twice the rounding error of their type, and the logsumexp at T = 1 an error up to 1e-3.
    The tail has the stored mass at T = 1, spread evenly (`uniform`) or in the shape given by its coordinates
    (`lowrank`). No class outside the head exceeds the last class of the head. A stable descending sort of a row begins
    with the head in its order; so its argmax is the head's first class.

    Args:
        rows: rows of B samples.
        labels: [B] int64, as for encoding.
        encoding: as for encoding.
        basis: as for encoding, on the device of the rows.
    """
    if rows.indices is None:
        log_probs = rows.log_probs.float()
        if encoding.dtype == "uint8":
            top, spread = (_column(rows.statistics, encoding, name) for name in ("log_prob_max", "log_prob_range"))
            log_probs = top - log_probs * (spread / 255)
    else:
        log_probs = _with_tail(rows, labels, encoding, basis)
    logits = _normalized(log_probs, encoding) + rows.logsumexp.unsqueeze(1)
    return logits if rows.indices is None else _in_stated_order(logits, rows.indices.long())


def _in_stated_order(logits: Tensor, indices: Tensor) -> Tensor:
    """Lower values by single steps of float32 to where a stable descending sort begins with the head, in its order.

    The cap, the type of the head and the sum with the logsumexp make values equal; argmax would then name another class
    than the row states, if that has a smaller index.

    Args:
        logits: [B, C] float32, finite, without a class above one that the row states before it; overwritten.
        indices: [B, k] int64, the head.
    """
    # In integers in the order of the floats, a class is at most the one before it, and less if its index is smaller:
    # a running minimum, once the number of such descents is added.
    steps = _as_steps(logits.gather(1, indices))
    descents = torch.zeros_like(steps)
    descents[:, 1:] = (indices.diff(dim=1) < 0).cumsum(dim=1)
    head = ((steps + descents).cummin(dim=1).values - descents).clamp_min(_LOWEST_STEP)
    last, before = head[:, -1:], torch.arange(logits.shape[1], device=logits.device) < indices[:, -1:]
    reaching = (logits >= _as_floats(last)).logical_and_(before).scatter_(1, indices, False).any(dim=1, keepdim=True)
    # All other classes are lowered alike: those of a uniform tail stay equal.
    limit = _as_floats((last - reaching.long()).clamp_min(_LOWEST_STEP))
    return torch.minimum(logits, limit, out=logits).scatter_(1, indices, _as_floats(head))


def _as_steps(values: Tensor) -> Tensor:
    """Return float32 values as int64 in the same order, in which neighbors differ by 1 and zeros are equal."""
    bits = values.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, _SIGN_BIT - bits, bits)


def _as_floats(steps: Tensor) -> Tensor:
    """Return the float32 values of `_as_steps`."""
    return torch.where(steps < 0, _SIGN_BIT - steps, steps).to(torch.int32).view(torch.float32)


def _capped(log_probs: Tensor, mass: Tensor, last: Tensor, tail: Tensor) -> Tensor:
    """Return tail log-probabilities [B, C] with a given log-mass [B, 1] and no class above the cap `last` [B, 1].

    Mass above the cap is distributed to the classes below it in proportion to their probabilities; some then reach the
    cap, and the next round distributes the rest. Three rounds are enough for a row that the basis fits. The rest is not
    spread over the whole tail: it is small, but each of a thousand small classes would get the same amount. Only a row
    that the basis does not fit is interpolated towards the cap in all classes, as far as its mass requires.
    """
    # A mass below the cap is never cut, and its exponential may be too small for float32.
    cut, wanted = mass > last, (mass - last).exp()
    # Clamped, since float32 is subnormal, hence slow, below e^-87 and then 0.
    of_cap = (log_probs - last).clamp(_MIN_LOG_RATIO, 0).exp()
    reaching = torch.ones_like(wanted)
    for _ in range(_CAP_ROUNDS):
        below = of_cap < reaching
        room = wanted - (~below).sum(dim=1, keepdim=True)
        reaching = ((of_cap * below).sum(dim=1, keepdim=True) / room.clamp_min(_TINY)).clamp(_MIN_THRESHOLD, 1)
    raised = (log_probs - reaching.log().where(cut, 0.0)).minimum(last)
    of_cap = (of_cap / reaching).clamp_max(1)
    held = of_cap.sum(dim=1, keepdim=True)
    share = ((wanted - held) / (tail.sum(dim=1, keepdim=True) - held).clamp_min(_TINY)).clamp(0, 1)
    # g + share (1 - g) of the specification, in the form that keeps the order of the classes when it is rounded.
    drawn = (share + of_cap * (1 - share)).log() + last
    return torch.where(cut & (wanted - held > _MAX_LOST_MASS * wanted), drawn, raised)


def _normalized(log_probs: Tensor, encoding: Encoding) -> Tensor:
    """Return log-probabilities [B, C] corrected for rounding, so that probabilities add up to 1.

    In float16 each has a relative error up to 2^-11, so the sum has an error up to 2^-11 of the entropy. Scaling all of
    them by a factor within that error restores the sum, and changes none by more than its rounding error.
    """
    if encoding.dtype == "float32":
        return log_probs
    largest, at = log_probs.max(dim=1, keepdim=True)
    others = log_probs.scatter(1, at, -math.inf).exp().sum(dim=1, keepdim=True)
    # The logsumexp, computed so that it is precise in float32 where one class has nearly all of the mass.
    excess = torch.log1p(torch.expm1(largest) + others)
    if encoding.dtype == "uint8":
        return log_probs - excess
    entropy = -(log_probs.exp() * log_probs).sum(dim=1, keepdim=True)
    return log_probs * (1 + (excess / entropy.clamp_min(_TINY)).clamp(-_HALF_PRECISION, _HALF_PRECISION))


def _with_tail(rows: Rows, labels: Tensor, encoding: Encoding, basis: TailBasis | None) -> Tensor:
    """Return log-probabilities [B, C] of rows with k < C: head, label and decoded tail."""
    head, indices = rows.log_probs.float(), rows.indices.long()  # type: ignore[union-attr]  # the caller checked
    known = labels >= 0
    label = labels.clamp_min(0).unsqueeze(1)
    stated = stated_at(indices, labels, encoding.num_classes)
    mass = _column(rows.statistics, encoding, "tail_log_mass_t1")
    last = head[:, -1:]
    if rows.tail is None or basis is None:
        shape = torch.zeros_like(stated, dtype=torch.float32)
    else:
        shape = basis.mean + rows.tail.float() @ basis.directions
    log_probs = shape.masked_fill(stated, -math.inf)
    log_probs = log_probs + (mass - log_probs.logsumexp(dim=1, keepdim=True).nan_to_num(neginf=0.0))
    log_probs = _capped(log_probs, mass, last, ~stated)
    label_log_prob = _column(rows.statistics, encoding, "label_log_prob")
    # Rounded to float16 it could exceed a float32 head; if the label is in the head, the head's value is used.
    stated_label = torch.where(known.unsqueeze(1), label_log_prob.minimum(last), log_probs.gather(1, label))
    return log_probs.scatter(1, label, stated_label).scatter(1, indices, head)
