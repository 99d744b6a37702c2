"""Token Sparse Attention written out naively: what each head keeps is a list; who is not on it attends nothing."""

from __future__ import annotations

import numpy as np

from naive_tokens import NaiveTokens, Rule, Seen, Vectors


class TokenSparse(Rule):
    """Tokens by what the last `window` ones attend to, for a prompt that is read in one chunk."""

    def __init__(self, window: int, tau: float, min_tokens: int, pool: int, layers: range) -> None:
        self.window, self.tau, self.min_tokens, self.pool, self.layers = window, tau, min_tokens, pool, layers
        self.kept: dict[tuple[int, int], set[int]] = {}
        self.num_tokens = 0

    def begin(self, layer: int, start: int, stop: int, queries: Vectors, keys: Vectors, answering: bool) -> None:
        if answering:
            return
        self.num_tokens = stop
        before = stop - self.window
        if layer not in self.layers or before <= self.min_tokens:
            return
        scores = np.array([self._pooled(self._got(layer, head, queries, before)) for head in range(self.reader.heads)])
        mean = sorted((scores / scores.sum(1, keepdims=True)).mean(0))
        dropped, total = 1, 0.0
        for share in mean:
            total += share
            dropped += total < self.tau
        for head, row in enumerate(scores):
            best = sorted(range(before), key=lambda j: row[j], reverse=True)[: max(self.min_tokens, before - dropped)]
            self.kept[layer, head] = {*best, *range(before, stop)}

    def _got(self, layer: int, head: int, queries: Vectors, before: int) -> np.ndarray:
        """Attention that tokens before the window get from it."""
        reader, got = self.reader, np.zeros(before)
        window = reader._window(layer) or self.num_tokens
        for token in range(before, self.num_tokens):
            near = [j for j in range(token + 1) if token - j < window]
            turned = {token - j: reader._turn(layer, queries[token], token - j) for j in near}
            logits = reader._logits(layer, turned, head, [(j, token - j) for j in near])
            weights = np.exp(logits - logits.max())
            for j, weight in zip(near, weights / weights.sum(), strict=True):
                if j < before:
                    got[j] += weight
        return got

    def _pooled(self, row: np.ndarray) -> np.ndarray:
        half = self.pool // 2
        padded = np.pad(row, half)
        return np.array([padded[i : i + self.pool].sum() / self.pool for i in range(len(row))])

    def drops(self, layer: int, token: int, head: int) -> bool:
        """Whether a prompt token is not on a head's list."""
        return token < self.num_tokens and token not in self.kept.get((layer, head), {token})

    def sees(self, layer: int, token: int, head: int) -> Seen:
        if self.drops(layer, token, head):
            return [(token, 0)]  # to be taken back: a softmax needs something
        kept = self.kept.get((layer, head), range(token + 1)) if token < self.num_tokens else range(token + 1)
        return [(j, token - j) for j in range(token + 1) if j in kept]


class NaiveTokenSparse(NaiveTokens):
    """Reads a prompt in one chunk; a head that has dropped a token gives zeros for it."""

    rule: TokenSparse

    def _token(self, layer: int, token: int, query: Vectors) -> Vectors:
        out = super()._token(layer, token, query)
        if not self._keeps_window(layer):
            out[[head for head in range(self.heads) if self.rule.drops(layer, token, head)]] = 0.0
        return out
