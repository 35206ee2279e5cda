"""Distillation losses: plain functions of student logits, teacher logits and labels."""

from kdcache.losses.distillation import (
    LossParts,
    cross_entropy,
    distillation_loss,
    distillation_term,
    learned_temperature,
)
from kdcache.losses.spec import Loss

__all__ = ["Loss", "LossParts", "cross_entropy", "distillation_loss", "distillation_term", "learned_temperature"]
