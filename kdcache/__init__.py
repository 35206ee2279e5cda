"""kdcache: knowledge distillation with a teacher that runs only once.

cache = kdcache.dump_teacher(model, samples, "teacher.kdcache")     # stage one, once
teacher = kdcache.open_cache("teacher.kdcache").teacher()           # ids, view -> logits [B, C]
result = kdcache.train_student(pipeline, cache, "runs/student")     # stage two, as often as you like
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache, open_cache
    from kdcache.cache.teacher import CachedTeacher
    from kdcache.config.loader import load_pipeline
    from kdcache.config.schema import CacheSpec, Pipeline
    from kdcache.data.cached_dataset import CachedDataset
    from kdcache.data.datasets import load_split
    from kdcache.data.samples import Samples, wrap
    from kdcache.dump.dump import dump_teacher
    from kdcache.errors import KdcacheError
    from kdcache.losses import Loss, distillation_loss
    from kdcache.models import build_model
    from kdcache.train.train import train_student, train_teacher

# Resolved on first use: `kdcache --help` need not wait for torch.
_HOME = {
    "Cache": "kdcache.cache.reader",
    "CacheSpec": "kdcache.config.schema",
    "CachedDataset": "kdcache.data.cached_dataset",
    "CachedTeacher": "kdcache.cache.teacher",
    "KdcacheError": "kdcache.errors",
    "Loss": "kdcache.losses",
    "Pipeline": "kdcache.config.schema",
    "Samples": "kdcache.data.samples",
    "build_model": "kdcache.models",
    "distillation_loss": "kdcache.losses",
    "dump_teacher": "kdcache.dump.dump",
    "load_pipeline": "kdcache.config.loader",
    "load_split": "kdcache.data.datasets",
    "open_cache": "kdcache.cache.reader",
    "train_student": "kdcache.train.train",
    "train_teacher": "kdcache.train.train",
    "wrap": "kdcache.data.samples",
}

__all__ = [
    "Cache",
    "CacheSpec",
    "CachedDataset",
    "CachedTeacher",
    "KdcacheError",
    "Loss",
    "Pipeline",
    "Samples",
    "build_model",
    "distillation_loss",
    "dump_teacher",
    "load_pipeline",
    "load_split",
    "open_cache",
    "train_student",
    "train_teacher",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
