"""Methods of all kinds: tensors in, page or token choice out. One file per method; importing this files them all."""

from . import (
    bookmark,
    full,
    h2o,
    mean_key,
    pyramidkv,
    quest,
    random,
    recency,
    snapkv,
    streaming_postfill,
    tova,
)
from .base import METHODS, BudgetError, Method, PageMethod, PageTensors, page_method
from .selection import choose_pages

__all__ = [
    "METHODS",
    "BudgetError",
    "Method",
    "PageMethod",
    "PageTensors",
    "bookmark",
    "choose_pages",
    "full",
    "h2o",
    "mean_key",
    "page_method",
    "pyramidkv",
    "quest",
    "random",
    "recency",
    "snapkv",
    "streaming_postfill",
    "tova",
]
