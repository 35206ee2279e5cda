"""Compare cached logits with those of the live teacher."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.fidelity import TEMPERATURES, divergence, gradient_error, total_variation
from kdcache.cache.format import stored_bases
from kdcache.cache.format.codec import decode, encode
from kdcache.cache.format.output_codec import decode_output
from kdcache.cache.format.output_records import OutputRecord
from kdcache.cache.format.schema import Plan
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.cache.vector_planner import vector_fidelity
from kdcache.config.cache import CacheSpec, OutputSpec
from kdcache.data.loader import batches, cut_range
from kdcache.data.replay import teacher_view
from kdcache.data.samples import Samples
from kdcache.dump.noise import noise_of_cache
from kdcache.dump.outputs import encode_outputs, labels_of_output
from kdcache.dump.probes import Difference, check_first_batch
from kdcache.errors import MismatchError
from kdcache.models import weights_digest
from kdcache.models.inference import InferenceModel, described_precision, refuse_not_finite
from kdcache.runtime.progress import Progress, Silent

_MAX_TOTAL_VARIATION = 0.05
"""Mean total variation at T = 1 above which the teacher is another one, or runs in another way."""


_MAX_RELATIVE_ERROR = 0.05
"""Relative squared error of an output above which the teacher is another one, or runs in another way."""


_MOST_NUMBERS, _LEAST_MAPS = 2**25, 4
"""Numbers of an output that are compared in a view at most, but at least of four maps."""


class TeacherAgreement(NamedTuple):
    """The agreement of cached logits with those of the live teacher, on some rows of one view.

    Attributes:
        view: index of the view.
        temperature: T.
        rows: number of rows.
        total_variation: mean over the rows.
        divergence: mean KL(live || cached), in nats.
        top1: fraction of rows with the same largest class.
        gradient_error: relative error of the KD gradient, for a student with constant logits.
    """

    view: int
    temperature: int
    rows: int
    total_variation: float
    divergence: float
    top1: float
    gradient_error: float


def check_weights(cache: Cache, model: nn.Module, spec: CacheSpec) -> None:
    """Check that a teacher has the weights of that of a cache, and would run in the same precision.

    Raises:
        MismatchError: with both values.
    """
    plan = cache.manifest.plan
    if (digest := weights_digest(model)) != plan.teacher.weights_digest:
        raise MismatchError(
            f"this teacher has the weights {digest}, that of the cache {plan.teacher.weights_digest}",
            "use the teacher that the cache was made with (`kdcache info CACHE` names it)",
        )
    if (precision := described_precision(spec)) != plan.teacher.precision:
        raise MismatchError(
            f"the teacher would run in {precision}, that of the cache ran in {plan.teacher.precision}",
            "set cache.precision, cache.channels_last and cache.compile to the values of the cache",
        )


def check_identity(
    cache: Cache, model: nn.Module, samples: Samples, spec: CacheSpec | None = None, device: torch.device | str = "cpu"
) -> Difference | None:
    """Check that a teacher is the one of a cache, by its weights, and by its logits of one batch of the pass.

    Args:
        cache: to be verified.
        model: the teacher; set to evaluation mode.
        samples: the data set that the cache was made from.
        spec: precision of the teacher; None for the defaults.
        device: where the teacher runs.

    Returns:
        How far its logits differ; None for a derived cache, which may keep other rows than the teacher's batches gave.

    Raises:
        MismatchError: if it has other weights, or other logits than the cache.
    """
    plan, spec = cache.manifest.plan, with_outputs_of(cache, spec)
    check_weights(cache, model, spec)
    if plan.lineage is not None:
        return None
    noise = noise_of_cache(cache.path, plan, spec, samples, cache.sample_keys)
    images = teacher_view(cache, samples, cache.views[0])
    return check_first_batch(cache.path, plan, images, model, spec, device, noise)


def with_outputs_of(cache: Cache, spec: CacheSpec | None) -> CacheSpec:
    """Return settings with which a teacher gives the outputs of a cache, wherever its pipeline takes them from now."""
    plan, spec = cache.manifest.plan, spec or CacheSpec()
    outputs = {name: spec.outputs.get(name, _spec_of(record)) for name, record in plan.named_outputs.items()}
    return spec.model_copy(update={"outputs": outputs, "logits": plan.class_encoding is not None})


def _spec_of(record: OutputRecord) -> OutputSpec:
    """Return where an output was taken, and its kind and places."""
    places: Literal["one", "grid"] = "grid" if record.places == "grid" else "one"
    patches = list(record.shape[1:]) if places == "grid" else None
    return OutputSpec(kind=record.kind, places=places, source=record.source, pool=record.pool, patches=patches)


class OutputAgreement(NamedTuple):
    """The agreement of an output of a cache with that of the live teacher, on some rows of one view.

    Attributes:
        view: index of the view.
        output: name of the output.
        rows: number of rows.
        measure: "1 - cosine" and "relative squared error" of vectors and scores, "total variation at T = 1" of classes;
            of maps the same of their places.
        value: mean over the rows.
    """

    view: int
    output: str
    rows: int
    measure: str
    value: float


def compare_outputs(
    cache: Cache,
    model: nn.Module,
    samples: Samples,
    spec: CacheSpec | None = None,
    rows: int = 512,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[OutputAgreement]:
    """Run the teacher again on some rows of every view, and compare its outputs beside the class logits.

    The arguments are those of `compare_with_teacher`.

    Raises:
        MismatchError: if it has other weights, or an output differs from that of the cache.
    """
    plan, spec = cache.manifest.plan, with_outputs_of(cache, spec)
    check_weights(cache, model, spec)
    if not plan.outputs:
        return []
    running = InferenceModel(model, len(plan.dataset.class_names), spec, device)
    cuts = _cuts(samples, _rows_of_outputs(rows, plan), plan)
    teachers = {name: cache.teacher(name, device=device) for name in plan.outputs}
    bases = {name: basis.to(device) for name, basis in stored_bases.read_bases(cache.path, plan).items()}
    agreements = []
    with (progress or Silent()).task("teacher's outputs", sum(map(len, cuts)) * len(cache.views), "rows") as task:
        for view in cache.views:
            parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in plan.outputs}
            for batch in batches(teacher_view(cache, samples, view), cuts, spec.num_workers, device):
                said, labels = running.run(batch.images), batch.labels.to(device)
                refuse_not_finite(said.finite().cpu(), batch.ids, said.names)
                for name, encoded in encode_outputs(said.outputs, labels, plan, bases).items():
                    truth = labels_of_output(plan.outputs[name], labels)
                    again = decode_output(encoded, truth, plan.outputs[name].encoding, bases.get(name))
                    parts[name].append((said.outputs[name], again, teachers[name](batch.ids, view)))
                task.advance(len(batch.ids))
            for name, of_output in parts.items():
                live, again, cached = (torch.cat(values) for values in zip(*of_output, strict=True))
                agreements += _output_agreement(view, name, plan.outputs[name].kind, live, again, cached)
    return agreements


def _rows_of_outputs(rows: int, plan: Plan) -> int:
    """Return the number of rows of outputs that are compared: fewer of maps, which are compared place by place."""
    largest = max(math.prod(record.shape) for record in plan.named_outputs.values())
    return min(rows, max(_MOST_NUMBERS // largest, _LEAST_MAPS))


def _cuts(samples: Samples, rows: int, plan: Plan) -> list[list[int]]:
    """Return batches of ids of so many rows, spread over the data set."""
    ids = pilot_ids(len(samples), rows)
    return [ids[cut.start : cut.stop] for cut in cut_range(range(len(ids)), plan.batch_size)]


def _output_agreement(
    view: int, name: str, kind: str, live: Tensor, again: Tensor, cached: Tensor
) -> list[OutputAgreement]:
    """Return the agreement of an output; `again` are live values after the same, perhaps lossy, encoding.

    Raises:
        MismatchError: if the encoded live values are not those of the cache.
    """
    count = len(live)
    live, again, cached = (values.movedim(1, -1).flatten(0, -2) for values in (live, again, cached))
    apart = vector_fidelity(again, cached)
    if apart.relative_error > _MAX_RELATIVE_ERROR:
        raise MismatchError(
            f"in view {view} the output {name} of the teacher is not that of the cache: relative squared error "
            f"{apart.relative_error:.2g}, 1 - cosine {apart.one_minus_cosine:.2g} of {count} rows",
            "use the code, precision and library versions that the cache was made with (`kdcache info CACHE`)",
        )
    if kind == "classes":
        measures = {"total variation at T = 1": float(total_variation(live, cached, 1).mean())}
    else:
        found = vector_fidelity(live, cached)
        measures = {"1 - cosine": found.one_minus_cosine, "relative squared error": found.relative_error}
    return [OutputAgreement(view, name, count, measure, value) for measure, value in measures.items()]


def compare_with_teacher(
    cache: Cache,
    model: nn.Module,
    samples: Samples,
    spec: CacheSpec | None = None,
    rows: int = 512,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[TeacherAgreement]:
    """Run the teacher again on some rows of every view.

    Args:
        cache: to be verified.
        model: the teacher; set to evaluation mode.
        samples: the data set that the cache was made from.
        spec: precision of the teacher, and number of processes that load images; None for the defaults.
        rows: number of rows per view, spread over the data set.
        device: where the teacher runs.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the cache has noise, and the settings do not name its key.
        MismatchError: if it has other weights, or other logits than the cache.
    """
    plan = cache.manifest.plan
    spec = with_outputs_of(cache, spec).model_copy(update={"outputs": {}})
    check_weights(cache, model, spec)
    noise = noise_of_cache(cache.path, plan, spec, samples, cache.sample_keys)
    running = InferenceModel(model, plan.encoding.num_classes, spec, device, noise)
    cuts = _cuts(samples, rows, plan)
    teacher = cache.teacher(device=device)
    agreements = []
    with (progress or Silent()).task("teacher", sum(map(len, cuts)) * len(cache.views), "rows") as task:
        for view in cache.views:
            images = teacher_view(cache, samples, view)
            parts = []
            for batch in batches(images, cuts, spec.num_workers, device):
                live = running(batch.images, batch.ids, view)
                refuse_not_finite(live.isfinite().all(dim=1, keepdim=True).cpu(), batch.ids)
                truth = teacher.labels[batch.ids.to(device)]
                again = decode(encode(live, truth, plan.encoding, teacher.basis), truth, plan.encoding, teacher.basis)
                parts.append((live, again, teacher(batch.ids, view)))
                task.advance(len(batch.ids))
            live, again, cached = (torch.cat(logits) for logits in zip(*parts, strict=True))
            _check_same_teacher(_agreement(view, 1, again, cached))
            agreements += [_agreement(view, t, live, cached) for t in TEMPERATURES]
    return agreements


def _check_same_teacher(encoded: TeacherAgreement) -> None:
    """Refuse another teacher; `encoded` is the agreement with live logits after the same, perhaps lossy, encoding."""
    if encoded.total_variation > _MAX_TOTAL_VARIATION:
        raise MismatchError(
            f"in view {encoded.view} the teacher's logits are not those of the cache: mean total variation "
            f"{encoded.total_variation:.4f} at T = 1, the same class in {encoded.top1:.1%} of {encoded.rows} rows",
            "use the code, precision and library versions that the cache was made with (`kdcache info CACHE`)",
        )


def _agreement(view: int, temperature: int, live: Tensor, cached: Tensor) -> TeacherAgreement:
    return TeacherAgreement(
        view,
        temperature,
        len(live),
        float(total_variation(live, cached, temperature).mean()),
        float(divergence(live, cached, temperature).mean()),
        float((live.argmax(dim=1) == cached.argmax(dim=1)).float().mean()),
        gradient_error(live, cached, torch.zeros_like(live), temperature),
    )
