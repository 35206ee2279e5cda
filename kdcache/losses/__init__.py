"""Distillation losses: plain functions of student logits, teacher logits and labels."""

from kdcache.losses.brier import best_alpha
from kdcache.losses.config import Loss
from kdcache.losses.distillation import (
    LossParts,
    cross_entropy,
    distillation_loss,
    distillation_term,
    learned_temperature,
)

__all__ = [
    "Loss",
    "LossParts",
    "best_alpha",
    "cross_entropy",
    "distillation_loss",
    "distillation_term",
    "learned_temperature",
]
