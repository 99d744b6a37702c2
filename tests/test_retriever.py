"""Page retrievers as artefacts: saved and loaded, refused where they don't belong, clear where they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrolm.config import RetroConfig
from retrolm.engine import shipped
from retrolm.engine.model import RetroLM
from retrolm.errors import IncompatibleRetrieverError, UserError
from retrolm.retriever import (
    CARD_FILE,
    WEIGHTS_FILE,
    PageRetriever,
    ProjectionShape,
    RetrieverCard,
    export_retriever,
    load_retriever,
)
from test_against_naive import random_retriever
from tiny_folder import save_tiny_model
from tiny_models import random_ids, tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

IDS = random_ids(90)


def attach(name: str = "llama", **changes: Any) -> RetroLM:
    return RetroLM(tiny_model(name, **changes), config=RetroConfig(kv_budget=40, page_size=8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return random_retriever(attach(), 4).save(tmp_path / "retriever")


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_saved_and_loaded_is_the_same(name: str, rank: int, tmp_path: Path) -> None:
    lm = attach(name)
    retriever = random_retriever(lm, rank)
    lm.use_retriever(retriever)
    expected = lm.logits(IDS)
    folder = retriever.save(tmp_path / "deep" / "folder")
    other = attach(name)
    assert not torch.equal(other.logits(IDS), expected)
    other.use_retriever(folder)
    assert torch.equal(other.logits(IDS), expected)
    assert other.retriever is not None and other.retriever.card == retriever.card
    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, WEIGHTS_FILE]


def test_an_untrained_retriever_is_the_copy() -> None:
    """Zero deltas and the end-of-sequence row: the paper's "w/o Stage1"."""
    lm = attach("qwen2")
    expected = lm.logits(IDS)
    card = random_retriever(lm, 2).card
    embedding = lm.model.get_input_embeddings().weight[lm.eos_ids[0]]
    for rank in (0, 2):
        card.rank = rank
        lm.use_retriever(PageRetriever(lm.backbone.projection_shapes(), embedding, card))
        assert torch.allclose(lm.logits(IDS), expected, atol=1e-6)


@pytest.mark.parametrize(("bits", "close"), [(8, 0.02), (16, 0.01), (32, 0.0)])
def test_fewer_bits_stay_close(bits: int, close: float, saved: Path, tmp_path: Path) -> None:
    folder = export_retriever(saved, tmp_path / "small", bits)
    lm = attach()
    lm.use_retriever(saved)
    assert lm.retriever is not None
    exact = {key: value.clone() for key, value in lm.retriever.state_dict().items()}
    lm.use_retriever(folder)
    for key, value in lm.retriever.state_dict().items():
        assert (value - exact[key]).abs().max() <= close * exact[key].abs().max()
    assert lm.retriever.card.details["bits"] == bits
    if bits < 32:
        assert (folder / WEIGHTS_FILE).stat().st_size < 0.6 * (saved / WEIGHTS_FILE).stat().st_size


def test_documents_keep_the_retriever_they_were_read_with() -> None:
    model = tiny_model("llama", vocab_size=600)
    lm = RetroLM(model, tiny_tokenizer(), config=RetroConfig(kv_budget=96, page_size=8, word_weight=0.0))
    lm.use_retriever(random_retriever(lm, 0, 1))
    document = lm.read(STORY * 2)
    before = document.retrieve("Who counted?")
    lm.use_retriever(random_retriever(lm, 0, 2))
    assert torch.equal(document.retrieve("Who counted?").scores.nan_to_num(), before.scores.nan_to_num())
    assert not torch.equal(lm.read(STORY * 2).retrieve("Who counted?").page_ids, before.page_ids)


def test_deltas_go_to_their_layers_devices() -> None:
    retriever = random_retriever(attach(), 2)
    retriever.place([torch.device(kind) for kind in ("cpu", "cpu", "meta", "cpu")])
    where = {key: {value.device.type for value in delta.parameters()} for key, delta in retriever.deltas.items()}
    assert {key for key, kinds in where.items() if kinds == {"meta"}} == {f"layers_2_{n}_proj" for n in "qkv"}
    assert retriever.embedding.device.type == "cpu"


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"num_key_value_heads": 4}, "num_kv_heads: retriever has 2, model has 4"), ({"seed": 5}, "norm_digest"),
     ({"vocab_size": 200}, "vocab_size: retriever has 128, model has 200")],
)  # fmt: skip
def test_another_backbone_is_refused(changes: dict[str, Any], named: str, saved: Path) -> None:
    lm = attach(**changes)
    with pytest.raises(IncompatibleRetrieverError, match=named):
        lm.use_retriever(saved)
    assert lm.retriever is None
    with pytest.raises(IncompatibleRetrieverError, match="'llama', model has 'qwen2'"):
        attach("qwen2").use_retriever(saved)


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def _garbage(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"not a tensor in sight" * 50)


