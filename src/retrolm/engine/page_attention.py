"""How much true attention the question's tokens pay to each text page, from a dense pass.

Shape letters: B sequences, T tokens, Q question tokens, P text pages, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .backbone import Backbone
from .page_batch import PageBatch


class PageAttention:
    """An observer of `dense_pass` (call it `PageAttention(...)` and pass it as `observe`).

    Of several questions on a text, the first is looked at.

    Attributes:
        mass: layer → attention that falls on each text page, mean over heads and question tokens, float32 [B, P].
    """

    def __init__(self, backbone: Backbone, batch: PageBatch, layers: Collection[int]) -> None:
        self._backbone = backbone
        self._layers = frozenset(layers)
        num_pages = batch.text_lengths.shape[1]
        self._starts, self._lengths = batch.starts_BM[:, :num_pages], batch.text_lengths
        start_B1, length_B1 = (x[:, num_pages : num_pages + 1] for x in (batch.starts_BM, batch.lengths_BM))
        offsets = torch.arange(int(length_B1.max()), device=batch.starts_BM.device)
        self._rows_BQ = (start_B1 + offsets).clamp(max=batch.tokens_BT.shape[1] - 1)
        self._real_BQ = offsets < length_B1
        self.mass: dict[int, Tensor] = {}

    def __call__(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor) -> None:
        if layer in self._layers:
            weights_BHQT = self._weights(layer, q_BTHD, k_BTKD)
            real_BQ = (self._real_BQ / self._real_BQ.sum(1, keepdim=True)).to(weights_BHQT.device)
            mass_BT = torch.einsum("bhqt,bq->bt", weights_BHQT, real_BQ) / weights_BHQT.shape[1]
            self.mass[layer] = self._by_page(mass_BT.to(self._starts.device))

    def shares(self, layer: int) -> Tensor:
        """The text pages' shares of what falls on them together, float32 [B, P]; even where nothing does."""
        mass_BP = self.mass[layer]
        there_BP = (self._lengths > 0).float()
        total_B1 = mass_BP.sum(1, keepdim=True)
        return torch.where(total_B1 > 0, mass_BP / total_B1.clamp(min=1e-30), there_BP / there_BP.sum(1, keepdim=True))

    def _weights(self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor) -> Tensor:
        """The question's attention weights, float32 [B, H, Q, T]."""
        info, config = self._backbone.layers[layer], self._backbone.config
        positions = torch.arange(q_BTHD.shape[1], device=q_BTHD.device)
        cos, sin = self._backbone.rope(layer).at(positions)
        keys = rotate(k_BTKD, cos[:, None], sin[:, None]).float()
        rows = self._rows_BQ.to(q_BTHD.device)
        batch = torch.arange(len(rows), device=rows.device)[:, None]
        queries = rotate(q_BTHD[batch, rows], cos[rows][:, :, None], sin[rows][:, :, None]).float()
        grouped = queries.unflatten(2, (keys.shape[2], -1))
        logits = torch.einsum("bqkgd,btkd->bkgqt", grouped, keys).flatten(1, 2) * float(info.attention.scaling)  # type: ignore[arg-type]
        if cap := getattr(config, "attn_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        distance_BQT = rows[..., None] - positions
        allowed = (distance_BQT >= 0) & (distance_BQT < (info.window or len(positions)))
        return logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)

    def _by_page(self, mass_BT: Tensor) -> Tensor:
        sums = torch.nn.functional.pad(mass_BT.double().cumsum(1), (1, 0))
        ends = self._starts + self._lengths
        return (sums.gather(1, ends) - sums.gather(1, self._starts)).clamp(min=0).float()
