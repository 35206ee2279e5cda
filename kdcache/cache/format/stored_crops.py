"""The recorded crop boxes of a cache, as the views of a data set read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cache.format.schema import Plan
from kdcache.cache.format.verified_files import VerifiedFiles, check_when_read, files_when_read
from kdcache.cache.format.zarr_store import read_recorded


@dataclass(frozen=True)
class StoredCrops:
    """The recorded boxes of a cache, by view; can be pickled for another process."""

    cache: Path
    plan: Plan

    def __reduce__(self) -> Any:
        return _stored_crops, (self.cache, self.plan, files_when_read(self.cache))

    def __call__(self, view: int) -> npt.NDArray[np.float32]:
        """Return the boxes of all samples in a view, [N, 5]."""
        return read_recorded(self.cache, self.plan, view)


def _stored_crops(cache: Path, plan: Plan, files: VerifiedFiles | None) -> StoredCrops:
    """Return boxes in another process, which checks the files before it reads them."""
    if files is not None:
        check_when_read(files)
    return StoredCrops(cache, plan)
