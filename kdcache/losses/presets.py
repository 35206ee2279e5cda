"""The names of losses, which choose points in the grid of the axes.

A name is parts joined by `+`, in any order; each part sets one axis, and what no part sets stays plain:

    ce                                                  the labels alone, no teacher
    zscore                                              the normalization in front
    ka | lsr | truncated                                the adjustment axis
    kd | dtkd | dtd | cwsm | ctkd                       the temperature axis; kd is the constant one
    rkl | js | dkd | dist | pld | ofa | mse | cosine    the divergence axis
    ka+dtd, dtkd+dkd, kd+dist, zscore+ka, ...           their products
"""

from __future__ import annotations

from typing import Any


def _constant(tau: float) -> dict[str, Any]:
    return {"kind": "constant", "tau": tau}


# Published weights: kd, dkd: mdistiller's CIFAR-100 defaults. dtkd: the authors' code (alpha 3, beta 1, 20 epochs of
# warm-up, cross-entropy in full). zscore: weight 9 at T = 2, as the authors' configurations. dist, ofa: the defaults of
# the authors' code. pld: the paper, whose first rank is the cross-entropy. mse: at T = 1, for T cancels. The others
# stand in the place of kd's KL. A pipeline file may set every one of them otherwise. Where two parts of a name say
# different things, the later one in this list is heard.
_PLAIN: dict[str, Any] = {
    "normalization": "none",
    "adjustment": {"kind": "none"},
    "temperature": {"kind": "constant"},
    "divergence": {"kind": "kl"},
}
PARTS: dict[str, dict[str, Any]] = {
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9},
    "ka": {"adjustment": {"kind": "probability_shift"}},
    "lsr": {"adjustment": {"kind": "label_smoothing"}},
    "truncated": {"adjustment": {"kind": "truncation"}},
    "zscore": {"normalization": "z_score", "kd_weight": 9.0, "temperature": _constant(2.0)},
    "rkl": {"divergence": {"kind": "reverse_kl"}},
    "js": {"divergence": {"kind": "jensen_shannon"}},
    "dkd": {"divergence": {"kind": "dkd"}, "ce_weight": 1.0, "kd_weight": 1.0, "warmup_epochs": 20.0},
    "dist": {"divergence": {"kind": "dist"}, "ce_weight": 1.0, "kd_weight": 1.0, "temperature": _constant(1.0)},
    "pld": {"divergence": {"kind": "plackett_luce"}, "ce_weight": 0.0, "kd_weight": 1.0, "temperature": _constant(1.0)},
    "ofa": {"divergence": {"kind": "ofa"}, "ce_weight": 1.0, "kd_weight": 1.0, "temperature": _constant(1.0)},
    "mse": {"divergence": {"kind": "mse"}, "temperature": _constant(1.0)},
    "cosine": {"divergence": {"kind": "cosine"}},
    "dtd": {"temperature": {"kind": "dtd_flsw"}},
    "cwsm": {"temperature": {"kind": "dtd_cwsm"}},
    "ctkd": {"temperature": {"kind": "ctkd"}},
    "dtkd": {
        "ce_weight": 1.0,
        "kd_weight": 3.0,
        "plain_kd_weight": 1.0,
        "warmup_epochs": 20.0,
        "temperature": {"kind": "dtkd"},
    },
}
_ONE_OF = (
    {"kd", "dtkd", "dtd", "cwsm", "ctkd"},
    {"ka", "lsr", "truncated"},
    {"rkl", "js", "dkd", "dist", "pld", "ofa", "mse", "cosine"},
)


def settings_of_name(name: str) -> dict[str, Any]:
    """The settings that a loss name stands for, as a pipeline file would spell them.

    Raises:
        ValueError: for a name that is not known, or whose parts choose the same axis twice.
    """
    if name == "ce":
        return {**_PLAIN, "name": name, "ce_weight": 1.0, "kd_weight": 0.0}
    parts = name.split("+")
    if not set(parts) <= PARTS.keys():
        raise ValueError(f"unknown loss {name!r}: its parts are {', '.join(PARTS)}, joined by '+'; or 'ce' alone")
    for axis in [*_ONE_OF, *({part} for part in PARTS)]:
        if len(twice := [part for part in parts if part in axis]) > 1:
            raise ValueError(f"loss {name!r} chooses the same thing twice: take one of {' and '.join(twice)}")
    settings = {**_PLAIN, **PARTS["kd"], "name": name}
    for part, sets in PARTS.items():
        if part in parts:
            settings.update(sets)
    return settings
