"""A knowledge base as a LangChain retriever. Needs the package langchain-core."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .answers import Passage
from .base import KnowledgeBase

try:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ImportError as error:
    raise UserError("The LangChain retriever needs langchain-core. Install it: pip install langchain-core") from error


class KnowledgeBaseRetriever(BaseRetriever):
    """Passages of a base as LangChain documents, best first: `KnowledgeBaseRetriever(base=base, top_k=5)`.

    Attributes:
        base: an open knowledge base. top_k: passages per question.
        documents, where: which documents to look in, as for `KnowledgeBase.query`.
    """

    base: Any
    top_k: int = 5
    documents: list[str] | None = None
    where: Any = None

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Any]:
        base: KnowledgeBase = self.base
        found = base.query(query, documents=self.documents, where=self.where, top_k=self.top_k)
        return [as_document(one) for one in found]


def as_document(passage: Passage) -> Any:
    """A passage as a LangChain document; where it stands is in its metadata."""
    return Document(page_content=passage.text, metadata=passage.describe())
