"""Losses on scores of the student and the teacher: regressions, and the candidates of a query."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.losses.batch import BatchSum, batch_mean, of_these


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared difference of the margins (Margin-MSE: Hofstaetter et al. 2020, 2010.02666, eq. 7).

        ((s+ - s-) - (t+ - t-))^2

    Reference: sebastian-hofstaetter/neural-ranking-kd@aafcc73.

    Args:
        student: [B, 2], the scores of a positive and a negative passage.
        teacher: [B, 2].
    """
    return ((student[:, 0] - student[:, 1]) - (teacher[:, 0] - teacher[:, 1])).square()


def list_kl(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(t / T) || softmax(s / T)) over the candidates of a query, [B, K] -> [B].

    It is 0 for equal scores. A public implementation gives -1.8 there: it takes the logarithm of the wrong softmax.
    """
    log_p, log_q = (teacher / tau).log_softmax(dim=1), (student / tau).log_softmax(dim=1)
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1)


def concordance(student: Tensor, teacher: Tensor, batch_sum: BatchSum = of_these) -> Tensor:
    """Return 1 - the concordance correlation coefficient of the batch (Lin 1989), the mean over the columns.

        1 - 2 cov(s, t) / (var(s) + var(t) + (mean s - mean t)^2), with biased moments

    It is a loss of the batch. Where neither varies it is 0 for equal constants, 1 otherwise.

    Args:
        student: [B, K].
        teacher: [B, K].
        batch_sum: sums over the samples of the whole batch.

    Returns:
        [B], the value of the batch for each sample.
    """
    mean_s, mean_t = batch_mean(student, batch_sum), batch_mean(teacher, batch_sum)
    apart_s, apart_t = student - mean_s, teacher - mean_t
    covariance = batch_mean(apart_s * apart_t, batch_sum)
    spread = batch_mean(apart_s.square(), batch_sum) + batch_mean(apart_t.square(), batch_sum)
    divisor = spread + (mean_s - mean_t).square()
    is_equal = divisor == 0
    coefficient = torch.where(is_equal, 1.0, 2 * covariance / torch.where(is_equal, 1.0, divisor))
    return (1 - coefficient).mean().expand(len(student))
