"""RAG pipelines: chunks, rankings against loops, prompts put together, and the same answers as the stock model."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, BertTokenizerFast

import retrolm.rag.embedder
from retrolm.asked_words import query_of
from retrolm.bm25_library import load_bm25s
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.stock import stock_answers
from retrolm.errors import UserError
from retrolm.evaluation.readers import RetroReader
from retrolm.methods import METHODS
from retrolm.rag.bm25 import bm25_scores
from retrolm.rag.chunks import best_first, chunk_spans, that_fit
from retrolm.rag.embedder import Embedder, load_embedder
from retrolm.rag.hybrid import fused
from retrolm.rag.program import RagProgram
from tiny_eval import story_sample
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

CHUNKS = [
    "the captain counted the lamps on the bow",
    "the grass is green and the sky is blue",
    "nobody spoke when the ship came in",
    "seven lamps, said the captain: seven",
    "",
]


# --- chunks --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(num_tokens=st.integers(0, 500), size=st.integers(1, 60))
def test_chunks_cover_a_text_once(num_tokens: int, size: int) -> None:
    spans = chunk_spans(num_tokens, size)
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(num_tokens))
    assert all(stop - start == size for start, stop in spans[:-1])
    assert not spans or 0 < spans[-1][1] - spans[-1][0] <= size


@settings(max_examples=200, deadline=None)
@given(data=st.data(), room=st.integers(0, 200), count=st.integers(1, 12))
def test_chosen_chunks_fit(data: st.DataObject, room: int, count: int) -> None:
    spans = chunk_spans(data.draw(st.integers(1, 300)), data.draw(st.integers(1, 60)))
    ranked = data.draw(st.permutations(range(len(spans))))
    sizes = [stop - start for start, stop in spans]
    chosen = that_fit(spans, ranked, count, room)
    assert sum(sizes[i] for i in chosen) <= room and len(chosen) <= count
    assert chosen == [i for i in ranked[:count] if i in chosen]
    for left_out in set(ranked[:count]) - set(chosen):
        better = [i for i in chosen if ranked.index(i) < ranked.index(left_out)]
        assert sum(sizes[i] for i in better) + sizes[left_out] > room


def test_equal_scores_rank_the_earlier_chunk_first() -> None:
    assert best_first([1.0, 3.0, 1.0, 3.0]) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("\nAnswer the question.\n\nQuestion: Who spoke?\nAnswer:", "Who spoke?"),
        ("Question: One?\nAnswer: x\nQuestion: Two\nlines?\n Answer", "Two\nlines?"),
        ("Who spoke? ", "Who spoke?"),
        ("Write it down.\nQuestion: \nAnswer:", "Write it down.\nQuestion: \nAnswer:"),
    ],
)
def test_the_question_is_searched_for_without_its_instructions(text: str, query: str) -> None:
    assert query_of(text) == query


# --- rankings ------------------------------------------------------------------------------------------------------


def bm25_by_hand(query: str, chunks: Sequence[str]) -> list[float]:
    """Lucene's formula in loops."""
    rows = [re.findall(r"\w+", chunk.lower()) for chunk in chunks]
    mean = sum(map(len, rows)) / len(rows)
    found = []
    for row in rows:
        score, counts = 0.0, Counter(row)
        for word in re.findall(r"\w+", query.lower()):
            having = sum(word in other for other in rows)
            idf = math.log(1 + (len(rows) - having + 0.5) / (having + 0.5))
            score += idf * counts[word] / (counts[word] + 1.5 * (1 - 0.75 + 0.75 * len(row) / mean))
        found.append(score)
    return found


