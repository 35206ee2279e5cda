"""Read plan, manifest, commit and file records, and reject any bytes that differ from what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kdcache.cache.format.encoding import Record
from kdcache.cache.format.schema import FORMAT_VERSION, Commit, FileRecord, Manifest, Plan, canonical, root_digest
from kdcache.errors import CorruptError


def read_manifest(path: Path | str, data: bytes | None = None) -> Manifest:
    """Read and check a manifest, or the `data` that were read from `path`: schema, canonical bytes and digest.

    Raises:
        CorruptError: if any byte differs from what was written.
    """
    data = Path(path).read_bytes() if data is None else data
    manifest = _read(path, Manifest, data)
    if manifest.digest != root_digest(manifest, data):
        raise _damaged(path, "its digest does not match its contents")
    return manifest


def read_plan(path: Path) -> Plan:
    """Read a plan; raise CorruptError if it differs from what was written."""
    return _read(path, Plan)


def read_commit(path: Path) -> Commit:
    """Read a commit marker; raise CorruptError if it differs from what was written."""
    return _read(path, Commit)


def read_file_record(path: Path) -> FileRecord:
    """Read the record of a file, stored beside it; raise CorruptError if it differs from what was written."""
    return _read(path, FileRecord)


R = TypeVar("R", bound=Record)


def _read(path: Path | str, kind: type[R], data: bytes | None = None) -> R:
    """Read a record, or parse the `data` that were read from `path`, and compare it with its canonical bytes.

    Raises:
        CorruptError: if it has another format version, or differs from what was written.
    """
    try:
        data = Path(path).read_bytes() if data is None else data
        content = json.loads(data)
        version = _version(content)
        if version not in (None, FORMAT_VERSION):
            raise CorruptError(
                f"{path} has format version {version!r}; this kdcache reads version {FORMAT_VERSION}",
                "dump the teacher again" if version == 0 else "pip install --upgrade kdcache, or dump it again",
            )
        record = kind.model_validate(content)
        written = canonical(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if written != data:
        raise _damaged(path, "its bytes differ from those that were written")
    return record


def _version(data: Any) -> Any:
    plan = data.get("plan", data) if isinstance(data, dict) else None
    return plan.get("format_version") if isinstance(plan, dict) else None


def _damaged(path: Path | str, why: str) -> CorruptError:
    return CorruptError(f"{path} is damaged: {why}", "download the cache again, or dump the teacher again")
