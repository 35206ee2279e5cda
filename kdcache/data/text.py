"""Texts as sequences of tokens: tokenized once, and kept in memory as 2 or 4 bytes per token."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from kdcache.data.text_formats import Array, Columns, Reader, TextFormat, Tokens, columns_of
from kdcache.data.text_records import Records, read_records
from kdcache.data.tokenizer import Tokenizer, Vocabulary, load_tokenizer
from kdcache.errors import UsageError, counted
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter
from kdcache.runtime.transformers_library import quiet

_AT_ONCE = 256
"""Records that are tokenized together."""

_NARROW = 2**16
"""Ids below this are kept in two bytes."""


class TokenStore:
    """Sequences of tokens, and which of their positions are taught: 2 or 4 bytes, and a bit, per token.

    Args:
        vocabulary_size: V; ids are below it.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        self._ids = array("H" if vocabulary_size <= _NARROW else "I")
        self._taught = bytearray()
        self._begins = array("q", [0])
        self._bits = array("q", [0])

    def __len__(self) -> int:
        return len(self._begins) - 1

    def add(self, ids: Array, taught: Array) -> None:
        """Append a sequence, [L] ids of the vocabulary and [L] bool."""
        self._ids.frombytes(ids.astype(self._ids.typecode).tobytes())
        self._taught += np.packbits(taught).tobytes()
        self._begins.append(len(self._ids))
        self._bits.append(len(self._taught))

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, [L] integers, and which of its positions are taught, [L] bool."""
        begin, end = self._begins[index], self._begins[index + 1]
        ids = np.array(self._ids[begin:end], self._ids.typecode)
        bits = np.frombuffer(self._taught, np.uint8, self._bits[index + 1] - self._bits[index], self._bits[index])
        return ids, np.unpackbits(bits, count=end - begin).astype(bool)

    def lengths(self) -> Array:
        """Return the numbers of tokens of all sequences, [N] int64."""
        return np.diff(np.frombuffer(self._begins, np.int64))


@dataclass(frozen=True, repr=False)
class TokenizedText:
    """A data set of texts as sequences of tokens.

    Attributes:
        name: of the data set.
        split: of it.
        vocabulary: of the tokenizer; or only the number of tokens, V.
        store: the sequences.
        notes: what is worth knowing about how they were made.
    """

    name: str
    split: str
    vocabulary: Vocabulary | int
    store: TokenStore
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.store)

    def __repr__(self) -> str:
        tokens = int(self.store.lengths().sum())
        return f"TokenizedText({self.name!r}, sequences={len(self):,}, tokens={tokens:,}, V={self.vocabulary_size:,})"

    @property
    def vocabulary_size(self) -> int:
        """V, the number of tokens of the vocabulary."""
        return self.vocabulary if isinstance(self.vocabulary, int) else len(self.vocabulary.tokens)

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a sequence, [L] integers, and which of its positions are taught, [L] bool."""
        return self.store.tokens(index)


