"""Scores of all text pages for the question, by every index, from one dense pass.

Shape letters: T tokens, P text pages, W page width, H, K heads, D head dim, Q question tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...engine.agreement import agreement, with_words
from ...engine.bookmark_stream import bookmark_stream, page_scores
from ...engine.dense_pass import dense_pass
from ...engine.model import RetroLM
from ...engine.page_attention import PageAttention
from ...engine.page_batch import PageBatch
from ...engine.page_words import page_words
from ...errors import unknown
from ...methods import METHODS, PageMethod, PageTensors
from ...retriever import PageRetriever

ORACLE = "attention_mass"
UNTRAINED = "untrained_bookmarks"
WORDS = "words alone (BM25)"


def page_indexes(names: Sequence[str] = ()) -> tuple[str, ...]:
    """The registered page methods that need no bookmarks, or those of them that are named.

    Raises `UserError` for a name that is none.
    """
    kinds = {name: METHODS.get(name) for name in METHODS}
    known = [name for name, kind in kinds.items() if issubclass(kind, PageMethod) and not kind.needs_bookmarks]
    for name in names:
        if name not in known:
            raise unknown("page index", name, known)
    return tuple(dict.fromkeys(names)) or tuple(known)


@torch.no_grad()
def score_pages(
    lm: RetroLM, batch: PageBatch, retrievers: Mapping[str, PageRetriever], indexes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Score every text page of one sequence with every index.

    Args:
        batch: one sequence (B = 1). retrievers: trained retrievers by name. indexes: names of training-free page
            methods.

    Returns:
        float32 [L, P] by index name: `indexes`, the question's true attention mass on each page, mean over heads and
        question tokens (the oracle), untrained bookmarks, and the retrievers; with `agreement_layers` also what each
        retriever's last layers agree on, the same for all layers, and with `word_weight` that and words together, and
        words alone.
    """
    batch = batch.to(lm.device)
    found: dict[str, list[Tensor]] = {name: [] for name in indexes}
    attention = PageAttention(lm.backbone, batch, range(lm.backbone.num_layers))

    def observe(layer: int, q_BTHD: Tensor, k_BTKD: Tensor) -> None:
        for name in indexes:
            found[name].append(_index_scores(lm, name, layer, batch, q_BTHD[0], k_BTKD[0]))
        attention(layer, q_BTHD, k_BTKD)

    dense = dense_pass(lm.backbone, lm.attachment, batch, observe)
    scores = {name: torch.stack(rows) for name, rows in found.items()}
    matches = _word_matches(lm, batch) if lm.config.word_weight and retrievers else None
    scores[ORACLE] = torch.stack([attention.mass[layer][0] for layer in range(lm.backbone.num_layers)])
    for name, retriever in {UNTRAINED: None, **retrievers}.items():
        bookmark = lm.untrained_bookmark() if retriever is None else retriever.embedding
        states = bookmark_stream(lm.backbone, lm.attachment, retriever, bookmark, batch, dense, lm.config)
        scores[name] = torch.stack([page_scores(states, layer)[0, 0] for layer in range(lm.backbone.num_layers)])
        if retriever is not None and lm.config.agreement_layers:
            scores |= _agreed(lm, name, scores[name].float(), matches)
    if matches is not None:
        scores[WORDS] = matches.expand(lm.backbone.num_layers, -1)
    return {name: value.float().cpu() for name, value in scores.items()}


def agreed_name(retriever: str, num_layers: int, word_weight: float = 0.0) -> str:
    """How rows call a retriever whose last layers agree on pages, and what words count beside them."""
    return f"{retriever}, last {num_layers} layers agreed" + (f", words counted {word_weight:g}" if word_weight else "")


def scoring_layers(lm: RetroLM) -> list[int]:
    """Layers with page scores of their own (D7)."""
    return [layer for layer in range(lm.config.num_skip_layers, lm.backbone.num_layers) if lm.backbone.retrieves(layer)]


def _agreed(lm: RetroLM, name: str, scores_LP: Tensor, matches_P: Tensor | None) -> dict[str, Tensor]:
    """What all layers attend where the last ones agree, and with words, each [L, P]; the last page doesn't compete."""
    num_layers, weight = lm.config.agreement_layers or 0, lm.config.word_weight or 0.0
    agreed = agreement(scores_LP[scoring_layers(lm)[-num_layers:]], num_sink=0, num_local=1)
    found = {agreed_name(name, num_layers): agreed}
    if weight:
        together = with_words(agreed, matches_P, weight, num_sink=0, num_local=1)
        found[agreed_name(name, num_layers, weight)] = together
    return {key: scores_LP if value is None else value.expand_as(scores_LP) for key, value in found.items()}


def _word_matches(lm: RetroLM, batch: PageBatch) -> Tensor:
    """How well each text page's words match the question's, [P]."""
    ends_M = batch.starts_BM[0] + batch.lengths_BM[0]
    *pages, question = (batch.tokens_BT[0, a:b].tolist() for a, b in zip(batch.starts_BM[0], ends_M, strict=True))
    return page_words(lm).matches(pages, question)


def _index_scores(lm: RetroLM, name: str, layer: int, batch: PageBatch, q_THD: Tensor, k_TKD: Tensor) -> Tensor:
    """Scores [P] of a training-free page index."""
    method = METHODS.get(name)()
    assert isinstance(method, PageMethod)
    starts, lengths = batch.starts_BM[0], batch.lengths_BM[0]
    pages = _page_tensors(layer, q_THD, k_TKD, starts[:-1], lengths[:-1], first=0)
    question = _page_tensors(layer, q_THD, k_TKD, starts[-1:], lengths[-1:], first=len(starts) - 1)
    rope = lm.backbone.rope(layer)
    rope.require((len(starts) + 1) * lm.config.page_size + int(lengths.max()))
    for part in (pages, question):
        part.rope, part.page_size = rope.at, lm.config.page_size
    return method.score(method.probe(question), method.digest(pages))[0].float()


def _page_tensors(layer: int, q_THD: Tensor, k_TKD: Tensor, starts: Tensor, lengths: Tensor, first: int) -> PageTensors:
    rows = starts[:, None] + torch.arange(int(lengths.max()), device=starts.device)
    rows = rows.clamp(max=len(q_THD) - 1)
    ordinals = first + torch.arange(len(starts), device=starts.device)
    return PageTensors(layer, q_THD[rows], k_TKD[rows], lengths, ordinals)
