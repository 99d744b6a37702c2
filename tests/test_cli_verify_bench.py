"""`verify` and `bench`: green where RetroLM equals the stock model, red where it doesn't."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cli_runner import Desk, run_cli
from retrolm.engine.model import RetroLM

VERIFY = ["--tokens", "77"]  # a last page of 13 tokens, and a budget that holds the text and no page more
BENCH = ["--lengths", "40,200", "--repeats", "2", "--verify-tokens", "77"]


@pytest.fixture
def slightly_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are off by one hundredth."""
    real = RetroLM.logits

    def logits(self: RetroLM, input_ids: Tensor) -> Tensor:
        return real(self, input_ids) + 1e-2

    monkeypatch.setattr(RetroLM, "logits", logits)


def test_verify_passes_and_shows_each_comparison(desk: Desk) -> None:
    outcome = run_cli("verify", *desk.options, *VERIFY, "--json")
    found = outcome.json
    assert outcome.code == 0 and found["passed"]
    assert found["dtype"] == "float32" and found["num_tokens"] == 77
    assert (found["kv_budget"], found["small_budget"]) == (81, 64)
    assert found["bar"] == max(1e-4, 3 * found["stock_difference"])
    assert [check["largest"] is None for check in found["checks"]] == [False, True] * 3
    assert all(check["largest"] is None or check["largest"] <= found["bar"] for check in found["checks"])


def test_verify_compares_on_a_text_of_the_users(desk: Desk) -> None:
    outcome = run_cli("verify", *desk.options, *VERIFY, "--file", desk.text)
    assert outcome.code == 0
    assert "equals the stock model" in outcome.out and "SDPA to eager" in outcome.out


def test_verify_fails_where_logits_differ(desk: Desk, slightly_wrong: None) -> None:
    outcome = run_cli("verify", *desk.options, *VERIFY)
    assert outcome.code == 1
    assert "FAILED" in outcome.out and "does NOT equal" in outcome.out


def test_verify_fails_where_greedy_tokens_differ(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RetroLM.generate

    def generate(self: RetroLM, input_ids: Tensor, **options: Any) -> Tensor:
        out = real(self, input_ids, **options)
        out[:, -1] += 1
        return out

    monkeypatch.setattr(RetroLM, "generate", generate)
    found = run_cli("verify", *desk.options, *VERIFY, "--json").json
    assert [check["passed"] for check in found["checks"]] == [True, False, True, False, True, True]


def test_verify_in_half_precision_compares_logits_only(desk: Desk) -> None:
    found = run_cli("verify", *desk.options, *VERIFY, "--dtype", "bfloat16", "--json").json
    assert found["dtype"] == "bfloat16"
    assert all(check["largest"] is not None and "budget ≥ text" in check["name"] for check in found["checks"])


@pytest.mark.parametrize("tokens", [40, 64, 1020, 10**9])
def test_verify_refuses_lengths_that_compare_nothing(desk: Desk, tokens: int) -> None:
    run_cli("verify", *desk.options, "--tokens", tokens).refused_in_one_line("tokens")


def test_bench_rows_say_what_was_measured_where(desk: Desk, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    outcome = run_cli("bench", *desk.options, *BENCH, "--json", "--output", target)
    found = outcome.json
    assert outcome.code == 0
    assert json.loads(target.read_text(encoding="utf-8")) == found
    assert {"commit", "versions", "hardware", "command", "measured_at", "config"} <= found.keys()
    assert [row["num_tokens"] for row in found["rows"]] == [40, 200]
    for row in found["rows"]:
        assert len(row["ours"]["runs"]) == len(row["dense"]["runs"]) == 2
        ratios = sorted(
            d["total_s"] / o["total_s"] for o, d in zip(row["ours"]["runs"], row["dense"]["runs"], strict=True)
        )
        assert row["speedup"] == pytest.approx(sum(ratios) / 2)
        assert row["ours"]["peak_bytes"] > 1e7 and row["ours"]["kv_bytes"]["device"] > 0
        assert row["num_generated"] == 4
    assert os.listdir(tmp_path) == ["figures.json"]


def test_bench_prints_ours_beside_dense(desk: Desk) -> None:
    outcome = run_cli("bench", *desk.options, *BENCH, "--dense-limit", "100", "--file", desk.text)
    lines = [line.split() for line in outcome.out.splitlines()]
    assert outcome.code == 0
    assert sum("RetroLM" in line for line in lines) == 2
    assert sum("dense" in line for line in lines) == 1  # 200 tokens are over the limit
    assert sum(word.endswith("x") and word[0].isdigit() for line in lines for word in line) == 1
    assert "Equality check passed" in outcome.err and "Beyond" not in outcome.err


def test_bench_says_where_the_time_goes(desk: Desk, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    words = ["--lengths", "40,50", "--repeats", "1", "--verify-tokens", "77", "--profile", "--output", target]
    outcome = run_cli("bench", *desk.options, *words)
    assert outcome.code == 0 and "Reading 40 tokens, profiled" in outcome.out
    shares = json.loads(target.read_text(encoding="utf-8"))["operator_shares"]
    assert sum(shares[room] for room in ("products", "attention", "stock", "own")) == pytest.approx(1.0)


def test_bench_marks_lengths_beyond_the_window(desk: Desk) -> None:
    words = ["--lengths", "1100", "--repeats", "1", "--verify-tokens", "77", "--chunk-pages", "64"]
    assert "window of 1,024 tokens" in run_cli("bench", *desk.options, *words).err


def test_bench_refuses_a_speed_up_while_the_equality_check_is_red(
    desk: Desk, tmp_path: Path, slightly_wrong: None
) -> None:
    outcome = run_cli("bench", *desk.options, *BENCH, "--output", tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert outcome.code == 1
    assert "No speed-up" in outcome.err and "FAILED" in outcome.out and "prefill" not in outcome.out
    assert written["rows"] == [] and written["equal_to_stock"]["passed"] is False


@pytest.mark.parametrize("lengths", ["", "many", "100,0", "100,,200", "1e3"])
def test_bench_refuses_lengths_that_are_none(desk: Desk, lengths: str) -> None:
    run_cli("bench", *desk.options, "--lengths", lengths).refused_in_one_line("--lengths")


def test_bench_refuses_a_text_that_is_too_short(desk: Desk) -> None:
    words = ["--lengths", "100000", "--file", desk.text]
    run_cli("bench", *desk.options, *words).refused_in_one_line("100000")
