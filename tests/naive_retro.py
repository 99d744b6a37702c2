"""RetroAttention written out naively: what each token and head has seen is a list of (logit, value) pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from naive_tokens import NaiveTokens, Quest, Vectors

Pairs = list[tuple[float, np.ndarray]]


class NaiveRetro(NaiveTokens):
    """Answers token by token, the last `window` - 1 tokens again with each; pages come from a rule like Quest's."""

    def __init__(self, model: Any, rule: Quest, window: int, kept: bool) -> None:
        super().__init__(model, rule)
        self.pages, self.window, self.kept = rule, window, kept
        self.ids: list[int] = []
        self.seen: dict[tuple[int, int, int], set[int]] = {}  # layer, head, token → pages
        self.pairs: dict[tuple[int, int, int], Pairs] = {}

    @torch.no_grad()
    def step(self, token_id: int) -> None:
        """One generated token."""
        self.ids.append(token_id)
        newest = self.num_tokens
        rows_of = list(range(newest - min(self.window, len(self.ids)) + 1, newest + 1))
        rows = self.model.get_input_embeddings()(torch.tensor(self.ids[-len(rows_of) :]))
        for index, layer in enumerate(self.model.model.layers):
            queries, keys, values = self._project(index, layer, rows, bookmark=False)
            for row, token in enumerate(rows_of):
                for store, new in ((self.keys, keys[row]), (self.values, values[row])):
                    store[index][token:] = [new, *store[index][token + 1 :]]
                at_zero = self._turn(index, keys[row], 0)
                self.at_zero[index][token:] = [at_zero, *self.at_zero[index][token + 1 :]]
            self.pages.begin(index, newest, newest + 1, queries[-1:], np.stack(self.keys[index]), True)
            out = np.stack([self._retro(index, t, query) for t, query in zip(rows_of, queries, strict=True)])
            rows = self._finish(layer, rows, out)
        self.num_tokens += 1
        self.logits += list(self._head(rows[-1:]))

    def _retro(self, layer: int, token: int, query: Vectors) -> Vectors:
        out = np.zeros_like(query)
        for head in range(self.heads):
            pairs = self._merged(layer, token, head, query)
            weights = np.exp(np.array([logit for logit, _ in pairs]))
            out[head] = sum(w * value for w, (_, value) in zip(weights / weights.sum(), pairs, strict=True))
        return out

    def _merged(self, layer: int, token: int, head: int, query: Vectors) -> Pairs:
        place = (layer, head, token)
        chosen = self.pages.chosen.get((layer, self.kv(head)), set())
        seen = self.seen.setdefault(place, set())
        fresh = chosen - seen
        seen |= chosen
        if self._keeps_window(layer) or layer < self.pages.num_dense:
            return self._pairs(layer, token, head, query, None)
        if self.kept:
            self.pairs[place] = self.pairs.get(place, []) + self._pairs(layer, token, head, query, fresh)
        else:
            self.pairs[place] = self._pairs(layer, token, head, query, seen)
        return self.pairs[place]

    def _pairs(self, layer: int, token: int, head: int, query: Vectors, pages: set[int] | None) -> Pairs:
        window, found = self._window(layer), []
        for j in range(token + 1):
            if (pages is not None and j // self.pages.page not in pages) or (window and token - j >= window):
                continue
            turned = self._turn(layer, query[head], token - j)
            logit = self._logit(turned, self.at_zero[layer][j][self.kv(head)])
            found.append((float(logit), self.values[layer][j][self.kv(head)].copy()))
        return found
