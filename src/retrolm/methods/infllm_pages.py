"""InfLLM's representative tokens as an index of whole pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.rotary import rotate
from .base import METHODS, PageMethod, PageTensors, valid_rows
from .knobs import positive


@METHODS.register("infllm_pages")
class InfLLMPagesMethod(PageMethod):
    """For each head the mean key of the page's tokens that get most attention, against the mean query.

    InfLLM counts attention while a token is in the local window, which reaches beyond the page; here it is that of the
    page's own later tokens. Scores are before RoPE and summed over heads, as for every page index.
    """

    name = "infllm_pages"
    paper = "https://arxiv.org/abs/2402.04617"
    summary = "mean of a page's most attended keys as its index (InfLLM's representatives); no training"
    index = "mean of the 4 most attended keys of each head"
    query = "mean query of the current page"
    needs_rope = True

    @dataclass(frozen=True)
    class Knobs:
        """repr_top_k: representatives of a page per query head."""

        repr_top_k: int = 4

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "repr_top_k")

    def digest(self, pages: PageTensors) -> Tensor:
        marks_NHW = _attention_received(pages)
        num_kept = min(self.knobs.repr_top_k, marks_NHW.shape[2])
        best = marks_NHW.topk(num_kept, dim=2)
        there = best.values >= 0  # a page shorter than the representatives
        keys_NHWD = _wide(pages.k_NWKD).transpose(1, 2).repeat_interleave(_group(pages), 1)
        picked = keys_NHWD.gather(2, best.indices[..., None].expand(-1, -1, -1, keys_NHWD.shape[3]))
        total = picked.masked_fill(~there[..., None], 0).sum(2)
        return (total / there.sum(2, keepdim=True)).flatten(1)

    def probe(self, pages: PageTensors) -> Tensor:
        rows = valid_rows(pages)[:, :, None, None]
        return (_wide(pages.q_NWHD).masked_fill(~rows, 0).sum(1) / pages.lengths[:, None, None]).flatten(1)

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        return probe_NF @ digest_PE.to(probe_NF.dtype).T


def _attention_received(pages: PageTensors) -> Tensor:
    """Attention that each token of a page gets from the page's tokens, [N, H, W]; -1 past the end."""
    assert pages.rope is not None
    rows = valid_rows(pages)
    cos, sin = pages.rope(torch.arange(pages.k_NWKD.shape[1], device=rows.device))
    q, k = (_wide(x).masked_fill(~rows[..., None, None], 0) for x in (pages.q_NWHD, pages.k_NWKD))
    q, k = (rotate(x, cos[:, None], sin[:, None]).transpose(1, 2) for x in (q, k))
    logits = q @ k.repeat_interleave(_group(pages), 1).mT * q.shape[-1] ** -0.5
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    received = weights.masked_fill(~rows[:, None, :, None], 0).sum(2)
    return received.masked_fill(~rows[:, None], -1.0)


def _group(pages: PageTensors) -> int:
    return pages.q_NWHD.shape[2] // pages.k_NWKD.shape[2]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
