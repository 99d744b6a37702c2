"""The page store that a model's settings ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..store import DiskStore, PageLayout, PageStore, ResidentStore, TieredStore

if TYPE_CHECKING:
    from .model import RetroLM

SPARE_PAGES = 8
_STORE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def page_layout(
    lm: RetroLM,
) -> PageLayout:
    """Shape and dtype of this model's stored pages."""
    backbone, config = lm.backbone, lm.config
    dtype = _STORE_DTYPES[config.store_dtype] if config.store_dtype else backbone.dtype
    devices = tuple(info.device for info in backbone.layers)
    shape = (config.page_room, backbone.num_kv_heads, backbone.head_dim)
    return PageLayout(*shape, dtype, devices, config.store_bits)


def least_pages(lm: RetroLM) -> int:
    """Pages per layer that a cap must hold: those that one page attends, itself, and one to spare."""
    return lm.config.kv_budget // lm.config.page_size + 3


def new_store(lm: RetroLM, num_pages: int, host_kv_bytes: int | None = None) -> PageStore:
    """An empty page store with room for `num_pages` pages, where the settings say that pages live.

    Args:
        host_kv_bytes: with a disk tier, its cap on host memory, if it is to differ from the engine's.
    """
    config, layout, least = lm.config, page_layout(lm), least_pages(lm)
    store: PageStore
    if lm.disk_tier is not None:
        folder, host_bytes = lm.disk_tier
        store = DiskStore(layout, host_kv_bytes or host_bytes, folder, least, config.device_kv_bytes)
    elif config.device_kv_bytes is None:
        store = ResidentStore(layout)
    else:
        store = TieredStore(layout, config.device_kv_bytes, least)
    store.release(store.reserve(num_pages + SPARE_PAGES))
    return store
