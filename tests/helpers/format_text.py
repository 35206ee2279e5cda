"""docs/FORMAT.md as the tests read it, and a cache as its text describes it, read without the package."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorstore
import torch

from helpers.paths import ROOT
from kdcache import Cache

FORMAT = (ROOT / "docs" / "FORMAT.md").read_text(encoding="utf-8")

Array = npt.NDArray[Any]


def tables() -> Iterator[list[list[str]]]:
    """Yield every table as lines of cells, the header first."""
    for block in re.findall(r"(?:^\|.*\n)+", FORMAT, flags=re.MULTILINE):
        lines = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [lines[0], *lines[2:]]


def table(about: str) -> list[list[str]]:
    """Return the lines of the table whose header begins with these words."""
    (found,) = (lines[1:] for lines in tables() if lines[0][0] == about)
    return found


class Kept:
    """A cache, and what it is compared with.

    Args:
        cache: sealed.
        live: logits of the teacher itself, [V, N, C].
    """

    def __init__(self, cache: Cache, live: Array) -> None:
        self.cache, self.path, self.live = cache, cache.path, live
        self.manifest = json.loads((cache.path / "manifest.json").read_bytes())
        self.plan = self.manifest["plan"]
        self.encoding = self.plan["encoding"]
        self.columns = [name for name, where, _ in table("column") if self.is_there(where)]

    def is_there(self, where: str) -> bool:
        """Return whether the condition in the second cell of a table holds."""
        k, c, r, dtype = (self.encoding[name] for name in ("top_k", "num_classes", "rank", "dtype"))
        there: dict[str, bool] = {"always": True, "k < C": k < c, "R > 0": r > 0, "dtype uint8": dtype == "uint8"}
        first = next(iter((self.plan["views"]["transform"] or [{"": {}}])[0]))
        there |= {f"the first step is {name}": first == name for name in ("RecordedCrop", "DrawnElsewhere")}
        return there[where]

    @cached_property
    def zarr_json(self) -> dict[str, Any]:
        """The metadata of every array."""
        return {path.parent.name: json.loads(path.read_bytes()) for path in self.path.glob("data.zarr/*/zarr.json")}

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Every array, read by TensorStore."""
        return {name: read_array(self.path / "data.zarr" / name) for name in self.zarr_json}

    @cached_property
    def decoded(self) -> Array:
        """Logits that kdcache reads, [V, N, C]."""
        teacher, ids = self.cache.teacher(), torch.arange(len(self.cache))
        return np.stack([teacher(ids, view).numpy() for view in range(len(self.live))])

    @property
    def rows(self) -> Iterator[tuple[int, int]]:
        """(view, sample) of each row."""
        return product(range(len(self.live)), range(len(self.cache)))

    @property
    def near(self) -> float:
        """Largest difference between two readers: rounding of float32, magnified in the tail of a filled row."""
        return 5e-5 if self.encoding["tail"] == "lowrank" else 1e-5

    def row(self, view: int, sample: int) -> dict[str, Any]:
        """Return what is stored of a row, by array and by column."""
        of_row = {name: array[view, sample] for name, array in self.arrays.items() if name in ROW_ARRAYS}
        statistics = dict(zip(self.columns, of_row["statistics"].tolist(), strict=True))
        return of_row | statistics | {"label": int(self.arrays["labels"][sample])}


ROW_ARRAYS = {"log_probs", "indices", "logsumexp", "statistics", "tail"}


def read_array(folder: Path) -> Array:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


def check_arrays(kept: Kept) -> None:
    """Check that the metadata of all arrays are as the table has them."""
    plan, shape, c = kept.plan, kept.plan["shape"], kept.encoding["num_classes"]
    n, stride = plan["dataset"]["samples"], shape["fingerprint_stride"]
    size = {
        "1": 1, "8": 8, "V": plan["views"]["count"], "N": n, "M": -(-n // stride), "C": c, "Q": len(kept.columns),
        "k": kept.encoding["top_k"], "R": kept.encoding["rank"],
        "5": 5, "c": shape["chunk_rows"], "s": shape["shard_rows"], "s/f": shape["shard_rows"] // stride,
    }  # fmt: skip
    types = {"dtype": kept.encoding["dtype"], "index": f"uint{8 if c <= 256 else 16 if c <= 65536 else 32}"}
    expected = {}
    for name, where, dtype, *extents, compression, dimensions in table("array"):
        if kept.is_there(where):
            shapes = [[size[symbol] for symbol in extent.split(", ")] for extent in extents]
            expected[name] = metadata(types.get(dtype, dtype), shapes, compression, dimensions.split(", "))
            expected[name]["attributes"] = {"columns": kept.columns} if name == "statistics" else {}
    assert {name: without_levels(found) for name, found in kept.zarr_json.items()} == expected
    group = json.loads((kept.path / "data.zarr/zarr.json").read_bytes())
    assert group == {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def metadata(dtype: str, shapes: list[list[int]], compression: str, dimensions: list[str]) -> dict[str, Any]:
    """Return a zarr.json as section 3 has it, without attributes and the choices of the writer."""
    shape, chunk, shard = shapes
    item, row = np.dtype(dtype).itemsize, math.prod(chunk[2:])
    typesize = item if item > 1 else row if row <= 255 else 1
    options = {"zstd": {"checksum": False}, "blosc": {"cname": "zstd", "shuffle": "shuffle", "typesize": typesize}}
    little, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    compressor = {"name": compression, "configuration": options[compression]}
    sharding = {
        "chunk_shape": chunk,
        "codecs": [little if item > 1 else {"name": "bytes"}, compressor, crc],
        "index_codecs": [little, crc],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": dimensions,
        "storage_transformers": [],
    }


def without_levels(found: Any) -> Any:
    copy = json.loads(json.dumps(found))
    options = copy["codecs"][0]["configuration"]["codecs"][1]["configuration"]
    for free in ("level", "clevel", "blocksize"):
        options.pop(free, None)
    return copy
