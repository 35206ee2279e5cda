"""What other projects have written down of their teachers: read into caches, and written from them."""

from kdcache.curate.foreign.exporter import TARGETS, files_of_cache
from kdcache.curate.foreign.importer import SOURCES, cache_of_files

__all__ = ["SOURCES", "TARGETS", "cache_of_files", "files_of_cache"]
