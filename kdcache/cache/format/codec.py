"""Logits [B, C] to rows and back, in plain torch, on any device.

A row keeps the k largest log-probabilities at T = 1 and their classes (the head), the log-probability of the true class
wherever it stands, the logsumexp (log-probability + logsumexp = raw logit), and statistics of the whole distribution.
Log-probabilities lose ten times less in fp16 than raw logits of the same size: the large probabilities, which matter,
lie near 0, where fp16 is finest.

The tail is every class that the row does not state one by one: neither in the head nor the label. Its mass is recorded
at T = 1, 2, 4, 8; its shape, with the `lowrank` policy, is R coordinates in a basis that was fitted to this teacher
(`basis.py`). The masses at T > 1 are not used to decode, so that they can tell how well that went.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdcache.cache.format.schema import TAIL_TEMPERATURES, Encoding
from kdcache.cache.format.tail_basis import TailBasis, fit_coordinates, round_coordinates
from kdcache.errors import CorruptError

_DTYPES = {"float16": torch.float16, "float32": torch.float32}
_SMALLEST_RANGE = 1e-4
_HALF_STEP = 2.0**-11
_TINY = 1e-30
_NOTHING = -1e4
_ROUNDS = 3
_MISSING = 5e-4
_LEAST_REACHING = math.exp(-40)
_FARTHEST = -80


def index_dtype(num_classes: int) -> torch.dtype:
    """The smallest type that holds a class index and that torch can gather on every device (not uint16 or uint32)."""
    return torch.uint8 if num_classes <= 2**8 else torch.int16 if num_classes <= 2**15 else torch.int32


@dataclass(frozen=True)
class Rows:
    """Encoded logits of B samples.

    Attributes:
        log_probs: [B, k] float16 or float32, at T = 1; descending, or in class order where k = C. For k = C also uint8,
            in 255ths of the row's range below its maximum.
        indices: [B, k] uint8, int16 or int32, the classes of `log_probs`; None where k = C.
        logsumexp: [B] float32, of the raw logits: DTKD's sharpness.
        statistics: [B, S] float16, columns named by `Encoding.statistics`.
        tail: [B, R] int8, coordinates in the teacher's basis; None without the `lowrank` tail.
    """

    log_probs: Tensor
    indices: Tensor | None
    logsumexp: Tensor
    statistics: Tensor
    tail: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logsumexp)

    def arrays(self) -> dict[str, Tensor]:
        """The tensors by name, without those that the encoding has not."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows.of({name: value.to(device) for name, value in self.arrays().items()})

    def __getitem__(self, which: Tensor | slice) -> Rows:
        return Rows.of({name: value[which] for name, value in self.arrays().items()})

    @staticmethod
    def of(arrays: Mapping[str, Tensor]) -> Rows:
        """The rows that `arrays()` gave."""
        return Rows(
            arrays["log_probs"], arrays.get("indices"), arrays["logsumexp"], arrays["statistics"], arrays.get("tail")
        )

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """All rows of all parts, in order."""
        return Rows.of({name: torch.cat([part.arrays()[name] for part in parts]) for name in parts[0].arrays()})


def not_finite(logits: Tensor) -> Tensor:
    """Positions in the batch of the rows that hold a NaN or an infinity, [n] int64."""
    return (~logits.isfinite().all(dim=1)).nonzero().squeeze(1)


