"""All methods that --method takes; the RAG pipelines are filed when their room is entered."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..methods import Method
    from ..registry import Registry


def known_methods() -> Registry[Method]:
    """The registry of methods, filled."""
    from .. import rag  # noqa: F401  (files its methods and their program)
    from ..methods import METHODS

    return METHODS
