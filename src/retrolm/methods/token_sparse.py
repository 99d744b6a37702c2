"""Token Sparse Attention: while the prompt is read, each head of some layers attends among the tokens it keeps alone.

What the others would have attended is left to their residual stream in these layers; later layers see all tokens again.
Shape letters as in `token_base`; T tokens of one prompt, N of them kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..errors import UserError
from ..ops.attention import attend, bias_from
from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenMethod

_WHOLE = 2**31


@METHODS.register("token_sparse")
class TokenSparse(TokenMethod):
    """Tokens are scored by the attention of the prompt's last `window` queries, pooled over neighbours, for each head.

    How many are dropped is the same for all heads of a layer: as many as together hold less than the share `tau` of
    the scores (each head's scores made to sum to one, and averaged over heads), and one more. The last `window` tokens
    stay. Queries, keys and values of those kept attend one another causally at true positions; the outputs of the
    others are zero. All keys and values stay for what is generated.
    """

    name = "token_sparse"
    paper = "https://github.com/dongwonjo/Token-Sparse-Attention"
    summary = "sparse prefill: in some layers each head attends only among the tokens the prompt's end attends to"
    prefill = "dense"
    index = "attention it got"
    query = "last 128 queries of the prompt"
    scope = "layer and query head"
    when = "once, while reading"
    budget_split = "no budget: as many tokens as hold the attention; generated tokens attend all"
    keeps = "all tokens, on the device"
    positions = "true"
    exact_when = "min_tokens + window ≥ prompt"
    has_budget = False
    true_positions = True

    @dataclass(frozen=True)
    class Knobs:
        """window: last queries of the prompt that score. tau: share of the scores that is dropped.

        min_tokens: tokens that a head keeps at least, besides the window. pool_size: neighbours, odd.
        first_layer, last_layer: layers that are sparse, both included (published for 32 layers; the authors look for
            those in which hidden states change little).
        """

        window: int = 128
        tau: float = 0.005
        min_tokens: int = 1024
        pool_size: int = 7
        first_layer: int = 15
        last_layer: int = 30

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "window", "pool_size")
        if self.knobs.pool_size % 2 == 0:
            raise UserError(f"{self.name}.pool_size must be odd, got {self.knobs.pool_size}. Use 1 for no pooling.")
        if not 0 <= self.knobs.tau < 1:
            raise UserError(f"{self.name}.tau must be at least 0 and below 1, got {self.knobs.tau}.")
        for name in ("min_tokens", "first_layer", "last_layer"):
            if getattr(self.knobs, name) < 0:
                raise UserError(f"{self.name}.{name} must be at least 0, got {getattr(self.knobs, name)}.")

    def chunk_tokens(self, kv_budget: int) -> int:
        """The whole prompt at a time: its end decides."""
        return _WHOLE

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        """Those that aren't sparse; none are reported apart in a model that has no sparse ones."""
        found = frozenset(layer for layer in range(num_layers) if not self._is_sparse(layer))
        return found if len(found) < num_layers else frozenset()

    def select(self, view: ChunkView) -> list[Part] | None:
        return None

    def attend_prompt(
        self, view: ChunkView, scale: float, softcap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor] | None:
        if not self._is_sparse(view.layer) or not view.new.is_prefill:
            return None
        cos, sin = (x[:, None] for x in view.rope(view.true_BQ.clamp(min=0)))
        q, k = rotate(view.q_BHQD, cos, sin), rotate(view.cache.keys_BKTD, cos, sin)
        out = torch.zeros_like(view.q_BHQD)
        counts_BHQ = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
        for row, length in enumerate(view.new.num_new):
            if length:
                one = [x[row, :, :length] for x in (q, k, view.cache.values_BKTD)]
                found = self._one(one[0], one[1], one[2], scale, softcap, window)
                out[row, :, :length], counts_BHQ[row, :, :length] = found
        return out, counts_BHQ

    def _is_sparse(self, layer: int) -> bool:
        return self.knobs.first_layer <= layer <= self.knobs.last_layer

    def _one(
        self, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float, softcap: float | None, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """One prompt: outputs [H, T, D], and how many keys each query attends [H, T]."""
        k_HTD, v_HTD = (x.repeat_interleave(len(q_HTD) // len(x), 0) for x in (k_KTD, v_KTD))
        kept_HN = self._kept(q_HTD, k_HTD, scale, softcap, window)
        index = kept_HN[..., None].expand(-1, -1, q_HTD.shape[2])
        q, k, v = (x.gather(1, index)[:, :, None] for x in (q_HTD, k_HTD, v_HTD))
        bias, attended_HN = None, torch.arange(1, kept_HN.shape[1] + 1, device=q.device).expand_as(kept_HN)
        if window is not None:
            allowed = _in_reach(kept_HN, kept_HN, window)
            bias, attended_HN = bias_from(allowed, q.dtype), allowed.sum(-1)
        found = attend(q, k, v, bias, scale, softcap, causal=bias is None)[:, :, 0]
        counts_HT = torch.zeros(q_HTD.shape[:2], dtype=torch.int64, device=q.device)
        return torch.zeros_like(q_HTD).scatter(1, index, found), counts_HT.scatter(1, kept_HN, attended_HN)

    def _kept(self, q_HTD: Tensor, k_HTD: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
        """The tokens that each head keeps, int64 [H, N], ascending."""
        num_tokens, num_last = q_HTD.shape[1], self.knobs.window
        places = torch.arange(num_tokens, device=q_HTD.device)
        num_before = num_tokens - num_last
        if num_before <= self.knobs.min_tokens:
            return places.expand(len(q_HTD), -1)
        scores_HT = self._scores(q_HTD, k_HTD, scale, softcap, window)
        share_T = (scores_HT / scores_HT.sum(1, keepdim=True)).mean(0)
        num_dropped = int((share_T.sort().values.cumsum(0) < self.knobs.tau).sum()) + 1
        best = scores_HT.topk(max(self.knobs.min_tokens, num_before - num_dropped), dim=1).indices
        return torch.cat([best.sort(1).values, places[num_before:].expand(len(best), -1)], 1)

    def _scores(self, q_HTD: Tensor, k_HTD: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
        """Attention that each token before the last ones gets from these, pooled, [H, T - window], float32 or wider."""
        num_last, num_tokens = self.knobs.window, q_HTD.shape[1]
        wide = torch.promote_types(q_HTD.dtype, torch.float32)
        logits = q_HTD[:, -num_last:].to(wide) @ k_HTD.to(wide).mT * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        places = torch.arange(num_tokens, device=q_HTD.device)[None]
        allowed = _in_reach(places[:, -num_last:], places, window or num_tokens)
        weights_HT = logits.masked_fill(~allowed, -torch.inf).softmax(-1).sum(1)
        size = self.knobs.pool_size
        return avg_pool1d(weights_HT[:, : num_tokens - num_last], size, stride=1, padding=size // 2)


def _in_reach(queries_HQ: Tensor, keys_HN: Tensor, window: int) -> Tensor:
    """Which keys stand at most `window` - 1 tokens before a query, bool [H, Q, N]."""
    apart = queries_HQ[:, :, None] - keys_HN[:, None]
    return (apart >= 0) & (apart < window)
