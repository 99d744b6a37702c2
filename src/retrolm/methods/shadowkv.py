"""ShadowKV: dense prefill, then keys of low rank, with the chunks exact that their mean describes badly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..ops.rotary import rotate
from .base import METHODS
from .knobs import positive
from .token_base import ChunkView, Part, TokenCache, TokenMethod, distance, places_of, true_at
from .token_pages import at_pages, page_of_places, rotated_query


@METHODS.register("shadowkv")
class ShadowKV(TokenMethod):
    """When a text no longer fits the budget (for a long prompt: at the first generated token), its keys before RoPE,
    all heads side by side, are replaced by their truncated singular value decomposition. A chunk of 8 tokens is known
    by the mean of its true keys after RoPE; those with a key least like that mean (lowest least cosine) are outliers,
    which keep their keys and are always attended, as are the last chunks and all tokens after them. The others are
    chosen for each KV head by the softmax of query and mean over them, the greatest of its query heads.

    All rows stay on the device: accuracy is ShadowKV's and memory isn't. Keys hold the product of the decomposition,
    not its factors, and values aren't moved to host memory. Everything attended counts inside the budget, where the
    published 2048 are the chosen chunks alone.

    State per layer: `ends` int64 [B], the first true position that is no chunk's (0 = still exact); `means`
    [B, K, C, D]; `outliers` bool [B, K, C]; `done`, whether a sample was compressed.
    """

    name = "shadowkv"
    paper = "https://arxiv.org/abs/2410.21465"
    summary = "chunks of 8 tokens by their mean key, low-rank keys, exact outlier chunks; dense prefill"
    prefill = "dense"
    unit = "chunk of 8 tokens"
    index = "mean key, after RoPE"
    query = "newest token's queries"
    scope = "layer and KV head"
    when = "each generated token"
    budget_split = "outlier chunks (3/16) + the prompt's last 4 chunks and the answer + best chunks of 8 tokens"
    keeps = (
        "all tokens and chunks' mean keys, on the device (the paper keeps keys as factors, and values in host memory)"
    )
    positions = "true"
    exact_when = "kv_budget ≥ prompt and answer"
    true_positions = True

    @dataclass(frozen=True)
    class Knobs:
        """chunk: tokens of a chunk. num_local: last chunks of the prompt, always attended with their own keys.

        rank: of the keys of all heads together; None = 160 for a width of 1024 (published), and in proportion.
        outliers: share of the budget for outlier chunks (published: 24 chunks of 8 in 1024 tokens).
        """

        chunk: int = 8
        num_local: int = 4
        rank: int | None = None
        outliers: float = 0.1875

    def check_knobs(self) -> None:
        positive(self.name, self.knobs, "chunk", "num_local", "rank")
        if not 0 <= self.knobs.outliers < 1:
            raise UserError(f"{self.name}.outliers must be from 0 to below 1, got {self.knobs.outliers!r}.")

    def check_budget(self, kv_budget: int) -> None:
        needed = (self._num_outliers(kv_budget) + self.knobs.num_local + 2) * self.knobs.chunk
        self._refuse_budget(kv_budget, needed, "outlier chunks, local ones, one in the making and one to choose")

    def select(self, view: ChunkView) -> list[Part] | None:
        if view.new.is_prefill:
            return None
        self._compress(view)
        true_B1T, ends_B11 = view.cache.true_BJT, view.cache.state["ends"][:, None, None]
        chosen_BKC = self._choose(view)
        page_B1T = page_of_places(view, self.knobs.chunk).clamp(max=chosen_BKC.shape[2] - 1)
        recent = (true_B1T > (view.true_BQ - self._room(view.kv_budget))[:, None]) | (ends_B11 == 0)
        in_chunk = true_B1T < ends_B11
        wanted = (true_B1T >= 0) & ((recent & ~in_chunk) | (in_chunk & at_pages(chosen_BKC, page_B1T)))
        places = places_of(wanted, view.kv_budget)
        true_BKS = true_at(view.cache, places)
        return [Part(places, distance(view.true_BQ, true_BKS) >= 0, view.true_BQ, true_BKS.clamp(min=0))]

    def rank_of(self, keys_KTD: Tensor) -> int:
        """Rank of the keys of all heads together."""
        return self.knobs.rank or max(round(160 / 1024 * len(keys_KTD) * keys_KTD.shape[2]), 1)

    def _num_outliers(self, kv_budget: int) -> int:
        """Outlier chunks."""
        return int(self.knobs.outliers * kv_budget) // self.knobs.chunk

    def _room(self, kv_budget: int) -> int:
        """Tokens for everything but outliers."""
        return kv_budget - self._num_outliers(kv_budget) * self.knobs.chunk

    def _choose(self, view: ChunkView) -> Tensor:
        """Outlier chunks and the best of the others, bool [B, K, C], C at least 1."""
        state = view.cache.state
        outliers, ends_B11 = state["outliers"], state["ends"][:, None, None]
        others = torch.arange(outliers.shape[2], device=outliers.device) < ends_B11 // self.knobs.chunk
        others = others & ~outliers
        logits = (rotated_query(view) @ state["means"].mT) * view.q_BHQD.shape[-1] ** -0.5
        weights = logits.masked_fill(~others[:, :, None], -torch.inf).softmax(-1).nan_to_num(-1.0).amax(2)
        ranks = weights.masked_fill(~others, -1.0).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        room = self._room(view.kv_budget) - (view.true_BQ[:, :, None] + 1 - ends_B11)
        chosen: Tensor = outliers | (others & (ranks < room.div(self.knobs.chunk, rounding_mode="floor")))
        return chosen

    def _compress(self, view: ChunkView) -> None:
        """Give up the exact keys of samples that no longer fit the budget."""
        state, B, K, D = view.cache.state, len(view.true_BQ), *view.cache.keys_BKTD.shape[1::2]
        if not state:
            state["ends"] = torch.zeros_like(view.new.starts)
            state["means"] = rotated_query(view).new_zeros(B, K, 1, D)
            state["outliers"] = torch.zeros(B, K, 1, dtype=torch.bool, device=view.true_BQ.device)
            state["done"] = [False] * B
        for sample, length in enumerate(view.new.before):
            if length >= view.kv_budget and not state["done"][sample]:
                state["done"][sample] = True
                self._compress_sample(view, sample, length)

    def _compress_sample(self, view: ChunkView, sample: int, length: int) -> None:
        """Describe the chunks of one sample's first `length` tokens, and make the keys of most of them low-rank."""
        cache, num_chunks = view.cache, length // self.knobs.chunk - self.knobs.num_local
        end, first = num_chunks * self.knobs.chunk, cache.num_places - 1 - length  # its tokens stand side by side
        keys_KTD = cache.keys_BKTD[sample, :, first : first + length]
        cos, sin = view.rope(torch.arange(end, device=keys_KTD.device))
        means, outliers = self._describe(rotate(keys_KTD[:, :end], cos, sin), view.kv_budget)
        low = low_rank(keys_KTD, self.rank_of(keys_KTD))
        exact = outliers.repeat_interleave(self.knobs.chunk, 1)[..., None]
        # In place: the cache's tensor is its own, laid anew with every chunk.
        keys_KTD[:, :end] = torch.where(exact, keys_KTD[:, :end], low[:, :end])
        _note(cache, sample, end, means, outliers)

    def _describe(self, keys_KTD: Tensor, kv_budget: int) -> tuple[Tensor, Tensor]:
        """Mean key of each chunk [K, C, D], and which are outliers, bool [K, C]."""
        wide = torch.promote_types(keys_KTD.dtype, torch.float32)
        chunks_KCSD = keys_KTD.to(wide).unflatten(1, (-1, self.knobs.chunk))
        means = chunks_KCSD.mean(2)
        least = torch.cosine_similarity(chunks_KCSD, means[:, :, None], dim=-1).amin(2)
        worst = least.topk(min(self._num_outliers(kv_budget), least.shape[1]), dim=1, largest=False).indices
        return means, torch.zeros_like(least, dtype=torch.bool).scatter(1, worst, True)


