"""Language models side by side: evaluate, sweep and report, against whole logits of transformers."""

from __future__ import annotations

import json
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import ok, refused
from helpers.language_training import Taught, cache_of, taught, text_pipeline
from torch.nn import functional as F

from kdcache.evaluation.metrics import expected_calibration_error
from kdcache.train.tokens.inputs import held_out_sequences

LENGTHS = [9, 4, 23, 3, 7, 12, 2, 30, 16, 8, 8, 5]


class Home:
    """Two caches of the same teacher, a pipeline, and a sweep of two losses over two seeds."""

    def __init__(self, folder: Path) -> None:
        self.given: Taught = taught(LENGTHS)
        self.cache, self.draws = folder / "t.kdcache", folder / "draws.kdcache"
        cache_of(self.given, self.cache)
        cache_of(self.given, self.draws, tail="draws", draws=20, dtype="float16")
        self.pipeline, self.sweep = folder / "text.yaml", folder / "sweep"
        self.pipeline.write_text(text_pipeline(train={"held_out_fraction": 0.3}).to_yaml())
        self.said = ok(
            *("sweep", self.pipeline, "--cache", self.cache, "--over", "loss=kd,ce", "--seeds", "2"),
            *("-o", self.sweep, "--device", "cpu"),
        )

    def run(self, loss: str, seed: int = 5) -> Path:
        return self.sweep / f"loss={loss}" / f"seed{seed}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("models"))


