"""The contract of a RAG pipeline: scores of chunks for a question, and how the prompt is put together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..methods.base import Method
from ..methods.knobs import positive


@dataclass(frozen=True)
class RagKnobs:
    """The paper's baselines: the ten best chunks of 200 tokens.

    Attributes:
        chunk_tokens: tokens per chunk. num_chunks: chunks that go into the prompt at most; fewer if the budget is full.
        order: "document" puts them as they stand in the text, "rank" the best one first.
        keep_first: the text's first chunk always goes into the prompt, as one of `num_chunks`: it holds the task's
            opening words.
    """

    chunk_tokens: int = 200
    num_chunks: int = 10
    order: Literal["document", "rank"] = "document"
    keep_first: bool = True


class RagMethod(Method):
    """Base of pipelines that answer from the best chunks of a text with full attention to the shortened prompt."""

    kind = "rag"
    prefill = "dense"
    unit = "chunk of 200 tokens"
    scope = "whole prompt"
    when = "once per question, before reading"
    budget_split = "the whole shortened prompt: chat head + chunks + question"
    keeps = "all tokens of the shortened prompt, on the device"
    positions = "true, in the shortened prompt"
    exact_when = "num_chunks chunks and kv_budget hold the prompt, order=document"
    true_positions = True
    Knobs: ClassVar[type[RagKnobs]] = RagKnobs
    knobs: RagKnobs

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "chunk_tokens", "num_chunks")

    @abstractmethod
    def scores(self, query: str, chunks: Sequence[str], device: Any = None) -> list[float]:
        """How well each chunk fits the query; higher is better.

        Args:
            device: where a model of the pipeline's own may compute (a torch device).
        """
