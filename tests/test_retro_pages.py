"""RetroAttention over retrieved pages against its naive self, and at its limits: the base method, full attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grids import some
from naive_reference import NaiveOptions
from naive_retro_pages import NaiveRetroPages
from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.set_attention import SetAttention
from retrolm.errors import UserError
from retrolm.methods.retro_exposure import ExposureMeter
from retrolm.ops.attention import attend_reference
from test_against_naive import TOLERANCE, W, cut, delta_matrices, random_retriever
from tiny_models import exact_model, random_ids, stock_logits, tiny_model, wide_softmax

EVERY, NEW, BUDGET = 4, 18, 5 * W
IDS = random_ids(75, seed=5)


def attach(model: Any, method: str = "retrolm_retro", window: int | None = None, **options: Any) -> RetroLM:
    settings = {"kv_budget": BUDGET, "page_size": W, "retrieve_every": EVERY, **options}
    knobs = {} if window is None else {"window": window}
    lm = RetroLM(model, config=RetroConfig(**settings), method=method, method_options=knobs)
    lm.use_retriever(random_retriever(lm, rank=0))
    return lm


def continued(lm: RetroLM, rows: Tensor = IDS[None]) -> tuple[Tensor, Tensor]:
    """Tokens generated [B, NEW], and the logits they were taken from [NEW, B, vocabulary]."""
    seen: list[Tensor] = []

    def keep(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    with wide_softmax():
        out = lm.generate(rows, max_new_tokens=NEW, do_sample=False, logits_processor=[keep], eos_token_id=None)
    lm.detach()
    return out[:, rows.shape[1] :], torch.stack(seen)


def naive_logits(lm: RetroLM, window: int, said: list[int]) -> Tensor:
    retriever = lm.retriever
    assert retriever is not None
    options = NaiveOptions(
        kv_budget=lm.config.kv_budget, page_size=W, bookmarks=lm.config.bookmarks, agreement_layers=0
    )
    naive = NaiveRetroPages(lm.model, options, retriever.embedding.detach(), delta_matrices(lm, retriever))
    naive.window = window
    pages = cut(IDS.tolist())
    naive.read(pages[:-1])
    found, tokens = [], pages[-1]
    for start in range(0, len(said), EVERY):
        found.append(torch.from_numpy(naive.round(tokens, said[start : start + EVERY], start == 0)))
        tokens = said[start : start + EVERY]
    return torch.cat(found)


@pytest.mark.parametrize(("family", "window"), some(["llama", "qwen2", "gemma3", "mistral-sliding"], [1, 2, 4], each=2))
def test_it_equals_its_naive_self(family: str, window: int) -> None:
    check_against_naive(attach(exact_model(family, seed=3), window=window), window)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("window", [1, 3])
def test_it_equals_its_naive_self_with_visible_bookmarks(family: str, window: int) -> None:
    lm = attach(exact_model(family, seed=3), window=window, bookmarks="visible", kv_budget=5 * (W + 1))
    check_against_naive(lm, window)


def check_against_naive(lm: RetroLM, window: int) -> None:
    said, logits = continued(lm)
    assert (logits[:, 0] - naive_logits(lm, window, said[0].tolist())).abs().max() < TOLERANCE


def test_a_window_of_one_is_retrolm_and_a_wider_one_is_not() -> None:
    model = tiny_model("llama")
    base = continued(attach(model, "retrolm", agreement_layers=0))[1]
    one, two = (continued(attach(model, window=window))[1] for window in (1, 2))
    assert torch.equal(base, one)
    assert torch.equal(base[: 2 * EVERY], two[: 2 * EVERY])  # nothing was generated before the first page
    assert (base[2 * EVERY :] - two[2 * EVERY :]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("dense_bypass", [True, False])
def test_with_room_for_everything_it_is_full_attention(family: str, dense_bypass: bool) -> None:
    model = exact_model(family)
    said, logits = continued(attach(model, window=3, kv_budget=128, dense_bypass=dense_bypass))
    expected = stock_logits(model, torch.cat([IDS, said[0]]))[len(IDS) - 1 : -1]
    assert (logits[:, 0] - expected).abs().max() < 1e-5  # generate's scores are float32


def test_after_every_update_outputs_are_attention_over_the_union(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each revised page in one layer, at the positions of the union: written out as one dense attention."""
    passes: list[tuple[Any, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]] = []
    attend = SetAttention.attend

    def spy(self: Any, call: Any, on: Any, sets: Any, rows: Any) -> None:
        attend(self, call, on, sets, rows)
        if call.layer == 1 and type(self).__name__ == "UnionAttention":
            store = self._parts.store
            keys, values = (x.clone() for x in store.read(1, self._group.table.ids))
            q, out = (x.unflatten(0, (-1, EVERY)).clone() for x in (rows.q_THD, rows.out_THD))
            passes.append((self._group, sets.picked_nS.clone(), q, out, (keys, values)))

    monkeypatch.setattr(SetAttention, "attend", spy)
    budget = 7 * W
    lm = attach(exact_model("llama", seed=3, num_hidden_layers=2), window=4, kv_budget=budget)
    continued(lm)
    assert len(passes) == 3  # rounds of NEW tokens that have a generated page behind them
    rope, scale = lm.backbone.rope(1), lm.backbone.head_dim**-0.5
    unions = []
    for group, picked, q_nQHD, out_nQHD, (keys, values) in passes:
        for row, number in enumerate(group.num_past):
            union = [p for p in picked[row].tolist() if p >= 0]
            unions.append(len(union))
            places = [(p, t) for p in [*union, number] for t in range(int(group.table.lengths[p]))]
            own = int(group.table.lengths[number])
            k, v = (torch.stack([x[p, t] for p, t in places]) for x in (keys, values))
            allowed = torch.arange(len(places)) <= torch.arange(len(places) - own, len(places))[:, None]
            cos, sin = (x[:, None] for x in rope.at(torch.arange(len(places))))
            turned = [_turn(x, c, s) for x, c, s in ((q_nQHD[row, :own], cos[-own:], sin[-own:]), (k, cos, sin))]
            expected = attend_reference(turned[0][None], turned[1][None], v[None], allowed[None], scale)
            assert (out_nQHD[row, :own] - expected[0]).abs().max() < 1e-12
    most = (budget - W - EVERY) // W + 1
    assert max(unions) > most  # some page has seen more than one budget


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("window", [2, 4])
def test_a_batch_gives_what_its_prompts_give_alone(window: int) -> None:
    model, rows = tiny_model("llama"), torch.stack([IDS, random_ids(75, seed=8)])
    _, together = continued(attach(model, window=window), rows)
    for number, ids in enumerate(rows):
        _, alone = continued(attach(model, window=window), ids[None])
        assert (together[:, number] - alone[:, 0]).abs().max() < 1e-9


