"""Several questions on one text in one dense pass: each follows the text as if the others were not there.

Reading a text costs a thousand times what a question costs, so training asks many questions of each.
Shape letters: B sequences, T tokens, R question tokens of a sequence, Q questions, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .page_batch import PageBatch

MaskedAttention = Callable[[Tensor, Tensor], Tensor]


class SeparateQuestions:
    """Positions and masks of a batch with several questions per text.

    Attributes:
        positions_BT: true positions; every question begins where the text ends.
    """

    def __init__(self, batch: PageBatch) -> None:
        starts_BQ, lengths_BQ = (x[:, -batch.num_questions :] for x in (batch.starts_BM, batch.lengths_BM))
        end_B1 = starts_BQ[:, :1]
        T, device = batch.tokens_BT.shape[1], starts_BQ.device
        offsets = torch.arange(int(lengths_BQ.sum(1).max()), device=device)
        rows_BR = (end_B1 + offsets).clamp(max=T - 1)
        begun_BRQ = (rows_BR[..., None] >= starts_BQ[:, None]) & (lengths_BQ[:, None] > 0)
        own_start_BR = starts_BQ.gather(1, begun_BRQ.sum(2) - 1)
        columns = torch.arange(T, device=device)
        self.positions_BT = columns.expand(len(rows_BR), -1).clone().clamp(max=int(end_B1.max()))
        real_BR = offsets < lengths_BQ.sum(1, keepdim=True)
        self._place = real_BR.nonzero(as_tuple=True)
        sequence = self._place[0]
        token = rows_BR[self._place]
        self.positions_BT[sequence, token] = (end_B1 + rows_BR - own_start_BR)[self._place]
        is_text_B1T = columns < end_B1[:, None]
        is_own_BRT = (columns >= own_start_BR[..., None]) & (columns <= rows_BR[..., None])
        self._allowed_BRT = is_text_B1T | is_own_BRT
        self._rows_BR, self._token = rows_BR, token

    def attend(self, q_BHTD: Tensor, out_BHTD: Tensor, window: int | None, attention: MaskedAttention) -> None:
        """Overwrite the questions' rows of `out`.

        Args:
            attention: called with queries [B, H, R, D] and a mask bool [B, 1, R, T], True where a query may look.
        """
        sequences = torch.arange(len(q_BHTD), device=q_BHTD.device)[:, None]
        q_BHRD = q_BHTD.transpose(1, 2)[sequences, self._rows_BR].transpose(1, 2)
        allowed = self._allowed_BRT
        if window is not None:
            distance_BRT = self.positions_BT[sequences, self._rows_BR][..., None] - self.positions_BT[:, None]
            allowed = allowed & (distance_BRT < window)
        found = attention(q_BHRD, allowed[:, None]).transpose(1, 2)
        out_BHTD.transpose(1, 2)[self._place[0], self._token] = found[self._place]
