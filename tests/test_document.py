"""Documents, questions, conversations and streams on tiny models with a real tokenizer (F10)."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria

from grids import some
from retrolm.config import RetroConfig
from retrolm.engine.document import Document
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from tiny_models import stock_logits, tiny_model, wide_softmax
from tiny_tokenizer import STORY, tiny_tokenizer

W = 8
QUESTION = "What did the captain count?"


def story(num_chars: int, skip: int = 0) -> str:
    return (STORY * 9)[skip : skip + num_chars]


def make(name: str = "llama", chat: bool = True, **options: Any) -> RetroLM:
    model = tiny_model(name, vocab_size=600)
    config = RetroConfig.from_options({"kv_budget": 320, "page_size": W, "chunk_pages": 5, **options})
    return RetroLM(model, tiny_tokenizer(chat), config=config)


def stock_answer(lm: RetroLM, ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy tokens of the unmodified model behind `ids`."""
    with wide_softmax():
        out = lm.model.generate(
            torch.tensor([ids]),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=list(lm.eos_ids),
        )
    return out[0, len(ids) :].tolist()


def encode(lm: RetroLM, text: str) -> list[int]:
    found: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def all_ids(document: Document) -> list[int]:
    return [token for page in document.token_ids for token in page]


# --- budget >= text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "mistral-sliding", "phi3"])
def test_answer_equals_the_stock_model_on_the_joined_ids(name: str, chat: bool) -> None:
    """The question is a page of its own, whatever page the text ends in (F10)."""
    lm = make(name, chat)
    text = story(330)
    document = lm.read(text)
    ids = [*(lm.format.prefix_ids if lm.format else ()), *encode(lm, text), *lm.question_ids(QUESTION)]
    with wide_softmax():
        answer = document.ask(QUESTION, max_new_tokens=15, do_sample=False)
    assert list(answer.token_ids) == stock_answer(lm, ids, 15)
    assert all_ids(document) + lm.question_ids(QUESTION) == ids


@pytest.mark.parametrize("prefix_page", [True, False])
@pytest.mark.parametrize("page_size", [3, 5, 64])
def test_any_page_size(page_size: int, prefix_page: bool) -> None:
    """With pages of 3 tokens the prefix takes several pages, the question many."""
    lm = make(page_size=page_size, prefix_page=prefix_page)
    document = lm.read(story(300))
    answer = document.ask(QUESTION, max_new_tokens=10, do_sample=False)
    assert lm.format is not None
    assert all_ids(document) == [*lm.format.prefix_ids, *encode(lm, story(300))]
    assert list(answer.token_ids) == stock_answer(lm, all_ids(document) + lm.question_ids(QUESTION), 10)
    ends = document.table.lengths.cumsum(0).tolist()
    assert [span == (0, 0) for span in document.page_spans] == [end <= len(lm.format.prefix_ids) for end in ends]


