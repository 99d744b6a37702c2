"""From samples to padded batches with page labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.model import RetroLM
from ...engine.page_batch import PageBatch, page_batch
from ...engine.page_words import PageWords
from ..data.sample import Stage1Sample, page_labels
from .config import Stage1TrainConfig
from .rivals import rival_pages


@dataclass
class Stage1Batch:
    """Sequences with labels over their text pages.

    Shape letters: N questions, all sequences' together, B sequences, P text pages.

    Attributes:
        pages: tokens and page places.
        positive_NP, negative_NP: bool over text pages; pages in neither leave the loss.
        sequence_N: the sequence of each question; query_N: which of its query pages; share_N: its weight in the loss,
            such that every sequence weighs the same.
        sources: the mixture part of each sample.
        rival_NM: bool over the text pages of all sequences, [N, B * P]: negatives in other texts; None = none count.
        words_NP: how well each text page's words match the question's, float32; None = not counted.
    """

    pages: PageBatch
    positive_NP: Tensor
    negative_NP: Tensor
    sequence_N: Tensor
    query_N: Tensor
    share_N: Tensor
    sources: tuple[str, ...]
    rival_NM: Tensor | None = None
    words_NP: Tensor | None = None

    def to(self, device: torch.device) -> Stage1Batch:
        parts = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return Stage1Batch(self.pages.to(device), **parts, sources=self.sources)

    def pin_memory(self) -> Stage1Batch:
        """The batch in page-locked memory, from which a copy to a GPU waits for nothing (a DataLoader calls this)."""
        parts = {name: value.pin_memory() for name, value in self._tensors().items()}
        return Stage1Batch(self.pages.pin_memory(), **parts, sources=self.sources)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class Collate:
    """Builds a `Stage1Batch` from samples (a picklable collate function for a DataLoader).

    Args:
        with_rivals: also find which pages of other texts are negatives.
        words: also count the words that pages and questions share.
    """

    def __init__(self, page_size: int, pad_id: int, with_rivals: bool = False, words: PageWords | None = None) -> None:
        self._page_size = page_size
        self._pad_id = pad_id
        self._with_rivals = with_rivals
        self._words = words

    def __call__(self, samples: Sequence[Stage1Sample]) -> Stage1Batch:
        prefix = samples[0].prefix_ids.tolist()
        pages = page_batch(
            prefix,
            [sample.input_ids for sample in samples],
            [sample.question_ids for sample in samples],
            self._page_size,
            self._pad_id,
            [[question.question_ids for question in sample.further] for sample in samples],
        )
        asked = [(row, number) for row, sample in enumerate(samples) for number in range(len(sample.questions))]
        sequence, query = torch.tensor(asked).T
        negative = (pages.text_lengths > 0)[sequence]
        positive = torch.zeros_like(negative)
        for index, (row, number) in enumerate(asked):
            gold, masked = page_labels(samples[row].questions[number], self._page_size)
            positive[index, gold] = True
            negative[index, gold] = False
            negative[index, masked] = False
        share = torch.tensor([1 / (len(samples) * len(samples[row].questions)) for row, _ in asked])
        rivals = rival_pages(samples, self._page_size, negative.shape[1]) if self._with_rivals else None
        sources = tuple(sample.source for sample in samples)
        matches = None if self._words is None else self._matches(self._words, samples, negative.shape)
        return Stage1Batch(pages, positive, negative, sequence, query, share, sources, rivals, matches)

    def _matches(self, words: PageWords, samples: Sequence[Stage1Sample], shape: torch.Size) -> Tensor:
        rows = []
        for sample in samples:
            ids, width = sample.input_ids.tolist(), self._page_size
            pages = [ids[start : start + width] for start in range(0, len(ids), width)]
            rows += [words.matches(pages, question.question_ids.tolist()) for question in sample.questions]
        found = torch.zeros(shape)
        for row, matches in zip(found, rows, strict=True):
            row[: len(matches)] = matches
        return found


def counted_words(lm: RetroLM, train: Stage1TrainConfig) -> PageWords | None:
    """What counts the words that agreement takes in; None where there is no tokenizer or they don't count."""
    return None if lm.tokenizer is None or not train.agreed_words else PageWords(lm.tokenizer, lm.format)


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