def _no_weights(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()


def _no_card(folder: Path) -> None:
    (folder / CARD_FILE).unlink()


def _change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return damage


def _change_card(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        card = json.loads((folder / CARD_FILE).read_text())
        (folder / CARD_FILE).write_text(json.dumps({**card, **fields}))

    return damage


def _card_text(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / CARD_FILE).write_text(text)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "can't be read"),
    "garbage": (_garbage, "can't be read"),
    "no weights": (_no_weights, f"{WEIGHTS_FILE} is missing"),
    "no card": (_no_card, f"{CARD_FILE} is missing"),
    "card is no JSON": (_card_text("{"), "not a readable retriever card"),
    "card is a list": (_card_text("[]"), "not a readable retriever card"),
    "card of another kind": (_change_card(surprise=1), "not a readable retriever card"),
    "rank is a word": (_change_card(rank="four"), "not a readable retriever card"),
    "newer format": (_change_card(format_version=99), "has format 99; this version reads 1"),
    "other rank": (_change_card(rank=2), "doesn't fit this model"),
    "no embedding": (_change_tensors(lambda tensors: tensors.pop("embedding")), "damaged"),
    "not finite": (_change_tensors(lambda tensors: tensors["embedding"].fill_(torch.nan)), "damaged"),
    "a delta is missing": (_change_tensors(lambda t: t.pop("deltas.layers_1_k_proj.up")), "doesn't fit this model"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_one_clear_line(kind: str, saved: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    lm = attach()
    with pytest.raises(UserError, match=message) as caught:
        lm.use_retriever(saved)
    assert "Traceback" not in str(caught.value) and lm.retriever is None


def test_from_pretrained_finds_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    options: dict[str, Any] = {"kv_budget": 96, "page_size": 8}
    untrained = RetroLM.from_pretrained(model, **options)
    assert untrained.retriever is None and "untrained" in untrained.retriever_name
    random_retriever(untrained, 2).save(tmp_path / "shipped" / "tiny")
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "shipped")
    for retriever in ("auto", "tiny", tmp_path / "shipped" / "tiny"):
        lm = RetroLM.from_pretrained(model, retriever=retriever, **options)
        assert lm.retriever is not None and lm.retriever_name == "untitled"
    assert RetroLM.from_pretrained(model, retriever=None, **options).retriever is None
    assert RetroLM.from_pretrained(model, method="recency", **options).retriever_name.startswith("none")
    with pytest.raises(UserError, match=r"No page retriever 'tony'.*tiny"):
        RetroLM.from_pretrained(model, retriever="tony", **options)
    adopted = RetroLM.from_pretrained(model, kv_budget=400)
    assert adopted.config.page_size == 8 and adopted.read(STORY * 3).table.page_size == 8  # as it was trained
    longer = RetroLM.from_pretrained(model, kv_budget=400, page_size=16)
    assert longer.config.page_size == 16 and longer.retriever is not None  # as told
    assert RetroLM.from_pretrained(model, retriever=None, kv_budget=400).config.page_size == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_budgett": 96}, "Did you mean 'kv_budget'"),
        ({"method": "retrolmm"}, "Did you mean 'retrolm'"),
        ({"kv_budget": 20, "page_size": 8}, "under 3 pages"),
        ({"kv_budget": 2048}, "exceeds the model's window of 1024"),
        ({"kv_budget": 96, "page_size": 8, "dtype": "float13"}, "float13"),
    ],
)
def test_from_pretrained_refuses(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        RetroLM.from_pretrained(save_tiny_model(tmp_path / "model"), **arguments)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError):
            RetroLM.from_pretrained(path)


@pytest.mark.parametrize("before", [0, 6])
def test_export_reduces_the_rank_to_the_nearest_matrices(before: int, tmp_path: Path) -> None:
    """At the rank that a matrix has nothing is lost; below it the loss is that of its smallest singular values."""
    torch.manual_seed(0)
    shapes = [ProjectionShape(0, "q_proj", 12, 10)]
    retriever = PageRetriever(shapes, torch.randn(12), RetrieverCard({}, before, 16, "x"))
    for value in retriever.deltas.parameters():
        value.data = torch.randn_like(value)
    retriever.save(tmp_path / "source")
    whole = retriever.delta(0, "q_proj", torch.eye(12)).T.detach()
    for rank in (before or 10, 3):
        folder = export_retriever(tmp_path / "source", tmp_path / f"rank{rank}", 32, rank)
        found = load_retriever(folder, shapes, {})
        lost = float((found.delta(0, "q_proj", torch.eye(12)).T.detach() - whole).norm())
        assert lost == pytest.approx(float(torch.linalg.svdvals(whole)[rank:].norm()), abs=1e-4)
        assert found.card.rank == rank and found.card.details["reduced_from_rank"] == before
    with pytest.raises(UserError, match="rank"):
        export_retriever(tmp_path / "source", tmp_path / "no", 32, 11)