def test_raw_question_is_taken_as_it_is() -> None:
    lm = make(chat=False)
    document = lm.read(story(200))
    answer = document.ask(" Seven of", raw=True, max_new_tokens=5, do_sample=False)
    ids = all_ids(document) + encode(lm, " Seven of\nAnswer:")
    assert list(answer.token_ids) == stock_answer(lm, ids, 5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("retrieve_every", [0, 5])
def test_conversation_equals_the_stock_model_on_the_joined_ids(name: str, retrieve_every: int) -> None:
    lm = make(name, retrieve_every=retrieve_every)
    document = lm.read(story(250))
    talk, ids = document.conversation(), all_ids(document)
    for turn, question in enumerate(("What is it?", "And what else?", "Why?")):
        ids += lm.question_ids(question, follow_up=turn > 0)
        with wide_softmax():
            answer = talk.ask(question, max_new_tokens=9 + 2 * turn, do_sample=False)
        assert list(answer.token_ids) == stock_answer(lm, ids, 9 + 2 * turn)
        ids += [token for token in answer.token_ids if token not in lm.eos_ids]


# --- batches -------------------------------------------------------------------------------------------------------

TEXTS = [story(500), story(90, 7), story(11, 40), story(301, 100)]
QUESTIONS = [
    "What is the grass?",
    "Who?",
    "How many houses were there on the shore, and who counted the lamps that night?",
]


@pytest.mark.parametrize(
    ("name", "device_kv_bytes"), some(["llama", "qwen2", "gemma3", "mistral-sliding"], [None, 480_000], each=1)
)
def test_batches_equal_one_at_a_time(name: str, device_kv_bytes: int | None) -> None:
    """Ragged documents read side by side, ragged questions asked at once, on a budget smaller than the texts."""
    options: dict[str, Any] = {"kv_budget": 112, "device_kv_bytes": device_kv_bytes}
    lm = make(name, **options)
    documents = lm.read(TEXTS)
    pairs = [(document, question) for document in documents for question in QUESTIONS]
    together = lm.ask_batch(pairs, max_new_tokens=8, do_sample=False)
    alone = [make(name, kv_budget=112).read(text) for text in TEXTS]
    for answer, (document, question) in zip(together, [(d, q) for d in alone for q in QUESTIONS], strict=True):
        expected = document.ask(question, max_new_tokens=8, do_sample=False)
        assert answer.token_ids == expected.token_ids
        assert torch.equal(answer.retrieval.page_ids, expected.retrieval.page_ids)
        assert torch.allclose(answer.retrieval.scores, expected.retrieval.scores, atol=1e-5, equal_nan=True)
        assert answer.attended_tokens["decode"] == expected.attended_tokens["decode"]


def test_answers_come_in_the_order_of_the_questions_across_stores() -> None:
    lm = make()
    one, two = lm.read(TEXTS[0]), lm.read(TEXTS[3])
    pairs = [(one, "Who?"), (two, "Who?"), (one, "Why?"), (two, "Why?")]
    together = lm.ask_batch(pairs, max_new_tokens=6, do_sample=False)
    alone = [document.ask(question, max_new_tokens=6, do_sample=False) for document, question in pairs]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_asking_leaves_the_document_as_it_was() -> None:
    lm = make(kv_budget=112)
    document = lm.read(TEXTS[0])
    used = document.encoder.parts.store.num_used
    first = document.ask(QUESTION, max_new_tokens=8, do_sample=False)
    document.ask(QUESTIONS, max_new_tokens=8, do_sample=False)
    document.retrieve("Who?")
    talk = document.conversation()
    opening = talk.ask("Who?", max_new_tokens=20, do_sample=False)
    talk.ask("Why?", max_new_tokens=20, do_sample=False)
    talk.close()
    assert talk.ask("Who?", max_new_tokens=20, do_sample=False).token_ids == opening.token_ids
    talk.close()
    again = document.ask(QUESTION, max_new_tokens=8, do_sample=False)
    assert (again.token_ids, again.pages) == (first.token_ids, first.pages)
    assert document.encoder.parts.store.num_used == used


# --- what a document and an answer say -----------------------------------------------------------------------------


def test_pages_span_the_text() -> None:
    lm = make()
    text = story(333)
    document = lm.read(text)
    spans = [span for span in document.page_spans if span != (0, 0)]
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    for page, (start, end) in enumerate(document.page_spans):
        if end:
            assert document.page_text(page) == text[start:end] == lm.tokenizer.decode(document.token_ids[page])
    assert document.num_pages == len(document.page_spans) == len(document.token_ids)
    assert document.num_tokens == len(all_ids(document))


def test_retrieval_says_what_was_attended() -> None:
    lm = make(kv_budget=112)
    document = lm.read(TEXTS[0])
    found = document.retrieve(QUESTION)
    answer = document.ask(QUESTION, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.page_ids, answer.retrieval.page_ids)
    num_layers = lm.backbone.num_layers
    assert found.page_ids.shape[0] == num_layers and found.scores.shape == (num_layers, document.num_pages)
    assert found.scores[0].isnan().all() and found.scores[1:].isfinite().all()
    for layer in range(num_layers):
        chosen = [page for page in found.page_ids[layer].tolist() if page >= 0]
        assert chosen == sorted(set(chosen)) and set(range(document.table.num_sink)) <= set(chosen)
        assert document.num_pages - 1 in chosen
    assert found.pages
    for use in found.pages:
        assert use.text == TEXTS[0][use.start_char : use.end_char]
        assert use.score == len(use.layers) / (num_layers - 1)
    assert [use.score for use in found.pages] == sorted((use.score for use in found.pages), reverse=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral-sliding"])
@pytest.mark.parametrize("strict", [True, False])
def test_attended_tokens_and_positions_stay_within_the_budget(name: str, strict: bool) -> None:
    lm = make(name, kv_budget=112, strict_budget=strict)
    question = lm.question_ids(QUESTION)
    for num_chars in (120, 600, 2000):
        answer = lm.read(story(num_chars)).ask(QUESTION, max_new_tokens=12, do_sample=False)
        new = len(answer.token_ids)
        over = 0 if strict else len(question)
        assert answer.attended_tokens["prefill"] <= 112 + over
        assert answer.attended_tokens["decode"] <= answer.attended_tokens["prefill"] + new
        assert answer.max_position < 112 + over + new
    assert answer.attended_tokens["prefill"] > 112 - W


def test_sliding_layers_are_reported_apart() -> None:
    """A window wider than the budget is attended in full, outside the budget, and said."""
    model = tiny_model("gemma2", vocab_size=600, sliding_window=200)
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=112, page_size=W))
    answer = lm.read(story(1500)).ask("Who?", max_new_tokens=4, do_sample=False)
    assert answer.attended_tokens["prefill"] <= 112
    assert answer.attended_tokens["sliding"] == 200
    assert "sliding" not in make().read(story(100)).ask("Who?", max_new_tokens=2).attended_tokens


