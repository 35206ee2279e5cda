"""A writer of DistillKit's bytes, made from the description in arcee-ai/DistillKit@a61c2e7: README and config.py.

It shares nothing with the reader: bits are characters, floats are made by `struct`, and fits are in float64.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

README: dict[str, dict[str, Any]] = {
    "recommended": {
        "k": 128,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
    },
    "budget": {
        "k": 50,
        "exact_k": 1,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
    },
    "Qwen3-235B-Logits-Packed-8192": {
        "delta_encoding": True,
        "error_diffusion": False,
        "exact_dtype": "float32",
        "exact_k": 32,
        "k": 128,
        "polynomial_terms": [0, 1, 2],
        "residual_bins": [],
        "term_dtype": "float32",
    },
    "deep-dive": {
        "k": 128,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "delta_encoding": False,
        "error_diffusion": False,
        "polynomial_terms": [0, 1, 2, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 8, "num_elements": 16},
            {"scale_dtype": "float32", "element_bits": 2, "num_elements": 64},
        ],
    },
}
"""The configurations of the README, but for d."""

FORMATS = {"float16": "<e", "float32": "<f", "float64": "<d"}


def bits_of(numbers: list[int], width: int) -> bytes:
    text = "".join(format(number, f"0{width}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[start : start + 8], 2) for start in range(0, len(text), 8))


def floats_of(values: list[float], name: str) -> bytes:
    if name == "bfloat16":
        return torch.tensor(values).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    return b"".join(struct.pack(FORMATS[name], value) for value in values)


def read_back(values: list[float], name: str) -> Array:
    if name == "bfloat16":
        return torch.tensor(values).bfloat16().double().numpy()
    return np.array([struct.unpack(FORMATS[name], struct.pack(FORMATS[name], value))[0] for value in values])


def position(log_probs: Array, config: dict[str, Any]) -> bytes:
    """The bytes of one position, from log-probabilities of all tokens."""
    top = np.sort(log_probs)[::-1][: config["k"]]
    values = np.diff(top, prepend=0.0) if config["delta_encoding"] else top
    exact = config["exact_k"]
    stored = floats_of(values[:exact].tolist(), config["exact_dtype"])
    rest = values[exact:].copy()
    if config["polynomial_terms"]:
        last = max(len(rest) - 1, 1) if config.get("normalize_t") else 1
        points = [index / last for index in range(len(rest))]
        powers = np.array(
            [[math.sqrt(t) if term == "sqrt" else t**term for term in config["polynomial_terms"]] for t in points]
        )
        fit = np.linalg.lstsq(powers, rest, rcond=None)[0].tolist()
        stored += floats_of(fit, config["term_dtype"])
        rest -= powers @ read_back(fit, config["term_dtype"])
    for one in config["residual_bins"]:
        some, rest = rest[: one["num_elements"]], rest[one["num_elements"] :]
        half = 1 << (one["element_bits"] - 1)
        scale = float(np.abs(some).max() / half) or 1.0
        stored += floats_of([scale], one["scale_dtype"])
        steps = np.clip(np.round(some / read_back([scale], one["scale_dtype"])), -half, half - 1).astype(int)
        stored += bits_of((steps + half).tolist(), one["element_bits"])
    return stored


def tokens_of(log_probs: Array, config: dict[str, Any]) -> bytes:
    """The bytes of the tokens of one position."""
    order = np.argsort(-log_probs, kind="stable")[: config["k"]].tolist()
    return bits_of(order, math.ceil(math.log2(config["d"])))
