"""Attention of a few tokens per sample over pages of a cache of fixed shape: plain PyTorch, and Triton kernels on CUDA.

Token t of a sample stands at place t of its cache, so that page p holds positions p·W to p·W + W - 1. Nothing here
waits for the device. Shape letters: B samples, H query heads, K KV heads, G = H // K, Q tokens, P pages of the cache,
W tokens of a page, n pages that are read, D head dim; J is 1 where all heads read the same pages, else K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import runs_on
from .merge_attention import merge_attention


@dataclass(frozen=True)
class PagesToRead:
    """Pages of a step, and who of its tokens may attend them.

    Attributes:
        pages_BJn: int64, each at most once; None = all P pages in order.
        after_BJn, until_BJn: a page is attended by tokens at positions behind the one and up to the other, int64; None
            = no such bound. No token attends what stands behind it.
    """

    pages_BJn: Tensor | None
    after_BJn: Tensor | None = None
    until_BJn: Tensor | None = None


@dataclass(frozen=True)
class Tally:
    """What steps in one layer have attended, added to by each of them.

    Attributes:
        sums_BHQ: keys attended by each of a step's tokens, summed over steps, int64.
        most_SB: most keys that any token and head of a step attended, int32; `step`, int64 [1], is its row.
    """

    sums_BHQ: Tensor
    most_SB: Tensor
    step: Tensor

    def add(self, counts_BHQ: Tensor) -> None:
        """Note one step."""
        self.sums_BHQ.add_(counts_BHQ)
        self.most_SB.index_copy_(0, self.step, counts_BHQ.amax((1, 2))[None].to(self.most_SB.dtype))


def attend_pages(
    q_BHQD: Tensor,
    keys_BKPWD: Tensor,
    values_BKPWD: Tensor,
    read: PagesToRead,
    true_BQ: Tensor,
    tally: Tally,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each token to the tokens of pages that it may attend, itself included.

    Args:
        q_BHQD, keys_BKPWD: after RoPE. Keys and values of places that nobody may attend must be finite.
        true_BQ: positions of the tokens, int64; -1 = none there, which attends nothing.

    Returns:
        [B, H, Q, D], zeros for a token that attends nothing, and log-sum-exp of the logits [B, H, Q], -inf for such;
        float32 or wider.
    """
    if fast := _kernels(q_BHQD):
        found: tuple[Tensor, Tensor] = fast.attend_pages(
            q_BHQD, keys_BKPWD, values_BKPWD, read, true_BQ, tally, scale, softcap
        )
        return found
    return attend_pages_reference(q_BHQD, keys_BKPWD, values_BKPWD, read, true_BQ, tally, scale, softcap)


def merge_shifted(old_BHQD: Tensor, old_lse_BHQ: Tensor, out_BHQD: Tensor, lse_BHQ: Tensor) -> Tensor:
    """Merge a step's outputs with the last step's, where each token stood one row further on, and keep them there.

    Args:
        old_BHQD, old_lse_BHQ: outputs and log-sum-exp of the last step's tokens, of which the first has left; replaced
            by those of this step. out_BHQD, lse_BHQ: of this step's tokens over other keys; the last token is new.

    Returns:
        Outputs over both, [B, H, Q, D].
    """
    if fast := _kernels(out_BHQD):
        joined: Tensor = fast.merge_shifted(old_BHQD, old_lse_BHQ, out_BHQD, lse_BHQ)
        return joined
    before = torch.nn.functional.pad(old_BHQD[:, :, 1:], (0, 0, 0, 1))
    lse_before = torch.nn.functional.pad(old_lse_BHQ[:, :, 1:], (0, 1), value=-torch.inf)
    out, lse = merge_attention(before, lse_before, out_BHQD, lse_BHQ)
    old_BHQD.copy_(out)
    old_lse_BHQ.copy_(lse)
    return out


def page_bounds(query_BKGD: Tensor, low_BKPD: Tensor, high_BKPD: Tensor) -> Tensor:
    """Largest dot product of each query with any key between two corners, [B, K, G, P], float32 or wider."""
    if fast := _kernels(query_BKGD):
        found: Tensor = fast.page_bounds(query_BKGD, low_BKPD, high_BKPD)
        return found
    query = query_BKGD.to(torch.promote_types(query_BKGD.dtype, torch.float32))
    low, high = low_BKPD.to(query.dtype), high_BKPD.to(query.dtype)
    return query.clamp(max=0) @ low.mT + query.clamp(min=0) @ high.mT


def _kernels(like: Tensor) -> Any:
    """The kernels where they can work, else None."""
    if not runs_on(like) or like.dtype == torch.float64:
        return None
    from . import paged_attention_kernel

    return paged_attention_kernel


def attend_pages_reference(
    q_BHQD: Tensor,
    keys_BKPWD: Tensor,
    values_BKPWD: Tensor,
    read: PagesToRead,
    true_BQ: Tensor,
    tally: Tally,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_pages` written out: pages are gathered, logits and weights are float32 or wider."""
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    keys, values = (gather_pages(x, read.pages_BJn).to(wide) for x in (keys_BKPWD, values_BKPWD))
    K, Q = keys.shape[1], q_BHQD.shape[2]
    allowed_BJQS = allowed(read, true_BQ, *keys_BKPWD.shape[2:4])
    grouped = q_BHQD.to(wide).unflatten(1, (K, -1)).flatten(2, 3)
    scores = (grouped @ keys.mT).unflatten(2, (-1, Q)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed_BJQS[:, :, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = (weights.flatten(2, 3) @ values).unflatten(2, (-1, Q))
    counts_BHQ = allowed_BJQS.sum(-1).expand(-1, K, -1).repeat_interleave(q_BHQD.shape[1] // K, 1)
    tally.add(counts_BHQ)
    return out.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2)


def gather_pages(x_BKPWD: Tensor, pages_BJn: Tensor | None) -> Tensor:
    """The tokens of pages, [B, K, n·W, D]."""
    if pages_BJn is None:
        return x_BKPWD.flatten(2, 3)
    _, K, _, W, D = x_BKPWD.shape
    index = pages_BJn.expand(-1, K, -1)[..., None, None].expand(-1, -1, -1, W, D)
    return x_BKPWD.gather(2, index).flatten(2, 3)


def allowed(read: PagesToRead, true_BQ: Tensor, num_pages: int, page: int) -> Tensor:
    """Which token may attend which place of the pages read, bool [B, J, Q, n·W]."""
    pages = torch.arange(num_pages, device=true_BQ.device)[None, None] if read.pages_BJn is None else read.pages_BJn
    place_BJnW = pages[..., None] * page + torch.arange(page, device=true_BQ.device)
    true_BQ11 = true_BQ[:, :, None, None]
    found = place_BJnW[:, :, None] <= true_BQ11[:, None]
    if read.after_BJn is not None:
        found = found & (read.after_BJn[:, :, None, :, None] < true_BQ11[:, None])
    if read.until_BJn is not None:
        found = found & (read.until_BJn[:, :, None, :, None] >= true_BQ11[:, None])
    return found.flatten(3)
