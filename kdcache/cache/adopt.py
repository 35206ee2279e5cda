"""Take over finished shards from another cache."""

from __future__ import annotations

from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter


def adopt_shards(writer: CacheWriter, old: Cache) -> int:
    """Take over the shards of another cache that a larger one needs as they are, and say how many."""
    then, now = old.manifest.plan, writer.plan
    taken = 0
    for view in range(min(then.views.count, now.views.count)):
        whole = {shard for shard in range(then.shards) if then.shard_ids(shard) == now.shard_ids(shard)}
        for shard in sorted(whole.intersection(writer.pending(view))):
            writer.adopt(view, shard, old.path, old.manifest.files)
            taken += 1
    return taken
