"""A cache is a teacher: opened once, it answers for any sample ids, as the network would.

    cache = open_cache("digits.kdcache")
    teacher = cache.teacher(device="cuda")
    logits = teacher(ids, view=0)              # [B, C] float32, on that device

The rows are read from Zarr once, and never again: they stay encoded in the memory of the device, and a batch is
gathered and decoded there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache import layout
from kdcache.cache.basis import TailBasis
from kdcache.cache.codec import Rows, decode
from kdcache.cache.schema import MANIFEST, PLAN, Encoding, Manifest, read_manifest, read_plan
from kdcache.cache.verify import check_files
from kdcache.errors import CorruptError, IncompleteError, UsageError


@dataclass(frozen=True)
class CachedTeacher:
    """The teacher that a cache is: a callable from sample ids to logits.

    Attributes:
        views: the encoded rows of every view, on the device.
        labels: [N] int64, as they were encoded.
        encoding: of the rows.
        basis: of their tails, on the device; None where the encoding has none.
    """

    views: tuple[Rows, ...]
    labels: Tensor
    encoding: Encoding
    basis: TailBasis | None = None

    def __call__(self, ids: Tensor, view: int = 0) -> Tensor:
        """The teacher's raw logits for samples `ids` [B] int64 in a view: [B, C] float32, on the teacher's device.

        Raises:
            UsageError: for an id or a view that the cache has not, and for anything but ids, such as a mask.
        """
        if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"ids are {ids.dtype} {list(ids.shape)}", "pass sample ids, an int64 tensor [B]")
        if not 0 <= view < len(self.views):
            raise UsageError(f"the cache has no view {view}", f"ask for one of 0 to {len(self.views) - 1}")
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.labels)):
            raise UsageError(
                f"ids run from {int(ids.min())} to {int(ids.max())}, the cache's from 0 to {len(self.labels) - 1}",
                "ask for the ordinals of the samples in the data set that was dumped",
            )
        ids = ids.to(self.labels.device, torch.int64)
        return decode(self.views[view][ids], self.labels[ids], self.encoding, self.basis)


@dataclass(frozen=True)
class Cache:
    """A sealed cache.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        labels: [N] int32, -1 where not known.
        sample_keys: [N] uint64, content keys of the samples.
    """

    path: Path
    manifest: Manifest
    labels: npt.NDArray[np.int32]
    sample_keys: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return self.manifest.plan.dataset.samples

    @property
    def num_classes(self) -> int:
        """C."""
        return self.manifest.plan.encoding.num_classes

    @property
    def bytes_on_disk(self) -> int:
        """Sum of the sizes of its files, the manifest's own included."""
        return sum(record.size for record in self.manifest.files.values()) + (self.path / MANIFEST).stat().st_size

    def teacher(self, device: torch.device | str = "cpu") -> CachedTeacher:
        """The teacher: a callable `(ids [B], view) -> logits [B, C]` on `device`."""
        plan = self.manifest.plan
        everything = range(plan.dataset.samples)
        views = tuple(
            layout.read_rows(self.path, plan, view, everything).to(device) for view in range(plan.views.count)
        )
        labels = torch.from_numpy(self.labels.astype(np.int64)).to(device)
        basis = layout.read_basis(self.path, plan)
        return CachedTeacher(views, labels, plan.encoding, basis.to(device) if basis is not None else None)


def open_cache(path: str | Path) -> Cache:
    """Open a sealed cache, and check every byte of it against its manifest.

    Raises:
        UsageError: if there is no cache at `path`.
        IncompleteError: if it was never sealed.
        CorruptError: if a file is missing or differs, or the manifest cannot be right.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise _not_sealed(path)
    manifest = read_manifest(path / MANIFEST)
    layout.check_listed(path, manifest.plan, {name: record.size for name, record in manifest.files.items()})
    check_files(path, manifest.files)
    labels, keys = layout.read_samples(path, manifest.plan)
    return Cache(path, manifest, labels, keys)


def _not_sealed(path: Path) -> UsageError | IncompleteError | CorruptError:
    if not path.exists():
        return UsageError(f"there is no cache {path}", "make one with `kdcache dump-teacher PIPELINE -o NAME.kdcache`")
    if not (path / PLAN).is_file():
        if (path / layout.STORE).is_dir():
            return CorruptError(
                f"{path / MANIFEST} is missing",
                "get the cache again from where it was made, or delete it and dump the teacher again",
            )
        return UsageError(f"{path} is not a cache: it holds neither manifest nor plan", "give the .kdcache folder")
    plan = read_plan(path / PLAN)
    total = plan.views.count * plan.shards
    written = len(list((path / "commits").glob("*/*.json")))
    return IncompleteError(
        f"{path} is not sealed: {total - written} of its {total} shards are missing",
        f"run the command that began it once more: kdcache dump-teacher PIPELINE -o {path}",
    )