def whole_logits(model: Path, given: Taught, which: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a network and of the teacher at the taught positions of sequences, and the next tokens."""
    network: Any = import_module("transformers").AutoModelForCausalLM.from_pretrained(model).double()
    student, labels = [], []
    for index in which:
        tokens, at = given.sequences[index].tokens, given.sequences[index].taught.nonzero().squeeze(1)
        with torch.no_grad():
            student.append(network(input_ids=tokens[None]).logits[0, at])
        labels.append(tokens[at + 1])
    return torch.cat(student), torch.cat([given.logits[index] for index in which]), torch.cat(labels)


def check_score(score: dict[str, Any], model: Path, given: Taught, which: list[int]) -> None:
    ours, theirs, labels = whole_logits(model, given, which)
    cross_entropy = F.cross_entropy(ours, labels).item()
    kl = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean").item()
    assert score["positions"] == len(labels)
    assert score["sequences"] == len(which)
    assert score["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(cross_entropy), rel=1e-5)
    assert score["kl"] == pytest.approx(kl, rel=1e-5)
    assert score["accuracy"] == pytest.approx((ours.argmax(1) == labels).double().mean().item())
    assert score["agreement"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).double().mean().item())
    assert score["calibration_error"] == pytest.approx(expected_calibration_error(ours, labels), abs=1e-5)


def test_evaluate_measures_held_out_sequences_as_whole_logits_do(home: Home) -> None:
    said = json.loads(ok("evaluate", home.run("kd"), home.run("ce"), "--cache", home.cache, "--json"))
    held = held_out_sequences(len(LENGTHS), 0.3)
    for score, loss in zip(said["scores"], ("kd", "ce"), strict=True):
        assert score["seen"] == "held out"
        check_score(score, home.run(loss) / "model", home.given, held)


def test_a_folder_of_transformers_and_another_cache_are_measured_on_all_sequences(home: Home, tmp_path: Path) -> None:
    other = cache_of(home.given, tmp_path / "other.kdcache", shard_sequences=5)
    model = home.run("kd") / "model"
    said = json.loads(ok("evaluate", model, home.run("kd"), "--cache", other.path, "--json"))
    for score in said["scores"]:
        assert score["seen"] == "others"
        check_score(score, model, home.given, list(range(len(LENGTHS))))
    few = json.loads(ok("evaluate", model, "--cache", other.path, "--rows", "3", "--json"))
    check_score(few["scores"][0], model, home.given, [0, 1, 2])


def test_networks_in_one_table_are_measured_on_the_same_sequences(home: Home) -> None:
    said = json.loads(ok("evaluate", home.run("kd"), home.run("kd") / "model", "--cache", home.cache, "--json"))
    first, second = said["scores"]
    assert {key: first[key] for key in first if key not in ("network", "seen")} == {
        key: second[key] for key in second if key not in ("network", "seen")
    }


def test_the_table_says_what_its_columns_mean(home: Home) -> None:
    said = ok("evaluate", home.sweep, "--cache", home.cache)
    assert len(re.findall(r"held out", said)) == 4
    for column in ("perplexity", "NLL", "ECE", "KL", "agreement"):
        assert column in said
    assert "lower bound" in said  # the cache has the mass of its tail
    drawn = ok("evaluate", home.run("kd"), "--cache", home.draws)
    assert "KL" not in drawn and "agreement" not in drawn


def test_options_and_networks_of_images_are_refused(home: Home, tmp_path: Path) -> None:
    assert "pass --cache" in refused(2, "evaluate", home.run("kd"))
    assert "--split is for networks of images" in refused(2, "evaluate", home.run("kd"), "--split", "validation")
    (tmp_path / "images").mkdir()
    assert "one kind at a time" in refused(2, "evaluate", home.run("kd"), tmp_path / "images", "--cache", home.cache)
    out = tmp_path / "page.html"
    arguments = ("report", home.run("kd"), "-o", out, "--canaries", "1-2", "--references", "3-4")
    assert "--canaries is for networks of images" in refused(2, *arguments)
    assert "kdcache evaluate" in refused(2, "report", home.run("kd") / "model", "-o", out)
    assert not out.exists()


def test_a_student_with_fewer_tokens_is_refused(home: Home, tmp_path: Path) -> None:
    configuration = json.loads((home.run("kd") / "model" / "config.json").read_text())
    transformers: Any = import_module("transformers")
    small = transformers.LlamaConfig(**{**configuration, "vocab_size": 100})
    transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    said = refused(4, "evaluate", tmp_path / "small", "--cache", home.cache)
    assert "the vocabulary of the cache has 120 tokens, and the head of LlamaForCausalLM 100" in said


# Sweeps


def test_a_sweep_compares_losses_over_seeds(home: Home) -> None:
    assert "Loss on sequences that were held out, mean of 2 seeds" in home.said
    points = json.loads((home.sweep / "sweep.json").read_text())["points"]
    for point in points:
        students = point["students"]
        assert point["perplexity_mean"] == pytest.approx(sum(each["perplexity"] for each in students) / 2)
        for student in students:
            best = json.loads((Path(student["run"]) / "metrics.json").read_text())["best"]
            assert (student["kl"], student["held_out"]) == (best["kl"], best["held_out_loss"])


def test_a_sweep_trains_what_train_student_does(home: Home, tmp_path: Path) -> None:
    arguments = ("--cache", home.cache, "-o", tmp_path / "run", "--seed", "6", "--device", "cpu")
    ok("train-student", home.pipeline, *arguments)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "run", home.run("kd", 6))]
    assert weights[0] == weights[1]


def test_a_sweep_names_what_is_refused_before_the_first_student(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep = ("sweep", home.pipeline, "--cache", home.cache, "-o", out, "--device", "cpu")
    assert "plackett_luce is refused" in refused(2, *sweep, "--over", "loss=kd,pld")
    assert not [*out.glob("*/seed*")]
    assert "--together shares the loading of images" in refused(2, *sweep, "--together")


# Reports


def test_a_report_has_the_figures_of_the_runs(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    said = json.loads(ok("report", home.sweep, "--cache", home.cache, "-o", out, "--json"))
    assert [group["group"] for group in said["groups"]] == ["ce", "kd"]
    page = out.read_text()
    for group in said["groups"]:
        assert len(group["runs"]) == 2
        assert f"{group['kl']['mean']:.4f}" in page
    for score in said["scores"]:
        assert f"{score['perplexity']:.4g}" in page
    for heading in ("Over seeds", "On the sequences of the cache", "Learning curves"):
        assert heading in page
    assert page.count("<svg") == 5
    assert "Accuracy by class" not in page


def test_a_report_says_that_networks_were_measured_on_other_positions(home: Home, tmp_path: Path) -> None:
    """One of them has a context of 8 tokens, and sees prefixes."""
    short = ("--set", "student.train.max_length=8", "--set", "student.args.max_position_embeddings=8")
    given = ("train-student", home.pipeline, "--cache", home.cache, "-o", tmp_path / "short", "--device", "cpu")
    ok(*given, *short)
    for runs, word in (((home.run("kd"), tmp_path / "short"), "Not all"), ((home.run("kd"), home.run("ce")), "All")):
        ok("report", *runs, "--cache", home.cache, "-o", tmp_path / f"{word}.html")
        page = (tmp_path / f"{word}.html").read_text()
        assert f"{word} networks on the same" in page
    assert "figures cannot be compared" in (tmp_path / "Not all.html").read_text()


def test_a_cache_of_images_or_tokens_is_named_as_what_it_is(home: Home, tmp_path: Path) -> None:
    ok("train-teacher", "smoke", "--set", "teacher.train.epochs=1", "-o", tmp_path / "teacher")
    ok("dump-teacher", "smoke", "--set", f"teacher.weights={tmp_path}/teacher/model.safetensors", "-o", tmp_path / "c")
    said = refused(2, "evaluate", home.run("kd"), "--cache", tmp_path / "c")
    assert "not sequences of tokens" in said and "give a cache of a language model" in said
    said = refused(4, "evaluate", tmp_path / "teacher", "--cache", home.cache)
    assert "of sequences of tokens, and class logits of images are asked for" in said


def test_a_report_without_a_cache_has_what_the_runs_measured(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    ok("report", home.run("kd"), "-o", out, "--png")
    assert "On the sequences of the cache" not in out.read_text()
    assert len([*tmp_path.glob("page*/*.png")]) == 5
