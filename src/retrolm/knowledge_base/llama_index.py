"""A knowledge base as a LlamaIndex retriever. Needs the package llama-index-core."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .answers import Passage
from .base import KnowledgeBase
from .filters import Where

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode
except ImportError as error:
    raise UserError(
        "The LlamaIndex retriever needs llama-index-core. Install it: pip install llama-index-core"
    ) from error


class KnowledgeBaseRetriever(BaseRetriever):
    """Passages of a base as LlamaIndex nodes with scores, best first.

    Args:
        base: an open knowledge base. top_k: passages per question.
        documents, where: which documents to look in, as for `KnowledgeBase.query`.
    """

    def __init__(
        self, base: KnowledgeBase, *, top_k: int = 5, documents: list[str] | None = None, where: Where | None = None
    ) -> None:
        self._base, self._top_k, self._documents, self._where = base, top_k, documents, where
        super().__init__()

    def _retrieve(self, query_bundle: Any) -> list[Any]:
        question = query_bundle.query_str
        found = self._base.query(question, documents=self._documents, where=self._where, top_k=self._top_k)
        return [as_node(one) for one in found]


def as_node(passage: Passage) -> Any:
    """A passage as a LlamaIndex node; where it stands is in its metadata."""
    node = TextNode(text=passage.text, metadata=passage.describe())
    return NodeWithScore(node=node, score=passage.score)
