"""Text in, packed tokens out. No torch."""

from shoal.data.shards import Shards, ShardWriter, open_shards

__all__ = ["ShardWriter", "Shards", "open_shards"]
