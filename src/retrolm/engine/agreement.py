"""Questions whose layers agree on pages: encoded once to be scored, and once more over the pages agreed on.

Deep layers know better than low ones which page a question is about. Bookmarks are scored layer by layer while a page
is encoded, so what the last layers find comes too late for the others; a question is short enough to be encoded twice.
Between the two, words that a page shares with the question may count as well (`page_words`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import RetroConfig
from ..errors import UserError
from ..methods import Method
from .captures import LayerChoice, QueryCapture
from .chunk import Chunk, PageGroup
from .encoder import Encoder

_TIE = 1e-5  # of the largest score: what is less apart is rounding, which standardising would blow up


def with_agreement(config: RetroConfig, method: Method, has_words: bool) -> RetroConfig:
    """`config` with the options of agreement and words decided: what suits the method, where nothing was said.

    KV heads that choose for themselves (D4) share no set, so that they don't agree on one unless told to.

    Args:
        has_words: whether there is a tokenizer. Raises `UserError` for a weight of words without one.
    """
    if config.word_weight and not has_words:
        raise UserError(f"word_weight={config.word_weight!r} needs a tokenizer: pass one, or set it to 0.")
    num_layers, weight = config.agreement_layers, config.word_weight
    if num_layers is None:
        num_layers = method.agreement_layers if config.selection_scope == "layer" else 0
    if weight is None:
        weight = method.word_weight if num_layers and has_words else 0.0
    whole = config.whole_sentences and weight > 0
    return config.replace(agreement_layers=num_layers, word_weight=float(weight), whole_sentences=whole)


def encode_questions(
    encoder: Encoder, groups: Sequence[PageGroup], matches: Sequence[Tensor | None] = ()
) -> list[QueryCapture]:
    """Encode query pages, with `agreement_layers` twice; returns what each attended, ready for decoding.

    Where all pages are attended there is nothing to agree on, and once is enough.

    Args:
        matches: for each group how well each past page's words match, float32 [P] (`PageWords`); empty, or None for a
            group, where words don't count.
    """
    captures = encoder.encode(_chunk_of(groups)).captures
    config = encoder.parts.config
    again: dict[int, PageGroup] = {}
    for i, group in enumerate(groups):
        agreed = _agreed(captures[i], group, matches[i] if matches else None, config)
        if agreed is not None:
            again[i] = replace(group, agreed_P=agreed, moves={}, last_probe={})
    if again:
        for i, capture in zip(again, encoder.encode(_chunk_of(list(again.values()))).captures, strict=True):
            captures[i] = capture
    return captures


def _chunk_of(groups: Sequence[PageGroup]) -> Chunk:
    return Chunk(list(groups), max(len(page) for group in groups for page in group.tokens))


def _agreed(capture: QueryCapture, group: PageGroup, matches_P: Tensor | None, config: RetroConfig) -> Tensor | None:
    """Scores of past pages that all layers of a question are to use, [P]; None where each keeps its own."""
    if not config.agreement_layers or not group.leaves_out:
        return None
    num_sink, num_local = group.table.num_sink, config.num_local_pages
    agreed = agreed_scores(capture.choices, config.agreement_layers, num_sink, num_local)
    return with_words(agreed, matches_P, config.word_weight or 0.0, num_sink, num_local)


def agreed_scores(choices: Sequence[LayerChoice], num_layers: int, num_sink: int, num_local: int) -> Tensor | None:
    """Mean over the last `num_layers` layers with scores, each standardised over the pages that compete, float32 [P].

    Sinks and the `num_local` last pages are attended anyway. None where no layer has scores or nothing competes.
    """
    scored = [choice.scores for choice in choices if choice.scores is not None][-num_layers:]
    if not scored:
        return None
    return agreement(torch.stack(scored), num_sink, num_local)


def with_words(
    agreed_P: Tensor | None, matches_P: Tensor | None, weight: float, num_sink: int, num_local: int
) -> Tensor | None:
    """What layers agree on, and `weight` times how well words match, standardised alike, float32 [P]; None stays."""
    words = None if matches_P is None or not weight else agreement(matches_P[None], num_sink, num_local)
    return agreed_P if agreed_P is None or words is None else agreed_P + weight * words.to(agreed_P.device)


def agreement(scores_LP: Tensor, num_sink: int, num_local: int) -> Tensor | None:
    """Mean over layers of scores [L, P], each layer's standardised over the pages that compete, float32 [P].

    The first `num_sink` and the last `num_local` pages don't compete. None where fewer than two do. A layer in which
    all scores tie, but for rounding, has no say.
    """
    competing = scores_LP[:, num_sink : scores_LP.shape[1] - num_local]
    if competing.shape[1] < 2:
        return None
    spread, size = competing.std(1, correction=0, keepdim=True), competing.abs().amax(1, keepdim=True)
    apart = scores_LP - competing.mean(1, keepdim=True)
    return torch.where(spread > _TIE * size, apart / spread, 0).mean(0)
