"""From samples to padded batches with page labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.page_batch import PageBatch, page_batch
from ..data.sample import Stage1Sample, page_labels


@dataclass
class Stage1Batch:
    """Sequences with labels over their text pages.

    Attributes:
        pages: tokens and page places.
        positive_BP, negative_BP: bool over text pages; pages in neither leave the loss.
        sources: the mixture part of each sample.
    """

    pages: PageBatch
    positive_BP: Tensor
    negative_BP: Tensor
    sources: tuple[str, ...]

    def to(self, device: torch.device) -> Stage1Batch:
        return Stage1Batch(
            self.pages.to(device), self.positive_BP.to(device), self.negative_BP.to(device), self.sources
        )


class Collate:
    """Builds a `Stage1Batch` from samples (a picklable collate function for a DataLoader)."""

    def __init__(self, page_size: int, pad_id: int) -> None:
        self._page_size = page_size
        self._pad_id = pad_id

    def __call__(self, samples: Sequence[Stage1Sample]) -> Stage1Batch:
        prefix = samples[0].prefix_ids.tolist()
        pages = page_batch(
            prefix,
            [sample.input_ids for sample in samples],
            [sample.question_ids for sample in samples],
            self._page_size,
            self._pad_id,
        )
        positive = torch.zeros(len(samples), pages.lengths_BM.shape[1] - 1, dtype=torch.bool)
        negative = pages.lengths_BM[:, :-1] > 0
        for row, sample in enumerate(samples):
            gold, masked = page_labels(sample, self._page_size)
            positive[row, gold] = True
            negative[row, gold] = False
            negative[row, masked] = False
        return Stage1Batch(pages, positive, negative, tuple(sample.source for sample in samples))


def micro_batches(lengths: Iterator[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Group consecutive sample indices of one length so that each group holds at most `tokens_per_batch` tokens.

    Args:
        lengths: text length of sample 0, 1, 2, …
    """
    group: list[int] = []
    current = 0
    for index, length in enumerate(lengths):
        if group and (length != current or (len(group) + 1) * length > tokens_per_batch):
            yield group
            group = []
        current = length
        group.append(index)
    if group:
        yield group
