"""The noise of a cache: its secret key, its record in the plan, and the same noise again for anyone who has the key."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.schema import NoiseRecord, Plan, ViewsRecord
from kdcache.cache.preconditions import check_outside
from kdcache.config.cache import CacheSpec, NoiseSpec
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_drawn
from kdcache.errors import MismatchError, UsageError
from kdcache.models.noise import Noise, key_of_noise
from kdcache.models.teacher import TeacherIdentity
from kdcache.runtime.paths import expand
from kdcache.runtime.progress import Progress
from kdcache.runtime.secret_key import create_key, key_digest, read_key, readable_by_others

Keys = npt.NDArray[np.uint64]


class PlannedNoise(NamedTuple):
    """The noise of a cache that is made, with its record; both None without noise."""

    noise: Noise | None = None
    record: NoiseRecord | None = None


def privacy_digest(samples: Samples, count: int | None = None) -> str | None:
    """Return the digest of the privacy of the first `count` samples, or all; None if all of them are 1."""
    privacy = None if samples.privacy is None else samples.privacy[:count]
    if privacy is None or (privacy == 1).all():
        return None
    return f"sha256:{hashlib.sha256(privacy.astype('<f8').tobytes()).hexdigest()}"


def plan_noise(
    spec: CacheSpec,
    out: Path,
    path: Path,
    begun: Plan | None,
    teacher: tuple[TeacherIdentity, str],
    views: ViewsRecord,
    samples: Samples,
    keys: Keys,
    progress: Progress,
) -> PlannedNoise:
    """Return the noise of a dump, with a new key if a new cache is begun and there is none.

    Args:
        spec: settings of the noise.
        out: folder of the cache.
        path: of the cache that is complete, resumed or extended, or of the new one.
        begun: its plan; None for a new one.
        teacher: its identity, and the digest of its weights.
        views: seed and transform of the cache.
        samples: the data set, with the privacy of its samples.
        keys: [N] uint64, their content keys.
        progress: gets a note if a key is made, or others can read it.

    Raises:
        UsageError: if the key cannot be read or written, is too short, or would be inside a cache.
        MismatchError: if it is not that of the cache, or the cache was begun without noise.
    """
    if (settings := spec.noise) is None:
        return PlannedNoise()
    secret = _secret_of_new_cache(out, settings, progress) if begun is None else _secret_of(path, begun, settings)
    identity, weights = teacher
    context = _context({**identity._asdict(), "weights_digest": weights}, views, settings)
    return PlannedNoise(_noise(secret, context, settings, samples, keys, views), _record(secret, settings, samples))


def noise_of_cache(path: Path, plan: Plan, spec: CacheSpec, samples: Samples, keys: Keys) -> Noise | None:
    """Return the noise of a cache once more; None if it has none.

    Args:
        path: of the cache.
        plan: of the cache.
        spec: names the key.
        samples: the data set, with the privacy of its samples.
        keys: [N] uint64, content keys of the cache.

    Raises:
        UsageError: if the settings name no key, or it cannot be read.
        MismatchError: if it is another key, or strength or privacy differ.
    """
    record, settings = plan.noise, spec.noise
    if record is None:
        return None
    same = f"cache.noise to {{sigma: {record.sigma}, temperature: {record.temperature}, key: FILE}}"
    if settings is None:
        raise UsageError(
            f"the logits of {path} have noise, and these settings name no key to draw it from again",
            f"set {same}, with the key that it was made with; without this key, its teacher cannot be checked",
        )
    if (settings.sigma, settings.temperature) != (record.sigma, record.temperature):
        raise MismatchError(
            f"the noise of {path} has sigma {record.sigma} and temperature {record.temperature}, that of these "
            f"settings {settings.sigma} and {settings.temperature}",
            f"set {same}",
        )
    # A cache of selected or merged samples has the record of its parents, whose samples are not all here.
    if plan.lineage is None and (now := privacy_digest(samples)) != record.privacy:
        raise MismatchError(
            f"the samples of {samples.name}/{samples.split} have the privacy {now or '1'}, those of {path} "
            f"{record.privacy or '1'}",
            "give `privacy` the values that the cache was made with",
        )
    context = _context(plan.teacher.model_dump(), plan.views, settings)
    return _noise(_secret_of(path, plan, settings), context, settings, samples, keys, plan.views)


def noise_of_estimate(spec: CacheSpec, samples: Samples) -> PlannedNoise:
    """Return noise of the strength of a cache that is estimated, from a key that is forgotten: nothing is written."""
    if (settings := spec.noise) is None:
        return PlannedNoise()
    secret, ordinals = os.urandom(32), np.arange(len(samples), dtype=np.uint64)
    noise = Noise(secret, settings.sigma, settings.temperature, ordinals, samples.privacy, by_id=False)
    return PlannedNoise(noise, _record(secret, settings, samples))


def refuse_noise(spec: CacheSpec) -> None:
    """Refuse noise on logits that come from files.

    Raises:
        UsageError: if the settings ask for it.
    """
    if spec.noise is not None:
        raise UsageError(
            "noise is added when kdcache runs a teacher, and these logits come from files",
            "remove cache.noise, and add the noise before the files are written",
        )


def _context(teacher: dict[str, object], views: ViewsRecord, settings: NoiseSpec) -> dict[str, object]:
    """Return what all rows of a cache have in common, and what remains if it is extended, selected or merged."""
    return {
        "teacher": {name: teacher[name] for name in ("name", "arguments", "code_digest", "weights_digest")},
        "transform": views.transform,
        "seed": views.seed,
        "sigma": settings.sigma,
        "temperature": settings.temperature,
    }


def _record(secret: bytes, settings: NoiseSpec, samples: Samples) -> NoiseRecord:
    return NoiseRecord(
        sigma=settings.sigma,
        temperature=settings.temperature,
        key=key_digest(secret),
        privacy=privacy_digest(samples),
    )


def _noise(
    secret: bytes, context: dict[str, object], settings: NoiseSpec, samples: Samples, keys: Keys, views: ViewsRecord
) -> Noise:
    return Noise(
        key_of_noise(secret, context),
        settings.sigma,
        settings.temperature,
        keys,
        samples.privacy,
        by_id=is_drawn(views.transform),
    )


def _secret_of_new_cache(out: Path, settings: NoiseSpec, progress: Progress) -> bytes:
    """Return the secret of a new cache, which is made if its file does not exist."""
    path = expand(settings.key)
    check_outside(path)
    if path.absolute().is_relative_to(out.absolute()):
        raise UsageError(
            f"the key {path} would be in the folder of the cache, which is what is shared",
            "set cache.noise.key to a file elsewhere",
        )
    if os.path.lexists(path):
        secret = read_key(path)
        if readable_by_others(path):
            progress.say(f"note: other users of this machine can read the key {path}: chmod 600 {path}")
        return secret
    secret = create_key(path)
    progress.say(
        f"note: {path} is a new secret key. Anyone who has it can take the noise out of {out}; without it, the cache "
        "cannot be resumed, extended or checked against its teacher. Keep it, and do not share it"
    )
    return secret


def _secret_of(path: Path, plan: Plan, settings: NoiseSpec) -> bytes:
    """Return the secret of a cache that exists."""
    if plan.noise is None:
        raise MismatchError(
            f"{path} was made without noise, and these settings ask for it",
            "remove cache.noise, or write to another folder",
        )
    file = expand(settings.key)
    if not os.path.lexists(file):
        raise UsageError(
            f"the key of {path} is not there: {file}",
            f"copy it there, or set cache.noise.key to the file with the digest {plan.noise.key}; if it is lost, make "
            "a new cache",
        )
    secret = read_key(file)
    if (digest := key_digest(secret)) != plan.noise.key:
        raise MismatchError(
            f"the key {file} is not that of {path}: its digest is {digest}, and {plan.noise.key} is recorded",
            "set cache.noise.key to the key that the cache was begun with; with another key make a new cache",
        )
    return secret
