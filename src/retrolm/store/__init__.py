"""Where pages live: on the device, or in host memory with a cache of recently used pages on the device."""

from .digests import DigestIndex
from .layout import PageLayout, PageStore
from .resident import ResidentStore
from .tiered import TieredStore

__all__ = ["DigestIndex", "PageLayout", "PageStore", "ResidentStore", "TieredStore"]
