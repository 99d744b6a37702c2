"""D14 b: texts read page by page for training: the dense pass on a large budget, asked documents on a small one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.dense_pass import dense_pass
from retrolm.engine.model import RetroLM
from retrolm.engine.page_batch import PageBatch, page_batch
from retrolm.engine.streaming_states import streaming_states
from retrolm.errors import UserError
from retrolm.training.stage1.batches import Stage1Batch
from retrolm.training.stage1.config import Stage1TrainConfig
from retrolm.training.stage1.step import Stage1Step
from stage1_run_maker import W, tiny_backbone, tiny_batch, tiny_recipe, tiny_trainer
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model
from tiny_tokenizer import tiny_tokenizer

SIZE = 8


def ragged(num_prefix: int) -> PageBatch:
    """Texts of unequal length, short last pages, questions of up to three pages, one text with fewer of them."""
    texts = [random_ids(n, n).tolist() for n in (61, 40)]
    further = [[random_ids(20, 3).tolist(), random_ids(9, 4).tolist()], [random_ids(5, 5).tolist()]]
    first = [random_ids(n, n).tolist() for n in (3, 8)]
    return page_batch(random_ids(num_prefix, 1).tolist(), texts, first, SIZE, pad_id=0, further=further)


@pytest.mark.parametrize("num_prefix", [0, 5, 11])
@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen2", "qwen3", "phi3", "gemma2"])
def test_on_a_large_budget_it_is_the_dense_pass(name: str, num_prefix: int) -> None:
    lm = RetroLM(tiny_model(name), config=RetroConfig(kv_budget=200, page_size=SIZE, chunk_pages=3))
    batch = ragged(num_prefix)
    found = streaming_states(lm, random_retriever(lm, 0), batch)
    wanted = dense_pass(lm.backbone, lm.attachment, batch)
    real = torch.zeros(batch.tokens_BT.shape, dtype=torch.bool)
    for row, (starts, lengths) in enumerate(zip(batch.starts_BM.tolist(), batch.lengths_BM.tolist(), strict=True)):
        real[row, :num_prefix] = True
        for start, length in zip(starts, lengths, strict=True):
            real[row, start : start + length] = True
    assert len(found.keys) == len(found.values) == lm.backbone.num_layers
    for own, other in (*zip(found.keys, wanted.keys, strict=True), *zip(found.values, wanted.values, strict=True)):
        assert torch.allclose(own[real], other[real], atol=1e-5)
        assert not bool(own[~real].any())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_on_a_small_budget_scores_are_those_of_asking_the_document(name: str, rank: int) -> None:
    model = tiny_model(name, vocab_size=600, max_position_embeddings=1024)
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=96, page_size=16, agreement_layers=0))
    retriever = random_retriever(lm, rank)
    assert lm.format is not None
    texts = [random_ids(n, n).tolist() for n in (300, 211)]
    questions = [[random_ids(n, n + row).tolist() for n in (7, 21)] for row in range(2)]
    further = [own[1:] for own in questions]
    batch = page_batch(lm.format.prefix_ids, texts, [own[0] for own in questions], 16, 0, further=further)
    module = Stage1Step(lm, retriever, Stage1TrainConfig("m", page_size=16, encode="streaming"))
    states = streaming_states(lm, retriever, batch)
    dense = dense_pass(lm.backbone, lm.attachment, batch)
    assert not torch.allclose(states.keys[-1][0, :200], dense.keys[-1][0, :200], atol=1e-3)  # not all was attended
    labels = torch.ones(4, batch.text_lengths.shape[1], dtype=torch.bool)
    sequence, query = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    whole = Stage1Batch(batch, labels, ~labels, sequence, query, torch.full((4,), 0.25), ("a", "b"))
    scores = module.scores(whole, module.read(whole)).own_LKNP.detach()
    lm.use_retriever(retriever)
    for row, text in enumerate(texts):
        document = lm.read(text)
        for number, question in enumerate(questions[row]):
            asked = lm.retrieve(document, question).scores[module.layers, 1:]
            found = scores[:, 0, 2 * row + number, : asked.shape[1]]
            assert (asked - found).abs().max() < 1e-4 * found.abs().max()


def test_training_goes_beyond_the_window(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, vocab_size=600, max_position_embeddings=256)
    lm = RetroLM(model, tiny_backbone().tokenizer, config=RetroConfig(kv_budget=6 * W, page_size=W))
    with pytest.raises(UserError, match="or encode='streaming'"):
        tiny_trainer(tmp_path / "dense", lm)
    trainer = tiny_trainer(tmp_path, lm, encode="streaming", num_steps=2, dev_every=2, batch_negatives=1.0, ema=0.5)
    start = trainer.retriever.embedding.detach().clone()
    assert trainer.run() and not torch.equal(trainer.retriever.embedding, start)
    assert trainer.retriever.card.details["dev_recall"]["mean"] is not None
    assert trainer.reading(iter(()), ahead=True)._helper is None  # the pass depends on the step before


def test_the_pages_are_chosen_by_the_retriever_as_it_stands() -> None:
    lm, batch = tiny_backbone(), tiny_batch(tiny_recipe())
    lm.config = lm.config.replace(kv_budget=6 * W)
    train = tiny_recipe(encode="streaming", ema=0.5).train
    module = Stage1Step(lm, random_retriever(lm, 0), train)
    before = module.read(batch).states.keys[-1]
    assert module.average is not None
    with torch.no_grad():
        for parameter in module.average.parameters():
            parameter.normal_()
    assert torch.equal(module.read(batch).states.keys[-1], before)
    assert not torch.equal(module.eval().read(batch).states.keys[-1], before)


def test_true_attention_needs_a_dense_pass() -> None:
    with pytest.raises(UserError, match="encode='dense'"):
        Stage1TrainConfig("m", encode="streaming", loss="mixed")
