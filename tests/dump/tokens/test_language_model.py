"""Rows of a language model against its dense logits; resuming, ranks and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.texts import DOCUMENTS, VOCABULARY_SIZE, write_lines, write_teacher, write_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache import Cache, TokenTargets
from kdcache.cache.format import stored_bases
from kdcache.cache.format.read_records import read_plan
from kdcache.cache.inspect.audit import audit
from kdcache.cache.sequence_plan import OUTPUT
from kdcache.data.text import TokenizedText, load_text
from kdcache.dump.tokens import running
from kdcache.dump.tokens.dump import dump_language_model
from kdcache.dump.tokens.running import cut_batches
from kdcache.errors import CorruptError, InterruptedRun, MismatchError, UsageError
from kdcache.losses.token_targets import head_and_tail
from kdcache.models.causal_lm import CausalLM
from kdcache.models.from_transformers_lm import load_causal_lm, new_causal_lm
from kdcache.runtime.progress import Silent

SETTINGS = {"top_k": 4, "rank": 6, "pilot_rows": 200, "shard_sequences": 20, "batch_tokens": 200}


@pytest.fixture(scope="module")
def text(text_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizedText:
    """Sequences of 2 to 48 tokens."""
    records = [{"text": document} for document in [*DOCUMENTS[:4], "a b", "so", "the list of names"]]
    return load_text(write_lines(tmp_path_factory.mktemp("text") / "t.jsonl", records), text_teacher, max_length=48)


@pytest.fixture
def model(text_teacher: Path) -> CausalLM:
    return load_causal_lm(str(text_teacher))


def dump(model: CausalLM, text: TokenizedText, out: Path, **options: Any) -> Cache:
    return dump_language_model(model, text, out, **{**SETTINGS, **options})


def dense(model: CausalLM, text: TokenizedText, index: int) -> Tensor:
    """The logits of the whole network at the taught positions of a sequence, alone in a batch, [n, V] float64."""
    ids, taught = text.tokens(index)
    with torch.no_grad():
        logits: Tensor = model.network(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return logits[torch.from_numpy(taught)][:, : text.vocabulary_size].double()


def targets_of(cache: Cache, index: int) -> TokenTargets:
    cached = cache.sequences()
    return cached.targets(cached([index]).rows)


def check_rows(cache: Cache, model: CausalLM, text: TokenizedText, tolerance: float = 1e-3) -> None:
    """Check head, next token, level and masses of all rows against dense float64."""
    cached = cache.sequences()
    for index in range(len(text)):
        logits, batch = dense(model, text, index), cached([index])
        targets, rows = cached.targets(batch.rows), batch.rows
        torch.testing.assert_close(rows.part("logsumexp").double(), logits.logsumexp(1), atol=tolerance, rtol=1e-5)
        log_probs = logits.log_softmax(1)
        of_head = log_probs.gather(1, targets.indices)
        torch.testing.assert_close(targets.log_probs.double(), of_head, atol=tolerance, rtol=1e-3)
        torch.testing.assert_close(of_head, log_probs.topk(4).values, atol=tolerance, rtol=1e-3)
        label = log_probs.gather(1, batch.next_tokens[:, None]).squeeze(1)
        torch.testing.assert_close(rows.part("statistics")[:, 0].double(), label, atol=10 * tolerance, rtol=1e-3)
        for t in (1.0, 2.0):
            p = (logits / t).softmax(1)
            mass = 1 - p.gather(1, targets.indices).sum(1)
            torch.testing.assert_close(
                head_and_tail(targets, t)[1].exp().squeeze(1).double(), mass, atol=2 * tolerance, rtol=0
            )


@pytest.mark.parametrize("tail", ["lowrank", "ghost"])
def test_rows_are_those_of_the_dense_logits(tail: str, model: CausalLM, text: TokenizedText, tmp_path: Path) -> None:
    cache = dump(model, text, tmp_path / "c.kdcache", tail=tail)
    assert (cache.manifest.plan.dataset.name, len(cache)) == ("t", len(text))
    assert cache.manifest.plan.batch_size == 200
    assert cache.vocabulary is not None
    assert len(cache.vocabulary) == VOCABULARY_SIZE  # the head has padding behind these
    check_rows(cache, model, text)
    assert audit(cache.path).failure is None
    for index in range(len(text)):
        ids, taught = text.tokens(index)
        tokens, mask = cache.sequences().tokens(index)
        assert (tokens.tolist(), mask.tolist()) == (ids.tolist(), taught.tolist())


HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 24},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_with_scale_bound_or_bias(kind: str, text: TokenizedText, tmp_path: Path) -> None:
    torch.manual_seed(3)
    options = {
        "vocab_size": VOCABULARY_SIZE + 8,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        **HEADS[kind],
    }
    if kind == "opt":
        options = {key: value for key, value in options.items() if not key.startswith(("num_key", "intermediate"))}
    model = new_causal_lm(kind, options)
    with torch.no_grad():
        model.output.weight.mul_(20)
        if model.output.bias is not None:
            model.output.bias.normal_()
    check_rows(dump(model, text, tmp_path / "c.kdcache"), model, text)


def test_the_axes_are_the_principal_ones_of_dense_logits(model: CausalLM, text: TokenizedText, tmp_path: Path) -> None:
    cache = dump(model, text, tmp_path / "c.kdcache", pilot_rows=10_000)
    logits = torch.cat([dense(model, text, index) for index in range(len(text))])
    centered = logits - logits.mean(dim=0)
    basis: Any = stored_bases.read_output_basis(cache.path, cache.manifest.plan, OUTPUT)
    torch.testing.assert_close(basis.mean.double(), logits.mean(dim=0), atol=1e-4, rtol=1e-4)
    axes = basis.basis.double()
    torch.testing.assert_close(axes @ axes.T, torch.eye(6, dtype=torch.float64), atol=2e-3, rtol=0)
    best = torch.linalg.svd(centered, full_matrices=False).Vh[:6]
    assert torch.linalg.svdvals(axes @ best.T).min() > 1 - 1e-4  # float16


def test_draws_are_seeded_by_the_sequence(model: CausalLM, text: TokenizedText, tmp_path: Path) -> None:
    options = {"tail": "draws", "draws": 40, "temperature": 2.0}
    cache = dump(model, text, tmp_path / "a.kdcache", **options)
    again = dump(model, text, tmp_path / "b.kdcache", **{**options, "shard_sequences": 7})
    for index in (0, 9):
        one, other = targets_of(cache, index), targets_of(again, index)
        assert one.draws is not None
        assert other.draws is not None
        assert all(first.equal(second) for first, second in zip(one.draws, other.draws, strict=True))
        tokens, counts = one.draws
        assert counts.sum(dim=1).eq(40).all()
        p = (dense(model, text, index) / 2).softmax(1)
        expected = (p * p.log()).sum(1).mean()
        said = ((p.log().gather(1, tokens) * counts).sum(1) / 40).mean()
        assert abs(said - expected) < 0.3


def test_bfloat16_is_the_precision_of_the_body(text_teacher: Path, text: TokenizedText, tmp_path: Path) -> None:
    model = load_causal_lm(str(text_teacher), torch.bfloat16)
    cache = dump(model, text, tmp_path / "c.kdcache", precision="bf16")
    assert cache.manifest.plan.teacher.precision == "bf16"
    check_rows(cache, load_causal_lm(str(text_teacher)), text, tolerance=0.3)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Records the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, list | tuple) else [made]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                self.elements = max(self.elements, value.numel())
        return made


def test_logits_of_a_batch_never_exist(
    model: CausalLM, text: TokenizedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = 8 * VOCABULARY_SIZE
    monkeypatch.setattr(running, "_LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr("kdcache.cache.token_basis._ROWS_AT_ONCE", 8)
    with Largest() as largest:
        dump(model, text, tmp_path / "c.kdcache", batch_tokens=1000)
    assert largest.elements <= 1000 * 48  # of the body: its widest activations
    assert 8 * largest.elements < 1000 * VOCABULARY_SIZE


def test_batches_are_of_sequences_of_nearly_one_length() -> None:
    batches = cut_batches(np.array([5, 40, 9, 33, 2, 17, 80, 12, 60]), 80)
    assert batches == [[6], [8], [1, 3], [5, 7, 2, 0], [4]]
    assert sorted(index for batch in batches for index in batch) == list(range(9))


# Resuming.


class StopsAt(Silent):
    """Interrupts a dump, as Ctrl-C does, when it has made some rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def task(self, what: str, total: int, unit: str) -> Any:
        return self if what == "teacher" else super().task(what, total, unit)

    def __enter__(self) -> StopsAt:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(text_teacher: Path, text: TokenizedText, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return dump(load_causal_lm(str(text_teacher)), text, tmp_path_factory.mktemp("whole") / "c.kdcache")


def stops(text: TokenizedText) -> Iterator[int]:
    rows = sum(int(text.tokens(index)[1].sum()) for index in range(len(text)))
    yield from (1, rows // 3, rows // 2, rows - 1)


def test_an_interrupted_dump_resumes_to_the_same_digest(
    model: CausalLM, text: TokenizedText, whole: Cache, tmp_path: Path
) -> None:
    for number, rows in enumerate(stops(text)):
        out = tmp_path / f"{number}.kdcache"
        with pytest.raises(InterruptedRun, match="keeps its finished shards"):
            dump(model, text, out, progress=StopsAt(rows))
        assert read_plan(out / "plan.json") == whole.manifest.plan
        assert dump(model, text, out).manifest.digest == whole.manifest.digest


def test_other_settings_are_refused_with_both_values(
    model: CausalLM, text: TokenizedText, whole: Cache, text_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    with pytest.raises(InterruptedRun):
        dump(model, text, out, progress=StopsAt(300))
    for options, message in (
        ({"top_k": 5}, "top_k: 4, 5"),
        ({"batch_tokens": 100}, "batch_size: 200, 100"),
        ({"step": 0.5}, "step: 0.4, 0.5"),
        ({"name": "other"}, "teacher.name: teacher, other"),
    ):
        with pytest.raises(MismatchError, match=message):
            dump(model, text, out, **options)
    other = load_causal_lm(str(text_teacher))
    with torch.no_grad():
        other.output.weight[0, 0] += 1
    with pytest.raises(MismatchError, match="weights_digest"):
        dump(other, text, out)
    assert dump(model, text, out).manifest.digest == whole.manifest.digest
    assert dump(model, text, out).manifest.digest == whole.manifest.digest  # complete: nothing to do
    with pytest.raises(UsageError, match=r"is already a sealed cache, with other settings[\s\S]*top_k: 4, 5"):
        dump(model, text, out, top_k=5)


# What is refused.


def check_refused(out: Path, error: type[Exception], message: str, model: Any, sequences: Any, **options: Any) -> None:
    """Check that a dump is refused, and that nothing is left."""
    with pytest.raises(error, match=message):
        dump_language_model(model, sequences, out, **{**SETTINGS, **options})
    assert not list(out.parent.glob("*.kdcache*"))


def test_teachers_that_do_not_fit_are_refused_and_leave_nothing(
    model: CausalLM, text: TokenizedText, text_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    check_refused(out, MismatchError, "weights are float32, and cache.precision is bf16", model, text, precision="bf16")
    rank = {"rank": 30}
    check_refused(
        out, UsageError, "a tail of rank 30, and the teacher's hidden states have a width of 24", model, text, **rank
    )
    check_refused(out, UsageError, "top_k 400, rank 6, step 0.4 are impossible for 400 tokens", model, text, top_k=400)
    network: Any = load_causal_lm(str(text_teacher)).network
    network.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.tanh())
    check_refused(out, UsageError, "differ by .* from those of a linear head", network, text)
    check_refused(out, UsageError, "Linear has no body", nn.Linear(2, 2), text)
    short = new_causal_lm("llama", {**vars(model.network.config), "max_position_embeddings": 40})
    check_refused(out, MismatchError, "sequences have up to 48 tokens, and LlamaForCausalLM takes 40", short, text)
    small = new_causal_lm("llama", {**vars(model.network.config), "vocab_size": 399})
    check_refused(out, MismatchError, "vocabulary has 400 tokens, and the head of LlamaForCausalLM 399", small, text)


def test_numbers_that_are_not_finite_are_refused_by_their_sequence(
    model: CausalLM, text: TokenizedText, tmp_path: Path
) -> None:
    network: Any = model.network
    with torch.no_grad():
        network.model.embed_tokens.weight[int(text.tokens(1)[0][3])] = torch.nan
    check_refused(tmp_path / "c.kdcache", CorruptError, r"hidden states of sequence \d+ are NaN", model, text)
    pattern = r"hidden state of sequence \d+, token \d+, is NaN"
    check_refused(tmp_path / "c.kdcache", CorruptError, pattern, model, text, tail="ghost")


def test_a_batch_that_does_not_fit_the_memory_is_named(
    model: CausalLM, text: TokenizedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CausalLM, "hidden_states", full)
    check_refused(tmp_path / "c.kdcache", UsageError, "4 sequences of 48 tokens do not fit the memory", model, text)


def test_sequences_in_memory_are_dumped_and_checked(model: CausalLM, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    sequences = [np.arange(3, 20), np.arange(30, 42)]
    taught = [np.arange(17) % 2 == 0, np.arange(12) < 11]
    taught[0][-1] = False
    check_refused(out, UsageError, "the vocabulary of the sequences is not given", model, sequences)
    check_refused(
        out, MismatchError, "1 taught are given for 2 sequences", model, sequences, vocabulary=400, taught=[1]
    )
    last = [np.arange(17) == 16, taught[1]]
    check_refused(out, UsageError, "is taught at its last token, 16", model, sequences, vocabulary=400, taught=last)
    check_refused(out, UsageError, "the vocabulary has 40", model, sequences, vocabulary=40)
    cache = dump_language_model(model, sequences, out, vocabulary=400, taught=taught, tail="ghost", dataset="mine")
    assert cache.manifest.plan.dataset.name == "mine"
    assert cache.vocabulary is None
    assert [int(cache.sequences().tokens(index)[1].sum()) for index in (0, 1)] == [8, 11]
    with pytest.raises(UsageError, match="the options of the cache"):
        dump_language_model(model, sequences, tmp_path / "d.kdcache", vocabulary=400, top=3)


def test_another_tokenizer_gives_another_vocabulary(
    model: CausalLM, text: TokenizedText, whole: Cache, text_teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(text_teacher, tmp_path / "other")
    write_tokenizer(tmp_path / "other", size=380)
    other = load_text(write_lines(tmp_path / "t.jsonl", [{"text": "a b c"}]), tmp_path / "other", max_length=48)
    assert not isinstance(other.vocabulary, int)
    with pytest.raises(MismatchError, match=r"has 380 tokens, and the vocabulary of the cache has 400"):
        whole.check_vocabulary(other.vocabulary.tokens)


def test_shards_take_some_minutes_at_most(
    model: CausalLM, text: TokenizedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"shard_sequences": None, "tail": "ghost"}
    assert dump(model, text, tmp_path / "one.kdcache", **options).manifest.plan.shards == 1
    monkeypatch.setattr("kdcache.dump.tokens.job._CPU_OPERATIONS", 2e8)
    many = dump(model, text, tmp_path / "many.kdcache", **options)
    assert many.manifest.plan.shards > 3
    monkeypatch.setattr("kdcache.dump.tokens.job._CPU_OPERATIONS", 1e8)
    assert dump(model, text, tmp_path / "many.kdcache", **options).manifest.digest == many.manifest.digest


def test_a_folder_of_another_seed_is_another_teacher(text: TokenizedText, whole: Cache, tmp_path: Path) -> None:
    other = load_causal_lm(str(write_teacher(tmp_path / "other", seed=1)))
    cache = dump(other, text, tmp_path / "c.kdcache")
    assert cache.manifest.digest != whole.manifest.digest
    assert cache.manifest.plan.dataset == whole.manifest.plan.dataset
