"""`~` and variables in paths, wherever they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.networks import linear_teacher
from PIL import Image

from kdcache import dump_teacher, load_pipeline, load_split, open_cache
from kdcache.cli import main
from kdcache.errors import UsageError
from kdcache.models.small import SmallCNN
from kdcache.runtime.paths import expand

PIPELINE = """
dataset: {name: image-folder, root: $DATA/set, validation_fraction: 0, test_fraction: 0}
transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]
teacher: {model: '~/code/t.py:make'}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.delenv("NOWHERE", raising=False)
    for index in range(6):
        path = tmp_path / "data" / "set" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "t.py").write_text(linear_teacher(108))
    (tmp_path / "code" / "p.yaml").write_text(PIPELINE)
    return tmp_path


@pytest.mark.parametrize("text", ["~/a/b", "$HOME/a/b", "${HOME}/a/b", "$DATA/../a/b"])
def test_a_path_is_expanded(text: str, home: Path) -> None:
    assert expand(text).resolve() == home / "a" / "b"
    assert expand(Path(text)).resolve() == home / "a" / "b"


def test_what_exists_as_it_is_written_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for name in ("$NOWHERE", "~", "a$DATA"):
        (home / name).mkdir()
        assert expand(name) == Path(name)
    assert expand("plain/path") == Path("plain/path")


@pytest.mark.parametrize("text", ["$NOWHERE/a", "${NOWHERE}", "a/$NOWHERE"])
def test_a_variable_that_is_not_set_is_named(text: str, home: Path) -> None:
    with pytest.raises(UsageError, match="the variable NOWHERE in the path") as caught:
        expand(text)
    assert caught.value.fix.startswith("export NOWHERE=")


def kdcache(*words: str) -> Any:
    return CliRunner().invoke(main, words)


def test_every_path_of_a_pipeline_and_of_commands_is_expanded(home: Path) -> None:
    done = kdcache("dump-teacher", "$HOME/code/p.yaml", "-o", "~/out/c.kdcache", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert (home / "out" / "c.kdcache" / "manifest.json").is_file()
    for words in (("info", "~/out/c.kdcache"), ("verify", "$HOME/out/c.kdcache", "~/code/p.yaml")):
        assert kdcache(*words).exit_code == 0
    done = kdcache(
        "dump-teacher", "~/code/p.yaml", "-o", "~/d.kdcache", "--set", "dataset.root=~/data/set", "--dry-run"
    )
    assert done.exit_code == 0, done.output
    for arguments in (["info", "$NOWHERE/c.kdcache"], ["doctor", "~/code/p.yaml", "-o", "$NOWHERE"]):
        refused = kdcache(*arguments)
        assert refused.exit_code == 2
        assert "the variable NOWHERE in the path" in refused.stderr


def test_python_calls_expand_paths(home: Path) -> None:
    samples = load_split("image-folder", "train", root="~/data/set", validation_fraction=0, test_fraction=0)
    transform = load_pipeline("~/code/p.yaml").transform
    made = dump_teacher(SmallCNN(2, 3), samples, "$DATA/c.kdcache", transform=transform)
    assert made.path.resolve() == home / "data" / "c.kdcache"
    assert open_cache("~/data/c.kdcache").manifest.digest == made.manifest.digest