@pytest.mark.parametrize("chosen", [None, "true"])
def test_loading_bm25s_keeps_jax_from_taking_the_gpus_memory(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in notes what JAX, which bm25s starts, would be told; a user's own choice stays."""
    (tmp_path / "bm25s.py").write_text("import os\ntold = os.environ.get('XLA_PYTHON_CLIENT_PREALLOCATE')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bm25s", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    if chosen is not None:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", chosen)
    assert load_bm25s("This", "rag").told == (chosen or "false")
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == chosen
    del sys.modules["bm25s"]


@pytest.mark.parametrize("query", ["Lamps?", "the captain counted seven LAMPS", "who spoke in the ship", "sky sky sky"])
def test_bm25_equals_loops(query: str) -> None:
    found, expected = bm25_scores(query, CHUNKS), bm25_by_hand(query, CHUNKS)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("query", ["", "?!", "unheard-of"])
def test_bm25_without_a_common_word_keeps_the_text_order(query: str) -> None:
    assert best_first(bm25_scores(query, CHUNKS)) == [0, 1, 2, 3, 4]
    assert bm25_scores("word", ["", ""]) == [0.0, 0.0]


def test_fusion_equals_its_formula() -> None:
    """Ranks 2, 1, 3 and 1, 3, 2."""
    found = fused([[0.5, 0.9, 0.1], [7.0, -2.0, 3.0]], 60)
    assert np.allclose(found, [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 63 + 1 / 62])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random sentence embedder in a folder: BERT without a pooling of its own, so that the mean is taken."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789?.,:'"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).eval().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def forget_embedders() -> Iterator[None]:
    yield
    retrolm.rag.embedder._LOADED.clear()


def test_dense_scores_are_cosines_of_mean_vectors(bert: Path) -> None:
    method = METHODS.get("rag_dense").with_options({"embedder": str(bert)})
    found = method.scores("captain", CHUNKS[:3])  # type: ignore[attr-defined]
    model, tokenizer = BertModel.from_pretrained(bert).eval(), BertTokenizerFast.from_pretrained(bert)

    def vector(text: str) -> Any:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        return (hidden / hidden.norm()).detach().numpy()

    assert np.allclose(found, [vector(chunk) @ vector("captain") for chunk in CHUNKS[:3]], atol=1e-5)
    assert load_embedder(str(bert)) is load_embedder(str(bert))


def test_known_embedders_are_used_as_their_papers_say(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = retrolm.rag.embedder.EmbedderCard(str(bert), query_prefix="find: ", normalise=False)
    monkeypatch.setitem(retrolm.rag.embedder.KNOWN, "mine", card)
    mine, plain = Embedder("mine"), Embedder(str(bert))
    assert np.allclose(mine.queries(["ship"]), mine.passages(["find: ship"]), atol=1e-6)
    assert not np.allclose(np.linalg.norm(mine.passages(["ship"])), 1) and np.allclose(
        np.linalg.norm(plain.passages(["ship"])), 1
    )


def test_embedders_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROLM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="retrolm pull all-minilm-l6-v2"):
        load_embedder("minilm")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="Could not load the embedder"):
        load_embedder(str(tmp_path / "empty"))


# --- prompts and answers -------------------------------------------------------------------------------------------

TEXT, ASKED = (STORY * 3)[:900], "What did the captain count?"
KNOBS = {"chunk_tokens": 12, "num_chunks": 4, "keep_first": False}


def rag_lm(name: str = "rag_bm25", budget: int = 96, bert: Path | None = None, **knobs: Any) -> RetroLM:
    model, options = tiny_model("llama", vocab_size=600), {**KNOBS, **knobs}
    if name != "rag_bm25":
        options["embedder"] = str(bert)
    return RetroLM(
        model,
        tiny_tokenizer(),
        config=RetroConfig(kv_budget=budget, page_size=8),
        method=name,
        method_options=options,
    )


def prompt_of(lm: RetroLM, question: str = ASKED) -> Prompt:
    assert lm.format is not None
    encode = lm.format.encode
    tail = encode(question + lm.format.tail)
    return Prompt(tuple(lm.format.prefix_ids), tuple(encode(TEXT)), tuple(tail), TEXT, question)


def shortened(lm: RetroLM, prompt: Prompt) -> Prompt:
    assert isinstance(lm.program, RagProgram)
    return lm.program.shortened(prompt)


def best_chunks(lm: RetroLM, prompt: Prompt) -> tuple[list[tuple[int, ...]], list[int]]:
    """All chunks, and the four best by hand, best first."""
    cut = [prompt.document[at : at + 12] for at in range(0, len(prompt.document), 12)]
    scores = bm25_by_hand(ASKED, [lm.tokenizer.decode(list(chunk)) for chunk in cut])
    return cut, sorted(range(len(cut)), key=lambda i: (-round(scores[i], 5), i))[:4]


