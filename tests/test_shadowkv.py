"""ShadowKV's own parts: keys of low rank, chunks that stay exact, and its limit, full attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods import METHODS, shadowkv
from retrolm.methods.shadowkv import ShadowKV, low_rank
from retrolm.methods.token_base import ChunkView, TokenCache, places_of
from tiny_models import exact_model, random_ids

BUDGET = 60
KNOBS = {"chunk": 4, "num_local": 2}


def ask(model: Any, ids: Tensor, method: str = "shadowkv", **knobs: Any) -> Tensor:
    """Logits of six answer steps, [steps, vocabulary]."""
    seen: list[Tensor] = []

    def note(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores[0].clone())
        return scores

    options = {"method_options": {**KNOBS, **knobs}} if method == "shadowkv" else {}
    lm = RetroLM(model, config=RetroConfig(kv_budget=BUDGET, page_size=4), method=method, **options)
    prompt = Prompt((), tuple(ids[:-4].tolist()), tuple(ids[-4:].tolist()))
    lm.answer([prompt], max_new_tokens=6, do_sample=False, logits_processor=[note], eos_token_id=None)
    lm.detach()
    return torch.stack(seen)


@pytest.fixture
def all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk is chosen, with room for it: what is left of the method are its keys."""

    def everything(self: ShadowKV, view: ChunkView) -> Tensor:
        outliers = view.cache.state["outliers"]
        num_chunks = view.cache.state["ends"][:, None, None] // self.knobs.chunk
        return (torch.arange(outliers.shape[2]) < num_chunks).expand_as(outliers)

    monkeypatch.setattr(ShadowKV, "_choose", everything)
    monkeypatch.setattr(shadowkv, "places_of", lambda mask, width: places_of(mask, mask.shape[-1]))
    monkeypatch.setattr(ShadowKV, "check_attended", lambda *_: None)


@pytest.mark.parametrize("family", ["llama", "llama-mha", "llama-mqa", "gemma3", "phi3"])
def test_full_rank_and_all_chunks_are_full_attention(family: str, all_chunks: None) -> None:
    model, ids = exact_model(family), random_ids(80)
    expected = ask(model, ids, "full")
    assert (ask(model, ids, rank=48, outliers=0.0) - expected).abs().max() < 2e-6
    assert (ask(model, ids, rank=5, outliers=0.0) - expected).abs().max() > 1e-3


def test_when_all_chunks_are_outliers_the_rank_does_not_matter(
    all_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outliers and what stands behind the chunks keep their keys: one direction is then as good as all."""
    model, ids, describe = exact_model("llama"), random_ids(66), ShadowKV._describe
    expected = ask(model, ids, "full")
    assert (ask(model, ids, rank=1, outliers=0.2) - expected).abs().max() > 1e-3

    def all_outliers(self: ShadowKV, keys: Tensor, kv_budget: int) -> tuple[Tensor, Tensor]:
        means, outliers = describe(self, keys, kv_budget)
        return means, torch.ones_like(outliers)

    monkeypatch.setattr(ShadowKV, "_describe", all_outliers)
    assert (ask(model, ids, rank=1, outliers=0.2) - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("heads", "rank"), [(1, 3), (2, 9), (4, 20), (2, 16), (2, 100)])
@pytest.mark.parametrize("num_tokens", [5, 50])
def test_low_rank_keys_are_the_truncated_decomposition(heads: int, rank: int, num_tokens: int) -> None:
    """Against numpy's decomposition of all heads side by side; any rank past the full one is the keys themselves."""
    keys = torch.randn(heads, num_tokens, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = keys.transpose(0, 1).flatten(1).numpy()
    u, s, vh = np.linalg.svd(rows, full_matrices=False)
    expected = sum((s[i] * np.outer(u[:, i], vh[i]) for i in range(min(rank, len(s)))), np.zeros_like(rows))
    found = low_rank(keys, rank).transpose(0, 1).flatten(1).numpy()
    assert np.abs(found - expected).max() < 1e-12
    assert (np.abs(found - rows).max() < 1e-12) == (rank >= len(s))


def test_only_outliers_and_what_follows_the_chunks_keep_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[Tensor, TokenCache]] = []
    compress = ShadowKV._compress_sample

    def spy(self: ShadowKV, view: ChunkView, sample: int, length: int) -> None:
        before = view.cache.keys_BKTD.clone()
        compress(self, view, sample, length)
        kept.append((before, view.cache))
        changed = (view.cache.keys_BKTD[sample] != before[sample]).any(-1)
        outliers = view.cache.state["outliers"][sample].repeat_interleave(4, 1)
        assert outliers.sum(1).tolist() == [12, 12]  # int(0.2 * 60) // 4 chunks of 4
        assert torch.equal(changed[:, : outliers.shape[1]], ~outliers) and not changed[:, outliers.shape[1] :].any()

    monkeypatch.setattr(ShadowKV, "_compress_sample", spy)
    ask(exact_model("llama"), random_ids(80), rank=6, outliers=0.2)
    assert len(kept) == 4  # once per layer, though six tokens were generated


def test_the_least_alike_chunk_is_the_outlier() -> None:
    keys = torch.ones(1, 24, 4, dtype=torch.float64)
    keys[0, 9] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    method = METHODS.get("shadowkv").with_options({"chunk": 4, "outliers": 0.1})
    means, outliers = method._describe(keys, 40)  # type: ignore[attr-defined]
    assert outliers.tolist() == [[False, False, True, False, False, False]]
    assert means[0, 2].tolist() == [1.0, 0.5, 1.0, 0.5]


def test_the_published_split() -> None:
    """48 outlier chunks at a budget of 2048, and rank 160 for keys of width 1024."""
    method = METHODS.get("shadowkv")()
    assert isinstance(method, ShadowKV) and method._num_outliers(2048) == 48
    assert method.rank_of(torch.zeros(8, 3, 128)) == 160 and method.rank_of(torch.zeros(1, 3, 4)) == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"outliers": 1.0}, "below 1"), ({"rank": 0}, "at least 1"), ({"outliers": 0.9}, "too small for shadowkv")],
)
def test_knobs_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(exact_model("llama"), random_ids(20), **knobs)
