"""Token methods written out naively in float64: token by token, head by head, lists and loops, from their papers.

A rule says which tokens a query sees and at which distance; the reader below does the rest. Nothing of the engine or
the methods is used; norms, projections and MLPs are the stock model's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from naive_prune import in_window, slow_forward
from naive_reference import NaiveOptions, NaiveRetroLM

Vectors = np.ndarray  # [tokens, heads, head dim]
Seen = list[tuple[int, int]]  # (token, distance)
MadeUp = list[tuple[int, np.ndarray, np.ndarray, float]]  # (place, key at its own angle, value, added to its logit)


class Rule:
    """What a method lets tokens see; `begin` and `saw` keep its books, layer by layer."""

    reader: NaiveTokens
    question: tuple[int, ...] = ()  # ids that the method may look at before it reads

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        """A chunk of tokens [start, stop) comes in; keys of all tokens so far, before RoPE."""

    def sees(self, layer: int, token: int, head: int) -> Seen:
        raise NotImplementedError

    def made_up(self, layer: int, token: int, head: int) -> MadeUp:
        """Tokens that stand for others."""
        return []

    def saw(self, layer: int, token: int, head: int, weights: dict[int, float]) -> None:
        """Attention weights of one query."""


class NaiveTokens(NaiveRetroLM):
    """Reads ids in chunks; `logits` grows by one row per token, `counts[layer]` by what each token saw at most."""

    def __init__(self, model: Any, rule: Rule) -> None:
        super().__init__(model, NaiveOptions(), torch.zeros(1))
        self.rule = rule
        rule.reader = self
        num_layers = self.config.num_hidden_layers
        self.keys: list[list[Vectors]] = [[] for _ in range(num_layers)]
        self.values: list[list[Vectors]] = [[] for _ in range(num_layers)]
        self.at_zero: list[list[Vectors]] = [[] for _ in range(num_layers)]  # keys at position 0
        self.num_tokens = 0
        self.logits: list[np.ndarray] = []
        self.counts: list[list[int]] = [[] for _ in range(num_layers)]

    @torch.no_grad()
    def chunk(self, ids: list[int], answering: bool = False) -> None:
        """Read one chunk."""
        rows = self.model.get_input_embeddings()(torch.tensor(ids))
        start, stop = self.num_tokens, self.num_tokens + len(ids)
        for index, layer in enumerate(self.model.model.layers):
            queries, keys, values = self._project(index, layer, rows, bookmark=False)
            self.keys[index] += list(keys)
            self.values[index] += list(values)
            self.at_zero[index] += [self._turn(index, key, 0) for key in keys]
            if not self._keeps_window(index):
                self.rule.begin(index, start, stop, queries, np.stack(self.keys[index]), answering)
            out = np.stack([self._token(index, start + i, query) for i, query in enumerate(queries)])
            rows = self._finish(layer, rows, out)
        self.num_tokens = stop
        self.logits += list(self._head(rows))

    def _head(self, rows: Tensor) -> np.ndarray:
        logits = self.model.lm_head(self.model.model.norm(rows))
        cap = getattr(self.config, "final_logit_softcapping", None)
        found: np.ndarray = (cap * torch.tanh(logits / cap) if cap else logits).numpy()
        return found

    def _token(self, layer: int, token: int, query: Vectors) -> Vectors:
        out, window, keeps_window = np.zeros_like(query), self._window(layer), self._keeps_window(layer)
        most, turned = 0, dict[int, Vectors]()
        for head in range(self.heads):
            seen = [(j, token - j) for j in range(token + 1)] if keeps_window else self.rule.sees(layer, token, head)
            seen = [(j, apart) for j, apart in seen if window is None or apart < window]
            made_up = [] if keeps_window else self.rule.made_up(layer, token, head)
            made_up = [one for one in made_up if window is None or token - one[0] < window]
            most = max(most, len(seen) + len(made_up))
            for _, apart in seen:
                if apart not in turned:
                    turned[apart] = self._turn(layer, query, apart)
            whole = self._turn(layer, query, token)[head] if made_up else query[head]
            for_others = [self._logit(whole, key) + bias for _, key, _, bias in made_up]
            logits = np.append(self._logits(layer, turned, head, seen), for_others)
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            if not keeps_window:
                self.rule.saw(layer, token, head, {j: w for (j, _), w in zip(seen, weights, strict=False)})
            values = [self.values[layer][j][self.kv(head)] for j, _ in seen] + [value for _, _, value, _ in made_up]
            out[head] = weights @ np.stack(values)
        self.counts[layer].append(most)
        return out

    def kv(self, head: int) -> int:
        return head // (self.heads // self.kv_heads)

    def _logits(self, layer: int, turned: dict[int, Vectors], head: int, seen: Seen) -> np.ndarray:
        kv = self.kv(head)
        queries = np.stack([turned[apart][head] for _, apart in seen])
        return self._logit(queries, np.stack([self.at_zero[layer][j][kv] for j, _ in seen]))


class Streaming(Rule):
    """Sinks and recent tokens as a list; distances are between places in the list."""

    def __init__(self, budget: int, num_sink: int) -> None:
        self.budget, self.num_sink = budget, num_sink

    def sees(self, layer: int, token: int, head: int) -> Seen:
        cache = list(range(token + 1))
        if len(cache) > self.budget:
            cache = cache[: self.num_sink] + cache[len(cache) - (self.budget - self.num_sink) :]
        return [(j, len(cache) - 1 - place) for place, j in enumerate(cache)]


class LMInfinite(Rule):
    """Near tokens at their distance; the first ones, once far, at the limit."""

    def __init__(self, num_local: int, num_global: int) -> None:
        self.num_local, self.num_global = num_local, num_global

    def sees(self, layer: int, token: int, head: int) -> Seen:
        near = [(j, token - j) for j in range(token + 1) if token - j < self.num_local]
        far = [(j, self.num_local) for j in range(self.num_global) if token - j >= self.num_local]
        return far + near


class H2O(Rule):
    """One list per layer and KV head, cut before each chunk."""

    def __init__(self, budget: int, num_heavy: int) -> None:
        self.budget, self.num_heavy = budget, num_heavy
        self.cache: dict[tuple[int, int], list[int]] = {}
        self.score: dict[tuple[int, int], dict[int, float]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        for kv in range(keys.shape[1]):
            cache = self.cache.setdefault((layer, kv), [])
            score = self.score.setdefault((layer, kv), {})
            room = self.budget - (stop - start)
            if len(cache) > room:
                num_recent = self.budget - self.num_heavy - (stop - start)
                recent = cache[len(cache) - num_recent :]
                others = cache[: len(cache) - num_recent]
                heavy = sorted(others, key=lambda j: (score[j], j))[len(others) - (room - num_recent) :]
                cache[:] = sorted(heavy) + recent
            for j in range(start, stop):
                cache.append(j)
                score[j] = 0.0

    def sees(self, layer: int, token: int, head: int) -> Seen:
        cache = self.cache[layer, self.reader.kv(head)]
        place = cache.index(token)
        return [(j, place - i) for i, j in enumerate(cache[: place + 1])]

    def saw(self, layer: int, token: int, head: int, weights: dict[int, float]) -> None:
        group = self.reader.heads // self.reader.kv_heads
        for j, weight in weights.items():
            self.score[layer, self.reader.kv(head)][j] += weight / group


class InfLLM(Rule):
    """Lists of first tokens, blocks and waiting tokens per layer, moved along as the published code does."""

    def __init__(self, num_init: int, window: int, block: int, top_k: int, repr_top_k: int) -> None:
        self.num_init, self.window, self.block = num_init, window, block
        self.top_k, self.repr_top_k = top_k, repr_top_k
        self.first: dict[int, list[int]] = {}
        self.blocks: dict[int, list[list[int]]] = {}
        self.represents: dict[int, list[np.ndarray]] = {}
        self.waiting: dict[int, list[int]] = {}
        self.score: dict[tuple[int, int], dict[int, float]] = {}
        self.chosen: dict[int, set[int]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        first, waiting = self.first.setdefault(layer, []), self.waiting.setdefault(layer, [])
        self._move(layer, first, waiting, keys)
        blocks = self.blocks.setdefault(layer, [])
        mean = np.mean([self.reader._turn(layer, query, self.window - 1) for query in queries], axis=0)
        scores = [float((mean * rep).sum()) for rep in self.represents.setdefault(layer, [])]
        best = sorted(range(len(blocks)), key=lambda n: scores[n], reverse=True)[: self.top_k]
        self.chosen[layer] = {j for n in best for j in blocks[n]}
        waiting += list(range(start, stop))

    def _move(self, layer: int, first: list[int], waiting: list[int], keys: Vectors) -> None:
        while len(waiting) > self.window and len(first) < self.num_init:
            first.append(waiting.pop(0))
        while len(waiting) - self.block >= self.window:
            block = [waiting.pop(0) for _ in range(self.block)]
            self.blocks[layer].append(block)
            rep = np.zeros((self.reader.heads, self.reader.dim))
            for head in range(self.reader.heads):
                score = self.score[layer, head]
                best = sorted(block, key=lambda j: score.get(j, 0.0), reverse=True)[: self.repr_top_k]
                rep[head] = np.mean([keys[j, self.reader.kv(head)] for j in best], axis=0)
            self.represents[layer].append(rep)

    def sees(self, layer: int, token: int, head: int) -> Seen:
        far = self.chosen[layer] | set(self.first[layer]) | set(self.waiting[layer])
        near = [(j, token - j) for j in range(token + 1) if token - j < self.window]
        return near + [(j, self.window - 1) for j in sorted(far) if token - j >= self.window]

    def saw(self, layer: int, token: int, head: int, weights: dict[int, float]) -> None:
        score = self.score.setdefault((layer, head), {})
        for j, weight in weights.items():
            if token - j < self.window:
                score[j] = score.get(j, 0.0) + weight


class TokenSelect(Rule):
    """First, voted and local tokens and the chunk, laid side by side."""

    def __init__(self, budget: int, num_init: int, num_local: int) -> None:
        self.budget, self.num_init, self.num_local = budget, num_init, num_local
        self.row: dict[int, list[int]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        self.row[layer] = list(range(stop))
        if stop <= self.budget:
            return
        middle = list(range(self.num_init, start - self.num_local))
        turned = [self.reader._turn(layer, query, self.num_local + i) for i, query in enumerate(queries)]
        mean = np.mean(turned, axis=0)
        votes = np.zeros(len(middle))
        for head in range(self.reader.heads):
            logits = np.array([float(mean[head] @ keys[j, self.reader.kv(head)]) for j in middle])
            shares = np.exp(logits - logits.max())
            votes += shares / shares.sum()
        room = self.budget - self.num_init - self.num_local - (stop - start)
        best = sorted(range(len(middle)), key=lambda i: (votes[i], i), reverse=True)[:room]  # ties: the later token
        kept = {middle[i] for i in best} | set(range(self.num_init)) | set(range(start - self.num_local, stop))
        self.row[layer] = sorted(kept)

    def sees(self, layer: int, token: int, head: int) -> Seen:
        row = self.row[layer]
        place = row.index(token)
        return [(j, place - i) for i, j in enumerate(row[: place + 1])]


class Quest(Rule):
    """Pages by the best bound, for each generated token and KV head; everything before that and in the first layers."""

    def __init__(self, budget: int, page: int, num_dense: int) -> None:
        self.num_pages, self.page, self.num_dense = budget // page, page, num_dense
        self.chosen: dict[tuple[int, int], set[int]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        reader, num_pages = self.reader, -(-stop // self.page)
        everything = set(range(num_pages))
        if not answering or layer < self.num_dense:
            self.chosen = {**self.chosen, **{(layer, kv): everything for kv in range(reader.kv_heads)}}
            return
        turned = np.stack([reader._turn(layer, key, j) for j, key in enumerate(keys)])
        query = reader._turn(layer, queries[0], start)
        for kv in range(reader.kv_heads):
            bounds = [max(self._bound(query, turned, p, h) for h in self._heads(kv)) for p in range(num_pages - 1)]
            best = sorted(range(num_pages - 1), key=lambda p: bounds[p], reverse=True)[: self.num_pages - 1]
            self.chosen[layer, kv] = {*best, num_pages - 1}

    def _heads(self, kv: int) -> list[int]:
        return [head for head in range(self.reader.heads) if self.reader.kv(head) == kv]

    def _bound(self, query: Vectors, turned: Vectors, page: int, head: int) -> float:
        rows = turned[page * self.page : (page + 1) * self.page, self.reader.kv(head)]
        total = 0.0
        for channel in range(rows.shape[1]):
            q = query[head, channel]
            total += max(q * rows[:, channel].min(), q * rows[:, channel].max())
        return total

    def sees(self, layer: int, token: int, head: int) -> Seen:
        chosen = self.chosen[layer, self.reader.kv(head)]
        return [(j, token - j) for j in range(token + 1) if j // self.page in chosen]


class ArkVale(Quest):
    """Pages by boxes of mean width around the middle of their keys, one choice for all heads."""

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        reader, num_pages = self.reader, -(-stop // self.page)
        chosen = set(range(num_pages))
        if answering and layer >= self.num_dense and num_pages > self.num_pages:
            turned = np.stack([reader._turn(layer, key, j) for j, key in enumerate(keys)])
            query = reader._turn(layer, queries[0], start)
            forced = {0, 1, num_pages - 2, num_pages - 1}
            free = [p for p in range(num_pages) if p not in forced]
            scores = {p: sum(self._box(query[h], turned, p, reader.kv(h)) for h in range(reader.heads)) for p in free}
            chosen = forced | set(sorted(free, key=lambda p: scores[p], reverse=True)[: self.num_pages - len(forced)])
        self.chosen = {**self.chosen, **{(layer, kv): chosen for kv in range(reader.kv_heads)}}

    def _box(self, query: np.ndarray, turned: Vectors, page: int, kv: int) -> float:
        rows = turned[page * self.page : (page + 1) * self.page, kv]
        total = 0.0
        for channel in range(rows.shape[1]):
            values = [float(row[channel]) for row in rows]
            middle = (min(values) + max(values)) / 2
            width = sum(abs(middle - value) for value in values) / len(values)
            total += max(query[channel] * (middle - width), query[channel] * (middle + width))
        return total


class RetrievalAttention(Rule):
    """First, recent, and for each query head the keys with the largest inner products."""

    def __init__(self, budget: int, num_first: int, num_recent: int) -> None:
        self.budget, self.num_first, self.num_recent = budget, num_first, num_recent
        self.found: dict[tuple[int, int], set[int]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        for head in range(self.reader.heads):
            self.found[layer, head] = set(range(stop))
        if not answering:
            return
        static = {j for j in range(stop) if j < self.num_first or stop - j <= self.num_recent}
        turned = [self.reader._turn(layer, queries[0], start - j) for j in range(stop)]
        for head in range(self.reader.heads):
            kv = self.reader.kv(head)
            at_zero = self.reader.at_zero[layer]
            logits = {j: float(turned[j][head] @ at_zero[j][kv]) for j in range(stop) if j not in static}
            room = self.budget - self.num_first - self.num_recent
            self.found[layer, head] = static | set(sorted(logits, key=lambda j: logits[j], reverse=True)[:room])

    def sees(self, layer: int, token: int, head: int) -> Seen:
        return [(j, token - j) for j in sorted(self.found[layer, head]) if j <= token]


class ShadowKV(Rule):
    """Chunks by mean keys; keys projected on their leading directions, but for chunks that are unlike their mean."""

    def __init__(self, budget: int, chunk: int, num_local: int, rank: int, num_outliers: int) -> None:
        self.budget, self.chunk, self.num_local = budget, chunk, num_local
        self.rank, self.num_outliers = rank, num_outliers
        self.end: dict[int, int] = {}
        self.means: dict[tuple[int, int], list[np.ndarray]] = {}
        self.outliers: dict[tuple[int, int], set[int]] = {}
        self.found: dict[tuple[int, int], set[int]] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        for kv in range(self.reader.kv_heads):
            self.found[layer, kv] = set(range(stop))
        if not answering or stop <= self.budget:
            return
        if layer not in self.end:
            self._compress(layer, start, keys)
        query = self.reader._turn(layer, queries[0], start)
        for kv in range(self.reader.kv_heads):
            self.found[layer, kv] = self._found(layer, kv, stop, query)

    def _compress(self, layer: int, num_tokens: int, keys: Vectors) -> None:
        num_chunks = max(num_tokens // self.chunk - self.num_local, 0)
        self.end[layer] = num_chunks * self.chunk
        rows = np.stack(self.reader.keys[layer][:num_tokens]).reshape(num_tokens, -1)
        directions = np.linalg.eigh(rows.T @ rows)[1][:, -self.rank :]
        low = (rows @ directions @ directions.T).reshape(num_tokens, self.reader.kv_heads, -1)
        for kv in range(self.reader.kv_heads):
            least, means = [], []
            for c in range(num_chunks):
                tokens = range(c * self.chunk, (c + 1) * self.chunk)
                turned = [self.reader._turn(layer, keys[j], j)[kv] for j in tokens]
                mean = sum(turned) / len(turned)
                means.append(mean)
                least.append(min(float(k @ mean) / (np.linalg.norm(k) * np.linalg.norm(mean)) for k in turned))
            worst = set(sorted(range(num_chunks), key=lambda c: least[c])[: self.num_outliers])
            self.means[layer, kv], self.outliers[layer, kv] = means, worst
            for j in range(self.end[layer]):
                if j // self.chunk not in worst:
                    self.reader.at_zero[layer][j] = self.reader.at_zero[layer][j].copy()
                    self.reader.at_zero[layer][j][kv] = self.reader._turn(layer, low[j], 0)[kv]

    def _found(self, layer: int, kv: int, stop: int, query: Vectors) -> set[int]:
        means, outliers, end = self.means[layer, kv], self.outliers[layer, kv], self.end[layer]
        others = [c for c in range(len(means)) if c not in outliers]
        best = dict.fromkeys(others, 0.0)
        for head in (h for h in range(self.reader.heads) if self.reader.kv(h) == kv):
            weights = {c: float(np.exp(query[head] @ means[c] * self.reader.dim**-0.5)) for c in others}
            for c in others:
                best[c] = max(best[c], weights[c] / sum(weights.values()))
        room = self.budget - self.num_outliers * self.chunk
        top_k = max((room - (stop - end)) // self.chunk, 0)
        chosen = outliers | set(sorted(others, key=lambda c: best[c], reverse=True)[:top_k])
        return {j for j in range(end) if j // self.chunk in chosen} | set(range(max(end, stop - room), stop))

    def sees(self, layer: int, token: int, head: int) -> Seen:
        return [(j, token - j) for j in sorted(self.found[layer, self.reader.kv(head)]) if j <= token]


class Razor(Rule):
    """Retrieval heads from written-out attention to a repeated text; the others' lost tokens as one mean."""

    def __init__(self, budget: int, num_sink: int, num_random: int, repeats: int, shares: tuple[float, float]) -> None:
        self.num_recent, self.budget, self.num_sink = budget - num_sink - 1, budget, num_sink
        self.num_random, self.repeats, self.shares = num_random, repeats, shares
        self.whole: set[tuple[int, int]] | None = None
        self.turned: dict[int, list[Vectors]] = {}
        self.answering = False

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        if self.whole is None:
            self.whole = retrieval_heads(self.reader, self.num_random, self.repeats, self.shares)
        self.answering = answering
        self.turned[layer] = [self.reader._turn(layer, key, j) for j, key in enumerate(keys)]

    def _lost(self, layer: int, token: int, head: int) -> range:
        if not self.answering or token < self.budget or (layer, self.reader.kv(head)) in (self.whole or set()):
            return range(0)
        return range(self.num_sink, token + 1 - self.num_recent)

    def sees(self, layer: int, token: int, head: int) -> Seen:
        lost = self._lost(layer, token, head)
        return [(j, token - j) for j in range(token + 1) if j not in lost]

    def made_up(self, layer: int, token: int, head: int) -> MadeUp:
        lost, kv = self._lost(layer, token, head), self.reader.kv(head)
        if not lost:
            return []
        key = sum(self.turned[layer][j][kv] for j in lost) / len(lost)
        value = sum(self.reader.values[layer][j][kv] for j in lost) / len(lost)
        return [(lost[-1], key, value, float(np.log(len(lost))))]


