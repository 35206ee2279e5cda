"""`kdcache evaluate`: trained networks side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kdcache.cli import output
from kdcache.cli.options import CacheName, choose_device, device_option, json_option, read_pipeline, set_option
from kdcache.errors import UsageError

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.evaluation.networks import Network, NetworkRef
    from kdcache.evaluation.scorecard import NetworkScore, Scorecard


@click.command("evaluate")
@click.argument("networks", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN]... [CHECKPOINT]...")
@click.option("--cache", "cache_name", type=CacheName(), help="Compare with the teacher of this cache.")
@click.option(
    "--rows", type=click.IntRange(1), default=4096, show_default=True, help="How many rows of the cache are compared."
)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    help="What each CHECKPOINT is of; without one, the teacher that this file names.",
)
@click.option("--network", type=click.Choice(["student", "teacher"]), help="Which network of --pipeline is meant.")
@set_option
@device_option
@json_option
def evaluate(
    networks: tuple[Path, ...],
    cache_name: str | Path | None,
    rows: int,
    split: Literal["validation", "test"],
    pipeline: Path | None,
    network: Network | None,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Say how good trained networks are on one data set, what they cost, and how near they come to their teacher.

    A RUN is a folder of train-student or train-teacher. A CHECKPOINT is a file with the weights of a network of
    --pipeline, safetensors or torch.

    \b
    Example: kdcache evaluate runs/digits-teacher runs/digits-student --cache runs/digits.kdcache
    Example: kdcache evaluate --pipeline pipelines/digits.yaml --network student weights.pt
    """
    import torch

    from kdcache.cache import open_cache
    from kdcache.evaluation.scorecard import score_networks

    trained = _trained(networks, pipeline, network, overrides)
    on, progress = choose_device(device), output.Terminal()
    cache = open_cache(cache_name, views=1, progress=progress) if cache_name is not None else None
    card = score_networks(trained, split, cache=cache, rows=rows, device=on, progress=progress)
    if as_json:
        scores = [score.as_record() for score in card.scores]
        where = {"device": on, "threads": torch.get_num_threads(), "cache": cache.manifest.digest if cache else None}
        output.as_json({**card._asdict(), **where, "scores": scores})
    else:
        _print(card, cache, on)


def _trained(
    paths: tuple[Path, ...], pipeline: Path | None, network: Network | None, overrides: tuple[str, ...]
) -> list[NetworkRef]:
    """The networks that the arguments name, in their order."""
    from kdcache.evaluation.networks import from_pipeline, from_run

    if pipeline is None or network is None:
        files = [path for path in paths if path.is_file()]
        if files or not paths or pipeline or network or overrides:
            what = f"{files[0]} is a checkpoint" if files else "no run is given" if not paths else "options are missing"
            raise UsageError(
                f"{what}: a network that is no run needs --pipeline and --network, and --set needs them too",
                "kdcache evaluate RUN, or kdcache evaluate --pipeline PIPELINE --network student CHECKPOINT",
            )
        return [from_run(path) for path in paths]
    resolved = read_pipeline(pipeline, overrides)
    found = [from_run(path) if path.is_dir() else from_pipeline(resolved, network, path) for path in paths]
    return found if any(not path.is_dir() for path in paths) else [from_pipeline(resolved, network, None), *found]


def _print(card: Scorecard, cache: Cache | None, device: str) -> None:
    import torch

    from kdcache.evaluation.costs import BATCH
    from kdcache.evaluation.metrics import BINS

    top5 = ["top-5"] if card.scores[0].top5 is not None else []
    columns = ["", "top-1", *top5, "NLL", "ECE", "parameters", "multiply-adds", "ms", "images/s"]
    columns += ["same class", "TV, T=1", "TV, T=4"] if cache else []
    output.table(
        f"{card.dataset}/{card.split}, {card.labeled:,} labeled images",
        columns,
        [_row(score) for score in card.scores],
    )
    output.result("")
    left_out = card.images - card.labeled
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    facts = {
        **({"left out": f"{left_out:,} images without a label"} if left_out else {}),
        "NLL": "negative log-likelihood, nats",
        "ECE": f"expected calibration error of the top class, {BINS} bins of equal width (Guo et al. 2017)",
        "multiply-adds": "of one image: convolutions, products of matrices, attention",
        "ms, images/s": f"of a batch of 1, and in batches of {BATCH}: medians on {device}{threads}, float32",
    }
    if cache is not None and (like := card.scores[0].teacher) is not None:
        facts["same class, TV"] = (
            f"top class, and mean total variation of the softmax, against the teacher of {cache.path} "
            f"on {like.rows:,} of its {len(cache):,} images, view 0"
        )
    output.facts(facts)


def _row(score: NetworkScore) -> list[str]:
    like = score.teacher
    return [
        score.name,
        f"{score.top1:.2%}",
        *([] if score.top5 is None else [f"{score.top5:.2%}"]),
        f"{score.negative_log_likelihood:.4f}",
        f"{score.calibration_error:.4f}",
        f"{score.parameters:,}",
        _short(score.multiply_adds),
        f"{score.milliseconds:.2f}",
        f"{score.images_per_second:,.0f}",
        *(
            [f"{like.same_class:.2%}", f"{like.total_variation_t1:.4f}", f"{like.total_variation_t4:.4f}"]
            if like
            else []
        ),
    ]


def _short(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
