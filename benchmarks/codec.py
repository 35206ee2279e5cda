"""Compare the cost of encoding and decoding with that of the networks: `python benchmarks/codec.py`.

For a batch of 256 with 1000 classes: encoding against inference of a ResNet-18 (224 pixels), the smallest of teachers;
and the cached teacher's logits for random ids (rows gathered in host memory, decoded on the device) against a training
step of a ResNet-18: forward, backward and SGD. All on the same device, interleaved, in float32 with torch's default
settings; medians. The bound is 2% of the network.

The encoding is what `--fidelity 0.02` chooses for synthetic logits like those of a trained teacher (`common.py`). On
two cores a training step takes about a minute, and a run about ten.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
from common import encoded, in_turn, made_up_logits, planned, write_cache
from torch.nn import functional as F
from torchvision.models import resnet18

from kdcache import open_cache
from kdcache.cache.format.codec import encode
from kdcache.cache.planner import USUAL_FIDELITY, described
from kdcache.cli import output

_BOUND = 0.02


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.add_argument("--device", default=usual, help=f"device; default {usual}")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    batch, pixels, classes, samples = (16, 64, 100, 2000) if asked.quick else (256, 224, 1000, 100_000)
    rounds, device = 1 if asked.quick else asked.rounds, asked.device
    chosen = planned(classes, fidelity=USUAL_FIDELITY)

    network = resnet18(num_classes=classes).to(device)
    images = torch.rand(batch, 3, pixels, pixels, device=device)
    logits = made_up_logits(batch, classes, seed=0).to(device)
    labels = logits.argmax(dim=1)
    basis = chosen.basis.to(device) if chosen.basis is not None else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    @torch.no_grad()
    def infer() -> None:
        network.eval()(images)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network.train()(images), labels).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "made-up.kdcache", encoded(chosen, min(samples, 20_000)), samples)
        teacher = open_cache(cache.path).teacher(device=device, placement="host")
        ids = torch.randint(samples, (64, batch), generator=torch.Generator().manual_seed(0))
        batches = itertools.cycle(ids)
        works = {
            "encode": lambda: encode(logits, labels, chosen.encoding, basis),
            "inference": infer,
            "gather and decode": lambda: teacher(next(batches)),
            "training step": step,
        }
        seconds = in_turn(works, rounds, device)
    name = torch.cuda.get_device_name(device) if device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    output.table(
        f"ms per batch of {batch}; {classes} classes; {name}",
        ["work", "time", "compared with", "time", "ratio", "bound"],
        [
            [f"{work}: {described(chosen)}", f"{1000 * taken:.2f}", of, f"{1000 * beside:.1f}"]
            + [f"{ratio:.2%}" for ratio in (taken / beside, _BOUND)]
            for work, of in (("encode", "inference"), ("gather and decode", "training step"))
            for taken, beside in [(seconds[work], seconds[of])]
        ],
    )


if __name__ == "__main__":
    main()
