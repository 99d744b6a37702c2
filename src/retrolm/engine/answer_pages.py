"""Methods that choose pages: documents are read once and asked many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..paging import PageTable, page_lengths
from .answering import PROGRAMS, AnswerProgram, Prompt
from .chunk import query_group, query_lengths
from .encoder import Progress, require_room
from .page_asking import ask_pages
from .page_reading import page_logits, read_pages
from .results import Answer


@PROGRAMS.register("pages")
class PageProgram(AnswerProgram):
    """Streaming prefill into a page store, questions as pages of their own."""

    @property
    def allowed_tokens(self) -> int:
        config = self.lm.config
        return config.kv_budget + (0 if config.strict_budget else config.page_room)

    def read(self, sources: list[Any], progress: Progress | None) -> list[Any]:
        return read_pages(self.lm, sources, progress)

    def ask(self, pairs: Sequence[tuple[Any, Any]], max_new_tokens: int, raw: bool, **options: Any) -> list[Answer]:
        return ask_pages(self.lm, pairs, max_new_tokens, raw, **options)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        documents = read_pages(
            self.lm, [list(prompt.document) for prompt in prompts], heads=[prompt.prefix for prompt in prompts]
        )
        try:
            pairs = [(document, prompt.question) for document, prompt in zip(documents, prompts, strict=True)]
            return ask_pages(self.lm, pairs, max_new_tokens, raw=True, **options)
        finally:
            for document in documents:
                document.close()

    def logits(self, input_ids: Tensor) -> Tensor:
        return page_logits(self.lm, input_ids)

    def require_room(self, num_text_tokens: int, question: list[int]) -> None:
        config = self.lm.config
        prefix, joined = self.lm.split_head()
        sinks = page_lengths(len(prefix), config.page_size)
        lengths = torch.tensor([*sinks, *page_lengths(len(joined) + num_text_tokens, config.page_size)])
        lengths += config.page_marks
        table = PageTable(torch.arange(len(lengths)), lengths, max(len(sinks), 1), config.page_room)
        own = torch.arange(len(query_lengths(len(question), config)))
        require_room(query_group(table, own, question, config, window=0), config)

    def check_attended(self, answer: Answer, num_tokens: int) -> None:
        config = self.lm.config
        if config.first_layer_mode != "full" or not config.num_skip_layers:  # such layers are reported, not held to it
            super().check_attended(answer, num_tokens)
