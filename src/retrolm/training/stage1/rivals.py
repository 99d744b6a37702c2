"""Pages of a batch's other texts as further negatives (`batch_negatives`), and which of them are no fair ones.

Page scores take no positions, so four texts of 16K tokens are a haystack of 64K for each of their questions, nearly for
nothing. What says the same as a question's evidence must not be told to be wrong, in whatever text it stands.
Shape letters: N questions, B texts, P text pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.sample import IntArray, Stage1Sample, TokenArray

RUN_TOKENS = 12
_FACTORS = np.random.default_rng(20).integers(1 << 63, size=RUN_TOKENS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Runs = NDArray[np.uint64]


def rival_pages(samples: Sequence[Stage1Sample], page_size: int, num_pages: int) -> Tensor:
    """Which pages of other texts are negatives for each question, bool [N, B * P], `num_pages` being P.

    Left out are padding and pages that share `RUN_TOKENS` tokens in a row with the question's evidence or with what its
    own text leaves out: the same passage drawn for two texts, or two passages that say the same.
    """
    owners = np.repeat(np.arange(len(samples)), [len(sample.questions) for sample in samples])
    rivals = np.zeros((len(owners), len(samples), num_pages), dtype=bool)
    runs, askers = _evidence_runs(samples)
    for row, sample in enumerate(samples):
        rivals[owners != row, row, : -(-len(sample.input_ids) // page_size)] = True
        places, questions = _meetings(token_runs(sample.input_ids), runs, askers)
        for offset in (*range(0, RUN_TOKENS, page_size), RUN_TOKENS - 1):
            rivals[questions, row, (places + offset) // page_size] = False
    return torch.from_numpy(rivals).flatten(1)


def token_runs(ids: TokenArray) -> Runs:
    """A hash of each run of `RUN_TOKENS` tokens, uint64, by the place of its first token."""
    if len(ids) < RUN_TOKENS:
        return np.zeros(0, dtype=np.uint64)
    runs: Runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), RUN_TOKENS) @ _FACTORS
    return runs


def _evidence_runs(samples: Sequence[Stage1Sample]) -> tuple[Runs, IntArray]:
    """Runs in the evidence of all questions, ascending, and the question of each."""
    found = list(_runs_by_question(samples))
    runs = np.concatenate([runs for runs, _ in found])
    askers = np.repeat([number for _, number in found], [len(runs) for runs, _ in found])
    order = np.argsort(runs)
    return runs[order], askers[order]


def _runs_by_question(samples: Sequence[Stage1Sample]) -> Iterator[tuple[Runs, int]]:
    asked = [(sample.input_ids, question) for sample in samples for question in sample.questions]
    for number, (ids, question) in enumerate(asked):
        for start, end in (*question.positive_spans, *question.masked_spans):
            yield token_runs(ids[start:end]), number


def _meetings(text: Runs, runs: Runs, askers: IntArray) -> tuple[IntArray, IntArray]:
    """Places at which a text has a run of a question's evidence, and those questions; as many of either."""
    first, last = np.searchsorted(runs, text, "left"), np.searchsorted(runs, text, "right")
    counts = last - first
    places = np.repeat(np.arange(len(text)), counts)
    within = np.arange(len(places)) - np.repeat(counts.cumsum() - counts, counts)
    return places, askers[np.repeat(first, counts) + within]
