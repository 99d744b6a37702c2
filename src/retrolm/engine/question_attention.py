"""Several questions on one text in one dense pass: each follows the text as if the others were not there.

Reading a text costs a thousand times what a question costs, so training asks many questions of each.
Shape letters: B sequences, T tokens, R question tokens of a sequence, Q questions, L tokens of the longest, H query
heads, K KV heads, D head dim.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention_lse import attend_lse, gives_lse
from .page_batch import PageBatch


class SeparateQuestions:
    """Positions and attention of a batch with several questions per text.

    Attributes:
        positions_BT: true positions; every question begins where the text ends.
        ends_B1: columns of the text. own_starts_BT: first column of each column's question, that of the first in the
            text.
    """

    def __init__(self, batch: PageBatch) -> None:
        self._batch = batch
        self._starts_BQ, self._lengths_BQ = (x[:, -batch.num_questions :] for x in (batch.starts_BM, batch.lengths_BM))
        self.ends_B1 = self._starts_BQ[:, :1]
        columns = torch.arange(batch.tokens_BT.shape[1], device=self.ends_B1.device)
        self._number_BT = self._numbers(columns.expand(len(self.ends_B1), -1))
        self.own_starts_BT = self._starts_BQ.gather(1, self._number_BT)
        asked_BT = self.ends_B1 + columns - self.own_starts_BT
        self.positions_BT = torch.where(columns < self.ends_B1, columns, asked_BT)

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKTD: Tensor,
        v_BKTD: Tensor,
        out_BHTD: Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> None:
        """Overwrite the questions' rows of `out`; what it says in rows of padding is of no account."""
        end = self._batch.sizes.text_end
        if end is not None and softcap is None and window is None and gives_lse(q_BHTD):
            out_BHTD[:, :, end:] = self._joined(q_BHTD[:, :, end:], k_BKTD, v_BKTD, end, scale)
            return
        rows_BR, place, allowed_BRT = self._masked
        q_BHRD = q_BHTD.transpose(1, 2)[self._sequences, rows_BR].transpose(1, 2)
        if window is not None:
            distance_BRT = self.positions_BT[self._sequences, rows_BR][..., None] - self.positions_BT[:, None]
            allowed_BRT = allowed_BRT & (distance_BRT < window)
        found = masked_attention(q_BHRD, k_BKTD, v_BKTD, scale, softcap, allowed_BRT[:, None]).transpose(1, 2)
        out_BHTD.transpose(1, 2)[place[0], rows_BR[place]] = found[place]

    def _joined(self, q_BHRD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, end: int, scale: float) -> Tensor:
        """Attention to the text and to the own question, each without a mask, joined by how much falls on either."""
        text, text_lse = attend_lse(q_BHRD, k_BKTD[:, :, :end], v_BKTD[:, :, :end], scale, causal=False)
        q, k, v = (self._apart(x) for x in (q_BHRD, k_BKTD[:, :, end:], v_BKTD[:, :, end:]))
        own, own_lse = (self._in_line(x) for x in attend_lse(q, k, v, scale, causal=True))
        share = torch.sigmoid(own_lse - text_lse)[..., None]
        return torch.lerp(text.to(share.dtype), own.to(share.dtype), share).to(q_BHRD.dtype)

    def _apart(self, rows_BHRD: Tensor) -> Tensor:
        """Each question as a sequence of its own, padded at the right: [B * Q, H, L, D]."""
        apart = rows_BHRD.transpose(1, 2)[self._sequences, self._places].unflatten(1, self._shape)
        return apart.flatten(0, 1).transpose(1, 2)

    def _in_line(self, rows: Tensor) -> Tensor:
        """Undo `_apart` for [B * Q, H, L, …]: [B, H, R, …]."""
        together = rows.transpose(1, 2).unflatten(0, (-1, self._shape[0])).flatten(1, 2)
        return together[self._sequences, self._slots].transpose(1, 2)

    @property
    def _shape(self) -> tuple[int, int]:
        return self._batch.num_questions, self._batch.sizes.longest_question

    @cached_property
    def _sequences(self) -> Tensor:
        return torch.arange(len(self.ends_B1), device=self.ends_B1.device)[:, None]

    @cached_property
    def _places(self) -> Tensor:
        """Which question row stands at each place of the padded questions, int64 [B, Q * L]."""
        inside = torch.arange(self._shape[1], device=self.ends_B1.device)
        num_rows = self._batch.tokens_BT.shape[1] - (self._batch.sizes.text_end or 0)
        places_BQL = (self._starts_BQ - self.ends_B1)[..., None] + inside
        return places_BQL.clamp(0, num_rows - 1).flatten(1)

    @cached_property
    def _slots(self) -> Tensor:
        """The place of each question row among the padded questions, int64 [B, R]."""
        Q, L = self._shape
        end = self._batch.sizes.text_end or 0
        rows = torch.arange(end, self._batch.tokens_BT.shape[1], device=self.ends_B1.device)
        return (self._number_BT[:, end:] * L + rows - self.own_starts_BT[:, end:]).clamp(max=Q * L - 1)

    @cached_property
    def _masked(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Question rows [B, R], which of them are no padding, and what each may see, bool [B, R, T]."""
        T = self._batch.tokens_BT.shape[1]
        offsets = torch.arange(self._batch.sizes.question_rows, device=self.ends_B1.device)
        rows_BR = (self.ends_B1 + offsets).clamp(max=T - 1)
        real_BR = offsets < self._lengths_BQ.sum(1, keepdim=True)
        columns = torch.arange(T, device=offsets.device)
        own_start_BR1 = self.own_starts_BT.gather(1, rows_BR)[..., None]
        own_BRT = (columns >= own_start_BR1) & (columns <= rows_BR[..., None])
        return rows_BR, real_BR.nonzero(as_tuple=True), (columns < self.ends_B1[..., None]) | own_BRT

    def _numbers(self, columns_BT: Tensor) -> Tensor:
        """The question that each column belongs to; 0 in the text, the last one behind all questions."""
        begun_BTQ = (columns_BT[..., None] >= self._starts_BQ[:, None]) & (self._lengths_BQ[:, None] > 0)
        return (begun_BTQ.sum(2) - 1).clamp(min=0)


def masked_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, softcap: float | None, allowed: Tensor
) -> Tensor:
    """Attention where `allowed` [B, 1, T, T'] says so, differentiable: [B, H, T, D]."""
    # Kernels that take a mask know no groups: with `enable_gqa` PyTorch would fall back to its slowest one.
    group = q_BHTD.shape[1] // k_BKTD.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k_BKTD, v_BKTD))
    if softcap is None:
        return F.scaled_dot_product_attention(q_BHTD, k, v, attn_mask=allowed, scale=scale)
    scores = softcap * torch.tanh(q_BHTD.float() @ k.float().transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.float()).to(q_BHTD.dtype)
