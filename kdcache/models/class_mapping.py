"""Map the outputs of a network to the classes of a data set, if they are not the same one by one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.config.schema import ModelSpec
from kdcache.errors import MismatchError, UsageError, counted, indices_below
from kdcache.models.build import categories_of
from kdcache.models.outputs import logits_of
from kdcache.runtime.paths import expand

Groups = list[list[int]]
"""For each class of the data set, the indices of the network's outputs that stand for it."""

_LISTED = 64
"""Largest number of classes that a record lists one by one; for more it has a digest."""


class ChosenOutputs(nn.Module):
    """A network with the classes of a data set as outputs, made of some outputs of another network.

    The logits of several outputs of one class are joined by logsumexp: the probability of the class is then the sum of
    theirs. Outputs that stand for no class are dropped.

    Args:
        network: returns logits [B, `outputs`].
        outputs: number of its outputs.
        groups: which of them stand for each class.
    """

    def __init__(self, network: nn.Module, outputs: int, groups: Groups) -> None:
        super().__init__()
        self.network = network
        self.outputs = outputs
        # Classes with the same number of outputs are joined in one step; `places` restores their order.
        self.sizes = sorted({len(group) for group in groups})
        by_size = {size: [c for c, group in enumerate(groups) if len(group) == size] for size in self.sizes}
        # Buffers, so that the digest of the weights depends on the choice of outputs.
        for size, classes in by_size.items():
            self.register_buffer(f"outputs_{size}", torch.tensor([groups[c] for c in classes]))
        order = torch.tensor([c for classes in by_size.values() for c in classes])
        self.register_buffer("places", order.argsort())

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] float32 of images [B, channels, H, W]."""
        logits = logits_of(self.network(images), who="network whose outputs are chosen")
        if logits.shape != (len(images), self.outputs):
            raise MismatchError(
                f"the network whose outputs are chosen returned {list(logits.shape)} for "
                f"{counted(len(images), 'image')}, not [{len(images)}, {self.outputs}]",
                "set teacher.outputs to the number of its outputs",
            )
        logits = logits.float()
        joined = [logits[:, self.get_buffer(f"outputs_{size}")].logsumexp(dim=2) for size in self.sizes]
        return torch.cat(joined, dim=1)[:, self.get_buffer("places")]


def read_groups(classes: list[int | list[int]] | str, outputs: int, num_classes: int) -> Groups:
    """Return which outputs stand for which class, from `teacher.classes`.

    Args:
        classes: the list, or the path of a text file with the outputs of one class per line.
        outputs: number of outputs of the network.
        num_classes: C, of the data set.

    Raises:
        UsageError: if the file cannot be read, or an output is given twice: it would count twice in every softmax.
        MismatchError: if the number of entries is not C, or an output does not exist.
    """
    groups = _from_file(expand(classes)) if isinstance(classes, str) else [_listed(entry) for entry in classes]
    where = f"teacher.classes ({classes})" if isinstance(classes, str) else "teacher.classes"
    if len(groups) != num_classes:
        raise MismatchError(
            f"{where} has {counted(len(groups), 'entry', 'entries')}, the data set has "
            f"{counted(num_classes, 'class', 'classes')}",
            "give one entry for each class of the data set, in its order",
        )
    for number, group in enumerate(groups):
        if max(group) >= outputs:
            raise MismatchError(
                f"{where} gives class {number} the output {max(group)}, the network has outputs "
                f"{indices_below(outputs)}",
                "count outputs from 0; or correct teacher.outputs",
            )
    output, times = Counter(output for group in groups for output in group).most_common(1)[0]
    if times > 1:
        places = [str(number) for number, group in enumerate(groups) for one in group if one == output]
        raise UsageError(
            f"{where} gives output {output} to more than one class: {', '.join(places)}"
            if len(set(places)) > 1
            else f"{where} gives class {places[0]} output {output} twice",
            "give each output once",
        )
    return groups


def _listed(entry: int | list[int]) -> list[int]:
    return [entry] if isinstance(entry, int) else entry


def _from_file(path: Path) -> Groups:
    """Return the groups of a text file with the outputs of one class per line."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"cannot read teacher.classes from {path}: {reason}",
            "give a list of outputs such as teacher.classes=[1,2,0], or a text file with one line per class",
        ) from None
    groups = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or not all(word.isascii() and word.isdecimal() for word in words):
            raise UsageError(
                f"{path}:{number}: {line!r} is not the index of an output, or several separated by spaces",
                "write the outputs of one class on each line, counted from 0",
            )
        groups.append([int(word) for word in words])
    return groups


def record_of_groups(groups: Groups) -> list[int | list[int]] | str:
    """Return the groups for a record: a list, or the digest of a long one."""
    plain = [group[0] if len(group) == 1 else group for group in groups]
    if len(plain) <= _LISTED:
        return plain
    return f"sha256:{hashlib.sha256(json.dumps(plain).encode()).hexdigest()}"


def compare_names(spec: ModelSpec, groups: Groups | None, class_names: tuple[str, ...]) -> str | None:
    """Return a note if the class names of the weights that a model names differ from those of the data set.

    Args:
        spec: the model.
        groups: which of its outputs stand for each class; None for all, in order.
        class_names: of the data set.

    Raises:
        MismatchError: if both have the same names in another order.
    """
    categories = categories_of(spec)
    if categories is None or (groups is None and len(categories) != len(class_names)):
        return None  # a different number of classes, which `build_model` refuses
    chosen = groups or [[output] for output in range(len(categories))]
    there = [" / ".join(categories[output] for output in group) for group in chosen]
    differ = [c for c, (one, other) in enumerate(zip(class_names, there, strict=True)) if _bare(one) != _bare(other)]
    if not differ:
        return None
    first = f"class {differ[0]} is {class_names[differ[0]]!r} in the data set and {there[differ[0]]!r} in {spec.model}"
    if sorted(map(_bare, class_names)) == sorted(map(_bare, there)):
        raise MismatchError(
            f"the data set has the classes of {spec.model} in another order: {first}",
            "set teacher.classes to the output of each class",
        )
    return f"note: {len(differ)} of {len(there)} classes have another name: {first}; make sure that they are the same"


def _bare(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def check_run_classes(weights: str, class_names: tuple[str, ...]) -> None:
    """Check that a data set has the classes of the run whose folder holds the weights, in the same order.

    Weights that are not in a run folder, and runs that did not record their classes, are not checked.

    Raises:
        MismatchError: with the first class that differs, and both of its names.
    """
    metrics = Path(weights).expanduser().parent / "metrics.json"
    try:
        trained = json.loads(metrics.read_text(encoding="utf-8"))["class_names"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    differ = [names for names in zip_longest(trained, class_names) if names[0] != names[1]]
    if differ:
        raise MismatchError(
            f"{weights} was trained with other classes: {differ[0][0]!r} is {differ[0][1]!r} in the data set "
            f"({len(differ)} class names differ)",
            "use the data set that it was trained on, rename its classes back, or map them in `classes`",
        )
