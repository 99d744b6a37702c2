"""The bookmark stream against a dense reference (values and gradients) and against what the engine computes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from dense_reference import Sequence, reference_scores
from grids import pairs, some
from retrolm.config import RetroConfig
from retrolm.engine import bookmark_stream as bookmark_stream_module
from retrolm.engine import dense_pass as dense_pass_module
from retrolm.engine import prefill_layers
from retrolm.engine.bookmark_stream import bookmark_stream, page_scores
from retrolm.engine.dense_pass import dense_pass
from retrolm.engine.model import RetroLM
from retrolm.engine.page_batch import PageBatch, page_batch
from retrolm.retriever import PageRetriever
from test_against_naive import delta_matrices, random_retriever
from tiny_models import exact_model, random_ids, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

W = 8
FAMILIES = ("llama", "llama-mqa", "llama-yarn", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "mistral-sliding")
PLAIN = ("llama", "mistral-sliding", "qwen2", "qwen3")  # the engine has layers of its own for these


def attached(name: str) -> RetroLM:
    return RetroLM(exact_model(name), config=RetroConfig(kv_budget=128, page_size=W))


def stream_scores(lm: RetroLM, retriever: PageRetriever | None, batch: PageBatch) -> Tensor:
    """Scores [layers, B, pages] of the bookmark stream."""
    dense = dense_pass(lm.backbone, lm.attachment, batch)
    bookmark = lm.untrained_bookmark() if retriever is None else retriever.embedding
    states = bookmark_stream(lm.backbone, lm.attachment, retriever, bookmark, batch, dense)
    return torch.stack([page_scores(states, layer)[:, 0] for layer in range(lm.backbone.num_layers)])


def centred(scores: Tensor) -> Tensor:
    """Scores without a layer's constant (the key bias changes no ranking and gets no gradient)."""
    return scores - scores.mean(-1, keepdim=True)


