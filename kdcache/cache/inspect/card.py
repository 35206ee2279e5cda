"""Write the card of a cache: README.md with YAML front matter, as the Hugging Face Hub reads it, and a picture.

The card is generated from the manifest, except for the user's notes between two markers, which are kept. No digest
covers it. The front matter is written with yaml, since huggingface_hub (`DatasetCardData`) is an optional dependency.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from kdcache.cache.format.row_axes import axis_of
from kdcache.cache.format.schema import Plan, Summary, TeacherRecord
from kdcache.cache.inspect.card_plot import draw_census
from kdcache.cache.inspect.noise import described_noise
from kdcache.cache.inspect.outputs import described_outputs, described_sequences
from kdcache.cache.inspect.summary import take_census
from kdcache.cache.reader import Cache
from kdcache.errors import counted
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
"""License identifiers of the Hub; any other license is `other`, with its name."""


def write_card(
    cache: Cache,
    histograms: tuple[Mapping[float, int], Sequence[int]] | None = None,
    scheduler: str = "threads",
) -> tuple[Path, Path | None]:
    """Write the card of a sealed cache and its picture, and return the paths of both.

    Without class logits there is nothing to draw.

    Args:
        cache: opened.
        histograms: of sharpness and confidence, as `draw_census` takes them; None to count the rows of the cache.
        scheduler: as for `parallel.over`; only used to count the rows.
    """
    path, picture = cache.path / CARD, cache.path / PICTURE
    if cache.manifest.plan.class_encoding is None:
        return write_file(path, card(cache, _user_notes(path))), None
    if histograms is None:
        census = take_census(cache, 0, scheduler=scheduler)
        histograms = census.sharpness, census.confidence
    draw_census(*histograms, picture)
    return write_file(path, card(cache, _user_notes(path))), picture


def _user_notes(path: Path) -> str:
    """Return the user's notes in an existing card."""
    if path.is_symlink() or not path.is_file():
        return ""
    text = path.read_text("utf-8", "replace")
    match = re.search(f"{re.escape(_BEGIN)}\n(.*?)\n?{re.escape(_END)}", text, re.DOTALL)
    return match[1] if match else ""


def card(cache: Cache, notes: str = "") -> str:
    """Return the text of the card of a cache, in Markdown.

    Args:
        cache: opened.
        notes: notes of the user, in Markdown.
    """
    plan, summary = cache.manifest.plan, cache.manifest.summary
    title = _plain(f"{plan.teacher.name} on {plan.dataset.name}/{plan.dataset.split}: {', '.join(plan.output_names)}")
    rows = plan.views.count * axis_of(plan, plan.output_names[0]).rows
    of_sequences = None if plan.sequences is None else described_sequences(plan.sequences)
    unlabeled = bool((cache.labels < 0).any())
    facts = {
        "teacher": f"`{_plain(plan.teacher.name)}`, {plan.teacher.parameters:,} parameters, "
        f"run in {_plain(plan.teacher.precision)}",
        "weights": _weights(plan.teacher),
        "dataset": f"{_plain(plan.dataset.name)}, {_plain(plan.dataset.split)}: "
        + (
            f"{counted(plan.dataset.samples, 'sample')}, {len(plan.dataset.class_names):,} classes"
            if of_sequences is None
            else counted(plan.dataset.samples, "sequence")
        ),
        "dataset digest": f"`{plan.dataset.digest}`",
        **(
            {"views": f"{plan.views.count} per sample, seed {plan.views.seed}", "transform": _transform(plan)}
            if of_sequences is None
            else of_sequences
        ),
        **({"stored per row": _encoding(plan)} if plan.class_encoding is not None else {}),
        **{name: _plain(text) for name, text in described_outputs(plan.outputs).items()},
        **described_noise(plan.noise),
        "size": f"{counted(rows, 'row')}, {cache.bytes_on_disk:,} bytes, "
        f"{cache.bytes_on_disk / rows:.1f} bytes per row",
        **(_of_logits(plan.teacher, summary, unlabeled) if plan.class_encoding is not None else {}),
        "software": ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in plan.versions.items()),
        **_lineage(plan),
        "root digest": f"`{cache.manifest.digest}`",
    }
    parts = [
        _header(plan, title),
        f"# {title}",
        f"{'Logits' if plan.outputs is None else 'Outputs'} "
        "of a teacher network for every sample of a dataset, as soft labels for knowledge distillation: "
        "students are trained from this cache without running the teacher. It was written by "
        "[kdcache](https://pypi.org/project/kdcache/), is stored in Zarr v3, and contains "
        + ("no images." if plan.sequences is None else "the tokens of the dataset."),
        *([f"![Sharpness and confidence of the teacher]({PICTURE})"] if plan.class_encoding is not None else []),
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        "## Use",
        _usage(plan),
        ("" if plan.sequences else "Or on the command line: `kdcache train-student PIPELINE --cache CACHE`. ")
        + "Opening the cache checks every file except this card, its picture and the signature against the root "
        "digest.",
        "## Fidelity",
        _fidelity(plan),
        "## Limitations",
        _limits(plan),
        "## License",
        _plain(plan.licence) or "No license was given: ask the publisher before you use this cache.",
        *(["## Notes of the publisher", _plain(plan.notes)] if plan.notes else []),
        f"## Notes\n\n{_BEGIN}\n{notes}\n{_END}",
    ]
    return "\n\n".join(parts) + "\n"


_LIMITS = """\
- Students also learn the teacher's errors and biases.
- Logits reveal information about the teacher's training data: unusually confident rows suggest which samples it was
  trained on (membership inference), and most labels can be inferred. Share a cache only as you would share the labels.
- The cache stores a 64-bit content key per sample: anyone who has an image can check whether it is in the dataset.
- The logits are valid only for these images with this transform."""

