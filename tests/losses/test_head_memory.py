"""The memory of a chunked head in a process of its own: it does not grow with the number of positions."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import sys, torch
    from helpers.token_targets import TEMPERATURES
    from kdcache.losses import Loss
    from kdcache.losses.chunked_head import chunked_loss
    from kdcache.losses.lm_head import LMHead
    from kdcache.losses.token_targets import TokenTargets, scaled_logits
    from kdcache.losses.token_loss import token_loss
    vocabulary, width, k = 8_000, 16, 8
    loss = Loss.model_validate({"name": sys.argv[1]})
    def memory(key):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(key))
    def growth(n, how):
        torch.manual_seed(0)
        hidden = torch.randn(n, width, requires_grad=True)
        weight = torch.randn(vocabulary, width, requires_grad=True)
        tail = torch.tensor([0.3, 0.5, 0.8, 0.95]).log().expand(n, -1)
        targets = TokenTargets(
            torch.arange(k).expand(n, -1), torch.full((n, k), 0.7 / k).log(), tail, TEMPERATURES, vocabulary,
            coordinates=torch.randn(n, 4), basis=torch.randn(4, vocabulary), mean=torch.zeros(vocabulary),
        )
        labels = torch.zeros(n, dtype=torch.int64)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before = memory("VmRSS")
        if how == "chunks":
            parts = chunked_loss(hidden, LMHead(weight), labels, targets, loss, chunk=64)
        else:
            parts = token_loss(hidden @ weight.T, labels, targets, loss)
        parts.total.backward()
        return (memory("VmHWM") - before) // 1024
    growth(500, "chunks")  # what is allocated once
    print(growth(500, "chunks"), growth(4_000, "chunks"), growth(4_000, "whole"))
"""


def peaks(name: str) -> tuple[int, int, int]:
    """Return the growth in MiB of a process's memory in both passes: 500 and 4,000 positions, and all at once."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    few, many, whole = map(int, done.stdout.split())
    return few, many, whole


def environment() -> dict[str, str]:
    # Of freed memory glibc returns blocks above a threshold that it raises; what is measured is what is in use.
    returned = {"MALLOC_MMAP_THRESHOLD_": "200000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    return {**os.environ, **returned, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its peak")
@pytest.mark.parametrize("name", ["kd", "rkl"])
def test_memory_does_not_grow_with_the_number_of_positions(name: str) -> None:
    of_logits = 4 * 8_000 * 4_000 / 2**20  # one float32 matrix [n, V]
    few, many, whole = peaks(name)
    assert many - few < 0.3 * of_logits
    assert whole > few + 3 * of_logits
