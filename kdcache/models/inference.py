"""Run a teacher on its device, in its precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdcache.cache.format.output_records import DEFAULT_OUTPUT, MOST_SCORES
from kdcache.cache.format.row_reductions import finite_rows
from kdcache.cache.planner import MIN_CLASSES
from kdcache.config.cache import CacheSpec, OutputSpec
from kdcache.data.views import View
from kdcache.errors import CorruptError, MismatchError, counted
from kdcache.models.checks import (
    OutputScale,
    check_logits,
    log_probabilities,
    output_scale,
    refuse_underflow,
    refusing,
    set_evaluation_mode,
)
from kdcache.models.class_mapping import ChosenOutputs
from kdcache.models.noise import Noise
from kdcache.models.taps import Tap, Taps, check_taps, grid_of

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_TRIED = 16
"""Number of images on which it is checked whether a teacher returns probabilities."""


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch, on its device, in float32.

    Attributes:
        logits: [B, C]; None if the class logits are not kept.
        outputs: other outputs, [B, D] or maps [B, C, h, w], by name.
    """

    logits: Tensor | None
    outputs: dict[str, Tensor]

    def class_logits(self) -> Tensor:
        """Return the class logits, which must be there."""
        if self.logits is None:
            raise TypeError("the class logits are not kept")
        return self.logits

    @property
    def parts(self) -> dict[str, Tensor]:
        """All K outputs by name, the class logits first."""
        return {**({} if self.logits is None else {DEFAULT_OUTPUT: self.logits}), **self.outputs}

    @property
    def names(self) -> list[str]:
        """Names of all K outputs, the class logits first."""
        return list(self.parts)

    def finite(self) -> Tensor:
        """Return whether all numbers of an output of a sample are finite, [B, K] bool, in the order of `parts`."""
        return torch.stack([finite_rows(values.flatten(1)) for values in self.parts.values()], dim=1)


