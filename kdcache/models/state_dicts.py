"""Find the state dicts in a checkpoint, and match their keys with those of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

State = Mapping[str, Any]
"""Tensors by name; quantized modules and extra state have other values as well."""

_NAMES = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "params", "weights",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema", "teacher", "student",
)  # fmt: skip
"""Names of the weights in checkpoints of training scripts, preferred first: the trained weights before their EMA."""

_WRAPPERS = ("module", "_orig_mod", "model", "net", "network", "backbone")
"""Attributes of wrappers and training scripts that hold the network; prefixes of its keys."""

_ANYWHERE = ("module", "_orig_mod")
"""Those of DataParallel and torch.compile, which may also wrap a part of a network."""

_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""Counters of batches (BatchNorm), averaged models (AveragedModel) and operations (thop): the outputs do not depend on
them."""

_AUXILIARY = ("AuxLogits", "aux1", "aux2", "aux_classifier")
"""Heads of torchvision's networks that are used in training only."""

_OF_TRAINING = ("criterion", "loss", "loss_fn", "loss_fct", "loss_function")

_NOT_TENSORS = ("_extra_state", "_packed_params", "dtype")
"""Last parts of the keys whose values are not tensors: extra state and entries of quantized modules."""

_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""Old keys in torchvision's published weights of densenet."""

_DEPTH = 6
"""How deep containers inside a checkpoint are searched."""


class Match(NamedTuple):
    """A match between the keys of a checkpoint and those of a network.

    Attributes:
        keys: by key of the network, the key in the checkpoint.
        missing: keys of the network that the checkpoint lacks.
        unexpected: keys of the checkpoint that the network lacks.
        ignored: other keys of the checkpoint, outside the network: of another model, a loss, an auxiliary head.
        prefix: of the keys in the checkpoint, if it is the same for all.
        alternatives: other prefixes under which the checkpoint has a network of the same keys.
        renamed: by key of the network, the key in the checkpoint, of a head that is outside the prefix.
    """

    keys: dict[str, str]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    prefix: str = ""
    alternatives: tuple[str, ...] = ()
    renamed: Mapping[str, str] = MappingProxyType({})

    @property
    def distance(self) -> int:
        """Number of keys that only one of the two has."""
        return len(self.missing) + len(self.unexpected)

    @property
    def is_ambiguous(self) -> bool:
        """Whether several networks fit, and the chosen one has a prefix other than those of wrappers."""
        return bool(self.alternatives) and not _of_wrappers(self.prefix)

    @property
    def fits(self) -> bool:
        """Whether the keys are the same, except for those that are ignored."""
        return not self.distance


def state_dicts_in(held: object) -> dict[str, State]:
    """Return every state dict in the content of a checkpoint, by its path ("" for the top level), preferred first.

    If the content is a list or tuple, the first part of a path is an index.
    """
    if isinstance(held, list | tuple):
        held = {str(index): part for index, part in enumerate(held)}
    found = dict(_states(held, "", 0))
    return {path: found[path] for path in sorted(found, key=_rank)}


def _states(held: object, path: str, depth: int) -> Iterator[tuple[str, State]]:
    if not isinstance(held, Mapping) or depth == _DEPTH:
        return
    state = held
    if not all(isinstance(key, str) and _is_value(key, value) for key, value in held.items()):
        state = {key: value for key, value in held.items() if isinstance(key, str) and _is_value(key, value)}
    if any(isinstance(value, Tensor) for value in state.values()):
        yield path, state
    for key, inner in held.items():
        if isinstance(key, str) and key not in state:
            yield from _states(inner, f"{path}.{key}" if path else key, depth + 1)


def _is_value(key: str, value: object) -> bool:
    return isinstance(value, Tensor) or key.rpartition(".")[2] in _NOT_TENSORS


def _rank(path: str) -> int:
    known = [_NAMES.index(part) for part in path.split(".") if part in _NAMES]
    return max(known, default=len(_NAMES)) if path else -1


def part_of(states: Mapping[str, State], part: str) -> dict[str, State]:
    """Return the state dicts under a path, or the entries of one whose keys begin with it."""
    prefix = f"{part}."
    inside = {path: state for path, state in states.items() if path == part or path.startswith(prefix)}
    if inside:
        return inside
    found: dict[str, State] = {}
    for path, state in states.items():
        # `model.student` may be the keys `student.*` of the state dict `model`.
        within = prefix.removeprefix(f"{path}.") if path else prefix
        entries = {key[len(within) :]: value for key, value in state.items() if key.startswith(within)}
        if not entries:
            entries = {
                key.partition(f".{within}")[2]: value
                for key, value in state.items()
                if f".{within}" in key and _of_wrappers(f"{key.partition(f'.{within}')[0]}.")
            }
        if entries:
            found[part] = entries
            break
    return found


