"""F7: a training step moves the retriever alone; losses, scales and true attention are what they are said to be."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.utils._python_dispatch import TorchDispatchMode

from retrolm.config import RetroConfig
from retrolm.engine.agreement import agreement, with_words
from retrolm.engine.dense_pass import dense_pass
from retrolm.engine.model import RetroLM
from retrolm.engine.page_attention import PageAttention
from retrolm.engine.page_batch import page_batch
from retrolm.errors import UserError
from retrolm.retriever import load_retriever
from retrolm.training.checkpoint import load_state
from retrolm.training.data import Stage1Dataset
from retrolm.training.schedule import learning_rate
from retrolm.training.stage1.agreed import agreed_scores
from retrolm.training.stage1.ahead import ReadAhead
from retrolm.training.stage1.batches import Collate, Stage1Batch
from retrolm.training.stage1.held_out import dev_config, held_out_recall, kind_of, only_kinds
from retrolm.training.stage1.speed import PARTS, training_speed
from retrolm.training.stage1.step import FrozenPass, PageScores, Stage1Step
from retrolm.training.stage1.trainer import Stage1Trainer, first_retriever
from stage1_pool_maker import tiny_pool
from stage1_run_maker import W, tiny_backbone, tiny_batch, tiny_recipe, tiny_trainer
from test_against_naive import random_retriever
from tiny_models import random_ids, tiny_model

IDS = torch.arange(2, 80)[None]


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("loss", ["info_nce", "attention_kl", "mixed"])
def test_a_step_moves_the_retriever_alone(loss: str, rank: int, tmp_path: Path) -> None:
    lm = tiny_backbone()
    before, logits = bits(lm.model), lm.model(IDS).logits
    trainer = tiny_trainer(tmp_path, lm, loss=loss, rank=rank, num_steps=1, lr=1e-2)
    start = bits(trainer.step_module)
    assert trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert torch.equal(lm.model(IDS).logits, logits)
    assert not any(value.requires_grad or value.grad is not None for value in lm.model.parameters())
    moved = {name for name, value in trainer.step_module.state_dict().items() if not torch.equal(value, start[name])}
    assert {"retriever.embedding", "log_scales"} <= moved
    assert any(name.startswith("retriever.deltas.layers_2_k_proj") for name in moved)
    assert all(name.startswith(("retriever.", "log_scales")) for name in moved)


def test_the_scale_of_what_layers_agree_on_is_trained_too(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, agreed_share=1.0, num_steps=1, lr=1e-2)
    start = bits(trainer.step_module)
    assert trainer.run()
    moved = {name for name, value in trainer.step_module.state_dict().items() if not torch.equal(value, start[name])}
    assert "agreed_log_scale" in moved


def test_one_batch_is_learnt(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    trainer = tiny_trainer(tmp_path, num_steps=30, lr=1e-2, accumulate=1, log_every=1)
    trainer.on_row = rows.append
    same = trainer.reading(repeat(tiny_batch(trainer.recipe)))
    while trainer.step < 30:
        trainer._one_step(same)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["tokens"] == 30 * tiny_batch(trainer.recipe).pages.num_tokens


def test_calibrated_scores_have_a_standard_deviation_of_one() -> None:
    lm, recipe = tiny_backbone(), tiny_recipe()
    module = Stage1Step(lm, random_retriever(lm, 0), recipe.train)
    batch = tiny_batch(recipe)
    raw = module(batch).spreads_L
    module.calibrate(raw)
    assert torch.allclose(raw * module.log_scales.exp(), torch.ones(len(raw)))
    assert module.layers == [1, 2]


def test_mixed_is_the_weighted_sum() -> None:
    lm = tiny_backbone()
    retriever, batch = random_retriever(lm, 0), tiny_batch(tiny_recipe())
    losses = {}
    for kind in ("info_nce", "attention_kl", "mixed"):
        train = tiny_recipe(loss=kind, kl_share=0.3).train
        losses[kind] = float(Stage1Step(lm, retriever, train)(batch).loss.detach())
    assert losses["mixed"] == pytest.approx(0.7 * losses["info_nce"] + 0.3 * losses["attention_kl"], rel=1e-5)
    assert losses["info_nce"] != pytest.approx(losses["attention_kl"], rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "qwen3", "phi3", "gemma2", "mistral-sliding"])
def test_page_attention_is_the_stock_models(name: str) -> None:
    """Attention weights of the stock model, summed by page; the second sequence is padded."""
    model = tiny_model(name)
    lm = RetroLM(model, config=RetroConfig(kv_budget=96, page_size=8))
    prefix, texts = random_ids(5).tolist(), [random_ids(n, n).tolist() for n in (37, 20)]
    questions = [random_ids(n, n).tolist() for n in (3, 6)]
    batch = page_batch(prefix, texts, questions, 8, pad_id=0)
    layers = [n for n in range(lm.backbone.num_layers) if lm.backbone.retrieves(n)]
    attention = PageAttention(lm.backbone, batch, layers)
    dense_pass(lm.backbone, lm.attachment, batch, attention)
    assert sorted(attention.mass) == layers
    model.set_attn_implementation("eager")
    for row, (text, question) in enumerate(zip(texts, questions, strict=True)):
        with torch.no_grad():
            weights = model(torch.tensor([prefix + text + question]), output_attentions=True).attentions
        for layer in layers:
            mass = weights[layer][0, :, -len(question) :].mean((0, 1))[5 : 5 + len(text)]
            expected = torch.stack([part.sum() for part in mass.split(8)]).float()
            found = attention.mass[layer][row]
            assert torch.allclose(found[: len(expected)], expected, atol=2e-6) and not bool(
                found[len(expected) :].any()
            )
            shares = attention.shares(layer)[row]
            assert shares.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_learning_rate() -> None:
    rates = [learning_rate(step, 100, 0.1, 0.05) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.05 <= rates[-1] < 0.06
    assert [learning_rate(step, 1, 0.0, 0.0) for step in range(1)] == [1.0]


class Notebook(GeneralTracker):
    """A tracker of accelerate that keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        self.finished = False

    @property
    def tracker(self) -> dict[int, dict[str, Any]]:
        return self.rows

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.setdefault(step or 0, {}).update(values)

    def finish(self) -> None:
        self.finished = True


