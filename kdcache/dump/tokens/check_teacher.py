"""Compare the rows of a cache of sequences with the live language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.cache.format.stored_sequences import read_counts
from kdcache.cache.reader import Cache
from kdcache.cache.sequence_plan import CountedSequences, pilot_rows
from kdcache.cache.sequences import CachedSequences
from kdcache.data.packing import TokenSequence
from kdcache.dump.tokens.agreement import head_variation, stored_distribution, temperatures_of
from kdcache.dump.tokens.running import RunningLanguageModel
from kdcache.errors import MismatchError, UsageError
from kdcache.losses.token_targets import TokenTargets
from kdcache.models import weights_digest
from kdcache.models.causal_lm import CausalLM
from kdcache.models.language_teacher import check_vocabulary_size
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.progress import Progress, Silent

_MAX_VARIATION = 0.05
"""Mean total variation of head and tail at T = 1 above which the teacher is another one, or runs in another way."""

_MAX_DEVIATION, _ROUNDING = 5.0, 0.05
"""Deviations of the mean log-probability of draws, and nats for rounding, above which it is another teacher."""

_ROWS_AT_ONCE = 32

_OTHER = "use the code, precision and library versions that the cache was made with (`kdcache info CACHE`)"


class TokenAgreement(NamedTuple):
    """The agreement of cached distributions with those of the live teacher, on some rows.

    Attributes:
        temperature: T.
        rows: number of rows.
        head_variation: total variation of the tokens of the head and of all others together, mean over the rows; of
            draws the mean of log p over the drawn tokens, less its expectation.
        total_variation: of all tokens, mean over the rows; None where the tail has no shape.
        top1: fraction of rows with the same most probable token; None of draws.
    """

    temperature: float
    rows: int
    head_variation: float
    total_variation: float | None
    top1: float | None


def check_same_language_model(cache: Cache, model: CausalLM, identity: TeacherIdentity | None, precision: str) -> None:
    """Check that a network is the one of a cache: its precision, weights and, if it is known, configuration.

    Raises:
        UsageError: if kdcache did not run the teacher of the cache.
        MismatchError: with both values.
    """
    teacher = cache.manifest.plan.teacher
    if not cache.teacher_seen:
        raise UsageError(
            f"the teacher of {cache.path} was not run by kdcache: {teacher.precision}",
            "run the command without --teacher",
        )
    if precision != teacher.precision:
        raise MismatchError(
            f"the teacher would run in {precision}, that of the cache ran in {teacher.precision}",
            f"set cache.precision to {teacher.precision}",
        )
    if (digest := weights_digest(model.network)) != teacher.weights_digest:
        raise MismatchError(
            f"this teacher has the weights {digest}, that of the cache {teacher.weights_digest}",
            "use the teacher that the cache was made with (`kdcache info CACHE` names it)",
        )
    if identity is not None and identity.code_digest != teacher.code_digest:
        raise MismatchError(
            f"this teacher's configuration or code has the digest {identity.code_digest}, that of the cache "
            f"{teacher.code_digest}",
            "use the config.json, or the code, that the cache was made with",
        )


def compare_language_model(
    cache: Cache,
    model: CausalLM,
    identity: TeacherIdentity | None = None,
    precision: str = "fp32",
    rows: int = 512,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[TokenAgreement]:
    """Run the teacher again on some sequences of a cache, and compare some of their rows.

    The texts are not needed: the tokens are in the cache. Sequences run one by one, so that rows may differ by what
    other batches round.

    Args:
        cache: to be verified.
        model: the teacher.
        identity: of it; None if it is not known.
        precision: that its weights have.
        rows: number of rows, spread over the sequences.
        device: where the teacher runs.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if it has other weights, or says something else than the cache.
    """
    check_same_language_model(cache, model, identity, precision)
    cached = cache.sequences(device=device)
    check_vocabulary_size(model, cached.encoding.num_classes, "the vocabulary of the cache")
    running = RunningLanguageModel(model, cached.encoding.num_classes, precision, device)
    tokens, taught = read_counts(cache.path, cache.manifest.plan)
    chosen = pilot_rows(CountedSequences(cache.sample_keys, tokens, taught), rows)
    sums: dict[float, Tensor] = {}
    count = 0
    with (progress or Silent()).task("teacher", sum(len(each.numbers) for each in chosen), "rows") as task:
        for each in chosen:
            numbers = torch.from_numpy(each.numbers).to(device)
            for logits, targets in _rows_of(running, cached, each.sequence, numbers):
                for t in temperatures_of(targets):
                    sums[t] = sums.get(t, torch.zeros(4, dtype=torch.float64)) + _sums(logits, targets, t)
                count += len(targets)
                task.advance(len(targets))
    agreements = [_agreement(t, count, total, cached) for t, total in sums.items()]
    _refuse_other(agreements[0], sums[agreements[0].temperature], cached)
    return agreements


@torch.no_grad()
def _rows_of(
    running: RunningLanguageModel, cached: CachedSequences, sequence: int, numbers: Tensor
) -> Iterator[tuple[Tensor, TokenTargets]]:
    """Yield live logits and stored rows of a sequence, a few at a time."""
    ids, taught = cached.tokens(sequence)
    hidden = running.hidden_states([TokenSequence(sequence, ids.cpu(), taught.cpu())])[numbers]
    stored = cached([sequence]).rows[numbers]
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        yield running.head.logits(hidden[some]), cached.targets(stored[some])


def _sums(logits: Tensor, targets: TokenTargets, temperature: float) -> Tensor:
    """Return sums over rows, [4] float64: variation of the head, of all tokens, the same top token, a variance."""
    if targets.draws is not None:
        drawn, counts = targets.draws
        log_p = (logits / temperature).log_softmax(dim=1).double()
        p = log_p.exp()
        expected = (p * log_p).sum(dim=1)
        said = (log_p.gather(1, drawn) * counts).sum(dim=1) / counts.sum(dim=1)
        variance = ((p * log_p.square()).sum(dim=1) - expected.square()) / counts.sum(dim=1)
        found = [(said - expected).sum(), logits.new_zeros(()), logits.new_zeros(()), variance.sum()]
    else:
        p = (logits / temperature).softmax(dim=1)
        whole = 0.5 * (stored_distribution(targets, temperature) - p).abs().sum(dim=1)
        same = logits.argmax(dim=1) == targets.indices[:, 0]
        head = head_variation(logits, targets, temperature)
        found = [head.sum(), whole.sum(), same.sum(), logits.new_zeros(())]
    return torch.stack([value.double().cpu() for value in found])


def _agreement(temperature: float, rows: int, total: Tensor, cached: CachedSequences) -> TokenAgreement:
    head, whole, same, _ = (total / rows).tolist()
    has_shape, is_drawn = cached.basis is not None, cached.encoding.tail == "draws"
    return TokenAgreement(temperature, rows, head, whole if has_shape else None, None if is_drawn else same)


def _refuse_other(found: TokenAgreement, total: Tensor, cached: CachedSequences) -> None:
    """Refuse a teacher that says something else than the cache."""
    if cached.encoding.tail == "draws":
        limit = _MAX_DEVIATION * float(total[3]) ** 0.5 / found.rows + _ROUNDING
        if abs(found.head_variation) > limit:
            raise MismatchError(
                f"the teacher gives the tokens that were drawn {found.head_variation:+.3f} nats more than its own "
                f"draws would have on average, over {found.rows} rows; {limit:.3f} is the limit",
                _OTHER,
            )
    elif not found.head_variation <= _MAX_VARIATION:
        raise MismatchError(
            f"the teacher says something else than the cache: mean total variation {found.head_variation:.4f} of head "
            f"and tail at T = {found.temperature:g}, the same most probable token in {found.top1:.1%} of "
            f"{found.rows} rows",
            _OTHER,
        )
