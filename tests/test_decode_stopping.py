"""Stopping criteria and stop strings stop the engine's own loop where they stop transformers' `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from grids import pairs, some
from retrolm.config import RetroConfig
from retrolm.engine import fast_decode
from retrolm.engine.decode_reading import DecodeRequest, Reader
from retrolm.engine.decode_round import Query
from retrolm.engine.generate_options import GenerateOptions
from retrolm.engine.generation import Generator
from retrolm.engine.model import RetroLM
from retrolm.engine.token_choice import TokenChoice
from retrolm.errors import UserError
from tiny_models import EOS, random_ids, tiny_model
from tiny_tokenizer import tiny_tokenizer

W = 8
LENGTHS = [3, 40, 141]


def attach(name: str = "llama", **options: Any) -> RetroLM:
    return RetroLM(tiny_model(name), config=RetroConfig.from_options({"kv_budget": 64, "page_size": W, **options}))


def ragged() -> tuple[Tensor, Tensor]:
    """Left-padded prompts of unlike lengths and their mask, [3, 141]."""
    ids, mask = torch.full((3, 141), EOS), torch.zeros(3, 141, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = random_ids(length, row), 1
    return ids, mask


class Watch(StoppingCriteria):
    """Stops row i behind `stops[i]` new tokens, by counting its calls; keeps what it is called with."""

    def __init__(self, stops: list[int]) -> None:
        self.stops = stops
        self.calls: list[tuple[list[list[int]], Any, dict[str, Any]]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert input_ids.is_contiguous()
        self.calls.append((input_ids.tolist(), scores, kwargs))
        return torch.tensor([len(self.calls) >= self.stops[row % len(self.stops)] for row in range(len(input_ids))])


class Streamed(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append([])


def compare(lm: RetroLM, ids: Tensor, stops: list[int], **options: Any) -> list[list[int]]:
    """Rows, calls and streamed tokens of the loop, equal to those of `generate`."""
    found = []
    for decoding in ("fast", "plain"):
        torch.manual_seed(3)
        watch, streamed = Watch(stops), Streamed()
        out = lm.generate(ids, decoding=decoding, stopping_criteria=[watch], streamer=streamed, **options)
        found.append((out.tolist(), watch.calls, streamed.seen))
    for ours, theirs in zip(*found, strict=True):
        assert ours == theirs
    return found[0][0]


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop run ahead of what it reads, as it does on a GPU."""
    monkeypatch.setattr(fast_decode, "steps_ahead", lambda request, device: request.ahead)


ENDS: list[dict[str, Any]] = [{"eos_token_id": list(range(2, 9))}, {"eos_token_id": []}]
CHOICES: list[dict[str, Any]] = [{"do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_k": 40}]


STOPS = [[3, 9, 6], [1, 1, 1], [30, 4, 30], [2, 17, 16]]


@pytest.mark.parametrize(("stops", "ends", "choice", "retrieve_every"), pairs(STOPS, ENDS, CHOICES, [0, 5]))
@pytest.mark.usefixtures("ahead")
def test_rows_stop_one_by_one_as_in_generate(
    stops: list[int], ends: dict[str, Any], choice: dict[str, Any], retrieve_every: int
) -> None:
    ids, mask = ragged()
    lm = attach("qwen2", retrieve_every=retrieve_every)
    compare(lm, ids, stops, attention_mask=mask, max_new_tokens=17, **ends, **choice)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
@pytest.mark.usefixtures("ahead")
def test_several_sequences_stop_apart(name: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "top_k": 20}
    out = compare(attach(name), random_ids(60)[None], [4, 9, 2], **options)
    assert [len(row) for row in out] == [69] * 3


@pytest.mark.usefixtures("ahead")
def test_all_criteria_are_asked_in_order() -> None:
    """Also those behind one that stops; transformers asks them all."""
    order: list[str] = []

    class Named(StoppingCriteria):
        def __init__(self, name: str, stop: int) -> None:
            self.name, self.stop, self.num_calls = name, stop, 0

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.num_calls += 1
            order.append(self.name)
            return torch.full((len(input_ids),), self.num_calls >= self.stop)

    found = []
    for decoding in ("fast", "plain"):
        order.clear()
        criteria = [Named("a", 5), Named("b", 3), Named("c", 9)]
        attach().generate(random_ids(40)[None], decoding=decoding, stopping_criteria=criteria, do_sample=False)
        found.append(list(order))
    assert found[0] == found[1] == list("abc" * 3)


