"""Measures of the outputs of students beside class logits, or instead of them, against the teacher of a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcache.cache.fidelity import total_variation
from kdcache.cache.planner import pilot_ids
from kdcache.cache.reader import Cache
from kdcache.cache.teacher import TeacherWithOutputs
from kdcache.config.schema import StudentSpec
from kdcache.data.datasets import load_split
from kdcache.data.loader import batches, cut_range
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import CorruptError
from kdcache.evaluation import costs
from kdcache.evaluation.networks import NetworkRef
from kdcache.losses import Loss
from kdcache.losses.map_options import MapLossOptions
from kdcache.losses.outputs import OutputLossOptions
from kdcache.models import build_for
from kdcache.models.checks import set_evaluation_mode
from kdcache.runtime.progress import Progress, Silent
from kdcache.train.held_out import hold_out
from kdcache.train.inputs import CacheOptions, inputs_from_caches
from kdcache.train.student_outputs import StudentOutputs, student_outputs

_BATCH = 256


_MOST_NUMBERS, _LEAST_MAPS = 2**25, 4
"""Numbers of an output that are compared at most, but at least of four maps."""


class OutputScore(NamedTuple):
    """Measures of an output of a student against that of the teacher, in view 0; None where one is not of its kind.

    Of maps they are those of the places, as if these were samples.

    Attributes:
        network: name of the student.
        output: name of the output.
        kind: vector, score or classes.
        rows: number of samples that are compared.
        held_out: whether these were held out from the training of the student, by `train.held_out_fraction`.
        one_minus_cosine: of a vector, mean of 1 - cosine; None if the student's has another length and no linear map.
        relative_error: of a vector or scores, squared errors by the squared distances of the teacher's from their mean;
            None as above.
        alignment: of a vector, linear CKA, which is 1 for vectors that are equal but for a rotation and a scale.
        correlation: of scores, Pearson's, mean over the scores of a sample.
        same_order: of scores that are compared in groups of samples, or of several scores per sample: share of the
            pairs that both order in the same way, without those that the teacher gives the same score.
        same_class: of classes, share of the samples with the same top class.
        total_variation: of classes, between the softmax outputs at T = 1, mean.
        parameters: of the student.
        milliseconds: latency of one sample.
    """

    network: str
    output: str
    kind: str
    rows: int
    held_out: bool
    one_minus_cosine: float | None
    relative_error: float | None
    alignment: float | None
    correlation: float | None
    same_order: float | None
    same_class: float | None
    total_variation: float | None
    parameters: int
    milliseconds: float


def score_outputs(
    networks: Sequence[NetworkRef],
    cache: Cache,
    *,
    rows: int = 4096,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[OutputScore]:
    """Compare the outputs that students were trained with with those of the teacher of a cache.

    Args:
        networks: students whose `loss` has other outputs than class logits.
        cache: of the teacher.
        rows: number of samples that are compared, evenly spread: of those that were held out from training if there
            are any.
        device: device of the networks.
        progress: progress reporter; silent if None.

    Raises:
        MismatchError: if the cache is of other samples.
        UsageError: if it lacks an output.
        CorruptError: if a network returns NaN or infinite numbers.
        KdcacheError: if the weights of a network do not fit.
    """
    progress, scores = progress or Silent(), list[OutputScore]()
    with progress.task("outputs", len(networks), "networks") as task:
        for network in networks:
            scores += _scores(network, cache, rows, device, progress)
            task.advance(1, network.name)
    return scores


def _scores(
    network: NetworkRef,
    cache: Cache,
    rows: int,
    device: torch.device | str,
    progress: Progress,
) -> Iterator[OutputScore]:
    """Yield the scores of a network; see `score_outputs`."""
    pipeline, spec = network.pipeline, network.pipeline.section("student")
    by_content = not np.array_equal(load_split(pipeline.dataset, "train").keys(progress), cache.sample_keys)
    options = CacheOptions(placement="stream", allow_missing=by_content)
    # The class logits of the cache, if it has any, are not needed.
    of_outputs = pipeline.loss.model_copy(update={"ce_weight": 0.0, "kd_weight": 0.0, "plain_kd_weight": 0.0})
    without_logits = pipeline.model_copy(update={"loss": of_outputs})
    inputs = inputs_from_caches(without_logits, [cache], options, device=device, progress=progress)
    if fraction := spec.train.held_out_fraction:
        inputs = hold_out(inputs, fraction)[1]
    samples, teacher = inputs.samples, inputs.teacher
    if not isinstance(teacher, TeacherWithOutputs):
        raise TypeError("the loss has outputs, and so has its teacher")
    network.check_classes(samples)
    cached = View(samples, inputs.transform, inputs.seed, crops=inputs.crops)
    view = network.view_for_comparison(cached)
    model = build_for(spec, samples, view.shape(), trained=True)
    outputs = student_outputs(model, _without_selection(spec), pipeline.loss, view, teacher)
    outputs.load(Path(str(spec.weights)).parent)
    set_evaluation_mode(model.to(device))
    outputs.to(device)
    groups = _compared(samples, _rows_of(pipeline.loss, cache, rows))
    ids = groups.flatten()
    said = _said(network, model, outputs, view, ids, device)
    cost = costs.count_parameters(model), _latency(model, outputs, view, device)
    for name, values in said.items():
        kind = cache.outputs[name].kind
        wanted = teacher.outputs[name](ids, 0).cpu()
        ours, theirs = _as_rows(values, wanted, pipeline.loss.outputs[name])
        measures = measures_of(kind, ours.double(), theirs.double(), groups.shape[1])
        yield OutputScore(network.name, name, kind, len(ids), bool(fraction), *measures, *cost)


def _rows_of(loss: Loss, cache: Cache, rows: int) -> int:
    """Return the number of samples that are compared: fewer if an output is a map, whose places are compared."""
    largest = max(math.prod(cache.outputs[name].shape) for name in loss.outputs)
    return min(rows, max(_MOST_NUMBERS // largest, _LEAST_MAPS))


def _as_rows(student: Tensor, teacher: Tensor, options: OutputLossOptions) -> tuple[Tensor, Tensor]:
    """Return outputs as rows [n, D]; of maps those of their places, on the grid of the student."""
    if not isinstance(options, MapLossOptions):
        return student, teacher
    teacher = options.on_grid_of(student, teacher)
    return student.movedim(1, -1).flatten(0, -2), teacher.movedim(1, -1).flatten(0, -2)


def _without_selection(spec: StudentSpec) -> StudentSpec:
    """Return a student without the settings of training that its outputs are checked against."""
    return spec.model_copy(
        update={"train": spec.train.model_copy(update={"compile": False, "early_stopping_patience": None})}
    )


def _compared(samples: Samples, rows: int) -> Tensor:
    """Return the ordinals of the samples that are compared, [M, K] int64: groups of K, or K = 1."""
    if samples.groups is None:
        return torch.tensor(pilot_ids(len(samples), rows))[:, None]
    return torch.from_numpy(samples.groups[pilot_ids(len(samples.groups), max(1, rows // samples.group_size))])


@torch.inference_mode()
def _said(
    network: NetworkRef,
    model: torch.nn.Module,
    outputs: StudentOutputs,
    view: View,
    ids: Tensor,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Return the outputs of a student in evaluation mode, after its linear maps, [n, D] each on the CPU, by name.

    Raises:
        CorruptError: if a number is NaN or infinite.
    """
    cuts = [ids[cut.start : cut.stop].tolist() for cut in cut_range(range(len(ids)), _BATCH)]
    parts = []
    for batch in batches(view, cuts, network.workers, device):
        said = outputs(model, batch.images.to(device))
        for name, values in said.items():
            if (not_finite := ~values.isfinite().flatten(1).all(dim=1).cpu()).any():
                raise CorruptError(
                    f"{network.name} returned NaN or infinite numbers as {name} for sample "
                    f"{int(batch.ids[not_finite][0])} of {view.samples.name}/{view.samples.split}",
                    "use a checkpoint of a training that did not diverge",
                )
        parts.append({name: values.cpu() for name, values in said.items() if name in outputs.names})
    return {name: torch.cat([part[name] for part in parts]) for name in outputs.names}


