"""Import and export of the files of other projects: soft labels of FKD, ml-dr and TinyViT, scores of Margin-MSE."""

from kdcache.curate.foreign.exporter import TARGETS, files_of_cache
from kdcache.curate.foreign.importer import SOURCES, cache_of_files
from kdcache.curate.foreign.margin_mse import cache_of_scores

__all__ = ["SOURCES", "TARGETS", "cache_of_files", "cache_of_scores", "files_of_cache"]
