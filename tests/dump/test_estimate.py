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


def test_the_estimated_size_of_several_outputs_is_that_of_the_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(inplace=True), nn.Linear(40, 10)).eval()
    labels = (np.arange(1500) % 10).astype(np.int32)
    images = ArrayImages(torch.rand(1500, 3, 4, 4))
    samples = Samples("data", "train", images, labels, tuple(map(str, range(10))), [])
    outputs = {
        "body": {"source": "1"},
        "hidden": {"source": "2", "encoding": "int8"},
        "scores": {"kind": "score", "source": "3"},
    }
    spec = CacheSpec.model_validate({"outputs": outputs})
    loaded = LoadedTeacher(net, TeacherIdentity("net", {}, None), samples, [])
    estimated = estimate(loaded, spec, "cpu", Silent(), tmp_path / "c.kdcache")
    made = dump_teacher(net, samples, tmp_path / "c.kdcache", spec=spec)
    assert estimated.bytes == pytest.approx(made.bytes_on_disk, rel=0.05)
    assert estimated.outputs == made.manifest.plan.outputs
    assert list(estimated.output_sizes) == ["body", "hidden", "scores"]
    for name, size in estimated.output_sizes.items():
        files = [file for file in (made.path / "data.zarr" / "outputs" / name).rglob("*") if file.is_file()]
        rows = [file for file in files if file.name != "zarr.json" and not {"axes", "mean"} & set(file.parts)]
        assert size == pytest.approx(sum(file.stat().st_size for file in rows) / 1500, rel=0.05)
