"""Files with dense logits or other outputs of a teacher: npz, npy, and pt or pth.

An npz file, or a dictionary in a pt file, holds `logits` [N, C] or [V, N, C]. It may also hold `labels` [N] and
`sample_keys` [N], which are compared with the data set, and the `seed` of its views, without which random views cannot
be replayed. An npy file, or a tensor in a pt file, holds the logits alone.

Other outputs are [N, D], [V, N, D], or for one score per sample [N], under their names in the cache.

Values are float16, bfloat16 (pt), float32 or float64, in any byte order and memory order.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.curate.scratch import scratch_file
from kdcache.errors import CorruptError, UsageError
from kdcache.models.checks import OutputScale, output_scale

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 2048
_FLOATS = ("float16", "bfloat16", "float32", "float64")
LOGITS = "logits"
_FIELDS = ("labels", "sample_keys", "seed")
RESERVED = frozenset(_FIELDS)
"""Names of arrays that are not outputs."""

_NAMES_SHOWN = 5
_HOW = (
    "save [N, C] floats with numpy.savez(path, logits=logits), numpy.save(path, logits) or "
    "torch.save({'logits': logits}, path)"
)
_SAVE_LOGITS = "save the logits, or log_softmax(logits) in float32, instead of the softmax"

_LEAST_PRECISE = torch.bfloat16
"""Type that the values may have been rounded to before they were saved as another one."""


class LogitFile(NamedTuple):
    """Dense logits in a file; small, and may be sent to another process.

    Attributes:
        source: the file.
        array: npy file with the logits: the file itself, or an unpacked copy.
        shape: (V, N, C), or (V, N, D) of another output.
        dtype: type of the values in the file.
        labels: [N] int32, if the file holds them.
        sample_keys: [N] uint64, if the file holds them.
        seed: seed of the views, if the file holds it.
        ignored: names of other arrays in the file.
        content: what the values are, as `content_of` finds it.
    """

    source: Path
    array: Path
    shape: tuple[int, int, int]
    dtype: str
    labels: npt.NDArray[np.int32] | None
    sample_keys: npt.NDArray[np.uint64] | None
    seed: int | None
    ignored: tuple[str, ...] = ()
    content: OutputScale = "logits"

    def values(self, view: int, rows: slice | list[int]) -> Array:
        """Return some rows of a view as they are in the file, [B, C]."""
        mapped = np.lib.format.open_memmap(self.array, mode="r")
        if mapped.ndim == 1:
            return np.asarray(mapped[rows])[:, None]
        return np.asarray((mapped if mapped.ndim == len(self.shape) else mapped[None])[view, rows])

    def logits(self, view: int, rows: slice | list[int]) -> npt.NDArray[np.float32]:
        """Return some rows of a view, [B, C]: logits as they are, probabilities as normalized log-probabilities."""
        values = self.values(view, rows)
        if self.content == "logits":
            return values.astype(np.float32)
        log_probs = values.astype(np.float64)
        if self.content == "probabilities":
            log_probs = np.log(log_probs)
        normalized: npt.NDArray[np.float32] = torch.from_numpy(log_probs).log_softmax(dim=1).float().numpy()
        return normalized


@contextmanager
def open_logits(source: Path, scratch: Path, output: str = LOGITS) -> Iterator[LogitFile]:
    """Open a file with dense logits, or another output, to be read in parts.

    Args:
        source: npz, npy, pt or pth file.
        scratch: name of a folder for an unpacked copy, which is deleted at the end.
        output: name of the array to read.

    Raises:
        UsageError: if the file holds no logits, or other arrays that cannot be used; or if `scratch` exists and was not
            made by kdcache.
    """
    if source.suffix == ".npz":
        with scratch_file(scratch) as array:
            yield _described(source, array, _unpack_npz(source, array, output), output)
    elif source.suffix in (".pt", ".pth"):
        with scratch_file(scratch) as array:
            fields, dtype = _unpack_torch(source, array, output)
            yield _described(source, array, fields, output, dtype)
    else:
        yield _described(source, source, {}, output)


def content_of(file: LogitFile) -> OutputScale:
    """Tell logits from the outputs of LogSoftmax and Softmax, by the rows: all must be normalized.

    Raises:
        CorruptError: if a log-probability is -inf.
        UsageError: if a probability has underflowed: zero, or too small for the full precision of its type.
    """
    content: OutputScale | None = None
    smallest = torch.finfo(getattr(torch, file.dtype)).tiny
    underflowed: int | None = None
    infinite: int | None = None
    views, rows, _ = file.shape
    for view in range(views):
        for start in range(0, rows, _ROWS_AT_ONCE):
            values = torch.from_numpy(file.values(view, slice(start, start + _ROWS_AT_ONCE)).astype(np.float64))
            of_rows = output_scale(values, _LEAST_PRECISE)
            if of_rows == "logits" or content not in (None, of_rows):
                return "logits"
            content = of_rows
            underflowed = underflowed if underflowed is not None else _first(start, values < smallest)
            infinite = infinite if infinite is not None else _first(start, values.isinf())
    if content == "log-probabilities" and infinite is not None:
        raise CorruptError(
            f"{file.source} holds log-probabilities, and those of sample {infinite} include -inf: the probability has "
            "underflowed to 0",
            _SAVE_LOGITS,
        )
    if content == "probabilities" and underflowed is not None:
        raise UsageError(
            f"{file.source} holds probabilities, and one of sample {underflowed} has underflowed in {file.dtype}: its "
            "logarithm is lost",
            _SAVE_LOGITS,
        )
    return content or "logits"


def _first(start: int, mask: Tensor) -> int | None:
    rows = mask.any(dim=1).nonzero()
    return start + int(rows[0]) if len(rows) else None


def _described(
    source: Path, array: Path, fields: Mapping[str, Any], output: str, dtype: str | None = None
) -> LogitFile:
    """Check the logits and the other arrays of a file."""
    try:
        logits = np.lib.format.open_memmap(array, mode="r")
        shape, dtype = logits.shape, dtype or logits.dtype.name
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(source, error) from None
    if len(shape) not in _dimensions(output) or dtype not in _FLOATS or not logits.size:
        raise UsageError(f"{source} holds {dtype} {list(shape)} as {output}", _how(output))
    views, rows, classes = shape if len(shape) == 3 else (1, *shape) if len(shape) == 2 else (1, *shape, 1)
    known = {name: _as_array(source, name, fields[name]) for name in _FIELDS if name in fields}
    labels = known.get("labels")
    if output != LOGITS and labels is not None and labels.ndim == 1 and len(labels) != rows:
        raise UsageError(
            f"{source} holds {output} {list(shape)}, that is {rows} rows, and {len(labels)} labels", _how(output)
        )
    return LogitFile(
        source,
        array.absolute(),
        (views, rows, classes),
        dtype,
        _column(source, "labels", known, rows, np.int32),
        _column(source, "sample_keys", known, rows, np.uint64),
        _seed(source, known),
        tuple(sorted(set(fields) - {*_FIELDS, output})),
    )


def _as_array(source: Path, name: str, value: Any) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{source} holds {name} that are not an array: {error}", f"leave {name} out") from None


def _column(source: Path, name: str, known: Mapping[str, Array], rows: int, dtype: type[np.generic]) -> Any:
    """Return integers [N] from an array [N] or [N, 1]; None if the file does not hold them."""
    if name not in known:
        return None
    array = known[name]
    if array.dtype.kind not in "iu" or array.shape not in ((rows,), (rows, 1)):
        raise UsageError(
            f"{source} holds {name} {array.dtype} {list(array.shape)}, expected integers [{rows}]",
            f"save them as integers, one per sample, or leave {name} out",
        )
    column = array.reshape(rows)
    if dtype is np.int32 and (column.min() < -1 or column.max() >= 2**31):
        raise UsageError(f"{source} holds labels from {column.min()} to {column.max()}", "use -1 for an unknown label")
    return column.astype(dtype)


def _seed(source: Path, known: Mapping[str, Array]) -> int | None:
    if "seed" not in known:
        return None
    seed = known["seed"]
    if seed.dtype.kind not in "iu" or seed.size != 1 or not 0 <= int(seed.reshape(())) < 2**63:
        raise UsageError(f"{source} holds a seed {seed.dtype} {list(seed.shape)}", "save it as one integer, 0 or more")
    return int(seed.reshape(()))


def _dimensions(output: str) -> tuple[int, ...]:
    """Return how many dimensions the array of an output may have."""
    return (2, 3) if output == LOGITS else (1, 2, 3)


def _how(output: str) -> str:
    """Return how a file of this output is written."""
    return _HOW if output == LOGITS else f"save [N, D] floats with numpy.savez(path, {output}=values)"


def _unpack_npz(source: Path, array: Path, output: str) -> dict[str, Any]:
    """Write an output of an npz file to an npy file, and return its other arrays by name.

    Arrays that are not used are None.
    """
    try:
        with zipfile.ZipFile(source) as packed:
            members = [member.filename for member in packed.infolist()]
            names = [name.removesuffix(".npy") for name in members]
            _check_members(source, members, names, output)
            with packed.open(f"{output}.npy") as member, array.open("wb") as unpacked:
                shutil.copyfileobj(member, unpacked, 2**20)
        with np.load(source, allow_pickle=False) as arrays:
            return {name: arrays[name] if name in _FIELDS else None for name in names}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise _unreadable(source, error) from None


def _check_members(source: Path, members: list[str], names: list[str], output: str) -> None:
    odd = [member for member in members if not member.endswith(".npy")]
    if odd or len(set(names)) < len(names):
        what = f"{odd[0]}, which is not an array" if odd else f"{max(names, key=names.count)} twice"
        raise UsageError(f"cannot read {output} from {source}: it holds {what}", _how(output))
    if output not in names:
        raise _lacks(source, names, output)


def _lacks(source: Path, names: Sequence[str], output: str) -> UsageError:
    held = ", ".join(names[:_NAMES_SHOWN]) or "nothing"
    return UsageError(f"cannot read {output} from {source}: it holds {held}, but no {output}", _how(output))


def _unpack_torch(source: Path, array: Path, output: str) -> tuple[dict[str, Any], str]:
    """Write an output of a pt file to an npy file; return its other arrays by name, and the type of the output."""
    try:
        held = torch.load(source, "cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # torch raises many kinds of errors for files that are damaged or hold other objects
        raise _unreadable(source, error) from error
    fields = held if isinstance(held, dict) else {output: held}
    if output not in fields:
        raise _lacks(source, [*map(str, fields)], output)
    logits = fields[output]
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise UsageError(f"cannot read {output} from {source}: they are a {kind}, not a tensor", _how(output))
    dtype = str(logits.dtype).removeprefix("torch.")
    is_dense = logits.layout == torch.strided and logits.ndim in _dimensions(output)
    if not is_dense or dtype not in _FLOATS or not logits.numel():
        raise UsageError(f"{source} holds {dtype} {list(logits.shape)} as {output}", _how(output))
    stored = np.dtype("float32" if dtype == "bfloat16" else dtype)
    with array.open("wb") as file:
        header = {"descr": stored.str, "fortran_order": False, "shape": tuple(logits.shape)}
        np.lib.format.write_array_header_2_0(file, header)
        for view in logits.detach() if logits.ndim == 3 else [logits.detach()]:
            for rows in view.split(_ROWS_AT_ONCE):
                values = rows.float() if dtype == "bfloat16" else rows
                file.write(np.ascontiguousarray(values.numpy()).tobytes())
    return {str(name): value for name, value in fields.items()}, dtype


def _unreadable(source: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"cannot read logits from {source}: {reason}", f"{_HOW}; for files of other projects pass --from")
