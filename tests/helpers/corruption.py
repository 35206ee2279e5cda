"""Caches that are damaged or forged on purpose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers.tiny import TinyTeacher, tiny_samples
from kdcache import Cache, dump_teacher
from kdcache.config.cache import CacheSpec

SPEC = CacheSpec(top_k=3, tail="uniform", pilot_rows=1, shard_rows=8, batch_size=5, seed=3)


class BatchMinded(TinyTeacher):
    """Its logits depend on the batch that an image comes in."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) - images.mean()


def as_written(manifest: object) -> bytes:
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def listing(name: str) -> Callable[[Any], None]:
    """One more file, such as the first one."""
    return lambda manifest: manifest["files"].update({name: next(iter(manifest["files"].values()))})


def shaped(**changes: object) -> Callable[[Any], None]:
    """Another shape than shards of 8 rows in one chunk, with a fingerprint of each."""
    return setting({"shard_rows": 8, "chunk_rows": 8, "fingerprint_stride": 1} | changes, "plan", "shape")


SHARD_FILE = "data.zarr/log_probs/c/0/0/0"


def dump(out: Path) -> Cache:
    """A cache of two shards, in batches that do not fill them."""
    return dump_teacher(BatchMinded(), tiny_samples(12), out, spec=SPEC)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but a card: it is made of a cache that is sealed, and covered by no digest."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(("README.md", "card.")))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def flipped(data: bytes, position: int) -> bytes:
    """The same bytes with one bit changed in one of them."""
    spoiled = bytearray(data)
    spoiled[position] ^= 1 << position % 8
    return bytes(spoiled)


def forge(cache: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest and give it the digest that it ought to have."""
    path = cache / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest = change(manifest) or manifest
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        manifest["files"] = dict(sorted(manifest["files"].items()))
    if isinstance(manifest, dict) and "digest" in manifest:
        manifest["digest"] = "sha256:" + "0" * 64
        manifest["digest"] = f"sha256:{hashlib.sha256(as_written(manifest)).hexdigest()}"
    path.write_bytes(as_written(manifest))


def setting(value: object, *keys: str) -> Callable[[Any], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


FORGED: dict[str, Callable[[Any], object]] = {
    "unknown key": setting(1, "color"),
    "unknown key of the plan": setting(1, "plan", "color"),
    "unknown key of a file": setting(1, "files", SHARD_FILE, "color"),
    "key missing": lambda manifest: manifest["plan"].pop("licence") and None,
    "list": lambda manifest: [manifest],
    "number": lambda _: 5,
    "samples text": setting("12", "plan", "dataset", "samples"),
    "samples fraction": setting(12.0, "plan", "dataset", "samples"),
    "samples true": setting(True, "plan", "dataset", "samples"),
    "samples null": setting(None, "plan", "dataset", "samples"),
    "samples none": setting(0, "plan", "dataset", "samples"),
    "samples negative": setting(-12, "plan", "dataset", "samples"),
    "samples fewer": setting(11, "plan", "dataset", "samples"),
    "samples more": setting(16, "plan", "dataset", "samples"),
    "samples many": setting(2**40, "plan", "dataset", "samples"),
    "samples beyond": setting(2**63, "plan", "dataset", "samples"),
    "samples immense": setting(10**4000, "plan", "dataset", "samples"),
    "views many": setting(2**20, "plan", "views", "count"),
    "views none": setting(0, "plan", "views", "count"),
    "shards many": shaped(shard_rows=1, chunk_rows=1),
    "shards long": shaped(shard_rows=16),
    "shards none": shaped(shard_rows=0),
    "chunks none": shaped(chunk_rows=0),
    "chunks short": shaped(chunk_rows=4),
    "chunks uneven": shaped(chunk_rows=3),
    "chunks immense": shaped(shard_rows=2**40, chunk_rows=2**40),
    "stride other": shaped(fingerprint_stride=2),
    "stride none": shaped(fingerprint_stride=0),
    "stride negative": shaped(fingerprint_stride=-1),
    "stride uneven": shaped(fingerprint_stride=3),
    "stride immense": shaped(fingerprint_stride=2**40),
    "stride text": shaped(fingerprint_stride="1"),
    "stride missing": lambda manifest: manifest["plan"]["shape"].pop("fingerprint_stride") and None,
    "k other": setting(4, "plan", "encoding", "top_k"),
    "k none": setting(0, "plan", "encoding", "top_k"),
    "k more than classes": setting(11, "plan", "encoding", "top_k"),
    "k all": setting({"num_classes": 10, "top_k": 10, "tail": "none", "dtype": "float16"}, "plan", "encoding"),
    "classes many": setting(2**31, "plan", "encoding", "num_classes"),
    "class names few": setting(["one"], "plan", "dataset", "class_names"),
    "type other": setting("float32", "plan", "encoding", "dtype"),
    "type unknown": setting("float64", "plan", "encoding", "dtype"),
    "transform odd": setting([["rm"]], "plan", "views", "transform"),
    "transform not a number": setting([{"Normalize": {"mean": float("nan")}}], "plan", "views", "transform"),
    "summary not a number": setting(float("nan"), "summary", "mean_sharpness"),
    "summary infinite": setting(float("inf"), "summary", "mean_entropy"),
    "file above": listing("../x"),
    "file above, hidden": listing("data.zarr/../../x"),
    "file elsewhere": listing("/etc/passwd"),
    "file of Windows": listing("C:\\x"),
    "file without name": listing(""),
    "file spelled twice": listing("./" + SHARD_FILE),
    "file too many": listing("data.zarr/log_probs/c/0/2/0"),
    "file not listed": lambda manifest: manifest["files"].pop(SHARD_FILE) and None,
    "file null": setting(None, "files", SHARD_FILE),
    "size negative": setting(-1, "files", SHARD_FILE, "size"),
    "size huge": setting(2**62, "files", SHARD_FILE, "size"),
    "size beyond": setting(2**80, "files", SHARD_FILE, "size"),
    "size text": setting("9", "files", SHARD_FILE, "size"),
    "hash short": setting("ab" * 31, "files", SHARD_FILE, "sha256"),
    "hash long": setting("ab" * 33, "files", SHARD_FILE, "sha256"),
    "hash loud": setting("AB" * 32, "files", SHARD_FILE, "sha256"),
    "hash other": setting("ab" * 32, "files", SHARD_FILE, "sha256"),
    "weights digest short": setting("sha256:ab", "plan", "teacher", "weights_digest"),
    "version later": setting(99, "plan", "format_version"),
    "version negative": setting(-1, "plan", "format_version"),
    "version earlier": setting(0, "plan", "format_version"),
    "version text": setting("1", "plan", "format_version"),
    "version fraction": setting(1.0, "plan", "format_version"),
    "version true": setting(True, "plan", "format_version"),
    "version null": setting(None, "plan", "format_version"),
    "version list": setting([], "plan", "format_version"),
    "version missing": lambda manifest: manifest["plan"].pop("format_version") and None,
    "format other": setting("zip", "plan", "format"),
}


def refresh(cache: Path) -> None:
    """Let the manifest vouch for the files as they are now."""

    def change(manifest: Any) -> None:
        for name in manifest["files"]:
            data = (cache / name).read_bytes()
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    forge(cache, change)