def retrieval_heads(
    reader: NaiveTokens, num_random: int, repeats: int, shares: tuple[float, float]
) -> set[tuple[int, int]]:
    """KV heads (layer, head) with the best induction and echo scores, of attention matrices written out."""
    found = set()
    for share, scores in zip(shares, repeat_scores(reader, num_random, repeats), strict=True):
        best = sorted(scores, key=lambda place: scores[place], reverse=True)
        found |= set(best[: int(np.ceil(share * len(best)))])
    return found


def repeat_scores(reader: NaiveTokens, num_random: int, repeats: int) -> list[dict[tuple[int, int], float]]:
    """Induction and echo scores by (layer, KV head)."""
    once = torch.randint(reader.config.vocab_size, (num_random,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [reader.config.bos_token_id, *once * repeats]
    _, weights = slow_forward(reader.model, ids, in_window(reader.model))
    found: list[dict[tuple[int, int], float]] = [{}, {}]
    for behind, scores in zip((1, 0), found, strict=True):
        for layer in (index for index in range(len(weights)) if not reader._keeps_window(index)):
            for head in range(reader.heads):
                place = (layer, reader.kv(head))
                scores[place] = max(scores.get(place, 0.0), _looks_back(weights[layer][head], ids, num_random, behind))
    return found


def _looks_back(weights: list[list[float]], ids: list[int], num_random: int, behind: int) -> float:
    rows, total = range(1 + num_random, len(ids)), 0.0
    for row in rows:
        total += sum(weights[row][j + behind] for j in range(row) if ids[j] == ids[row])
    return total / len(rows)


class ActQKV(InfLLM):
    """InfLLM's blocks, ranked by the cosine with queries weighted by how unusual they are; fewer in some layers."""

    def __init__(
        self, sizes: tuple[int, int, int, int, int], least: int, share: float, steps: int, heat: float
    ) -> None:
        super().__init__(*sizes)
        self.least, self.share, self.steps, self.heat = least, share, steps, heat
        self.past: dict[int, list[np.ndarray]] = {}
        self.asked: dict[int, np.ndarray] = {}
        self.entropies: dict[int, list[float]] = {}
        self.left = 0.0
        self.taken: list[tuple[int, int]] = []

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        first, waiting = self.first.setdefault(layer, []), self.waiting.setdefault(layer, [])
        blocks, represents = self.blocks.setdefault(layer, []), self.represents.setdefault(layer, [])
        self._move(layer, first, waiting, keys)
        rows = self._far(layer, queries)
        if not answering:
            self.past.setdefault(layer, []).extend(rows)
        probe = rows[-1] if answering else self._weighted(rows, self.past[layer])
        scores = [self._cosine(probe, rep.ravel()) for rep in represents]
        if self.question and not answering:
            asked = self._asked(layer)
            scores = [s + 4.0 * self._cosine(asked, rep.ravel()) for s, rep in zip(scores, represents, strict=True)]
        if scores:
            self.entropies.setdefault(layer, []).append(self._entropy(scores))
        count = self._count(layer, len(scores)) if answering else self.top_k
        best = sorted(range(len(blocks)), key=lambda n: scores[n], reverse=True)[:count]
        self.chosen[layer] = {j for n in best for j in blocks[n]}
        waiting += list(range(start, stop))

    def _far(self, layer: int, queries: Vectors) -> list[np.ndarray]:
        return [self.reader._turn(layer, query, self.window - 1).ravel() for query in queries]

    def _weighted(self, rows: list[np.ndarray], past: list[np.ndarray]) -> np.ndarray:
        mean, variance = np.mean(past, axis=0), np.var(past, axis=0)
        floor = 0.01 * variance.mean()
        with np.errstate(invalid="ignore"):
            biases = [float(np.nan_to_num((row - mean) ** 2 / (variance + floor)).mean()) for row in rows]
        total = sum(biases)
        shares = [bias / total if total > 0 else 1 / len(rows) for bias in biases]
        return np.sum([share * row for share, row in zip(shares, rows, strict=True)], axis=0)

    def _asked(self, layer: int) -> np.ndarray:
        if not self.asked:
            alone = Listener()
            reader = NaiveTokens(self.reader.model, alone)
            reader.chunk(list(self.question))
            for index, queries in alone.heard.items():
                rows = self._far(index, queries)
                self.asked[index] = self._weighted(rows, rows)
        return self.asked[layer]

    def _cosine(self, a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    def _entropy(self, scores: list[float]) -> float:
        parts = np.exp((np.array(scores) - max(scores)) / self.heat)
        parts /= parts.sum()
        total = -sum(p * np.log(p) for p in parts.tolist() if p > 0)
        return float(total / np.log(max(len(scores), 2)))

    def _count(self, layer: int, num_blocks: int) -> int:
        reader = self.reader
        layers = [i for i in range(len(reader.keys)) if not reader._keeps_window(i)]
        if layer == layers[0]:
            self.left = self.share * self.top_k * len(layers)
        if not num_blocks:
            return 0
        later = [i for i in layers if i >= layer]
        wanted = self.left / len(later)
        if all(len(self.entropies.get(i, [])) >= self.steps for i in layers):
            means = [float(np.mean(self.entropies[i][-self.steps :])) for i in later]
            wanted = self.left * means[0] / sum(means) if sum(means) else 0.0
        taken = max(min(round(wanted), self.top_k, num_blocks), min(self.least, num_blocks))
        self.left -= taken
        self.taken.append((layer, taken))
        return taken


class Listener(Rule):
    """Attends everything and keeps the queries of each layer."""

    def __init__(self) -> None:
        self.heard: dict[int, Vectors] = {}

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        self.heard[layer] = queries

    def sees(self, layer: int, token: int, head: int) -> Seen:
        return [(j, token - j) for j in range(token + 1)]
