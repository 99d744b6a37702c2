"""Readers: the same ids for every method, dense attention as the stock model has it, answers that stop in time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from retrolm.engine.stock import can_join, stock_answers
from retrolm.errors import UserError
from retrolm.evaluation.readers import Prediction, RetroReader, prompt_of
from retrolm.evaluation.stopping import StopAfter, cut_answer, stop_strings
from retrolm.evaluation.tasks import render
from retrolm.methods import METHODS, BudgetError
from tiny_eval import story_sample, tiny_lm
from tiny_tokenizer import tiny_tokenizer

SAMPLES = [story_sample(number, 300 + 37 * number) for number in range(3)]


def texts(found: Sequence[Prediction]) -> list[str]:
    return [prediction.text for prediction in found]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("sample_chat", [True, False])
def test_a_prompt_reads_as_the_benchmark_wants_it(chat: bool, sample_chat: bool) -> None:
    lm = tiny_lm(chat=chat)
    sample = story_sample(0, chat=sample_chat)
    wanted = render(lm.tokenizer, sample.context + sample.question, sample.answer_prefix, sample.chat)
    assert lm.tokenizer.decode(prompt_of(lm, sample).ids) == wanted
    assert wanted.endswith("It was")


def test_the_engine_and_dense_attention_see_the_same_ids() -> None:
    """With a budget that holds the text both are the stock model."""
    lm = tiny_lm(kv_budget=400)
    ours = RetroReader(lm).answer(SAMPLES)
    lm.detach()
    dense = RetroReader(tiny_lm(method="full")).answer(SAMPLES)
    assert texts(ours) == texts(dense)
    assert [p.num_tokens for p in ours] == [p.num_tokens for p in dense] == [len(prompt_of(lm, s).ids) for s in SAMPLES]
    assert all(p.attended_tokens["decode"] == p.num_tokens + p.num_generated - 1 for p in dense)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "llama-dynamic"])
def test_dense_answers_do_not_depend_on_the_batch(name: str) -> None:
    lm = tiny_lm(name)
    prompts = [prompt_of(lm, sample).ids for sample in SAMPLES]
    together = stock_answers(lm, prompts, max_new_tokens=8, do_sample=False)
    apart = [stock_answers(lm, [ids], max_new_tokens=8, do_sample=False)[0] for ids in prompts]
    stock = [
        lm.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=1)[0, len(ids) :]
        for ids in prompts
    ]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in apart]
    assert [answer.token_ids for answer in apart] == [tuple(row.tolist()) for row in stock]
    assert can_join(lm) == (name in ("llama", "qwen2"))


def test_engine_answers_do_not_depend_on_the_batch() -> None:
    lm = tiny_lm()
    apart = [RetroReader(lm).answer([sample])[0] for sample in SAMPLES]
    assert texts(RetroReader(lm).answer(SAMPLES)) == texts(apart)


def test_raw_samples_do_not_disturb_chat_samples() -> None:
    lm = tiny_lm()
    before = RetroReader(lm).answer([SAMPLES[0]])
    raw = RetroReader(lm).answer([story_sample(0, 300, chat=False)])
    assert raw[0].num_tokens < before[0].num_tokens
    assert texts(RetroReader(lm).answer([SAMPLES[0]])) == texts(before)


def test_pages_go_back_to_the_store_and_are_kept_on_demand() -> None:
    lm = tiny_lm()
    (kept,) = RetroReader(lm, keep_pages=True).answer(SAMPLES[:1])
    (plain,) = RetroReader(lm).answer(SAMPLES[:1])
    assert plain.pages is None and kept.pages is not None
    assert len(kept.pages["layers"]) == lm.backbone.num_layers
    assert {"page", "score", "layers"} == set(kept.pages["ranked"][0])


def test_attending_more_than_the_budget_is_an_error() -> None:
    method = METHODS.get("retrolm")()
    allowed = {"prefill": 64, "decode": 69}
    method.check_attended(allowed, num_tokens=200, num_generated=6, allowed=64)
    method.check_attended({"prefill": 90, "decode": 90}, num_tokens=60, num_generated=1, allowed=64)
    for attended in ({"prefill": 65, "decode": 65}, {"prefill": 64, "decode": 70}):
        with pytest.raises(BudgetError, match="budget is 64"):
            method.check_attended(attended, num_tokens=200, num_generated=6, allowed=64)


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("Paris\nBecause", ["\n"], "Paris"),
        ("\n\n Paris \nBecause", ["\n"], "Paris"),
        ("one two", [], "one two"),
        ("a; b. c", [".", ";"], "a"),
        ("", ["\n"], ""),
    ],
)
def test_answers_are_cut_at_the_first_stop(text: str, stops: list[str], wanted: str) -> None:
    assert cut_answer(text, stops) == wanted


def test_first_line_means_stop_at_a_line_break() -> None:
    assert stop_strings(story_sample(0, extra={"first_line": True})) == ("\n",)
    assert stop_strings(story_sample(0, extra={"first_line": True, "stop": ["\n", "##"]})) == ("\n", "##")
    assert stop_strings(story_sample(0)) == ()


def test_rows_stop_one_by_one_and_not_in_the_prompt() -> None:
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    prompt, line, letter = ids("\n\n")[:1], ids("\n")[0], ids("x")[0]
    stop = StopAfter(tokenizer, ["\n"])
    scores = torch.zeros(2, 1)
    steps = [[line, letter], [letter, letter], [letter, line]]
    found, rows = [], [list(prompt), list(prompt)]
    for step in steps:
        rows = [[*row, token] for row, token in zip(rows, step, strict=True)]
        found.append(stop(torch.tensor(rows), scores).tolist())
    assert found == [[False, False], [False, False], [False, True]]


@pytest.mark.parametrize("method", ["full", "retrolm"])
def test_generation_ends_at_a_stop_string(method: str) -> None:
    reader = RetroReader(tiny_lm(method=method))
    (free,) = reader.answer([story_sample(0)])
    letter = free.text[2]
    (stopped,) = reader.answer([story_sample(0, extra={"stop": [letter]})])
    assert stopped.text == free.text[: free.text.index(letter)].rstrip()
    assert stopped.num_generated < free.num_generated


def test_exact_ids_are_checked() -> None:
    lm = tiny_lm()
    with pytest.raises(UserError, match="question is empty"):
        lm.question_ids([])
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        lm.question_ids([600])
    assert lm.question_ids((3, 4)) == [3, 4]


def test_predictions_state_what_was_attended() -> None:
    (found,) = RetroReader(tiny_lm()).answer([story_sample(0, 900)])
    assert 24 < found.attended_tokens["prefill"] <= 64 < found.num_tokens
    assert found.ttft_s > found.prefill_s > 0