class InferenceModel:
    """A callable from images to logits, and to other outputs.

    Args:
        model: the network; moved to the device and put into evaluation mode.
        classes: C, what it must return.
        spec: precision, memory format, whether to compile, and which outputs are kept.
        device: where it runs.
        noise: on the class logits; None without.

    Attributes:
        scale: of the outputs of the network, from its first batch; None before. If they are probabilities, their
            logarithms are returned.
        scales: the same of other outputs of kind `classes`, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        spec: CacheSpec,
        device: torch.device | str,
        noise: Noise | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.classes = classes
        self._noise = noise
        self.scale: OutputScale | None = None
        self.scales: dict[str, OutputScale] = {}
        self._dtype = _AUTOCAST[spec.precision]
        self._format = torch.channels_last if spec.channels_last else torch.contiguous_format
        model = model.to(self.device)
        set_evaluation_mode(model)
        if spec.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._model = torch.compile(model) if spec.compile else model
        self._keeps_logits = spec.logits
        self._taps: Taps | None = None
        if spec.outputs:
            taps = {name: tap_of(output) for name, output in spec.outputs.items()}
            check_taps(taps, model, "teacher")
            # Of chosen classes the outputs are columns of the logits; other outputs are those of the network itself.
            self._inner = model.network if isinstance(model, ChosenOutputs) else model
            self._taps = Taps(self._inner, taps, "teacher")
            self._kinds = {name: output.kind for name, output in spec.outputs.items()}
            self._shapes: dict[str, torch.Size] = {}

    @property
    def level(self) -> Literal["unknown"] | None:
        """Level for `TeacherRecord`: "unknown" if the network returns probabilities or their logarithms."""
        return None if self.scale in (None, "logits") else "unknown"

    @property
    def unknown_levels(self) -> frozenset[str]:
        """Names of the other outputs that are probabilities or their logarithms."""
        return frozenset(name for name, scale in self.scales.items() if scale != "logits")

    def take_as_logits(self) -> None:
        """Take what the network returns for logits: a single row does not show whether it is probabilities."""
        self.scale = "logits"
        if self._taps is not None:
            self.scales = dict.fromkeys(self._kinds, "logits")

    @torch.no_grad()
    def __call__(self, images: Tensor, ids: Tensor | None = None, view: int = 0) -> Tensor:
        """Return logits [B, C] float32 of images [B, channels, H, W], on the teacher's device, asynchronously.

        The arguments are those of `run`.

        Raises:
            MismatchError: if the network returns anything but [B, C], or probabilities that have underflowed in its
                first batch.
        """
        return self.run(images, ids, view).class_logits()

    @torch.no_grad()
    def run(self, images: Tensor, ids: Tensor | None = None, view: int = 0) -> TeacherOutput:
        """Return the logits and the other outputs of images [B, channels, H, W], from one forward pass.

        Args:
            images: [B, channels, H, W].
            ids: [B] int64, of the samples, on which noise depends; needed where there is noise.
            view: index of the view.

        Raises:
            MismatchError: as above, or if the network does not give an output, or one of another length than before.
        """
        layout = self._format if images.ndim == 4 else torch.contiguous_format
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=layout)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            if self._taps is None:
                return TeacherOutput(self._with_noise(self._model(images), ids, view, len(images)), {})
            with self._taps.collecting(whole=not self._keeps_logits):
                returned = (self._model if self._keeps_logits else self._inner)(images)
        logits = self._with_noise(returned, ids, view, len(images)) if self._keeps_logits else None
        outputs = self._taps.outputs()
        for name, values in outputs.items():
            self._check_output(name, values, len(images))
            if self._kinds[name] == "classes":
                outputs[name] = self._logits_of_output(name, values)
        return TeacherOutput(logits, {name: values.float().to(self.device) for name, values in outputs.items()})

    def _check_output(self, name: str, values: Tensor, batch: int) -> None:
        """Check the shape of an output.

        Raises:
            MismatchError: if it has another shape than in the first batch, or more scores than can be kept.
        """
        shape = self._shapes.setdefault(name, values.shape[1:])
        length = shape[0]
        if values.shape != (batch, *shape) and values.ndim == 4:
            raise MismatchError(
                f"the output {name} of the teacher is {list(values.shape)} for {counted(batch, 'image')}, and was "
                f"[B, {', '.join(map(str, shape))}] before: a map has the same grid for all images and views",
                "bring all images to one size (`transform`: Resize with both sides, or a crop), and take an output "
                "whose grid follows from it",
            )
        if values.shape != (batch, *shape):
            raise MismatchError(
                f"the output {name} of the teacher is {list(values.shape)} for {batch} images, and was [B, {length}] "
                "before",
                "take an output with one row per image, and always of the same length",
            )
        if self._kinds[name] == "score" and length > MOST_SCORES:
            raise MismatchError(
                f"the output {name} of the teacher has {length} numbers, and scores are at most {MOST_SCORES}",
                f"keep it as `kind: vector` (cache.outputs.{name})",
            )
        if self._kinds[name] == "classes" and length < MIN_CLASSES:
            raise MismatchError(
                f"the output {name} of the teacher has one number, which is not a distribution over classes",
                f"keep it as `kind: score` (cache.outputs.{name})",
            )

    def _logits_of_output(self, name: str, values: Tensor) -> Tensor:
        """Return an output of kind `classes` as logits, [B, C] or [B, C, h, w]: the logarithms of probabilities."""
        rows = values.movedim(1, -1).flatten(0, -2)
        scale = self.scales.setdefault(name, output_scale(rows))
        if scale != "probabilities":
            return values
        refuse_underflow(values, f"as the output {name} ")
        return log_probabilities(values)

    def _with_noise(self, returned: object, ids: Tensor | None, view: int, batch: int) -> Tensor:
        """Return the logits [B, C] of what the network returned, with the noise of their samples, if there is noise."""
        logits = self._logits(returned, batch)
        if self._noise is None:
            return logits
        if ids is None:
            raise TypeError("the noise of logits depends on their samples: pass their ids")
        return self._noise(logits, ids, view)

    def _logits(self, returned: object, batch: int) -> Tensor:
        """Return the logits [B, C] float32 of what the network returned."""
        outputs = check_logits(returned, batch, self.classes, "teacher")
        if self.scale is None:
            self.scale = output_scale(outputs)
            if self.scale == "probabilities":
                refuse_underflow(outputs)
        return log_probabilities(outputs) if self.scale == "probabilities" else outputs.float()


def tap_of(output: OutputSpec) -> Tap:
    """Return where an output is taken."""
    of_one_number = output.places == "grid" and output.kind == "score"
    return Tap(output.source, output.pool, output.places, of_one_number, grid_of(output.patches))


def try_teacher(model: nn.Module, view: View, spec: CacheSpec, device: torch.device | str) -> Literal["unknown"] | None:
    """Run a teacher on a few images as the pass will run it, and return the level of its logits for `TeacherRecord`.

    Args:
        model: the network; moved to the device and put into evaluation mode.
        view: of the images.
        spec: precision and memory format.
        device: where it runs.

    Raises:
        MismatchError: if it cannot take the images, does not return [B, C], or returns probabilities from which its
            logits cannot be recovered.
    """
    spec = spec.model_copy(update={"compile": False})
    running = _tried(model, view, spec, device, [0])
    if spec.logits and running.level is not None:
        # One row may be normalized by chance; and in other rows probabilities may have underflowed.
        n_tried = min(_TRIED, len(view))
        running = _tried(model, view, spec, device, [len(view) * index // n_tried for index in range(n_tried)])
    return running.level


def _tried(model: nn.Module, view: View, spec: CacheSpec, device: torch.device | str, ids: list[int]) -> InferenceModel:
    """Run a teacher on some images, and return the model that was run."""
    running = InferenceModel(model, view.samples.num_classes, spec, device)
    images = view.__getitems__(ids).images
    try:
        with refusing(images, "teacher", view.samples):
            running.run(images)
    except MismatchError as error:
        low = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
        if spec.precision != "fp32" or not low or "type" not in error.what:
            raise
        name = str(low.pop()).removeprefix("torch.")
        raise MismatchError(
            f"the teacher's weights are {name}, and cache.precision is fp32: {error.what}",
            f"set cache.precision to {'bf16' if name == 'bfloat16' else 'fp16'}, or convert the model to float32: "
            "return model.float()",
        ) from None
    return running


def described_precision(spec: CacheSpec) -> str:
    """Return what the last bits of the logits depend on besides weights, images and batch size."""
    return " ".join(
        [spec.precision, *(["channels_last"] if spec.channels_last else []), *(["compiled"] if spec.compile else [])]
    )


def refuse_not_finite(finite: Tensor, ids: Tensor, outputs: Sequence[str] = (DEFAULT_OUTPUT,)) -> None:
    """Refuse outputs that are not finite, which cannot be stored.

    Args:
        finite: [B, K] bool, whether all numbers of an output of a sample are finite.
        ids: [B] int64, the samples of the rows.
        outputs: names of the K outputs.

    Raises:
        CorruptError: with the first sample, and its output, that is not finite.
    """
    if bool(finite.all()):
        return
    rows, columns = (~finite).nonzero(as_tuple=True)
    row, name = int(rows[0]), outputs[int(columns[0])]
    count = int((~finite[:, columns[0]]).sum())
    is_logits = name == DEFAULT_OUTPUT
    what = "logits" if is_logits else f"numbers as the output {name}"
    raise CorruptError(
        f"the teacher returned NaN or infinite {what} for sample {int(ids[row])} "
        f"({count} of the {counted(len(ids), 'image')} checked)",
        "check the teacher's weights, its precision and the transform"
        + (
            "; let it return logits, not probabilities (Softmax), whose logarithms are infinite if they underflow"
            if is_logits
            else ""
        ),
    )