def encode(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Rows:
    """Encode a batch of the teacher's raw logits.

    Args:
        logits: [B, C], of any floating type; computed with in float32.
        labels: [B] int64, -1 where not known.
        encoding: k, tail and types.
        basis: of the teacher's tail, on the device of the logits, where the tail is `lowrank`.

    Raises:
        CorruptError: if a logit is NaN or infinite in float32, or the shape is wrong.
    """
    if logits.shape != (len(labels), encoding.num_classes):
        raise CorruptError(
            f"logits {list(logits.shape)} for {len(labels)} labels and {encoding.num_classes} classes", "pass [B, C]"
        )
    logits = logits.float()
    if len(bad := not_finite(logits)):
        raise CorruptError(f"row {bad[0].item()} of the batch holds NaN or infinite logits", "correct the teacher")
    return encode_finite(logits, labels, encoding, basis)


def encode_finite(logits: Tensor, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Rows:
    """Encode logits [B, C] float32 whose rows are finite, or are looked at later: a GPU is not waited for."""
    log_probs = logits.log_softmax(dim=1)
    known = labels >= 0
    label = labels.clamp_min(0).unsqueeze(1)
    columns = {
        "label_log_prob": log_probs.gather(1, label).squeeze(1).where(known, 0.0),
        "logit_mean": logits.mean(dim=1),
        "logit_std": logits.std(dim=1, correction=0),
        # Where a probability is 0 its logarithm may be infinite.
        "entropy": -(log_probs.exp() * log_probs.clamp_min(_NOTHING)).sum(dim=1),
    }
    indices = tail = None
    if encoding.dense:
        head = log_probs
    else:
        order = _largest(logits, encoding.top_k)
        head, indices = log_probs.gather(1, order), order.to(index_dtype(encoding.num_classes))
        stated = stated_at(order, labels, encoding.num_classes)
        for t in TAIL_TEMPERATURES:
            columns[f"tail_log_mass_t{t}"] = tail_log_mass(logits, stated, t)
        if basis is not None:
            tail = round_coordinates(fit_coordinates(logits, stated, basis.basis, basis.mean), basis.scale)
    if encoding.dtype == "uint8":
        columns["log_prob_max"] = log_probs.amax(dim=1)
        columns["log_prob_range"] = columns["log_prob_max"] - log_probs.amin(dim=1)
    statistics = _to_finite(torch.stack([columns[name] for name in encoding.statistics], dim=1), torch.float16)
    if encoding.dtype == "uint8":
        top, spread = (_column(statistics, encoding, name) for name in ("log_prob_max", "log_prob_range"))
        stored = ((top - log_probs) / spread.clamp_min(_SMALLEST_RANGE) * 255).round().clamp(0, 255).to(torch.uint8)
    else:
        stored = _to_finite(head, _DTYPES[encoding.dtype])
    return Rows(stored, indices, logits.logsumexp(dim=1), statistics, tail)


def stated_at(indices: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[B, C] bool: the classes that rows keep one by one, the head at `indices` [B, k] and the label if known."""
    nothing = torch.zeros(len(indices), classes, dtype=torch.bool, device=indices.device)
    label, known = labels.clamp_min(0).unsqueeze(1), (labels >= 0).unsqueeze(1)
    return nothing.scatter(1, indices.long(), True) | nothing.scatter(1, label, known)


def stated_classes(logits: Tensor, labels: Tensor, top_k: int) -> Tensor:
    """[B, C] bool: the classes that rows of these logits keep one by one, the `top_k` largest and the label."""
    return stated_at(_largest(logits, top_k), labels, logits.shape[1])


def _largest(logits: Tensor, top_k: int) -> Tensor:
    """[B, k] int64: a stable order, so that equal logits give the same row on every device."""
    # As integers that rise with the float, its place below them: no two are equal, and topk need not be stable. The sum
    # makes -0.0, which equals 0.0, the same integer.
    bits = (logits + 0.0).view(torch.int32)
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    last = logits.shape[1] - 1
    places = torch.arange(last, -1, -1, device=logits.device)
    return last - (rising | places).topk(top_k, dim=1).values.bitwise_and(0xFFFFFFFF)


def tail_log_mass(logits: Tensor, stated: Tensor, temperature: float) -> Tensor:
    """Log of the softmax's mass at a temperature over the classes that are not stated, [B]; -inf without any."""
    return (logits / temperature).log_softmax(dim=1).masked_fill(stated, -math.inf).logsumexp(dim=1)


def _column(statistics: Tensor, encoding: Encoding, name: str) -> Tensor:
    return statistics[:, encoding.statistics.index(name)].float().unsqueeze(1)


def _to_finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def decode(rows: Rows, labels: Tensor, encoding: Encoding, basis: TailBasis | None = None) -> Tensor:
    """The logits that rows stand for, [B, C] float32: what the teacher returned, as far as the row knows it.

    Head and label come back to the precision of their type, twice its rounding at most, and the logsumexp at T = 1 to
    1e-3. The tail has the recorded mass at T = 1, evenly spread (`uniform`) or in the shape that its coordinates give
    (`lowrank`). Nothing outside the head comes back above the head's last.

    Args:
        rows: of B samples.
        labels: [B] int64, as they were encoded.
        encoding: as they were encoded.
        basis: as they were encoded, on the device of the rows.
    """
    if rows.indices is None:
        log_probs = rows.log_probs.float()
        if encoding.dtype == "uint8":
            top, spread = (_column(rows.statistics, encoding, name) for name in ("log_prob_max", "log_prob_range"))
            log_probs = top - log_probs * (spread / 255)
    else:
        log_probs = _with_tail(rows, labels, encoding, basis)
    return _whole_mass(log_probs, encoding) + rows.logsumexp.unsqueeze(1)


def _capped(log_probs: Tensor, mass: Tensor, last: Tensor, tail: Tensor) -> Tensor:
    """A tail [B, C] of a log-mass [B, 1] with no class above `last` [B, 1]: what the cap takes goes to those below it.

    All of these are raised alike, some then reach the cap, and the next round has the others share what is missing:
    three rounds are enough for a row that the basis fits. To all of the tail what is missing must not go: it is little,
    but each of a thousand small classes would get as much of it. Only a row that the basis does not fit is drawn so
    towards all classes at the cap, as far as the mass asks for.
    """
    # A mass below the cap's own is never cut, and may be too small for a float32.
    cut, wanted = mass > last, (mass - last).exp()
    # Limited, since float32 is slow below e^-87 and then has nothing left that could be raised.
    of_cap = (log_probs - last).clamp(_FARTHEST, 0).exp()
    reaching = torch.ones_like(wanted)
    for _ in range(_ROUNDS):
        below = of_cap < reaching
        room = wanted - (~below).sum(dim=1, keepdim=True)
        reaching = ((of_cap * below).sum(dim=1, keepdim=True) / room.clamp_min(_TINY)).clamp(_LEAST_REACHING, 1)
    raised = (log_probs - reaching.log().where(cut, 0.0)).minimum(last)
    of_cap = (of_cap / reaching).clamp_max(1)
    held = of_cap.sum(dim=1, keepdim=True)
    share = ((wanted - held) / (tail.sum(dim=1, keepdim=True) - held).clamp_min(_TINY)).clamp(0, 1)
    drawn = (of_cap + share * (1 - of_cap)).log() + last
    return torch.where(cut & (wanted - held > _MISSING * wanted), drawn, raised)


def _whole_mass(log_probs: Tensor, encoding: Encoding) -> Tensor:
    """Log-probabilities [B, C] whose probabilities add up to 1 again, which the rounding of many of them disturbs.

    In float16 each is off by up to 2^-11 of itself, so together by up to 2^-11 of the entropy: stretching all of them
    by as much restores the sum, and moves none by more than it may be off already.
    """
    if encoding.dtype == "float32":
        return log_probs
    largest, at = log_probs.max(dim=1, keepdim=True)
    others = log_probs.scatter(1, at, -math.inf).exp().sum(dim=1, keepdim=True)
    # The logsumexp, which in float32 would be noise where one class has nearly all of the mass.
    excess = torch.log1p(torch.expm1(largest) + others)
    if encoding.dtype == "uint8":
        return log_probs - excess
    entropy = -(log_probs.exp() * log_probs).sum(dim=1, keepdim=True)
    return log_probs * (1 + (excess / entropy.clamp_min(_TINY)).clamp(-_HALF_STEP, _HALF_STEP))


def _with_tail(rows: Rows, labels: Tensor, encoding: Encoding, basis: TailBasis | None) -> Tensor:
    head, indices = rows.log_probs.float(), rows.indices.long()  # type: ignore[union-attr]  # the caller has asked
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
    # Rounded to float16 it could overtake a head in float32; where it stands in the head, the head's value wins.
    stated_label = torch.where(known.unsqueeze(1), label_log_prob.minimum(last), log_probs.gather(1, label))
    return log_probs.scatter(1, label, stated_label).scatter(1, indices, head)