def test_the_best_chunks_go_into_the_prompt_in_either_order() -> None:
    by_rank, by_place = rag_lm(order="rank"), rag_lm()
    prompt = prompt_of(by_rank)
    cut, best = best_chunks(by_rank, prompt)
    found = shortened(by_rank, prompt)
    assert best != sorted(best) and found.document == sum((cut[i] for i in best), ())
    assert (found.prefix, found.question) == (prompt.prefix, prompt.question)
    assert shortened(by_place, prompt).document == sum((cut[i] for i in sorted(best)), ())


def test_the_first_chunk_stays_for_the_opening_words() -> None:
    lm = rag_lm(keep_first=True, order="rank")
    prompt = prompt_of(lm)
    found = shortened(lm, prompt).document
    assert found[:12] == prompt.document[:12] and len(found) == 48


@pytest.mark.parametrize("name", ["rag_bm25", "rag_dense", "rag_hybrid"])
@pytest.mark.parametrize("budget", [60, 96, 400])
def test_answers_are_the_stock_models_over_the_shortened_prompt(name: str, budget: int, bert: Path) -> None:
    lm = rag_lm(name, budget, bert)
    prompts = [prompt_of(lm), prompt_of(lm, "Who spoke?")]
    short = [shortened(lm, prompt).ids for prompt in prompts]
    answers = lm.answer(prompts, max_new_tokens=5, do_sample=False)
    assert [a.token_ids for a in answers] == [
        stock_answers(lm, [ids], max_new_tokens=5, do_sample=False)[0].token_ids for ids in short
    ]
    for answer, ids in zip(answers, short, strict=True):
        assert answer.attended_tokens["prefill"] == len(ids) <= budget
        assert answer.attended_tokens["decode"] == len(ids) + len(answer.token_ids) - 1


@pytest.mark.parametrize("name", ["rag_bm25", "rag_dense", "rag_hybrid"])
def test_exact_where_all_chunks_fit(name: str, bert: Path) -> None:
    lm = rag_lm(name, 500, bert, num_chunks=100)
    assert shortened(lm, prompt_of(lm)).ids == prompt_of(lm).ids


def test_a_budget_without_room_for_a_chunk() -> None:
    lm = rag_lm(budget=30)
    with pytest.raises(UserError, match="kv_budget=30 holds no chunk of 12 tokens"):
        lm.answer([prompt_of(lm)], max_new_tokens=2)
    with pytest.raises(UserError, match="no logits of a text alone"):
        lm.logits(np.zeros(3))  # type: ignore[arg-type]


def test_ids_alone_are_searched_as_text() -> None:
    lm = rag_lm()
    prompt = prompt_of(lm)
    bare = Prompt(prompt.prefix, prompt.document, prompt.question)
    assert shortened(lm, bare).document == shortened(lm, prompt).document


def test_documents_are_asked_like_any_other(bert: Path) -> None:
    lm = rag_lm("rag_hybrid", 128, bert)
    document = lm.read(TEXT)
    first = document.ask("Who spoke?", max_new_tokens=3)
    assert first.attended_tokens["prefill"] <= 128 < document.num_tokens
    assert document.ask("Who spoke?", max_new_tokens=3).token_ids == first.token_ids


def test_the_evaluation_reads_through_the_same_program() -> None:
    lm = rag_lm(budget=96)
    (found,) = RetroReader(lm).answer([story_sample(0, 900)])
    assert found.attended_tokens["prefill"] <= 96 < found.num_tokens


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("rag_bm25", {"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ("rag_bm25", {"order": "random"}, "order='random' is not a choice"),
        ("rag_bm25", {"embedder": "minilm"}, "Unknown knob"),
        ("rag_hybrid", {"fusion_constant": 0}, "fusion_constant must be at least 1"),
    ],
)
def test_knobs_are_checked(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        METHODS.get(name).with_options(knobs)
