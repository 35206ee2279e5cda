"""Permission errors name the right remedy: who may read what, who may write where, and on which disk."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.forked import captured, command
from helpers.networks import linear_teacher
from PIL import Image

from kdcache.runtime.paths import fix_for

READ, WRITE = "chmod -R u+rX", "chmod u+w"
_CAPABILITY_VERSION = 0x20080522
_OVERRIDES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores permissions."""


def obey_permissions() -> None:
    """Make this process obey permissions, also as root."""
    if os.geteuid() == 0:
        library = ctypes.CDLL(None, use_errno=True)
        header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
        sets = ctypes.create_string_buffer(24)  # 32 effective, permitted and inheritable ones, then the others
        if library.capget(header, sets) != 0:
            raise OSError(ctypes.get_errno(), "cannot read the capabilities")
        held = struct.unpack("6I", sets)
        fewer = [word & ~_OVERRIDES if index < 3 else word for index, word in enumerate(held)]
        if library.capset(header, struct.pack("6I", *fewer)) != 0:
            raise OSError(ctypes.get_errno(), "cannot give up capabilities")


def obedient(*words: object) -> None:
    obey_permissions()
    command(*words, *(() if words[0] == "info" else ("--device", "cpu")))


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return captured(obedient, *words, cwd=cwd)


def read(path: Path) -> None:
    obey_permissions()
    path.read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    closed = tmp_path / "closed"
    closed.write_text("x")
    closed.chmod(0)
    probe = captured(read, closed)
    if "cannot give up" in probe.stderr:
        pytest.skip("this root process cannot give up its right to ignore permissions")
    if probe.returncode == 0:
        pytest.skip("processes of this user ignore permissions")
    assert "PermissionError" in probe.stderr, probe.stderr
    for index in range(6):
        path = tmp_path / "set" / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    (tmp_path / "t.py").write_text(linear_teacher(108))
    (tmp_path / "p.yaml").write_text(
        "dataset: {name: image-folder, root: set, validation_fraction: 0, test_fraction: 0}\n"
        "transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]\n"
        "teacher: {model: 't.py:make', train: {epochs: 1}}\n"
    )
    yield tmp_path
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)


CASES = {
    "an image file": ("set/train/a/0.png", ("dump-teacher", "p.yaml", "-o", "c"), "0.png: Permission denied", READ),
    "an image file, training": ("set/train/a/0.png", ("train-teacher", "p.yaml", "-o", "c"), "0.png: Perm", READ),
    "a class folder": ("set/train/b", ("doctor", "p.yaml"), "no permission to read the folder set/train/b", READ),
    "the data set": ("set", ("dump-teacher", "p.yaml", "-o", "c", "--dry-run"), "permission to read the folder", READ),
    "the network": ("t.py", ("doctor", "p.yaml"), "t.py", READ),
    "the output": ("out", ("dump-teacher", "p.yaml", "-o", "out/c"), "no permission to write in the folder", WRITE),
    "the output, training": ("out", ("train-teacher", "p.yaml", "-o", "out/c"), "no permission to write in", WRITE),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_not_be_read_or_written_is_named_with_its_remedy(case: str, folder: Path) -> None:
    name, words, what, fix = CASES[case]
    (folder / "out").mkdir()
    (folder / name).chmod(0o555 if fix is WRITE else 0)
    done = run(*words, cwd=folder)
    assert done.returncode == 2, done.stderr
    error, _, remedy = done.stderr.partition("fix: ")
    assert what in error
    assert fix in remedy
    assert (WRITE if fix is READ else READ) not in remedy
    assert not (folder / "c").exists()


@pytest.mark.parametrize("name", ["manifest.json", "data.zarr"])
def test_a_cache_that_may_not_be_read(name: str, folder: Path) -> None:
    assert run("dump-teacher", "p.yaml", "-o", "c.kdcache", cwd=folder).returncode == 0
    (folder / "c.kdcache" / name).chmod(0)
    done = run("info", "c.kdcache", cwd=folder)
    assert done.returncode == 2, done.stderr
    assert READ in done.stderr


def test_a_file_in_the_way_of_the_output(folder: Path) -> None:
    done = run("dump-teacher", "p.yaml", "-o", "t.py/c.kdcache", cwd=folder)
    assert done.returncode == 2
    assert "t.py is a file, not a folder" in done.stderr


def test_a_read_only_file_system_is_told_from_a_folder_without_permission(tmp_path: Path) -> None:
    assert "mount it writable" in fix_for(OSError(errno.EROFS, "Read-only file system", str(tmp_path / "a")))
    assert f"chmod u+w {tmp_path}" in fix_for(OSError(errno.EACCES, "Permission denied", str(tmp_path / "a")))
    assert f"make the folder {tmp_path}/b" in fix_for(OSError(errno.ENOENT, "No such file", str(tmp_path / "b" / "a")))