def match_keys(given: Iterable[str], expected: Iterable[str]) -> Match:
    """Match the keys of a checkpoint with those of a network, without the prefixes of wrappers.

    Tried in this order: the same keys; the same keys after one prefix of any name; the same keys without the names of
    wrappers, which only some of them may have. The first that fits is used, otherwise the closest.
    """
    given, expected = list(given), list(expected)
    tries = []
    for prefix in ("", *_prefixes(given, expected)):
        below = {key[len(prefix) :]: key for key in given if key.startswith(prefix)}
        others = [key for key in given if not key.startswith(prefix)]
        tries.append(_compare(below, {key: key for key in expected}, others)._replace(prefix=prefix))
    fitting = [match.prefix for match in tries if match.fits]
    tries = [match._replace(alternatives=tuple({*fitting} - {match.prefix})) for match in tries]
    plain_given, plain_expected = _unwrapped(given), _unwrapped(expected)
    if len(plain_given) == len(given) and len(plain_expected) == len(expected):
        tries.append(_compare(plain_given, plain_expected, []))
    tries += [renamed for match in tries if (renamed := _with_head_elsewhere(match)) is not None]
    return next(
        (match for match in tries if match.fits),
        min(tries, key=lambda match: match.distance),
    )


def _with_head_elsewhere(match: Match) -> Match | None:
    """Return a match with the missing keys taken from one other place, such as `fc.weight` from `head.fc.weight`.

    None if they are not all there, in more than one place, or most of the network.
    """
    if not match.prefix or len(match.missing) >= len(match.keys):
        return None
    others = [*match.ignored, *match.unexpected]
    found = {ours: [key for key in others if key.endswith(f".{ours}")] for ours in match.missing}
    prefixes = {key[: -len(ours)] for ours, keys in found.items() for key in keys}
    if len(prefixes) != 1 or any(len(keys) != 1 for keys in found.values()):
        return None
    renamed = {ours: keys[0] for ours, keys in found.items()}
    rest = [[key for key in keys if key not in renamed.values()] for keys in (match.unexpected, match.ignored)]
    return match._replace(
        keys={**match.keys, **renamed}, missing=[], unexpected=rest[0], ignored=rest[1], renamed=renamed
    )


def _compare(given: dict[str, str], expected: dict[str, str], ignored: list[str]) -> Match:
    """Compare keys by their common form; both mappings are from that form to the key."""
    keys = {key: given[common] for common, key in expected.items() if common in given}
    parts = {part for key in expected for part in key.split(".")}
    missing = [
        key for common, key in expected.items() if common not in given and last_part(common) != "num_batches_tracked"
    ]
    unexpected: list[str] = []
    ignored = [key for key in ignored if last_part(key) not in _COUNTERS]
    for common, key in given.items():
        if common in expected or last_part(common) in _COUNTERS:
            continue
        first = common.partition(".")[0]
        extra = first in (*_AUXILIARY, *_OF_TRAINING) and first not in parts
        (ignored if extra else unexpected).append(key)
    return Match(keys, missing, unexpected, ignored)


def last_part(key: str) -> str:
    """Return the part of a key after its last dot."""
    return key.rpartition(".")[2]


def _prefixes(given: list[str], expected: list[str]) -> list[str]:
    """Return the prefixes under which the checkpoint has keys of the network; those of wrappers first."""
    anchors = [key for key in expected if last_part(key) not in _COUNTERS]
    found: dict[str, None] = {}
    for anchor in anchors[:1] + anchors[-1:]:
        found.update((key[: -len(anchor)], None) for key in given if key.endswith(f".{anchor}"))
    return sorted(found, key=lambda prefix: (not _of_wrappers(prefix), len(prefix)))


def _of_wrappers(prefix: str) -> bool:
    return set(prefix.split(".")[:-1]).issubset(_WRAPPERS)


def _unwrapped(keys: list[str]) -> dict[str, str]:
    """Return keys by their form without the names of wrappers; of two keys with the same form only one is returned."""
    found = {}
    for key in keys:
        *parts, last = _OLD_DENSENET.sub(r"\1\2.", key).split(".")
        while parts and parts[0] in _WRAPPERS:
            del parts[0]
        found[".".join([*(part for part in parts if part not in _ANYWHERE), last])] = key
    return found
