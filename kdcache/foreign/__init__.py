"""What other projects have written down of their teachers: read into caches, and written from them."""

from kdcache.foreign.incoming import SOURCES, cache_of_files
from kdcache.foreign.outgoing import TARGETS, files_of_cache

__all__ = ["SOURCES", "TARGETS", "cache_of_files", "files_of_cache"]
