"""Teacher forcing inside ordinary generation: some rows of a batch are told what to say, the others say it themselves.

The path is that of every answer, so that what is measured is what the method does, steps and caches included.
Shape letters: B rows, of which F are dictated to; T generated tokens.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Dictation:
    """A logits processor of one answer; end-of-sequence tokens are ruled out in all rows, and noted.

    Args:
        dictated_FT: what the first F rows are to say, int64.
        num_rows, num_tokens: rows of the batch, and tokens that each generates.
        eos_ids: tokens that would end an answer.

    Attributes:
        first_at: `time.perf_counter()` when the first token's logits were there.
        num_parts: in how many parts, equal ones, the batch was answered one after the other.
    """

    needs_ids = False  # so that the engine's own decoding loop takes it

    def __init__(self, dictated_FT: Tensor, num_rows: int, num_tokens: int, eos_ids: tuple[int, ...]) -> None:
        self._dictated_FT = dictated_FT
        self._eos_ids = list(eos_ids)
        self._shape = (num_rows, num_tokens)
        self._step = self._first = 0
        self._kept: dict[str, Tensor] = {}
        self.first_at = 0.0
        self.num_parts = 1

    def __call__(self, input_ids: Tensor | None, scores_BV: Tensor) -> Tensor:
        num_tokens = self._shape[1]
        if self._step % num_tokens == 0:
            self._begin(scores_BV)
        first, step = self._first, self._step % num_tokens
        scores_BV = scores_BV.float()
        best_B = scores_BV.argmax(-1)
        scores_BV = scores_BV.index_fill(1, self._eos, -torch.inf)
        choice_B = scores_BV.argmax(-1)
        told_B = self._dictated_FT[first : first + len(scores_BV), step]
        said_B = torch.cat([told_B, choice_B[len(told_B) :]])
        logprob_B = scores_BV.log_softmax(-1).gather(1, said_B[:, None])[:, 0]
        ends_B = (best_B[:, None] == self._eos).any(1)
        for name, found_B in (("said", said_B), ("choice", choice_B), ("logprob", logprob_B), ("ends", ends_B)):
            self._kept[name][first : first + len(scores_BV), step] = found_B
        self._step += 1
        return torch.full_like(scores_BV, -torch.inf).scatter(1, said_B[:, None], 0.0)

    def _begin(self, scores_BV: Tensor) -> None:
        """The first token of a part."""
        device = scores_BV.device
        if self._step:
            self.num_parts += 1
            self._first += len(scores_BV)
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.first_at = time.perf_counter()
        self._eos = torch.tensor(self._eos_ids, dtype=torch.int64, device=device)
        self._dictated_FT = self._dictated_FT.to(device)
        kinds = {"said": torch.int64, "choice": torch.int64, "logprob": torch.float32, "ends": torch.bool}
        self._kept = {name: torch.zeros(self._shape, dtype=kind, device=device) for name, kind in kinds.items()}

    def said(self) -> Tensor:
        """Tokens generated, int64 [B, T], on the CPU, as all that follows."""
        return self._kept["said"].cpu()

    def agrees(self) -> Tensor:
        """Whether the most likely token is the one that was said, bool [B, T]."""
        return (self._kept["choice"] == self._kept["said"]).cpu()

    def losses(self) -> Tensor:
        """Negative log-likelihood of what was said, float32 [B, T]; an end of the answer has no part in it."""
        return -self._kept["logprob"].cpu()

    def ends(self) -> list[int]:
        """Tokens of each row before its answer would first have ended."""
        ends_BT = self._kept["ends"].cpu()
        first_B = ends_BT.int().argmax(1)
        return first_B.where(ends_BT.any(1), torch.tensor(ends_BT.shape[1])).tolist()
