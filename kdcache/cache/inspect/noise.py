"""Describe the noise of a cache, for `info` and the card."""

from __future__ import annotations

from kdcache.cache.format.schema import NoiseRecord


def described_noise(noise: NoiseRecord | None) -> dict[str, str]:
    """Return what was done to the logits of private samples, in one line; nothing without noise."""
    if noise is None:
        return {}
    divided = f"logits divided by {noise.temperature:g}, then " if noise.temperature != 1 else ""
    whose = "of all samples" if noise.privacy is None else "of samples by their privacy"
    return {
        "noise": f"{divided}normal noise of deviation {noise.sigma:g} on the logits {whose}, "
        f"from the key {noise.key[:19]}..."
    }
