"""The student's side of the outputs of a loss: where they are taken, and the linear maps to the teacher's widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.cache.teacher import TeacherWithOutputs
from kdcache.config.schema import StudentSpec
from kdcache.data.seeding import seeded
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.losses import Loss
from kdcache.losses.batch import BatchTotals
from kdcache.losses.outputs import OutputLossOptions
from kdcache.models.checkpoints import load_weights, save_weights
from kdcache.models.checks import refusing
from kdcache.models.taps import Tap, Taps, check_taps, grid_of

PROJECTIONS = "projections.safetensors"
"""File of the learned linear maps in a run folder."""

LOGITS = "logits"
"""Key of the class logits among the outputs of a forward pass."""


class StudentOutputs(nn.Module):
    """The outputs of a student that a loss compares with those of the teacher.

    Args:
        model: the student.
        loss: `outputs` by name, and whether the class logits are used.
        taps: where each output is taken.
        widths: (numbers of the student's output, numbers of the teacher's output), by name.
        group_size: number of consecutive samples of a batch that belong together.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        taps: Mapping[str, Tap],
        widths: Mapping[str, tuple[int, int]],
        group_size: int = 1,
    ) -> None:
        super().__init__()
        self._group_size = group_size
        self._losses, self._uses_logits = loss.outputs, loss.uses_logits
        self._taps = Taps(model, taps, "student")
        self.projections = nn.ModuleDict(
            {
                name: nn.Conv2d(*widths[name], 1) if type(options).places == "grid" else nn.Linear(*widths[name])
                for name, options in loss.outputs.items()
                if type(options).same_width and widths[name][0] != widths[name][1]
            }
        )

    def forward(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Run the student on images [B, channels, H, W], and return its logits and outputs by name."""
        with self._taps.collecting(whole=not self._uses_logits):
            returned = model(images)
        said = {
            name: values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
            for name, values in self._taps.outputs().items()
        }
        for name, projection in self.projections.items():
            said[name] = projection(said[name])
        return {LOGITS: returned, **said} if self._uses_logits else said

    def loss(
        self,
        said: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        totals: BatchTotals,
        label_maps: Tensor | None = None,
    ) -> Tensor:
        """Return the part of these samples in the weighted sum of the losses of all outputs, [].

        Args:
            said: outputs of the student, [B, D] each, or [B, C, H, W], after the linear maps.
            targets: outputs of the teacher.
            totals: of the batch that the samples are part of.
            label_maps: [B, H, W] int64, the class of each pixel; None without.
        """
        terms = []
        for name, options in self._losses.items():
            of_places = {"label_maps": label_maps} if options.reads_maps else {}
            if options.mask_source is not None:
                of_places["mask"] = said[_mask_of(name)]
            values = options.values(said[name], targets[name], totals, self._group_size, **of_places)
            terms.append(options.weight * values.sum() / totals.rows)
        return torch.stack(terms).sum()

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return [*self._losses]

    def load(self, folder: Path) -> None:
        """Read the linear maps that `save` wrote, if there are any.

        Raises:
            KdcacheError: if the file is missing, or is not of these maps.
        """
        if len(self.projections):
            load_weights(self.projections, folder / PROJECTIONS)

    def save(self, folder: Path) -> None:
        """Write the linear maps, if there are any, beside the student."""
        if len(self.projections):
            save_weights(self.projections, folder / PROJECTIONS)


def student_outputs(
    model: nn.Module, spec: StudentSpec, loss: Loss, train: View, teacher: TeacherWithOutputs
) -> StudentOutputs:
    """Return the outputs of a student, after trying them on two images.

    Args:
        model: the student, on the CPU.
        spec: where its outputs are taken.
        loss: of the run.
        train: the training images.
        teacher: gives the same outputs.

    Raises:
        MismatchError: if the student does not give an output, or one of another width for a loss that has none of its
            own to learn.
        UsageError: if an option has no effect, or cannot be combined with outputs.
    """
    if unused := sorted(set(spec.outputs) - set(loss.outputs)):
        raise UsageError(
            f"student.outputs names {unused[0]}, which the loss does not use: it uses {', '.join(loss.outputs)}",
            f"add a loss of {unused[0]}, or remove it from student.outputs",
        )
    if spec.train.compile:
        raise UsageError(
            "train.compile is true, and the outputs of the student are taken by hooks", "set train.compile to false"
        )
    if spec.train.early_stopping_patience is not None and not loss.uses_logits and not spec.train.held_out_fraction:
        raise UsageError(
            "train.early_stopping_patience has no effect: without class logits no validation accuracy is measured, and "
            "the last epoch is selected",
            "hold out samples of the cache (train.held_out_fraction), remove train.early_stopping_patience, or train "
            "the class logits too (remove `logits: false`)",
        )
    for name, options in loss.outputs.items():
        if options.reads_maps and train.samples.maps is None:
            raise UsageError(
                f"the loss {options.name} of {name} needs a class per pixel, and {train.samples.name} has none",
                "use pixel_kd or cwd without a mask, or a data set with label maps",
            )
    taps = {name: _tap(spec, name, options, name in teacher.unmapped) for name, options in loss.outputs.items()}
    for name, options in loss.outputs.items():
        if options.mask_source is not None:
            fix = (
                f"set `mask` of the loss of {name} to a part of what the student returns or to a module, or to labels, "
                "for the places with a label"
            )
            taps[_mask_of(name)] = Tap(options.mask_source, places="grid", of_one_number=True, fix=fix)
    check_taps(taps, model, "student")
    widths = _try(model, taps, loss, train, teacher)
    for name in teacher.unmapped:
        _check_same_width(name, *widths[name])
    return StudentOutputs(model, loss, taps, widths, train.samples.group_size)


def _tap(spec: StudentSpec, name: str, options: OutputLossOptions, unmapped: bool) -> Tap:
    """Return where an output is taken, as a map if its loss is one of maps; `unmapped` if it is not a vector.

    Raises:
        UsageError: if a map is to be pooled.
    """
    output, is_map = spec.outputs.get(name), type(options).places == "grid"
    if is_map and output is not None and output.pool != "none":
        raise UsageError(
            f"student.outputs.{name}.pool is {output.pool}, and the loss {options.name} compares maps",
            f"remove student.outputs.{name}.pool",
        )
    if not is_map and output is not None and output.patches is not None:
        raise UsageError(
            f"student.outputs.{name}.patches is for maps, and the loss {options.name} compares rows of samples",
            f"remove student.outputs.{name}.patches, or set its pool",
        )
    tap = Tap() if output is None else Tap(output.source, output.pool, patches=grid_of(output.patches))
    of_one_number = unmapped and "score" in type(options).kinds
    return replace(tap, places="grid", of_one_number=of_one_number) if is_map else tap


def _try(
    model: nn.Module, taps: Mapping[str, Tap], loss: Loss, train: View, teacher: TeacherWithOutputs
) -> dict[str, tuple[int, int]]:
    """Run the student on two images in evaluation mode, and return the widths of its outputs and the teacher's."""
    ids = list(range(min(2, len(train))))
    images, tried = train.__getitems__(ids).images, Taps(model, taps, "student")
    was_training = model.training
    model.eval()
    refused = refusing(images, "student", train.samples)
    with torch.no_grad(), seeded(0), refused, tried.collecting(whole=not loss.uses_logits):
        model(images)
    model.train(was_training)
    own_ids, widths, outputs = torch.tensor(ids), {}, tried.outputs()
    for name, values in outputs.items():
        if len(values) != len(images):
            raise MismatchError(
                f"the output {name} of the student is {list(values.shape)} for {len(images)} images",
                "take an output with one row per image",
            )
        if name in loss.outputs:
            widths[name] = values.shape[1], teacher.outputs[name](own_ids, train.view).shape[1]
    for name in widths:
        _check_mask(name, outputs[name], outputs.get(_mask_of(name)))
    return widths


def _mask_of(name: str) -> str:
    """Return the name of the output of the student that says which places of another output count."""
    return f"mask of {name}"


def _check_mask(name: str, maps: Tensor, mask: Tensor | None) -> None:
    """Check that a mask has the places of the maps that it is of.

    Raises:
        MismatchError: if it has others.
    """
    if mask is not None and mask.shape != (len(maps), 1, *maps.shape[2:]):
        raise MismatchError(
            f"the mask of the output {name} of the student has {list(mask.shape)}, and the output {list(maps.shape)}",
            "let the student return a mask [B, h, w] with the places of the output",
        )


def _check_same_width(name: str, student: int, teacher: int) -> None:
    """Check that scores or classes, for which no linear map is learned, are as many in student and teacher.

    Raises:
        MismatchError: if they are not.
    """
    if student != teacher:
        raise MismatchError(
            f"the output {name} of the student has {student} numbers, that of the teacher {teacher}",
            f"take an output of {teacher} numbers (student.outputs.{name}.source)",
        )
