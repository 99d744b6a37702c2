"""Oracle: the true attention that a page's tokens pay to past pages, were all of them attended."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.rotary import rotate
from .base import METHODS, PageMethod, PageTensors, valid_rows

_HEAD = 6  # columns in front of a probe: page, tokens, room for tokens, query heads, KV heads, head dim


@METHODS.register("oracle")
class OracleMethod(PageMethod):
    """Attention weight on each past page, mean over heads and tokens of the current page, which attend it as well.

    Keys and queries stand at their true places (page index × page size, as for `score_rope`). Logits are scaled by
    1/√D; a model's own scale or softcap isn't known here. It reads every key of the text, so that it saves nothing: it
    says how far choosing pages by attention itself would go.
    """

    name = "oracle"
    paper = "https://arxiv.org/abs/2406.10774"
    summary = "true attention mass of the current page on past pages; reads all keys, no training"
    index = "all keys"
    query = "all queries of the current page"
    keeps = "all pages, and all their rotated keys once more in float32"
    needs_rope = True

    def digest(self, pages: PageTensors) -> Tensor:
        keys = _placed(pages.k_NWKD, pages)[:, : pages.page_size]
        keys = pad(keys, (0, 0, 0, 0, 0, pages.page_size - keys.shape[1]))
        head = torch.stack([pages.ordinals, pages.lengths], 1)
        return torch.cat([head.to(keys.dtype), keys.flatten(1)], 1)

    def probe(self, pages: PageTensors) -> Tensor:
        queries, keys = (_placed(x, pages) for x in (pages.q_NWHD, pages.k_NWKD))
        room = max(queries.shape[1], pages.page_size)
        queries, keys = (pad(x, (0, 0, 0, 0, 0, room - x.shape[1])) for x in (queries, keys))
        shape = (room, queries.shape[2], *keys.shape[2:])
        head = torch.stack([pages.ordinals, pages.lengths], 1).to(queries.dtype)
        shapes = head.new_tensor(shape).expand(len(head), -1)
        return torch.cat([head, shapes, queries.flatten(1), keys.flatten(1)], 1)

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        W, H, K, D = (int(x) for x in probe_NF[0, 2:_HEAD].tolist())
        queries, own = probe_NF[:, _HEAD:].split([W * H * D, W * K * D], 1)
        past_PUKD = digest_PE[:, 2:].unflatten(1, (-1, K, D))
        rows = zip(probe_NF, queries, own, strict=True)
        scores = [
            _mass(head, q.reshape(W, K, H // K, D), k.reshape(W, K, D), digest_PE, past_PUKD) for head, q, k in rows
        ]
        return torch.stack(scores).float()


def _placed(x_NWHD: Tensor, pages: PageTensors) -> Tensor:
    """Rows at their true places, zeros past the end, float32 or wider."""
    assert pages.rope is not None
    wide = torch.promote_types(x_NWHD.dtype, torch.float32)
    width = torch.arange(x_NWHD.shape[1], device=x_NWHD.device)
    cos, sin = pages.rope(pages.ordinals[:, None] * pages.page_size + width)
    clean = x_NWHD.to(wide).masked_fill(~valid_rows(pages)[..., None, None], 0)
    return rotate(clean, cos[:, :, None], sin[:, :, None])


def _mass(head: Tensor, q_WKGD: Tensor, own_WKD: Tensor, digest_PE: Tensor, past_PUKD: Tensor) -> Tensor:
    """Attention of one page's queries on each past page, [P]; 0 for pages that aren't past."""
    W, P, U = len(q_WKGD), *past_PUKD.shape[:2]
    place = torch.arange(max(W, U), device=head.device)
    there_PU = (digest_PE[:, 0] < head[0])[:, None] & (place[:U] < digest_PE[:, 1:2])
    real_W = place[:W] < head[1]
    own_WW = (place[:W] <= place[:W, None]) & real_W
    past = torch.einsum("wkgd,pukd->kgwpu", q_WKGD, past_PUKD.to(q_WKGD.dtype)).flatten(3)
    own = torch.einsum("wkgd,ukd->kgwu", q_WKGD, own_WKD)
    allowed = torch.cat([there_PU.flatten().expand(W, -1), own_WW], 1)
    logits = torch.cat([past, own], -1) * q_WKGD.shape[-1] ** -0.5
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)[..., : P * U]
    mean_PU = weights.mean((0, 1))[real_W].mean(0)
    return mean_PU.reshape(P, U).sum(1)
