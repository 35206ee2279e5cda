"""Take over finished shards from another cache."""

from __future__ import annotations

from kdcache.cache.reader import Cache
from kdcache.cache.writer import CacheWriter


def adopt_shards(writer: CacheWriter, old: Cache) -> int:
    """Take over the shards of another cache that are the same in a larger one, and return their number."""
    old.check_files()
    before, now = old.manifest.plan, writer.plan
    adopted = 0
    for view in sorted({*old.views}.intersection(range(now.views.count))):
        same = {shard for shard in range(before.shards) if before.shard_ids(shard) == now.shard_ids(shard)}
        for shard in sorted(same.intersection(writer.pending(view))):
            writer.adopt(view, shard, old.path, old.manifest.files)
            adopted += 1
    return adopted
