"""Trained retrievers side by side on held-out texts of a recipe, at lengths of one's choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...engine.model import RetroLM
from ...retriever import PageRetriever
from ..data.dataset import Stage1Dataset
from .batches import Collate, counted_words
from .config import Stage1Recipe
from .held_out import dev_batches, dev_config, held_out_recall
from .step import Stage1Step


def compared(
    recipe: Stage1Recipe,
    lm: RetroLM,
    pool: Path,
    retrievers: Mapping[str, PageRetriever],
    lengths: Sequence[int],
    num_texts: int,
) -> Iterator[dict[str, Any]]:
    """Measure retrievers on the same held-out texts; one row per length and retriever.

    Args:
        lengths: tokens of the texts. num_texts: texts of each length.

    Yields:
        {"retriever", "length", "num_texts", "recall_pages"} and what `held_out_recall` gives.
    """
    train = dataclasses.replace(recipe.train, ema=0.0, batch_negatives=0.0)
    steps = [Stage1Step(lm, retriever, train).to(lm.device) for retriever in retrievers.values()]
    collate = Collate(train.page_size, lm.pad_id, words=counted_words(lm, train))
    for length in lengths:
        config = dev_config(recipe.data, length, length)
        data = Stage1Dataset(pool, lm.tokenizer, config, num_texts, "dev")
        batches = list(dev_batches(config, num_texts, train.tokens_per_batch))
        head = {"length": length, "num_texts": num_texts, "recall_pages": train.recall_pages}
        found = held_out_recall(steps, data, batches, collate, lm.device)
        yield from ({"retriever": name, **head, **row} for name, row in zip(retrievers, found, strict=True))
