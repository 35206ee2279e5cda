"""What a dry run says of the size of a cache, against the cache itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache import Samples, dump_teacher
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages
from kdcache.dump.estimate import estimate
from kdcache.models.teacher import LoadedTeacher, TeacherIdentity
from kdcache.runtime.progress import Silent

FLIP: Transform = [{"RandomHorizontalFlip": {"p": 0.5}}]


@pytest.mark.parametrize(
    ("count", "classes", "options"),
    [
        (20, 10, {}),
        (1000, 10, {}),
        (9000, 10, {}),
        (1000, 10, {"dtype": "uint8", "views": 3}),
        (1000, 100, {"top_k": 5, "rank": 4}),
        (1000, 100, {"top_k": 3, "tail": "uniform", "shard_rows": 200}),
    ],
)
def test_the_estimated_size_is_that_of_the_cache(
    count: int, classes: int, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    names = tuple(map(str, range(classes)))
    labels = (np.arange(count) * 7 % classes).astype(np.int32)
    samples = Samples("data", "train", ArrayImages(torch.rand(count, 3, 4, 4)), labels, names, [])
    spec = CacheSpec(**options)
    loaded = LoadedTeacher(net, TeacherIdentity("net", {}, None), samples, FLIP)
    estimated = estimate(loaded, spec, "cpu", Silent(), tmp_path / "c.kdcache")
    made = dump_teacher(net, samples, tmp_path / "c.kdcache", transform=FLIP, spec=spec)
    assert estimated.bytes == pytest.approx(made.bytes_on_disk, rel=0.05)
    assert estimated.bytes_per_row is not None
    assert estimated.bytes > 1.3 * estimated.bytes_per_row * estimated.rows, "rows alone are much less"
