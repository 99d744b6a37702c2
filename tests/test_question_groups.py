"""Questions on several documents at once, joined as on a GPU: the same answers, captures and choices as apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grids import some
from retrolm.config import RetroConfig
from retrolm.engine import question_groups, set_attention
from retrolm.engine.chunk import Chunk
from retrolm.engine.encoder import Encoder
from retrolm.engine.model import RetroLM
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

W = 8
LENGTHS = (163, 20, 97, 5, 131, 163)
QUESTIONS = (3, 7, 2, 6, 13, 11)


def make(name: str = "llama", method: str = "retrolm", **options: Any) -> RetroLM:
    config = RetroConfig.from_options({"kv_budget": 5 * W, "page_size": W, **options})
    lm = RetroLM(tiny_model(name), config=config, method=method)
    if method == "retrolm":
        lm.use_retriever(random_retriever(lm, 4))
    return lm


def join(monkeypatch: pytest.MonkeyPatch, most: int = 100) -> None:
    """Work on questions as a GPU does, `most` in one attention call."""
    monkeypatch.setattr(question_groups, "joins_questions", lambda device: True)
    monkeypatch.setattr(set_attention, "most_pages", lambda device, set_bytes: most)


def asked(lm: RetroLM, lengths: tuple[int, ...] = LENGTHS, questions: tuple[int, ...] = QUESTIONS) -> Any:
    """An encoder, and a chunk of one question on each of several documents."""
    documents = lm.read([random_ids(n, i) for i, n in enumerate(lengths)])
    encoder: Encoder = documents[0].encoder
    groups = []
    for i, (document, num_tokens) in enumerate(zip(documents, questions, strict=True)):
        ids = encoder.parts.store.reserve(-(-(num_tokens + lm.config.page_marks) // W))
        pinned = (4,) if i == 0 and lm.config.retrieve_every else ()
        groups.append(encoder.query(document.table, ids, random_ids(num_tokens, 50 + i).tolist(), pinned))
    return encoder, Chunk(groups, max(questions)), documents


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("llama", "qwen2", "gemma2", "gemma3", "mistral-sliding", "phi3")),
    ("llama", {"first_layer_mode": "full"}),
    ("llama", {"first_layer_mode": "mean_key"}),
    ("qwen2", {"bookmarks": "visible"}),
    ("llama", {"bookmark_span": "page"}),
    ("llama", {"score_rope": True}),
    ("llama", {"retrieve_every": 4}),
    ("llama", {"page_positions": "true_for_questions"}),
    ("llama", {"page_positions": "ranked_for_questions"}),
    ("qwen2", {"page_positions": "ranked_for_questions", "retrieve_every": 4, "bookmarks": "visible"}),
    ("qwen2", {"page_positions": "true", "store_bits": 8, "bookmarks": "visible"}),
    ("llama", {"selection_scope": "head"}),
    ("llama", {"store_bits": 8}),
    ("llama", {"device_kv_bytes": 12 * 2 * W * 2 * 12 * 8 * 4}),
    *(("llama", {"method": m}) for m in ("mean_key", "quest_pages", "infllm_pages", "recency", "random")),
]


@pytest.mark.parametrize(("case", "most"), some(CASES, [100, 4], each=1))
def test_joined_equals_apart(monkeypatch: pytest.MonkeyPatch, case: tuple[str, dict[str, Any]], most: int) -> None:
    name, options = case
    encoder, chunk, _ = asked(make(name, **options))
    apart = encoder.encode(chunk, logits=True)
    join(monkeypatch, most)
    together = encoder.encode(chunk, logits=True)
    assert (together.logits - apart.logits).abs().max() <= 1e-10
    assert together.peak_attended == apart.peak_attended
    for one, other in zip(together.captures, apart.captures, strict=True):
        assert (one.end, one.num_marks) == (other.end, other.num_marks)
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(x, y, strict=True))
        for a, b in zip(one.choices, other.choices, strict=True):
            assert torch.equal(a.ordinals, b.ordinals) and a.attended_tokens == b.attended_tokens
            assert (a.scores is None) == (b.scores is None)
            assert a.scores is None or torch.allclose(a.scores, b.scores, atol=1e-6)


def test_one_gather_and_one_attention_serve_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls = make(), []
    gather = set_attention.SetAttention._gather
    monkeypatch.setattr(set_attention.SetAttention, "_gather", lambda *given: calls.append(1) or gather(*given))
    counts = {}
    for num, joined in ((2, False), (6, False), (2, True), (6, True)):
        encoder, chunk, _ = asked(lm, (163,) * num, (7,) * num)
        if joined:
            join(monkeypatch)
        calls.clear()
        encoder.encode(chunk)
        counts[num, joined] = len(calls)
    layers = lm.backbone.num_layers
    assert counts == {(2, False): 2 * layers, (6, False): 6 * layers, (2, True): layers, (6, True): layers}
