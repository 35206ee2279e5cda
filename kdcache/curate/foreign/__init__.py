"""Import and export of the soft labels of other projects: FKD, ml-dr and TinyViT."""

from kdcache.curate.foreign.exporter import TARGETS, files_of_cache
from kdcache.curate.foreign.importer import SOURCES, cache_of_files

__all__ = ["SOURCES", "TARGETS", "cache_of_files", "files_of_cache"]
