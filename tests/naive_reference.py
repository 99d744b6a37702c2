"""RetroLM written out naively in float64, from the paper and the choices D1-D23: what the engine is tested against.

Page by page, token by token, head by head, with an explicit position for every key and query. It borrows the stock
model's norms, projections and MLPs (row by row), nothing of the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Vectors = np.ndarray  # [tokens, heads, head dim]


@dataclass
class NaiveOptions:
    """The same names and defaults as `RetroConfig`, given again so that a changed default shows."""

    kv_budget: int = 2048
    page_size: int = 128
    strict_budget: bool = True
    num_local_pages: int = 1
    first_layer_mode: str = "recent"
    num_skip_layers: int = 1
    bookmarks: str = "invisible"
    bookmark_span: str = "sink_page"
    score_rope: bool = False
    causal_selection: bool = False
    selection_scope: str = "layer"
    page_positions: str = "compact"
    agreement_layers: int | None = None

    def __post_init__(self) -> None:
        if self.agreement_layers is None:
            self.agreement_layers = 8 if self.selection_scope == "layer" else 0

    @property
    def marks(self) -> int:
        """Bookmarks that take a place beside the tokens of a page."""
        return 1 if self.bookmarks == "visible" else 0


@dataclass
class NaivePage:
    """One page: its tokens, what its bookmark may see of them, and by layer its keys, values and bookmark rows.

    `selected` holds the pages that any head attends, `by_head` those of each KV head.
    """

    tokens: list[int]
    seen_by_bookmark: int
    start: int
    is_sink: bool
    is_question: bool = False
    keys: list[Vectors] = field(default_factory=list)
    values: list[Vectors] = field(default_factory=list)
    mean_query: list[Vectors] = field(default_factory=list)
    bookmark_query: list[Vectors] = field(default_factory=list)
    bookmark_key: list[Vectors] = field(default_factory=list)
    bookmark_value: list[Vectors] = field(default_factory=list)
    selected: list[list[int]] = field(default_factory=list)
    by_head: list[list[list[int]]] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty(0))


class NaiveRetroLM:
    """Reads pages one after the other.

    Args:
        model: a stock model whose `rotary_emb` is an `ExactRotary`.
        bookmark: embedding of the bookmark token, [hidden].
        deltas: (layer, projection name) → difference of W^b to the model's own weight, [out, in].
    """

    def __init__(
        self, model: Any, options: NaiveOptions, bookmark: Tensor, deltas: dict[tuple[int, str], Tensor] | None = None
    ) -> None:
        self.model = model
        self.config = model.config
        self.options = options
        self.bookmark = bookmark.double()
        self.deltas = deltas or {}
        self.heads = self.config.num_attention_heads
        self.kv_heads = self.config.num_key_value_heads
        self.dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.scale = getattr(self.config, "query_pre_attn_scalar", self.dim) ** -0.5
        self.cap = getattr(self.config, "attn_logit_softcapping", None)
        self.windows = [self._declared_window(index) for index in range(self.config.num_hidden_layers)]
        self.angles: dict[int, tuple[np.ndarray, float]] = {}
        self.pages: list[NaivePage] = []
        self.agreed: list[float] | None = None

    def read(self, pages: list[list[int]], num_sink: int = 1) -> list[NaivePage]:
        """Read all pages; the first `num_sink` are attention sinks."""
        for tokens in pages:
            self._read_page(tokens, len(tokens), len(self.pages) < num_sink)
        return self.pages

    def ask(self, question: list[int], generated: list[int]) -> NaivePage:
        """Read a question page, followed by generated tokens that its bookmark doesn't see."""
        self.agreed = None
        page = self._read_page(question + generated, len(question), is_sink=False, is_question=True)
        if not self.options.agreement_layers:
            return page
        self.pages.pop()
        self.agreed = self._agreed(page)
        return self._read_page(question + generated, len(question), is_sink=False, is_question=True)

    def _agreed(self, page: NaivePage) -> list[float] | None:
        """Mean of the last layers' scores, each with mean 0 and deviation 1 over the pages that compete."""
        first = 0 if self.options.first_layer_mode == "mean_key" else self.options.num_skip_layers
        scored = [s for index, s in enumerate(page.scores) if index >= first and not self._keeps_window(index)]
        num_sink = sum(other.is_sink for other in self.pages)
        competing = range(num_sink, len(self.pages) - self.options.num_local_pages)
        if not scored or len(competing) < 2:
            return None
        total = [0.0] * len(self.pages)
        chosen = scored[-self.options.agreement_layers :]
        for scores in chosen:
            mean = sum(scores[i] for i in competing) / len(competing)
            spread = math.sqrt(sum((scores[i] - mean) ** 2 for i in competing) / len(competing))
            if spread > 1e-5 * max(abs(scores[i]) for i in competing):
                for i, score in enumerate(scores):
                    total[i] += (score - mean) / (spread * len(chosen))
        return total

    @torch.no_grad()
    def _read_page(self, tokens: list[int], seen: int, is_sink: bool, is_question: bool = False) -> NaivePage:
        page = NaivePage(tokens, seen, self._tokens_before(), is_sink, is_question)
        normal = self.model.get_input_embeddings()(torch.tensor(tokens))
        mark = self.bookmark[None]
        for index, layer in enumerate(self.model.model.layers):
            normal, mark = self._layer(index, layer, page, normal, mark)
        logits = self.model.lm_head(self.model.model.norm(normal))
        cap = getattr(self.config, "final_logit_softcapping", None)
        page.logits = (cap * torch.tanh(logits / cap) if cap else logits).numpy()
        self.pages.append(page)
        return page

    def _tokens_before(self) -> int:
        return sum(len(page.tokens) + self.options.marks for page in self.pages)

    def _layer(self, index: int, layer: Any, page: NaivePage, normal: Tensor, mark: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values = self._project(index, layer, normal, bookmark=False)
        mark_query, mark_key, mark_value = self._project(index, layer, mark, bookmark=True)
        seen = page.seen_by_bookmark
        page.keys.append(keys)
        page.values.append(values)
        page.mean_query.append(queries[:seen].mean(0))
        page.bookmark_query.append(mark_query[0])
        page.bookmark_key.append(mark_key[0])
        page.bookmark_value.append(mark_value[0])
        page.by_head.append([self._select(index, page, head) for head in range(self.kv_heads)])
        page.selected.append(sorted({i for chosen in page.by_head[index] for i in chosen}))
        out = self._attend_normal(index, page, queries)
        out_mark = self._attend_bookmark(index, page, mark_query[0], mark_key[0], mark_value[0])
        return self._finish(layer, normal, out), self._finish(layer, mark, out_mark)

    # --- the stock layer around attention -----------------------------------------------------------------------

    def _project(self, index: int, layer: Any, rows: Tensor, bookmark: bool) -> tuple[Vectors, Vectors, Vectors]:
        attention, normed = layer.self_attn, layer.input_layernorm(rows)

        def through(name: str) -> Tensor:
            out = getattr(attention, name)(normed)
            delta = self.deltas.get((index, name)) if bookmark else None
            return out if delta is None else out + normed @ delta.double().T

        if hasattr(attention, "qkv_proj"):
            sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
            flat = through("qkv_proj").split(sizes, dim=-1)
        else:
            flat = (through("q_proj"), through("k_proj"), through("v_proj"))
        q, k, v = (x.reshape(len(rows), -1, self.dim) for x in flat)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q.numpy(), k.numpy(), v.numpy()

    def _finish(self, layer: Any, rows: Tensor, attended: Vectors) -> Tensor:
        out = layer.self_attn.o_proj(torch.from_numpy(attended.reshape(len(rows), -1)))
        if hasattr(layer, "pre_feedforward_layernorm"):
            rows = rows + layer.post_attention_layernorm(out)
            return rows + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(rows)))
        rows = rows + out
        return rows + layer.mlp(layer.post_attention_layernorm(rows))

    # --- which pages ----------------------------------------------------------------------------------------------

    def _declared_window(self, index: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        if kinds and kinds[index] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def _window(self, index: int) -> int | None:
        return self.windows[index]

    def _keeps_window(self, index: int) -> bool:
        """A sliding layer of a model that also has full layers: it attends its true window, nothing is selected."""
        return self.windows[index] is not None and None in self.windows

    def _select(self, index: int, page: NaivePage, kv_head: int) -> list[int]:
        past = list(range(len(self.pages)))
        options = self.options
        if kv_head == 0:
            page.scores.append([] if self._keeps_window(index) else self._scores(index, page, past, None))
        if self._keeps_window(index):
            return past
        scores = self._scores(index, page, past, kv_head if options.selection_scope == "head" else None)
        own = page.seen_by_bookmark + options.marks if options.strict_budget else 0
        if page.start + own <= options.kv_budget:
            return past
        if index < options.num_skip_layers and options.first_layer_mode == "full":
            return past
        sinks = [i for i in past if self.pages[i].is_sink]
        sink_tokens = sum(len(self.pages[i].tokens) + options.marks for i in sinks)
        room = (options.kv_budget - sink_tokens - own) // (options.page_size + options.marks)
        others = [i for i in past if i not in sinks]
        local = others[len(others) - min(options.num_local_pages, room, len(others)) :]
        free = sorted((i for i in others if i not in local), key=lambda i: (scores[i], i), reverse=True)
        best = free[: room - len(local)]
        if options.page_positions == "ranked_for_questions" and page.is_question:
            return sinks + best[::-1] + local
        return sorted(sinks + local + best)

    def _scores(self, index: int, page: NaivePage, past: list[int], kv_head: int | None) -> list[float]:
        """How well each past page matches what the current one looks for, to one KV head's queries or to all."""
        if page.is_question and self.agreed is not None:
            return self.agreed
        asking, place = page, len(self.pages)
        if self.options.causal_selection and self.pages and not page.is_question:
            asking, place = self.pages[-1], len(self.pages) - 1
        if index < self.options.num_skip_layers:
            if self.options.first_layer_mode == "mean_key":
                means = [self.pages[i].keys[index].mean(0) for i in past]
                return [self._match(asking.mean_query[index], mean, kv_head) for mean in means]
            return [float(i) for i in past]
        query = asking.bookmark_query[index]
        scores = []
        for i in past:
            key = self.pages[i].bookmark_key[index]
            if self.options.score_rope:
                room = self.options.page_size + self.options.marks
                turned = self._turn(index, query, place * room)
                scores.append(self._match(turned, self._turn(index, key, i * room), kv_head))
            else:
                scores.append(self._match(query, key, kv_head))
        return scores

    def _match(self, query: Vectors, key: Vectors, kv_head: int | None) -> float:
        """Σ_h ⟨q_h, k_{h // g}⟩ / √(H·D), over the heads h of one KV head or over all."""
        group = self.heads // self.kv_heads
        total = 0.0
        for head in range(self.heads):
            if kv_head not in (None, head // group):
                continue
            for channel in range(self.dim):
                total += query[head, channel] * key[head // group, channel]
        return total / math.sqrt(self.heads * self.dim)

    # --- attention --------------------------------------------------------------------------------------------------

    def _frequencies(self, index: int) -> tuple[np.ndarray, float]:
        """Angle per position of each rotary pair of a layer, and what cos and sin are multiplied with."""
        kinds = getattr(self.config, "layer_types", None)
        per_type = isinstance(next(iter(self.config.rope_parameters.values())), dict)
        found, scaling = self.model.model.rotary_emb.frequencies(kinds[index] if kinds and per_type else None)
        return found.numpy(), scaling

    def _turn(self, index: int, vectors: Vectors, position: int) -> Vectors:
        """RoPE at one position: pairs (i, i + R/2) of the first R channels turn by position · frequency_i."""
        if index not in self.angles:
            self.angles[index] = self._frequencies(index)
        frequencies, scaling = self.angles[index]
        half = len(frequencies)
        cos, sin = np.cos(position * frequencies) * scaling, np.sin(position * frequencies) * scaling
        turned, a, b = vectors.copy(), vectors[..., :half], vectors[..., half : 2 * half]
        turned[..., :half], turned[..., half : 2 * half] = a * cos - b * sin, a * sin + b * cos
        return turned

    def _logit(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Logits of turned queries for turned keys, [..., dim] each."""
        logit = (query * key).sum(-1) * self.scale
        return self.cap * np.tanh(logit / self.cap) if self.cap else logit

    def _softmax_rows(
        self, layer: int, query: Vectors, position: int, keys: list[tuple[int, Vectors, Vectors]], window: int | None
    ) -> Vectors:
        """One token's attention, [heads, dim]; `keys` are (position, turned key, value)."""
        turned = self._turn(layer, query, position)
        visible = [entry for entry in keys if entry[0] <= position and (not window or position - entry[0] < window)]
        seen, values = (np.stack([entry[part] for entry in visible]) for part in (1, 2))
        out = np.zeros_like(query)
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            logits = self._logit(turned[head], seen[:, kv])
            weights = np.exp(logits - logits.max())
            out[head] = weights / weights.sum() @ values[:, kv]
        return out

    def _attend_normal(self, index: int, page: NaivePage, queries: Vectors) -> Vectors:
        """Each head over the set of its KV head."""
        group = self.heads // self.kv_heads
        found = [self._attend_set(index, page, queries, chosen) for chosen in page.by_head[index]]
        return np.stack([found[head // group][:, head] for head in range(self.heads)], 1)

    def _attend_set(self, index: int, page: NaivePage, queries: Vectors, chosen: list[int]) -> Vectors:
        """Chosen pages right before the page, in order, without holes; then the page itself."""
        begin = 1000  # any place will do: only distances matter
        entries, position = [], begin
        left_out = self._left_out(index, page, chosen)
        for i in reversed(chosen):
            for key, value in reversed(self._stored(index, self.pages[i])):
                position -= 1
                entries.append((position - left_out[i], key, value))
        for token in range(len(page.tokens)):
            entries.append((begin + token, page.keys[index][token], page.values[index][token]))
        turned = [(at, self._turn(index, key, at), value) for at, key, value in entries]
        window = self._window(index)
        rows = [self._softmax_rows(index, query, begin + t, turned, window) for t, query in enumerate(queries)]
        return np.stack(rows)

    def _left_out(self, index: int, page: NaivePage, chosen: list[int]) -> dict[int, int]:
        """How much further each chosen page stands than side by side with the others."""
        apart = dict.fromkeys(chosen, 0)
        wanted = {"true_for_questions": page.is_question, "true": True}.get(self.options.page_positions, False)
        if not wanted or not chosen:
            return apart
        attended = 0
        for i in reversed(chosen):
            attended += len(self.pages[i].tokens) + self.options.marks
            apart[i] = page.start - self.pages[i].start - attended
        limit = min(self.config.max_position_embeddings, self._window(index) or self.config.max_position_embeddings)
        room, most = max(limit - self.options.kv_budget - attended, 0), max(apart.values())
        return {i: left * room // most if most > room else left for i, left in apart.items()}

    def _stored(self, index: int, page: NaivePage) -> list[tuple[Vectors, Vectors]]:
        """What later rows may see of a page: its tokens and, where it is visible, its bookmark behind them."""
        rows = list(zip(page.keys[index], page.values[index], strict=True))
        return rows + [(page.bookmark_key[index], page.bookmark_value[index])] * self.options.marks

    def _attend_bookmark(
        self, index: int, page: NaivePage, query: Vectors, own_key: Vectors, own_value: Vectors
    ) -> Vectors:
        """Sink, own page, itself, at adjacent positions."""
        entries: list[tuple[int, Vectors, Vectors]] = []
        sinks = [past for past in self.pages if past.is_sink]
        if page.is_sink or self.options.bookmark_span == "page":
            sinks = []
        for past in sinks:
            for key, value in self._stored(index, past):
                entries.append((len(entries), key, value))
        for token in range(page.seen_by_bookmark):
            entries.append((len(entries), page.keys[index][token], page.values[index][token]))
        entries.append((len(entries), own_key, own_value))
        turned = [(at, self._turn(index, key, at), value) for at, key, value in entries]
        return self._softmax_rows(index, query, len(entries) - 1, turned, None)[None]