def test_kv_bytes_are_those_of_the_pages() -> None:
    lm = make()
    document = lm.read(story(400))
    answer = document.ask("Who?", max_new_tokens=2)
    page_bytes = 2 * W * 2 * 12 * 8  # K and V, tokens, KV heads, head dim, float64
    assert answer.kv_bytes["device"] == document.num_pages * page_bytes * lm.backbone.num_layers
    assert answer.kv_bytes["host"] == 0
    tokens = document.num_tokens + len(lm.question_ids("Who?"))
    assert answer.kv_bytes["cache"] == 2 * tokens * 2 * 12 * 8 * lm.backbone.num_layers


def test_only_the_page_store_grows_with_the_text() -> None:
    """Cache and positions are of one size for any length; the store and the index grow with the pages (F12)."""
    lm = make(kv_budget=112)
    token_bytes = 2 * 2 * 12 * 8 * lm.backbone.num_layers  # K and V, KV heads, head dim, float64
    for repeats in (4, 8, 16):
        document = lm.read(STORY * repeats)
        answer = document.ask("Who?", max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert answer.kv_bytes["device"] == document.num_pages * W * token_bytes
        assert document.encoder.parts.digests.bytes() < answer.kv_bytes["device"] / 4
        assert (112 - W) * token_bytes < answer.kv_bytes["cache"] <= 112 * token_bytes
        assert 112 - W < answer.max_position < 112 + 3


def test_truncated_tells_a_cut_answer_from_an_ended_one() -> None:
    lm = make()
    document = lm.read(story(100))
    cut = document.ask("Who?", max_new_tokens=6, do_sample=False, eos_token_id=None)
    ended = document.ask("Who?", max_new_tokens=6, do_sample=False, eos_token_id=cut.token_ids[5])
    assert cut.truncated and not ended.truncated
    assert len(cut.token_ids) == 6


def test_token_ids_and_files_can_be_read(tmp_path: Path) -> None:
    lm = make()
    path = tmp_path / "book.txt"
    path.write_text(story(200), encoding="utf-8")
    ids = encode(lm, story(200))
    documents = [lm.read(path), lm.read(story(200)), lm.read(torch.tensor(ids)), lm.read(ids)]
    answers = [document.ask("Who?", max_new_tokens=5, do_sample=False).token_ids for document in documents]
    assert len(set(answers)) == 1
    assert [document.page_spans[-1] for document in documents[2:]] == [(0, 0), (0, 0)]
    assert documents[2].page_text(3) == documents[1].page_text(3)


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=60), prefix_page=st.booleans())
def test_any_text_can_be_read(text: str, prefix_page: bool) -> None:
    """Spans cover the text; a character of several tokens may belong to two pages."""
    lm = make(prefix_page=prefix_page)
    try:
        document = lm.read(text)
    except UserError:
        assert not text.strip()
        return
    finally:
        lm.detach()
    spans = [span for span in document.page_spans if span[1]]
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(right[0] <= left[1] <= right[0] + 1 for left, right in pairwise(spans))
    assert lm.tokenizer.decode(all_ids(document)).endswith(text)


@pytest.mark.parametrize(("page_size", "num_sink"), [(3, 3), (5, 2), (8, 1)])
def test_holes_in_sink_pages_are_not_attended(page_size: int, num_sink: int) -> None:
    """A prefix that ends inside a page leaves room behind it empty; the budget counts tokens, not room."""
    lm = make(page_size=page_size, kv_budget=112)
    document = lm.read(story(1200))
    assert document.table.num_sink == num_sink
    assert 112 - page_size < document.peak_attended <= 112