_LIMITS_OF_NOISE = """\
- The noise hides details of single rows. It is not a proof of differential privacy, since nothing bounds how much one
  training sample changes the logits; and the noise of several views of a sample averages out."""


_LIMITS_OF_SEQUENCES = """\
- Students also learn the teacher's errors and biases.
- The cache contains the tokens of its dataset: share it only as you would share the text.
- A row is valid for a student that sees the same tokens before it: the same tokenizer, the same sequence."""


def _limits(plan: Plan) -> str:
    """Return what a user of the cache must know."""
    if plan.sequences is not None:
        return _LIMITS_OF_SEQUENCES
    return _LIMITS if plan.noise is None else f"{_LIMITS}\n{_LIMITS_OF_NOISE}"


def _usage(plan: Plan) -> str:
    """Return an example that reads the outputs."""
    lines = ["from kdcache import open_cache", "", 'cache = open_cache("CACHE")  # path of this folder, or its URL']
    if plan.class_encoding is not None:
        size = plan.class_encoding.num_classes
        lines += ["teacher = cache.teacher()", f"logits = teacher(ids, view=0)  # ids [B] int64 -> [B, {size}] float32"]
    for name, record in plan.named_outputs.items():
        if plan.sequences is not None:
            lines += [f'{name} = cache.sequences("{name}")', f"batch = {name}([0, 1])  # tokens and rows of sequences"]
            continue
        shape = ", ".join(map(str, record.shape))
        lines.append(f'{name} = cache.teacher("{name}")(ids, view=0)  # [B, {shape}] float32')
    return "\n".join(["```python", *lines, "```"])


def _of_logits(teacher: TeacherRecord, summary: Summary, unlabeled: bool) -> dict[str, str]:
    """Return what is known of the class logits as a whole; `unlabeled` if some of the samples are."""
    accuracy = summary.teacher_accuracy
    which = "those of these samples that have a label" if unlabeled else "these samples"
    return {
        "teacher accuracy": "unknown, no labels" if accuracy is None else f"{accuracy:.2%} on {which}",
        "sharpness": f"{summary.mean_sharpness:.3f}, mean logsumexp of the logits"
        if teacher.level is None
        else "unknown: the teacher gave probabilities, so logits are known up to an additive constant per row",
        "confidence": f"{summary.mean_top_probability:.4f}, mean largest probability",
    }


def _header(plan: Plan, title: str) -> str:
    """Return the YAML front matter, between its `---` lines."""
    licence = plan.licence.strip()
    known = licence.lower() in _LICENCES
    fields = {
        "license": licence.lower() if known else "other" if licence else "unknown",
        **({"license_name": _plain(licence)} if licence and not known else {}),
        "pretty_name": title,
        "size_categories": [_size(plan.dataset.samples)],
        "task_categories": ["image-classification" if plan.sequences is None else "text-generation"],
        "tags": ["knowledge-distillation", "logits", "kdcache", "zarr"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _size(samples: int) -> str:
    return "n<1K" if samples < 1000 else _SIZES[min(len(str(samples)) - 4, len(_SIZES) - 1)]


def _plain(text: str) -> str:
    """Return a string of the manifest on one line, with Markdown and HTML syntax escaped."""
    return re.sub(r"([|`\[\]*_])", r"\\\1", html.escape(" ".join(text.split()), quote=False)).replace("\\_", "_")


def _transform(plan: Plan) -> str:
    steps = [_plain(f"{name} {arguments or ''}") for step in plan.views.transform for name, arguments in step.items()]
    return "; ".join(steps) or "none"


def _weights(teacher: TeacherRecord) -> str:
    if not teacher.was_run:
        return "unknown: kdcache did not run the teacher"
    if teacher.weights == "none":
        return (
            "none that kdcache can read (a session, server, function or frozen module, or an ensemble with one): only "
            "its logits identify this teacher"
        )
    return f"`{teacher.weights_digest}`"


def _encoding(plan: Plan) -> str:
    encoding = plan.encoding
    if encoding.dense:
        return f"log-probabilities of all classes as {encoding.dtype}, and the logsumexp"
    tail = f"{encoding.rank} coordinates in a fitted basis" if encoding.rank else "their total mass, spread evenly"
    return (
        f"log-probabilities of the top {encoding.top_k} classes and the label as {encoding.dtype}; of the others {tail}"
    )


def _lineage(plan: Plan) -> dict[str, str]:
    if plan.lineage is None:
        return {}
    arguments = ", ".join(f"{name} {value}" for name, value in plan.lineage.arguments.items())
    parents = " ".join(f"`{digest}`" for digest in plan.lineage.parents)
    operation = {"derived by": _plain(f"{plan.lineage.operation}, {arguments}")}
    return operation | ({"derived from": parents} if parents else {})


def _fidelity(plan: Plan) -> str:
    """Return what was measured of the difference between decoded rows and the teacher, in Markdown."""
    if plan.sequences is not None:
        return "Not measured."
    if plan.class_encoding is None:
        return "Measured on held-out rows; see the outputs in the table above."
    measured, encoding = plan.fidelity, plan.class_encoding
    if measured is None:
        if encoding.dense and plan.lineage is None:
            return f"All logits are stored, to the precision of {encoding.dtype}."
        return "Not measured against the teacher."
    lines = [f"| {t} | {value:.4f} |" for t, value in measured.total_variation.items()]
    heading = (
        "Mean total variation distance between the softmax of decoded and of original logits, at temperature T, on "
        f"{measured.rows:,} held-out rows:"
    )
    return "\n".join([heading, "", "| T | total variation |", "|---|---|", *lines])
