"""Teacher scores of triples: the file, the cache of its pairs, and what is wrong in such files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdcache
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.curate.foreign import cache_of_scores
from kdcache.curate.foreign.margin_mse import read_margin_mse
from kdcache.data.images import ArrayImages
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError

Triple = tuple[float, float, str, str, str]

LINES: list[Triple] = [
    (11.0, -2.5, "1185869", "0", "2976744"),
    (11.0, 3.25, "1185869", "0", "5"),
    (3.25, -2.5, "1185869", "5", "2976744"),
    (7.5, 11.5, "403613", "2976744", "0"),
]
"""The passage 0 is positive for one query and negative for another, with another score."""


def write(path: Path, lines: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(lines)
    return path


def pairs_of(names: Sequence[str], name: str = "pairs") -> Samples:
    features = torch.randn(len(names), 3, generator=torch.Generator().manual_seed(0))
    labels = np.full(len(names), -1, np.int32)
    return Samples(name, "train", ArrayImages(features), labels, (), [], sample_names=np.array(names))


def test_a_file_is_its_pairs_and_triples(tmp_path: Path) -> None:
    found = read_margin_mse(write(tmp_path / "scores.tsv", LINES))
    assert found.sample_names().tolist() == [
        "1185869\t0",
        "1185869\t2976744",
        "1185869\t5",
        "403613\t2976744",
        "403613\t0",
    ]
    assert found.triples.tolist() == [[0, 1], [0, 2], [2, 1], [3, 4]]
    assert found.scores.tolist() == [11.0, -2.5, 3.25, 7.5, 11.5]
    assert found.scores.dtype == np.float32


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data())
def test_every_line_is_found_again(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever the ids and their order: the scores of triple i are those of line i."""
    ids = st.text(st.characters(codec="utf-8", exclude_characters="\t\n\r\0", exclude_categories=["Cs"]), min_size=1)
    queries = data.draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    passages = data.draw(st.lists(ids, min_size=2, max_size=6, unique=True))
    score = {
        (q, p): float(np.float32(7.3 * i - 3.1 * j)) for i, q in enumerate(queries) for j, p in enumerate(passages)
    }
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(queries), st.permutations(passages)), min_size=1, max_size=20))
    lines = [(score[q, some[0]], score[q, some[1]], q, some[0], some[1]) for q, some in drawn]
    path = tmp_path / "drawn.tsv"
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines), encoding="utf-8", newline="")
    found = read_margin_mse(path)
    names = found.sample_names().tolist()
    assert len(set(names)) == len(names) == len(found.scores)
    for (positive, negative, query, better, worse), pair in zip(lines, found.triples.tolist(), strict=True):
        assert [names[i] for i in pair] == [f"{query}\t{better}", f"{query}\t{worse}"]
        assert found.scores[pair].tolist() == [positive, negative]


def test_a_file_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "scores.tsv", LINES * 5)
    whole = read_margin_mse(path)
    monkeypatch.setattr("kdcache.curate.foreign.margin_mse._LINES_AT_ONCE", 3)
    parts = read_margin_mse(path)
    assert parts.sample_names().tolist() == whole.sample_names().tolist()
    assert parts.triples.tolist() == whole.triples.tolist() and len(whole.triples) == 20


def test_the_cache_has_one_score_per_sample(tmp_path: Path) -> None:
    """In the data set's own order; a pair that it lacks is named."""
    path = write(tmp_path / "bert_cat.tsv", LINES)
    samples = pairs_of(["403613\t0", "1185869\t0", "1185869\t5", "403613\t2976744"])
    cache = cache_of_scores(path, samples, tmp_path / "c.kdcache")
    assert cache.teacher("scores")(torch.arange(4))[:, 0].tolist() == [11.5, 11.0, 3.25, 7.5]
    plan = cache.manifest.plan
    assert plan.teacher.name == "bert_cat" and plan.output_names == ["scores"]
    assert plan.lineage is not None and plan.lineage.arguments["from"] == "margin-mse"
    assert kdcache.open_cache(tmp_path / "c.kdcache").manifest.digest == cache.manifest.digest


def test_several_shards(tmp_path: Path) -> None:
    lines = [(float(i), -1.0 - i, f"q{i}", "a", "b") for i in range(20_000)]
    file = read_margin_mse(write(tmp_path / "scores.tsv", lines))
    samples = pairs_of(file.sample_names().tolist())
    spec = CacheSpec(shard_rows=16_384)
    cache = cache_of_scores(tmp_path / "scores.tsv", samples, tmp_path / "c.kdcache", spec=spec)
    assert cache.manifest.plan.shards == 3
    assert np.array_equal(cache.teacher("scores")(torch.arange(40_000))[:, 0].numpy(), file.scores)


