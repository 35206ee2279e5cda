"""The KL divergence of a student from targets of tokens, with gradients by hand.

Each function returns a sum over the rows, as `closed_form.weighted_kl` does. If a temperature carries a gradient, the
plain formulas are taken.
"""

from __future__ import annotations

from torch import Tensor

from kdcache.losses.closed_form import is_traced
from kdcache.losses.fused_tokens import SoftTarget, plain_sum, token_sums
from kdcache.losses.token_targets import TokenTargets, head_and_tail


def ghost_kl(
    student_logits: Tensor,
    student_temperature: Tensor,
    indices: Tensor,
    head: Tensor,
    tail: Tensor,
    weight: Tensor,
) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i) over K + 1 classes, the last of them the tail, with q = softmax(v / T_stu).

        KL = sum_head p_j (log p_j - log q_j) + m (log m - log Q)    Q = sum_tail q_j

    Q is a sum over the tail, not 1 minus the head's, so that a student whose head has nearly all mass does not lead to
    log 0. On the tail d KL / d v_j = (q_j / Q) (Q - m) / T.

    Args:
        student_logits: [n, V], v.
        student_temperature: [n, 1].
        indices: [n, K] int64; a column may repeat a class of the row if its probability is 0.
        head: [n, K], log p of the classes, at least `NEVER`.
        tail: [n, 1], log m, at least `NEVER`; with the head it adds up to 1.
        weight: [n].

    Source: the tail bucket of TRL (`_add_tail_bucket`) and the ghost token of Megatron-LM. DistillKit has it as
    SYMMETRIC_UNIFORM (`lossfuncs/kl.py` at 361c7ac), whose m is wrong at T > 1: see `token_targets.py`.
    """
    soft = SoftTarget(indices, head, tail)
    differentiated = (student_temperature, head, tail, weight)
    if is_traced() or any(value.requires_grad for value in differentiated):
        return plain_sum(student_logits, student_temperature, soft, weight)
    return token_sums(student_logits, student_temperature, soft, weight).total


def shaped_kl(
    student_logits: Tensor, student_temperature: Tensor, targets: TokenTargets, temperature: Tensor, weight: Tensor
) -> Tensor:
    """Return sum_i w_i KL(p_i || q_i), with q = softmax(v / T_stu) and p the head and the shaped tail at T_tea.

    The tail is that of `scaled_logits`, but for what its last step takes from classes above the head's last.

    Args:
        student_logits: [n, V], v.
        student_temperature: [n, 1], without a gradient.
        targets: with coordinates.
        temperature: [n, 1], T_tea, without a gradient.
        weight: [n], without a gradient.
    """
    soft = SoftTarget(targets.indices, *head_and_tail(targets, temperature), targets, temperature)
    return token_sums(student_logits, student_temperature, soft, weight).total


def draws_kl(
    student_logits: Tensor, student_temperature: Tensor, draws: tuple[Tensor, Tensor], weight: Tensor
) -> Tensor:
    """Return sum_i w_i KL(c_i / N_i || q_i), with c the counts of classes that were drawn from the teacher.

    The gradient with respect to the student is that of KL(p || q) in the mean over the draws. The value is not: it is
    above that by what the draws lack in entropy, which no student changes.

    Args:
        student_logits: [n, V].
        student_temperature: [n, 1].
        draws: ids [n, m] int64 and counts [n, m].
        weight: [n].

    Source: Anshumann et al. 2025, Sparse Logit Sampling (2503.16870), with the proposal p itself.
    """
    ids, counts = draws
    share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1.0)
    scaled = student_logits / student_temperature
    log_q = scaled.gather(1, ids) - scaled.logsumexp(dim=1, keepdim=True)
    return (weight * (share * (share.clamp_min(1e-30).log() - log_q)).sum(dim=1)).sum()
