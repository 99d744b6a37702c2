"""Where the engine's own loop is the default, evaluation decodes with it: the same answers, and rows that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from grids import some
from retrolm.engine.fast_decode import FastDecode
from retrolm.evaluation.journal import read_lines
from retrolm.evaluation.plain_prompts import PlainPrompts
from retrolm.evaluation.readers import Prediction, RetroReader
from retrolm.evaluation.runner import SAMPLES_FILE
from retrolm.evaluation.tasks import EvalSample
from retrolm.evaluation.variants import Variant
from tiny_eval import run_stories, story_sample, tiny_lm

LOOP = "fused layers, no graph"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastDecode, "pays", lambda fast: True)


def stopping_samples(stops: list[str]) -> list[EvalSample]:
    """Stories of unlike lengths with the same stop strings."""
    return [
        story_sample(number, 300 + 137 * number, max_new_tokens=24, extra={"stop": stops, "first_line": True})
        for number in range(3)
    ]


def outcome(found: list[Prediction]) -> list[tuple[object, ...]]:
    return [(p.text, p.num_generated, p.truncated, p.attended_tokens) for p in found]


@pytest.mark.parametrize(("method", "place"), some(["retrolm", "recency", "full", "snapkv"], [2, 5], each=1))
def test_answers_that_stop_apart_are_the_same(method: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(method=method)
    reader = RetroReader(lm)
    free = reader.answer(stopping_samples([]))
    samples = stopping_samples([free[1].text[place : place + 2], free[2].text[3 * place]])
    plain = reader.answer(samples)
    monkeypatch.setattr(FastDecode, "pays", lambda fast: True)
    loop = reader.answer(samples)
    assert {p.decode_path for p in plain} == {"generate"} and {p.decode_path for p in loop} == {LOOP}
    assert outcome(loop) == outcome(plain)
    assert len({p.num_generated for p in loop}) > 1
    assert len({p.tpot_s for p in loop}) == 1  # of the batch, however early a row stopped
    apart = [reader.answer([sample])[0] for sample in samples]
    assert [p.text for p in apart] == [p.text for p in loop]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_rows_say_what_decoded(tmp_path: Path) -> None:
    variants = [Variant("full"), Variant("retrolm", 64, "none"), Variant("snapkv", 64)]
    run_stories(tmp_path, variants=variants, batch_size=2, extra=stopping_samples(["e"]))
    rows = list(read_lines(tmp_path / SAMPLES_FILE))
    assert not any(row["failed"] for row in rows)
    paths = {(row["method"], row["decode_path"]) for row in rows}
    assert paths == {("full", LOOP), ("retrolm", LOOP), ("snapkv", LOOP)}


@pytest.mark.usefixtures("as_on_a_gpu")
def test_plain_prompts_stop_in_the_loop_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PlainPrompts(tiny_lm(chat=False))
    texts = ["It was late when the ship came in. " * n for n in (2, 9)]
    free = prompts.continue_all(texts, 20)
    stops = [free[0][4:6], free[1][7]]
    loop = prompts.continue_all(texts, 20, stops)
    monkeypatch.setattr(FastDecode, "pays", lambda fast: False)
    assert loop == prompts.continue_all(texts, 20, stops)
    assert all(len(text) < len(whole) for text, whole in zip(loop, free, strict=True))


@pytest.mark.parametrize("name", ["gemma3", "mistral-sliding"])
def test_each_prompt_of_a_batch_begins_anew(name: str) -> None:
    """Sliding models answer dense prompts one after the other: a longer one's end is not the answer."""
    reader, samples = RetroReader(tiny_lm(name, method="full")), stopping_samples([])
    assert "\n" in samples[0].question  # which must not count as the end of an answer's first line
    apart = [reader.answer([sample])[0] for sample in samples]
    assert outcome(reader.answer(samples)) == outcome(apart)
    assert max(p.num_generated for p in apart) > 3
