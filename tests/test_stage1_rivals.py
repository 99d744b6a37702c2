"""Negatives from a batch's other texts: which pages count, how they are scored, what they add to the loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrolm.engine.bookmark_stream import BookmarkStates, bookmark_stream
from retrolm.training.data import Stage1Dataset
from retrolm.training.data.sample import FurtherQuestion, Stage1Sample
from retrolm.training.stage1.batches import Collate, Stage1Batch
from retrolm.training.stage1.rivals import RUN_TOKENS, rival_pages, token_runs
from retrolm.training.stage1.step import PageScores, Stage1Step
from stage1_pool_maker import tiny_pool
from stage1_run_maker import W, tiny_backbone, tiny_batch, tiny_recipe, tiny_trainer
from test_against_naive import random_retriever
from tiny_tokenizer import tiny_tokenizer

IDS = np.random.default_rng(0).integers(0, 50_000, 4000).astype(np.int32)
ONE = np.array([1, 2], dtype=np.int32)


def sample(ids: Any, *spans: tuple[int, int], masked: Any = (), further: Any = ()) -> Stage1Sample:
    return Stage1Sample(np.asarray(ids, dtype=np.int32), ONE, ONE, spans, "facts", tuple(masked), tuple(further))


def naive_rivals(samples: list[Stage1Sample], page_size: int, num_pages: int) -> torch.Tensor:
    """Every run of every page beside every run of the evidence."""

    def runs(ids: Any) -> list[tuple[int, ...]]:
        return [tuple(ids[start : start + RUN_TOKENS].tolist()) for start in range(len(ids) - RUN_TOKENS + 1)]

    rows = []
    for own, asked in enumerate(samples):
        for question in asked.questions:
            spans = (*question.positive_spans, *question.masked_spans)
            known = {run for start, end in spans for run in runs(asked.input_ids[start:end])}
            row = torch.zeros(len(samples), num_pages, dtype=torch.bool)
            for other, text in enumerate(samples):
                if other == own:
                    continue
                row[other, : math.ceil(len(text.input_ids) / page_size)] = True
                for place, run in enumerate(runs(text.input_ids)):
                    if run in known:
                        row[other, place // page_size : (place + RUN_TOKENS - 1) // page_size + 1] = False
            rows.append(row.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("page_size", [5, 11, 12, 32, 63, 128])
def test_pages_that_repeat_the_evidence_are_no_rivals(page_size: int) -> None:
    first = sample(IDS[:500], (100, 160), masked=[(300, 340)], further=[FurtherQuestion(ONE, ((400, 420), (430, 441)))])
    shares = np.concatenate([IDS[600:700], IDS[120:150], IDS[700:733], IDS[310:330], IDS[405:420], IDS[800:900]])
    second = sample(shares, (5, 9), further=[FurtherQuestion(ONE, ((20, 80),))])
    third = sample(np.concatenate([IDS[900:1000], IDS[430:441], IDS[1000:1019]]), (0, 40))
    samples = [first, second, third]
    found = rival_pages(samples, page_size, 101)
    assert torch.equal(found, naive_rivals(samples, page_size, 101))
    repeated = 101 + 105 // page_size  # the second text's page that says what the first one's evidence says
    assert not bool(found[0, repeated]) and bool(found[1, repeated])


def test_own_pages_and_padding_are_no_rivals() -> None:
    found = rival_pages([sample(IDS[:100], (0, 50)), sample(IDS[200:230], (0, 20))], 32, 4).view(2, 2, 4)
    assert found.tolist() == [[[False] * 4, [True, False, False, False]], [[True] * 4, [False] * 4]]


def test_a_text_alone_has_no_rivals() -> None:
    assert not bool(rival_pages([sample(IDS[:100], (0, 50))], 32, 4).any())


def test_evidence_shorter_than_a_run_excludes_nothing() -> None:
    short = RUN_TOKENS - 1
    same = [sample(IDS[:64], (0, short)), sample(IDS[:64], (0, short))]
    assert rival_pages(same, 32, 2).sum() == 4
    assert len(token_runs(IDS[:short])) == 0 and len(token_runs(IDS[:RUN_TOKENS])) == 1


def test_real_samples_agree_with_the_naive_search() -> None:
    recipe = tiny_recipe()
    config = dataclasses.replace(recipe.data, further_questions=6)
    data = Stage1Dataset(tiny_pool(), tiny_tokenizer(), config, 40)
    samples = [data[index] for index in range(24)]
    width = max(-(-len(s.input_ids) // W) for s in samples)
    found = rival_pages(samples, W, width)
    assert torch.equal(found, naive_rivals(samples, W, width))
    everything = sum(-(-len(s.input_ids) // W) for s in samples)
    owners = [row for row, s in enumerate(samples) for _ in s.questions]
    fair = torch.tensor([everything - -(-len(samples[row].input_ids) // W) for row in owners])
    assert (found.sum(1) < fair).any()  # the small pool repeats passages, so something is left out


def with_rivals(batch: Stage1Batch) -> Stage1Batch:
    """The batch, with all pages of other texts as rivals but each question's first."""
    num_texts, num_pages = batch.pages.text_lengths.shape
    rival = (batch.pages.text_lengths > 0).repeat(len(batch.sequence_N), 1, 1)
    rival[torch.arange(len(rival)), batch.sequence_N] = False
    rival[:, :, 0] = False
    return dataclasses.replace(batch, rival_NM=rival.view(-1, num_texts * num_pages))


