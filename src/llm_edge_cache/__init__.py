"""One response cache for every worker on the host.

``SharedSlab`` is the store in shared memory; see the documentation for the cache in two tiers that stands on it.
"""

from llm_edge_cache.decorator import CachedFunction, CacheInfo, cached
from llm_edge_cache.errors import (
    CacheError,
    ComputeError,
    RedisConfigError,
    SettingsError,
    SlabBusyError,
    SlabClosedError,
    SlabConfigError,
    SlabError,
    SlabMemoryError,
    SlabNotFoundError,
    SlabPermissionError,
    SlabVersionError,
)
from llm_edge_cache.keys import generate_cache_key, generate_short_key
from llm_edge_cache.lookup import CacheHealthStatus, L1Hit, L2Hit, LookupResult, MetricsSnapshot, Miss
from llm_edge_cache.manager import CacheManager
from llm_edge_cache.model import CacheableRequest, CachedResponse, TokenUsage
from llm_edge_cache.settings import L1Config, L2Config, load_settings
from llm_edge_cache.slab import SharedSlab, list_slabs
from llm_edge_cache.slabconfig import DEFAULT, EntryInfo, MiB, SlabConfig, SlabStats
from llm_edge_cache.sync_manager import SyncCacheManager

__all__ = [
    "DEFAULT",
    "CacheError",
    "CacheHealthStatus",
    "CacheInfo",
    "CacheManager",
    "CacheableRequest",
    "CachedFunction",
    "CachedResponse",
    "ComputeError",
    "EntryInfo",
    "L1Config",
    "L1Hit",
    "L2Config",
    "L2Hit",
    "LookupResult",
    "MetricsSnapshot",
    "MiB",
    "Miss",
    "RedisConfigError",
    "SettingsError",
    "SharedSlab",
    "SlabBusyError",
    "SlabClosedError",
    "SlabConfig",
    "SlabConfigError",
    "SlabError",
    "SlabMemoryError",
    "SlabNotFoundError",
    "SlabPermissionError",
    "SlabStats",
    "SlabVersionError",
    "SyncCacheManager",
    "TokenUsage",
    "cached",
    "generate_cache_key",
    "generate_short_key",
    "list_slabs",
    "load_settings",
]
