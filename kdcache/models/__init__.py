"""Networks by name, their checkpoints, and the digest that says which weights they hold."""

from kdcache.models.build import build_model, preset_transform
from kdcache.models.checkpoints import load_weights, save_weights, weights_digest

__all__ = ["build_model", "load_weights", "preset_transform", "save_weights", "weights_digest"]