@pytest.mark.parametrize("select_by", ["layer", "kv_head"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_counts_rivals_as_so_many_negatives(select_by: str, weight: float) -> None:
    lm = tiny_backbone()
    batch = with_rivals(tiny_batch(tiny_recipe(), num_further=2))
    train = tiny_recipe(select_by=select_by, batch_negatives=weight).train
    module = Stage1Step(lm, random_retriever(lm, 0), train)
    frozen = module.read(batch)
    scores = PageScores(*(part.detach() for part in vars(module.scores(batch, frozen)).values()))
    plain = module.scores(dataclasses.replace(batch, rival_NM=None), frozen)
    assert plain.all_LKNM is None and scores.all_LKNM is not None
    assert torch.allclose(scores.own_LKNP, plain.own_LKNP, atol=1e-5)
    expected = [
        naive_loss(batch, scores.own_LKNP[layer, head], scores.all_LKNM[layer, head], weight)
        for layer in range(scores.own_LKNP.shape[0])
        for head in range(scores.own_LKNP.shape[1])
    ]
    assert float(module(batch, frozen).loss.detach()) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def naive_loss(batch: Stage1Batch, own_NP: torch.Tensor, all_NM: torch.Tensor, weight: float) -> float:
    assert batch.rival_NM is not None
    total = 0.0
    for n, share in enumerate(batch.share_N.tolist()):
        others = sum(math.exp(s) for s, is_negative in zip(own_NP[n], batch.negative_NP[n], strict=True) if is_negative)
        others += weight * sum(math.exp(s) for s, counts in zip(all_NM[n], batch.rival_NM[n], strict=True) if counts)
        positives = [math.exp(s) for s, gold in zip(own_NP[n], batch.positive_NP[n], strict=True) if gold]
        total += share * sum(-math.log(p / (p + others)) for p in positives) / max(len(positives), 1)
    return total


def test_scores_of_other_texts_are_those_of_their_own_bookmarks() -> None:
    """Beside loops over heads; a question's query and a page's key are those of their texts read alone."""
    lm, train = tiny_backbone(), tiny_recipe(batch_negatives=1.0).train
    module = Stage1Step(lm, random_retriever(lm, 0), train)
    batch = with_rivals(tiny_batch(tiny_recipe(), count=3))
    scores = module.scores(batch, module.read(batch)).all_LKNM
    assert scores is not None
    P = batch.pages.text_lengths.shape[1]
    alone = [states_alone(module, tiny_batch(tiny_recipe(), first=row, count=1)) for row in range(3)]
    for n, row in enumerate(batch.sequence_N.tolist()):
        for other in range(3):
            for place, layer in enumerate(module.layers):
                q_HD, k_PKD = alone[row].queries[layer][0, -1], alone[other].keys[layer][0, :-1]
                group = len(q_HD) // k_PKD.shape[1]
                wanted = sum(k_PKD[:, head // group] @ q_HD[head] for head in range(len(q_HD))) / q_HD.numel() ** 0.5
                found = scores[place, 0, n, other * P : other * P + len(k_PKD)]
                assert torch.allclose(found, wanted, atol=1e-4)


def states_alone(module: Stage1Step, batch: Stage1Batch) -> BookmarkStates:
    lm = module._lm
    dense, retriever = module.read(batch).states, module.retriever
    return bookmark_stream(lm.backbone, lm.attachment, retriever, retriever.embedding, batch.pages, dense, lm.config)


def test_gradients_are_numbers_where_nothing_is_left_to_compare() -> None:
    lm = tiny_backbone()
    module = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(batch_negatives=1.0).train)
    batch = with_rivals(tiny_batch(tiny_recipe()))
    assert batch.rival_NM is not None
    batch.rival_NM[0], batch.negative_NP[0] = False, False  # one question has neither
    batch.rival_NM[1] = False
    module(batch).loss.backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(grads) > 5 and all(bool(grad.isfinite().all()) for grad in grads)


def test_only_a_recipe_that_asks_for_rivals_gets_them(tmp_path: Path) -> None:
    plain, asks = (tiny_trainer(tmp_path / str(w), batch_negatives=w) for w in (0.0, 1.0))
    assert next(plain.loaded()).rival_NM is None
    batch = next(asks.loaded())
    assert batch.rival_NM is not None
    assert batch.rival_NM.shape == (len(batch.sequence_N), batch.pages.text_lengths.numel())
    assert batch.to(torch.device("cpu")).rival_NM is not None


def test_collate_finds_rivals_only_if_told() -> None:
    samples = [sample(IDS[:100], (0, 50)), sample(IDS[200:230], (0, 20))]
    assert Collate(W, 0)(samples).rival_NM is None
    found = Collate(W, 0, with_rivals=True)(samples).rival_NM
    assert found is not None and torch.equal(found, rival_pages(samples, W, 4))