def test_trackers_get_settings_and_rows(tmp_path: Path) -> None:
    notebook = Notebook()
    recipe = tiny_recipe(num_steps=2, dev_every=2)
    trainer = Stage1Trainer(recipe, tiny_backbone(), tiny_pool(), tmp_path, trackers=[notebook])
    assert trainer.run()
    assert notebook.settings["train.lr"] == recipe.train.lr and notebook.finished
    assert {"loss", "recall8", "tokens_per_s", "dev_recall.mean"} <= notebook.rows[2].keys()
    with pytest.raises(UserError, match="notepad"):
        Stage1Trainer(recipe, tiny_backbone(), tiny_pool(), tmp_path, trackers=["notepad"])


def test_a_run_goes_on_from_a_retriever(tmp_path: Path) -> None:
    lm = tiny_backbone()
    folder = random_retriever(lm, 3).save(tmp_path / "first")
    retriever = first_retriever(lm, tiny_recipe(init_from=str(folder)).train)
    assert torch.equal(retriever.embedding, random_retriever(lm, 3).embedding)
    assert "init_from" in retriever.card.details
    with pytest.raises(UserError, match="has rank 3, the recipe 5"):
        first_retriever(lm, tiny_recipe(init_from=str(folder), rank=5).train)


def test_texts_beyond_the_window_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, vocab_size=600, max_position_embeddings=400)
    lm = RetroLM(model, tiny_backbone().tokenizer, config=RetroConfig(kv_budget=3 * W, page_size=W))
    with pytest.raises(UserError, match=r"max_tokens=500 exceeds the model's window of 400.*at most"):
        tiny_trainer(tmp_path, lm)


def test_long_texts_must_fit_the_window_too(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32, vocab_size=600, max_position_embeddings=600)
    lm = RetroLM(model, tiny_backbone().tokenizer, config=RetroConfig(kv_budget=3 * W, page_size=W))
    recipe = tiny_recipe()
    data = dataclasses.replace(recipe.data, long_share=0.1, long_tokens=700)
    with pytest.raises(UserError, match=r"long_tokens=700 exceeds the model's window of 600"):
        Stage1Trainer(dataclasses.replace(recipe, data=data), lm, tiny_pool(), tmp_path)
    assert dev_config(data, 0, 0).max_tokens == 700 and dev_config(data, 200, 300).longest == 300


def test_held_out_texts_can_be_of_some_kinds_alone() -> None:
    data = tiny_recipe().data  # weights: wiki 2, chat 1, facts 1, registers 1, cloze 1
    found = only_kinds(data, ["people", "registers"])
    assert found.weights == pytest.approx({"wiki": 2 / 3, "chat": 1 / 3, "registers": 1, "facts": 0, "cloze": 0})
    assert dataclasses.replace(found, weights=data.weights) == data
    for kind in ("register", "chains"):
        with pytest.raises(UserError, match=f"Unknown kind of text in the recipe.s mixture .{kind}."):
            only_kinds(data, [kind])


