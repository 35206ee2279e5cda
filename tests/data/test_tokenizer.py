"""Tokenizers of folders: the bytes of their tokens, special tokens, chat templates, and folders that are refused."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import DOCUMENTS, VOCABULARY_SIZE, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from kdcache.data.tokenizer import Tokenizer, load_tokenizer
from kdcache.errors import MismatchError, UsageError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as sentencepiece makes it: spaces as a character of their own, other characters as bytes."""
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    inner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    replace = tokenizers.decoders.Replace("\u2581", " ")
    inner.decoder = tokenizers.decoders.Sequence(
        [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    inner.train_from_iterator([line for text in DOCUMENTS for line in text.splitlines()], trainer)
    described = json.loads(inner.to_str())
    described["added_tokens"] = described["added_tokens"][:1]  # bytes are plain tokens, as in Llama 2
    folder = tmp_path_factory.mktemp("sentencepiece")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(described))
    ).save_pretrained(folder)
    return load_tokenizer(folder)


@given(text=st.text(max_size=60))
def test_tokens_of_byte_level_bpe_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer([text])
    assert b"".join(tokenizer.vocabulary.tokens[token] for token in ids) == text.encode()


@given(text=st.text(max_size=60).filter(lambda text: "\u2581" not in text and "<unk>" not in text))
def test_tokens_of_sentencepiece_are_the_bytes_of_the_text(sentencepiece: Tokenizer, text: str) -> None:
    (ids,) = sentencepiece([text])
    assert b"".join(sentencepiece.vocabulary.tokens[token] for token in ids) == text.encode()


def test_the_record_has_special_tokens_template_and_file(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    assert len(vocabulary.tokens) == VOCABULARY_SIZE
    assert vocabulary.special == {"eos": 2, "pad": 0}
    assert vocabulary.tokens[:3] == [b"<pad>", b"<s>", b"<|end|>"]
    assert vocabulary.chat_template == tokenizer.inner.chat_template
    assert vocabulary.tokenizer == (tokenizer.folder / "tokenizer.json").read_bytes()


def test_words_of_other_tokenizers_stand_for_themselves(tmp_path: Path) -> None:
    tokenizers, transformers = import_module("tokenizers"), import_module("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))  # noqa: S106
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).vocabulary.tokens == [b"[UNK]", b"a", b"##b"]


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_its_call_adds_is_recognized(bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, bos=bos, eos=eos))
    assert tokenizer.added == ([1] * bos, [2] * eos)
    (ids,) = tokenizer(["some text"])
    assert ids[:1] == [1] if bos else ids[0] != 1
    encoded = tokenizer.with_ends("some text")
    assert encoded.ids == ids
    assert max(encoded.ends) == len("some text")


def test_the_first_token_that_differs_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocabulary = tokenizer.vocabulary
    vocabulary.check_same(vocabulary.tokens, "one", "other")
    other = [*vocabulary.tokens]
    other[300] = b"\xff"
    with pytest.raises(MismatchError, match=rf"token 300 is {vocabulary.tokens[300]!r} in one, and b'\\xff' in other"):
        vocabulary.check_same(other, "one", "other")
    with pytest.raises(MismatchError, match="one has 400 tokens, and other has 399"):
        vocabulary.check_same(other[:300] + vocabulary.tokens[300:399], "one", "other")


def test_folders_without_a_tokenizer_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is not a folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    shutil.copytree(tokenizer.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="transformers cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


def test_without_transformers_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("kdcache.runtime.transformers_library.import_module", missing)
    with pytest.raises(UsageError, match="language models need the library transformers") as raised:
        load_tokenizer(tokenizer.folder)
    assert raised.value.fix == "pip install 'kdcache[lm]'"


def test_a_tokenizer_without_a_template_refuses_conversations(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template=None))
    with pytest.raises(UsageError, match="has no chat template"):
        tokenizer.rendered([{"role": "user", "content": "a"}], None)
