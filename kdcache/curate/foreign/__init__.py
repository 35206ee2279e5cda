"""Import and export of the files of other projects.

Soft labels of FKD, ml-dr and TinyViT, scores of Margin-MSE, and log-probabilities of llama.cpp, vLLM,
SGLang and DistillKit; rows of tokens in columns.
"""

from kdcache.curate.foreign.columns import cache_of_columns
from kdcache.curate.foreign.distillkit import cache_of_distillkit
from kdcache.curate.foreign.engine_answers import cache_of_answers
from kdcache.curate.foreign.exporter import TARGETS, files_of_cache
from kdcache.curate.foreign.importer import SOURCES, cache_of_files
from kdcache.curate.foreign.llama_cpp import cache_of_kld
from kdcache.curate.foreign.margin_mse import cache_of_scores
from kdcache.curate.foreign.token_columns import columns_of_cache

__all__ = [
    "SOURCES",
    "TARGETS",
    "cache_of_answers",
    "cache_of_columns",
    "cache_of_distillkit",
    "cache_of_files",
    "cache_of_kld",
    "cache_of_scores",
    "columns_of_cache",
    "files_of_cache",
]
