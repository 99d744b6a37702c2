"""Pipelines that change the prompt, not the attention; importing this package files them beside the other methods."""

from . import bm25, dense, hybrid, program
from .method import RagMethod

__all__ = ["RagMethod", "bm25", "dense", "hybrid", "program"]
