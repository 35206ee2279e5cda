"""What `kdcache evaluate` prints of language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cli import output
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.evaluation.token_scores import LanguageScore


def evaluate_language_models(
    folders: Sequence[Path], cache_name: str | Path | None, rows: int, device: str, as_json: bool
) -> None:
    """Measure language models on the sequences of a cache, and print a table.

    Raises:
        UsageError: without a cache.
    """
    from kdcache.cache import open_cache
    from kdcache.evaluation.text_runs import read_text_run
    from kdcache.evaluation.token_scores import score_language_models

    runs = [read_text_run(folder) for folder in folders]
    if cache_name is None:
        raise UsageError(
            f"{folders[0]} is a language model, which is measured on the sequences of a cache",
            "pass --cache: that of its training for the sequences that were held out, or another one",
        )
    progress = output.Terminal()
    cache = open_cache(cache_name, progress=progress)
    scores = score_language_models(runs, cache, rows=rows, device=device, progress=progress)
    if as_json:
        output.as_json(
            {
                "cache": cache.manifest.digest,
                "device": device,
                "scores": [score._asdict() for score in scores],
            }
        )
        return
    _print(scores, cache.path, is_bound=cache.sequences().basis is None)


def _print(scores: Sequence[LanguageScore], cache: Path, is_bound: bool) -> None:
    """Print a table of the networks, and what its columns mean."""
    from kdcache.evaluation.metrics import BINS

    compared = any(score.kl is not None for score in scores)
    teacher = ["KL", "agreement"] if compared else []
    columns = ["network", "sequences", "positions", "perplexity", "NLL", "top-1", "ECE", *teacher, "parameters"]
    output.table(
        f"{cache}, next tokens",
        columns,
        [
            [
                score.network,
                f"{score.sequences:,}{'' if score.seen == 'others' else f' {score.seen}'}",
                f"{score.positions:,}",
                f"{score.perplexity:.4g}",
                f"{score.cross_entropy:.4f}",
                f"{score.accuracy:.2%}",
                f"{score.calibration_error:.4f}",
                *(["" if score.kl is None else f"{score.kl:.4f}", _percent(score.agreement)] if compared else []),
                f"{score.parameters:,}",
            ]
            for score in scores
        ],
    )
    output.result("")
    bound = "; a lower bound, as the cache has the mass of its tail alone" if is_bound else ""
    facts = {
        "positions": "taught positions of these sequences",
        "NLL": "negative log-likelihood of the next token, nats; its exponential is the perplexity",
        "ECE": f"expected calibration error of the most probable token, {BINS} bins of equal width",
    }
    if compared:
        facts["KL"] = f"mean KL divergence from the teacher of the cache at T = 1, nats{bound}"
        facts["agreement"] = "share of positions with the same most probable token as the teacher"
    output.facts(facts)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