def _latency(model: torch.nn.Module, outputs: StudentOutputs, view: View, device: torch.device | str) -> float:
    """Return the milliseconds of one sample."""
    return costs.measure_speed(_WithOutputs(model, outputs), view[0].images.to(device)).milliseconds


class _WithOutputs(torch.nn.Module):
    """A student that returns all that its loss compares."""

    def __init__(self, model: torch.nn.Module, outputs: StudentOutputs) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the student on images [B, channels, H, W]."""
        said: dict[str, Tensor] = self.outputs(self.model, images)
        return said


class _Measures(NamedTuple):
    """Those of `OutputScore`."""

    one_minus_cosine: float | None = None
    relative_error: float | None = None
    alignment: float | None = None
    correlation: float | None = None
    same_order: float | None = None
    same_class: float | None = None
    total_variation: float | None = None


def measures_of(kind: str, student: Tensor, teacher: Tensor, group: int = 1) -> _Measures:
    """Return the measures of outputs against those of the teacher.

    Args:
        kind: vector, score or classes.
        student: [n, d] float64.
        teacher: [n, D] float64; d may differ from D for vectors alone.
        group: number of consecutive samples that are compared with each other.
    """
    if kind == "vector":
        same_length = student.shape == teacher.shape
        return _Measures(
            one_minus_cosine=float((1 - F.cosine_similarity(student, teacher)).mean()) if same_length else None,
            relative_error=_relative_error(student, teacher) if same_length else None,
            alignment=linear_cka(student, teacher),
        )
    if kind == "classes":
        return _Measures(
            same_class=float((student.argmax(dim=1) == teacher.argmax(dim=1)).double().mean()),
            total_variation=float(total_variation(teacher, student, 1).mean()),
        )
    return _Measures(
        relative_error=_relative_error(student, teacher),
        correlation=_correlation(student, teacher),
        same_order=_same_order(student, teacher, group),
    )


def linear_cka(first: Tensor, second: Tensor) -> float | None:
    """Return the linear CKA of vectors [n, d] and [n, D]: |X^T Y|^2 / (|X^T X| |Y^T Y|) of centered X and Y.

    None if the vectors of one of them are all the same.

    Source: Kornblith et al. 2019 (1905.00414), equation 3 with a linear kernel.
    """
    x, y = (values - values.mean(dim=0) for values in (first, second))
    scale = float((x.T @ x).norm() * (y.T @ y).norm())
    return float((x.T @ y).square().sum()) / scale if scale else None


def _relative_error(student: Tensor, teacher: Tensor) -> float | None:
    spread = float((teacher - teacher.mean(dim=0)).square().sum())
    return float((student - teacher).square().sum()) / spread if spread else None


def _correlation(student: Tensor, teacher: Tensor) -> float | None:
    x, y = (values - values.mean(dim=0) for values in (student, teacher))
    scales = x.norm(dim=0) * y.norm(dim=0)
    return float(((x * y).sum(dim=0) / scales).mean()) if bool((scales > 0).all()) else None


def _same_order(student: Tensor, teacher: Tensor, group: int) -> float | None:
    """Return the share of the pairs within groups, or within the scores of a sample, that are ordered as the teacher's.

    None if no two scores are compared, or the teacher gives all of them the same.
    """
    ours, theirs = (values.reshape(len(values) // group, -1) for values in (student, teacher))
    first, second = torch.triu_indices(ours.shape[1], ours.shape[1], 1)
    signs = torch.sign(theirs[:, first] - theirs[:, second])
    compared = signs != 0
    same = torch.sign(ours[:, first] - ours[:, second]) == signs
    return float(same[compared].double().mean()) if bool(compared.any()) else None
