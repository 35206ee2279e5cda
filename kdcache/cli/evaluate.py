"""`kdcache evaluate`: compare trained networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from kdcache.cli import output
from kdcache.cli.evaluate_pixels import report_pixels
from kdcache.cli.evaluate_text import evaluate_language_models
from kdcache.cli.options import (
    CacheName,
    PathType,
    canaries_option,
    choose_device,
    device_option,
    json_option,
    read_canaries,
    read_pipeline,
    references_option,
    set_option,
)
from kdcache.errors import UsageError, counted

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.evaluation.exposure import Exposures
    from kdcache.evaluation.networks import Network, NetworkRef
    from kdcache.evaluation.output_scores import OutputScore
    from kdcache.evaluation.scorecard import NetworkScore, Scorecard

_CHECKPOINTS = {".bin", ".ckpt", ".pt", ".pt2", ".pth", ".safetensors", ".tar"}


@click.command("evaluate")
@click.argument("networks", nargs=-1, type=PathType(), metavar="[RUN]... [CHECKPOINT]...")
@click.option("--cache", "cache_name", type=CacheName(), help="Measure agreement with the teacher of this cache.")
@click.option(
    "--rows",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Number of cached images or sequences to compare on.",
)
@click.option(
    "--split", type=click.Choice(["test", "validation"]), default="test", show_default=True, help="Split to evaluate."
)
@click.option(
    "--pipeline",
    type=PathType(),
    help="Data set and network of each CHECKPOINT; without a CHECKPOINT, the teacher's weights in this file.",
)
@click.option("--network", type=click.Choice(["student", "teacher"]), help="Which network of --pipeline.")
@canaries_option
@references_option
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
    canaries: str | None,
    references: str | None,
    overrides: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Print the accuracy, calibration and cost of trained networks, and their agreement with a cached teacher.

    A RUN is a folder of train-student or train-teacher, or a whole sweep. A CHECKPOINT is a file with the weights of a
    network of --pipeline, safetensors or torch. Vectors and scores of a RUN are compared with those of --cache, on the
    samples that were held out from its training if there are any. Nothing is written.

    The RUN of a language model, or a folder of transformers, is measured on the sequences of --cache: perplexity,
    calibration, KL divergence and agreement with the teacher, on those that were held out from its training if it was
    trained from this cache.

    \b
    Example: kdcache evaluate runs/digits-teacher runs/digits-student --cache runs/digits.kdcache
    Example: kdcache evaluate --pipeline digits --network student runs/digits-student/model.safetensors
    """
    import torch

    from kdcache.cache import open_cache
    from kdcache.evaluation.text_runs import divided_by_kind

    found = _found(networks)
    if text := divided_by_kind(found)[0]:
        _refuse_for_text(split, pipeline, network, canaries or references, overrides)
        evaluate_language_models(text, cache_name, rows, choose_device(device), as_json)
        return
    from kdcache.evaluation.exposure import measure_exposure
    from kdcache.evaluation.output_scores import score_outputs
    from kdcache.evaluation.pixel_scorecard import are_of_pixels, score_pixels
    from kdcache.evaluation.scorecard import score_networks

    selected = _select(found, pipeline, network, overrides)
    named = read_canaries(canaries, references)
    chosen, progress = choose_device(device), output.Terminal()
    cache = open_cache(cache_name, views=1, progress=progress) if cache_name is not None else None
    if are_of_pixels(selected):
        if named is not None:
            raise UsageError("--canaries are samples with one label, and these have one per pixel", "leave it out")
        if cache is None or any(each.has_class_logits for each in selected):
            pixels = score_pixels(selected, split, cache=cache, rows=rows, device=chosen, progress=progress)
            report_pixels(pixels, cache, chosen, as_json)
            return
    classifiers = selected if cache is None else [each for each in selected if each.has_class_logits]
    of_classes = _with_class_logits(cache, selected)
    card = (
        score_networks(classifiers, split, cache=of_classes, rows=rows, device=chosen, progress=progress)
        if classifiers
        else None
    )
    outputs = []
    if cache is not None and (with_outputs := [each for each in selected if each.has_outputs]):
        outputs = score_outputs(with_outputs, cache, rows=rows, device=chosen, progress=progress)
    exposures = measure_exposure(selected, named, cache, device=chosen, progress=progress) if named else None
    if as_json:
        scores = {**card._asdict(), "scores": [score.as_record() for score in card.scores]} if card else {}
        digest = cache.manifest.digest if cache else None
        machine = {"device": chosen, "threads": torch.get_num_threads(), "cache": digest}
        measured = {"exposures": exposures.as_record()} if exposures else {}
        compared = {"outputs": [score._asdict() for score in outputs]} if outputs else {}
        output.as_json({**scores, **machine, **compared, **measured})
    else:
        if card is not None:
            _print(card, of_classes, chosen)
        if card is not None and outputs:
            output.result("")
        if cache is not None and outputs:
            _print_outputs(outputs, cache)
        if exposures is not None:
            _print_exposures(exposures)


