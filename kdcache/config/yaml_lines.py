"""YAML that remembers where everything stands, so that all that is wrong with it is told with its line."""

from __future__ import annotations

import re
from collections.abc import Collection
from copy import copy
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import ValidationError

from kdcache.errors import UsageError

Place = tuple[str | int, ...]
"""The keys, and numbers of list entries, that lead to a value."""


class _PlacedLoader(yaml.SafeLoader):
    """A SafeLoader that remembers the line of every key and refuses a key that is given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.lines: dict[Place, int] = {}

    def read(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._remember(node, ())
        return self.construct_document(node)

    def _remember(self, node: yaml.Node, place: Place) -> None:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                if name == "?" or (*place, name) in self.lines:
                    problem = "a key is not a word" if name == "?" else f"the key {name!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                self.lines[(*place, name)] = key.start_mark.line + 1
                self._remember(value, (*place, name))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._remember(value, (*place, index))


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes what `_PlacedLoader` would take for a number."""


# YAML 1.1, which PyYAML reads, takes 1e-3 for a word; everybody who writes a learning rate means the number.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _side in (_PlacedLoader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))

# What PyYAML raises: its own kind, and what Python makes of a date with 13 months or of a thousand brackets.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError)


def read_yaml(text: str, source: str) -> tuple[Any, dict[Place, int]]:
    """What a YAML text says, and the line of every key and entry of it.

    Raises:
        UsageError: if it is not YAML, or gives a key twice; names `source`.
    """
    try:
        loader = _PlacedLoader(text)
        return loader.read(), loader.lines
    except _BAD_YAML as error:
        why = " ".join(str(error).split())
        raise UsageError(
            f"{source} is not readable YAML: {why}", "mend it there, or quote what it stumbles over"
        ) from None


def write_yaml(data: dict[str, Any]) -> str:
    """A text that `read_yaml` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def override(data: dict[str, Any], given: str, places: dict[Place, str]) -> None:
    """Put the value of a `KEY=VALUE` into `data`, and into `places` that it came from there.

    A step of KEY is a key, or the number of a list's entry: `teacher.0.weights`.

    Raises:
        UsageError: if it cannot be read, or leads to where no key or entry is.
    """
    key, sign, value_text = given.partition("=")
    steps = key.strip().split(".")
    if not sign or not all(steps):
        raise UsageError(f"--set {given!r} is not KEY=VALUE", "write for instance --set student.train.epochs=5")
    value, lines = read_yaml(value_text, f"--set {given}")
    inner: Any = data
    place: Place = ()
    for number, step in enumerate(steps):
        if isinstance(inner, list):
            if not (step.isdecimal() and int(step) < len(inner)):
                raise UsageError(
                    f"--set {given}: {'.'.join(map(str, place))!r} is a list of {len(inner)}, without {step!r}",
                    f"give the number of an entry, from 0 to {len(inner) - 1}" if inner else "set the whole list",
                )
            at: Any = int(step)
        elif isinstance(inner, dict):
            at = step
        else:
            raise UsageError(f"--set {given}: {place[-1]!r} is a value and has no keys", "see `kdcache COMMAND --help`")
        place = (*place, at)
        if number == len(steps) - 1:
            inner[at] = value
        else:
            # A copy, since an anchor's value stands in several places and is to change in this one.
            inner[at] = {} if isinstance(inner, dict) and inner.get(at) is None else copy(inner[at])
            inner = inner[at]
    for end in range(1, len(place)):
        places.setdefault(place[:end], f"--set {given}")
    for stale in [other for other in places if other[: len(place)] == place]:
        del places[stale]
    places.update({(*place, *inside): f"--set {given}" for inside in lines or [()]})


_IN_OUR_WORDS = {"extra_forbidden": "unknown key", "missing": "is required", "model_type": "must have keys of its own"}


def refusal(
    error: ValidationError,
    places: dict[Place, str],
    source: str,
    known: Collection[str],
    what: str = "the pipeline",
    fix: str = "correct each of them; docs/PIPELINES.md lists the keys",
) -> UsageError:
    """Everything that pydantic found wrong, each with its place.

    Args:
        error: what it found; its own type `combination` is of keys that cannot stand together.
        places: where each value came from.
        source: the file, for what has no place in it.
        known: keys that a misspelled one may be meant for.
        what: the thing that has the problems.
        fix: the remedy.
    """
    found: dict[Place, list[str]] = {}
    of_another_type: set[Place] = set()
    for one in error.errors():
        # pydantic puts the chosen branch of a union into the path; what the user wrote has no such step.
        written: Place = ()
        for step in one["loc"]:
            if (*written, step) in places:
                written = (*written, step)
        if one["type"] in ("missing", "combination") and written[-1:] != one["loc"][-1:]:
            written = (*written, one["loc"][-1])
        message = _IN_OUR_WORDS.get(one["type"], one["msg"].removeprefix("Value error, "))
        key = str(one["loc"][-1]) if one["loc"] else ""
        near = get_close_matches(key, [other for other in known if other != key], cutoff=0.75)
        if one["type"] == "extra_forbidden" and near:
            message += f", did you mean {near[0]}?"
        found.setdefault(written, []).append(message)
        if one["type"].endswith("_type"):
            of_another_type.add(written)
    # Where a value is wrong inside, a union also says what else it might have been; that is not what was meant.
    outer = {place[:end] for place in found for end in range(len(place))}
    problems = []
    for written, messages in found.items():
        if written in outer & of_another_type:
            continue
        where = places.get(written) or places.get(written[:-1], source)
        parts = [where, ".".join(map(str, written)), " or ".join(messages)]
        problems.append(": ".join(part for part in parts if part))
    heading = f"{len(problems)} problem{'s'[: len(problems) - 1]} in {what}:"
    return UsageError("\n  ".join([heading, *problems]), fix)
