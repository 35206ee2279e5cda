"""Read past objects other than tensors in checkpoints of training scripts, such as configurations.

`torch.load(weights_only=True)` is used all the same. Each class listed below is replaced by an inert one of the same
name: nothing of its library is imported or called, and its data are dropped. Other classes are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RECORDS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "builtins.slice",
    "builtins.range",
    "builtins.frozenset",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float16", "Float32", "Float64", "Str")),
    "torch.torch_version.TorchVersion",
    "torchvision.transforms.functional.InterpolationMode",
    "torchvision.transforms.autoaugment.AutoAugmentPolicy",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.dictconfig.DictConfig",
)
"""Classes whose instances are built from arguments or attributes."""

_DICTIONARIES = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "box.box.Box",
    "munch.Munch",
)
"""Subclasses of dict; torch fills in the entries of dict and OrderedDict only."""


class _Inert:
    """A stand-in that accepts any arguments and any state, and drops them."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Dictionary(OrderedDict[Any, Any]):
    """A stand-in for a subclass of dict: constructs a plain OrderedDict."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Sequence(list[Any]):
    """A stand-in for a subclass of list, or a deque."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


def _stand_in(full_name: str, base: type) -> type:
    """Return a class with the full name of another one, by which torch finds it."""
    module, _, name = full_name.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


_STAND_INS: list[Any] = [
    *(_stand_in(name, _Inert) for name in _RECORDS),
    *(_stand_in(name, _Dictionary) for name in _DICTIONARIES),
    _stand_in("collections.deque", _Sequence),
]


_NAMES = {f"{one.__module__}.{one.__qualname__}" for one in _STAND_INS}


def _full_name(registered: Any) -> str:
    """Return the name under which torch finds a registered class, or a pair of one and its name."""
    if isinstance(registered, tuple):
        return str(registered[1])
    return f"{registered.__module__}.{registered.__qualname__}"


@contextmanager
def safe_globals() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` accept the classes above, as inert stand-ins, inside the context."""
    before = torch.serialization.get_safe_globals()
    # Other libraries register some of these classes themselves; of two of one name torch takes either.
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([one for one in before if _full_name(one) not in _NAMES] + _STAND_INS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
