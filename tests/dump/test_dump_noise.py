"""Noise at the dump: everything that sees the teacher sees it, whatever happens, and only its key takes it away."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import kdcache, npz_recipe, ok, refused
from helpers.interrupts import StopsAfter
from helpers.processes import exit_code, recipe
from helpers.ranks import contents, ranks
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from torch import Tensor

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.config.cache import CacheSpec
from kdcache.curate.merge import merge
from kdcache.curate.select import select
from kdcache.data.alignment import select_images
from kdcache.data.views import View
from kdcache.dump import job as dump_job
from kdcache.dump.check_teacher import check_identity, compare_with_teacher
from kdcache.dump.plan import Pilot, run_pilot
from kdcache.errors import InterruptedRun, KdcacheError, MismatchError, UsageError

N = 37
SMALL: dict[str, Any] = {"shard_rows": 8, "batch_size": 5, "pilot_rows": N, "dtype": "float32"}
"""Four shards of 8 rows in batches of 5 and 3, and one of 5 rows."""

STRENGTH = {"sigma": 0.5, "temperature": 2.0}


def noise_of(folder: Path, **changed: Any) -> dict[str, Any]:
    return {**STRENGTH, "key": str(folder / "secret"), **changed}


def with_a_key(folder: Path) -> None:
    """Write a key that is the same each time, for figures that are random otherwise."""
    (folder / "secret").write_bytes(bytes(range(32)))


def private(samples: Samples | None = None) -> Samples:
    """A third of the samples is public, a third private, and a third in between."""
    samples = samples or tiny_samples(N)
    return replace(samples, privacy=np.arange(len(samples)) % 3 / 2)


def dumped(folder: Path, name: str = "c", samples: Samples | None = None, **options: Any) -> Cache:
    given = {"noise": noise_of(folder), **SMALL, **options}
    return dump_teacher(TinyTeacher(), samples or private(), folder / f"{name}.kdcache", **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return dumped(tmp_path_factory.mktemp("whole"))


def spec_of(cache: Cache, **changed: Any) -> CacheSpec:
    return CacheSpec.model_validate({**SMALL, "noise": noise_of(cache.path.parent, **changed)})


def without_noise(samples: Samples, transform: Any = (), view: int = 0) -> Tensor:
    images = View(samples, list(transform), 0, view).__getitems__(range(len(samples))).images
    return TinyTeacher().forward(images)


# The rows.


def test_rows_are_those_of_the_teacher_divided_and_with_noise(tmp_path: Path) -> None:
    with_a_key(tmp_path)
    samples = private(tiny_samples(3000))
    cache = dumped(tmp_path, samples=samples, shard_rows=None, batch_size=256)
    ids, live = torch.arange(3000), without_noise(samples)
    privacy = torch.arange(3000) % 3 / 2
    apart = cache.teacher()(ids).double() - live / (1 + privacy[:, None])
    assert float(apart[privacy == 0].abs().max()) < 1e-5  # the encoding is float32
    for w in (0.5, 1.0):
        values = apart[privacy == w] / (0.5 * w)
        count = values.numel()
        assert abs(float(values.mean())) < 5 / math.sqrt(count)
        assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / count)
    assert audit(cache.path).failure is None


def test_without_privacy_all_samples_get_noise(tmp_path: Path) -> None:
    with_a_key(tmp_path)
    cache = dumped(tmp_path, samples=tiny_samples(N))
    apart = cache.teacher()(torch.arange(N)) - without_noise(tiny_samples(N)) / 2
    assert bool((apart.abs().amax(dim=1) > 0.01).all())
    assert cache.manifest.plan.noise is not None and cache.manifest.plan.noise.privacy is None
    ones = replace(tiny_samples(N), privacy=np.ones(N))
    assert dumped(tmp_path, "ones", ones).manifest.digest == cache.manifest.digest


def test_views_have_noise_of_their_own(tmp_path: Path) -> None:
    with_a_key(tmp_path)
    cache = dumped(tmp_path, samples=tiny_samples(N), views=2, transform=FLIP)
    ids = torch.arange(N)
    first, second = (cache.teacher()(ids, view) - without_noise(tiny_samples(N), FLIP, view) / 2 for view in (0, 1))
    both = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))
    assert abs(float(both[0, 1])) < 5 / math.sqrt(N * 10)
    assert 0.4 < float(second.std()) < 0.6


def test_one_key_for_two_strengths_does_not_give_the_noise_away(tmp_path: Path) -> None:
    with_a_key(tmp_path)
    samples, ids = tiny_samples(N), torch.arange(N)
    caches = [dumped(tmp_path, str(s), samples, noise=noise_of(tmp_path, sigma=s, temperature=1.0)) for s in (1.0, 2.0)]
    first, second = (cache.teacher()(ids) - without_noise(samples) for cache in caches)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 5 / math.sqrt(N * 10)


class Softmax(TinyTeacher):
    """A teacher that returns probabilities."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(dim=1)


