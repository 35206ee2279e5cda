"""Which placement is chosen, and what students get from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
import torch
from helpers.cli import kdcache
from helpers.placement import (
    RECIPE,
    Made,
    mapped_teacher,
)

from kdcache import Cache, train_student
from kdcache.cache.placement import choose
from kdcache.cache.placement.choose import PLACEMENTS, Placement
from kdcache.config.loader import load_pipeline
from kdcache.errors import UsageError
from kdcache.runtime import resources
from kdcache.runtime.resources import free_disk, free_memory, home
from kdcache.train.inputs import CacheOptions

MB = 10**6


EXCEED = "0.2 MB exceed half of"


@pytest.mark.parametrize(
    ("device", "on_device", "memory", "disk", "expected", "why"),
    [
        ("meta", 0.84, 0, 0, "device", "0.2 MB of 0.8 MB free on it"),
        ("meta", 0.82, 0.42, 0, "host", "0.2 MB of 0.4 MB free"),
        ("cpu", 100, 0.42, 0, "host", "0.2 MB of 0.4 MB free"),
        ("cpu", 0, 0.41, 0.24, "mmap", f"{EXCEED} 0.4 MB free memory"),
        (
            "cpu",
            0,
            0.41,
            0.23,
            "stream",
            "0.2 MB exceed half of 0.4 MB free memory and 90% of 0.2 MB free disk in {home}",
        ),
        ("cpu", 0, -1, 0, "stream", "0.2 MB exceed half of -1.0 MB free memory and 90% of 0.0 MB free disk in {home}"),
    ],
)
def test_auto_takes_the_first_place_that_the_rows_fit(
    device: str,
    on_device: float,
    memory: float,
    disk: float,
    expected: Placement,
    why: str,
    larger: Made,
    kept_here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"meta": on_device, "cpu": memory}
    monkeypatch.setattr(choose, "free_memory", lambda device="cpu": int(free[torch.device(device).type] * MB))
    monkeypatch.setattr(choose, "free_disk", lambda _: int(disk * MB))
    teacher = larger.cache.teacher(device=device)
    assert (teacher.placement, teacher.why) == (expected, why.format(home=kept_here))
    assert teacher(torch.arange(5), 1).device.type == device


def test_auto_counts_the_records_that_are_there_already(larger: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped_teacher(larger)
    monkeypatch.setattr(choose, "free_memory", lambda _device="cpu": 0)
    monkeypatch.setattr(choose, "free_disk", lambda _: 0)
    assert larger.cache.teacher().placement == "mmap"


def test_a_placement_that_is_not_known_is_refused(lowrank: Made) -> None:
    with pytest.raises(UsageError, match="unknown placement 'memory'") as caught:
        lowrank.cache.teacher(placement="memory")  # type: ignore[call-overload]
    assert caught.value.fix == "use one of auto, device, host, mmap, stream"


def test_free_memory_is_what_the_containers_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_CGROUP", tmp_path / "none")
    whole = free_memory()
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)

    def says(limit: str, current: int, cached: int) -> None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        # Shared memory counts as `file`, and cannot be dropped.
        (tmp_path / "memory.stat").write_text(
            f"anon 5\nfile {cached + 77}\nshmem 77\ninactive_file {cached - 3}\nactive_file 3\n"
        )

    says("1000000", 900_000, 600_000)
    assert free_memory() == 700_000
    says("max", 900_000, 600_000)
    assert free_memory() == pytest.approx(whole, rel=0.2)
    says(str(2**62), 900_000, 600_000)
    assert free_memory() == pytest.approx(whole, rel=0.2)


def test_free_disk_is_that_of_a_folder_to_be(tmp_path: Path) -> None:
    there = os.statvfs(tmp_path)
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(there.f_bavail * there.f_frsize, rel=0.05)


def test_where_kdcache_keeps_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.setenv("KDCACHE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "kdcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert home() == Path("/somebody/.cache/kdcache")


def test_a_student_is_the_same_wherever_the_rows_are(digits: Cache, tmp_path: Path) -> None:
    pipeline = load_pipeline(RECIPE, ["student.train.epochs=2", "student.train.batch_size=50"])
    weights = {}
    for placed in PLACEMENTS:
        run = tmp_path / placed
        checkpoint = train_student(pipeline, digits, run, CacheOptions(placed)).checkpoint
        weights[placed] = checkpoint.read_bytes()
        assert json.loads((run / "metrics.json").read_text())["placement"] == [placed]
        first, second = (float(line.split(",")[2]) for line in (run / "metrics.csv").read_text().splitlines()[1:])
        assert second < first
    assert weights["host"] == weights["device"] == weights["mmap"] != weights["stream"]


def test_the_command_says_where_the_rows_are(digits: Cache, tmp_path: Path) -> None:
    common = ("train-student", RECIPE, "--cache", digits.path, "--set", "student.train.epochs=1", "--device", "cpu")
    done = kdcache(*common, "-o", tmp_path / "a")
    assert "placement of the cache: host (" in done.stderr
    assert " MB free)" in done.stderr
    done = kdcache(*common, "-o", tmp_path / "b", "--placement", "stream")
    assert "placement of the cache: stream (as requested)" in done.stderr
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["placement"] == ["stream"]
    done = kdcache(*common, "-o", tmp_path / "c", "--loss", "ce")
    assert "held" not in done.stderr
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["placement"] == []
