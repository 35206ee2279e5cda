"""Ensembles: several networks as one teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdcache.models.checks import check_logits


class Ensemble(nn.Module):
    """The weighted mean of the outputs of several networks, as one network.

    `logits`: the mean of their logits. `probabilities`: the mean p of their softmaxes, as logits log p + s, where s is
    the mean of their logsumexps. The softmax of these is p; and since the logsumexp of log p is 0, that of the ensemble
    is s: for DTKD, which measures sharpness by it, the ensemble is as sharp as its members are on average.

    Args:
        members: each returns logits [B, C].
        weights: of the members; only their ratios matter.
        combine: what is averaged.
        names: of the members, for error messages.
        num_classes: C.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float],
        combine: Literal["logits", "probabilities"],
        names: Sequence[str],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine
        self.names = tuple(names)
        self.num_classes = num_classes
        shares = torch.tensor(weights, dtype=torch.float64)
        # A buffer of this name, so that the digest of the weights depends on the shares and on `combine`.
        self.register_buffer(f"shares_of_{combine}", (shares / shares.sum()).float())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] float32 of images [B, channels, H, W]."""
        # [members, B, C], in float32 also under autocast.
        logits = torch.stack([
            check_logits(member(images), len(images), self.num_classes, f"teacher's member {name}").float()
            for member, name in zip(self.members, self.names, strict=True)
        ])  # fmt: skip
        shares = self.get_buffer(f"shares_of_{self.combine}")[:, None, None]
        if self.combine == "logits":
            return (shares * logits).sum(dim=0)
        logsumexp = logits.logsumexp(dim=2, keepdim=True)
        return (logits - logsumexp + shares.log()).logsumexp(dim=0) + (shares * logsumexp).sum(dim=0)
