"""Words that a page shares with the question, beside what layers agree on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrolm.cli.settings import parse_settings
from retrolm.config import RetroConfig
from retrolm.cut_sentences import with_cut_sentences
from retrolm.engine.agreement import with_words
from retrolm.engine.model import RetroLM
from retrolm.engine.page_asking import question_ids
from retrolm.engine.page_words import PageWords
from retrolm.errors import UserError
from retrolm.word_index import words
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W = 16
KEY = "The key of the red house is 4711. "
QUESTION = "What is the key of the red house?"


def make(**options: Any) -> RetroLM:
    settings = {"kv_budget": 6 * W, "page_size": W, "agreement_layers": 2, "word_weight": 50.0, **options}
    return RetroLM(tiny_model("llama", vocab_size=600), tiny_tokenizer(), config=RetroConfig(**settings))


def naive_bm25(question: str, texts: list[str]) -> list[float]:
    """Lucene's BM25 in loops, in doubles: k1 = 1.5, b = 0.75, a question's word as often as it stands there."""
    pages = [words(text) for text in texts]
    mean = sum(map(len, pages)) / len(pages)
    scores = []
    for page in pages:
        total = 0.0
        for word in words(question):
            holding = sum(word in other for other in pages)
            idf = math.log(1 + (len(pages) - holding + 0.5) / (holding + 0.5))
            often = page.count(word)
            total += idf * often / (often + 1.5 * (0.25 + 0.75 * len(page) / mean))
        scores.append(total)
    return scores


def test_matches_are_bm25_over_the_words_of_pages() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["The grass is green.", "", "A lamp, a lamp and a LAMP.", " Who counted 12 lamps? Nobody did."]
    pages = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    read = [tokenizer.decode(page) for page in pages]
    found = PageWords(tokenizer)
    for question in ("a lamp", "green lamp green", "nothing of that", "12 12"):
        asked = tokenizer(question, add_special_tokens=False)["input_ids"]
        expected = torch.tensor(naive_bm25(tokenizer.decode(asked), read))
        scores = found.matches(pages, asked)
        assert scores.dtype == torch.float32 and torch.allclose(scores, expected, atol=1e-5)
    assert found.matches(pages[:1], pages[0]).shape == (1,)  # other pages are indexed anew


def test_a_sentence_that_a_border_cuts_is_found_on_both_pages() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(STORY * 4 + KEY + STORY * 2, add_special_tokens=False)["input_ids"]
    asked = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    start, end = (
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (STORY * 4, STORY * 4 + KEY[:-2])
    )
    for cut in range(start + 1, end):
        pages = [ids[: cut - 4 * W], ids[cut - 4 * W : cut], ids[cut : cut + 4 * W], ids[cut + 4 * W :]]
        scores = PageWords(tokenizer).matches(pages, asked)
        assert set(scores.topk(2).indices.tolist()) == {1, 2}, cut - start


def test_no_sentence_runs_over_a_short_page() -> None:
    """Behind a page that isn't full another text begins: its first sentence is no part of the one before."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(STORY * 2, add_special_tokens=False)["input_ids"]
    key = tokenizer(KEY, add_special_tokens=False)["input_ids"][:-4]
    asked = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    width = max(2 * W, len(key) + 1)
    first = [*ids[: width - len(key) - 1], *key]
    pages = [ids[:width], first, ids[7 : 7 + width], ids[:width]]
    apart = PageWords(tokenizer, page_size=width).matches(pages, asked)
    alone = PageWords(tokenizer, whole_sentences=False).matches(pages, asked)
    joined = PageWords(tokenizer).matches(pages, asked)
    assert apart.argmax() == 1 and joined[2] > apart[2] and alone[2] <= apart[2]


def test_all_layers_attend_the_page_that_holds_the_words() -> None:
    document = make(kv_budget=10 * W).read(STORY * 5 + KEY + STORY * 3)
    found = document.retrieve(QUESTION)
    pages = with_cut_sentences([document.lm.tokenizer.decode(ids) for ids in document.token_ids])
    scores = naive_bm25(QUESTION, pages)
    page = scores.index(max(scores))
    assert "key" in pages[page] and "4711" in pages[page]
    assert all(page in row.tolist() for row in found.page_ids)


