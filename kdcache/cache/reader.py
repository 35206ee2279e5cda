"""Open a cache, and use it as a teacher.

    cache = open_cache("digits.kdcache")
    teacher = cache.teacher(device="cuda")
    logits = teacher(ids, view=0)              # [B, C] float32, on that device

The Zarr store is not read for each batch. The encoded rows are loaded once, to where they fit (`cache/placement`); a
batch is gathered there, and decoded on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import array_specs, store_files, stored_bases, zarr_store
from kdcache.cache.format.array_specs import labels_of, output_encoding
from kdcache.cache.format.encoding import Encoding
from kdcache.cache.format.grid_encoding import GridEncoding
from kdcache.cache.format.output_records import DEFAULT_OUTPUT, OutputRecord, VectorEncoding
from kdcache.cache.format.read_records import read_manifest, read_plan
from kdcache.cache.format.recorded_views import Crops, recorded
from kdcache.cache.format.schema import MANIFEST, PLAN, Manifest
from kdcache.cache.format.stored_crops import StoredCrops
from kdcache.cache.format.stored_sequences import check_same_tokens, read_vocabulary
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.vector_rows import VectorBasis
from kdcache.cache.format.verified_files import AGAIN, VerifiedFiles, check_before_reading, check_when_read, raise_first
from kdcache.cache.placement.choose import Placement, place_rows
from kdcache.cache.preconditions import refuse_sequences
from kdcache.cache.remote.address import source
from kdcache.cache.remote.mirror import (
    Views,
    check_here,
    check_pinned,
    files_of,
    mirror,
    unfinished_pull,
    views_here,
    wanted_views,
)
from kdcache.cache.sequences import CachedSequences, placed_sequences
from kdcache.cache.teacher import CachedOutput, CachedTeacher
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, UsageError, did_you_mean
from kdcache.runtime.progress import Progress
from kdcache.runtime.terminal import reporter

_CHECKED_WHEN_OPENED = 2**28
"""Largest size in bytes of the files that are checked when a cache is opened, not when they are first read."""


@dataclass(frozen=True, repr=False)
class Cache:
    """A sealed cache.

    Attributes:
        path: its folder.
        manifest: the description of its contents, with the hashes of all files.
        labels: [N] int32, -1 if unknown.
        sample_keys: [N] uint64, content keys of the samples.
        views: indices of the opened views, ascending; all, unless the folder holds only some of them.
    """

    path: Path
    manifest: Manifest
    labels: npt.NDArray[np.int32]
    sample_keys: npt.NDArray[np.uint64]
    views: tuple[int, ...]

    def __len__(self) -> int:
        return self.manifest.plan.dataset.samples

    def __repr__(self) -> str:
        plan = self.manifest.plan
        outputs = f", outputs={plan.output_names}" if plan.outputs else ""
        what = f"samples={len(self):,}, classes={self.num_classes:,}, views={len(self.views)}"
        if plan.sequences is not None:
            what = f"sequences={len(self):,}, vocabulary={plan.sequences.vocabulary.size:,}"
        return (
            f"Cache({str(self.path)!r}, teacher={plan.teacher.name!r}, {what}{outputs}, "
            f"digest={self.manifest.digest!r})"
        )

    def check_views(self, views: Collection[int] | None = None) -> None:
        """Check that some views are here, or all; a pull may have downloaded fewer.

        Raises:
            IncompleteError: with the missing views.
        """
        check_here(self.path, self.manifest.plan.views.count, self.views, views)

    def check_files(self, progress: Progress | bool | None = None) -> None:
        """Check all files of the opened views that were not checked yet; those of a large cache are when first read.

        Raises:
            CorruptError: if one differs from what was written.
        """
        check_before_reading(self.path, progress=reporter(progress))

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set, C."""
        return len(self.manifest.plan.dataset.class_names)

    @property
    def bytes_on_disk(self) -> int:
        """Sum of the sizes of its files, including the manifest."""
        return sum(record.size for record in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size

    @property
    def crops(self) -> Crops | None:
        """The recorded crop boxes of its views, for `View`; None if the crops follow from the seed."""
        plan = self.manifest.plan
        return StoredCrops(self.path.absolute(), plan) if recorded(plan.views.transform) == "crops" else None

    @property
    def teacher_seen(self) -> bool:
        """Whether kdcache ran the teacher; if not, its images and its identity were not verified."""
        return self.manifest.plan.teacher.was_run

    @property
    def level_known(self) -> bool:
        """Whether the logits are known exactly; if not, they are known up to an additive constant per row."""
        return self.manifest.plan.teacher.level is None

    @property
    def vocabulary(self) -> list[bytes] | None:
        """The token of each id, of a cache of sequences whose vocabulary is stored; else None."""
        return read_vocabulary(self.path, self.manifest.plan)

    def check_vocabulary(self, tokens: Sequence[bytes], where: str = "the student's vocabulary") -> None:
        """Check that a student's tokens, by id, are those of the teacher; more of them may follow.

        Where the cache knows only the number of tokens, it compares that.

        Args:
            tokens: bytes of the token of each id.
            where: what they are of, for the message.

        Raises:
            UsageError: if the samples are not sequences.
            MismatchError: with the first id that differs, and both tokens.
        """
        plan = self.manifest.plan
        if plan.sequences is None:
            raise UsageError(f"the samples of {self.path} are not sequences", "check a cache of a language model")
        check_same_tokens(self.path, plan, tokens, where)

    @property
    def outputs(self) -> dict[str, OutputRecord]:
        """Outputs of the teacher beside its class logits, by name."""
        return dict(self.manifest.plan.named_outputs)

    @overload
    def teacher(
        self,
        output: None = None,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
    ) -> CachedTeacher: ...
    @overload
    def teacher(
        self,
        output: str,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
    ) -> CachedTeacher | CachedOutput: ...
    def teacher(
        self,
        output: str | None = None,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
    ) -> CachedTeacher | CachedOutput:
        """Return the teacher: a callable `(ids [B], view) -> logits [B, C]` on `device`.

        Another output is [B, D], and maps are [B, C, h, w].

        Args:
            output: name of one of its outputs; None for the class logits.
            device: device of what it returns.
            placement: where the rows are held; `auto` uses the first of device, host, mmap and stream that they fit.

        Raises:
            UsageError: if the placement is unknown, the cache has no such output, or its samples are sequences.
            MismatchError: if the class logits are requested of a cache that holds other outputs only.
            IncompleteError: if the record files of the placement mmap do not fit on the disk.
        """
        plan, name = self.manifest.plan, DEFAULT_OUTPUT if output is None else str(output)
        refuse_sequences(plan, "a teacher of samples", "use cache.sequences(), the teacher of sequences")
        if output is not None:
            self._check_output(name)
        encoding = output_encoding(plan, name)
        placed = place_rows(self.path, self.manifest, device, placement, self.views, name)
        basis = stored_bases.read_output_basis(self.path, plan, name)
        basis = basis.to(device) if basis is not None else None
        opened = self.views if len(self.views) < plan.views.count else None
        if isinstance(encoding, VectorEncoding | GridEncoding):
            axes = basis if isinstance(basis, VectorBasis) else None
            where = torch.device(device)
            return CachedOutput(name, *placed, plan.views.count, len(self), where, encoding, axes, opened)
        if not isinstance(encoding, Encoding):
            raise TypeError("rows of tokens belong to sequences")
        tails = basis if isinstance(basis, TailBasis) else None
        labels = torch.from_numpy(labels_of(plan, name, self.labels)).to(device)
        return CachedTeacher(*placed, plan.views.count, labels, encoding, tails, opened)

    def sequences(
        self,
        output: str | None = None,
        *,
        device: torch.device | str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
    ) -> CachedSequences:
        """Return the teacher of a cache of sequences: a callable from sequences, or prefixes of them, to their rows.

        Args:
            output: name of an output; None if there is only one.
            device: device of what it returns.
            placement: where tokens and rows are held, as for `teacher`.

        Raises:
            UsageError: if the samples are not sequences, or an output is not named.
            IncompleteError: if the record files of the placement mmap do not fit on the disk.
        """
        plan = self.manifest.plan
        if plan.sequences is None:
            raise UsageError(
                f"the samples of {self.path} are not sequences of tokens",
                "give a cache of a language model; in Python a cache of images has cache.teacher()",
            )
        if output is None and len(plan.output_names) > 1:
            raise UsageError("the cache has several outputs", f"name one of {', '.join(plan.output_names)}")
        name = plan.output_names[0] if output is None else output
        self._check_output(name)
        return placed_sequences(self.path, self.manifest, name, device, placement)

    def _check_output(self, name: str) -> None:
        """Raise UsageError if the cache has no output of a name."""
        names = self.manifest.plan.output_names
        if name not in names:
            is_device = name.split(":", maxsplit=1)[0] in ("cpu", "cuda", "mps")
            raise UsageError(
                f"the cache has no output {name!r}{did_you_mean(name, names)}: it has {', '.join(names)}",
                f"name one of these{f', and pass device={name!r}' if is_device else ''}",
            )


def open_cache(
    path: str | Path, views: Views = None, digest: str | None = None, progress: Progress | bool | None = None
) -> Cache:
    """Open a sealed cache. Every file is checked against its manifest before it is used.

    The files of a cache of up to 256 MB are checked here, those of a larger one when they are first read, and both once
    per machine: a file that was not changed since it was checked is recognized.

    Args:
        path: its folder, or a URL, which is copied to kdcache's own folder. With a suffix `#sha256:...`, or with
            `digest`, the cache must have that root digest.
        views: the indices of some views, the number of the first views, or None for all that are there.
        digest: the expected root digest.
        progress: True to show the progress of copying on stderr, or a progress reporter; silent if None.

    Raises:
        UsageError: if there is no cache at `path`, or it has no such view.
        IncompleteError: if it is not sealed, or a requested view is not there.
        MismatchError: if it has another digest.
        CorruptError: if a file is missing or differs, as far as it is checked here, or the manifest is invalid.
    """
    address = source(path, digest)
    if address.is_remote:
        copy = mirror(address, None, views, reporter(progress))
        return opened(copy.folder, copy.manifest, copy.views)
    path = Path(address.where)
    if not (path / MANIFEST).is_file():
        raise refusal(path)
    manifest = read_manifest(path / MANIFEST)
    check_pinned(path, manifest.digest, address.digest)
    store_files.check_listed(path, manifest.plan, {name: record.size for name, record in manifest.files.items()})
    available = views_here(path, manifest.plan)
    wanted = available if views is None else wanted_views(manifest.plan, views)
    check_here(path, manifest.plan.views.count, available, wanted)
    _check_files(path, manifest, wanted)
    return opened(path, manifest, wanted)


def _check_files(path: Path, manifest: Manifest, views: tuple[int, ...]) -> None:
    """Check the files of some views: those of a large cache when they are first read.

    Raises:
        CorruptError: if one is missing, has another size, or was read and differs from what was written.
    """
    expected = files_of(manifest, views)
    files = VerifiedFiles(path, manifest.digest, expected)
    raise_first(path, files.find_unchecked(), f"files of {len(expected)}")
    check_when_read(files)
    files.check(None if files.unchecked_bytes <= _CHECKED_WHEN_OPENED else store_files.common_files(manifest.plan))


def opened(path: Path, manifest: Manifest, views: tuple[int, ...]) -> Cache:
    """Return a cache whose manifest and files were checked."""
    labels, keys = zarr_store.read_samples(path, manifest.plan)
    return Cache(path, manifest, labels, keys, views)


def open_sealed(path: Path) -> Cache:
    """Open a cache that this run has just sealed, without hashing its files again."""
    manifest = read_manifest(path / MANIFEST)
    return opened(path, manifest, tuple(range(manifest.plan.views.count)))


def refusal(path: Path) -> KdcacheError:
    """Return the error for a folder without a manifest: not a cache, or not sealed."""
    if not path.exists():
        return UsageError(
            f"there is no cache {path}",
            "make one with `kdcache dump-teacher PIPELINE -o NAME.kdcache` or kdcache.dump_teacher(...)",
        )
    if not (path / PLAN).is_file():
        if (unfinished := unfinished_pull(path)) is not None:
            return unfinished
        if (path / array_specs.STORE).is_dir():
            return CorruptError(f"{path / MANIFEST} is missing", AGAIN)
        return UsageError(f"{path} is not a cache: it holds neither manifest nor plan", "pass the .kdcache folder")
    plan = read_plan(path / PLAN)
    total = plan.views.count * plan.shards
    written = len(list((path / "commits").glob("*/*.json")))
    return IncompleteError(
        f"{path} is not sealed: {total - written} of its {total} shards are missing",
        f"run the same command again to resume: kdcache dump-teacher PIPELINE -o {path}",
    )
