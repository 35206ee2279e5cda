"""The scripts in examples/ run as their docstrings say, learn, and request the view of each epoch from the teacher."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.processes import PATIENCE
from helpers.texts import DOCUMENTS, write_lines, write_teacher
from torch.nn import functional as F

import kdcache
from kdcache import Cache, dump_teacher, load_split
from kdcache.data.views import View
from kdcache.models.small import SmallMLP

EXAMPLES = ROOT / "examples"

# Raised by the libraries themselves.
FILTERS = {
    "plain_pytorch": [],
    "with_lightning": [
        "ignore::FutureWarning:lightning.pytorch.utilities._pytree",
        "ignore::UserWarning:lightning.pytorch.trainer.connectors.data_connector",  # too few workers for many cores
    ],
    "with_hf_trainer": [],
}

LISTENING = """
import json, runpy, sys
import kdcache
from kdcache import CachedTeacher

asked, answer = [], CachedTeacher.__call__

def listen(teacher, ids, view=0):
    if not isinstance(view, int):  # with one, it is the teacher who asks itself
        asked.append(view.unique().tolist())
    return answer(teacher, ids, view)

CachedTeacher.__call__ = listen
script = sys.argv.pop(1)
runpy.run_path(script, run_name="__main__")
print(json.dumps(asked))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Two views of the digits by a teacher that knows them."""
    samples = load_split("digits", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = SmallMLP(10, 1, 8, 8, width=64)
        images, labels, *_ = View(samples, samples.transform).__getitems__(range(len(samples)))
        optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(teacher(images), labels))
            optimizer.step()
    transform = [{"RandomCrop": {"size": 8, "padding": 1}}, *samples.transform]
    out = tmp_path_factory.mktemp("examples") / "digits.kdcache"
    return dump_teacher(teacher, samples, out, transform=transform, views=2)


def test_examples_use_the_public_names_alone() -> None:
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] != "kdcache", path
            if isinstance(node, ast.Import):
                assert not [name.name for name in node.names if name.name.startswith("kdcache.")], path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdcache":
                assert node.attr in kdcache.__all__, path


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    # test_format.py and test_token_format.py run those of TensorStore, and the last tests below others.
    read = {"read_with_tensorstore", "read_tokens_with_tensorstore"}
    assert scripts == {*FILTERS, *read, "with_hf_trainer_lm", "with_trl"}


@pytest.mark.parametrize("name", FILTERS)
def test_example(name: str, cache: Cache, tmp_path: Path) -> None:
    script = EXAMPLES / f"{name}.py"
    assert f"python examples/{name}.py " in script.read_text().split('"""')[1]
    warnings = [part for one in ("error", *FILTERS[name]) for part in ("-W", one)]
    command = [sys.executable, *warnings, "-c", LISTENING, str(script), str(cache.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so small a network is slower on more
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, said, asked = done.stdout.splitlines()
    found = re.fullmatch(r"test accuracy (\d+\.\d+)%", said)
    assert found is not None, done.stdout
    assert float(found[1]) > 85
    batches = -(-len(cache) // 64)
    assert json.loads(asked) == [[epoch % 2] for epoch in range(10) for _ in range(batches)]
    assert list(tmp_path.iterdir()) == []


def distilled(script: str, folder: Path, *arguments: object, ignored: Sequence[str] = ()) -> tuple[float, float]:
    """Run an example of a language model, and return the student's divergence from the teacher before and after."""
    (folder / "script.py").write_text(script)
    warnings = [part for one in ("error", *ignored) for part in ("-W", one)]
    done = subprocess.run(
        [sys.executable, *warnings, "script.py", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"KL to the teacher: (\d+\.\d+) nats before, (\d+\.\d+) after", done.stdout)
    assert found is not None, done.stdout
    return float(found[1]), float(found[2])


def test_a_language_model_learns_in_the_trainer_whatever_its_accumulation(tmp_path: Path) -> None:
    script = (EXAMPLES / "with_hf_trainer_lm.py").read_text()
    assert "python examples/with_hf_trainer_lm.py " in script.split('"""')[1]
    before, after = distilled(script, tmp_path, 40)
    assert after < before / 2
    at_once = script.replace("batch_size=8", "batch_size=16").replace("accumulation_steps=2", "accumulation_steps=1")
    assert at_once != script
    assert distilled(at_once, tmp_path, 40)[1] == pytest.approx(after, abs=0.003)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="pip install trl")
def test_a_language_model_learns_in_trl_whatever_its_accumulation(tmp_path: Path) -> None:
    script = (EXAMPLES / "with_trl.py").read_text()
    assert "python examples/with_trl.py " in script.split('"""')[1]
    folder = write_teacher(tmp_path / "teacher")
    root = write_lines(tmp_path / "texts.jsonl", [{"text": document} for document in DOCUMENTS])
    model = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder)
    text = kdcache.load_text(root, folder, max_length=48)
    cache = kdcache.dump_language_model(model, text, tmp_path / "c.kdcache", top_k=4, rank=8, pilot_rows=200)
    # transformers warns of a default of TRL.
    given = (tmp_path, cache.path, folder, 15)
    ignored = ["ignore:`gradient_checkpointing:FutureWarning"]
    before, after = distilled(script, *given, ignored=ignored)
    assert after < before
    at_once = script.replace("batch_size=8", "batch_size=16").replace("accumulation_steps=2", "accumulation_steps=1")
    assert at_once != script
    assert distilled(at_once, *given, ignored=ignored)[1] == pytest.approx(after, abs=0.003)