def test_what_stands_around_a_question_is_not_looked_for() -> None:
    lm = make()
    document = lm.read(STORY * 5 + "Answer in few words. " + KEY + STORY * 2)
    asked = question_ids(lm, QUESTION)
    assert "few words" in lm.tokenizer.decode(asked)
    plain = lm.tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert torch.equal(
        document.words.matches(document.token_ids, asked), document.words.matches(document.token_ids, plain)
    )


def test_words_are_standardised_like_scores_and_added() -> None:
    agreed, matches = torch.tensor([1.0, 2, 3, 4, 0, 9]), torch.tensor([5.0, 0, 0, 6, 6, 1])
    together = with_words(agreed, matches, 2.0, num_sink=1, num_local=1)
    assert together is not None and torch.allclose(together[1:5], torch.tensor([0.0, 1, 6, 2]))
    assert with_words(None, agreed, 2.0, 1, 1) is None and with_words(agreed, matches, 0.0, 1, 1) is agreed
    tied = with_words(agreed, torch.zeros(6), 2.0, 1, 1)
    assert tied is not None and torch.equal(tied, agreed)


@pytest.mark.parametrize("options", [{}, {"retrieve_every": 3, "kv_budget": 10 * W}, {"store_bits": 8}], ids=str)
def test_in_a_batch_and_beyond_the_device_as_alone(options: dict[str, Any]) -> None:
    texts = [STORY * 5 + KEY + STORY, STORY[60:] * 3 + KEY + STORY * 2]
    alone = [make(**options).read(text).ask(QUESTION).token_ids for text in texts]
    lm, capped = make(**options), make(**options, device_kv_bytes=400_000)
    together = lm.ask_batch([(lm.read(text), QUESTION) for text in texts])
    assert [answer.token_ids for answer in together] == alone
    assert [capped.read(text).ask(QUESTION).token_ids for text in texts] == alone


def test_nothing_changes_where_all_pages_fit() -> None:
    answers = [make(word_weight=weight, kv_budget=512).read(STORY).ask(QUESTION) for weight in (0.0, 50.0)]
    assert answers[0].token_ids == answers[1].token_ids


def test_turns_of_a_conversation_are_looked_through() -> None:
    chat = make().read(STORY * 5).conversation()
    chat.ask(KEY)
    turn = chat._past.token_ids
    again = chat.ask(QUESTION)
    assert len(turn) > chat.document.num_pages and again.token_ids


def test_continued_prompts_look_for_words_too() -> None:
    lm = make()
    ids = lm.tokenizer(STORY * 5 + KEY + STORY * 2 + QUESTION, return_tensors="pt")["input_ids"]
    out = [make(word_weight=weight).generate(ids, max_new_tokens=8) for weight in (0.0, 50.0)]
    assert out[0].shape == out[1].shape and out[1].shape[1] == ids.shape[1] + 8


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(UserError, match="word_weight must be a number of at least 0, got -1"):
        RetroConfig(word_weight=-1)
    with pytest.raises(UserError, match="agreement_layers=0 leaves each layer"):
        RetroConfig(word_weight=1.0, agreement_layers=0)
    config = RetroConfig(kv_budget=6 * W, page_size=W, word_weight=1.0)
    with pytest.raises(UserError, match="needs a tokenizer"):
        RetroLM(tiny_model("llama", vocab_size=600), config=config)
    with pytest.raises(UserError, match="agreement_layers=0 leaves each layer"):
        RetroLM(tiny_model("llama", vocab_size=600), tiny_tokenizer(), config=config, method="quest_pages")
    assert parse_settings(["word_weight=0.5"]) == {"word_weight": 0.5}
    with pytest.raises(UserError, match="word_weight must be a number, got 'much'"):
        parse_settings(["word_weight=much"])


def test_pages_keep_the_space_that_some_tokenizers_drop_at_the_beginning() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "▁the": 1, "▁red": 2, "▁house": 3}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([3]) == "house"
    scores = PageWords(tokenizer).matches([[1, 2], [3, 1]], [3])
    assert scores.min() > 0  # "the red house the", not "the redhouse the"
