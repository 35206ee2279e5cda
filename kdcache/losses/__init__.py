"""Distillation losses: plain functions of student logits, teacher logits and labels."""

from kdcache.losses.boundaries import body_kd, boundaries, boundary_kd
from kdcache.losses.brier import best_alpha
from kdcache.losses.config import Loss
from kdcache.losses.distillation import (
    LossParts,
    cross_entropy,
    distillation_loss,
    distillation_term,
    learned_temperature,
)
from kdcache.losses.maps import masked_latents, pixel_kd, resized, rows_of_places

__all__ = [
    "Loss",
    "LossParts",
    "best_alpha",
    "body_kd",
    "boundaries",
    "boundary_kd",
    "cross_entropy",
    "distillation_loss",
    "distillation_term",
    "learned_temperature",
    "masked_latents",
    "pixel_kd",
    "resized",
    "rows_of_places",
]
