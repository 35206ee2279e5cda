"""What `kdcache evaluate` prints of networks that say a class of every pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.cli import output
from kdcache.errors import counted

if TYPE_CHECKING:
    from kdcache.cache import Cache
    from kdcache.evaluation.pixel_scorecard import PixelScorecard


def report_pixels(card: PixelScorecard, cache: Cache | None, device: str, as_json: bool) -> None:
    """Print the scores of networks that say a class of every pixel."""
    import torch

    from kdcache.evaluation.costs import BATCH

    threads = torch.get_num_threads()
    if as_json:
        scores = [score.as_record() for score in card.scores]
        digest = cache.manifest.digest if cache else None
        output.as_json({**card._asdict(), "scores": scores, "device": device, "threads": threads, "cache": digest})
        return
    columns = ["network", "mIoU", "pixel accuracy", "NLL", "parameters", "MACs", "ms", "images/s"]
    rows = [
        [
            each.name,
            f"{each.score.mean_iou:.2%}",
            f"{each.score.accuracy:.2%}",
            f"{each.score.loss:.4f}",
            f"{each.parameters:,}",
            output.short_count(each.multiply_adds),
            f"{each.milliseconds:.2f}",
            f"{each.images_per_second:,.0f}",
            *([f"{each.teacher.same_class:.2%}", f"{each.teacher.total_variation:.4f}"] if each.teacher else []),
        ]
        for each in card.scores
    ]
    columns += ["agreement", "TV, T=1"] if cache else []
    output.table(f"{card.dataset}/{card.split}, {counted(card.images, 'image')}", columns, rows)
    output.result("")
    classes = [
        [name, *("" if each.score.iou[label] is None else f"{each.score.iou[label]:.2%}" for each in card.scores)]
        for label, name in enumerate(card.class_names)
    ]
    output.table("Intersection over union", ["class", *(each.name for each in card.scores)], classes)
    output.result("")
    on = f"{device}, {threads} threads" if device == "cpu" else device
    facts = {
        "mIoU": "mean over the classes of intersection / union, of labeled pixels",
        "NLL": "negative log-likelihood of a pixel, nats",
        "ms": f"latency of a batch of 1: median on {on}, float32",
        "images/s": f"throughput with batches of {BATCH}: median on {on}, float32",
    }
    if cache is not None and (like := card.scores[0].teacher) is not None:
        facts["agreement"] = (
            f"share of the teacher's places with the same top class as the teacher of {cache.path}, on "
            f"{like.images:,} of its {len(cache):,} images, view 0"
        )
        facts["TV"] = "mean total variation between the softmax of network and teacher, at the same places"
    output.facts(facts)
