"""F6: scores against loops, choices against full sorts, and what every method must do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods import METHODS, PageTensors, choose_pages, page_method
from retrolm.methods.retro_exposure import Revises
from retrolm.methods.selection import best_last
from tiny_models import random_ids, tiny_model

N, W, H, K, D = 5, 6, 6, 2, 8
PAGE_METHODS = [name for name in METHODS if METHODS.get(name).kind == "pages"]


def rope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin [..., D] of plain RoPE."""
    angles = positions[..., None].double() * 100.0 ** -(torch.arange(D // 2) * 2 / D)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def page_tensors(dtype: torch.dtype = torch.float64) -> PageTensors:
    """Five pages of 6, 6, 3, 6 and 1 tokens; rows past the end are poisoned where methods must not look."""
    torch.manual_seed(0)
    pages = PageTensors(
        layer=1,
        q_NWHD=torch.randn(N, W, H, D, dtype=torch.float64).to(dtype),
        k_NWKD=torch.randn(N, W, K, D, dtype=torch.float64).to(dtype),
        lengths=torch.tensor([6, 6, 3, 6, 1]),
        ordinals=torch.arange(N),
        bookmark_q_NHD=torch.randn(N, H, D, dtype=torch.float64).to(dtype),
        bookmark_k_NKD=torch.randn(N, K, D, dtype=torch.float64).to(dtype),
    )
    pages.rope, pages.page_size = rope, W
    for page, length in enumerate(pages.lengths.tolist()):
        pages.q_NWHD[page, length:] = torch.nan
        pages.k_NWKD[page, length:] = torch.nan
    return pages


def scores_of(name: str, pages: PageTensors) -> Tensor:
    method = page_method(name)()
    return method.score(method.probe(pages), method.digest(pages))


def by_hand(name: str, pages: PageTensors, asking: int, page: int) -> float:
    """One score, written out from the method's paper."""
    total, group = 0.0, H // K
    keys = pages.k_NWKD[page, : pages.lengths[page]]
    queries = pages.q_NWHD[asking, : pages.lengths[asking]]
    for head in range(H):
        for d in range(D):
            if name == "retrolm":
                assert pages.bookmark_q_NHD is not None and pages.bookmark_k_NKD is not None
                key, query = pages.bookmark_k_NKD[page, head // group, d], pages.bookmark_q_NHD[asking, head, d]
                total += float(query * key) / math.sqrt(H * D)
            elif name == "mean_key":
                total += float(queries[:, head, d].mean() * keys[:, head // group, d].mean())
            else:
                total += max(float(queries[-1, head, d] * key) for key in keys[:, head // group, d])
    return total


@pytest.mark.parametrize("name", ["retrolm", "mean_key", "quest_pages"])
def test_scores_equal_loops(name: str) -> None:
    pages = page_tensors()
    found = scores_of(name, pages)
    for asking in range(N):
        for page in range(N):
            assert math.isclose(float(found[asking, page]), by_hand(name, pages, asking, page), abs_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAGE_METHODS)
def test_every_method_scores_pages_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    found = scores_of(name, page_tensors(dtype))
    assert found.shape == (N, N) and found.isfinite().all()
    assert torch.equal(found, scores_of(name, page_tensors(dtype)))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_it_is(name: str) -> None:
    method = METHODS.get(name)
    assert method.name == name and method.summary and method.paper.startswith("https://")


def test_random_scores_spread_evenly_and_differ_by_layer() -> None:
    pages = page_tensors()
    method = page_method("random")()
    pages.ordinals = torch.arange(N) + 400
    digests = (torch.arange(400)[:, None] + 1).double()
    scores = method.score(method.probe(pages), digests)
    assert abs(float(scores.mean()) - 0.5) < 0.03 and scores.unique().numel() > 1900
    pages.layer = 2
    assert not torch.equal(method.score(method.probe(pages), digests), scores)


@pytest.mark.parametrize("name", PAGE_METHODS)
def test_every_method_reads_any_chunking_alike(name: str) -> None:
    model, ids = tiny_model("qwen2"), random_ids(90)
    found = []
    for chunk_pages in (1, 4, 16):
        config = RetroConfig(kv_budget=32, page_size=8, chunk_pages=chunk_pages)
        lm = RetroLM(model, config=config, method=name)
        found.append(lm.logits(ids))
        lm.detach()
    assert (found[0] - found[1]).abs().max() < 1e-6 and (found[0] - found[2]).abs().max() < 1e-6


def test_methods_differ() -> None:
    """In what they read; those that revise what they have generated read as the method they decorate."""
    model, ids = tiny_model("llama"), random_ids(120)
    names = [name for name in PAGE_METHODS if not issubclass(METHODS.get(name), Revises)]
    logits = [RetroLM(model, config=RetroConfig(kv_budget=40, page_size=8), method=name).logits(ids) for name in names]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 1e-2 for other in logits[:i])


def test_unknown_method() -> None:
    with pytest.raises(UserError, match=r"Unknown method 'retrolmm'.* Did you mean 'retrolm'"):
        METHODS.get("retrolmm")
    with pytest.raises(UserError, match=r"'full' doesn't choose pages.*mean_key"):
        page_method("full")


# --- choosing ------------------------------------------------------------------------------------------------------


def choose_by_hand(
    scores: list[float], num_past: int, room: int, num_sink: int, num_local: int, pinned: set[int]
) -> list[int]:
    sinks = [page for page in range(num_past) if page < num_sink]
    others = [page for page in range(num_past) if page >= num_sink]
    first = [page for page in others if page in pinned]
    local = [page for page in others if page >= num_past - num_local and page not in pinned]
    rest = [page for page in others if page not in first + local]
    rest.sort(key=lambda page: (scores[page], page), reverse=True)
    ranked = sorted(first, reverse=True) + sorted(local, reverse=True) + rest
    return sorted(sinks + ranked[: max(room, 0)])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_choices_equal_a_full_sort(data: st.DataObject) -> None:
    """Few distinct scores, so that ties are common: they go to the more recent page."""
    num_pages = data.draw(st.integers(1, 14))
    rows = data.draw(st.integers(1, 4))
    row_of_scores = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=num_pages, max_size=num_pages)
    scores = data.draw(st.lists(row_of_scores, min_size=rows, max_size=rows))
    num_past = data.draw(st.lists(st.integers(0, num_pages), min_size=rows, max_size=rows))
    room = data.draw(st.lists(st.integers(-2, num_pages), min_size=rows, max_size=rows))
    num_sink, num_local = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    pinned = data.draw(st.sets(st.integers(0, num_pages - 1), max_size=3))
    mask = torch.tensor([page in pinned for page in range(num_pages)]) if pinned else None
    found = choose_pages(torch.tensor(scores), num_past, room, num_sink, num_local, mask)
    for row in range(rows):
        expected = choose_by_hand(scores[row], num_past[row], room[row], num_sink, num_local, pinned)
        chosen = found[row].tolist()
        assert chosen == [-1] * (len(chosen) - len(expected)) + expected
    first_local = torch.tensor(num_past) - num_local
    for row, places in enumerate(best_last(found, torch.tensor(scores), num_sink, first_local, mask).tolist()):
        chosen = [page for page in found[row].tolist() if page >= 0]
        forced = [page for page in chosen if page >= num_sink and (page >= first_local[row] or page in pinned)]
        free = [page for page in chosen if page >= num_sink and page not in forced]
        free.sort(key=lambda page: (scores[row][page], page))
        expected = [page for page in chosen if page < num_sink] + free + forced
        assert places == [-1] * (len(places) - len(expected)) + expected


# --- indexes that look at attention -----------------------------------------------------------------------------------


def turned(row: Tensor, position: int) -> list[float]:
    """A row [D] after RoPE, written out."""
    found = [0.0] * D
    for i in range(D // 2):
        angle = position * 100.0 ** -(2 * i / D)
        a, b = float(row[i]), float(row[i + D // 2])
        found[i] = a * math.cos(angle) - b * math.sin(angle)
        found[i + D // 2] = a * math.sin(angle) + b * math.cos(angle)
    return found


def softmax(logits: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    most = max(logits.values())
    total = sum(math.exp(x - most) for x in logits.values())
    return {at: math.exp(x - most) / total for at, x in logits.items()}


def attention(pages: PageTensors, head: int, query: tuple[int, int], seen: list[tuple[int, int]]) -> dict[Any, float]:
    """Weights of one query (page, row) on rows of pages, at true places."""
    q = turned(pages.q_NWHD[query][head], query[0] * W + query[1])
    logits = {}
    for page, row in seen:
        k = turned(pages.k_NWKD[page, row, head // (H // K)], page * W + row)
        logits[page, row] = sum(x * y for x, y in zip(q, k, strict=True)) / math.sqrt(D)
    return softmax(logits)


def test_the_oracle_is_the_attention_that_pages_would_get() -> None:
    pages = page_tensors()
    lengths, found = pages.lengths.tolist(), scores_of("oracle", pages)
    for asking in range(N):
        mass = [0.0] * N
        past = [(page, row) for page in range(asking) for row in range(lengths[page])]
        for head in range(H):
            for row in range(lengths[asking]):
                seen = [*past, *((asking, own) for own in range(row + 1))]
                for (page, _), weight in attention(pages, head, (asking, row), seen).items():
                    mass[page] += weight / H / lengths[asking]
        for page in range(N):
            expected = mass[page] if page < asking else 0.0
            assert math.isclose(float(found[asking, page]), expected, abs_tol=1e-6)


def test_representatives_are_the_tokens_that_get_most_attention() -> None:
    pages = page_tensors()
    method = page_method("infllm_pages").with_options({"repr_top_k": 2})
    found = method.score(method.probe(pages), method.digest(pages))
    for page, length in enumerate(pages.lengths.tolist()):
        digest = []
        for head in range(H):
            marks = [0.0] * length
            for row in range(length):
                for (_, seen), weight in attention(
                    pages, head, (page, row), [(page, j) for j in range(row + 1)]
                ).items():
                    marks[seen] += weight
            best = sorted(range(length), key=lambda j: marks[j], reverse=True)[:2]
            digest.append(pages.k_NWKD[page, best, head // (H // K)].mean(0))
        for asking, own in enumerate(pages.lengths.tolist()):
            expected = (pages.q_NWHD[asking, :own].mean(0) * torch.stack(digest)).sum()
            assert math.isclose(float(found[asking, page]), float(expected), abs_tol=1e-9)


@pytest.mark.parametrize("name", ["oracle", "infllm_pages"])
def test_questions_longer_than_a_page_can_be_asked(name: str) -> None:
    lm = RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=48, page_size=8), method=name)
    lm.eos_ids = ()
    prompt = Prompt((), tuple(random_ids(100).tolist()), tuple(random_ids(19, seed=1).tolist()))
    (answer,) = lm.answer([prompt], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert len(answer.token_ids) == 3 and answer.attended_tokens["prefill"] <= 48