def test_of_probabilities_it_is_on_their_logarithms(tmp_path: Path) -> None:
    samples = private()
    cache = dump_teacher(Softmax(), samples, tmp_path / "c.kdcache", noise=noise_of(tmp_path), **SMALL)
    assert cache.manifest.plan.teacher.level == "unknown"
    rows, live = cache.teacher()(torch.arange(N)), without_noise(samples).log_softmax(dim=1)
    torch.testing.assert_close(rows[::3].log_softmax(1), live[::3], rtol=0, atol=1e-4)
    assert check_identity(cache, Softmax(), samples, spec_of(cache)) is not None


# Everything that looks at the teacher sees the same noise.


def test_the_plan_records_strength_and_digests_alone(whole: Cache) -> None:
    secret = (whole.path.parent / "secret").read_bytes()
    noise = whole.manifest.plan.noise
    assert noise is not None and (noise.sigma, noise.temperature) == (0.5, 2.0)
    files = b"".join(path.read_bytes() for path in whole.path.rglob("*") if path.is_file())
    assert secret not in files and secret.hex().encode() not in files
    assert "secret" not in (whole.path / "manifest.json").read_text(encoding="utf-8")


def test_the_pilot_has_the_noise_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pilots: list[Pilot] = []

    def kept_pilot(*given: Any) -> Pilot:
        pilots.append(run_pilot(*given))
        return pilots[-1]

    monkeypatch.setattr(dump_job, "run_pilot", kept_pilot)
    cache = dumped(tmp_path, top_k=3, rank=2)
    assert len(pilots) == 1
    kept = pilots[0].class_logits().topk(3, dim=1)  # of all rows, in order; each keeps these classes
    rows = cache.teacher()(torch.arange(N)).gather(1, kept.indices)
    torch.testing.assert_close(rows, kept.values, rtol=1e-4, atol=1e-4)


def test_the_probes_of_an_unsealed_cache_have_noise(tmp_path: Path) -> None:
    with_a_key(tmp_path)
    with pytest.raises(InterruptedRun):
        dumped(tmp_path, samples=tiny_samples(N), progress=StopsAfter(4))
    with np.load(tmp_path / "c.kdcache" / "probes.npz") as probes:
        ids, logits = probes["ids"], torch.from_numpy(probes["logits"])
    live = without_noise(tiny_samples(N))[torch.from_numpy(ids)] / 2
    apart = logits - live
    assert 0.3 < float(apart.std()) < 0.7
    assert bool((apart.abs().amax(dim=1) > 0.01).all())


def test_verify_draws_the_noise_again(whole: Cache) -> None:
    found = check_identity(whole, TinyTeacher(), private(), spec_of(whole))
    assert found is not None and found.relative == 0
    for agreement in compare_with_teacher(whole, TinyTeacher(), private(), spec_of(whole)):
        assert agreement.total_variation < 1e-5 and agreement.top1 == 1


def test_a_cache_that_is_complete_is_left_as_it_is(whole: Cache) -> None:
    before = contents(whole.path)
    assert dumped(whole.path.parent).manifest == whole.manifest
    assert contents(whole.path) == before


