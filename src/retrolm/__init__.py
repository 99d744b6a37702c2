"""RetroLM: questions over texts far longer than the model's window, on a fixed budget of keys and values."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import RetroConfig
    from .engine.document import Conversation, Document
    from .engine.model import RetroLM
    from .engine.results import Answer, PageUse, Retrieval
    from .errors import RetroLMError, UserError
    from .knowledge_base.base import KnowledgeBase
    from .retriever import PageRetriever

# Loaded when first used (PEP 562), so that `import retrolm` and `retrolm --help` don't wait for torch.
_MODULE_OF = {
    "Answer": "engine.results",
    "Conversation": "engine.document",
    "Document": "engine.document",
    "KnowledgeBase": "knowledge_base.base",
    "PageRetriever": "retriever",
    "PageUse": "engine.results",
    "RetroConfig": "config",
    "RetroLM": "engine.model",
    "RetroLMError": "errors",
    "Retrieval": "engine.results",
    "UserError": "errors",
}

__all__ = [
    "Answer",
    "Conversation",
    "Document",
    "KnowledgeBase",
    "PageRetriever",
    "PageUse",
    "Retrieval",
    "RetroConfig",
    "RetroLM",
    "RetroLMError",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name == "RetroLM":
        import_module(".rag", __name__)  # files the RAG pipelines beside the other methods
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