@pytest.mark.parametrize("ahead_by", [0, 1, 5, 50])
@pytest.mark.usefixtures("ahead")
def test_what_is_generated_ahead_leaves_no_trace(ahead_by: int) -> None:
    """Neither in the answer nor in the next one, which uses the same cache."""
    lm, fresh = attach(), attach()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "decoding": "fast", "decode_ahead": ahead_by}
    out = lm.generate(random_ids(90)[None], stopping_criteria=[Watch([4])], **options)
    assert out.shape[1] == 94
    after = lm.generate(random_ids(50)[None], **options)
    assert after.tolist() == fresh.generate(random_ids(50)[None], **options).tolist()


@pytest.mark.usefixtures("ahead")
def test_draws_for_what_is_thrown_away_are_given_back() -> None:
    """Answers that follow are sampled as if nothing had been generated ahead: as `generate` does."""
    lm, found = attach(), []
    for decoding, ahead_by in (("fast", 8), ("fast", 1), ("fast", 0), ("plain", 0)):
        torch.manual_seed(5)
        options: dict[str, Any] = {"do_sample": True, "decoding": decoding, "decode_ahead": ahead_by}
        for stop in (3, 1, 20):
            out = lm.generate(random_ids(40)[None], max_new_tokens=9, stopping_criteria=[Watch([stop])], **options)
            found.append(out.tolist())
    assert found[:3] == found[3:6] == found[6:9] == found[9:]


