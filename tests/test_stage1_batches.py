"""From samples to batches: page places, labels and grouping, for any lengths."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.engine.page_words import PageWords
from retrolm.training.data import Stage1Dataset, Stage1Sample, page_labels
from retrolm.training.data.sample import FurtherQuestion
from retrolm.training.stage1.batches import Collate, counted_words, micro_batches
from stage1_pool_maker import tiny_pool
from stage1_run_maker import W, tiny_backbone, tiny_recipe

PREFIX = np.array([3, 4, 5], np.int32)


@st.composite
def samples(draw: st.DrawFn, num_prefix: int) -> list[Stage1Sample]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 70))
        spans = [tuple(sorted(draw(st.tuples(st.integers(0, length), st.integers(0, length))))) for _ in range(3)]
        found.append(
            Stage1Sample(
                input_ids=np.arange(100, 100 + length, dtype=np.int32),
                question_ids=np.full(draw(st.integers(1, 20)), 7 + number, np.int32),
                prefix_ids=PREFIX[:num_prefix],
                positive_spans=tuple(spans[:2]),
                source=f"source {number}",
                masked_spans=tuple(spans[2:]),
            )
        )
    return found


@settings(deadline=None)
@given(data=st.data(), page_size=st.integers(1, 40), num_prefix=st.integers(0, 3))
def test_pages_cover_each_sequence_and_labels_match(data: st.DataObject, page_size: int, num_prefix: int) -> None:
    group = data.draw(samples(num_prefix))
    batch = Collate(page_size, pad_id=0)(group)
    pages = batch.pages
    assert pages.num_prefix == num_prefix
    for row, sample in enumerate(group):
        text, question = sample.input_ids.tolist(), sample.question_ids.tolist()
        whole = [*PREFIX[:num_prefix].tolist(), *text, *question]
        assert pages.tokens_BT[row, : len(whole)].tolist() == whole
        assert not pages.tokens_BT[row, len(whole) :].any()
        spans = [(s, s + n) for s, n in zip(pages.starts_BM[row].tolist(), pages.lengths_BM[row].tolist(), strict=True)]
        real = [span for span in spans[:-1] if span[0] < span[1]]
        assert [whole[s:e] for s, e in real] == [text[i : i + page_size] for i in range(0, len(text), page_size)]
        assert whole[slice(*spans[-1])] == question
        gold, masked = (set(labels.tolist()) for labels in page_labels(sample, page_size))
        assert set(batch.positive_NP[row].nonzero()[:, 0].tolist()) == gold
        assert set(batch.negative_NP[row].nonzero()[:, 0].tolist()) == set(range(len(real))) - gold - masked
    assert pages.num_tokens == sum(len(s.input_ids) + len(s.question_ids) + num_prefix for s in group)
    assert batch.sources == tuple(sample.source for sample in group)
    moved = batch.to(torch.device("meta"))
    assert moved.pages.tokens_BT.is_meta and moved.positive_NP.is_meta and moved.sources == batch.sources


@settings(deadline=None)
@given(lengths=st.lists(st.sampled_from([50, 100, 200, 900]), max_size=40), most=st.integers(60, 1000))
def test_micro_batches(lengths: list[int], most: int) -> None:
    groups = list(micro_batches(iter(lengths), most))
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group in groups:
        assert len({lengths[i] for i in group}) == 1
        assert len(group) == 1 or sum(lengths[i] for i in group) <= most
    for first, second in pairwise(groups):
        joined = [lengths[i] for i in (*first, second[0])]
        assert len(set(joined)) > 1 or sum(joined) > most  # nothing was split without need


def test_micro_batches_are_lazy() -> None:
    endless = (64 for _ in iter(int, 1))
    assert list(islice(micro_batches(endless, 128), 2)) == [[0, 1], [2, 3]]


def test_every_sequence_weighs_the_same_whatever_it_is_asked() -> None:
    ids = np.arange(100, 150, dtype=np.int32)
    more = tuple(FurtherQuestion(np.full(n, 9, np.int32), ((10 * n, 10 * n + 5),)) for n in (1, 2))
    group = [
        Stage1Sample(ids, ids[:4], PREFIX, ((0, 5),), "a", further=more),
        Stage1Sample(ids, ids[:6], PREFIX, ((40, 45),), "b"),
    ]
    batch = Collate(10, pad_id=0)(group)
    assert batch.sequence_N.tolist() == [0, 0, 0, 1] and batch.query_N.tolist() == [0, 1, 2, 0]
    assert torch.allclose(batch.share_N, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    assert [row.nonzero()[:, 0].tolist() for row in batch.positive_NP] == [[0], [1], [2], [4]]
    pages = batch.pages
    assert pages.num_questions == 3 and pages.text_lengths.tolist() == [[10] * 5] * 2
    assert pages.lengths_BM[:, 5:].tolist() == [[4, 1, 2], [6, 0, 0]]
    assert pages.starts_BM[0, 5:].tolist() == [53, 57, 58]
    assert pages.num_tokens == 2 * 53 + 7 + 6


def test_words_are_matched_as_the_engine_matches_them() -> None:
    """Each question of each text against the text's own pages; none where nothing is counted."""
    lm, recipe = tiny_backbone(), tiny_recipe()
    data = Stage1Dataset(tiny_pool(), lm.tokenizer, recipe.data, 3)
    group = [data[n] for n in range(3)]
    assert Collate(W, lm.pad_id)(group).words_NP is None
    words = counted_words(lm, recipe.train)
    batch = Collate(W, lm.pad_id, words=words)(group)
    asked = [(sample, question) for sample in group for question in sample.questions]
    assert batch.words_NP is not None and batch.words_NP.shape == batch.positive_NP.shape
    assert batch.words_NP.max() > 0
    for row, (sample, question) in zip(batch.words_NP, asked, strict=True):
        ids = sample.input_ids.tolist()
        pages = [ids[n : n + W] for n in range(0, len(ids), W)]
        expected = PageWords(lm.tokenizer, lm.format).matches(pages, question.question_ids.tolist())
        assert torch.equal(row[: len(pages)], expected) and not row[len(pages) :].any()
    assert counted_words(lm, tiny_recipe(agreed_words=0.0).train) is None
    assert counted_words(RetroLM(lm.model, config=RetroConfig(kv_budget=3 * W, page_size=W)), recipe.train) is None