def load_text(
    root: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    format: TextFormat | Literal["auto"] = "auto",  # as the key of a pipeline
    column: str | None = None,
    max_length: int = 1024,
    taught: Literal["auto", "all", "completion"] = "auto",
    append_eos: bool | None = None,
    vocabulary_size: int | None = None,
    progress: Progress | bool | None = None,
) -> TokenizedText:
    """Tokenize texts.

    Args:
        root: a file or a folder, see `read_records`.
        tokenizer: folder of it; needed except for records of token ids.
        format: of the records; auto recognizes it by the keys of the first one.
        column: key of the text, messages, prompt or token ids; None for the usual ones.
        max_length: tokens per sequence at most. A longer text becomes several sequences, each of which begins with the
            special tokens that the tokenizer puts before a text, such as bos, and the last token of the sequence before
            it, so that each token of the text is learned once. Anything else is cut.
        taught: positions to be taught: all, those whose next token a completion or an assistant says, or auto: the
            latter for conversations, prompts with completions, and token ids with `labels` or `taught`.
        append_eos: whether the token that ends a text is appended where the tokenizer does not; None: to completions.
        vocabulary_size: V, for token ids without a tokenizer.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        UsageError: if records are not of the format; with file and line.
        CorruptError: if a file is damaged.
    """
    records, shown = read_records(root), reporter(progress)
    used = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    columns = _columns(records, format, column)
    if max_length < 2:
        raise UsageError(
            f"max_length is {max_length}", "use 2 or more tokens: the last one of a sequence is not taught"
        )
    if used is None and (columns.format != "tokens" or vocabulary_size is None):
        raise UsageError(
            f"a tokenizer is needed for records of {columns.format}",
            "set dataset.tokenizer to the folder of the teacher's tokenizer",
        )
    if columns.format == "text" and taught == "completion":
        raise UsageError("texts have no completion", "set dataset.taught to all or auto")
    vocabulary: Vocabulary | int = used.vocabulary if used is not None else (vocabulary_size or 0)
    found = TokenizedText(expand(root).stem, "train", vocabulary, TokenStore(_size(vocabulary)))
    ends = columns.format == "prompt-completion" if append_eos is None else append_eos
    if append_eos and used is not None and used.eos is None:
        raise UsageError(f"{used} has no eos token to append", "set dataset.append_eos to false")
    reader = Reader(columns, used, taught == "all", ends, records.name)
    counts: Counter[str] = Counter()
    prefix = [] if used is None else used.added[0]
    # transformers warns of texts longer than the network takes, which are divided or cut here.
    with quiet() if used is not None else nullcontext(), shown.task("tokenizing", len(records), "records") as task:
        of_records = iter(records)
        while some := list(islice(of_records, _AT_ONCE)):
            for offset, tokens in enumerate(reader.read(counts["records"], some)):
                index = counts["records"] + offset
                _check_ids(tokens.ids, found.vocabulary_size, records, index)
                parts = list(_sequences(tokens, max_length, prefix))
                counts["dropped"] += not parts
                counts["cut"] += not tokens.is_text and len(tokens.ids) > max_length
                counts["divided"] += len(parts) > 1
                for ids, positions in parts:
                    found.store.add(ids, positions)
            counts["records"] += len(some)
            task.advance(len(some))
    if not len(found):
        raise UsageError(
            f"no position of {root} is taught, in {counted(counts['records'], 'record')}: texts are empty, or answers "
            f"behind max_length {max_length}",
            "correct the records, or set dataset.max_length higher, or dataset.taught to all",
        )
    found.notes.extend(_notes(columns, used, taught, counts, max_length))
    for note in found.notes:
        shown.say(f"note: {note}")
    return found


def _columns(records: Records, given: TextFormat | Literal["auto"], column: str | None) -> Columns:
    """Return what the records hold, by the first of them."""
    first = next(iter(records), None)
    if first is None:
        raise UsageError("there are no records to tokenize", "name a file with at least one")
    try:
        return columns_of(first, given, column)
    except UsageError as error:
        raise UsageError(f"{records.name(0)}: {error.what}", error.fix) from None


def _size(vocabulary: Vocabulary | int) -> int:
    return vocabulary if isinstance(vocabulary, int) else len(vocabulary.tokens)


def _check_ids(ids: Array, size: int, records: Records, index: int) -> None:
    if len(ids) and not (ids.min() >= 0 and ids.max() < size):
        raise UsageError(
            f"{records.name(index)} has tokens from {ids.min()} to {ids.max()}; the vocabulary has {size:,}",
            "use the data set of this tokenizer, or name the tokenizer of these ids (dataset.tokenizer)",
        )


def _sequences(tokens: Tokens, max_length: int, prefix: list[int]) -> Iterator[tuple[Array, Array]]:
    """Yield the sequences of a record that have a taught position: ids [L], and taught [L]."""
    ids, learned = tokens.ids, tokens.learned
    if learned is None:
        learned = np.arange(len(ids)) > 0
    begins = prefix if ids[: len(prefix)].tolist() == prefix and len(prefix) < max_length - 1 else []
    start, before = 0, np.array([], np.int64)
    while True:
        room = max_length - len(before)
        part, mask = ids[start : start + room], learned[start : start + room].copy()
        mask[:1] &= not start  # the last token of the sequence before, which was learned there
        whole = np.concatenate([before, part])
        taught = np.concatenate([np.zeros(len(before), bool), mask])
        taught = np.append(taught[1:], False)
        if taught.any():
            yield whole, taught
        if not tokens.is_text or start + room >= len(ids):
            return
        start, before = start + room - 1, np.array(begins, np.int64)


def _notes(
    columns: Columns, tokenizer: Tokenizer | None, taught: str, counts: Counter[str], max_length: int
) -> Iterator[str]:
    """Yield what the user should know about how the sequences were made."""
    by_prefixes = columns.format == "messages" and taught != "all" and tokenizer is not None
    if by_prefixes and tokenizer is not None and not tokenizer.has_generation_marks:
        yield (
            "the chat template does not mark what an assistant says ({% generation %}): taught is what it adds to the "
            "conversation before each answer"
        )
    if counts["dropped"]:
        yield f"{counted(counts['dropped'], 'record')} left out, without a taught position in {max_length} tokens"
    if counts["cut"]:
        yield f"{counted(counts['cut'], 'record')} cut at {max_length} tokens (dataset.max_length)"
    if counts["divided"]:
        yield f"{counted(counts['divided'], 'text')} divided into sequences of at most {max_length} tokens"
