"""The choices D3, D4, D9 and D13 in training: each does what it says, and the defaults are as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrolm.engine.bookmark_stream import BookmarkStates, bookmark_stream, head_scores, page_scores
from retrolm.engine.dense_pass import DenseStates, dense_pass
from retrolm.errors import UserError
from retrolm.training.stage1.recall import free_pages, layer_hits
from retrolm.training.stage1.step import Stage1Step
from retrolm.training.stage1.trainer import first_retriever
from stage1_run_maker import W, tiny_backbone, tiny_batch, tiny_recipe

LAYERS = range(3)


def stream(name: str = "llama", *, poison_sink: bool = False, **options: object) -> tuple[BookmarkStates, int]:
    """States of untrained bookmarks under some options, and the number of pages with the question."""
    lm = tiny_backbone(name)
    batch = tiny_batch(tiny_recipe(), count=1).pages
    dense = dense_pass(lm.backbone, lm.attachment, batch)
    if poison_sink:
        dense = DenseStates(*([_poisoned(x, batch.num_prefix) for x in part] for part in (dense.keys, dense.values)))
    config = lm.config.replace(**options)
    with torch.no_grad():
        states = bookmark_stream(lm.backbone, lm.attachment, None, lm.untrained_bookmark(), batch, dense, config)
    return states, batch.lengths_BM.shape[1]


def _poisoned(rows: Tensor, num_prefix: int) -> Tensor:
    rows = rows.clone()
    rows[:, :num_prefix] = torch.nan
    return rows


def test_a_bookmark_sees_the_sink_or_doesnt() -> None:
    assert page_scores(stream(poison_sink=True)[0], 2).isnan().any()
    alone, _ = stream(poison_sink=True, bookmark_span="page")
    plain, _ = stream(bookmark_span="page")
    for layer in LAYERS:
        assert torch.equal(page_scores(alone, layer), page_scores(plain, layer))
    assert not torch.allclose(page_scores(plain, 2), page_scores(stream()[0], 2))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_scores_at_true_positions_turn_with_the_distance_in_pages(name: str) -> None:
    plain, num_pages = stream(name)
    turned, _ = stream(name, score_rope=True)
    lm = tiny_backbone(name)
    lm.backbone.rope(1).require(num_pages * W)
    cos, sin = lm.backbone.rope(1).at(torch.arange(num_pages) * W)
    queries = turned.queries[1][0]
    half = queries.shape[-1] // 2
    first, second = plain.queries[1][0].split(half, -1)
    wanted = torch.cat([first, second], -1) * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    assert torch.allclose(queries, wanted, atol=1e-5)
    assert not torch.allclose(page_scores(turned, 1), page_scores(plain, 1))


def test_the_heads_scores_add_up_to_the_layers() -> None:
    states, _ = stream()
    parts = head_scores(states, 1)
    assert len(parts) == states.keys[1].shape[2] > 1
    assert torch.allclose(parts.sum(0), page_scores(states, 1))


def test_heads_that_choose_by_themselves_have_losses_and_recall_of_their_own() -> None:
    lm, recipe = tiny_backbone(), tiny_recipe(select_by="kv_head")
    batch = tiny_batch(recipe)
    results = {}
    for select_by in ("layer", "kv_head"):
        train = tiny_recipe(select_by=select_by).train
        results[select_by] = Stage1Step(lm, first_retriever(lm, train), train)(batch)
    assert results["layer"].hits_LN.shape == results["kv_head"].hits_LN.shape
    assert results["layer"].loss.item() != results["kv_head"].loss.item()
    shares = results["kv_head"].hits_LN
    assert bool(((shares >= 0) & (shares <= 1) | shares.isnan()).all())


def test_local_pages_and_the_number_of_pages_decide_what_recall_counts() -> None:
    pages = tiny_batch(tiny_recipe(), count=2).pages
    counts = [int(free_pages(pages, num).sum(1)[0]) for num in (0, 1, 2)]
    assert counts[0] - 1 == counts[1] == counts[2] + 1
    scores, gold = torch.arange(20.0).flip(0)[None], torch.arange(20)[None] == 10
    free = torch.ones_like(gold)
    assert [float(layer_hits(scores, gold, free, num)) for num in (8, 10, 11)] == [0, 0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"select_by": "head"}, "select_by='head'"), ({"num_local_pages": -1}, "num_local_pages"),
     ({"recall_pages": 0}, "recall_pages"), ({"bookmark_span": "pages"}, "Did you mean 'page'")],
)  # fmt: skip
def test_other_choices_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(**change)
