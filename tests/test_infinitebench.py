"""InfiniteBench: prompts of three variants, synthetic tasks made anew, scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.evaluation.tasks import get_task
from retrolm.evaluation.tasks.infinitebench_generate import RANKS, ranked_number
from retrolm.evaluation.tasks.sample import EvalSample
from tiny_tokenizer import tiny_tokenizer

BOOK = "Jane walked to the mill. " * 60
OPTIONS = ["a mill", "a ship", "a lamp", "a bow"]
SYNTHETIC = ("math_find", "passkey", "number_string", "kv_retrieval")
BASE_QA = "Read the book and answer the question. Be very concise in your answer.\n\n{}\n\nQuestion: What?\nAnswer:"
BASE_CHOICE = (
    "Read the book and answer the question.\n\n{}\n\nQuestion: What?\nA. a mill\nB. a ship\nC. a lamp\nD. a bow\n\n"
    "The letter of the correct answer is"
)
CHAT_CHOICE = (
    "Read the book and answer the question.\n\n{}\n\nQuestion: What?\n\nOnly one of the following options is correct, "
    "tell me the answer using one single letter (A, B, C, or D). Don't say anything else.\n"
    "A. a mill\nB. a ship\nC. a lamp\nD. a bow"
)
INFLLM_QA = (
    "Read the book below and answer a question.\n\n{}\n\nQuestion: What?\n\n"
    "Please answer as short as possible. The answer is:"
)
CHAT_QA = "Read the book below and answer a question.\n\n{}\n\nQuestion: What?\n\nBe very concise."


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "infinitebench"
    folder.mkdir()
    rows = {
        "longbook_qa_eng": {"answer": ["a mill", "mill"], "options": []},
        "longbook_sum_eng": {"answer": ["Jane walked."], "options": []},
        "longbook_choice_eng": {"answer": ["a lamp"], "options": OPTIONS},
    }
    for name, row in rows.items():
        full = {"id": 0, "context": BOOK, "input": "What?", **row}
        (folder / f"{name}.jsonl").write_text(json.dumps(full), encoding="utf-8")
    return folder.parent


def _sample(name: str, data_dir: Path, length: int | None = None, **options: Any) -> EvalSample:
    return get_task(f"infinitebench/{name}", **options).samples(tiny_tokenizer(), length, data_dir=data_dir)[0]


@pytest.mark.parametrize(
    "name, prompts, prompt, limit",
    [
        ("longbook_qa_eng", "base", BASE_QA, 40),
        ("longbook_qa_eng", "chat", CHAT_QA, 40),
        ("longbook_qa_eng", "infllm", INFLLM_QA, 32),
        ("longbook_sum_eng", "base", "Summarize the book below.\n\n{}\n\nSummary:", 1200),
        ("longbook_sum_eng", "chat", "Summarize the following book.\n\n{}", 1200),
        ("longbook_sum_eng", "infllm", "Summarize the following book.\n\n{}", 1536),
        ("longbook_choice_eng", "base", BASE_CHOICE, 40),
        ("longbook_choice_eng", "chat", CHAT_CHOICE, 40),
        ("longbook_choice_eng", "infllm", CHAT_CHOICE, 32),
    ],
)
def test_book_prompts(name: str, prompts: str, prompt: str, limit: int, data_dir: Path) -> None:
    sample = _sample(name, data_dir, prompts=prompts)
    assert sample.prompt == prompt.format(BOOK)
    assert sample.max_new_tokens == limit
    assert sample.chat is True
    assert _sample(name, data_dir, prompts=prompts, chat=False).chat is False


def test_books_are_cut_in_the_middle(data_dir: Path) -> None:
    tokenizer, length = tiny_tokenizer(), 201
    sample = _sample("longbook_qa_eng", data_dir, length)
    ids = tokenizer(BASE_QA.format(BOOK))["input_ids"]
    assert sample.prompt == tokenizer.decode(ids[: length // 2]) + tokenizer.decode(ids[-(length - length // 2) :])


def test_book_scores(data_dir: Path) -> None:
    choice = _sample("longbook_choice_eng", data_dir)
    assert choice.answers == ["a lamp", "C"]
    assert get_task("infinitebench/longbook_choice_eng").score("C", choice) == 1.0
    assert get_task("infinitebench/longbook_qa_eng").score("mill", _sample("longbook_qa_eng", data_dir)) == 1.0
    task, summary = get_task("infinitebench/longbook_sum_eng"), _sample("longbook_sum_eng", data_dir)
    assert task.score("jane walked", summary) == 1.0
    assert task.extra_scores("jane walked", summary)["rouge_l"] < 1.0  # the package `rouge` keeps upper case apart
    assert task.extra_scores("Jane walked.", summary)["rouge_l"] == pytest.approx(1.0)
    assert get_task("infinitebench/longbook_qa_eng").extra_scores("x", choice) == {}


def test_missing_books_and_wrong_prompts_are_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="xinrongzhang2022"):
        _sample("longbook_qa_eng", tmp_path)
    with pytest.raises(UserError, match="Allowed: base, chat\\."):
        get_task("infinitebench/passkey", prompts="infllm")
    with pytest.raises(UserError, match="Did you mean 'prompts'"):
        get_task("infinitebench/passkey", prompt="chat")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_tasks_fill_the_length_and_answer_themselves(name: str) -> None:
    task = get_task(f"infinitebench/{name}")
    samples = task.samples(tiny_tokenizer(), 1500, 14)
    assert len(samples) == 14
    for sample in samples:
        assert 1200 < sample.extra["num_tokens"] + sample.max_new_tokens <= 1500
        assert task.score(f"{sample.answers[0]}.", sample) == 1.0
        assert task.score("no", sample) == 0.0
        for start, end in sample.gold_spans:
            assert sample.answers[0] in sample.context[start:end]
    assert bool(samples[0].gold_spans) == (name != "math_find")


def test_chat_and_plain_samples_are_cached_apart(tmp_path: Path) -> None:
    sizes = set()
    for chat in (True, False):
        task = get_task("infinitebench/passkey", chat=chat)
        sample = task.samples(tiny_tokenizer(), 600, 1, cache_dir=tmp_path)[0]
        assert sample.chat is chat
        sizes.add(sample.extra["num_tokens"])
    assert len(sizes) == 2


def test_synthetic_tasks_have_the_benchmarks_natural_size() -> None:
    size = {"math_find": 60_000, "passkey": 5220, "kv_retrieval": 1855}
    for name, count in size.items():
        sample = get_task(f"infinitebench/{name}").samples(tiny_tokenizer(), None, 1)[0]
        units = {"math_find": ", ", "passkey": "Here we go.", "kv_retrieval": '": "'}[name]
        assert sample.context.count(units) == count - (name == "math_find")


def test_math_find_asks_all_kinds_and_knows_the_answer() -> None:
    samples = get_task("infinitebench/math_find").samples(tiny_tokenizer(), 1500, 14)
    assert [sample.extra["kind"] for sample in samples] == [*RANKS, *RANKS]
    for sample in samples:
        kind = sample.extra["kind"]
        assert sample.context.startswith(f"What is the {kind} number in the following list?\n\n[")
        assert sample.question == (
            f"\n\nYou should answer with only one number, no other words. The {kind} number of the list is: "
        )
        numbers = json.loads(sample.context.split("\n\n")[1])
        assert all(0 <= number <= 99 for number in numbers)
        assert sample.answers == [str(ranked_number(numbers, RANKS[kind]))]


@given(st.lists(st.integers(0, 99), min_size=3, max_size=30).filter(lambda numbers: len(set(numbers)) > 2))
def test_ranks_count_distinct_numbers(numbers: list[int]) -> None:
    ordered = sorted(set(numbers))
    assert [ranked_number(numbers, rank) for rank in (1, 2, 3)] == ordered[::-1][:3]
    assert [ranked_number(numbers, -rank) for rank in (1, 2, 3)] == ordered[:3]
    median = ranked_number(numbers, 0)
    assert isinstance(median, float) == (len(numbers) % 2 == 0)
    assert sum(number < median for number in numbers) <= len(numbers) / 2 >= sum(n > median for n in numbers)


def test_number_strings_repeat_digits() -> None:
    for sample in get_task("infinitebench/number_string").samples(tiny_tokenizer(), 600, 10):
        assert re.fullmatch(r"\d{10}", sample.answers[0])
        assert len(set(sample.answers[0])) <= 5


def test_key_value_context_is_json() -> None:
    sample = get_task("infinitebench/kv_retrieval").samples(tiny_tokenizer(), 1500, 1)[0]
    pairs = json.loads(sample.context.split("JSON data:\n")[1])
    key = re.findall(r'Key: "(.*)"', sample.question)[0]
    assert pairs[key] == sample.answers[0]
