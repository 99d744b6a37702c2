"""Texts with visible bookmarks in one pass: against a dense reference (values and gradients) and the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dense_reference import Sequence
from retrolm.config import RetroConfig
from retrolm.engine import visible_pass
from retrolm.engine.bookmark_stream import page_scores
from retrolm.engine.model import RetroLM
from retrolm.engine.page_batch import PageBatch, page_batch
from retrolm.engine.visible_pass import VisibleProgram, visible_stream
from retrolm.errors import IncompatibleRetrieverError, UserError
from retrolm.paging import page_lengths
from retrolm.retriever import PageRetriever
from stage1_run_maker import tiny_backbone, tiny_recipe, tiny_trainer
from test_against_naive import random_retriever
from test_bookmark_stream import check_values_and_gradients
from tiny_models import exact_model, random_ids, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W = 8


def attached(name: str) -> RetroLM:
    return RetroLM(exact_model(name), config=RetroConfig(kv_budget=128, page_size=W, bookmarks="visible"))


def scores_of(lm: RetroLM, retriever: PageRetriever | None, batch: PageBatch, **options: Any) -> Tensor:
    """Scores [layers, B, questions, pages]."""
    bookmark = lm.untrained_bookmark() if retriever is None else retriever.embedding
    config = lm.config.replace(**options)
    states = visible_stream(lm.backbone, lm.attachment, retriever, bookmark, batch, config)
    layers = range(lm.backbone.num_layers)
    return torch.stack([page_scores(states, layer, batch.num_questions) for layer in layers])


def sequences(num_prefix: int) -> tuple[PageBatch, list[Sequence]]:
    """Two texts of unequal lengths with short last pages; one question is longer than a page."""
    prefix = random_ids(num_prefix, 1).tolist()
    texts = [random_ids(n, n).tolist() for n in (29, 18)]
    questions = [random_ids(n, n).tolist() for n in (3, 11)]
    batch = page_batch(prefix, texts, questions, W, pad_id=0)
    found = []
    for row, (text, question) in enumerate(zip(texts, questions, strict=True)):
        sizes = page_lengths(num_prefix, W)
        pages = [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]
        spans = zip(batch.starts_BM[row].tolist(), batch.lengths_BM[row].tolist(), strict=True)
        pages += [(start, length) for start, length in spans if length]
        found.append(Sequence(torch.tensor(prefix + text + question), num_prefix, pages, visible=True))
    return batch, found


@pytest.mark.parametrize(
    ("name", "num_prefix"),
    [("llama", 0), ("llama-mqa", 5), ("llama-yarn", 5), ("qwen2", 11), ("phi3", 5), ("gemma2", 0), ("gemma3", 5)],
)
def test_values_and_gradients_equal_the_dense_reference(name: str, num_prefix: int) -> None:
    """A prefix of 11 tokens takes two sink pages."""
    lm = attached(name)
    retriever = random_retriever(lm, 0).double()
    batch, singles = sequences(num_prefix)
    found = scores_of(lm, retriever, batch)[:, :, 0]
    assert not lm.model.training
    num_scored = [len(single.pages) - 1 - len(page_lengths(num_prefix, W)) for single in singles]
    check_values_and_gradients(lm, retriever, found, singles, num_scored)


def test_layers_run_again_with_the_kernels_of_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels keep differs, so a checkpoint would end in an error."""
    inside, seen = [False], []

    @contextmanager
    def block(device: torch.device) -> Iterator[None]:
        before, inside[0] = inside[0], True
        yield
        inside[0] = before

    attend = VisibleProgram.attend
    monkeypatch.setattr(visible_pass, "shapes_may_vary", block)
    monkeypatch.setattr(VisibleProgram, "attend", lambda *args: (seen.append(inside[0]), attend(*args))[1])
    lm = attached("llama")
    retriever = random_retriever(lm, 0).double()
    scores = scores_of(lm, retriever, sequences(0)[0])
    scores[scores.isfinite()].sum().backward()
    assert len(seen) == 2 * lm.backbone.num_layers and all(seen)


