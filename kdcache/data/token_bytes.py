"""The bytes that the token of each id of a tokenizer stands for, by which another tokenizer is recognized."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_SPACE = "\u2581"
"""Stands for a space in tokens of sentencepiece."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token of sentencepiece that stands for one byte."""


def bytes_of_tokens(tokenizer: Any) -> list[bytes]:
    """Return the bytes of the token of each id; a token that is not a part of a text stands for itself.

    Args:
        tokenizer: of transformers.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    kinds = set(_kinds(tokenizer))
    bytes_of = dict(_byte_characters())
    found = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for token, index in vocabulary.items():
        found[index] = _bytes_of(token, kinds, bytes_of)
    for index, token in added.items():
        found[index] = token.encode("utf-8", "surrogatepass")
    return found


def _bytes_of(token: str, kinds: set[str], bytes_of: Mapping[str, int]) -> bytes:
    """Return the bytes of a token of a model, by how its decoder reads it."""
    if "ByteLevel" in kinds and all(character in bytes_of for character in token):
        return bytes(bytes_of[character] for character in token)
    if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(token)):
        return bytes([int(byte[1], 16)])
    text = token.replace(_SPACE, " ") if "Metaspace" in kinds else token
    return text.encode("utf-8", "surrogatepass")


def _kinds(tokenizer: Any) -> Iterator[str]:
    """Yield how a tokenizer's tokens stand for bytes: ByteLevel, ByteFallback, Metaspace; nothing for plain text."""
    if not tokenizer.is_fast:
        if hasattr(tokenizer, "sp_model"):
            yield from ("ByteFallback", "Metaspace")
        return
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"].get("byte_fallback"):
        yield "ByteFallback"
    for part in (described["decoder"], described["pre_tokenizer"]):
        for step in _steps(part):
            is_space = step["type"] == "Replace" and step["pattern"].get("String") == _SPACE
            yield "Metaspace" if is_space else step["type"]


def _steps(part: Any) -> Iterator[Any]:
    """Yield the steps of a part of a tokenizer, also those inside others."""
    if part is not None:
        yield part
        for name in ("decoders", "pretokenizers"):
            for inner in part.get(name, ()):
                yield from _steps(inner)


def _byte_characters() -> Iterator[tuple[str, int]]:
    """Yield the character that stands for each byte in byte-level BPE (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 0
    for byte in range(256):
        if byte in printable:
            yield chr(byte), byte
        else:
            yield chr(256 + others), byte
            others += 1
