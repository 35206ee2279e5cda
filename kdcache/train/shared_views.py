"""The views of several networks, made once each, so that a pass over one serves all of them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from kdcache.cache.format.recorded_views import Crops
from kdcache.cache.teacher import Teacher, TeacherWithOutputs
from kdcache.config.transform import Transform
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.train.held_out import hold_out
from kdcache.train.inputs import FixedImagesTeacher, TrainingInputs


class SharedViews:
    """The views and teachers of the students of a group, made once each: equal ones are the same object."""

    def __init__(self) -> None:
        self._views: dict[tuple[Any, ...], View] = {}
        self._fixed: dict[int, Teacher] = {}
        self._divided: dict[tuple[int, float], tuple[TrainingInputs, TrainingInputs]] = {}
        self._held: list[Teacher | TrainingInputs] = []  # their addresses are keys

    def view(
        self,
        samples: Samples,
        transform: Transform,
        seed: int = 0,
        *,
        labels: Tensor | None = None,
        crops: Crops | None = None,
    ) -> View:
        """Return the view that `View` would make of these arguments."""
        shown = None if labels is None else hashlib.sha256(labels.numpy().tobytes()).digest()
        key = id(samples), json.dumps(transform), seed, shown, id(crops)
        if key not in self._views:  # a view holds the samples and crops whose addresses are in its key
            self._views[key] = View(samples, transform, seed, labels=labels, crops=crops)
        return self._views[key]

    def fixed(self, teacher: Teacher) -> Teacher:
        """Return the teacher for students that augment its images themselves."""
        if id(teacher) not in self._fixed:
            self._fixed[id(teacher)] = (
                teacher.each(FixedImagesTeacher)
                if isinstance(teacher, TeacherWithOutputs)
                else FixedImagesTeacher(teacher)
            )
            self._held.append(teacher)
        return self._fixed[id(teacher)]

    def hold_out(self, inputs: TrainingInputs, fraction: float) -> tuple[TrainingInputs, TrainingInputs]:
        """Return the inputs of training, and those of the samples that are held out."""
        key = id(inputs), fraction
        if key not in self._divided:
            self._divided[key] = hold_out(inputs, fraction)
            self._held.append(inputs)
        return self._divided[key]
