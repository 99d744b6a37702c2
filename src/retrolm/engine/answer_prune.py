"""Methods that prune after a dense prefill: each prompt is read in full, and answered over what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.prune_base import PruneMethod
from .answering import PROGRAMS, Outcome, Prompt, PromptProgram, prompt_answer
from .prune import Pruned, generate_pruned
from .prune_pass import PrunePrompt
from .results import Answer


@PROGRAMS.register("prune")
class PruneProgram(PromptProgram):
    """Dense prefill of the whole prompt, then a compact cache at true positions."""

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        method, budget = self.lm.method, self.lm.config.kv_budget
        assert isinstance(method, PruneMethod)
        rows = [PrunePrompt(prompt.ids, len(prompt.question)) for prompt in prompts]
        found = generate_pruned(self.lm, method, rows, kv_budget=budget, max_new_tokens=max_new_tokens, **options)
        return [self._answer(len(row.ids), pruned) for row, pruned in zip(rows, found, strict=True)]

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """The stock model's, which are the method's where the budget holds the text.

        Raises `UserError` for a longer one: it is pruned behind its end, so that nothing of the method would show.
        """
        method, budget = self.lm.method, self.lm.config.kv_budget
        if len(input_ids) > budget:
            raise UserError(
                f"{method.name} prunes a prompt once it is read, so the logits of {len(input_ids)} tokens at "
                f"kv_budget={budget} would be the stock model's. Generate an answer, or use a budget of that size."
            )
        found: Tensor = self.lm.model(input_ids[None].to(self.lm.device)).logits[0]
        return found

    def check_attended(self, answer: Answer, num_tokens: int) -> None:
        """The budget is the mean over the layers that choose (PyramidKV splits it unevenly)."""
        backbone, attended = self.lm.backbone, answer.attended_by_layer["decode"]
        chosen = [attended[layer] for layer in range(backbone.num_layers) if backbone.retrieves(layer)]
        mean = {"prefill": num_tokens, "decode": -(-sum(chosen) // max(len(chosen), 1))}
        self.lm.method.check_attended(mean, num_tokens, len(answer.token_ids), self.allowed_tokens)

    def _answer(self, num_tokens: int, found: Pruned) -> Answer:
        windows = [info.window or num_tokens for info in self.lm.backbone.layers]
        outcome = Outcome(
            token_ids=found.token_ids,
            ended=found.ended,
            prefill=[min(window, num_tokens) for window in windows],
            decode=[max(seen) for seen in zip(found.kept, *found.attended, strict=True)],
            timings=found.timings,
            device_bytes=found.kv_bytes,
            max_position=num_tokens + max(len(found.token_ids) - 2, 0),
            decode_path=found.decode_path,
        )
        return prompt_answer(self.lm, outcome)
