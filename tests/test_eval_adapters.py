"""Evaluation under LoRA adapters and with methods' knobs: rows of their own, and the bare model's untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli_runner import run_cli
from retrolm.cli.knob_settings import split_knobs
from retrolm.engine.adapter import AdapterCard, new_adapter
from retrolm.errors import UserError
from retrolm.evaluation.adapters import AdaptedVariant, AdapterLoader, with_adapters
from retrolm.evaluation.variants import Variant
from tiny_eval import CONFIG, VARIANTS, story_sample, tiny_lm
from tiny_folder import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that changes its answers."""
    lm = tiny_lm()
    adapter = new_adapter(lm.backbone, "all", rank=2, alpha=64.0, card=AdapterCard(lm.backbone.fingerprint(), "tuned"))
    torch.manual_seed(1)
    for pair in adapter.pairs:
        torch.nn.init.normal_(pair.up)  # type: ignore[union-attr]
    return adapter.save(tmp_path_factory.mktemp("adapter") / "tuned")


def test_each_variant_is_run_with_and_without() -> None:
    found = with_adapters(VARIANTS, ["none", "a"])
    assert found[:3] == VARIANTS and len(found) == 6
    assert found[3] == AdaptedVariant("full", adapter="a") != Variant("full")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.method)
def test_an_adapter_changes_answers_and_facts_and_leaves_with_its_variant(variant: Variant, folder: Path) -> None:
    loader = AdapterLoader(tiny_lm(), "tiny", CONFIG)
    (adapted,) = with_adapters([variant], [str(folder)])
    texts, facts = [], []
    for chosen in (variant, adapted, variant):
        opened = loader.open(chosen)
        facts.append(opened.facts)
        texts.append(opened.reader.answer([story_sample(0)])[0].text)
    assert texts[0] == texts[2] != texts[1] and facts[0] == facts[2]
    assert (facts[0]["adapter"], facts[1]["adapter"]) == (None, "tuned") and facts[1]["adapter_digest"]


def test_the_command_takes_adapters_and_knobs(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", max_position_embeddings=4096)
    words = ["eval", "--model", model, "--task", "ruler/vt", "--lengths", 1000, "--num-samples", 1, "--kv-budget", 256]
    words += ["--page-size", 32, "--out", tmp_path / "out"]
    run_cli(*words, "--adapter", tmp_path / "nowhere").refused_in_one_line("No adapter")
    run_cli(*words, "--set", "snapkw.window=8").refused_in_one_line("Did you mean 'snapkv'")
    run_cli(*words, "--set", "recency.window=8", "--method", "recency").refused_in_one_line("recency", "window")


def test_knobs_are_told_from_settings() -> None:
    plain, knobs = split_knobs(["chunk_pages=2", "h2o.num_recent=none", "snapkv.window = 8", "h2o.group=max"])
    assert plain == ["chunk_pages=2"]
    assert knobs == {"h2o": {"num_recent": None, "group": "max"}, "snapkv": {"window": 8}}
    with pytest.raises(UserError, match="given twice"):
        split_knobs(["h2o.group=max", "h2o.group=mean"])
