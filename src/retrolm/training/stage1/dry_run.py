"""Training on random tokens with a random backbone: the time and memory of a recipe, without its model or data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ...config import MIN_BUDGET_PAGES, RetroConfig
from ...engine.model import RetroLM
from ...engine.random_model import load_shape, random_model
from ..data.sample import FurtherQuestion, Stage1Sample, TokenArray
from .backbone import without_head
from .batches import Stage1Batch
from .config import Stage1Recipe
from .trainer import Stage1Trainer

PREFIX_TOKENS, QUESTION_TOKENS = 24, 48


class DryTrainer(Stage1Trainer):
    """A trainer of a recipe whose batches are full ones of its longest texts, in random tokens.

    Args:
        shape: of the backbone, as `load_shape` takes it. device: where it is made.
    """

    def __init__(self, recipe: Stage1Recipe, shape: str, device: torch.device, out: Path) -> None:
        super().__init__(recipe, _backbone(recipe, shape, device), None, out)

    def loaded(self) -> Iterator[Stage1Batch]:
        """Batches without end, on the host."""
        rng, data = np.random.default_rng(0), self.recipe.data
        num_texts = max(self.recipe.train.tokens_per_batch // data.longest, 1)
        vocab = int(self.lm.backbone.config.vocab_size)
        prefix = rng.integers(vocab, size=PREFIX_TOKENS, dtype=np.int32)
        while True:
            texts = [rng.integers(vocab, size=data.longest, dtype=np.int32) for _ in range(num_texts)]
            yield self._collate()([self._sample(prefix, text, rng) for text in texts])

    def _sample(self, prefix: TokenArray, text: TokenArray, rng: np.random.Generator) -> Stage1Sample:
        """A text whose every question is answered by some page of it."""
        questions, further = [], self.recipe.data.further_questions
        for _ in range(1 + further):
            start = int(rng.integers(len(text)))
            ids = rng.integers(int(text.max()), size=QUESTION_TOKENS, dtype=np.int32)
            questions.append(FurtherQuestion(ids, ((start, start + self.recipe.train.page_size // 2),)))
        own, *others = questions
        return Stage1Sample(text, own.question_ids, prefix, own.positive_spans, "random", further=tuple(others))


def _backbone(recipe: Stage1Recipe, shape: str, device: torch.device) -> RetroLM:
    train, longest = recipe.train, recipe.data.longest
    model = random_model(load_shape(shape), getattr(torch, train.dtype), device)
    config = RetroConfig(
        page_size=train.page_size,
        kv_budget=max(longest, MIN_BUDGET_PAGES * train.page_size),
        bookmark_span=train.bookmark_span,
        score_rope=train.score_rope,
    )
    return RetroLM(without_head(model), config=config)
