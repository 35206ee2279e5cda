"""Loss names, which choose points in the grid of the axes.

A name is parts joined by `+`, in any order. Each part sets one axis, and the axes that no part sets keep their default:

    ce                                                  the labels alone, no teacher
    zscore                                              the normalization
    ka | lsr | truncated | noisy                        the adjustment axis
    kd | dtkd | dtd | cwsm | ctkd | cswt                the temperature axis; kd is the constant one
    rkl | js | dkd | dist | r2kd | cskd | pld | ofa |   the divergence axis
        mse | cosine | brier | comparative | ff_g2m
    ka+dtd, dtkd+dkd, kd+dist, zscore+ka, ...           their products

The names, and what each sets beside its axis, are the `presets` of the options in `losses/registry.py`. Where two parts
of a name set the same weight or axis, the later axis of this list takes precedence: adjustment, normalization,
divergence, temperature. A pipeline file may set each value differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.errors import did_you_mean
from kdcache.losses.registry import ADJUSTMENTS, DIVERGENCES, NORMALIZATIONS, TEMPERATURES

# kd: mdistiller's weights for CIFAR-100.
_PLAIN: dict[str, Any] = {
    "normalization": "none",
    "adjustment": {"kind": "none"},
    "temperature": {"kind": "constant"},
    "divergence": {"kind": "kl"},
    "ce_weight": 0.1,
    "kd_weight": 0.9,
}


def _presets(axis: str, registry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that each loss name of an axis stands for."""
    named: dict[str, dict[str, Any]] = {}
    for kind, entry in registry.items():
        choice = kind if axis == "normalization" else {"kind": kind}
        named.update({name: {axis: choice, **beside} for name, beside in entry.presets.items()})
    return named


_AXES = {
    "adjustment": _presets("adjustment", ADJUSTMENTS),
    "normalization": _presets("normalization", NORMALIZATIONS),
    "divergence": _presets("divergence", DIVERGENCES),
    "temperature": _presets("temperature", TEMPERATURES),
}
PARTS: dict[str, dict[str, Any]] = {
    # First, and without settings of its own: in kd+dist the temperature is that of dist.
    "kd": {},
    **{name: settings for axis in _AXES.values() for name, settings in axis.items() if name != "kd"},
}


def settings_of_name(name: str) -> dict[str, Any]:
    """Return the settings that a loss name stands for, as a pipeline file would spell them.

    Raises:
        ValueError: for a name that is not known, or whose parts choose the same axis twice.
    """
    if is_custom(name):
        # At T = 1 the function gets raw logits, and its values are not scaled.
        return {**_PLAIN, "name": name, "temperature": {"kind": "constant", "tau": 1.0}, "divergence": custom(name)}
    if name == "ce":
        return {**_PLAIN, "name": name, "ce_weight": 1.0, "kd_weight": 0.0}
    parts = name.split("+")
    if not set(parts) <= PARTS.keys():
        wrong = next(part for part in parts if part not in PARTS)
        raise ValueError(
            f"unknown loss {name!r}{did_you_mean(wrong, [*PARTS, 'ce'])}: its parts are {', '.join(PARTS)}, joined by "
            "'+'; or 'ce' alone, or path/file.py:function"
        )
    for axis in _AXES.values():
        if len(twice := [part for part in parts if part in axis]) > 1:
            raise ValueError(f"loss {name!r} chooses the same thing twice: take one of {' and '.join(twice)}")
    settings = {**_PLAIN, "name": name}
    for part, sets in PARTS.items():
        if part in parts:
            settings.update(sets)
    return settings


def is_custom(name: str) -> bool:
    """Whether a loss name is `path/file.py:function`."""
    return name.rpartition(":")[0].endswith(".py")


def custom(name: str) -> dict[str, Any]:
    """Return the divergence section of a loss `path/file.py:function`."""
    return {"kind": "function", "function": name}
