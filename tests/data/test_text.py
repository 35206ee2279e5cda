"""Records of every format as sequences, against what transformers says of them; records that are refused."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.texts import DOCUMENTS, FORGETFUL, UNMARKED, write_lines, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.data.text import TokenizedText, TokenStore, load_text
from kdcache.data.tokenizer import Tokenizer, load_tokenizer
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.progress import Silent

CHAT = [
    {"role": "system", "content": "You answer."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A list is a sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "It is one too."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("bos"), bos=True, eos=True))


class Said(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.notes.append(message)


def learned(text: TokenizedText) -> list[int]:
    """The tokens after the taught positions of all sequences, in order."""
    found: list[int] = []
    for index in range(len(text)):
        ids, taught = text.tokens(index)
        assert not taught[-1]
        found += ids[1:][taught[:-1]].tolist()
    return found


def load(tmp_path: Path, records: list[Any], tokenizer: Tokenizer | None, **options: Any) -> TokenizedText:
    return load_text(write_lines(tmp_path / "data.jsonl", records), tokenizer, **options)


# Texts.


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4), max_length=st.integers(2, 40), bos=st.booleans())
def test_each_token_of_a_text_is_learned_once(
    lengths: list[int], max_length: int, bos: bool, tokenizer: Tokenizer, with_bos: Tokenizer, tmp_path: Path
) -> None:
    used = with_bos if bos else tokenizer
    texts = (
        ["x", *(DOCUMENTS[0][:length] for length in lengths)] if bos else ["x y", *(DOCUMENTS[0][:n] for n in lengths)]
    )
    text = load(tmp_path, [{"text": each} for each in texts], used, max_length=max_length)
    assert learned(text) == [token for ids in used(texts) for token in ids[1:]]
    for index in range(len(text)):
        ids, _ = text.tokens(index)
        assert len(ids) <= max_length
        assert not (bos and max_length > 2) or ids[0] == 1


def test_a_sequence_follows_the_one_before(with_bos: Tokenizer, tmp_path: Path) -> None:
    (whole,) = with_bos([DOCUMENTS[1]])
    text = load(tmp_path, [{"text": DOCUMENTS[1]}], with_bos, max_length=50)
    first, second = text.tokens(0)[0], text.tokens(1)[0]
    assert first.tolist() == whole[:50]
    assert second.tolist() == [1, *whole[49:98]]
    assert text.tokens(1)[1].tolist() == [False, *[True] * 48, False]


def test_the_end_of_a_text_is_appended_on_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert load(tmp_path, [{"text": "a b"}], tokenizer).tokens(0)[0][-1] != 2
    assert load(tmp_path, [{"text": "a b"}], tokenizer, append_eos=True).tokens(0)[0][-1] == 2


def test_empty_texts_are_left_out_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    said = Said()
    text = load(tmp_path, [{"text": ""}, {"text": "a b"}, {"text": "c"}], tokenizer, progress=said)
    assert len(text) == 1
    assert said.notes == ["note: 2 records left out, without a taught position in 1024 tokens"]
    assert repr(text) == "TokenizedText('data', sequences=1, tokens=2, V=400)"


# Conversations, and prompts with completions.


def test_marked_words_are_taught_as_transformers_marks_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = load(tmp_path, [{"messages": CHAT}], tokenizer)
    marked = tokenizer.inner.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, taught = text.tokens(0)
    assert ids.tolist() == marked["input_ids"]
    assert taught.tolist() == [*map(bool, marked["assistant_masks"][1:]), False]
    said = tokenizer.inner.decode(learned(text))
    assert said == "A list is a sequence.<|end|>It is one too.<|end|>"


def test_without_marks_what_the_template_adds_is_taught(tokenizer: Tokenizer, tmp_path: Path) -> None:
    unmarked = load_tokenizer(write_tokenizer(tmp_path / "unmarked", UNMARKED))
    said = Said()
    text = load(tmp_path, [{"messages": CHAT}], unmarked, progress=said)
    expected = load(tmp_path, [{"messages": CHAT}], tokenizer)
    for first, second in zip(text.tokens(0), expected.tokens(0), strict=True):
        assert first.tolist() == second.tolist()
    assert "does not mark what an assistant says" in said.notes[0]


def test_a_template_whose_prefixes_do_not_nest_is_refused(tmp_path: Path) -> None:
    forgetful = load_tokenizer(write_tokenizer(tmp_path / "forgetful", FORGETFUL))
    with pytest.raises(UsageError, match=r"data.jsonl, line 1: the chat template changes what it wrote") as raised:
        load(tmp_path, [{"messages": CHAT}], forgetful)
    assert r"of 2 it is '2 system: You answer.\n2 ...' from character 0" in raised.value.what
    assert r"with more of them '3 system: You answer.\n3 ...'" in raised.value.what
    assert load(tmp_path, [{"messages": CHAT}], forgetful, taught="all").tokens(0)[1].sum() > 20


def test_conversations_of_other_keys_are_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    roles = {"user": "human", "assistant": "gpt", "system": "system"}
    other = [{"from": roles[each["role"]], "value": each["content"]} for each in CHAT]
    text = load(tmp_path, [{"conversations": other}, {"messages": CHAT}][:1], tokenizer)
    expected = load(tmp_path, [{"messages": CHAT}], tokenizer)
    assert text.tokens(0)[0].tolist() == expected.tokens(0)[0].tolist()
    nothing_else = [{**each, "tool_calls": None} for each in CHAT]
    again = load(tmp_path, [{"chat": nothing_else}], tokenizer, format="messages", column="chat")
    assert again.tokens(0)[1].tolist() == expected.tokens(0)[1].tolist()


def test_long_conversations_are_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = load(tmp_path, [{"messages": CHAT}], tokenizer)
    length = int(np.flatnonzero(whole.tokens(0)[1])[0]) + 2
    said = Said()
    text = load(tmp_path, [{"messages": CHAT}], tokenizer, max_length=length, progress=said)
    assert text.tokens(0)[0].tolist() == whole.tokens(0)[0][:length].tolist()
    assert text.tokens(0)[1].sum() == 1
    assert said.notes == [f"note: 1 record cut at {length} tokens (dataset.max_length)"]
    with pytest.raises(UsageError, match=r"no position of .* is taught, in 1 record: texts are empty"):
        load(tmp_path, [{"messages": CHAT}], tokenizer, max_length=5)


def test_tokens_with_a_character_of_the_completion_are_taught(
    tokenizer: Tokenizer, with_bos: Tokenizer, tmp_path: Path
) -> None:
    record = {"prompt": "Q: what is it? ", "completion": "the list"}
    for used in (tokenizer, with_bos):
        text = load(tmp_path, [record], used)
        (ids,) = used([record["prompt"] + record["completion"]])
        ids = ids if ids[-1] == 2 else [*ids, 2]
        assert text.tokens(0)[0].tolist() == ids
        said = used.inner.decode(learned(text))
        assert said.strip() == "the list<|end|>"
    kept = load(tmp_path, [{**record, "response": record["completion"]}], tokenizer, append_eos=False)
    assert tokenizer.inner.decode(learned(kept)).strip() == "the list"


def test_prompts_may_be_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = load(tmp_path, [{"prompt": CHAT[:4], "completion": CHAT[4:]}], tokenizer)
    whole = load(tmp_path, [{"messages": CHAT}], tokenizer)
    assert text.tokens(0)[0].tolist() == whole.tokens(0)[0].tolist()
    assert tokenizer.inner.decode(learned(text)) == "It is one too.<|end|>"


# Token ids.


def test_token_ids_with_labels_or_taught_positions(tmp_path: Path) -> None:
    records = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, 6, 7, 8], "taught": [0, 1, 1, 0]},
        {
            "input_ids": [5, 6, 7, 8, 0, 0],
            "labels": [-100, -100, 7, 8, -100, -100],
            "attention_mask": [1, 1, 1, 1, 0, 0],
        },
        {"input_ids": [5, 6, 7, 8]},
    ]
    text = load(tmp_path, records, None, vocabulary_size=9)
    for index in range(3):
        ids, taught = text.tokens(index)
        assert (ids.tolist(), taught.tolist()) == ([5, 6, 7, 8], [False, True, True, False])
    assert text.tokens(3)[1].tolist() == [True, True, True, False]
    assert text.vocabulary == 9
    assert load(tmp_path, records, None, vocabulary_size=9, taught="all").tokens(0)[1].tolist() == [1, 1, 1, 0]


WRONG_IDS: list[tuple[dict[str, Any], str]] = [
    ({"taught": [0, 0, 1]}, "the last token, 2, is taught, and nothing follows it"),
    ({"taught": [0, 1]}, "it has 3 tokens, and 2 taught"),
    ({"labels": [6, 7, -100]}, "the label of token 0 is 6, and the token 5"),
    ({"labels": ["a", "b", "c"]}, "'labels' is not a list of integers"),
    ({"input_ids": [[1], [2, 3]]}, "'input_ids' is not a list of integers"),
    ({"input_ids": [5, 9]}, "has tokens from 5 to 9; the vocabulary has 9"),
    ({"input_ids": [-1, 5]}, "has tokens from -1 to 5"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_IDS)
def test_wrong_token_ids_are_refused_with_their_line(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"input_ids": [5, 6, 7]}
    with pytest.raises(UsageError, match=message) as raised:
        load(tmp_path, [good, {**good, **wrong}], None, vocabulary_size=9)
    assert "data.jsonl, line 2" in raised.value.what


# Files.


def test_parquet_plain_text_and_folders_hold_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow = import_module("pyarrow")
    parquet = import_module("pyarrow.parquet")
    records = [{"text": text} for text in DOCUMENTS[:3]]
    expected = learned(load_text(write_lines(tmp_path / "a.jsonl", records), tokenizer))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    assert learned(load_text(tmp_path / "b.parquet", tokenizer)) == expected
    inner = tmp_path / "folder" / "inside"
    inner.mkdir(parents=True)
    (inner / ".hidden.txt").write_text("no")
    (inner / "notes.md").write_text("no")
    for number, record in enumerate(records):
        (inner / f"{number}.txt").write_text(record["text"])
    text = load_text(tmp_path / "folder", tokenizer)
    assert learned(text) == expected
    assert text.name == "folder"


def test_conversations_of_parquet_are_those_of_json_lines(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"messages": CHAT}, {"messages": [*CHAT[:2], {"role": "assistant", "content": "x", "name": "me"}]}]
    table = import_module("pyarrow").Table.from_pylist(records)  # which fills the names of all others with None
    import_module("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    text, expected = load_text(tmp_path / "a.parquet", tokenizer), load(tmp_path, records, tokenizer)
    assert len(text) == len(expected) == 2
    for index in range(2):
        for first, second in zip(text.tokens(index), expected.tokens(index), strict=True):
            assert first.tolist() == second.tolist()


def test_a_saved_data_set_needs_its_library(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("kdcache.data.text_records.import_module", missing)
    with pytest.raises(UsageError, match="was written by the library datasets, which is not installed"):
        load_text(tmp_path, tokenizer)


def test_a_saved_data_set_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"text": text} for text in DOCUMENTS[:3]]
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    expected = learned(load_text(write_lines(tmp_path / "a.jsonl", records), tokenizer))
    assert learned(load_text(tmp_path / "saved", tokenizer)) == expected
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UsageError, match="has several splits: train"):
        load_text(tmp_path / "splits", tokenizer)
    assert learned(load_text(tmp_path / "splits" / "train", tokenizer)) == expected


def test_damaged_files_are_refused_with_their_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a b"}\n\n{"text": "c')
    with pytest.raises(CorruptError, match=r"lines.jsonl, line 3 is not JSON \(.* at character 10\): .*truncated"):
        load_text(lines, tokenizer)
    parquet = import_module("pyarrow.parquet")
    parquet.write_table(import_module("pyarrow").table({"text": DOCUMENTS}), tmp_path / "cut.parquet")
    whole = (tmp_path / "cut.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match=r"cut.parquet cannot be read as parquet"):
        load_text(tmp_path / "cut.parquet", tokenizer)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(CorruptError, match=r"latin.txt is not UTF-8 text: byte 0"):
        load_text(tmp_path / "latin.txt", tokenizer)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ('{"text": 3}', {}, "'text' is a number, not a string"),
    ("[1, 2]", {}, "it is a list, not an object with keys"),
    ('{"txt": "a"}', {}, "it has the keys 'txt', and none for a known format"),
    ('{"txt": "a"}', {"column": "text"}, "none for a known format, did you mean txt?"),
    ('{"prompt": "a"}', {}, "none for a known format"),
    ('{"prompt": "a"}', {"format": "prompt-completion"}, "none for prompt-completion"),
    ('{"messages": "a"}', {}, "it has no list of messages"),
    ('{"messages": [{"content": "a"}]}', {}, "message 0 has no role"),
    ('{"text": "a b"}', {"taught": "completion"}, "texts have no completion"),
    ('{"text": "a b"}', {"max_length": 1}, "max_length is 1"),
]


@pytest.mark.parametrize(("line", "options", "message"), MISTAKES)
def test_mistakes_are_named(
    line: str, options: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError) as raised:
        load_text(tmp_path / "data.jsonl", tokenizer, **options)
    assert message in raised.value.what
    assert options.get("taught") or options.get("max_length") or "data.jsonl, line 1: " in raised.value.what


def test_files_that_are_not_there_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file not found"):
        load_text(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(UsageError, match="has no files of text"):
        load_text(tmp_path, tokenizer)
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(UsageError, match=r"data.csv is a .csv, which is not known"):
        load_text(tmp_path / "data.csv", tokenizer)
    (tmp_path / "list.json").write_text('[{"text": "a b"}]')
    with pytest.raises(UsageError, match=r"list.json is a JSON list, not one object per line"):
        load_text(tmp_path / "list.json", tokenizer)
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(UsageError, match="there are no records to tokenize"):
        load_text(tmp_path / "data.jsonl", tokenizer)
    with pytest.raises(UsageError, match="a tokenizer is needed for records of text"):
        load(tmp_path, [{"text": "a"}], None)


def test_a_wrong_record_among_others_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": "a b"}] * 300 + [{"other": 1}]
    with pytest.raises(UsageError, match=r"data.jsonl, line 301: it has no 'text'\n"):
        load(tmp_path, records, tokenizer)


# The store.


@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 2**16),
    size=st.sampled_from([300, 2**16, 2**16 + 1, 2**30]),
)
def test_sequences_come_back_from_few_bytes(lengths: list[int], seed: int, size: int) -> None:
    store, random = TokenStore(size), np.random.default_rng(seed)
    made = [(random.integers(0, size, length), random.random(length) < 0.5) for length in lengths]
    for ids, taught in made:
        store.add(ids, taught)
    assert len(store) == len(made)
    assert store.lengths().tolist() == lengths
    for index, (ids, taught) in enumerate(made):
        again, mask = store.tokens(index)
        assert again.dtype == (np.uint16 if size <= 2**16 else np.uint32)
        assert (again.tolist(), mask.tolist()) == (ids.tolist(), taught.tolist())


def test_records_are_json_objects_of_any_order_of_keys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 3, "text": "a b"}) + "\n")
    assert len(load_text(tmp_path / "x.jsonl", tokenizer)) == 1


def test_the_template_and_the_conversation_of_the_guide_teach_the_answers(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "LANGUAGE_MODELS.md").read_text(encoding="utf-8")
    template, conversation = (guide.split(f"```{kind}\n")[1].split("```")[0] for kind in ("jinja", "json"))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", template))
    (tmp_path / "data.jsonl").write_text(conversation)
    text = load_text(tmp_path / "data.jsonl", tokenizer)
    assert tokenizer.inner.decode(learned(text)).split() == ["5", "9"]
    assert tokenizer.inner.decode(text.tokens(0)[0]) == "user: 2 + 3?\nassistant: 5\nuser: And 4 more?\nassistant: 9\n"