@pytest.mark.parametrize("batches", [1, 3, 6, 9])
def test_a_dump_that_is_resumed_is_the_same_to_the_byte(batches: int, tmp_path: Path, whole: Cache) -> None:
    (tmp_path / "secret").write_bytes((whole.path.parent / "secret").read_bytes())
    with pytest.raises(InterruptedRun):
        dumped(tmp_path, progress=StopsAfter(batches))
    assert dumped(tmp_path).manifest.digest == whole.manifest.digest
    assert contents(tmp_path / "c.kdcache") == contents(whole.path)


def test_ranks_make_the_same_cache(tmp_path: Path) -> None:
    pipeline = recipe(tmp_path)
    noise = f"noise: {{sigma: 0.5, temperature: 2, key: {tmp_path / 'secret'}}}, top_k: 3"
    pipeline.write_text(pipeline.read_text(encoding="utf-8").replace("top_k: 3", noise))
    ok("dump-teacher", pipeline, "-o", tmp_path / "one.kdcache", "--device", "cpu")
    (tmp_path / "two").mkdir()
    with ranks(2, pipeline, tmp_path / "two" / "c.kdcache") as processes:
        assert [exit_code(process) for process in processes] == [0, 0]
    assert contents(tmp_path / "two" / "c.kdcache") == contents(tmp_path / "one.kdcache")


def test_a_cache_is_extended_by_views(tmp_path: Path) -> None:
    more: dict[str, Any] = {"views": 2, "transform": FLIP}
    small = dumped(tmp_path, "small", transform=FLIP)
    large = dumped(tmp_path, "large", extends=small, **more)
    assert large.manifest.digest == dumped(tmp_path, "at-once", **more).manifest.digest


def part(samples: Samples, ids: Any) -> Samples:
    """Some of the samples, in the order of the ids."""
    ids = np.asarray(ids)
    privacy = None if samples.privacy is None else samples.privacy[ids]
    return replace(samples, images=select_images(samples.images, ids), labels=samples.labels[ids], privacy=privacy)


def test_a_cache_is_extended_by_samples_with_the_privacy_that_they_had(tmp_path: Path) -> None:
    first = part(private(), range(20))
    small = dumped(tmp_path, "small", first)
    large = dumped(tmp_path, "large", private(), extends=small)
    ids = torch.arange(N)
    assert torch.equal(large.teacher()(ids), dumped(tmp_path, "at-once", private()).teacher()(ids))
    check_identity(large, TinyTeacher(), private(), spec_of(large))
    changed = replace(private(), privacy=np.where(np.arange(N) == 4, 1.0, np.arange(N) % 3 / 2))
    with pytest.raises(MismatchError, match=r"noise\.privacy"):
        dumped(tmp_path, "other", changed, extends=small)


def test_an_image_that_is_replaced_before_a_dump_is_resumed_gets_other_noise(tmp_path: Path) -> None:
    samples = tiny_samples(N)
    with pytest.raises(InterruptedRun):
        dumped(tmp_path, samples=samples, progress=StopsAfter(9))
    pixels = torch.stack([torch.as_tensor(samples.images.picture(i)) for i in range(N)])
    pixels[3, 0, 2, 2] += 1
    changed = replace(samples, images=type(samples.images)(pixels))  # type: ignore[call-arg]
    resumed = dumped(tmp_path, samples=changed)
    assert resumed.manifest.digest == dumped(tmp_path, "again", changed).manifest.digest


def test_selected_and_merged_caches_keep_the_record_and_can_be_verified(tmp_path: Path) -> None:
    samples = private()
    cache = dumped(tmp_path)
    some = np.array([30, 2, 17, 8, 16])
    selected = select(cache, tmp_path / "some.kdcache", samples=some, data=samples)
    assert selected.manifest.plan.noise == cache.manifest.plan.noise
    found = compare_with_teacher(selected, TinyTeacher(), part(samples, some), spec_of(cache))
    assert found[0].total_variation < 1e-5
    parts = [part(samples, range(20)), part(samples, range(20, N))]
    merged = merge(
        [dumped(tmp_path, f"part{i}", samples_of_part) for i, samples_of_part in enumerate(parts)],
        tmp_path / "merged.kdcache",
        data=samples,
    )
    assert torch.equal(merged.teacher()(torch.arange(N)), cache.teacher()(torch.arange(N)))
    assert compare_with_teacher(merged, TinyTeacher(), samples, spec_of(cache))[0].total_variation < 1e-5
    noises = [one.manifest.plan.noise for one in (merged, cache)]
    assert noises[0] is not None and noises[1] is not None and noises[0].privacy != noises[1].privacy
    plain = dump_teacher(TinyTeacher(), parts[1], tmp_path / "plain.kdcache", **SMALL)
    with pytest.raises(MismatchError, match="noise"):
        merge([open_cache(tmp_path / "part0.kdcache"), plain], tmp_path / "mixed.kdcache", data=samples)


