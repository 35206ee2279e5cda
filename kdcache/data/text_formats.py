"""Records of texts, conversations, prompts with completions and token ids, as tokens and which of them are learned.

A token is *learned* if the teacher's distribution of it is kept. Its position, where the token before it is, is then
*taught*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from kdcache.data.conversations import ASSISTANT, check_nested, messages_of
from kdcache.data.tokenizer import Tokenizer
from kdcache.errors import UsageError, did_you_mean

TextFormat = Literal["text", "messages", "prompt-completion", "tokens"]

FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)

_COLUMNS: dict[TextFormat, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt-completion": ("prompt",),
    "tokens": ("input_ids", "tokens"),
    "text": ("text", "content"),
}
"""Usual keys of a record, by its format."""

_COMPLETIONS = ("completion", "response")

_IGNORED = -100
"""Label of a token that is not learned, as in transformers."""

Array = npt.NDArray[Any]


class Tokens(NamedTuple):
    """A record as tokens.

    Attributes:
        ids: [L] int64.
        learned: [L] bool, tokens whose distribution is kept; None for all but the first.
        is_text: whether a longer one becomes several sequences, or else is cut at its end.
    """

    ids: Array
    learned: Array | None
    is_text: bool


class Columns(NamedTuple):
    """What a record holds, and under which keys.

    Attributes:
        format: of the records.
        first: key of the text, messages, prompt or token ids.
        completion: key of the completion; "" of other formats.
    """

    format: TextFormat
    first: str
    completion: str = ""


def columns_of(record: Any, given: TextFormat | Literal["auto"], column: str | None) -> Columns:
    """Return what records hold, by the keys of the first one.

    Args:
        record: the first one.
        given: their format; auto to recognize it.
        column: key of the text, messages, prompt or token ids; None for the usual ones.

    Raises:
        UsageError: if the record has none of the keys.
    """
    if not isinstance(record, dict):
        raise UsageError(f"it is {_in_json(record)}, not an object with keys", 'write a line such as {"text": "..."}')
    for one in FORMATS if given == "auto" else (given,):
        keys = _COLUMNS[one] if column is None else (column,)
        first = next((key for key in keys if key in record), None)
        if first is None or (given == "auto" and column is not None and not _looks_like(one, record, column)):
            continue
        if one != "prompt-completion":
            return Columns(one, first)
        completion = next((key for key in _COMPLETIONS if key in record), None)
        if completion is not None:
            return Columns(one, first, completion)
    wanted = [column] if column is not None else [key for one in FORMATS for key in _COLUMNS[one]]
    if given != "auto" and column is None:
        wanted = [*_COLUMNS[given], *([_COMPLETIONS[0]] if given == "prompt-completion" else [])]
    hint = did_you_mean(wanted[0], record) if len(wanted) == 1 else ""
    raise UsageError(
        f"it has the keys {', '.join(map(repr, record)) or 'of nothing'}, and none for "
        f"{'a known format' if given == 'auto' else given}{hint}",
        f"use the keys {', '.join(wanted)}, or name the key (dataset.column) and the format (dataset.format)",
    )


def _looks_like(format_: TextFormat, record: Mapping[str, Any], column: str) -> bool:
    """Return whether the value under a key that the user names is of a format."""
    value = record[column]
    inner = value[0] if isinstance(value, list) and value else None
    return {
        "text": isinstance(value, str) and not any(key in record for key in _COMPLETIONS),
        "messages": isinstance(inner, dict),
        "prompt-completion": isinstance(value, str) and any(key in record for key in _COMPLETIONS),
        "tokens": isinstance(inner, int),
    }[format_]


class Reader:
    """Turns records into tokens.

    Args:
        columns: what they hold.
        tokenizer: None only for token ids.
        learn_all: whether all tokens are learned, not only those of a completion or an assistant.
        append_eos: whether the token that ends a text is appended where the tokenizer does not.
        named: returns where a record is, from its number, for errors.
    """

    def __init__(
        self,
        columns: Columns,
        tokenizer: Tokenizer | None,
        learn_all: bool,
        append_eos: bool,
        named: Callable[[int], str],
    ) -> None:
        self._columns, self._tokenizer, self._learn_all = columns, tokenizer, learn_all
        self._append_eos, self._named = append_eos, named

    def read(self, first: int, records: Sequence[Any]) -> Iterator[Tokens]:
        """Yield some records that follow one another as tokens; the first one has a number.

        Raises:
            UsageError: with the file and line of a record that is not of the format.
        """
        if self._columns.format == "text":
            yield from self._texts(first, records)
            return
        of_format = {
            "messages": self._conversation,
            "prompt-completion": self._prompt_and_completion,
            "tokens": self._token_ids,
        }[self._columns.format]
        for index, record in enumerate(records, first):
            try:
                yield of_format(_checked(record))
            except UsageError as error:
                raise UsageError(f"{self._named(index)}: {error.what}", error.fix) from None

    @property
    def _used(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"a tokenizer is needed for records of {self._columns.format}",
                "set dataset.tokenizer to the folder of the teacher's tokenizer",
            )
        return self._tokenizer

    def _texts(self, first: int, records: Sequence[Any]) -> Iterator[Tokens]:
        """Yield texts, which are tokenized together."""
        texts = []
        for index, record in enumerate(records, first):
            try:
                texts.append(_string(_checked(record), self._columns.first))
            except UsageError as error:
                raise UsageError(f"{self._named(index)}: {error.what}", error.fix) from None
        for ids in self._used(texts):
            yield Tokens(np.array(self._ended(ids), np.int64), None, is_text=True)

    def _ended(self, ids: list[int]) -> list[int]:
        """Return ids with the token that ends a text, if it is wanted and not there."""
        eos = self._used.eos
        return [*ids, eos] if self._append_eos and eos is not None and ids[-1:] != [eos] else ids

    def _prompt_and_completion(self, record: Mapping[str, Any]) -> Tokens:
        prompt, completion = record.get(self._columns.first), record.get(self._columns.completion)
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._completed(prompt, completion, record.get("tools"))
        prompt, completion = _string(record, self._columns.first), _string(record, self._columns.completion)
        encoded = self._used.with_ends(prompt + completion)
        ids = self._ended(encoded.ids)
        learned = np.array(encoded.ends + [len(prompt + completion)] * (len(ids) - len(encoded.ids))) > len(prompt)
        added = len(self._used.added[1])
        if added:
            learned[len(encoded.ids) - added :] = True  # what the tokenizer adds at the end, such as eos
        return self._tokens(ids, learned)

    def _completed(self, prompt: list[Any], completion: list[Any], tools: Any) -> Tokens:
        """Return a conversation that begins with a prompt, of which the rest is learned."""
        asked, whole = messages_of(prompt), messages_of([*prompt, *completion])
        begin = self._used.rendered(asked, tools, prompts=True)
        text = self._used.rendered(whole, tools)
        encoded = self._used.with_ends(text, add_special_tokens=False)
        check_nested(begin, text, len(asked))
        return self._tokens(encoded.ids, np.array(encoded.ends) > len(begin))

    def _conversation(self, record: Mapping[str, Any]) -> Tokens:
        """Return a conversation, in which the tokens are learned that an assistant says."""
        messages, tools = messages_of(record.get(self._columns.first)), record.get("tools")
        if self._learn_all:
            text = self._used.rendered(messages, tools)
            ids = self._used.inner(text, add_special_tokens=False)["input_ids"]
            return Tokens(np.array(ids, np.int64), None, is_text=False)
        if self._used.has_generation_marks:
            marked, learned = self._used.marked(messages, tools)
            return self._tokens(marked, np.array(learned, bool))
        text = self._used.rendered(messages, tools)
        encoded = self._used.with_ends(text, add_special_tokens=False)
        ends = np.array(encoded.ends)
        said = np.zeros(len(ends), bool)
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                begin = self._used.rendered(messages[:index], tools, prompts=True) if index else ""
                until = self._used.rendered(messages[: index + 1], tools)
                check_nested(begin, until, index)
                check_nested(until, text, index + 1)
                said |= (ends > len(begin)) & (ends <= len(until))
        return self._tokens(encoded.ids, said)

    def _tokens(self, ids: Sequence[int], learned: Array) -> Tokens:
        return Tokens(np.array(ids, np.int64), None if self._learn_all else learned, is_text=False)

    def _token_ids(self, record: Mapping[str, Any]) -> Tokens:
        """Return token ids, and which of them are learned, by `labels` or `taught`."""
        ids = _integers(record, self._columns.first)
        learned = None
        if record.get("labels") is not None:
            labels = _integers(record, "labels")
            _check_length("labels", labels, ids)
            learned = labels != _IGNORED
            if len(wrong := np.flatnonzero(learned & (labels != ids))):
                at = int(wrong[0])
                raise UsageError(
                    f"the label of token {at} is {labels[at]}, and the token {ids[at]}",
                    f"labels are the tokens themselves, or {_IGNORED} where nothing is learned: they are not shifted",
                )
        if record.get("taught") is not None:
            taught = _integers(record, "taught")
            _check_length("taught", taught, ids)
            if len(taught) and taught[-1]:
                raise UsageError(
                    f"the last token, {len(ids) - 1}, is taught, and nothing follows it",
                    "mark the positions before the tokens to learn, not these tokens",
                )
            learned = np.concatenate([[False], taught[:-1].astype(bool)]) if len(ids) else taught.astype(bool)
        if record.get("attention_mask") is not None:
            mask = _integers(record, "attention_mask")
            _check_length("attention_mask", mask, ids)
            ids, learned = ids[mask != 0], None if learned is None else learned[mask != 0]
        return Tokens(ids, None if self._learn_all else learned, is_text=learned is None)


def _in_json(value: Any) -> str:
    """Return what a value is called in JSON."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a string",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _checked(record: Any) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise UsageError(f"it is {_in_json(record)}, not an object with keys", "write the record again")
    return record


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        what = f"{key!r} is {_in_json(value)}, not a string" if key in record else f"it has no {key!r}"
        raise UsageError(what, "write the record again, or leave it out")
    return value


def _integers(record: Mapping[str, Any], key: str) -> Array:
    try:
        found = np.array(record[key])
    except ValueError:
        found = np.empty((0, 0))
    if found.ndim != 1 or (found.dtype.kind not in "iub" and len(found)):
        raise UsageError(f"{key!r} is not a list of integers", "write the record again, or leave it out")
    return found.astype(np.int64)


def _check_length(key: str, values: Array, ids: Array) -> None:
    if len(values) != len(ids):
        raise UsageError(f"it has {len(ids)} tokens, and {len(values)} {key}", "write one for each token")
