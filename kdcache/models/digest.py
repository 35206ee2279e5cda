"""Compute the digest of a network's weights: the same for a plain, a parallel and a compiled network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import MismatchError

_PLAIN_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 over names, types, shapes and bytes of a network's parameters, buffers and extra state.

    Entries are sorted by name, so that the digest depends on the weights only, not on their file. Names are those of
    the plain network (see `plain_state`). Quantized and sparse tensors, and the extra state of a module
    (`get_extra_state`), are hashed part by part.

    Raises:
        MismatchError: if a value of the state cannot be digested.
    """
    return f"sha256:{_hashed(sorted(plain_state(model).items()))}"


def digests_of_parts(model: nn.Module) -> dict[str, str]:
    """Return the sha256 of each value of a network's state, by name.

    Raises:
        MismatchError: if one cannot be digested.
    """
    return {key: _hashed([(key, value)]) for key, value in plain_state(model).items()}


def _hashed(entries: Iterable[tuple[str, Any]]) -> str:
    """Return the sha256 of entries of a state dict, one after the other."""
    sha = hashlib.sha256()
    for key, value in entries:
        for part in _parts(key, value):
            sha.update(part)
    return sha.hexdigest()


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict under the names of the plain network.

    The prefixes of DataParallel, DistributedDataParallel and torch.compile are removed at any depth; a
    submodule named `module` that is not a wrapper keeps its name.
    """
    prefixes: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (inner := _wrapped_name(module)) is not None:
            outer = f"{name}." if name else ""
            prefixes[f"{outer}{inner}."] = outer
    # The longest first: replacing it leaves the shorter ones in front as they are.
    by_length = sorted(prefixes, key=len, reverse=True)
    state = {}
    for key, value in model.state_dict().items():
        plain = key
        for prefix in by_length:
            if plain.startswith(prefix):
                plain = prefixes[prefix] + plain[len(prefix) :]
        state[plain] = value
    return state


def _wrapped_name(module: nn.Module) -> str | None:
    """Return the attribute of a wrapper that holds its network; None for a module that is not a wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else None


def _parts(key: str, value: Any) -> Iterator[bytes]:
    """Yield the bytes to hash of one value of a state dict."""
    if isinstance(value, Tensor):
        try:
            yield from _tensor_parts(key, value.detach())
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = "it is on the meta device and has no values" if value.is_meta else str(error).splitlines()[0]
            raise MismatchError(
                f"the network's {key}, a {type(value).__name__} of {value.dtype}, cannot be digested: {reason}",
                "load its weights first, or convert it to a dense tensor",
            ) from None
    elif isinstance(value, _PLAIN_VALUES):
        yield f"{key}\0{type(value).__name__}\0{value!r}\0".encode()
    elif isinstance(value, Mapping) and all(isinstance(name, str | int) for name in value):
        yield f"{key}\0mapping\0{len(value)}\0".encode()
        for name, inner in sorted(value.items(), key=lambda item: (type(item[0]).__name__, item[0])):
            yield from _parts(f"{key}[{name!r}]", inner)
    elif isinstance(value, list | tuple):
        yield f"{key}\0sequence\0{len(value)}\0".encode()
        for index, inner in enumerate(value):
            yield from _parts(f"{key}[{index}]", inner)
    else:
        raise MismatchError(
            f"the network's state has {key}, a {type(value).__name__}, which cannot be digested",
            "let get_extra_state return tensors, numbers, strings, or lists and dicts of these",
        )


def _tensor_parts(key: str, value: Tensor) -> Iterator[bytes]:
    """Yield the bytes to hash of a tensor: for a quantized or a sparse one, those of its components."""
    if value.is_quantized:
        yield f"{key}\0{value.dtype}\0{value.qscheme()}\0".encode()
        if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            scales: list[Any] = [value.q_scale(), value.q_zero_point()]
        else:
            scales = [value.q_per_channel_scales(), value.q_per_channel_zero_points(), value.q_per_channel_axis()]
        for name, inner in zip(("scale", "zero_point", "axis"), scales, strict=False):
            yield from _parts(f"{key}.{name}", inner)
        yield from _tensor_parts(key, value.int_repr())
    elif value.layout != torch.strided:
        yield f"{key}\0{value.layout}\0{list(value.shape)}\0".encode()
        for name, inner in _components(value).items():
            yield from _tensor_parts(f"{key}.{name}", inner)
    else:
        data = value.cpu().resolve_conj().resolve_neg().contiguous()
        yield f"{key}\0{data.dtype}\0{list(data.shape)}\0".encode()
        yield data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b""


def _components(value: Tensor) -> dict[str, Tensor]:
    """Return the dense components of a sparse tensor."""
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return {"indices": value.indices(), "values": value.values()}
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return {"crow_indices": value.crow_indices(), "col_indices": value.col_indices(), "values": value.values()}
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return {"ccol_indices": value.ccol_indices(), "row_indices": value.row_indices(), "values": value.values()}
    raise TypeError(f"its layout is {value.layout}")
