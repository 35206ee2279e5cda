"""Networks with known outputs, and reference values for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kdcache import load_split
from kdcache.config.schema import Pipeline
from kdcache.config.transform import Transform
from kdcache.data.datasets import SPLITS
from kdcache.data.images import ArrayImages
from kdcache.models.small import SmallMLP

Values = npt.NDArray[Any]


def linear_teacher(inputs: int, outputs: int = 2) -> str:
    """A Python file with a function `make` of a linear network, which has the same weights each time."""
    return (
        "import torch\nfrom torch import nn\ndef make(num_classes):\n    torch.manual_seed(0)\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear({inputs}, {outputs}))\n"
    )


def softmax(logits: Values, temperature: float = 1) -> Values:
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def reference(logits: Values, labels: Values) -> dict[str, float]:
    """The measures, row by row and bin by bin."""
    probabilities = softmax(logits)
    error = 0.0
    for low in range(15):
        here = [i for i, row in enumerate(probabilities) if low / 15 < row.max() <= (low + 1) / 15]
        if here:
            accuracy = np.mean([probabilities[i].argmax() == labels[i] for i in here])
            error += len(here) / len(labels) * abs(accuracy - np.mean([probabilities[i].max() for i in here]))
    order = np.argsort(-logits, axis=1, kind="stable")
    return {
        "top1": float(np.mean([label == best for label, (best, *_) in zip(labels, order, strict=True)])),
        "top5": float(np.mean([label in best[:5] for label, best in zip(labels, order, strict=True)])),
        "negative_log_likelihood": float(-np.mean([np.log(probabilities[i, k]) for i, k in enumerate(labels)])),
        "calibration_error": error,
    }


TURN: Transform = [{"RandomHorizontalFlip": {"p": 0.5}}, {"ToDtype": {"dtype": "float32", "scale": True}}]


CLEAN: Transform = TURN[1:]


def network(seed: int, width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = SmallMLP(8, 1, 4, 4, width)
        nn.init.normal_(made.classifier.weight, std=2.0)
        return made.eval()


def rearranged(pipeline: Pipeline, path: Path, train: list[int], more: int = 0) -> Pipeline:
    """The same held-out images in another file, and of the training images these, in this order, and some others."""
    whole = [load_split(pipeline.dataset, split) for split in SPLITS]
    chosen = [np.concatenate([train, np.full(more, -1)]).astype(int), *(np.arange(len(held)) for held in whole[1:])]
    count = sum(map(len, chosen))
    shares = (len(chosen[1]) / count, len(chosen[2]) / count)
    dataset = pipeline.dataset.model_copy(
        update={"root": str(path), "validation_fraction": shares[0], "test_fraction": shares[1]}
    )
    # Labels that are positions say where a split's images are to stand.
    np.savez(path, images=np.zeros((count, 4, 4), np.uint8), labels=np.arange(count))
    images = np.random.default_rng(9).integers(0, 255, (count, 4, 4), np.uint8)
    labels = np.zeros(count, np.int32)
    for split, samples, which in zip(SPLITS, whole, chosen, strict=True):
        places = load_split(dataset, split).labels[which >= 0]
        assert isinstance(samples.images, ArrayImages)
        images[places], labels[places] = (
            samples.images.pixels[which[which >= 0], 0].numpy(),
            samples.labels[which[which >= 0]],
        )
    np.savez(path, images=images, labels=labels, class_names=np.array(whole[0].class_names))
    return pipeline.model_copy(update={"dataset": dataset})
