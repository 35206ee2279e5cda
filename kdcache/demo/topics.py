"""The texts of `pydoc_data.topics`, which come with Python: half a megabyte of its reference, divided by topic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kdcache.errors import UsageError
from kdcache.runtime.atomic_write import write_file

_SHORTEST = 200
"""Characters of a topic at least."""

_EVERY, _FIRST = 8, 4
"""Every so manieth topic in alphabetical order is held out, from this one on."""


class Topics(NamedTuple):
    """Texts by topic.

    Attributes:
        train: for the tokenizer, the teacher and the students.
        held_out: that none of them sees.
    """

    train: dict[str, str]
    held_out: dict[str, str]


def load_topics(count: int | None = None) -> Topics:
    """Return the topics of this version of Python; a paragraph that several topics have is in the first of them only.

    Long topics repeat short ones, a quarter of all characters: text that is held out would otherwise be trained on.

    Args:
        count: largest number of topics; None for all.

    Raises:
        UsageError: if this installation of Python lacks them.
    """
    try:
        given: Mapping[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        raise UsageError(
            "this installation of Python has no pydoc_data.topics, the texts of the demo",
            "use a complete one; on Debian and Ubuntu: apt-get install libpython3-stdlib",
        ) from None
    seen = set[str]()
    texts = {name: _new_paragraphs(given[name], seen) for name in sorted(given)}
    names = [name for name, text in texts.items() if len(text) >= _SHORTEST][:count]
    held_out = names[_FIRST::_EVERY]
    return Topics(
        {name: texts[name] for name in names if name not in held_out}, {name: texts[name] for name in held_out}
    )


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """Return the paragraphs of a text that are not among those seen, which they are added to."""
    kept = []
    for paragraph in text.split("\n\n"):
        if paragraph.strip() not in seen:
            seen.add(paragraph.strip())
            kept.append(paragraph)
    return "\n\n".join(kept)


def write_topics(texts: Mapping[str, str], path: Path) -> Path:
    """Write texts as JSON lines, which `load_text` and pipelines read; a file that is there is left as it is."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(json.dumps({"topic": name, "text": text}) + "\n" for name, text in texts.items()))
    return path
