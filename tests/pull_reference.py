"""Joint training the slow way: page scores in the attention logits themselves, one dense pass, plain autograd, float64.

It borrows the stock model's norms, projections and MLPs, nothing of the engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_reference import Sequence, _attend, _finish, _pairs, _project, _shape, _window
from sparse_reference import pairs


def joint_losses(
    model: Any,
    ids: Tensor,
    lengths: list[int],
    num_prefix: int,
    sets: dict[int, Tensor],
    layers: list[int],
    bookmark: Tensor,
    deltas: dict[tuple[int, str], Tensor],
    causal: bool = False,
) -> Tensor:
    """Losses of tokens 1, 2, … of `ids` [T], differentiable in bookmark and deltas through the pages' scores.

    Args:
        model: a tiny model whose `rotary_emb` is an `ExactRotary`.
        lengths: tokens of each page, the prefix's among them. sets: layer → ordinals each page attends [M, S].
        layers: those in which pages are chosen by their bookmarks.
        causal: a page's scores are those of the bookmark before it.
    """
    T, first = len(ids), int(num_prefix > 0)
    starts = [sum(lengths[:page]) for page in range(len(lengths))]
    text = Sequence(ids, num_prefix, list(zip(starts, lengths, strict=True))[first:])
    rows = model.get_input_embeddings()(ids)
    marks = bookmark.expand(len(text.pages), -1)
    for index, layer in enumerate(model.model.layers):
        q, k, v = _project(model, index, layer, torch.cat([rows, marks]), T, deltas)
        added: Tensor | float = 0.0
        if index in layers:
            scores = F.pad(_scores(model, layer, q[T:], k[T:]), (first, 0, first, 0))
            scores = torch.cat([scores[:1], scores[:-1]]) if causal else scores
            added = _by_token(scores - scores.detach(), lengths, sets[index])
        distance, allowed = pairs(lengths, sets[index], _window(model.config, index))
        out = _attend(model, index, q[:T], k[:T], v[:T], distance, allowed, added)
        read_k, read_v = (torch.cat([x[:T].detach(), x[T:]]) for x in (k, v))
        distance, allowed = (x[T:] for x in _pairs(text, None))
        seen = _attend(model, index, q[T:], read_k, read_v, distance, allowed)
        rows, marks = _finish(layer, rows, out.reshape(T, -1)), _finish(layer, marks, seen.reshape(len(marks), -1))
    logits = model.lm_head(model.model.norm(rows))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def _scores(model: Any, layer: Any, q: Tensor, k: Tensor) -> Tensor:
    """Of all bookmarks' keys (columns) for all bookmarks' queries (rows); the constant bias of keys counts for none."""
    heads, dim = _shape(model)
    bias = getattr(getattr(layer.self_attn, "k_proj", None), "bias", None)
    if bias is not None and not hasattr(layer.self_attn, "q_norm"):
        k = k - bias.unflatten(0, (-1, dim))
    k = k.repeat_interleave(heads // k.shape[1], 1)
    return torch.einsum("ihd,jhd->ij", q, k) / (heads * dim) ** 0.5


def _by_token(scores: Tensor, lengths: list[int], sets: Tensor) -> Tensor:
    """What is added to the logit of every (query, key) pair [T, T]: nothing unless a page was chosen from others."""
    rows = []
    for page, length in enumerate(lengths):
        chosen = [other for other in sets[page].tolist() if other >= 0]
        free = [other for other in chosen if 0 < other < page - 1] if len(chosen) < page else []
        columns = [
            scores[page, other].expand(size) if other in free else scores.new_zeros(size)
            for other, size in enumerate(lengths)
        ]
        rows.append(torch.cat(columns).expand(length, -1))
    return torch.cat(rows)
