"""Where pages live: on the device, in host memory or in a file, the upper tiers holding those used last."""

from .digests import DigestIndex
from .disk import DiskStore
from .layout import PageLayout, PageStore, StoreStats
from .resident import ResidentStore
from .tiered import TieredStore

__all__ = ["DigestIndex", "DiskStore", "PageLayout", "PageStore", "ResidentStore", "StoreStats", "TieredStore"]