def test_dev_recall_covers_all_lengths_and_counts_its_samples(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, dev_every=1, num_steps=1, dev_samples=12)
    assert trainer.run()
    found = trainer.retriever.card.details["dev_recall"]
    assert found["step"] == 1 and 0 <= found["mean"] <= found["best"] <= 1
    assert {"step": 1, **trainer.dev_recall()} == found
    assert 0 <= found["agreed"] <= 1 and list(found["agreed_kinds"]) == list(found["kinds"])
    assert max(found["layers"]) == found["best"] and len(found["layers"]) == 2
    assert sorted(found["kinds"]) == ["cloze", "facts", "people", "registers"]  # wiki and chat are people's


def test_recall_by_kind_adds_up(tmp_path: Path) -> None:
    """Kinds measured one by one, weighted by their questions, give the mean over all."""
    trainer = tiny_trainer(tmp_path, dev_samples=10)
    step, config = trainer.step_module, dev_config(trainer.recipe.data, 200, 300)
    data = Stage1Dataset(tiny_pool(), trainer.lm.tokenizer, config, 10, "dev")
    collate = Collate(W, trainer.lm.pad_id)
    other = Stage1Step(trainer.lm, random_retriever(trainer.lm, 1), trainer.recipe.train)
    found, _ = held_out_recall([step, other], data, [[n] for n in range(10)], collate, trainer.lm.device)
    hits: dict[str, list[torch.Tensor]] = {}
    for number in range(10):
        assert 200 <= len(data[number].input_ids) <= 300
        result = step(collate([data[number]]))
        counted = ~result.hits_LN[0].isnan()
        hits.setdefault(kind_of(data[number].source), []).append(result.hits_LN[:, counted])
    by_kind = {kind: torch.cat(parts, 1) for kind, parts in hits.items()}
    assert {kind: part.mean().item() for kind, part in by_kind.items() if part.numel()} == pytest.approx(
        {kind: share for kind, share in found["kinds"].items() if share is not None}, abs=1e-4
    )
    assert found["asked"] == {kind: by_kind[kind].shape[1] if kind in by_kind else 0 for kind in found["kinds"]}
    everything = torch.cat(list(by_kind.values()), 1).mean(1)
    assert everything.tolist() == pytest.approx(found["layers"], abs=1e-4)
    assert step.training


def test_low_layers_learn_from_all_layers() -> None:
    """The divergence is nothing where layers agree, and its target takes no gradient."""
    lm, batch = tiny_backbone(), tiny_batch(tiny_recipe(), num_further=1)
    module = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(teacher_share=1.0).train)
    frozen = module.read(batch)
    scores = module.scores(batch, frozen)
    same = PageScores(scores.own_LKNP[:1].expand_as(scores.own_LKNP))
    assert float(module.judge(batch, same, frozen).loss.detach()) == pytest.approx(0.0, abs=1e-6)
    expected = 0.0
    there = batch.pages.text_lengths > 0
    for n, share in enumerate(batch.share_N.tolist()):
        rows = scores.own_LKNP[:, 0, n, there[batch.sequence_N[n]]].detach().double()
        target = rows.mean(0).softmax(0)
        expected += share * float((target * (target.log() - rows.log_softmax(1))).sum(1).mean())
    assert float(module.judge(batch, scores, frozen).loss.detach()) == pytest.approx(expected, rel=1e-4)
    half = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(teacher_share=0.5).train)
    none = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe().train)
    mean = (expected + float(none.judge(batch, scores, frozen).loss.detach())) / 2
    assert float(half.judge(batch, scores, frozen).loss.detach()) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("num_layers", [1, 2, 9])
