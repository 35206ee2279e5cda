"""Several networks that are one teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdcache.models.checks import check_logits


class Ensemble(nn.Module):
    """The weighted mean of what several networks say, as one network whose parameters are all of theirs.

    `logits`: the mean of their logits. `probabilities`: the mean p of their softmaxes, as logits log p + s, where s is
    the mean of their logsumexps. The softmax of these is p; and since the logsumexp of log p is 0, that of the ensemble
    is s: DTKD, which tells by it how sharp a teacher is, finds an ensemble as sharp as its members are on average.

    Args:
        members: each returns logits [B, C].
        weights: how much each counts; only their ratios matter.
        combine: what the mean is taken of.
        names: of the members, for what is said of one that does not fit.
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
        # A buffer of this name, so that the digest of the weights tells shares and ways to combine from others.
        self.register_buffer(f"shares_of_{combine}", (shares / shares.sum()).float())

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, C] float32."""
        # [members, B, C]; in float32, whatever a member computes in under autocast.
        logits = torch.stack([
            check_logits(member(images), len(images), self.num_classes, f"teacher's member {name}").float()
            for member, name in zip(self.members, self.names, strict=True)
        ])  # fmt: skip
        shares = self.get_buffer(f"shares_of_{self.combine}")[:, None, None]
        if self.combine == "logits":
            return (shares * logits).sum(dim=0)
        logsumexp = logits.logsumexp(dim=2, keepdim=True)
        return (logits - logsumexp + shares.log()).logsumexp(dim=0) + (shares * logsumexp).sum(dim=0)