def _note(cache: TokenCache, sample: int, end: int, means_KCD: Tensor, outliers_KC: Tensor) -> None:
    """Put one sample's chunks into the layer's state, widened if it has more than any before."""
    state, num_chunks = cache.state, means_KCD.shape[1]
    missing = max(num_chunks - state["means"].shape[2], 0)
    state["means"] = torch.nn.functional.pad(state["means"], (0, 0, 0, missing))
    state["outliers"] = torch.nn.functional.pad(state["outliers"], (0, missing))
    state["means"][sample, :, :num_chunks] = means_KCD
    state["outliers"][sample, :, :num_chunks] = outliers_KC
    state["ends"][sample] = end


def low_rank(keys_KTD: Tensor, rank: int) -> Tensor:
    """The best approximation of rank `rank` of all heads' keys side by side, [K, T, D] in their dtype.

    The leading right singular vectors are those of the triangular factor of a QR decomposition, which is small however
    long the text is; keys projected on them are the truncated decomposition.
    """
    wide = torch.promote_types(keys_KTD.dtype, torch.float32)
    rows = keys_KTD.transpose(0, 1).flatten(1).to(wide)
    directions = torch.linalg.svd(torch.linalg.qr(rows, mode="r").R, full_matrices=False).Vh[:rank]
    low = (rows @ directions.mT) @ directions
    return low.unflatten(1, (len(keys_KTD), -1)).transpose(0, 1).to(keys_KTD.dtype)