@pytest.mark.parametrize("with_words", [False, True])
def test_what_layers_agree_on_is_trained_as_the_engine_chooses(num_layers: int, with_words: bool) -> None:
    """Scores are those of `agreement` and `with_words`; the loss is eq 7 on them, over the pages that compete."""
    lm, batch = tiny_backbone(), tiny_batch(tiny_recipe(), num_further=1)
    options: dict[str, Any] = {"agreed_layers": num_layers, "agreed_words": 0.5}
    words = torch.rand(batch.positive_NP.shape) if with_words else None
    batch.words_NP = words
    module = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(agreed_share=1.0, **options).train)
    frozen = module.read(batch)
    scores = module.scores(batch, frozen)
    found = module.judge(batch, scores, frozen)
    expected, num_asked = 0.0, 0
    for n, share in enumerate(batch.share_N.tolist()):
        num_pages = int((batch.pages.text_lengths[batch.sequence_N[n]] > 0).sum())
        rows = scores.own_LKNP[-num_layers:, 0, n, :num_pages].detach().double()
        matches = None if words is None else words[n, :num_pages].double()
        first = 0 if batch.pages.num_prefix else 1
        row = with_words_agreed(rows, matches, 0.5, first)
        free = range(first, num_pages - 1)
        gold = [p for p in free if batch.positive_NP[n, p]]
        wrong = [p for p in free if batch.negative_NP[n, p]]
        for p in gold:
            others = row[wrong].exp().sum()
            expected -= share * float((row[p].exp() / (row[p].exp() + others)).log()) / len(gold)
        num_asked += len(gold) > 0
        if gold and len(gold) == int(batch.positive_NP[n].sum()) and len(gold) <= 4:
            best = row[first : num_pages - 1].topk(min(8, len(free))).indices + first
            assert bool(found.agreed_N[n]) == bool(set(best.tolist()) & set(gold))
    assert num_asked >= 1
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-4)
    none = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(**options).train).judge(batch, scores, frozen)
    half = Stage1Step(lm, random_retriever(lm, 0), tiny_recipe(agreed_share=0.5, **options).train)
    mean = (expected + float(none.loss.detach())) / 2
    assert float(half.judge(batch, scores, frozen).loss.detach()) == pytest.approx(mean, rel=1e-4)


def with_words_agreed(rows_LP: torch.Tensor, matches_P: torch.Tensor | None, weight: float, first: int) -> torch.Tensor:
    agreed = agreement(rows_LP, num_sink=first, num_local=1)
    found = with_words(agreed, matches_P, weight, num_sink=first, num_local=1)
    assert found is not None
    return found


def test_pages_that_all_tie_give_no_gradient_that_is_not_a_number() -> None:
    scores = torch.zeros(2, 1, 3, 5, requires_grad=True)
    free = torch.tensor([[True] * 5, [True, False, False, False, False], [False] * 5])
    found = agreed_scores(scores, torch.zeros(3, 5), free, 1.0)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(3, 5)) and scores.grad is not None and scores.grad.isfinite().all()


def test_a_running_mean_is_measured_and_kept(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, ema=0.5, num_steps=3, lr=1e-2)
    step = trainer.step_module
    mean, seen = bits(step.retriever), []
    follow = step.follow

    def note(number: int) -> None:
        seen.append(bits(step.retriever))
        follow(number)

    step.follow = note  # type: ignore[method-assign]
    assert trainer.run() and len(seen) == 3
    for number, weights in enumerate(seen):
        decay = min(0.5, (1 + number) / (10 + number))
        mean = {name: decay * value + (1 - decay) * weights[name] for name, value in mean.items()}
    backbone = trainer.lm.backbone
    found = load_retriever(trainer.retriever_folder, backbone.projection_shapes(), backbone.fingerprint())
    assert found.card.details["step"] == 3
    kept = found.state_dict()
    assert all(torch.allclose(kept[name], value, atol=1e-6) for name, value in mean.items())
    assert not all(torch.allclose(kept[name], value) for name, value in bits(step.retriever).items())
    batch = tiny_batch(trainer.recipe)
    frozen = step.read(batch)
    trained = step.scores(batch, frozen).own_LKNP
    step.eval()
    measured = step.scores(batch, frozen).own_LKNP
    step.retriever.load_state_dict(kept)
    assert torch.allclose(step.train().scores(batch, frozen).own_LKNP, measured, atol=1e-5)
    assert not torch.allclose(trained, measured, atol=1e-5)


def test_a_run_with_a_running_mean_goes_on_bit_for_bit(tmp_path: Path) -> None:
    levers = {"ema": 0.9, "batch_negatives": 0.5, "teacher_share": 0.2, "agreed_share": 0.5}
    options: dict[str, Any] = {"num_steps": 4, **levers}
    assert tiny_trainer(tmp_path / "whole", **options).run()
    assert not tiny_trainer(tmp_path / "parts", **options).run(stop_after_s=1e-9)
    assert tiny_trainer(tmp_path / "parts", **options).run(resume=True)
    found, wanted = (load_state(tmp_path / name) for name in ("parts", "whole"))
    assert found is not None and wanted is not None and any(name.startswith("average.") for name in wanted.model)
    assert all(torch.equal(value, wanted.model[name]) for name, value in found.model.items())


