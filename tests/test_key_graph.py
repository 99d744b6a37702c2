"""RetrievalAttention's approximate index: recall beside exact search, its answers where it finds everything."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods.key_graph import KeyGraph
from retrolm.methods.retrieval_attention import RetrievalAttention
from tiny_models import exact_model, random_ids

NEW = 12


def recall(breadth: int, top_k: int = 20) -> float:
    """Share of the best keys that are found, for queries that lie elsewhere than the keys."""
    make = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(3000, 24, generator=make), 0.5 * torch.randn(40, 24, generator=make) + 1.0
    graph = KeyGraph(24, 16, breadth)
    graph.add(keys[:1000])
    graph.add(keys[1000:])
    found, exact = graph.search(queries, top_k), (queries @ keys.T).topk(top_k).indices
    return float((found[:, :, None] == exact[:, None]).any(1).double().mean())


def test_a_wider_search_finds_more() -> None:
    pytest.importorskip("faiss")
    assert recall(breadth=400) > 0.97 and recall(breadth=400) > recall(breadth=1) > 0.2


def ask(family: str, lengths: tuple[int, ...], **knobs: Any) -> tuple[list[Any], Tensor]:
    seen: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    knobs = {"num_first": 3, "num_recent": 6, **knobs}
    config = RetroConfig(kv_budget=24, page_size=8)
    lm = RetroLM(exact_model(family, seed=3), config=config, method="retrieval_attention", method_options=knobs)
    rows = [random_ids(length, seed=length).tolist() for length in lengths]
    prompts = [Prompt((), tuple(ids[:-4]), tuple(ids[-4:])) for ids in rows]
    answers = lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[keep], eos_token_id=None)
    lm.detach()
    return answers, torch.stack(seen)


@pytest.mark.parametrize("family", ["llama", "llama-mqa"])
def test_a_search_of_everything_is_exact_search(family: str) -> None:
    """Rows of unlike lengths, one of them shorter than what is found; tokens enter the graphs while answering."""
    pytest.importorskip("faiss")
    exact, expected = ask(family, (60, 21, 9))
    found, logits = ask(family, (60, 21, 9), index="approximate", links=8, breadth=500)
    assert (logits - expected).abs().max() < 1e-5
    for one, other in zip(found, exact, strict=True):
        assert one.token_ids == other.token_ids and one.attended_tokens == other.attended_tokens


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"retrolm\[ann\]"):
        RetrievalAttention.with_options({"index": "approximate"})
    with pytest.raises(UserError, match="exact"):
        RetrievalAttention.with_options({"index": "nearly"})
