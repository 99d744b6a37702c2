"""Bookmarks the slow way: tokens and bookmarks of a sequence in one forward pass with an explicit mask, in float64.

Every pair of rows has its own relative position, so a bookmark sees [sink | own page | itself] at adjacent places while
tokens stay where they are. Plain autograd runs through the bookmark rows. It borrows the stock model's norms,
projections and MLPs, nothing of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sequence:
    """Token ids with the places of the pages: (first token, tokens), the question last; `num_prefix` sink tokens.

    With `visible` bookmarks tokens see those of pages before theirs, and `pages` begins with the pages of the prefix.
    """

    ids: Tensor
    num_prefix: int
    pages: list[tuple[int, int]]
    visible: bool = False

    @property
    def num_sinks(self) -> int:
        """Pages that are sinks."""
        return max(self.num_prefix_pages, 1)

    @property
    def num_prefix_pages(self) -> int:
        return sum(start + length <= self.num_prefix for start, length in self.pages)


def reference_scores(model: Any, sequence: Sequence, bookmark: Tensor, deltas: dict[tuple[int, str], Tensor]) -> Tensor:
    """Scores of the text pages for the question by layer, [layers, pages]; a constant per layer is left undecided.

    Args:
        model: a tiny model whose `rotary_emb` is an `ExactRotary`.
        bookmark: embedding [hidden]. deltas: (layer, projection) → difference matrix [out, in].
    """
    T, M = len(sequence.ids), len(sequence.pages)
    marks = bookmark.double().expand(M, -1)
    rows = torch.cat([model.get_input_embeddings()(sequence.ids).detach(), marks])
    heads, dim = _shape(model)
    scores = []
    for index, layer in enumerate(model.model.layers):
        q, k, v = _project(model, index, layer, rows, T, deltas)
        distance, allowed = _pairs(sequence, _window(model.config, index))
        out = _attend(model, index, q, k, v, distance, allowed)
        group = heads // k.shape[1]
        asked = q[-1].reshape(k.shape[1], group, dim).sum(1)
        scores.append((k[T + sequence.num_prefix_pages : -1] * asked).sum((1, 2)) / (heads * dim) ** 0.5)
        rows = _finish(layer, rows, out.reshape(T + M, -1))
    return torch.stack(scores)


def _shape(model: Any) -> tuple[int, int]:
    config = model.config
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _project(
    model: Any, index: int, layer: Any, rows: Tensor, num_tokens: int, deltas: dict[tuple[int, str], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    attention, normed = layer.self_attn, layer.input_layernorm(rows)
    heads, dim = _shape(model)
    kv_heads = model.config.num_key_value_heads

    def through(name: str) -> Tensor:
        out = getattr(attention, name)(normed)
        delta = deltas.get((index, name))
        if delta is None:
            return out
        return torch.cat([out[:num_tokens], out[num_tokens:] + normed[num_tokens:] @ delta.T])

    if hasattr(attention, "qkv_proj"):
        flat = through("qkv_proj").split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    else:
        flat = (through("q_proj"), through("k_proj"), through("v_proj"))
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in flat)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _pairs(sequence: Sequence, window: int | None) -> tuple[Tensor, Tensor]:
    """Relative position and permission of every (query row, key row), [T + M, T + M]."""
    if sequence.visible:
        return _visible_pairs(sequence, window)
    T, M, S = len(sequence.ids), len(sequence.pages), sequence.num_prefix
    places = torch.arange(T)
    distance = torch.zeros(T + M, T + M, dtype=torch.int64)
    allowed = torch.zeros(T + M, T + M, dtype=torch.bool)
    distance[:T, :T] = places[:, None] - places
    allowed[:T, :T] = (distance[:T, :T] >= 0) & (distance[:T, :T] < (window or T))
    sink = sequence.num_prefix or sequence.pages[0][1]
    for number, (start, length) in enumerate(sequence.pages):
        row = T + number
        before = 0 if S == 0 and number == 0 else sink
        for j in range(before):
            distance[row, j] = before + length - j
        for j in range(length):
            distance[row, start + j] = length - j
        allowed[row, :before] = True
        allowed[row, start : start + length] = True
        allowed[row, row] = True
    return distance, allowed


def _visible_pairs(sequence: Sequence, window: int | None) -> tuple[Tensor, Tensor]:
    """The same where bookmarks are visible: each takes the place behind its page, and all that follows moves on."""
    T, M = len(sequence.ids), len(sequence.pages)
    in_line = [row for number, (start, length) in enumerate(sequence.pages)
               for row in (*range(start, start + length), T + number)]  # fmt: skip
    place = {row: at for at, row in enumerate(in_line)}
    distance = torch.zeros(T + M, T + M, dtype=torch.int64)
    allowed = torch.zeros(T + M, T + M, dtype=torch.bool)
    for i in range(T):
        for j in range(T + M):
            distance[i, j] = place[i] - place[j]
            allowed[i, j] = 0 <= place[i] - place[j] < (window or 2 * T)
    sink = [(start, length, number) for number, (start, length) in enumerate(sequence.pages)][: sequence.num_sinks]
    for number, (start, length) in enumerate(sequence.pages):
        seen = [] if number < len(sink) else [r for s, n, m in sink for r in (*range(s, s + n), T + m)]
        seen += [*range(start, start + length), T + number]
        for at, row in enumerate(seen):
            distance[T + number, row] = len(seen) - 1 - at
            allowed[T + number, row] = True
    return distance, allowed


def _attend(
    model: Any,
    index: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance: Tensor,
    allowed: Tensor,
    added: Tensor | float = 0.0,
) -> Tensor:
    kinds = getattr(model.config, "layer_types", None)
    per_type = isinstance(next(iter(model.config.rope_parameters.values())), dict)
    frequencies, scaling = model.model.rotary_emb.frequencies(kinds[index] if kinds and per_type else None)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    half = len(frequencies)
    angles = distance[..., None].double() * frequencies
    cos, sin = angles.cos() * scaling**2, angles.sin() * scaling**2
    q1, q2, k1, k2 = q[..., :half], q[..., half : 2 * half], k[..., :half], k[..., half : 2 * half]
    # <R(m) q, R(n) k> depends on m - n alone: (q1 k1 + q2 k2) cos - (q2 k1 - q1 k2) sin of the angle of m - n.
    even = torch.einsum("ihf,jhf,ijf->hij", q1, k1, cos) + torch.einsum("ihf,jhf,ijf->hij", q2, k2, cos)
    odd = torch.einsum("ihf,jhf,ijf->hij", q1, k2, sin) - torch.einsum("ihf,jhf,ijf->hij", q2, k1, sin)
    rest = torch.einsum("ihf,jhf->hij", q[..., 2 * half :], k[..., 2 * half :])
    logits = (even + odd + rest) * model.model.layers[index].self_attn.scaling
    if cap := getattr(model.config, "attn_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    logits = logits + added
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def _finish(layer: Any, rows: Tensor, attended: Tensor) -> Tensor:
    out = layer.self_attn.o_proj(attended)
    if hasattr(layer, "pre_feedforward_layernorm"):
        rows = rows + layer.post_attention_layernorm(out)
        return rows + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(rows)))
    rows = rows + out
    return rows + layer.mlp(layer.post_attention_layernorm(rows))
