"""Check that a cache can be created, resumed or extended, and report the settings that differ."""

from __future__ import annotations

import os
from pathlib import Path

from kdcache.cache.format import array_specs
from kdcache.cache.format.encoding import Record
from kdcache.cache.format.schema import MANIFEST, PLAN, PROBES, Plan
from kdcache.cache.lock import LOCK, check_not_held
from kdcache.errors import MismatchError, UsageError
from kdcache.runtime.atomic_write import temporary
from kdcache.runtime.paths import check_writable


def check_outside(path: Path) -> None:
    """Check that a path is not inside a cache.

    Raises:
        UsageError: if it is.
    """
    inside = next((folder for folder in path.absolute().parents if (folder / array_specs.STORE).is_dir()), None)
    if inside is not None:
        raise UsageError(f"{path} is inside the cache {inside}", "write to a folder outside of it")


def check_place(path: Path) -> None:
    """Check that a cache can be created or resumed at `path`.

    Raises:
        UsageError: if it is something else, a sealed cache, inside a cache, or being written by another process.
    """
    if (path / MANIFEST).exists():
        raise UsageError(f"{path} is already a sealed cache", "write to another folder, or delete it first")
    check_outside(path)
    check_writable(path)
    if path.exists() and not (path / PLAN).exists():
        raise UsageError(f"{path} exists and is not a cache", "write to another folder")
    check_not_held(path)
    partial = temporary(path)
    if os.path.lexists(partial):
        is_folder = partial.is_dir() and not partial.is_symlink()
        if not is_folder or (any(partial.iterdir()) and not (partial / LOCK).is_file()):
            raise not_ours(partial)


def not_ours(path: Path) -> UsageError:
    """Return the error for a file or folder that has the name of temporary data of kdcache."""
    return UsageError(
        f"{path} exists and was not made by kdcache, which needs this name for temporary data",
        "rename or delete it, or write to another folder",
    )


def refuse_sequences(plan: Plan, what: str, fix: str) -> None:
    """Refuse a cache whose samples are sequences of tokens.

    Args:
        plan: of the cache.
        what: what needs samples with one row each.
        fix: what to do instead.

    Raises:
        UsageError: if the samples are sequences.
    """
    if plan.sequences is not None:
        raise UsageError(f"{what} needs samples with one row each; those of this cache are sequences of tokens", fix)


def check_same_plan(path: Path, before: Record, now: Record, name: str = "", note: str = "") -> None:
    """Check that a cache is resumed, or a sealed one extended, with the settings that it was made with.

    Args:
        path: of the cache.
        before: the plan of the cache, or the part of it called `name`.
        now: the same of this run.
        name: of the part.
        note: what else is known about the difference.

    Raises:
        MismatchError: with every setting that differs, and both values.
    """
    changes = [f"{key}: {old}, {new}" for key, old, new in differences(before.model_dump(), now.model_dump(), name)]
    if changes:
        notes = [note] if note else []
        raise MismatchError(
            "\n  ".join([f"{path} was made with other settings (in the cache, in this run):", *changes, *notes]),
            "use the settings of the cache, or make a new cache that does not extend it"
            if (path / MANIFEST).exists()
            else "use the same settings to resume, or delete the folder to start again",
        )


def check_sealed_plan(path: Path, sealed: Plan, now: Plan) -> None:
    """Check that a sealed cache has the plan of this run.

    Raises:
        UsageError: with every setting that differs, and both values.
    """
    if changes := differences(sealed.model_dump(), now.model_dump()):
        lines = [f"{key}: {old}, {new}" for key, old, new in changes]
        raise UsageError(
            "\n  ".join(
                [f"{path} is already a sealed cache, with other settings (in the cache, in this run):", *lines]
            ),
            "write to another folder, or delete it first",
        )


def remove_leftovers(path: Path) -> None:
    """Remove what a run that was killed after it had sealed a cache left in it."""
    for leftover in (PROBES, PLAN, LOCK):
        (path / leftover).unlink(missing_ok=True)


def differences(before: object, now: object, name: str = "") -> list[tuple[str, object, object]]:
    """Return what two nested dicts differ in: (key with its parents, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            change
            for key in keys
            for change in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [(name, before, now)]


def created_meanwhile(path: Path) -> UsageError:
    """Return the error of the process that lost the race to create a cache."""
    return UsageError(
        f"another process created {path} at the same time",
        "wait until that process has ended and run the same command again, or write to another folder",
    )


def sealed_meanwhile(path: Path) -> UsageError:
    """Return the error of a process that waited until another one had sealed the cache."""
    return UsageError(
        f"{path} is already a sealed cache: another process completed it just now",
        "run the same command again: it ends at once if the cache has the same settings",
    )
