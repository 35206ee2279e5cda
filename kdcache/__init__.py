"""kdcache: knowledge distillation with a teacher that runs only once.

cache = kdcache.dump_teacher(model, samples, "teacher.kdcache")     # stage one, once
train = kdcache.CachedDataset(samples, cache)                       # stage two, as often as you like
teacher, loss = cache.teacher(), kdcache.loss("dtkd", tau=4)
parts = loss(student(images), teacher(ids, views), labels, epoch=1)
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache, open_cache
    from kdcache.cache.sequences import CachedSequences, SequenceBatch
    from kdcache.cache.teacher import CachedOutput, CachedTeacher
    from kdcache.cache.token_spec import TokenCacheSpec
    from kdcache.config.loader import load_any_pipeline, load_pipeline
    from kdcache.config.loss import loss, output_loss
    from kdcache.config.schema import Pipeline
    from kdcache.config.text import TextPipeline
    from kdcache.curate.foreign.margin_mse import MarginMSEScores, read_margin_mse
    from kdcache.curate.token_cache import write_token_cache
    from kdcache.data.cached_dataset import CachedDataset
    from kdcache.data.datasets import load_split
    from kdcache.data.nodes import Graph, edges_among, graph_of, read_graph
    from kdcache.data.packing import TokenBatch, TokenSequence, token_batch
    from kdcache.data.samples import Samples, wrap
    from kdcache.data.text import TokenizedText, load_text
    from kdcache.dump.dump import dump_teacher
    from kdcache.dump.tokens.dump import dump_language_model
    from kdcache.errors import InterruptedRun, KdcacheError
    from kdcache.losses.distillation import LossParts
    from kdcache.losses.lm_head import LMHead
    from kdcache.losses.loss_module import DistillationLoss
    from kdcache.losses.token_targets import TokenTargets
    from kdcache.models.build import build_model
    from kdcache.models.causal_lm import CausalLM, split_causal_lm
    from kdcache.models.evaluate import SplitScore, evaluate
    from kdcache.models.graph_teacher import GraphTeacher
    from kdcache.models.pixel_scores import PixelScore
    from kdcache.models.teacher import TeacherIdentity
    from kdcache.runtime.distributed import Ranks, join_ranks
    from kdcache.runtime.progress import Progress
    from kdcache.train.inputs import CacheOptions
    from kdcache.train.run_result import RunResult
    from kdcache.train.tokens.loop import TokenEpoch
    from kdcache.train.tokens.train import LanguageRunResult, train_language_student
    from kdcache.train.train import train_student, train_teacher

# Imported on first use, so that `kdcache --help` does not wait for torch.
_HOME = {
    "Cache": "kdcache.cache.reader",
    "CacheOptions": "kdcache.train.inputs",
    "CachedDataset": "kdcache.data.cached_dataset",
    "CachedOutput": "kdcache.cache.teacher",
    "CachedSequences": "kdcache.cache.sequences",
    "CachedTeacher": "kdcache.cache.teacher",
    "CausalLM": "kdcache.models.causal_lm",
    "DistillationLoss": "kdcache.losses.loss_module",
    "Graph": "kdcache.data.nodes",
    "GraphTeacher": "kdcache.models.graph_teacher",
    "InterruptedRun": "kdcache.errors",
    "KdcacheError": "kdcache.errors",
    "LMHead": "kdcache.losses.lm_head",
    "LanguageRunResult": "kdcache.train.tokens.train",
    "LossParts": "kdcache.losses.distillation",
    "MarginMSEScores": "kdcache.curate.foreign.margin_mse",
    "Pipeline": "kdcache.config.schema",
    "Progress": "kdcache.runtime.progress",
    "Ranks": "kdcache.runtime.distributed",
    "RunResult": "kdcache.train.run_result",
    "Samples": "kdcache.data.samples",
    "SequenceBatch": "kdcache.cache.sequences",
    "PixelScore": "kdcache.models.pixel_scores",
    "SplitScore": "kdcache.models.evaluate",
    "TeacherIdentity": "kdcache.models.teacher",
    "TextPipeline": "kdcache.config.text",
    "TokenBatch": "kdcache.data.packing",
    "TokenCacheSpec": "kdcache.cache.token_spec",
    "TokenEpoch": "kdcache.train.tokens.loop",
    "TokenSequence": "kdcache.data.packing",
    "TokenTargets": "kdcache.losses.token_targets",
    "TokenizedText": "kdcache.data.text",
    "build_model": "kdcache.models.build",
    "dump_language_model": "kdcache.dump.tokens.dump",
    "dump_teacher": "kdcache.dump.dump",
    "edges_among": "kdcache.data.nodes",
    "evaluate": "kdcache.models.evaluate",
    "graph_of": "kdcache.data.nodes",
    "join_ranks": "kdcache.runtime.distributed",
    "load_any_pipeline": "kdcache.config.loader",
    "load_pipeline": "kdcache.config.loader",
    "load_split": "kdcache.data.datasets",
    "load_text": "kdcache.data.text",
    "loss": "kdcache.config.loss",
    "open_cache": "kdcache.cache.reader",
    "output_loss": "kdcache.config.loss",
    "read_graph": "kdcache.data.nodes",
    "read_margin_mse": "kdcache.curate.foreign.margin_mse",
    "split_causal_lm": "kdcache.models.causal_lm",
    "token_batch": "kdcache.data.packing",
    "train_language_student": "kdcache.train.tokens.train",
    "train_student": "kdcache.train.train",
    "train_teacher": "kdcache.train.train",
    "wrap": "kdcache.data.samples",
    "write_token_cache": "kdcache.curate.token_cache",
}

__all__ = [
    "Cache",
    "CacheOptions",
    "CachedDataset",
    "CachedOutput",
    "CachedSequences",
    "CachedTeacher",
    "CausalLM",
    "DistillationLoss",
    "Graph",
    "GraphTeacher",
    "InterruptedRun",
    "KdcacheError",
    "LMHead",
    "LanguageRunResult",
    "LossParts",
    "MarginMSEScores",
    "Pipeline",
    "PixelScore",
    "Progress",
    "Ranks",
    "RunResult",
    "Samples",
    "SequenceBatch",
    "SplitScore",
    "TeacherIdentity",
    "TextPipeline",
    "TokenBatch",
    "TokenCacheSpec",
    "TokenEpoch",
    "TokenSequence",
    "TokenTargets",
    "TokenizedText",
    "build_model",
    "dump_language_model",
    "dump_teacher",
    "edges_among",
    "evaluate",
    "graph_of",
    "join_ranks",
    "load_any_pipeline",
    "load_pipeline",
    "load_split",
    "load_text",
    "loss",
    "open_cache",
    "output_loss",
    "read_graph",
    "read_margin_mse",
    "split_causal_lm",
    "token_batch",
    "train_language_student",
    "train_student",
    "train_teacher",
    "wrap",
    "write_token_cache",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return __all__
