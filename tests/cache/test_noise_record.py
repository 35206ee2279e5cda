"""The record of noise, as docs/FORMAT.md has it: its table, its digests, and plans in which it cannot be."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.format_text import table
from helpers.paths import ROOT
from helpers.tiny import TinyTeacher, tiny_samples
from pydantic import ValidationError

from kdcache import Cache, dump_teacher
from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.schema import NoiseRecord, Plan
from kdcache.cache.inspect.noise import described_noise

GOLDEN = ROOT / "tests" / "golden"
PRIVACY = np.linspace(0, 1, 5)
DIGEST = "sha256:" + "0" * 64
GOOD: dict[str, Any] = {"sigma": 0.5, "temperature": 2.0, "key": DIGEST, "privacy": DIGEST}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("noise")
    samples = replace(tiny_samples(5), privacy=PRIVACY)
    return dump_teacher(TinyTeacher(), samples, folder / "c.kdcache", noise={"sigma": 1, "key": str(folder / "k")})


def test_the_record_has_the_keys_of_the_table_in_their_order(cache: Cache) -> None:
    written = cache.manifest.plan.model_dump()["noise"]
    assert [key for key, _, _ in table("noise")] == list(written) == list(NoiseRecord.model_fields)


def test_the_digests_are_those_of_the_text(cache: Cache) -> None:
    noise, key = cache.manifest.plan.noise, (cache.path.parent / "k").read_bytes()
    assert noise is not None
    assert noise.key == "sha256:" + hashlib.sha256(b"kdcache secret key\0" + key).hexdigest()
    assert noise.privacy == "sha256:" + hashlib.sha256(PRIVACY.astype("<f8").tobytes()).hexdigest()


def test_a_plan_without_noise_has_no_key_for_it(tmp_path: Path) -> None:
    cache = dump_teacher(TinyTeacher(), tiny_samples(5), tmp_path / "c.kdcache")
    assert "noise" not in cache.manifest.plan.model_dump()
    assert b'"noise"' not in (cache.path / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": 0.0},
        {"sigma": -1.0},
        {"sigma": float("inf")},
        {"sigma": float("nan")},
        {"sigma": "1.0"},
        {"temperature": 0.5},
        {"temperature": float("inf")},
        {"temperature": None},
        {"key": "0" * 64},
        {"key": None},
        {"privacy": "sha256:0"},
        {"seed": 0},
    ],
)
def test_other_records_are_refused(change: dict[str, Any]) -> None:
    NoiseRecord.model_validate(GOOD)
    with pytest.raises(ValidationError):
        NoiseRecord.model_validate(GOOD | change)


def test_noise_does_not_belong_to_a_cache_of_other_outputs() -> None:
    plan = read_manifest(GOLDEN / "outputs-v1.kdcache" / "manifest.json").plan.model_dump()
    assert Plan.model_validate(plan).noise is None
    with pytest.raises(ValidationError, match="noise"):
        Plan.model_validate({**plan, "noise": GOOD})


def test_in_words() -> None:
    assert described_noise(None) == {}
    plain = described_noise(NoiseRecord(sigma=0.25, temperature=1.0, key=DIGEST))["noise"]
    assert plain == "normal noise of deviation 0.25 on the logits of all samples, from the key sha256:000000000000..."
    divided = described_noise(NoiseRecord.model_validate(GOOD))["noise"]
    assert divided.startswith("logits divided by 2, then normal noise") and "by their privacy" in divided
