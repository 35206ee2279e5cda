"""YAML with the line of every key, so that every problem is reported with its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from typing import Any

import yaml
from pydantic import ValidationError

from kdcache.errors import UsageError, did_you_mean, indices_below, similar_name

Place = tuple[str | int, ...]
"""The keys, and numbers of list entries, that lead to a value."""


class _PlacedLoader(yaml.SafeLoader):
    """A SafeLoader that records the line of every key and refuses a key that is given twice."""

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
    """A SafeDumper that quotes strings which `_PlacedLoader` would read as numbers."""


# YAML 1.1, which PyYAML reads, takes 1e-3 for a string; in a learning rate it means the number.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _side in (_PlacedLoader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))

# PyYAML's own errors, and Python's for a date with 13 months or a thousand brackets.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError)


def read_yaml(text: str, source: str) -> tuple[Any, dict[Place, int]]:
    """Return the content of a YAML text, and the line of every key and entry.

    Raises:
        UsageError: if it is not YAML, or has a key twice; names `source`.
    """
    try:
        loader = _PlacedLoader(text)
        return loader.read(), loader.lines
    except _BAD_YAML as error:
        why = " ".join(str(error).split())
        raise UsageError(f"{source} is not valid YAML: {why}", "fix the YAML there, or quote the value") from None


def write_yaml(data: dict[str, Any]) -> str:
    """Return a text that `read_yaml` reads back to the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def override(data: dict[str, Any], given: str, places: dict[Place, str]) -> None:
    """Put the value of a `KEY=VALUE` into `data`, and its origin into `places`.

    A step of KEY is a key, or the index of a list entry: `teacher.0.weights`.

    Raises:
        UsageError: if it cannot be read, or a step of KEY does not exist.
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
                    f"give the index of an entry: {indices_below(len(inner))}" if inner else "set the whole list",
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
            # A copy, since the value of an anchor is shared by several places.
            inner[at] = {} if isinstance(inner, dict) and inner.get(at) is None else copy(inner[at])
            inner = inner[at]
    for end in range(1, len(place)):
        places.setdefault(place[:end], f"--set {given}")
    for stale in [other for other in places if other[: len(place)] == place]:
        del places[stale]
    places.update({(*place, *inside): f"--set {given}" for inside in lines or [()]})


_ALIKE = 0.75
"""Similarity of a misspelled key and the one that is meant."""


def _meant(loc: Place, known: Mapping[str, list[str]]) -> str:
    """Return a suggestion for an unknown key: a similar one of its section, or the same or a similar one elsewhere."""
    *steps, key = (step for step in loc if isinstance(step, str))
    sections = {place.rpartition(".")[0] for places in known.values() for place in places}
    # What pydantic puts into the path, such as the chosen kind, and names that the user gives are not sections.
    paths = (path for end in range(len(steps), 0, -1) for path in (steps[:end], [*steps[: end - 1], "*"]))
    section = next((path for path in map(".".join, paths) if path in sections), "")
    of_section = [name for name, places in known.items() if f"{section}.{name}".lstrip(".") in places]
    if key in of_section:
        return f": {key} belongs to another kind"
    if (similar := similar_name(key, of_section, _ALIKE)) is not None:
        return f", did you mean {similar}?"
    found = known.get(key) or known.get(similar_name(key, known, _ALIKE) or "", [])
    places = [place for place in found if "*" not in place]
    inside = [place for place in places if steps and place.startswith(f"{steps[0]}.")]
    return f", did you mean {' or '.join(inside or places)}?" if places else ""


_WRONG_TAG = re.compile(
    r"Input tag '(?P<tag>.*)' found using '(?P<key>\w+)' does not match any of the expected tags: (?P<expected>.*)"
)
_MESSAGES = {"extra_forbidden": "unknown key", "missing": "is required", "model_type": "must have keys of its own"}


def refusal(
    error: ValidationError,
    places: dict[Place, str],
    source: str,
    known: Mapping[str, list[str]],
    what: str = "the pipeline",
    fix: str = "correct each of them; docs/PIPELINES.md lists the keys",
) -> UsageError:
    """Return an error with everything that pydantic found wrong, each with its origin.

    Args:
        error: of pydantic; its type `combination` is about an invalid combination of keys.
        places: the origin of each value, such as a file and a line.
        source: the file, for problems without a line.
        known: keys that an unknown one may be meant for, each with its places, such as `student.train.lr`.
        what: the thing that has the problems.
        fix: the remedy.
    """
    messages_at: dict[Place, list[str]] = {}
    of_another_type: set[Place] = set()
    for each in error.errors():
        # pydantic puts the chosen branch of a union into the path; what the user wrote has no such step.
        written: Place = ()
        for step in each["loc"]:
            if (*written, step) in places:
                written = (*written, step)
        if each["type"] in ("missing", "combination") and written[-1:] != each["loc"][-1:]:
            written = (*written, each["loc"][-1])
        message = _MESSAGES.get(each["type"], each["msg"].removeprefix("Value error, "))
        if tags := _WRONG_TAG.fullmatch(message):
            expected = re.findall(r"'([^']+)'", tags["expected"])
            suggestion = did_you_mean(tags["tag"], expected)
            message = f"unknown {tags['key']} {tags['tag']!r}{suggestion}: it is one of {', '.join(expected)}"
        if each["type"] == "extra_forbidden":
            message += _meant(each["loc"], known)
        messages_at.setdefault(written, []).append(message)
        if each["type"].endswith("_type"):
            of_another_type.add(written)
    # If a value is wrong inside, a union also lists its other types, which are not meant.
    outer = {place[:end] for place in messages_at for end in range(len(place))}
    problems = []
    for written, messages in messages_at.items():
        if written in outer & of_another_type:
            continue
        where = places.get(written) or places.get(written[:-1], source)
        parts = [where, ".".join(map(str, written)), " or ".join(messages)]
        problems.append(": ".join(part for part in parts if part))
    heading = f"{len(problems)} problem{'s'[: len(problems) - 1]} in {what}:"
    return UsageError("\n  ".join([heading, *problems]), fix)
