"""Every command, and common user errors: one clear message, the right exit code, no files left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from helpers.cli import RECIPE, kdcache, npz_recipe, ok, refused
from helpers.paths import REFERENCE
from helpers.processes import PATIENCE, until

from kdcache.cli import main, output
from kdcache.cli.options import choose_device
from kdcache.errors import UsageError

QUICK = ["--set", "teacher.train.epochs=1", "--set", "student.train.epochs=1", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a trained teacher and its cache, by the commands."""
    folder = tmp_path_factory.mktemp("work")
    ok("train-teacher", RECIPE, "-o", folder / "teacher", *QUICK)
    ok("dump-teacher", RECIPE, "-o", folder / "digits.kdcache", *QUICK[4:], *weights(folder))
    return folder


def weights(folder: Path) -> list[str]:
    return ["--set", f"teacher.weights={folder / 'teacher' / 'model.safetensors'}"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_info_says_what_the_manifest_says(work: Path) -> None:
    cache = work / "digits.kdcache"
    text = ok("info", cache)
    printed = json.loads(ok("info", cache, "--json"))
    manifest = json.loads((cache / "manifest.json").read_text())
    assert printed["digest"] == manifest["digest"]
    assert printed["digest"] in text
    assert printed["summary"] == manifest["summary"]
    assert f"{manifest['summary']['teacher_accuracy']:.2%}" in text
    card = (cache / "README.md", cache / "card.png")  # no part of the cache
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and path not in card)
    assert printed["bytes"] == size
    assert printed["bytes_per_row"] == round(size / 1000, 2)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real logits of a 300-class teacher, as `plan --logits` takes them."""
    path = tmp_path_factory.mktemp("glyphs") / "logits.npz"
    with np.load(REFERENCE / "glyphs300.npz") as stored:
        np.savez(path, logits=stored["teacher"], labels=stored["labels"])
    return path


def test_plan_says_what_it_tried_and_what_it_costs(glyphs: Path) -> None:
    text = ok("plan", "--logits", glyphs, "--fidelity", 0.02)
    printed = json.loads(ok("plan", "--logits", glyphs, "--fidelity", 0.02, "--json"))
    (chosen,) = (candidate for candidate in printed["tried"] if candidate["chosen"])
    within = [c for c in printed["tried"] if max(c["total_variation"][t] for t in "124") <= 0.02]
    assert chosen["bytes_per_row"] == min(candidate["bytes_per_row"] for candidate in within)
    assert f"top {chosen['top_k']}, rank {chosen['rank']}, step {chosen['step']:g}" in text
    assert text.count("chosen") == 2
    assert f"{chosen['bytes_per_row']:.1f} bytes per row" in text
    assert "for 1,500 rows" in text


def test_plan_of_a_pipeline_writes_nothing(work: Path) -> None:
    before = files(work)
    assert "every class, as float16" in ok("plan", RECIPE, *weights(work))
    printed = json.loads(ok("plan", RECIPE, *weights(work), "--set", "cache.top_k=3", "--json"))
    assert printed["encoding"]["top_k"] == 3
    assert printed["rows"] == 1000
    assert files(work) == before


def test_plan_of_invalid_logits(tmp_path: Path, glyphs: Path) -> None:
    bad = tmp_path / "bad.npz"
    np.savez(bad, logits=np.zeros((5, 3), np.int64))
    assert "holds logits [5, 3] int64" in refused(2, "plan", "--logits", bad)
    bad.write_bytes(b"nothing")
    assert "cannot read" in refused(2, "plan", "--logits", bad)
    logits = np.random.default_rng(0).normal(size=(500, 80))
    np.savez(bad, logits=logits, labels=np.full(500, 80))
    assert "outside 0 to 79" in refused(4, "plan", "--logits", bad)
    logits[:, 7] = np.nan
    np.savez(bad, logits=logits)
    assert "row 0 of" in refused(5, "plan", "--logits", bad)
    assert "takes a pipeline" in refused(2, "plan")
    refused(2, "plan", RECIPE, "--logits", glyphs)


def test_a_cache_measures_itself(work: Path, tmp_path: Path) -> None:
    assert "every class is stored" in ok("info", work / "digits.kdcache", "--fidelity")
    arguments = ["-o", tmp_path / "three.kdcache", "--top-k", 3, *weights(work), "--json"]
    planned = json.loads(ok("dump-teacher", RECIPE, *arguments))["plan"]["fidelity"]["total_variation"]
    assert "total variation" in ok("info", tmp_path / "three.kdcache")
    printed = json.loads(ok("info", tmp_path / "three.kdcache", "--fidelity", "--json"))
    assert [(found["view"], found["temperature"]) for found in printed["measured"]] == [(0, 2), (0, 4), (0, 8)]
    for found in printed["measured"]:
        # A difference in one set of classes is never more than the total variation.
        assert 0 < found["tail_mass"] <= 1.1 * planned[str(found["temperature"])] + 1e-4
    table = ok("info", tmp_path / "three.kdcache", "--fidelity")
    assert f"{printed['measured'][0]['logsumexp']:.5f}" in table


@pytest.mark.parametrize("loss", ["ce", "kd", "dtkd", "ka", "dtd", "ka+dtd", "dtkd+ka"])
def test_a_student_of_every_loss(loss: str, work: Path, tmp_path: Path) -> None:
    cache = ["--cache", work / "digits.kdcache"] if loss != "ce" else []
    printed = json.loads(ok("train-student", RECIPE, *cache, "--loss", loss, "-o", tmp_path / "run", "--json", *QUICK))
    assert (
        printed["test"]["accuracy"] == json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["accuracy"]
    )
    assert f"name: {loss}\n" in (tmp_path / "run" / "resolved.yaml").read_text()


def test_top_k_and_its_long_form_make_the_same_cache(work: Path, tmp_path: Path) -> None:
    short = ok("dump-teacher", RECIPE, "-o", tmp_path / "a.kdcache", "--top-k", 5, "--json", *weights(work))
    long = ok("dump-teacher", RECIPE, "-o", tmp_path / "b.kdcache", "--set", "cache.top_k=5", "--json", *weights(work))
    assert json.loads(short)["digest"] == json.loads(long)["digest"]
    assert json.loads(short)["plan"]["encoding"]["top_k"] == 5
    every = ok("dump-teacher", RECIPE, "-o", tmp_path / "c.kdcache", "--top-k", "all", "--json", *weights(work))
    assert json.loads(every)["digest"] == json.loads(ok("info", work / "digits.kdcache", "--json"))["digest"]


def test_another_loss_than_the_files_brings_its_own_options(work: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "dtkd.yaml"
    recipe.write_text(Path(RECIPE).read_text().replace("name: kd", "name: dtkd\n  temperature: {sharpness: logsumexp}"))
    ok("train-student", recipe, "--loss", "ce", "-o", tmp_path / "ce", *QUICK)
    assert "kind: constant" in (tmp_path / "ce" / "resolved.yaml").read_text()
    cache = ["--cache", work / "digits.kdcache"]
    ok("train-student", recipe, *cache, "--loss", "dtkd", "-o", tmp_path / "dtkd", *QUICK)
    assert "sharpness: logsumexp" in (tmp_path / "dtkd" / "resolved.yaml").read_text()
    assert "--loss nothing: loss.name: unknown loss" in refused(
        2, "train-student", recipe, *cache, "--loss", "nothing", "-o", tmp_path / "no", *QUICK
    )


def test_the_examples_in_help_are_commands_that_exist() -> None:
    for name in main.commands:
        text = ok(name, "--help")
        example = next(line for line in text.splitlines() if "Example: kdcache" in line)
        assert example.split("Example: kdcache ")[1].split()[0] == name
    assert "0.1.0" in ok("--version")


def test_files_that_are_not_there(work: Path, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused(2, "train-teacher", "nowhere.yaml", "-o", tmp_path / "x")
    assert "there is no cache" in refused(2, "info", tmp_path / "nothing.kdcache")
    assert "is not a cache" in refused(2, "info", tmp_path)
    missing = ["--set", "teacher.weights=gone.safetensors"]
    message = refused(2, "dump-teacher", RECIPE, "-o", tmp_path / "x.kdcache", *missing)
    assert "checkpoint not found: gone.safetensors" in message
    assert "kdcache train-teacher" in message
    student = ["--cache", tmp_path / "nothing.kdcache", "-o", tmp_path / "x"]
    assert "kdcache dump-teacher" in refused(2, "train-student", RECIPE, *student)
    assert files(tmp_path) == set()


def test_output_that_exists_is_never_touched(work: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert "exists" in refused(2, "train-teacher", RECIPE, "-o", work, *QUICK)
    longer = ["--set", "teacher.train.epochs=2", "--device", "cpu"]
    assert "epochs was 1, and is 2 now" in refused(4, "train-teacher", RECIPE, "-o", work / "teacher", *longer)
    student = ["--cache", work / "digits.kdcache", "-o", work / "teacher", *QUICK]
    assert "is a complete run with other settings" in refused(4, "train-student", RECIPE, *student)
    cache = ["-o", work / "digits.kdcache", *weights(work)]
    assert "already a sealed cache" in refused(2, "dump-teacher", RECIPE, *cache, "--set", "cache.top_k=3")
    ok("dump-teacher", RECIPE, *cache)
    assert "exists and is not a cache" in refused(2, "dump-teacher", RECIPE, "-o", work / "teacher", *weights(work))
    assert "exists" in refused(2, "demo", "-o", work)
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_every_problem_of_a_pipeline_in_one_message(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "dataset: {name: digits}\n"
        "teacher:\n"
        "  model: small:cnn\n"
        "  train: {epochs: ten}\n"
        "cache:\n"
        "  topk: 5\n"
        "loss:\n"
        "  name: dtkd+dtd\n"
    )
    message = refused(2, "dump-teacher", bad, "-o", tmp_path / "x", "--set", "student.model=3")
    assert "4 problems" in message
    for place in (
        "bad.yaml:4: teacher.train.epochs",
        "bad.yaml:6: cache.topk: unknown key",
        "bad.yaml:8: loss.name",
        "--set student.model=3: student.model",
    ):
        assert place in message
    bad.write_text("dataset: [digits\n")
    assert "not valid YAML" in refused(2, "dump-teacher", bad, "-o", tmp_path / "x")
    assert files(tmp_path) == {"bad.yaml"}


@pytest.mark.parametrize(
    ("code", "words", "setting"),
    [
        (2, "top_k 11 is larger than the number of classes, 10", "cache.top_k=11"),
        (2, "would all be the same", "cache.views=3"),
        (2, "unknown model 'resnet18'", "teacher.model=resnet18"),
        (2, "no network 'resnet19'", "teacher.model=torchvision:resnet19"),
        (4, "has 1,000 classes, the data set has 10", "teacher.model=torchvision:resnet18@IMAGENET1K_V1"),
        (2, "no weights 'BEST'", "teacher.model=torchvision:resnet18@BEST"),
        (4, "does not fit the network", "teacher.args={width: 16}"),
        (2, "cannot be built", "teacher.args={depth: 16}"),
        (2, "has no transform 'Blur'", "transform=[{Blur: {}}]"),
        (2, "uint8 images", "transform=[{ToImage: {}}]"),
        (2, "file not found: nowhere.py", "teacher.model=nowhere.py:teacher"),
        (2, "folder not found", "dataset={name: image-folder, root: nowhere}"),
    ],
)
def test_a_teacher_that_cannot_be(code: int, words: str, setting: str, work: Path, tmp_path: Path) -> None:
    arguments = ["-o", tmp_path / "x.kdcache", *weights(work), "--set", setting]
    assert words in refused(code, "dump-teacher", RECIPE, *arguments)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("code", "words", "body"),
    [
        (5, "NaN or infinite logits for sample 0", "lambda x: x.flatten(1)[:, :10] * float('nan')"),
        (4, "returned [1, 7] for 1 image, the data set has 10 classes", "lambda x: x.flatten(1)[:, :7]"),
        (4, "returned a tuple", "lambda x: (x, x)"),
        (4, "cannot take images [1, 8, 8]", "lambda x: x.reshape(-1, 3, 8, 8)"),
    ],
)
def test_a_teacher_that_misbehaves(code: int, words: str, body: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.p = torch.nn.Parameter(torch.zeros(1))\n"
        f"    def forward(self, x):\n        return ({body})(x)\n"
        "def make(num_classes):\n"
        "    return Net()\n"
    )
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"p": zeros(1)}, tmp_path / "net.safetensors")
    teacher = ["--set", f"teacher.model={tmp_path / 'net.py'}:make", "--set", "teacher.args={}"]
    checkpoint = ["--set", f"teacher.weights={tmp_path / 'net.safetensors'}"]
    before = files(tmp_path)
    message = refused(code, "dump-teacher", RECIPE, "-o", tmp_path / "x.kdcache", *teacher, *checkpoint)
    assert words in message
    assert {name for name in files(tmp_path) if "__pycache__" not in name} == before


def test_another_teacher_with_the_same_weights_does_not_resume_a_cache(work: Path, tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "import torch\n"
        "def make(num_classes, stop=10**9):\n"
        "    class Net(torch.nn.Flatten):\n"
        "        rows = 0\n"
        "        def forward(self, x):\n"
        "            self.rows += len(x)\n"
        "            if self.rows > stop: raise KeyboardInterrupt\n"
        "            return super().forward(x)[:, :num_classes]\n"
        "    return Net()\n"
    )
    arguments = ["-o", tmp_path / "c.kdcache", "--set", f"teacher.model={code}:make", "--set", "cache.shard_rows=100"]
    no_weights = ["--set", "teacher.weights=null"]
    stopped = kdcache("dump-teacher", RECIPE, *arguments, *no_weights, "--set", "teacher.args={stop: 500}")
    assert stopped.exit_code == 130
    message = refused(4, "dump-teacher", RECIPE, *arguments, *no_weights, "--set", "teacher.args={}")
    assert "teacher.arguments.stop: 500, None" in message
    code.write_text(code.read_text().replace("[:, :num_classes]", "[:, -num_classes:]"))
    message = refused(4, "dump-teacher", RECIPE, *arguments, *no_weights, "--set", "teacher.args={stop: 500}")
    assert "teacher.code_digest: sha256:" in message


def test_nothing_is_written_inside_a_cache(work: Path) -> None:
    before = files(work)
    place = work / "digits.kdcache" / "run"
    assert "is inside the cache" in refused(2, "train-teacher", RECIPE, "-o", place, *QUICK)
    assert "is inside the cache" in refused(2, "dump-teacher", RECIPE, "-o", place, *weights(work))
    assert files(work) == before


def test_channels_come_last(tmp_path: Path) -> None:
    recipe = npz_recipe(tmp_path, images=np.zeros((60, 3, 8, 8), np.uint8))
    assert "put the channels last" in refused(2, "train-teacher", recipe, "-o", tmp_path / "run")


def test_a_disk_that_fills_up_while_weights_are_saved(tmp_path: Path) -> None:
    limited = (
        f"ulimit -f 40; exec {Path(sys.executable).parent / 'kdcache'} train-teacher {RECIPE} -o run {' '.join(QUICK)}"
    )
    done = subprocess.run(
        ["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 3, done.stderr
    assert "error: File too large" in done.stderr
    assert "fix: free disk space there" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_progress_in_a_log_is_lines(work: Path, tmp_path: Path) -> None:
    done = kdcache("dump-teacher", RECIPE, "-o", tmp_path / "x.kdcache", *weights(work))
    lines = done.stderr.splitlines()
    assert "teacher: 1,000 rows" in lines
    assert any(line.startswith("teacher: 1,000 of 1,000 rows, ") for line in lines)
    assert "\r" not in done.stderr


def test_a_cache_of_other_data_is_refused(work: Path, tmp_path: Path) -> None:
    recipe = npz_recipe(tmp_path)
    arguments = ["--cache", work / "digits.kdcache", "-o", tmp_path / "run"]
    assert "has 10 classes, mine has 3" in refused(4, "train-student", recipe, *arguments)

    ok("train-teacher", recipe, "-o", tmp_path / "t")
    ok("dump-teacher", recipe, "-o", tmp_path / "mine.kdcache")
    arguments = ["--cache", tmp_path / "mine.kdcache", "-o", tmp_path / "run"]
    with np.load(tmp_path / "mine.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    # Splits are by position: exchanging two training images reorders the training split only.
    here = {"images": images.copy(), "labels": labels}
    first, second = train_ids(recipe)[5], train_ids(recipe)[8]
    assert labels[first] != labels[second]
    here["images"][[first, second]] = images[[second, first]]
    npz_recipe(tmp_path, **here)
    assert "in another order, first at sample 5" in refused(4, "train-student", recipe, *arguments)

    changed = labels.copy()
    changed[first] = (labels[first] + 1) % 3
    npz_recipe(tmp_path, images=images, labels=changed)
    assert "sample 5 of mine/train has label" in refused(4, "train-student", recipe, *arguments)

    brighter = images.copy()
    brighter[first, 0, 0] ^= 1
    npz_recipe(tmp_path, images=brighter, labels=labels)
    assert "are not those of the cache, first sample 5" in refused(4, "train-student", recipe, *arguments)

    npz_recipe(tmp_path, images=images[:50], labels=labels[:50])
    assert "the cache holds 48 samples, mine/train has 40" in refused(4, "train-student", recipe, *arguments)

    npz_recipe(tmp_path, images=images, labels=labels)
    ok("train-student", recipe, *arguments)


def train_ids(recipe: Path) -> list[int]:
    from kdcache.config.loader import load_pipeline
    from kdcache.data.datasets import load_split

    with np.load(recipe.with_suffix(".npz")) as stored:
        everything = [image.tobytes() for image in stored["images"]]
    split = load_split(load_pipeline(recipe).dataset, "train")
    return [everything.index(split.images.picture(i).numpy().tobytes()) for i in range(len(split))]  # type: ignore[union-attr]


def test_labels_out_of_range(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    labels[7] = -2
    recipe = npz_recipe(tmp_path, labels=labels)
    before = files(tmp_path)
    message = refused(4, "train-teacher", recipe, "-o", tmp_path / "run")
    assert "label -2, classes run from 0 to 2" in message
    recipe = npz_recipe(tmp_path, labels=np.arange(60) % 3, class_names=np.array(["a", "b"]))
    assert "label 2, classes run from 0 to 1" in refused(4, "train-teacher", recipe, "-o", tmp_path / "run")
    assert files(tmp_path) == before


def test_an_unsealed_cache_is_refused_and_completed(work: Path, tmp_path: Path) -> None:
    from kdcache.cache.format.read_records import read_manifest
    from kdcache.cache.format.schema import PLAN, canonical

    cache = tmp_path / "digits.kdcache"
    arguments = ["-o", cache, *weights(work), "--set", "cache.shard_rows=300"]
    ok("dump-teacher", RECIPE, *arguments)
    digest = json.loads(ok("info", cache, "--json"))["digest"]
    (cache / PLAN).write_bytes(canonical(read_manifest(cache / "manifest.json").plan))
    (cache / "manifest.json").unlink()
    (cache / "commits" / "0" / "2.json").unlink()
    for arguments_ in (["info", cache], ["train-student", RECIPE, "--cache", cache, "-o", tmp_path / "run", *QUICK]):
        message = refused(3, *arguments_)
        assert "1 of its 4 shards are missing" in message
        assert "kdcache dump-teacher" in message
    other = refused(4, "dump-teacher", RECIPE, *arguments, "--set", "cache.top_k=3")
    assert "request.top_k: all, 3" in other
    ok("dump-teacher", RECIPE, *arguments)
    assert json.loads(ok("info", cache, "--json"))["digest"] == digest


def test_a_damaged_cache_is_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "digits.kdcache", tmp_path / "c.kdcache")
    chunks = tmp_path / "c.kdcache" / "data.zarr" / "log_probs" / "c"
    shard = next(path for path in chunks.rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert re.search(
        r"has the sha256 \w{12}\.\.\., \w{12}\.\.\. was written", refused(5, "info", tmp_path / "c.kdcache")
    )


def test_no_such_device(tmp_path: Path) -> None:
    assert "no device 'gpu' on this machine" in refused(
        2, "train-teacher", RECIPE, "-o", tmp_path / "x", "--device", "gpu"
    )
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gpu", "no device 'gpu' on this machine, did you mean cuda?\nfix: use auto, cpu, cuda, cuda:0"),
        ("CUDA:0", "did you mean cuda?"),
        ("cdua", "did you mean cuda?"),
        ("cpu:x", "no device 'cpu:x' on this machine"),
        ("meta", "no device 'meta' on this machine"),
        ("xpu", "no device 'xpu' on this machine: "),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_a_line(given: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_device(given)
    assert words in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 150


def test_a_section_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("dataset: {name: digits}\n")
    assert "no 'teacher' section" in refused(2, "dump-teacher", tmp_path / "p.yaml", "-o", tmp_path / "x")
    assert "no 'student' section" in refused(2, "train-student", tmp_path / "p.yaml", "-o", tmp_path / "x")


@pytest.mark.parametrize("command", ["train-teacher", "demo"])
def test_ctrl_c_ends_with_130_and_leaves_what_can_be_resumed(command: str, tmp_path: Path) -> None:
    arguments = (
        [RECIPE, "-o", str(tmp_path / "run"), "--set", "teacher.train.epochs=100000"] if command != "demo" else []
    )
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "kdcache"), command, *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    until(lambda: list(tmp_path.rglob("state.pt")))
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, messages
    assert "run the same command again" in messages
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ([] if command == "demo" else ["run.partial"])


def test_a_path_that_cannot_be_written_to(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x.kdcache"
    assert str(tmp_path / "file") in refused(2, "dump-teacher", RECIPE, "-o", place, *weights(work))
    assert files(tmp_path) == {"file"}


def test_control_characters_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "teacher \x1b]0;owned\x07\x9b31m\r\x08 naïve 金"
    output.result(evil)
    output.say(evil)
    output.table(evil, ["name"], [[evil], ["[bold]not markup[/]"]])
    output.error(UsageError(evil, evil))
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "naïve 金" in text
        assert not set(text) & set("\x1b\x07\x9b\r\x08")
    assert "[bold]not markup[/]" in printed.out


def test_long_work_is_reported_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    printed = ""

    def is_reported() -> bool:
        nonlocal printed
        printed += capsys.readouterr().err
        return "reading the rows: " in printed

    with output.working("reading the rows", delay=0.01):
        until(is_reported)
    assert capsys.readouterr().out == ""


# With --json: one JSON document on stdout, the result or the error.

NOTHING = "nowhere.kdcache"

ERRORS: dict[str, tuple[int, list[str]]] = {
    "demo": (2, ["--out", "file/demo"]),
    "pipelines list": (2, []),
    "train-teacher": (2, [RECIPE, "-o", "run", "--set", "teacher=null"]),
    "plan": (2, []),
    "dump-teacher": (2, ["nowhere.yaml", "-o", "c.kdcache"]),
    "train-student": (2, [RECIPE, "--cache", NOTHING, "-o", "run"]),
    "sweep": (2, [RECIPE, "--cache", NOTHING, "-o", "sweep"]),
    "evaluate": (2, ["nowhere"]),
    "report": (2, ["nowhere", "-o", "report.html"]),
    "info": (5, ["damaged.kdcache"]),
    "push": (2, [NOTHING, "file:///nowhere/at/all"]),
    "pull": (2, ["nowhere", "there"]),
    "sign": (2, [NOTHING, "--key", "file"]),
    "summarize": (2, [NOTHING]),
    "diff": (2, [NOTHING, NOTHING]),
    "select": (2, [NOTHING, "-o", "c.kdcache"]),
    "merge": (2, [NOTHING, NOTHING, "-o", "c.kdcache"]),
    "convert": (2, ["nowhere.npz", "-o", "c.kdcache"]),
    "card": (2, [NOTHING]),
}
PROBLEMS_IN_RESULT = {"doctor", "verify"}


def with_json(group: click.Group, before: str = "") -> set[str]:
    """Return the names of all commands that have --json."""
    found = set()
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= with_json(command, f"{before}{name} ")
        elif any(parameter.name == "as_json" for parameter in command.params):
            found.add(before + name)
    return found


def test_every_command_with_json_is_tested() -> None:
    assert with_json(main) == {*ERRORS, *PROBLEMS_IN_RESULT}


@pytest.mark.parametrize("first", [True, False], ids=["--json first", "--json last"])
@pytest.mark.parametrize("command", ERRORS)
def test_an_error_is_printed_as_json_too(
    command: str, first: bool, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged.kdcache").mkdir()
    (tmp_path / "damaged.kdcache" / "manifest.json").write_text("{")
    if command == "pipelines list":
        monkeypatch.setattr("kdcache.cli.pipelines.recipes", raising)
    code, arguments = ERRORS[command]
    said = refused(code, *command.split(), *arguments)
    done = kdcache(*command.split(), *(["--json", *arguments] if first else [*arguments, "--json"]))
    assert done.exit_code == code
    assert done.stderr == said
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code
    assert f"error: {error['what']}" in said
    assert f"fix: {error['fix']}" in said


@pytest.mark.parametrize(
    "mistyped",
    [["nosuch"], ["info"], ["info", "--nonsense", "c"], ["convert", "fkd", "--from", "foo", "-o", "c"], ["diff", "a"]],
)
def test_a_usage_error_is_printed_as_json_too(mistyped: list[str]) -> None:
    done = kdcache(*mistyped, "--json")
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["what"] in done.stderr
    assert kdcache(*mistyped).stdout == ""


def raising() -> None:
    raise UsageError("there is no recipe", "install kdcache again")


def test_errors_of_every_kind_have_their_exit_codes(work: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(work / "digits.kdcache", tmp_path / "c.kdcache"))
    foreign = npz_recipe(tmp_path)
    for code, arguments in (
        (4, ["info", cache, "--digest", "sha256:" + "0" * 64]),
        (4, ["train-student", foreign, "--cache", cache, "-o", tmp_path / "run", "--device", "cpu"]),
        (4, ["verify", cache, foreign]),
        (2, ["info", cache, "--digest", "odd"]),
    ):
        done = kdcache(*arguments, "--json")
        assert (done.exit_code, json.loads(done.stdout)["error"]["exit_code"]) == (code, code)


def test_a_result_that_includes_the_error_is_the_only_document(work: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(work / "digits.kdcache", tmp_path / "c.kdcache"))
    (cache / "commits/0/0.json").unlink()
    done = kdcache("verify", cache, "--json")
    assert done.exit_code == 5
    assert json.loads(done.stdout)["ok"] is False
    assert "commits/0/0.json: is missing" in done.stderr
    done = kdcache("doctor", "nowhere.yaml", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["ok"] is False


def test_only_the_first_of_several_processes_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert refused(2, "info", NOTHING, "--json")