def test_speed_is_measured_beside_the_stock_forward_pass(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, num_steps=1, save_every=0)
    start = bits(trainer.step_module)
    found = training_speed(trainer, 2)
    assert found["num_tokens"] > 0 and found["num_batches"] == 2
    for part in ("forward", "forward_again", "training", "training_in_turn"):
        assert found[part]["tokens_per_s"] == pytest.approx(found["num_tokens"] / found[part]["seconds"])
    for name, forward in (("overhead", "forward"), ("overhead_again", "forward_again")):
        assert found[name] == pytest.approx(found["training"]["seconds"] / found[forward]["seconds"] - 1)
    assert 0 <= found["training"]["data_wait_s"] < found["training"]["seconds"]
    assert tuple(found["parts"]) == PARTS
    assert all(0 < part["host_s"] <= part["seconds"] for part in found["parts"].values())
    assert not torch.equal(trainer.step_module.log_scales, start["log_scales"])  # whole steps, optimiser and all
    assert not list(tmp_path.iterdir())


def test_the_parts_of_a_step_are_the_step(tmp_path: Path) -> None:
    """What `training_speed` takes apart gives the gradients of a step."""
    trainer = tiny_trainer(tmp_path)
    module, batch = trainer.step_module, tiny_batch(trainer.recipe)
    module(batch).loss.backward()
    whole = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    frozen = module.read(batch)
    module.judge(batch, module.scores(batch, frozen), frozen).loss.backward()
    assert len(whole) > 10
    assert all(torch.equal(p.grad, whole[name]) for name, p in module.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_reading_ahead_changes_no_bit(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the next batch is read in a thread of its own, also across dev rounds and a stop by time."""
    options: dict[str, Any] = {"num_steps": 4, "accumulate": accumulate, "dev_every": 2, "save_every": 2}
    assert tiny_trainer(tmp_path / "plain", **options).run()
    reading, threads = Stage1Trainer.reading, set()

    def note_thread(trainer: Stage1Trainer, batch: Stage1Batch) -> FrozenPass:
        threads.add(threading.current_thread().name)
        return Stage1Step.read(trainer.step_module, batch)

    def ahead(trainer: Stage1Trainer, batches: Iterator[Stage1Batch]) -> ReadAhead:
        monkeypatch.setattr(trainer.step_module, "read", lambda batch: note_thread(trainer, batch), raising=True)
        return reading(trainer, batches, ahead=True)

    monkeypatch.setattr(Stage1Trainer, "reading", ahead)
    lm = tiny_backbone()
    assert not tiny_trainer(tmp_path / "ahead", lm, **options).run(stop_after_s=1e-9)
    assert lm.model(IDS).logits.isfinite().all()  # nothing is still at work in the model
    assert tiny_trainer(tmp_path / "ahead", lm, **options).run(resume=True)
    assert any(name.startswith("retrolm-read-ahead") for name in threads)
    found, wanted = (load_state(tmp_path / name) for name in ("ahead", "plain"))
    assert found is not None and wanted is not None and found.tokens == wanted.tokens
    assert all(torch.equal(value, wanted.model[name]) for name, value in found.model.items())


def test_an_error_while_reading_ahead_is_told(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)

    def ends() -> Iterator[Stage1Batch]:
        yield from (tiny_batch(trainer.recipe) for _ in range(2))
        raise UserError("No more texts.")

    batches = trainer.reading(ends(), ahead=True)
    trainer.update(batches, more=True)
    with pytest.raises(UserError, match="No more texts"):
        trainer.update(batches, more=True)
    batches.stop()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_step_never_waits_for_the_device(family: str, tmp_path: Path) -> None:
    """No number is read from a tensor, and no shape depends on one, between a batch's arrival and the next batch."""
    levers: dict[str, Any] = {"batch_negatives": 1.0, "teacher_share": 0.1, "agreed_share": 0.5, "ema": 0.9}
    trainer = tiny_trainer(tmp_path, tiny_backbone(family), **levers)
    batch = tiny_batch(trainer.recipe, num_further=2)
    batch.rival_NM = torch.ones(len(batch.sequence_N), batch.pages.text_lengths.numel(), dtype=torch.bool)
    with Waits() as waits:
        module = trainer.step_module
        module(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        module.follow(3)
    assert not waits.found


class Waits(TorchDispatchMode):
    """Notes operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        masked = name in ("index", "index_put", "_index_put_impl_") and any(
            getattr(index, "dtype", None) == torch.bool for index in args[1]
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.found.append(name)
        return op(*args, **(kwargs or {}))
