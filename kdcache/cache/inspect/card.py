"""The card of a cache: README.md, for people, in the form that the Hugging Face hub reads.

It follows from the manifest, but for what a user writes between two marks, which is kept. No digest covers it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from kdcache.cache.format.schema import Plan
from kdcache.cache.inspect.card_plot import draw_census
from kdcache.cache.inspect.summary import take_census
from kdcache.cache.reader import Cache
from kdcache.runtime.atomic_write import write_file

CARD, PICTURE = "README.md", "card.png"
_BEGIN, _END = "<!-- your notes: kept by `kdcache card` -->", "<!-- end of your notes -->"
_POWERS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
_SIZES = [f"{low}<n<{high}" for low, high in pairwise(_POWERS)]
_LICENCES = {
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "odc-by", "odbl", "pddl",
    "unlicense",
}  # fmt: skip
"""Identifiers that the hub knows; others are `other`, with their name."""


def write_card(
    cache: Cache,
    histograms: tuple[Mapping[float, int], Sequence[int]] | None = None,
    scheduler: str = "threads",
) -> tuple[Path, Path]:
    """Write the card of a sealed cache and its picture, and return the paths of both.

    Args:
        cache: opened.
        histograms: of sharpness and confidence, as `draw_census` takes them; None to count the rows of the cache.
        scheduler: as for `parallel.over`; only used to count the rows.
    """
    if histograms is None:
        census = take_census(cache, 0, scheduler=scheduler)
        histograms = census.sharpness, census.confidence
    picture = cache.path / PICTURE
    draw_census(*histograms, picture)
    path = cache.path / CARD
    return write_file(path, card(cache, _kept(path))), picture


def _kept(path: Path) -> str:
    """What a user has written into an earlier card."""
    if path.is_symlink() or not path.is_file():
        return ""
    found = re.search(f"{re.escape(_BEGIN)}\n(.*?)\n?{re.escape(_END)}", path.read_text("utf-8", "replace"), re.DOTALL)
    return found[1] if found else ""


def card(cache: Cache, notes: str = "") -> str:
    """The card of a cache.

    Args:
        cache: whose.
        notes: of the user, Markdown.
    """
    plan, summary = cache.manifest.plan, cache.manifest.summary
    title = _plain(f"{plan.teacher.name} on {plan.dataset.name}/{plan.dataset.split}: logits")
    rows = plan.views.count * plan.dataset.samples
    accuracy = summary.teacher_accuracy
    facts = {
        "teacher": f"`{_plain(plan.teacher.name)}`, {plan.teacher.parameters:,} parameters, "
        f"run in {_plain(plan.teacher.precision)}",
        "weights": f"`{plan.teacher.weights_digest}`",
        "data set": f"{_plain(plan.dataset.name)}, {_plain(plan.dataset.split)}: {plan.dataset.samples:,} samples of "
        f"{plan.encoding.num_classes:,} classes",
        "its digest": f"`{plan.dataset.digest}`",
        "views": f"{plan.views.count} of each sample, seed {plan.views.seed}",
        "transform": _transform(plan),
        "kept of a row": _encoding(plan),
        "size": f"{rows:,} rows, {cache.bytes_on_disk:,} bytes, {cache.bytes_on_disk / rows:.1f} a row",
        "teacher's accuracy": "no labels" if accuracy is None else f"{accuracy:.2%} on these samples",
        "sharpness": f"{summary.mean_sharpness:.3f}, mean logsumexp of the logits"
        if plan.teacher.level is None
        else "not known: only probabilities are, and so the logits but for a constant of each row",
        "confidence": f"{summary.mean_top_probability:.4f}, mean largest probability",
        "made with": ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in plan.versions.items()),
        **_lineage(plan),
        "root digest": f"`{cache.manifest.digest}`",
    }
    parts = [
        _header(plan, title),
        f"# {title}",
        "What a teacher network said of every sample of a data set, so that students can be trained without it: a "
        "cache of [kdcache](https://pypi.org/project/kdcache/), in Zarr v3. It holds no images.",
        f"![Sharpness and confidence of the teacher]({PICTURE})",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        "## Use",
        "```python\nfrom kdcache import open_cache\n\n"
        'teacher = open_cache("CACHE").teacher()  # this folder, or its URL\n'
        f"logits = teacher(ids, view=0)  # ids [B] int64 -> [B, {plan.encoding.num_classes}] float32\n```",
        "Or: `kdcache train-student PIPELINE --cache CACHE`. When the cache is opened, every file but this card is "
        "checked against the root digest.",
        "## Fidelity",
        _fidelity(plan),
        "## Limits",
        _LIMITS,
        "## Licence",
        _plain(plan.licence) or "None was given: ask who made it before you use it.",
        *(["## Notes of the maker", _plain(plan.notes)] if plan.notes else []),
        f"## Notes\n\n{_BEGIN}\n{notes}\n{_END}",
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = """\
- A student learns the teacher's mistakes and biases with the rest.
- Logits tell of the data that a teacher was trained on: from unusually confident rows it can be guessed which samples
  were among them (membership inference), and labels can be read off. Share them as you would share the labels.
- A 64-bit content key is kept of each sample: whoever has an image can tell whether it is in the set.
- The rows hold for these images through this transform, and no other."""


def _header(plan: Plan, title: str) -> str:
    licence = plan.licence.strip()
    known = licence.lower() in _LICENCES
    fields = {
        "license": licence.lower() if known else "other" if licence else "unknown",
        **({"license_name": _plain(licence)} if licence and not known else {}),
        "pretty_name": title,
        "size_categories": [_size(plan.dataset.samples)],
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "logits", "kdcache", "zarr"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _size(samples: int) -> str:
    return "n<1K" if samples < 1000 else _SIZES[min(len(str(samples)) - 4, len(_SIZES) - 1)]


def _plain(text: str) -> str:
    """A text of the manifest in one line, that cannot be taken for Markdown or HTML of the card."""
    return re.sub(r"([|`\[\]*_])", r"\\\1", html.escape(" ".join(text.split()), quote=False)).replace("\\_", "_")


def _transform(plan: Plan) -> str:
    steps = [_plain(f"{name} {arguments or ''}") for step in plan.views.transform for name, arguments in step.items()]
    return "; ".join(steps) or "none"


def _encoding(plan: Plan) -> str:
    encoding = plan.encoding
    if encoding.dense:
        return f"every logit, as {encoding.dtype} log-probabilities and the logsumexp"
    tail = f"in {encoding.rank} coordinates of a fitted basis" if encoding.rank else "by its mass alone, evenly spread"
    return f"the {encoding.top_k} largest and the label as {encoding.dtype}, the others {tail}"


def _lineage(plan: Plan) -> dict[str, str]:
    if plan.lineage is None:
        return {}
    asked = ", ".join(f"{name} {value}" for name, value in plan.lineage.arguments.items())
    parents = " ".join(f"`{digest}`" for digest in plan.lineage.parents)
    return {"made by": _plain(f"{plan.lineage.operation}, {asked}"), **({"from": parents} if parents else {})}


def _fidelity(plan: Plan) -> str:
    measured, encoding = plan.fidelity, plan.encoding
    if measured is None:
        if encoding.dense and plan.lineage is None:
            return f"Every logit is kept, to the precision of {encoding.dtype}."
        return "It was not measured against the teacher."
    lines = [f"| {t} | {value:.4f} |" for t, value in measured.total_variation.items()]
    said = (
        f"Mean total variation between decoded and true softmax, on {measured.rows:,} rows that nothing was fitted to:"
    )
    return "\n".join([said, "", "| T | total variation |", "|---|---|", *lines])