@pytest.mark.parametrize("ahead_by", [0, 3])
@pytest.mark.usefixtures("ahead")
def test_none_ahead_means_that_each_token_waits_for_the_criteria(
    ahead_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 0 a criterion that changes the model acts on the next token already."""
    events: list[str] = []
    real = fast_decode.Runner.step
    monkeypatch.setattr(fast_decode.Runner, "step", lambda runner: (events.append("step"), real(runner))[1])
    watch = Watch([9])
    note = type("Note", (Watch,), {"__call__": lambda own, ids, scores: (events.append("ask"), watch(ids, scores))[1]})
    attach().generate(
        random_ids(40)[None],
        decoding="fast",
        decode_ahead=ahead_by,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=[],
        stopping_criteria=[note([9])],
    )
    waiting = ["step", "ask"] * 6
    assert (events == waiting) == (ahead_by == 0)
    assert sorted(events) == sorted(waiting) and events[:2] == ["step", "ask"]


@given(
    tokens=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=12),
    ends=st.sets(st.integers(0, 5), max_size=2),
    stop_at=st.lists(st.integers(1, 15), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_reading_ends_with_the_last_row(tokens: list[list[int]], ends: set[int], stop_at: list[int]) -> None:
    """Against a rule written down per row: a row ends at its first end token or its stop, whichever is first."""
    watch, steps = Watch(stop_at), torch.tensor(tokens)
    request = DecodeRequest(
        rows=3,
        places=0,
        fill=lambda cache: None,
        num_tokens=len(tokens),
        choice=TokenChoice(eos_ids=tuple(ends)),
        prompts=torch.zeros(3, 4, dtype=torch.int64),
        criteria=[watch],
        pad_id=77,
    )
    tape = type("Recorded", (), {"get": lambda own, step: steps[step]})()
    reader = Reader(tape, request, torch.device("cpu"))
    over = reader.read(len(tokens))
    lasts = []
    for row in range(3):
        at_end = [step + 1 for step, found in enumerate(tokens) if found[row] in ends]
        lasts.append(min([*at_end, stop_at[row]]))
    assert reader.num_read == min(max(lasts), len(tokens))
    assert over == (max(lasts) <= len(tokens))
    seen = torch.tensor(watch.calls[-1][0])[:, 4:]
    for row, last in enumerate(lasts):
        kept = seen[row, : last if ends else None].tolist()
        assert kept == steps[: len(kept), row].tolist()
        assert not ends or set(seen[row, last:].tolist()) <= {77}


def story_lm(**options: Any) -> RetroLM:
    config = RetroConfig.from_options({"kv_budget": 64, "page_size": W, **options})
    return RetroLM(tiny_model("llama", vocab_size=600), tiny_tokenizer(chat=False), config=config)


@pytest.mark.parametrize(("span", "retrieve_every"), some([(4, 6), (2, 3), (7, 10)], [0, 5], each=1))
@pytest.mark.usefixtures("ahead")
def test_stop_strings_across_tokens(span: tuple[int, int], retrieve_every: int) -> None:
    """The string begins within one token and ends within another."""
    first, last = span
    lm = story_lm(retrieve_every=retrieve_every)
    ids = torch.stack([random_ids(40, seed) for seed in (1, 2, 3)])
    free = lm.generate(ids, max_new_tokens=20, do_sample=False, decoding="plain")[:, 40:]
    stop = lm.tokenizer.decode(free[1, first:last])[1:]
    stop = stop[:-1] or stop
    found = [
        lm.generate(ids, max_new_tokens=20, do_sample=False, decoding=decoding, stop_strings=[stop, "never"])
        for decoding in ("fast", "plain")
    ]
    assert found[0].tolist() == found[1].tolist() != free.tolist()
    assert stop in lm.tokenizer.decode(found[0][1, 40:])


def test_beams_stay_with_generate() -> None:
    lm = attach()
    with pytest.raises(UserError, match="num_beams=2"):
        lm.generate(random_ids(20)[None], num_beams=2, decoding="fast", stopping_criteria=[Watch([2])])
    num_rows: list[int] = []
    counting = [lambda ids, scores: num_rows.append(len(ids)) or torch.zeros(len(ids), dtype=torch.bool)]
    lm.generate(random_ids(20)[None], num_beams=2, stopping_criteria=counting, max_new_tokens=4)
    assert len(num_rows) == 4


def test_time_per_token_counts_the_batchs_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that stops early must not look slow because others went on."""
    lm, queries = attach("qwen2"), list[Query]()
    real = Generator.run
    monkeypatch.setattr(Generator, "run", lambda own, given, *args: (queries.extend(given), real(own, given, *args))[1])
    ids, mask = ragged()
    for decoding in ("fast", "plain"):
        queries.clear()
        options = {"decoding": decoding, "stopping_criteria": [Watch([2, 12, 7])], "max_new_tokens": 15}
        lm.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=[], **options)
        assert [len(query.generated) for query in queries] == [2, 12, 7]
        assert len({query.tpot_s for query in queries}) == 1 and queries[0].tpot_s > 0


class Begun(Watch):
    def __init__(self) -> None:
        super().__init__([99])
        self.begun: list[int] = []

    def begin(self, num_prompt_tokens: int) -> None:
        self.begun.append(num_prompt_tokens)


@pytest.mark.parametrize("decoding", ["fast", "plain"])
def test_criteria_are_told_where_each_generation_begins(decoding: str) -> None:
    """Each round of re-retrieval is one, behind prompts of its own width."""
    lm, criterion = attach(retrieve_every=4), Begun()
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": [], "decoding": decoding}
    lm.generate(random_ids(40)[None], stopping_criteria=[criterion], **options)
    widths = [len(ids[0]) - 1 for ids, _, _ in criterion.calls]
    assert len(widths) == 10 and criterion.begun == [widths[0], widths[4], widths[8]]


@pytest.mark.parametrize("value", [-1, 1.5, "all"])
def test_steps_ahead_are_a_whole_number(value: Any) -> None:
    with pytest.raises(UserError, match="decode_ahead must be a whole number from 0 on"):
        attach().generate(random_ids(20)[None], decode_ahead=value)


def test_misspelt_options_of_our_own_are_recognised() -> None:
    with pytest.raises(UserError, match="Did you mean 'decode_ahead'"):
        GenerateOptions(tiny_model("llama"), {"decode_ahed": 3}, (EOS,), EOS, None)
