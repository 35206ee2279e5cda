"""Whole runs of language models: what they write, what they measure, and what is refused before the first step."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import ok, refused
from helpers.language_training import Taught, cache_of, taught, text_pipeline
from helpers.students import command
from helpers.texts import RECORDS, write_lines, write_pipeline, write_tokenizer
from torch.nn import functional as F

from kdcache import Cache, open_cache, write_token_cache
from kdcache.config.text import TextPipeline
from kdcache.data.tokenizer import load_tokenizer
from kdcache.errors import KdcacheError, MismatchError, UsageError
from kdcache.train.inputs import CacheOptions
from kdcache.train.tokens.train import LanguageRunResult, train_language_student

MANY = [9, 4, 23, 3, 7, 12, 2, 30, 16, 8, 8, 5]


class Home:
    """A cache, and the sequences and logits that it was written from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given: Taught = taught(MANY)
        self.cache: Cache = cache_of(self.given, folder / "t.kdcache")

    def train(self, out: Path, cache: Cache | None = None, **sections: Any) -> LanguageRunResult:
        return train_language_student(text_pipeline(**sections), cache or self.cache, out)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("text"))


def transformers_loads(folder: Path) -> Any:
    return import_module("transformers").AutoModelForCausalLM.from_pretrained(folder)


def test_transformers_loads_the_selected_weights(home: Home, tmp_path: Path) -> None:
    result = home.train(tmp_path / "run")
    loaded = transformers_loads(result.folder)
    for name, value in result.model.network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "curves.png",
        "metrics.csv",
        "metrics.json",
        "model",
        "resolved.yaml",
        "versions.json",
    ]


# Epochs are compared with the weights after the warm-up, or the loss would rise with the weight of the teacher.
@pytest.mark.parametrize("warmup_epochs", [0, 4])
def test_held_out_figures_are_those_of_whole_logits(warmup_epochs: int, home: Home, tmp_path: Path) -> None:
    loss = {"name": "kd", "warmup_epochs": warmup_epochs}
    result = home.train(tmp_path / "run", train={"held_out_fraction": 0.4, "epochs": 1}, loss=loss)
    from kdcache.train.tokens.inputs import held_out_sequences

    network = transformers_loads(result.folder).double()
    student, teacher, labels = [], [], []
    held = held_out_sequences(len(MANY), 0.4)
    assert len(held) == 5
    for index in held:
        sequence = home.given.sequences[index]
        at = sequence.taught.nonzero().squeeze(1)
        with torch.no_grad():
            student.append(network(input_ids=sequence.tokens[None]).logits[0, at])
        teacher.append(home.given.logits[index])
        labels.append(sequence.tokens[at + 1])
    ours, theirs, following = torch.cat(student), torch.cat(teacher), torch.cat(labels)
    kl = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean").item()
    cross_entropy = F.cross_entropy(ours, following).item()
    best = result.best
    assert best.kl == pytest.approx(kl, rel=1e-5)
    assert best.perplexity == pytest.approx(math.exp(cross_entropy), rel=1e-5)
    assert best.agreement == pytest.approx((ours.argmax(1) == theirs.argmax(1)).double().mean().item())
    assert best.held_out_loss == pytest.approx(0.9 * kl + 0.1 * cross_entropy, rel=1e-5)


