"""Records of sequences of tokens as samples: their numbers in each shard, and the vocabulary (docs/FORMAT.md, 12.1).

A sample is a sequence, and an output with `places: run` has a row for each of its taught positions. The rows of the
samples of a shard lie one after the other on an axis of their own, on which every shard has the same room, so that a
shard is the same files of every array; the unused end of a shard is chunks that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from kdcache.cache.format.encoding import Digest, Record, Size
from kdcache.cache.format.output_records import TOKENS, OutputRecord

LARGEST_TOKEN_CHUNK = 2**20
"""Tokens per chunk at most (docs/FORMAT.md, section 12.1)."""

LARGEST_ROW_CHUNK = 16_384
"""Rows per chunk at most, as of any other output (docs/FORMAT.md, section 12.1)."""


class VocabularyRecord(Record):
    """The tokens of a teacher, by which another tokenizer is recognized.

    Attributes:
        size: V; ids are 0 to V - 1. Rows of padding that a model's head has behind them do not count.
        bytes: number of bytes of all tokens together; 0 if only the size is known.
        digest: of the tokens; None if only the size is known.
        special: name of a special token (bos, eos, pad, ...) -> its id.
        chat_template: digest of the text of the chat template; None without one. Informative.
        tokenizer: digest of the file of the tokenizer; None without one. Informative.
    """

    size: Annotated[int, Field(ge=2, le=2**31)]
    bytes: Size
    digest: Digest | None
    special: dict[str, Annotated[int, Field(ge=0)]]
    chat_template: Digest | None
    tokenizer: Digest | None

    @model_validator(mode="after")
    def _agrees(self) -> VocabularyRecord:
        if (self.digest is None) != (self.bytes == 0):
            raise ValueError("the bytes of a vocabulary have a digest, and only they")
        if wrong := [name for name, token in self.special.items() if token >= self.size]:
            raise ValueError(f"the special token {wrong[0]} is not in the vocabulary")
        return self


class SequencesRecord(Record):
    """Sequences of tokens, whose positions have rows.

    Attributes:
        tokens: number of tokens of each shard.
        rows: number of taught positions of each shard, hence of rows.
        token_chunk: tokens per chunk.
        row_chunk: rows per chunk.
        vocabulary: of the tokens.
    """

    tokens: tuple[Annotated[int, Field(ge=2, le=2**40)], ...]
    rows: tuple[Annotated[int, Field(ge=1, le=2**40)], ...]
    token_chunk: Annotated[int, Field(ge=1, le=LARGEST_TOKEN_CHUNK)]
    row_chunk: Annotated[int, Field(ge=1, le=LARGEST_ROW_CHUNK)]
    vocabulary: VocabularyRecord

    @field_validator("tokens", "rows", mode="before")
    @classmethod
    def _from_json_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _agrees(self) -> SequencesRecord:
        if len(self.tokens) != len(self.rows):
            raise ValueError("tokens and rows are of different numbers of shards")
        if any(rows >= tokens for tokens, rows in zip(self.tokens, self.rows, strict=True)):
            raise ValueError("a shard has as many rows as tokens, and the last token of a sequence has none")
        return self

    @property
    def token_capacity(self) -> int:
        """Room for tokens per shard: those of the largest one, in whole chunks."""
        return -(-max(self.tokens) // self.token_chunk) * self.token_chunk

    @property
    def row_capacity(self) -> int:
        """Room for rows per shard: those of the largest one, in whole chunks."""
        return -(-max(self.rows) // self.row_chunk) * self.row_chunk


def check_places(sequences: SequencesRecord | None, outputs: Mapping[str, OutputRecord]) -> None:
    """Check that outputs have rows at places that the samples of a cache have.

    Args:
        sequences: of the cache; None if a sample is not a sequence.
        outputs: of the cache, by name.

    Raises:
        ValueError: with the first output that does not.
    """
    for name, output in outputs.items():
        if (output.places == "run") != (sequences is not None):
            raise ValueError(f"the output {name} has rows at places that the samples do not have")
        if sequences is not None and output.channels != sequences.vocabulary.size:
            raise ValueError(f"the output {name} is not of the tokens of the vocabulary")
        if sequences is not None and name == TOKENS:
            raise ValueError(f"{TOKENS} is the name of the tokens themselves")