@pytest.mark.parametrize("num_prefix", [0, 11])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_several_questions_are_as_each_alone(name: str, num_prefix: int) -> None:
    lm = attached(name)
    retriever = random_retriever(lm, 0).double()
    prefix = random_ids(num_prefix, 1).tolist()
    texts = [random_ids(n, n).tolist() for n in (29, 18)]
    questions = [[random_ids(n, n + row).tolist() for n in sizes] for row, sizes in enumerate([(3, 11, 1), (4, 9)])]
    batch = page_batch(prefix, texts, [q[0] for q in questions], W, pad_id=0, further=[q[1:] for q in questions])
    with torch.no_grad():
        together = scores_of(lm, retriever, batch)
        for row, (text, asked) in enumerate(zip(texts, questions, strict=True)):
            for number, question in enumerate(asked):
                alone = scores_of(lm, retriever, page_batch(prefix, [text], [question], W, pad_id=0))[:, 0, 0]
                found = together[:, row, number, : alone.shape[1]]
                assert torch.allclose(found, alone, atol=1e-5), (row, number)


@pytest.mark.parametrize("options", [{}, {"bookmark_span": "page"}, {"score_rope": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-sliding", "gemma3"])
def test_training_scores_what_the_engine_scores(name: str, options: dict[str, Any]) -> None:
    """Where the budget holds the text; a prefix of several pages, short and long questions."""
    model = tiny_model(name, vocab_size=600, max_position_embeddings=1024)
    settings: dict[str, Any] = {"kv_budget": 480, "page_size": 5, "bookmarks": "visible", "agreement_layers": 0}
    settings |= {"chunk_pages": 3, **options}
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(**settings))
    retriever = random_retriever(lm, 4)
    lm.use_retriever(retriever)
    document = lm.read(STORY)
    assert lm.format is not None
    prefix = list(lm.format.prefix_ids)
    first = len(page_lengths(len(prefix), 5))
    assert first > 1
    text = [token for page in document.token_ids[first:] for token in page]
    for question in ("Why?", "How many houses were on the shore, and what did the captain say when the ship came in? "):
        retrieval = document.retrieve(question, raw=True)
        batch = page_batch(prefix, [text], [lm.format.question_ids(question)], 5, pad_id=0)
        with torch.no_grad():
            scores = scores_of(lm, retriever, batch)[:, 0, 0]
        for layer in range(1, lm.backbone.num_layers):
            if lm.backbone.retrieves(layer):
                found = retrieval.scores[layer, first:]
                assert (found - scores[layer]).abs().max() < 1e-5 * scores[layer].abs().max()


def test_first_pages_of_unequal_length_need_a_prefix() -> None:
    batch = page_batch([], [[5] * 20, [6] * 3], [[7], [8]], W, pad_id=0)
    with pytest.raises(ValueError, match="prefix"):
        scores_of(attached("llama"), None, batch)


def test_a_step_trains_through_tokens_and_leaves_the_backbone_alone(tmp_path: Path) -> None:
    """The whole trainer, dev recall included; its card says how bookmarks were read, and other engines refuse it."""
    lm = tiny_backbone()
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    with pytest.raises(UserError, match="reads bookmarks='invisible', the recipe 'visible'"):
        tiny_trainer(tmp_path / "other", lm, bookmarks="visible")
    lm.detach()
    seeing = RetroLM(lm.model, lm.tokenizer, config=lm.config.replace(bookmarks="visible", kv_budget=512))
    trainer = tiny_trainer(tmp_path, seeing, bookmarks="visible", num_steps=2, accumulate=1, dev_every=2, lr=1e-2)
    start = {name: value.clone() for name, value in trainer.step_module.state_dict().items()}
    assert trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    moved = [name for name, value in trainer.step_module.state_dict().items() if not torch.equal(value, start[name])]
    assert {"retriever.embedding", "retriever.deltas.layers_1_v_proj.up"} <= set(moved)
    assert not lm.model.training and not any(value.grad is not None for value in lm.model.parameters())
    seeing.use_retriever(trainer.retriever_folder)
    seeing.detach()
    with pytest.raises(IncompatibleRetrieverError, match="bookmarks='visible'"):
        tiny_backbone().use_retriever(trainer.retriever_folder)


@pytest.mark.parametrize("other", [{"loss": "attention_kl"}, {"encode": "streaming"}])
def test_what_visible_bookmarks_are_not_trained_with(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="encode='dense' and loss='info_nce' alone"):
        tiny_recipe(bookmarks="visible", **other)
