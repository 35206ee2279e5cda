"""Caches of maps by one process or several, whole or killed: the same cache, to the byte; and it is shared whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from helpers.cli import ok
from helpers.processes import exit_code
from helpers.ranks import contents, ranks
from helpers.scenes import scenes_folder

from kdcache import Cache, open_cache
from kdcache.errors import CorruptError, IncompleteError

TEACHER = '''
import torch

class Teacher(torch.nn.Module):
    """Logits that a step rounds to the same integers on any number of threads."""
    def __init__(self, num_classes):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randint(-8, 9, (num_classes, 3, 4, 4), generator=generator) / 8)

    def forward(self, images):
        return {"map": torch.nn.functional.conv2d((images * 8).round() / 8, self.weight, stride=4)}
'''


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = scenes_folder(tmp_path_factory.mktemp("recipe"))
    (folder / "teacher.py").write_text(TEACHER)
    (folder / "maps.yaml").write_text(
        f'dataset: {{name: "{folder}/scenes.py:make"}}\n'
        "transform: [ToDtype: {dtype: float32, scale: true}, RandomHorizontalFlip: {}]\n"
        f'teacher: {{model: "{folder}/teacher.py:Teacher"}}\n'
        "cache: {logits: false, views: 2, shard_rows: 32, batch_size: 8, pilot_rows: 16, num_workers: 0, outputs:\n"
        "  {pixels: {kind: classes, places: grid, source: map}}}\n"
    )
    return folder / "maps.yaml"


@pytest.fixture(scope="module")
def whole(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    out = tmp_path_factory.mktemp("whole") / "whole.kdcache"
    ok("dump-teacher", pipeline, "-o", out, "--device", "cpu")
    return open_cache(out)


@pytest.mark.process
@pytest.mark.parametrize(
    ("count", "commit", "after"),
    [
        (1, ".partial", True),
        (1, "/commits/0/1.json.partial", False),
        (1, "/commits/1/0.json.partial", True),
        (2, "/commits/1/1.json.partial", False),
        (2, "/manifest.json.partial", False),
    ],
)
def test_what_a_kill_leaves_is_completed_to_the_same_cache(
    count: int, commit: str, after: bool, pipeline: Path, whole: Cache, tmp_path: Path
) -> None:
    out = tmp_path / "c.kdcache"
    with ranks(count, pipeline, out, (commit, after)) as processes:
        exits = [exit_code(process) for process in processes]
    assert -signal.SIGKILL in exits
    with pytest.raises(IncompleteError):
        open_cache(out)
    ok("dump-teacher", pipeline, "-o", out, "--device", "cpu")
    assert contents(out) == contents(whole.path)


def test_a_pushed_cache_is_pulled_whole_and_a_flipped_byte_is_found(whole: Cache, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    ok("push", whole.path, shared.as_uri())
    pulled = tmp_path / "pulled.kdcache"
    ok("pull", shared.as_uri(), pulled, "--digest", whole.manifest.digest)
    ids = torch.arange(64)
    assert open_cache(pulled).teacher("pixels")(ids, 1).equal(whole.teacher("pixels")(ids, 1))
    file = next(path for path in sorted(shared.rglob("*")) if path.is_file() and "pixels/values/c/0/0" in str(path))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    with pytest.raises(CorruptError):
        open_cache(shared.as_uri()).teacher("pixels")(ids, 0)