def _found(paths: tuple[Path, ...]) -> list[Path]:
    """Return the run folders among the arguments, also those inside of sweeps, and all other paths."""
    from kdcache.evaluation.runs import find_runs

    found, unfinished = find_runs(paths)
    for run in unfinished:
        output.say(f"note: {run} is not finished and is left out")
    return found


def _refuse_for_text(
    split: str, pipeline: Path | None, network: str | None, canaries: str | None, overrides: tuple[str, ...]
) -> None:
    """Refuse options that are for networks of images.

    Raises:
        UsageError: if one is given.
    """
    given = {
        "--split": split != "test",
        "--pipeline": pipeline is not None,
        "--network": network is not None,
        "--canaries": canaries is not None,
        "--set": bool(overrides),
    }
    for option, is_given in given.items():
        if is_given:
            raise UsageError(
                f"{option} is for networks of images, and a language model is measured on the sequences of --cache",
                f"leave out {option}",
            )


def _select(
    found: list[Path], pipeline: Path | None, network: Network | None, overrides: tuple[str, ...]
) -> list[NetworkRef]:
    """Return the networks of paths, in their order.

    Raises:
        UsageError: if a checkpoint has no pipeline, or an option is missing.
    """
    from kdcache.evaluation.networks import from_pipeline, from_run

    if pipeline is None or network is None:
        files = [path for path in found if path.is_file()]
        if files or not found or pipeline or network or overrides:
            what = "options are missing" if found else "no RUN is given"
            raise UsageError(
                f"{_described(files[0]) if files else what}: a network that is not a run needs --pipeline and "
                "--network, and so does --set",
                "use: kdcache evaluate RUN, or: kdcache evaluate --pipeline PIPELINE --network student CHECKPOINT",
            )
        return [from_run(path) for path in found]
    resolved = read_pipeline(pipeline, overrides)
    named = [from_run(path) if path.is_dir() else from_pipeline(resolved, network, path) for path in found]
    return named if any(not path.is_dir() for path in found) else [from_pipeline(resolved, network, None), *named]


def _with_class_logits(cache: Cache | None, networks: list[NetworkRef]) -> Cache | None:
    """Return the cache that class logits are compared with; None without one.

    Raises:
        MismatchError: if the cache has none, and no network has other outputs to compare.
    """
    if cache is None or cache.manifest.plan.class_encoding is not None:
        return cache
    if not any(network.has_outputs for network in networks):
        cache.manifest.plan.encoding  # noqa: B018  # raises, and names what the cache has
    if any(network.has_class_logits for network in networks):
        output.say(f"note: {cache.path} holds no class logits, so those of the networks are not compared")
    return None


def _described(file: Path) -> str:
    return f"{file} is a checkpoint" if file.suffix in _CHECKPOINTS else f"{file} is a file, not a run folder"


