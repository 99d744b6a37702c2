"""Attention maps: what is drawn is what the model attends to, and the evidence stands where it is marked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli_runner import run_cli
from retrolm.evaluation.attention_maps import attention_map, gold_ranks
from retrolm.evaluation.report.maps import rank_rows, write_map
from tiny_eval import story_sample, tiny_lm
from tiny_folder import save_tiny_model

QUOTE = "Who spoke"


@pytest.fixture(scope="module")
def found():  # type: ignore[no-untyped-def]
    sample = story_sample(3, 700)
    return attention_map(
        tiny_lm(), story_sample(3, 700, extra={"gold_spans": [[200, 240]]}, context=sample.context), {}, strip_tokens=4
    )


def test_strips_add_up_to_pages(found) -> None:  # type: ignore[no-untyped-def]
    per_page = found.page_size // found.strip_tokens
    num_pages = found.mass_LP.shape[1]
    padded = torch.zeros(found.attention_LS.shape[0], num_pages * per_page)
    padded[:, : found.attention_LS.shape[1]] = found.attention_LS
    assert torch.allclose(padded.unflatten(1, (num_pages, per_page)).sum(2), found.mass_LP, atol=1e-5)
    assert -(-found.num_tokens // found.strip_tokens) == found.attention_LS.shape[1]
    assert float(found.mass_LP.sum(1).max()) < 1


def test_the_evidence_is_where_it_was_said_to_be(found) -> None:  # type: ignore[no-untyped-def]
    ((start, end),) = found.spans
    assert found.gold <= set(range(start // found.page_size, (end - 1) // found.page_size + 1)) and found.gold
    ids = tiny_lm().tokenizer(found.sample.context, add_special_tokens=False)["input_ids"]
    marked = tiny_lm().tokenizer.decode(ids[start:end])
    assert found.sample.context[200:240].strip() in marked


def test_ranks_count_the_pages_that_are_better() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 1.0], [torch.nan] * 4])
    assert gold_ranks(scores, frozenset({2})) == [2, 2, None]
    assert gold_ranks(scores, frozenset({2, 1})) == [2, 1, None]


def test_layers_without_scores_have_no_rank(found) -> None:  # type: ignore[no-untyped-def]
    rows = rank_rows(found)
    assert len(rows) == found.mass_LP.shape[0] and not rows[0][3].isdigit() and rows[1][3].isdigit()
    assert all(row[2].isdigit() for row in rows)


def test_a_picture_and_a_page_of_their_own_are_written(found, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    picture, page = write_map(found, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stem == page.stem
    text = page.read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in text and 'src="http' not in text
    assert QUOTE in text and "untrained_bookmarks" in text and f"Evidence in page {min(found.gold)}" in text


def test_a_text_whose_evidence_is_unknown_is_drawn_without_marks(tmp_path: Path) -> None:
    plain = attention_map(tiny_lm(), story_sample(1, 300), {})
    assert rank_rows(plain) == []
    assert "doesn't say where its evidence stands" in write_map(plain, tmp_path)[1].read_text(encoding="utf-8")


def test_the_command_draws_the_samples_asked_for(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", max_position_embeddings=4096)
    words = ["eval", "attention", "--model", model, "--task", "ruler/niah_single_1", "--lengths", 600]
    words += ["--num-samples", 3, "--page-size", 32, "--out", tmp_path / "maps"]
    run = run_cli(*words, "--sample", 1, "--sample", 2)
    assert run.code == 0 and len(run.out.split()) == 4 and all(Path(line).is_file() for line in run.out.split())
    assert "Unknown sample" in run_cli(*words, "--sample", 9).err