def test_pages_offloaded_and_quantised_are_revised_too() -> None:
    model = tiny_model("llama")
    _, resident = continued(attach(model, window=3))
    page_bytes = attach(model).page_layout().page_bytes
    _, offloaded = continued(attach(model, window=3, device_kv_bytes=4 * 14 * page_bytes))
    assert torch.equal(resident, offloaded)
    _, quantised = continued(attach(model, window=3, store_bits=8))
    assert (resident - quantised).abs().max() > 0


def test_exposure_and_what_is_read_again_are_stated() -> None:
    model = tiny_model("llama")
    found = {}
    for window in (2, 4):
        lm = attach(model, window=window)
        meter = lm.method.meter = ExposureMeter()
        document = lm.read(IDS.tolist())
        answer = document.ask([IDS[:5].tolist()], max_new_tokens=NEW, raw=True, eos_token_id=None)[0]
        found[window] = (meter.by_sample()[0], answer.attended_tokens)
    assert 1.0 < found[2][0] < found[4][0] < 4.0
    assert BUDGET < found[4][1]["prefill"] <= 4 * BUDGET and found[4][1]["decode"] <= BUDGET + EVERY


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        attach(tiny_model("llama"), window=0)
    with pytest.raises(UserError, match="page_size"):
        continued(attach(tiny_model("llama"), window=2, retrieve_every=W + 1))


def test_without_re_retrieval_an_answer_says_that_nothing_was_revised() -> None:
    lm = attach(tiny_model("llama"), window=2, retrieve_every=0)
    answer = lm.read(IDS.tolist()).ask([IDS[:5].tolist()], max_new_tokens=4, raw=True)[0]
    assert "nothing was revised" in answer.decode_path