def test_progress_counts_pages() -> None:
    seen: list[tuple[int, int]] = []
    lm = make()
    documents = lm.read([story(300), story(100)], progress=lambda done, total: seen.append((done, total)))
    total = sum(document.num_pages for document in documents)
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrieve_every", [0, 4])
def test_stream_yields_the_answer(retrieve_every: int) -> None:
    lm = make(retrieve_every=retrieve_every)
    document = lm.read(story(200))
    pieces = list(document.stream("Who?", max_new_tokens=15, do_sample=False))
    answer = document.ask("Who?", max_new_tokens=15, do_sample=False)
    assert len(pieces) > 1 and "".join(pieces).strip() == answer.text


def test_closing_a_stream_stops_generating() -> None:
    lm = make()
    document = lm.read(story(200))
    used, threads = document.encoder.parts.store.num_used, threading.active_count()
    stream = document.stream("Who?", max_new_tokens=300, do_sample=False, eos_token_id=None)
    next(stream)
    started = time.perf_counter()
    stream.close()
    stopped = time.perf_counter() - started
    assert document.encoder.parts.store.num_used == used and threading.active_count() == threads
    started = time.perf_counter()
    document.ask("Who?", max_new_tokens=300, do_sample=False, eos_token_id=None)
    assert stopped < (time.perf_counter() - started) / 2


def test_errors_of_a_stream_reach_the_reader() -> None:
    document = make().read(story(100))
    with pytest.raises(UserError, match="Did you mean 'top_k'"):
        list(document.stream("Who?", topk=3))


class Fail(StoppingCriteria):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of luck")


def test_a_failed_answer_gives_its_pages_back() -> None:
    lm = make(retrieve_every=3)
    document = lm.read(story(100))
    used = document.encoder.parts.store.num_used
    for ask in (document.ask, document.conversation().ask):
        with pytest.raises(RuntimeError, match="out of luck"):
            ask("Who?", max_new_tokens=9, stopping_criteria=[Fail()])
    assert document.encoder.parts.store.num_used == used
    with torch.no_grad():
        assert stock_logits(lm.model, torch.tensor([2, 3, 4])).isfinite().all()


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "  \n\t ", [], torch.tensor([]), Path("/nowhere/book.txt"), [[]], 17])
def test_nothing_to_read(source: Any) -> None:
    with pytest.raises(UserError):
        make().read(source)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for ids in ([5, 600], [-1, 5]):
        with pytest.raises(UserError, match="600"):
            make().read(torch.tensor(ids))
        with pytest.raises(UserError, match="600"):
            make().generate(torch.tensor([ids]))


def test_question_without_words_or_too_long() -> None:
    document = make(kv_budget=112).read(story(1000))
    with pytest.raises(UserError, match="empty"):
        document.ask("  ")
    for ask in (document.ask, document.retrieve, document.conversation().ask, lambda q: list(document.stream(q))):
        with pytest.raises(UserError, match=r"takes \d+ tokens .*kv_budget=112"):
            ask("Who? " * 100)


@pytest.mark.parametrize("strict", [True, False])
def test_question_longer_than_the_budget_is_refused_for_short_texts_too(strict: bool) -> None:
    document = make(kv_budget=112, strict_budget=strict, chat=False).read("Here we go.")
    with pytest.raises(UserError, match="kv_budget=112"):
        document.ask("Who? " * 100)


def test_prefix_that_fills_the_budget_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    lm = RetroLM(tiny_model("llama", vocab_size=600), tokenizer, config=RetroConfig(kv_budget=24, page_size=8))
    object.__setattr__(lm.format, "prefix_ids", tuple(range(2, 22)))
    with pytest.raises(UserError, match="20 tokens"):
        lm.read(story(300))


def test_reading_text_or_asking_needs_a_tokenizer() -> None:
    lm = RetroLM(tiny_model("llama"), config=RetroConfig(kv_budget=64, page_size=W))
    with pytest.raises(UserError, match="tokenizer"):
        lm.read("some text")
    with pytest.raises(UserError, match="tokenizer"):
        lm.read([5, 6, 7]).ask("Who?")


def test_closed_documents_say_so() -> None:
    lm = make()
    one, two = lm.read([story(100), story(150)])
    expected = two.ask("Who?", max_new_tokens=4, do_sample=False).token_ids
    one.close()
    one.close()
    for ask in (one.ask, one.retrieve, one.conversation().ask, lambda q: list(one.stream(q))):
        with pytest.raises(UserError, match="closed"):
            ask("Who?")
    assert two.ask("Who?", max_new_tokens=4, do_sample=False).token_ids == expected


def test_a_question_has_one_answer() -> None:
    with pytest.raises(UserError, match="num_return_sequences"):
        make().read(story(50)).ask("Who?", do_sample=True, num_return_sequences=2)


def test_no_questions_no_answers() -> None:
    assert make().read(story(50)).ask([]) == []
