"""Dense attention by the stock model: no budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .answering import PROGRAMS, Outcome, Prompt, PromptProgram, prompt_answer
from .results import Answer, Timings
from .stock import StockAnswer, stock_answers


@PROGRAMS.register("dense")
class DenseProgram(PromptProgram):
    """The stock model inside a `RetroLM`."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        rows = [prompt.ids for prompt in prompts]
        found = stock_answers(self.lm, rows, max_new_tokens=max_new_tokens, **options)
        return [self._answer(len(ids), answer) for ids, answer in zip(rows, found, strict=True)]

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.lm.model(input_ids[None].to(self.lm.device)).logits[0]
        return found

    def _answer(self, num_tokens: int, found: StockAnswer) -> Answer:
        backbone = self.lm.backbone
        windows = [info.window or found.num_attended for info in backbone.layers]
        row_bytes = 2 * backbone.num_kv_heads * backbone.head_dim * backbone.dtype.itemsize
        outcome = Outcome(
            token_ids=list(found.token_ids),
            ended=not found.truncated,
            prefill=[min(window, num_tokens) for window in windows],
            decode=[min(window, found.num_attended) for window in windows],
            timings=Timings(0.0, found.ttft_s, found.tpot_s),
            device_bytes=sum(min(window, found.num_attended) * row_bytes for window in windows),
            max_position=found.num_attended - 1,
            decode_path=found.decode_path,
        )
        return prompt_answer(self.lm, outcome)
