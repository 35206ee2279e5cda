"""Tokenizers of transformers, an optional extra, from folders of `save_pretrained`: text to ids, and ids to bytes.

Nothing is downloaded, and no code in the folder is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kdcache.data.token_bytes import bytes_of_tokens
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.paths import expand
from kdcache.runtime.transformers_library import first_line, library, quiet

_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of a folder that has a tokenizer; the first one that is there is digested."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of what an assistant says in a chat template, as transformers searches for it."""


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer, and what else distinguishes it.

    Attributes:
        tokens: bytes of the token of each id, [V]; empty for ids that are not used.
        special: name of a special token, such as eos, -> its id.
        chat_template: its text; None without one.
        tokenizer: content of the tokenizer's file; None without one.
    """

    tokens: list[bytes]
    special: dict[str, int]
    chat_template: str | None
    tokenizer: bytes | None

    def check_same(self, other: Sequence[bytes], where: str, other_where: str) -> None:
        """Check that two tokenizers have the same tokens.

        Args:
            other: tokens of the other one.
            where: what this one is called.
            other_where: what the other one is called.

        Raises:
            MismatchError: with the first id that differs, and both tokens.
        """
        for token, (first, second) in enumerate(zip(self.tokens, other, strict=False)):
            if first != second:
                raise MismatchError(
                    f"token {token} is {first!r} in {where}, and {second!r} in {other_where}",
                    "use the tokenizer that the teacher was trained with",
                )
        if len(self.tokens) != len(other):
            raise MismatchError(
                f"{where} has {len(self.tokens):,} tokens, and {other_where} has {len(other):,}",
                "use the tokenizer that the teacher was trained with",
            )


class Encoded(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: of its L tokens.
        ends: position in the text, in characters, where each token ends; 0 of tokens that the tokenizer adds.
    """

    ids: list[int]
    ends: list[int]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, as its own call adds special tokens.

    Attributes:
        inner: of transformers.
        folder: that it was read from.
    """

    inner: Any
    folder: Path

    def __str__(self) -> str:
        return f"the tokenizer in {self.folder}"

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of some texts, with the special tokens that the tokenizer adds."""
        found: list[list[int]] = self.inner(list(texts), return_attention_mask=False)["input_ids"]
        return found

    def with_ends(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Return the ids of a text, and where in it each token ends.

        Raises:
            UsageError: if the tokenizer does not say that.
        """
        if not self.inner.is_fast:
            raise UsageError(
                f"{self} does not say which characters a token has, so what is taught is not known",
                "convert it to a tokenizer.json (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) with "
                "the library tokenizers), or set dataset.taught to all",
            )
        said = self.inner(
            text,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
        )
        special = said["special_tokens_mask"] if add_special_tokens else [0] * len(said["input_ids"])
        ends = [0 if added else end for (_, end), added in zip(said["offset_mapping"], special, strict=True)]
        return Encoded(said["input_ids"], ends)

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """The ids that its call adds before and behind a text, such as bos and eos."""
        said = self.inner("a", return_special_tokens_mask=True)
        ids, special = said["input_ids"], said["special_tokens_mask"]
        first = special.index(0) if 0 in special else len(special)
        last = len(special) - special[::-1].index(0) if 0 in special else len(special)
        return ids[:first], ids[last:]

    @property
    def eos(self) -> int | None:
        """Id of the token that ends a text; None without one."""
        found: int | None = self.inner.eos_token_id
        return found

    @cached_property
    def has_generation_marks(self) -> bool:
        """Whether the chat template marks what an assistant says with `{% generation %}`."""
        return _GENERATION.search(self.chat_template or "") is not None

    @property
    def chat_template(self) -> str | None:
        """The text of its chat template, of several the default one; None without one."""
        template = self.inner.chat_template
        found: str | None = template.get("default") if isinstance(template, Mapping) else template
        return found

    def rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompts: bool = False) -> str:
        """Return a conversation as text.

        Args:
            messages: with role and content.
            tools: that the assistant may call; None without.
            prompts: whether what begins an answer of the assistant follows.

        Raises:
            UsageError: if the chat template refuses it.
        """
        found: str = self._templated(messages, tools, tokenize=False, add_generation_prompt=prompts)
        return found

    def marked(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and which of them the chat template marks as said by an assistant.

        Raises:
            UsageError: if the chat template refuses it.
        """
        said = self._templated(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return said["input_ids"], [bool(mark) for mark in said["assistant_masks"]]

    def _templated(self, messages: Sequence[Mapping[str, Any]], tools: Any, **options: Any) -> Any:
        try:
            return self.inner.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # templates and their library raise errors of many types
            if self.chat_template is None:
                raise UsageError(
                    f"{self} has no chat template, and the data set holds conversations",
                    "give the tokenizer of a chat model (dataset.tokenizer), or set its chat_template and save it",
                ) from None
            raise UsageError(
                f"the chat template of the tokenizer refuses it: {first_line(error)}",
                "correct the messages, or the chat template",
            ) from error

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of its tokens, its special tokens, chat template and file."""
        file = next((self.folder / name for name in _FILES if (self.folder / name).is_file()), None)
        return Vocabulary(
            bytes_of_tokens(self.inner),
            {
                name.removesuffix("_token"): self.inner.convert_tokens_to_ids(str(token))
                for name, token in sorted(self.inner.special_tokens_map.items())
                if isinstance(token, str)
            },
            self.chat_template,
            None if file is None else file.read_bytes(),
        )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder.

    Args:
        folder: that `save_pretrained` wrote.

    Raises:
        UsageError: without transformers, or for a folder without a tokenizer that it can read.
    """
    path = expand(folder)
    if not path.is_dir() or not has_tokenizer(path):
        raise UsageError(
            f"{path} {'has no tokenizer' if path.is_dir() else 'is not a folder'}",
            "give a folder with tokenizer.json, as tokenizer.save_pretrained(FOLDER) writes it "
            "(dataset.tokenizer); from the Hugging Face Hub: hf download NAME --local-dir FOLDER",
        )
    transformers = library("language models", "lm")
    try:
        with quiet():
            inner = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many types, for damaged files and for libraries that are not installed
        raise UsageError(
            f"transformers cannot read the tokenizer in {path}: {first_line(error)}",
            "get the folder again; a tokenizer with code of its own must be converted to a tokenizer.json",
        ) from error
    return Tokenizer(inner, path)
