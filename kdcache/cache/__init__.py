"""The cache: what is stored of a teacher, written, checked, and read back as a teacher."""

from kdcache.cache.reader import Cache, CachedTeacher, open_cache

__all__ = ["Cache", "CachedTeacher", "open_cache"]