# What is refused.


def begin(folder: Path) -> None:
    with pytest.raises(InterruptedRun):
        dumped(folder, progress=StopsAfter(4))


def lose(key: Path) -> None:
    key.unlink()


def replace_key(key: Path) -> None:
    key.write_bytes(bytes(range(32)))


def shorten(key: Path) -> None:
    key.write_bytes(b"too short")


@pytest.mark.parametrize(
    ("change", "error", "words", "fix"),
    [
        (lose, UsageError, "key of .* is not there", "copy it there"),
        (replace_key, MismatchError, "is not that of .*kdcache", "make a new cache"),
        (shorten, UsageError, "9 bytes", "another file"),
    ],
)
def test_without_its_key_a_cache_is_not_used_further(
    change: Callable[[Path], None], error: type[KdcacheError], words: str, fix: str, tmp_path: Path
) -> None:
    sealed = dumped(tmp_path, "sealed", transform=FLIP)
    begin(tmp_path)
    change(tmp_path / "secret")
    before = contents(tmp_path / "c.kdcache")
    for go_on in (
        lambda: dumped(tmp_path),
        lambda: dumped(tmp_path, "sealed", transform=FLIP),
        lambda: dumped(tmp_path, "more", extends=sealed, views=2, transform=FLIP),
        lambda: check_identity(sealed, TinyTeacher(), private(), spec_of(sealed)),
        lambda: compare_with_teacher(sealed, TinyTeacher(), private(), spec_of(sealed)),
    ):
        with pytest.raises(error, match=words) as found:
            go_on()
        assert fix in found.value.fix
    assert contents(tmp_path / "c.kdcache") == before
    assert change is not lose or not (tmp_path / "secret").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": {**STRENGTH, "sigma": 0.6}}, r"noise\.sigma: 0\.5, 0\.6"),
        ({"noise": {**STRENGTH, "temperature": 1.0}}, r"noise\.temperature: 2\.0, 1\.0"),
        ({"noise": None}, "noise: .*, None"),
        ({"samples": replace(private(), privacy=np.full(N, 0.25))}, r"noise\.privacy: sha256:.*, sha256:"),
        ({"samples": tiny_samples(N)}, r"noise\.privacy: sha256:.*, None"),
    ],
)
def test_with_other_noise_a_cache_is_not_resumed(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    begin(tmp_path)
    if options.get("noise"):
        options = {"noise": {**options["noise"], "key": str(tmp_path / "secret")}}
    with pytest.raises(MismatchError, match=words):
        dumped(tmp_path, **options)


@pytest.mark.parametrize(
    ("changed", "samples", "error", "words"),
    [
        ({"sigma": 0.4}, private(), MismatchError, "sigma 0.5 and temperature 2.0, that of these settings 0.4"),
        ({}, tiny_samples(N), MismatchError, "privacy 1, those of"),
        (None, private(), UsageError, "name no key"),
    ],
)
def test_with_other_settings_a_cache_is_not_verified(
    changed: dict[str, Any] | None, samples: Samples, error: type[KdcacheError], words: str, whole: Cache
) -> None:
    spec = CacheSpec() if changed is None else spec_of(whole, **changed)
    for check in (check_identity, compare_with_teacher):
        with pytest.raises(error, match=words):
            check(whole, TinyTeacher(), samples, spec)


def test_noise_is_not_added_to_a_cache_without(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRun):
        dumped(tmp_path, noise=None, progress=StopsAfter(4))
    with pytest.raises(MismatchError, match="made without noise"):
        dumped(tmp_path)
    assert not (tmp_path / "secret").exists()


@pytest.mark.parametrize("where", ["new.kdcache/key", "c.kdcache/key", "c.kdcache/data.zarr/key"])
def test_a_key_is_not_kept_in_a_cache(where: str, tmp_path: Path, whole: Cache) -> None:
    key = whole.path.parent / where
    with pytest.raises(UsageError, match=r"inside the cache|in the folder of the cache"):
        dumped(whole.path.parent, "new", noise=noise_of(tmp_path, key=str(key)))
    assert not key.exists() and not (whole.path.parent / "new.kdcache").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": {"sigma": 0, "key": "k"}}, "sigma"),
        ({"noise": {"sigma": -1.0, "key": "k"}}, "sigma"),
        ({"noise": {"sigma": float("nan"), "key": "k"}}, "sigma"),
        ({"noise": {"sigma": float("inf"), "key": "k"}}, "sigma"),
        ({"noise": {"sigma": 0.5, "temperature": 0.9, "key": "k"}}, "temperature"),
        ({"noise": {"sigma": 0.5}}, "key"),
        ({"noise": {"key": "k"}}, "sigma"),
        ({"noise": {"sigma": 0.5, "key": "k"}, "outputs": {"features": {}}}, "outputs"),
        ({"noise": {"sigma": 0.5, "key": "k"}, "outputs": {"features": {}}, "logits": False}, "logits"),
    ],
)
def test_settings_that_are_not_noise(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        dumped(tmp_path, **options)
    assert not (tmp_path / "c.kdcache").exists()


# On the command line.


def test_notes_about_the_key(tmp_path: Path) -> None:
    progress = StopsAfter()
    dumped(tmp_path, progress=progress)
    assert len([said for said in progress.said if "is a new secret key" in said]) == 1
    (tmp_path / "secret").chmod(0o644)
    again = StopsAfter()
    dumped(tmp_path, "second", progress=again)
    assert [said for said in again.said if "secret" in said] == [
        f"note: other users of this machine can read the key {tmp_path / 'secret'}: chmod 600 {tmp_path / 'secret'}"
    ]


def test_from_pipeline_to_card(tmp_path: Path) -> None:
    pipeline = npz_recipe(tmp_path, privacy=np.arange(60) % 2)
    ok("train-teacher", pipeline, "-o", tmp_path / "t")
    noise = ("--set", f"cache.noise={{sigma: 0.5, temperature: 2, key: {tmp_path / 'k'}}}")
    estimated = json.loads(ok("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", *noise, "--dry-run", "--json"))
    assert estimated["rows"] == 48 and not (tmp_path / "k").exists()
    done = kdcache("dump-teacher", pipeline, "-o", tmp_path / "c.kdcache", *noise)
    assert done.exit_code == 0 and f"{tmp_path / 'k'} is a new secret key" in done.stderr
    cache = tmp_path / "c.kdcache"
    line = "logits divided by 2, then normal noise of deviation 0.5 on the logits of samples by their privacy"
    assert line in ok("info", cache)
    card = (cache / "README.md").read_text(encoding="utf-8")
    assert line in card and "not a proof of differential privacy" in card
    assert json.loads(ok("info", cache, "--json"))["plan"]["noise"]["sigma"] == 0.5
    assert json.loads(ok("verify", cache, pipeline, "--teacher", "--json", *noise))["identity"][
        "relative_difference"
    ] == pytest.approx(0, abs=1e-4)
    assert "name no key" in refused(2, "verify", cache, pipeline, "--teacher")
    np.savez(tmp_path / "l.npz", logits=np.zeros((1, 48, 3), np.float32))
    words = refused(2, "convert", tmp_path / "l.npz", "--pipeline", pipeline, "-o", tmp_path / "i.kdcache", *noise)
    assert "these logits come from files" in words


def test_private_samples_without_noise_are_told_of(tmp_path: Path) -> None:
    said = StopsAfter()
    dump_teacher(TinyTeacher(), private(), tmp_path / "c.kdcache", progress=said)
    assert any("without cache.noise their logits are stored exactly" in line for line in said.said)
