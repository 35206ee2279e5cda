"""Measure size, fidelity and decoding of maps of class logits: `python benchmarks/maps.py [--classes 19] [--quick]`.

The maps are those of a small fully convolutional network, at a quarter of the size of its images, on made-up scenes:
bands and objects of textures, one texture per class. Half of the scenes train the network; the maps of the others are
measured, on scenes that the plan has not seen. `--maps FILE` measures a tensor [N, C, h, w] of your own instead. The
forward pass that decoding is related to is that of a MobileNet V2 without its head, on an image of eight times the
grid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.cache.fidelity import total_variation
from kdcache.cache.format import zarr_store
from kdcache.cache.format.grid_codec import decode_grids, encode_grids
from kdcache.cache.format.grid_encoding import GridRequest
from kdcache.cache.grid_planner import plan_grids
from kdcache.cli import output

_BATCH = 4
_REQUESTS = {
    "float16": GridRequest(encoding="float16", fidelity=None, over_places=False),
    "steps, 0.02": GridRequest(encoding="steps", fidelity=0.02, over_places=False),
    "klt, 0.02": GridRequest(encoding="klt", fidelity=0.02, over_places=False),
    "steps, 0.005": GridRequest(encoding="steps", fidelity=0.005, over_places=False),
    "klt, 0.005": GridRequest(encoding="klt", fidelity=0.005, over_places=False),
    "default": GridRequest(encoding="auto", fidelity=None, over_places=False),
    "default, small": GridRequest(encoding="auto", fidelity=None, over_places=False, compression="small"),
    "over places, 0.02": GridRequest(encoding="auto", fidelity=0.02, over_places=True),
}


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--maps", type=Path, help="file of a tensor [N, C, h, w]; default: made up")
    arguments.add_argument("--classes", type=int, default=19, help="classes of the scenes")
    arguments.add_argument("--scenes", type=int, default=64, help="scenes, of which half train the network")
    arguments.add_argument("--height", type=int, default=256, help="of the scenes, in pixels; they are twice as wide")
    arguments.add_argument("--steps", type=int, default=160, help="training steps, of 4 scenes each")
    arguments.add_argument("--quick", action="store_true", help="small sizes; the figures say nothing about others")
    asked = arguments.parse_args()
    if asked.quick:
        asked.scenes, asked.height, asked.steps = 16, 64, 8
    torch.manual_seed(0)
    if asked.maps is None:
        maps, correct = _made_up(asked.classes, asked.scenes, asked.height, asked.steps)
        what = f"{correct:.1%} of the places right"
    else:
        maps, what = torch.load(asked.maps, weights_only=True).float(), f"of {asked.maps.name}"
    pilot, unseen = maps[::2], maps[1::2]
    torch.set_num_threads(1)
    forward = _forward(unseen.shape[2], unseen.shape[3])
    rows = [_row(name, request, pilot, unseen, forward) for name, request in _REQUESTS.items()]
    output.table(
        f"{maps.shape[1]} classes, {maps.shape[2]} x {maps.shape[3]} places, {len(unseen)} maps, {what}",
        [
            "encoding",
            "codec",
            "step",
            "bytes/place",
            "TV T=1",
            "TV T=4",
            "TV over places",
            "decoding, ms",
            "forward / it",
        ],
        rows,
    )


def _row(name: str, request: GridRequest, pilot: Tensor, unseen: Tensor, forward: float) -> list[str]:
    """Plan an encoding on some maps, and measure it on others."""
    planned = plan_grids(pilot, "classes", request, 10_000)
    encoding, basis = planned.encoding, planned.basis
    rows = encode_grids(unseen, encoding, basis)
    decoded = decode_grids(rows, encoding, basis)
    true, again = (maps.movedim(1, 3).flatten(0, 2) for maps in (unseen, decoded))
    errors = [float(total_variation(true, again, t).mean()) for t in (1, 4)]
    spread = total_variation(unseen.flatten(2).flatten(0, 1), decoded.flatten(2).flatten(0, 1), 1).mean()
    size = zarr_store.bytes_per_row(encoding, rows) / encoding.places
    few = rows[:8]
    seconds = _seconds(lambda: decode_grids(few, encoding, basis)) / len(few)
    over = f"{float(spread):.4f}" if encoding.level else "no level"
    return [
        name,
        f"{encoding.codec}, {encoding.dtype}",
        "none" if encoding.step is None else f"{encoding.step:.3f}",
        f"{size:.2f}",
        *(f"{error:.4f}" for error in errors),
        over,
        f"{1000 * seconds:.2f}",
        f"{forward / seconds:.0f}",
    ]


def _seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Return the shortest of some times."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _forward(height: int, width: int) -> float:
    """Return the seconds of a MobileNet V2 on one image of eight times the grid."""
    from torchvision.models import mobilenet_v2  # noqa: PLC0415  # it is slow to import

    network, image = mobilenet_v2().features.eval(), torch.zeros(1, 3, 8 * height, 8 * width)
    with torch.no_grad():
        return _seconds(lambda: network(image), 2)


def _made_up(classes: int, count: int, height: int, steps: int) -> tuple[Tensor, float]:
    """Return maps of scenes that the network was not trained on, and the share of its places that are right."""
    images, labels = _scenes(count, classes, height)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 2, 2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1, 4, 4), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, classes, 1),
    )  # fmt: skip
    coarse, seen = labels[:, 2::4, 2::4], count // 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ids = torch.randint(seen, (_BATCH,))
        loss = F.cross_entropy(network(images[ids]), coarse[ids])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        maps = torch.cat([network(images[index : index + 1]) for index in range(seen, count)])
    return maps, float((maps.argmax(dim=1) == coarse[seen:]).float().mean())


def _scenes(count: int, classes: int, height: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, 2 H] and labels [N, H, 2 H]: bands with wavy borders, and boxes and ellipses on them."""
    width = 2 * height
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / height, indexing="ij")
    generator = torch.Generator().manual_seed(1)

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    kinds = torch.rand(classes, 8, generator=generator)
    images, labels = torch.empty(count, 3, height, width), torch.empty(count, height, width, dtype=torch.long)
    for index in range(count):
        label = torch.full((height, width), int(drawn(0, classes)))
        for border in sorted(drawn(0.1, 0.9) for _ in range(3)):
            wave = border + drawn(0, 0.05) * torch.sin(drawn(2, 12) * x + drawn(0, 6))
            label[y > wave] = int(drawn(0, classes))
        for _ in range(int(drawn(6, 16))):
            far = (y - drawn(0, 1)) / drawn(0.04, 0.25), (x - drawn(0, 2)) / drawn(0.04, 0.25)
            inside = far[0] ** 2 + far[1] ** 2 < 1 if drawn(0, 1) < 0.5 else (far[0].abs() < 1) & (far[1].abs() < 1)
            label[inside] = int(drawn(0, classes))
        of = kinds[label]
        angle, pitch = 3.14 * of[..., 3], 60 + 240 * of[..., 4]
        grating = torch.sin(pitch * (torch.cos(angle) * y + torch.sin(angle) * x) + drawn(0, 6))
        color = of[..., :3] * drawn(0.7, 1.2) + 0.3 * (of[..., 5:] - 0.5) * grating[..., None]
        noise = 0.15 * torch.randn(height, width, 3, generator=generator)
        images[index], labels[index] = (color + noise).movedim(2, 0), label
    return 2 * images - 1, labels


if __name__ == "__main__":
    main()