def sequences(num_prefix: int) -> tuple[PageBatch, list[Sequence]]:
    """Two texts of unequal lengths with short last pages; one question is longer than a page."""
    prefix = random_ids(num_prefix, 1).tolist()
    texts = [random_ids(n, n).tolist() for n in (29, 18)]
    questions = [random_ids(n, n).tolist() for n in (3, 11)]
    batch = page_batch(prefix, texts, questions, W, pad_id=0)
    found = []
    for row, (text, question) in enumerate(zip(texts, questions, strict=True)):
        spans = zip(batch.starts_BM[row].tolist(), batch.lengths_BM[row].tolist(), strict=True)
        pages = [(start, length) for start, length in spans if length]
        found.append(Sequence(torch.tensor(prefix + text + question), num_prefix, pages))
    return batch, found


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize(("name", "own"), [(name, False) for name in FAMILIES] + [(name, True) for name in PLAIN])
def test_values_and_gradients_equal_the_dense_reference(
    name: str, own: bool, num_prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the stock layers, and through the engine's own, as on a GPU."""
    lm = attached(name)
    own_rows = mock.Mock(side_effect=bookmark_stream_module.stream_rows)
    if own:
        monkeypatch.setattr(bookmark_stream_module, "can_fuse", prefill_layers.is_plain)
        monkeypatch.setattr(bookmark_stream_module, "stream_rows", own_rows)
    retriever = random_retriever(lm, 0).double()
    batch, singles = sequences(num_prefix)
    found = stream_scores(lm, retriever, batch)
    assert own_rows.called == own
    check_values_and_gradients(lm, retriever, found, singles, [len(single.pages) - 1 for single in singles])


def check_values_and_gradients(
    lm: RetroLM, retriever: PageRetriever, found_LBP: Tensor, singles: list[Sequence], num_scored: list[int]
) -> None:
    """Scores equal the dense reference's up to a constant, and so do a random sum's gradients."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    expected_loss = torch.zeros((), dtype=torch.float64)
    bookmark = retriever.embedding.detach().clone().requires_grad_()
    deltas = {key: value.clone().requires_grad_() for key, value in delta_matrices(lm, retriever).items()}
    for row, (single, pages) in enumerate(zip(singles, num_scored, strict=True)):
        expected = centred(reference_scores(lm.model, single, bookmark, deltas))
        scores = centred(found_LBP[:, row, :pages].double())
        assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()
        weights = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
        loss, expected_loss = loss + (scores * weights).sum(), expected_loss + (expected * weights).sum()
    loss.backward()
    expected_loss.backward()
    assert close(retriever.embedding.grad, bookmark.grad)
    for shape in lm.backbone.projection_shapes():
        gradient = retriever.deltas[shape.key].weight.grad
        assert close(gradient, deltas[shape.layer, shape.name].grad), shape.key


def close(found: Tensor | None, expected: Tensor | None) -> bool:
    """Equal up to the float32 that stock norms compute in; what feeds no score may have no gradient at all."""
    if found is None or expected is None:
        return all(x is None or not bool(x.any()) for x in (found, expected))
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_low_rank_deltas_equal_their_product(name: str) -> None:
    lm = attached(name)
    batch, singles = sequences(5)
    retriever = random_retriever(lm, 3).double()
    scores = centred(stream_scores(lm, retriever, batch)[:, 0, : len(singles[0].pages) - 1].double())
    expected = centred(reference_scores(lm.model, singles[0], retriever.embedding, delta_matrices(lm, retriever)))
    assert (scores - expected).abs().max() < 1e-5 * expected.abs().max()


def test_padding_and_neighbours_change_nothing() -> None:
    lm = attached("llama")
    retriever = random_retriever(lm, 0)
    batch, singles = sequences(5)
    together = stream_scores(lm, retriever, batch)
    single = singles[1]
    alone = page_batch(single.ids[:5].tolist(), [single.ids[5:23].tolist()], [single.ids[23:].tolist()], W, pad_id=7)
    assert torch.allclose(together[:, 1, :3], stream_scores(lm, retriever, alone)[:, 0], atol=1e-6)


def test_first_pages_of_unequal_length_need_a_prefix() -> None:
    """Without a prefix the first page is the sink of all its sequence's bookmarks."""
    lm = attached("llama")
    batch = page_batch([], [[5] * 20, [6] * 3], [[7], [8]], W, pad_id=0)
    with pytest.raises(ValueError, match="prefix"):
        stream_scores(lm, None, batch)


def tokenised(name: str, chat: bool) -> RetroLM:
    model = tiny_model(name, vocab_size=600, max_position_embeddings=1024)
    config = RetroConfig(kv_budget=480, page_size=16, chunk_pages=3, agreement_layers=0)
    return RetroLM(model, tiny_tokenizer(chat), config=config)


@pytest.mark.parametrize(
    ("name", "chat", "rank"),
    pairs(["llama", "qwen2", "phi3", "gemma3", "qwen2-sliding"], [True, False], [None, 0, 4]),
)
def test_training_scores_what_the_engine_scores(name: str, chat: bool, rank: int | None) -> None:
    """Short and long questions (up to three pages), with the chat template's prefix page and without."""
    lm = tokenised(name, chat)
    retriever = None if rank is None else random_retriever(lm, rank)
    if retriever is not None:
        lm.use_retriever(retriever)
    document = lm.read(STORY * 3)
    assert lm.format is not None
    prefix = list(lm.format.prefix_ids)
    assert bool(prefix) == chat
    text = [token for page in document.token_ids for token in page][len(prefix) :]
    for question in ("Why?", "How many houses were on the shore, and what did the captain say when the ship came in? "):
        retrieval = document.retrieve(question, raw=True)
        batch = page_batch(prefix, [text], [lm.format.question_ids(question)], 16, pad_id=0)
        with torch.no_grad():
            scores = stream_scores(lm, retriever, batch)[:, 0]
        for layer in range(1, lm.backbone.num_layers):
            found = retrieval.scores[layer, 1 if chat else 0 :]
            if not lm.backbone.retrieves(layer):
                assert found.isnan().all()
                continue
            assert (found - scores[layer]).abs().max() < 1e-5 * scores[layer].abs().max()


@pytest.mark.parametrize(("lengths", "num_prefix"), some([(29, 18), (29, 29)], [5, 0], each=1))
@pytest.mark.parametrize("name", FAMILIES)
def test_several_questions_are_as_each_alone(name: str, num_prefix: int, lengths: tuple[int, int]) -> None:
    """Scores for each of several questions on a text equal those of a batch with that question alone.

    Where all texts end at the same place, the questions' attention has no mask.
    """
    lm = attached(name)
    retriever = random_retriever(lm, 0).double()
    prefix = random_ids(num_prefix, 1).tolist()
    texts = [random_ids(n, n + row).tolist() for row, n in enumerate(lengths)]
    questions = [[random_ids(n, n + row).tolist() for n in sizes] for row, sizes in enumerate([(3, 11, 1), (4, 9)])]
    together = page_batch(prefix, texts, [q[0] for q in questions], W, pad_id=0, further=[q[1:] for q in questions])
    dense = dense_pass(lm.backbone, lm.attachment, together)
    states = bookmark_stream(lm.backbone, lm.attachment, retriever, retriever.embedding, together, dense)
    for row, (text, asked) in enumerate(zip(texts, questions, strict=True)):
        for number, question in enumerate(asked):
            alone = stream_scores(lm, retriever, page_batch(prefix, [text], [question], W, pad_id=0))[:, 0]
            for layer in range(lm.backbone.num_layers):
                found = page_scores(states, layer, together.num_questions)[row, number, : alone.shape[1]]
                assert torch.allclose(found.double(), alone[layer].double(), atol=1e-5), (layer, row, number)


@pytest.mark.parametrize("mlp_rows", [7, 4096])
@pytest.mark.parametrize("name", PLAIN)
def test_the_engines_own_layers_read_as_the_stock_ones(
    name: str, mlp_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: keys and values of texts with several questions, one of them shorter."""
    monkeypatch.setattr(prefill_layers, "_MLP_INNER", mlp_rows * 64)
    lm = attached(name)
    texts, questions = [random_ids(n, n).tolist() for n in (29, 18)], [random_ids(n, n).tolist() for n in (3, 11)]
    further = [[random_ids(6, row).tolist()] for row in range(2)]
    batch = page_batch(random_ids(5, 1).tolist(), texts, questions, W, pad_id=0, further=further)
    expected = dense_pass(lm.backbone, lm.attachment, batch)
    monkeypatch.setattr(dense_pass_module, "can_fuse", prefill_layers.is_plain)
    assert prefill_layers.is_plain(lm.backbone)
    monkeypatch.setattr(lm.backbone.decoder, "forward", None)
    found = dense_pass(lm.backbone, lm.attachment, batch)
    assert len(found.keys) == len(found.values) == lm.backbone.num_layers
    for one, other in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()