WRONG_FILES: list[tuple[str, type[KdcacheError], str]] = [
    ("", CorruptError, "is empty"),
    ("1\t2\tq\ta\n", CorruptError, r"line 1 of .* is not a triple: '1\\t2\\tq\\ta'"),
    ("1\t2\tq\ta\tb\n1\t2\tq\ta\tb\tc\n", CorruptError, "line 2 of .* is not a triple"),
    ("1\t2\tq\ta\tb\n\n", CorruptError, "line 2 of .* is not a triple"),
    ("1\t2\t\ta\tb\n", CorruptError, "line 1 of .* is not a triple"),
    ("1,2,q,a,b\n", CorruptError, "line 1 of .* is not a triple"),
    ("1\t2\tq\ta\tb\nhigh\t2\tq\ta\tb\n", CorruptError, "line 2 of .* has the scores high, 2"),
    ("1\t2\tq\ta\tb\n1\tnan\tq\ta\tb\n", CorruptError, "line 2 of .* has the scores 1, nan"),
    ("1\t1e39\tq\ta\tb\n", CorruptError, "line 1 of .* has the scores 1, 1e39"),
    ("1\t1\tq\ta\ta\n", CorruptError, "line 1 of .* compares the passage a with itself"),
    (
        "1\t2\tq\ta\tb\n4\t1.5\tq\tb\ta\n",
        MismatchError,
        "line 2 of .* has the score 4 for a pair that line 1 has with 2",
    ),
]


@pytest.mark.parametrize(("text", "error", "words"), WRONG_FILES)
def test_wrong_files(text: str, error: type[KdcacheError], words: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.tsv"
    path.write_text(text)
    with pytest.raises(error, match=words):
        read_margin_mse(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "scores.tsv"
    path.write_bytes(b"1\t2\tq\ta\tb\n\xff\xfe1\t2\tq\ta\tb\n")
    with pytest.raises(CorruptError, match=r"line 2 of .* has the scores .*xff.*xfe1, 2"):
        read_margin_mse(path)


def test_scores_of_half_precision_may_differ_by_their_rounding(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.tsv", [(11.0, -9.0, "q", "a", "b"), (11.0078, -3.0, "q", "a", "c")])
    assert read_margin_mse(path).scores.tolist() == [11.0, -9.0, -3.0]


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["1185869\t0", "1185869\t7"], MismatchError, r"no score for 1 sample of pairs/train, first sample 1 "),
        (["1185869\t0", "403613\t5"], MismatchError, r"first sample 1 \('403613\\t5'\)"),
        (["1185869 0", "403613 5"], MismatchError, r"no score for 2 samples of pairs/train, first sample 0"),
        (None, UsageError, "the samples of pairs/train have no names"),
    ],
)
def test_samples_without_a_score(
    names: list[str] | None, error: type[KdcacheError], words: str, tmp_path: Path
) -> None:
    samples = pairs_of(names or ["a"])
    if names is None:
        object.__setattr__(samples, "sample_names", None)
    with pytest.raises(error, match=words):
        cache_of_scores(write(tmp_path / "scores.tsv", LINES), samples, tmp_path / "c.kdcache")
    assert not (tmp_path / "c.kdcache").exists()


def test_from_a_file_to_a_student_on_the_command_line(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=4)
    features = {f"d{i}": generator.normal(size=4) for i in range(40)}
    lines = []
    for number in range(120):
        query, (better, worse) = f"q{number % 7}", generator.permutation(40)[:2].tolist()
        a, b = (float(weights @ features[f"d{i}"]) for i in (better, worse))
        lines.append((a, b, query, f"d{better}", f"d{worse}"))
    file = read_margin_mse(write(tmp_path / "scores.tsv", lines))
    x = np.stack([features[file.passages[passage]] for _, passage in file.pairs]).astype(np.float32)
    np.savez(tmp_path / "pairs.npz", x=x, groups=file.triples, sample_names=file.sample_names())
    (tmp_path / "student.py").write_text("from torch import nn\ndef net(num_classes):\n    return nn.Linear(4, 1)\n")
    (tmp_path / "pairs.yaml").write_text(
        f"""
dataset: {{name: npz, root: {tmp_path}/pairs.npz, validation_fraction: 0, test_fraction: 0}}
student:
  model: {tmp_path}/student.py:net
  train: {{epochs: 25, batch_size: 24, lr: 0.2}}
loss: {{logits: false, scores: {{name: margin_mse}}}}
"""
    )
    run = CliRunner()
    named = tmp_path / "named.yaml"
    named.write_text((tmp_path / "pairs.yaml").read_text() + "cache: {outputs: {margin: {kind: score}}}\n")
    scores = ["convert", str(tmp_path / "scores.tsv"), "--from", "margin-mse"]
    refused = run.invoke(main, [*scores, "--pipeline", str(named), "-o", str(tmp_path / "n.kdcache")])
    assert refused.exit_code == 2 and "names the outputs margin, and a file of margin-mse has" in refused.stderr
    pipeline = ["--pipeline", str(tmp_path / "pairs.yaml"), "-o", str(tmp_path / "c.kdcache"), "--json"]
    done = run.invoke(main, ["convert", str(tmp_path / "scores.tsv"), "--from", "margin-mse", *pipeline])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["dataset"]["samples"] == len(file.pairs)
    done = run.invoke(
        main,
        [
            "train-student",
            str(tmp_path / "pairs.yaml"),
            "--cache",
            str(tmp_path / "c.kdcache"),
            "-o",
            str(tmp_path / "r"),
        ],
    )
    assert done.exit_code == 0, done.output
    from safetensors.torch import load_file

    learned = load_file(tmp_path / "r/model.safetensors")["weight"][0].numpy()
    assert np.abs(learned - weights).max() < 0.1
