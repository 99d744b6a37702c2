"""RetroLM with re-retrieval and revised pages, written out naively: each page keeps the set of pages it has seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from naive_reference import NaivePage, NaiveRetroLM


class NaiveRetroPages(NaiveRetroLM):
    """Rounds of one query page each; the last `window` - 1 generated pages go through all layers with it again.

    `seen` holds the pages of each (page, layer); `pinned` pages are always attended.
    """

    window = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pinned: set[int] = set()
        self.made: list[int] = []
        self.seen: dict[tuple[int, int], set[int]] = {}

    @torch.no_grad()
    def round(self, tokens: list[int], generated: list[int], is_question: bool) -> np.ndarray:
        """One query page and what is generated behind it; returns the logits that generated each token."""
        revised = self.made[len(self.made) - self.window + 1 :] if self.window > 1 else []
        page = NaivePage(tokens + generated[:-1], len(tokens), self._tokens_before(), False, True)
        rows, mark = self._embedded(page.tokens)
        states = {i: self._embedded(self.pages[i].tokens) for i in revised}
        for index, layer in enumerate(self.model.model.layers):
            inner = {i: self._renewed(index, layer, i, *states[i]) for i in revised}
            rows, mark = self._layer(index, layer, page, rows, mark)
            self.seen[len(self.pages), index] = set(page.selected[index])
            for i in revised:
                self.seen[i, index] |= {j for j in page.selected[index] if j < i}
                states[i] = self._revise(index, layer, self.pages[i], i, inner[i], states[i])
        logits: np.ndarray = self._head(rows)[len(tokens) - 1 :]
        self._close(page, len(tokens), is_question)
        return logits

    def _embedded(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        return self.model.get_input_embeddings()(torch.tensor(tokens)), self.bookmark[None]

    def _renewed(self, index: int, layer: Any, number: int, rows: Tensor, mark: Tensor) -> tuple[Any, Any]:
        """Overwrite a page's keys and values in one layer; returns its rows' projections and its bookmark's."""
        page = self.pages[number]
        own, marks = self._project(index, layer, rows, bookmark=False), self._project(index, layer, mark, bookmark=True)
        page.keys[index], page.values[index] = own[1], own[2]
        page.bookmark_query[index], page.bookmark_key[index] = marks[0][0], marks[1][0]
        page.bookmark_value[index] = marks[2][0]
        return own, marks

    def _revise(
        self, index: int, layer: Any, page: NaivePage, number: int, inner: tuple[Any, Any], state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        (queries, _, _), (mark_query, mark_key, mark_value) = inner
        page.by_head[index] = [self._past(index, number)] * self.kv_heads
        out = self._attend_normal(index, page, queries)
        out_mark = self._attend_bookmark(index, page, mark_query[0], mark_key[0], mark_value[0])
        return self._finish(layer, state[0], out), self._finish(layer, state[1], out_mark)

    def _past(self, index: int, number: int) -> list[int]:
        """What a revised page attends: all that it has seen, or everything before it where a layer keeps its window."""
        return list(range(number)) if self._keeps_window(index) else sorted(self.seen[number, index])

    def _select(self, index: int, page: NaivePage, kv_head: int) -> list[int]:
        chosen, options = super()._select(index, page, kv_head), self.options
        if self._keeps_window(index) or len(chosen) == len(self.pages):
            return chosen
        sinks = [i for i in chosen if self.pages[i].is_sink]
        others = [i for i in range(len(self.pages)) if i not in sinks]
        scores = page.scores[index]
        local = others[len(others) - options.num_local_pages :]
        others.sort(key=lambda i: (i in self.pinned, i in local, scores[i], i), reverse=True)
        return sorted(sinks + others[: len(chosen) - len(sinks)])

    def _head(self, rows: Tensor) -> np.ndarray:
        logits = self.model.lm_head(self.model.model.norm(rows))
        cap = getattr(self.config, "final_logit_softcapping", None)
        found: np.ndarray = (cap * torch.tanh(logits / cap) if cap else logits).numpy()
        return found

    def _close(self, page: NaivePage, num_own: int, is_question: bool) -> None:
        """What was generated behind a page is no part of it."""
        page.tokens = page.tokens[:num_own]
        page.keys, page.values = ([x[:num_own] for x in rows] for rows in (page.keys, page.values))
        if is_question:
            self.pinned.add(len(self.pages))
        else:
            self.made.append(len(self.pages))
        self.pages.append(page)
