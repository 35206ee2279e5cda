"""A cache is a teacher: opened once, it answers for any sample ids, as the network would.

    cache = open_cache("digits.kdcache")
    teacher = cache.teacher(device="cuda")
    logits = teacher(ids, view=0)              # [B, C] float32, on that device

Zarr is never read for a batch. The rows are brought once to where they fit (`placement.py`), still encoded; a batch is
gathered there, and decoded on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from kdcache.cache.format import array_specs, zarr_store
from kdcache.cache.format.integrity import check_files
from kdcache.cache.format.read_records import read_manifest, read_plan
from kdcache.cache.format.recorded_views import Crops, recorded
from kdcache.cache.format.schema import MANIFEST, PLAN, Manifest
from kdcache.cache.placement.choose import Placement, place_rows
from kdcache.cache.remote.address import source
from kdcache.cache.remote.mirror import Views, check_pinned, files_of, mirror, unfinished_pull, views_here, wanted_views
from kdcache.cache.teacher import CachedTeacher
from kdcache.errors import CorruptError, IncompleteError, KdcacheError, UsageError
from kdcache.runtime.progress import Progress


@dataclass(frozen=True)
class Cache:
    """A sealed cache.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
        labels: [N] int32, -1 where not known.
        sample_keys: [N] uint64, content keys of the samples.
        views: the numbers of those that were opened, ascending: all, but in a folder that holds only some of them.
    """

    path: Path
    manifest: Manifest
    labels: npt.NDArray[np.int32]
    sample_keys: npt.NDArray[np.uint64]
    views: tuple[int, ...]

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

    @property
    def crops(self) -> Crops | None:
        """The boxes of its views, for `View`; None where these follow from the seed."""
        plan = self.manifest.plan
        return zarr_store.StoredCrops(self.path.absolute(), plan) if recorded(plan.views.transform) == "crops" else None

    @property
    def teacher_seen(self) -> bool:
        """Whether kdcache ran the teacher; if not, what it saw of an image, and what it is, is known by hearsay."""
        return self.manifest.plan.teacher.parameters > 0

    @property
    def level_known(self) -> bool:
        """Whether the logits are known as they are; if not, but for a constant of each row."""
        return self.manifest.plan.teacher.level is None

    def teacher(
        self, device: torch.device | str = "cpu", placement: Placement | Literal["auto"] = "auto"
    ) -> CachedTeacher:
        """The teacher: a callable `(ids [B], view) -> logits [B, C]` on `device`.

        Args:
            device: where the logits are wanted.
            placement: where the rows are held; `auto` takes the first of device, host, mmap and stream that they fit.

        Raises:
            UsageError: for a placement that is not known.
            IncompleteError: if the records of the placement mmap do not fit on the disk.
        """
        plan = self.manifest.plan
        placed = place_rows(self.path, self.manifest, device, placement, self.views)
        labels = torch.from_numpy(self.labels.astype(np.int64)).to(device)
        basis = zarr_store.read_basis(self.path, plan)
        basis = basis.to(device) if basis is not None else None
        opened = self.views if len(self.views) < plan.views.count else None
        return CachedTeacher(*placed, plan.views.count, labels, plan.encoding, basis, opened)


def open_cache(
    path: str | Path, views: Views = None, digest: str | None = None, progress: Progress | None = None
) -> Cache:
    """Open a sealed cache, and check every byte of it against its manifest.

    Args:
        path: its folder, or a URL, of which a copy is kept in kdcache's own folder. With `#sha256:...` behind it, or
            with `digest`, it must have that root digest.
        views: which are wanted: some, the first so many, or, with None, all that are there.
        digest: that it must have.
        progress: who is told how the copying goes.

    Raises:
        UsageError: if there is no cache at `path`, or it has no such view.
        IncompleteError: if it was never sealed, or a view that is wanted is not there.
        MismatchError: if it has another digest.
        CorruptError: if a file is missing or differs, or the manifest cannot be right.
    """
    found = source(path, digest)
    if found.is_remote:
        here = mirror(found, None, views, progress)
        return opened(here.folder, here.manifest, here.views)
    path = Path(found.where)
    if not (path / MANIFEST).is_file():
        raise refusal(path)
    manifest = read_manifest(path / MANIFEST)
    check_pinned(path, manifest.digest, found.digest)
    array_specs.check_listed(path, manifest.plan, {name: record.size for name, record in manifest.files.items()})
    there = views_here(path, manifest.plan)
    wanted = there if views is None else wanted_views(manifest.plan, views)
    if absent := sorted(set(wanted) - set(there)):
        raise IncompleteError(
            f"{path} holds views {', '.join(map(str, there))} of {manifest.plan.views.count}, and not view {absent[0]}",
            "pull it too: `kdcache pull URL DIR` brings what is missing",
        )
    check_files(path, files_of(manifest, wanted))
    return opened(path, manifest, wanted)


def opened(path: Path, manifest: Manifest, views: tuple[int, ...]) -> Cache:
    """A cache whose manifest and files were checked."""
    labels, keys = zarr_store.read_samples(path, manifest.plan)
    return Cache(path, manifest, labels, keys, views)


def refusal(path: Path) -> KdcacheError:
    """Why a folder without a manifest is not a cache, or not yet."""
    if not path.exists():
        return UsageError(f"there is no cache {path}", "make one with `kdcache dump-teacher PIPELINE -o NAME.kdcache`")
    if not (path / PLAN).is_file():
        if (unfinished := unfinished_pull(path)) is not None:
            return unfinished
        if (path / array_specs.STORE).is_dir():
            return CorruptError(f"{path / MANIFEST} is missing", array_specs.AGAIN)
        return UsageError(f"{path} is not a cache: it holds neither manifest nor plan", "give the .kdcache folder")
    plan = read_plan(path / PLAN)
    total = plan.views.count * plan.shards
    written = len(list((path / "commits").glob("*/*.json")))
    return IncompleteError(
        f"{path} is not sealed: {total - written} of its {total} shards are missing",
        f"run the command that began it once more: kdcache dump-teacher PIPELINE -o {path}",
    )
