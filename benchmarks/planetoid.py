"""Read the citation graph Cora from the files of kimiyoung/planetoid, without running what a pickle may hold."""

from __future__ import annotations

import codecs
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from real_inputs import MissingInputsError

from kdcache.data.nodes import Graph

_PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_VALIDATION = 500

HOW_TO_GET = (
    "clone https://github.com/kimiyoung/planetoid (1 MB for Cora, MIT) and pass its folder data: --planetoid FOLDER"
)


class _Sparse:
    """The state of a scipy.sparse.csr_matrix: `data`, `indices`, `indptr` and `_shape`."""

    data: Any
    indices: Any
    indptr: Any
    _shape: Any

    def dense(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the matrix, float32."""
        rows = np.repeat(np.arange(self._shape[0]), np.diff(self.indptr))
        matrix = np.zeros(self._shape, np.float32)
        np.add.at(matrix, (rows, self.indices), self.data)
        return matrix


class _Unpickler(pickle.Unpickler):
    """Loads arrays, sparse matrices and dictionaries of lists, and refuses everything else."""

    _known: ClassVar[dict[str, Any]] = {
        "csr_matrix": _Sparse,
        "_reconstruct": np.ndarray((0,)).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "defaultdict": dict,
        "list": list,
        "encode": codecs.encode,  # of bytes in files that Python 3 wrote
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the file."""
        if name not in self._known:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a file of planetoid")
        return (lambda *_: {}) if name == "defaultdict" else self._known[name]


def read_planetoid(folder: Path | None, name: str = "cora") -> Graph:
    """Return a graph with the public split: 20 nodes per class, the 500 after them, and the test nodes.

    Rows of features are divided by their sums.

    Raises:
        MissingInputsError: if the files are not there.
    """
    if folder is None:
        raise MissingInputsError(f"no folder of planetoid's files was given: {HOW_TO_GET}")
    paths = {part: folder / f"ind.{name}.{part}" for part in _PARTS}
    if missing := [str(path) for path in paths.values() if not path.is_file()]:
        raise MissingInputsError(f"{missing[0]} is not there: {HOW_TO_GET}")
    order = np.array(paths.pop("test.index").read_text(encoding="ascii").split(), np.int64)
    parts = {part: _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load() for part, path in paths.items()}
    features = np.concatenate([parts["allx"].dense(), parts["tx"].dense()])
    labels = np.concatenate([parts["ally"], parts["ty"]]).argmax(axis=1)
    for values in (features, labels):
        values[order] = values[np.sort(order)]
    pairs = np.array([(node, other) for node, others in parts["graph"].items() for other in others])
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0)
    count, n_train = len(features), len(parts["y"])
    numbers = np.arange(count)
    masks = {
        "train": numbers < n_train,
        "validation": (numbers >= n_train) & (numbers < n_train + _VALIDATION),
        "test": np.isin(numbers, order),
    }
    features /= features.sum(axis=1, keepdims=True).clip(1)
    return Graph(
        torch.from_numpy(features),
        torch.from_numpy(edges[edges[:, 0] != edges[:, 1]].T.copy()),
        torch.from_numpy(labels),
        {split: torch.from_numpy(mask) for split, mask in masks.items()},
        name,
    )
