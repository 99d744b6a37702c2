"""Page-selection methods: tensors in, page choice out. One file per method; importing this package files them all."""

from . import bookmark, mean_key, quest, random, recency
from .base import METHODS, PageMethod, PageTensors
from .selection import choose_pages

__all__ = ["METHODS", "PageMethod", "PageTensors", "bookmark", "choose_pages", "mean_key", "quest", "random", "recency"]