def _print(card: Scorecard, cache: Cache | None, device: str) -> None:
    """Print a table of the networks, and what its columns mean."""
    import torch

    from kdcache.evaluation.costs import BATCH
    from kdcache.evaluation.metrics import BINS

    top5 = ["top-5"] if card.scores[0].top5 is not None else []
    columns = ["network", "top-1", *top5, "NLL", "ECE", "parameters", "MACs", "ms", "images/s"]
    columns += ["agreement", "TV, T=1", "TV, T=4"] if cache else []
    output.table(
        f"{card.dataset}/{card.split}, {counted(card.labeled, 'labeled image')}",
        columns,
        [_row(score) for score in card.scores],
    )
    output.result("")
    unlabeled = card.images - card.labeled
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    facts = {
        **({"left out": f"{counted(unlabeled, 'image')} without a label"} if unlabeled else {}),
        "NLL": "negative log-likelihood, nats",
        "ECE": f"expected calibration error of the top class, {BINS} bins of equal width (Guo et al. 2017)",
        "MACs": "multiply-accumulate operations per image: convolutions, matrix products, attention",
        "ms": f"latency of a batch of 1: median on {device}{threads}, float32",
        "images/s": f"throughput with batches of {BATCH}: median on {device}{threads}, float32",
    }
    if cache is not None and (like := card.scores[0].teacher) is not None:
        facts["agreement"] = (
            f"share of images with the same top class as the teacher of {cache.path}, "
            f"on {like.rows:,} of its {len(cache):,} images, view 0"
        )
        facts["TV"] = "mean total variation between the softmax of network and teacher, on the same images"
    output.facts(facts)


_OUTPUT_COLUMNS = {
    "one_minus_cosine": ("1 - cosine", "mean of 1 - cosine of the student's vector and the teacher's"),
    "relative_error": (
        "error",
        "squared error by the squared distance of the teacher's numbers from their mean: 0 is best, 1 as good as the "
        "mean",
    ),
    "alignment": (
        "CKA",
        "linear CKA (Kornblith et al. 2019): 1 for vectors that are equal but for a rotation and a scale",
    ),
    "correlation": ("correlation", "Pearson's, of the scores of student and teacher"),
    "same_order": ("same order", "share of the pairs of scores that are compared and that both order in the same way"),
    "same_class": ("agreement", "share of samples, or places of maps, with the same top class as the teacher"),
    "total_variation": ("TV, T=1", "mean total variation between the softmax of student and teacher"),
}
"""Of each measure of `OutputScore`: the column, and what it means."""


def _print_outputs(scores: list[OutputScore], cache: Cache) -> None:
    """Print a table of the outputs beside class logits, and what its columns mean."""
    records = [score._asdict() for score in scores]
    shown = [name for name in _OUTPUT_COLUMNS if any(record[name] is not None for record in records)]
    output.table(
        f"Outputs, against the teacher of {cache.path}, view 0",
        ["network", "output", "samples", *(_OUTPUT_COLUMNS[name][0] for name in shown), "parameters", "ms"],
        [
            [
                score.network,
                score.output,
                f"{score.rows:,} {'held out' if score.held_out else 'trained on'}",
                *("" if record[name] is None else f"{record[name]:.4g}" for name in shown),
                f"{score.parameters:,}",
                f"{score.milliseconds:.2f}",
            ]
            for score, record in zip(scores, records, strict=True)
        ],
    )
    output.result("")
    facts = dict(_OUTPUT_COLUMNS[name] for name in shown)
    if not all(score.held_out for score in scores):
        facts["trained on"] = (
            "samples of the training; train with --set student.train.held_out_fraction=0.1 to hold some out"
        )
    output.facts(facts)


def _print_exposures(exposures: Exposures) -> None:
    """Print the exposure of canaries, and what it means."""
    from kdcache.evaluation.exposure import COLUMNS

    output.result("")
    output.table(
        f"Canary exposure, {counted(len(exposures.measured[0].bits), 'canary', 'canaries')}",
        ["network or cache", *COLUMNS],
        [[one.name, *one.figures] for one in exposures.measured],
    )
    output.result("")
    output.facts({"exposure": exposures.explained})


def _row(score: NetworkScore) -> list[str]:
    """Return the cells of a network."""
    like = score.teacher
    return [
        score.name,
        f"{score.top1:.2%}",
        *([] if score.top5 is None else [f"{score.top5:.2%}"]),
        f"{score.negative_log_likelihood:.4f}",
        f"{score.calibration_error:.4f}",
        f"{score.parameters:,}",
        output.short_count(score.multiply_adds),
        f"{score.milliseconds:.2f}",
        f"{score.images_per_second:,.0f}",
        *(
            [f"{like.same_class:.2%}", f"{like.total_variation_t1:.4f}", f"{like.total_variation_t4:.4f}"]
            if like
            else []
        ),
    ]
