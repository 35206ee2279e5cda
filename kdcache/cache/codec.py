"""Logits [B, C] to rows and back, in plain torch, on any device.

A row keeps the k largest log-probabilities at T = 1 and their classes (the head), the log-probability of the true class
wherever it stands, the logsumexp (log-probability + logsumexp = raw logit), and statistics of the whole distribution.
Log-probabilities lose ten times less in fp16 than raw logits of the same size: the large probabilities, which matter,
lie near 0, where fp16 is finest.

The tail is every class that the row does not state one by one: neither in the head nor the label. Its mass is recorded
at T = 1, 2, 4, 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdcache.cache.schema import STATISTICS, TAIL_TEMPERATURES, Encoding
from kdcache.errors import CorruptError

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def index_dtype(num_classes: int) -> torch.dtype:
    """The smallest type that holds a class index and that torch can gather on every device (not uint16 or uint32)."""
    return torch.uint8 if num_classes <= 2**8 else torch.int16 if num_classes <= 2**15 else torch.int32


@dataclass(frozen=True)
class Rows:
    """Encoded logits of B samples.

    Attributes:
        log_probs: [B, k] float16 or float32, at T = 1; descending, or in class order where k = C.
        indices: [B, k] uint8, int16 or int32, the classes of `log_probs`; None where k = C.
        logsumexp: [B] float32, of the raw logits: DTKD's sharpness.
        statistics: [B, S] float16, columns named by `Encoding.statistics`.
    """

    log_probs: Tensor
    indices: Tensor | None
    logsumexp: Tensor
    statistics: Tensor

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
        return Rows(arrays["log_probs"], arrays.get("indices"), arrays["logsumexp"], arrays["statistics"])

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """All rows of all parts, in order."""
        return Rows.of({name: torch.cat([part.arrays()[name] for part in parts]) for name in parts[0].arrays()})


def not_finite(logits: Tensor) -> Tensor:
    """Positions in the batch of the rows that hold a NaN or an infinity, [n] int64."""
    return (~logits.isfinite().all(dim=1)).nonzero().squeeze(1)


def encode(logits: Tensor, labels: Tensor, encoding: Encoding) -> Rows:
    """Encode a batch of the teacher's raw logits.

    Args:
        logits: [B, C], of any floating type; computed with in float32.
        labels: [B] int64, -1 where not known.
        encoding: k, tail and types.

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
    log_probs = logits.log_softmax(dim=1)
    known = labels >= 0
    label = labels.clamp_min(0).unsqueeze(1)
    columns = {
        "label_log_prob": log_probs.gather(1, label).squeeze(1).where(known, 0.0),
        "logit_mean": logits.mean(dim=1),
        "logit_std": logits.std(dim=1, correction=0),
        "entropy": -(log_probs.exp() * log_probs).sum(dim=1),
    }
    if encoding.dense:
        head, indices = log_probs, None
    else:
        # A stable order, so that equal logits give the same row on every device.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, : encoding.top_k]
        head, indices = log_probs.gather(1, order), order.to(index_dtype(encoding.num_classes))
        stated = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, True)
        stated |= torch.zeros_like(stated).scatter(1, label, known.unsqueeze(1))
        for t in TAIL_TEMPERATURES:
            softened = (logits / t).log_softmax(dim=1)
            columns[f"tail_log_mass_t{t}"] = softened.masked_fill(stated, -math.inf).logsumexp(dim=1)
    return Rows(
        log_probs=_to_finite(head, _DTYPES[encoding.dtype]),
        indices=indices,
        logsumexp=logits.logsumexp(dim=1),
        statistics=_to_finite(torch.stack([columns[name] for name in encoding.statistics], dim=1), torch.float16),
    )


def _to_finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def decode(rows: Rows, labels: Tensor, encoding: Encoding) -> Tensor:
    """The logits that rows stand for, [B, C] float32: what the teacher returned, as far as the row knows it.

    Head and label come back to the precision of their type. With the `uniform` tail the recorded mass is spread evenly
    over the other classes. Nothing outside the head comes back above the head's last.

    Args:
        rows: of B samples.
        labels: [B] int64, as they were encoded.
        encoding: as they were encoded.
    """
    head = rows.log_probs.float()
    if rows.indices is None:
        return head + rows.logsumexp.unsqueeze(1)
    indices = rows.indices.long()
    known = labels >= 0
    label = labels.clamp_min(0).unsqueeze(1)
    in_head = (indices == label).any(dim=1)
    tail_classes = encoding.num_classes - encoding.top_k - (known & ~in_head).long()
    tail_log_mass = rows.statistics[:, encoding.statistics.index("tail_log_mass_t1")].float()
    level = (tail_log_mass - tail_classes.clamp_min(1).log()).minimum(head[:, -1])
    log_probs = level.unsqueeze(1).expand(-1, encoding.num_classes).clone()
    label_log_prob = rows.statistics[:, STATISTICS.index("label_log_prob")].float().unsqueeze(1)
    # Rounded to float16 it could overtake a head in float32; where it stands in the head, the head's value wins.
    label_log_prob = label_log_prob.minimum(head[:, -1:])
    log_probs.scatter_(1, label, torch.where(known.unsqueeze(1), label_log_prob, log_probs.gather(1, label)))
    log_probs.scatter_(1, indices, head)
    return log_probs + rows.logsumexp.unsqueeze(1)