def test_the_epoch_with_the_lowest_held_out_loss_is_selected(home: Home, tmp_path: Path) -> None:
    result = home.train(tmp_path / "run", train={"held_out_fraction": 0.3, "epochs": 6, "lr": 0.2})
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["held_out_loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 6
    assert result.best.epoch == 1 + losses.index(min(losses)) < 6


def test_training_stops_early(home: Home, tmp_path: Path) -> None:
    train = {"held_out_fraction": 0.3, "epochs": 30, "lr": 0.2, "early_stopping_patience": 2}
    result = home.train(tmp_path / "run", train=train)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == result.best.epoch + 2


def test_the_same_seed_gives_the_same_weights_and_another_one_others(home: Home, tmp_path: Path) -> None:
    first, second, other = (
        home.train(tmp_path / name, train={"seed": seed}) for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    for name, value in first.model.network.state_dict().items():
        assert torch.equal(second.model.network.state_dict()[name], value)
    assert not torch.equal(first.model.output.weight, other.model.output.weight)


def test_a_complete_run_is_returned_and_another_one_refused(home: Home, tmp_path: Path) -> None:
    done = home.train(tmp_path / "run")
    again = home.train(tmp_path / "run")
    assert again.best == done.best
    assert torch.equal(again.model.output.weight, done.model.output.weight)
    with pytest.raises(KdcacheError, match=r"complete run with other settings: student.train.lr was 0.01, and is 0.5"):
        home.train(tmp_path / "run", train={"lr": 0.5})


def test_a_loss_that_diverges_leaves_nothing(home: Home, tmp_path: Path) -> None:
    pipeline = text_pipeline(train={"lr": 1e30, "optimizer": "sgd", "max_grad_norm": None, "epochs": 3})
    (tmp_path / "text.yaml").write_text(pipeline.to_yaml())
    out = tmp_path / "run"
    done = command("train-student", tmp_path / "text.yaml", "--cache", home.cache.path, "-o", out)
    assert done.exit_code == 5, done.output
    assert "the loss became" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.yaml"]


@pytest.mark.parametrize("placement", ["host", "mmap", "stream"])
def test_every_placement_trains(placement: Any, home: Home, tmp_path: Path) -> None:
    pipeline = text_pipeline(train={"held_out_fraction": 0.2, "max_length": 10})
    result = train_language_student(pipeline, home.cache, tmp_path / "run", CacheOptions(placement))
    assert math.isfinite(result.best.loss)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["placement"] == [placement]


@pytest.mark.parametrize("loss", ["ce", "dtkd", "rkl", "dkd", "zscore", "lsr", "ctkd", "mse", "cwsm", "ka+dtd"])
def test_every_loss_of_positions_trains(loss: str, tmp_path: Path, home: Home) -> None:
    cache = cache_of(home.given, tmp_path / "t.kdcache", top_k=8, tail="lowrank", rank=6, pilot_rows=60)
    result = home.train(tmp_path / "run", cache, loss={"name": loss}, train={"micro_batch_tokens": 20})
    assert math.isfinite(result.best.loss)


def test_students_from_folders_and_functions_keep_their_weights(home: Home, tmp_path: Path) -> None:
    first = home.train(tmp_path / "first")
    second = home.train(tmp_path / "second", model=f"hf:{first.folder}", args={}, train={"lr": 1e-12, "epochs": 1})
    torch.testing.assert_close(second.model.output.weight, first.model.output.weight, rtol=0, atol=1e-8)
    code = (
        f"from transformers import AutoModelForCausalLM as A\ndef f(): return A.from_pretrained({str(first.folder)!r})"
    )
    (tmp_path / "code.py").write_text(code)
    third = home.train(tmp_path / "third", model=f"{tmp_path / 'code.py'}:f", args={}, train={"lr": 1e-12, "epochs": 1})
    torch.testing.assert_close(third.model.output.weight, second.model.output.weight, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_an_adapter_of_peft_is_trained_and_merged(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "lora.py").write_text(
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def student(vocab_size):\n"
        "    config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,\n"
        "        num_attention_heads=2, max_position_embeddings=64)\n"
        "    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, task_type='CAUSAL_LM'))\n"
    )
    pipeline: dict[str, Any] = {
        "model": f"{tmp_path / 'lora.py'}:student",
        "args": {},
        "train": {"held_out_fraction": 0.2, "lr": 0.1},
    }
    result = home.train(tmp_path / "run", **pipeline)
    network: Any = result.model.network
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    adapters = sum(value.numel() for name, value in network.named_parameters() if "lora" in name)
    assert 0 < metrics["trained_parameters"] == adapters < metrics["parameters"]
    tokens = home.given.sequences[2].tokens[None]
    merged = transformers_loads(tmp_path / "run" / "model")
    with torch.no_grad():
        expected = network.eval()(input_ids=tokens).logits
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    again = home.train(tmp_path / "run", **pipeline)
    assert again.best == result.best


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "context": (
        {"args": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 20}},
        "sequences have up to 30 tokens, and LlamaForCausalLM takes 20",
        "student.train.max_length to 20",
    ),
    "vocabulary": (
        {"args": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 100}},
        "the vocabulary of the cache has 120 tokens, and the head of LlamaForCausalLM 100",
        "tokenizer",
    ),
    "packing": (
        {
            "model": "transformers:mamba",
            "args": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
            "train": {"packed": True},
        },
        "does not keep packed sequences apart",
        "student.train.packed to false",
    ),
    "a loss": ({"loss": {"name": "pld"}}, "plackett_luce is refused for tokens: it sorts", "kd"),
    "outputs": (
        {"loss": {"name": "kd", "outputs": {"features": {"name": "mse"}}}},
        "loss.outputs compares features",
        "remove it",
    ),
    "too few": ({"train": {"held_out_fraction": 0.01}}, "would hold out 0 of 12 sequences", "raise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_student_that_does_not_fit_is_refused_and_leaves_nothing(case: str, home: Home, tmp_path: Path) -> None:
    sections, what, fix = REFUSED[case]
    with pytest.raises(KdcacheError, match=what) as refused:
        home.train(tmp_path / "run", **sections)
    assert fix in refused.value.fix
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_temperature_are_refused(home: Home, tmp_path: Path) -> None:
    cache = cache_of(home.given, tmp_path / "t.kdcache", tail="draws", draws=20, dtype="float16")
    with pytest.raises(UsageError, match="T = 2 is asked of rows that were drawn at T = 1 only"):
        home.train(tmp_path / "run", cache, loss={"name": "kd", "temperature": {"tau": 2.0}})
    assert home.train(tmp_path / "run", cache, train={"held_out_fraction": 0.2}).best.kl is None


def test_caches_and_options_of_images_are_refused(home: Home, tmp_path: Path) -> None:
    pipeline = text_pipeline()
    for options, what in ((CacheOptions(align=True), "--align"), (CacheOptions(allow_other_pixels=True), "other-pix")):
        with pytest.raises(UsageError, match=what):
            train_language_student(pipeline, home.cache, tmp_path / "run", options)
    with pytest.raises(UsageError, match="none is given"):
        train_language_student(pipeline, None, tmp_path / "run")
    with pytest.raises(UsageError, match="2 are given"):
        train_language_student(pipeline, [home.cache, home.cache], tmp_path / "run")


def test_seven_is_not_a_network(home: Home, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def f(vocab_size): return 7\n")
    with pytest.raises(UsageError, match="returned a int, not a network"):
        home.train(tmp_path / "run", model=f"{tmp_path / 'code.py'}:f", args={})


def test_the_temperature_is_1_where_none_is_given() -> None:
    for loss in ({}, {"name": "kd"}, {"name": "dtkd"}, {"name": "dkd"}, {"temperature": {"kind": "dtkd"}}):
        assert text_pipeline(loss=loss).loss.tau == 1.0, loss
    assert text_pipeline(loss={"name": "kd", "temperature": {"tau": 3.0}}).loss.tau == 3.0
    assert text_pipeline().loss.tau == 1.0
    assert text_pipeline(loss={"name": "ce"}).loss.name == "ce"


# The tokenizer


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cache]:
    """A folder with a tokenizer and a network, and a cache of its vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    size = 300
    write_tokenizer(folder / "student", size=size)
    transformers = import_module("transformers")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=320, **small))
    network.save_pretrained(folder / "student")
    tokens = load_tokenizer(folder / "student").vocabulary.tokens
    sequences = [torch.randint(size, (9,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    logits = [torch.randn(9, size, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    cache = write_token_cache([each.numpy() for each in sequences], logits, folder / "t.kdcache", vocabulary=tokens)
    return folder / "student", cache


def test_a_student_with_the_tokenizer_of_the_teacher_and_padding_behind_it_is_trained(
    worded: tuple[Path, Cache], tmp_path: Path
) -> None:
    student, cache = worded
    result = train_language_student(text_pipeline(f"hf:{student}", {}), cache, tmp_path / "run")
    assert result.model.output.weight.shape == (320, 16)
    assert (result.folder / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_new_student_ends_texts_as_the_teacher_does(has_teacher: bool, text_teacher: Path, tmp_path: Path) -> None:
    """Whose vocabulary has other ids for its special tokens than those that transformers gives a Llama."""
    teacher = write_tokenizer(tmp_path / "teacher")
    for name in ("config.json", "model.safetensors"):
        (teacher / name).write_bytes((text_teacher / name).read_bytes())
    settings = json.loads((teacher / "tokenizer_config.json").read_text()) | {"eos_token": "<|user|>"}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    eos = load_tokenizer(teacher).vocabulary.special["eos"]
    assert eos not in (1, 2)
    pipeline = write_pipeline(tmp_path / "p.yaml", write_lines(tmp_path / "text.jsonl", RECORDS), teacher)
    ok("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", "--device", "cpu")
    args = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    given = text_pipeline(args=args, train={"epochs": 1})
    described = {"model": f"hf:{teacher}"} if has_teacher else None
    whole = TextPipeline.model_validate({**given.model_dump(), "teacher": described})
    result = train_language_student(whole, open_cache(tmp_path / "c.kdcache"), tmp_path / "run")
    network: Any = result.model.network
    for settings_of in (network.config, network.generation_config):
        assert (settings_of.eos_token_id, settings_of.bos_token_id, settings_of.pad_token_id) == (eos, None, 0)
    loaded = transformers_loads(result.folder)
    assert (loaded.generation_config.eos_token_id, loaded.config.eos_token_id) == (eos, eos)
    assert (result.folder / "tokenizer.json").exists() == has_teacher
    if has_teacher:
        assert load_tokenizer(result.folder).vocabulary.special["eos"] == eos


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(
    worded: tuple[Path, Cache], tmp_path: Path
) -> None:
    student, cache = worded
    other = shutil.copytree(student, tmp_path / "other")
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = (token for token, index in sorted(vocabulary.items(), key=lambda pair: pair[1])[40:42])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(described))
    index = vocabulary[second]
    tokens = cache.vocabulary
    assert tokens is not None
    words = f"token {index} is {tokens[index]!r} in the cache, and {tokens[index + 1]!r} in the tokenizer in {other}"
    with pytest.raises(MismatchError, match=re.escape(words)):
        train_language_student(text_pipeline(f"hf:{other}", {}), cache, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    said = refused(4, "evaluate", other, "--cache", cache.path)
    assert words in " ".join(said.split())
