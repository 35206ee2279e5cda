"""The cache: what is stored of a teacher, written, checked, and read back as a teacher."""

from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.teacher import CachedTeacher

__all__ = ["Cache", "CachedTeacher", "open_cache"]
