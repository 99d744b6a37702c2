"""Large bases: pages made up from a short text, opened and asked reading next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cli_runner import Desk
from retrolm.engine.model import RetroLM
from retrolm.knowledge_base.base import KnowledgeBase
from retrolm.knowledge_base.check import check_base
from retrolm.knowledge_base.folder import Snapshot
from retrolm.knowledge_base.manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE
from retrolm.knowledge_base.synthesise import add_repeated
from tiny_folder import save_tiny_model
from tiny_tokenizer import STORY

QUESTION = "What did the captain count?"
NUM_TOKENS = 60_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with heads wide enough that pages outweigh their index as in real ones, and a base of 60K tokens."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"head_dim": 16, "num_hidden_layers": 3}
    model = save_tiny_model(folder / "model", **shape)
    base = KnowledgeBase.create(folder / "base", model, kv_budget=256, page_size=32)
    add_repeated(base, STORY * 4, NUM_TOKENS, "large")
    return folder / "base", model


def test_made_up_documents_are_sound(large: tuple[Path, Path]) -> None:
    base = KnowledgeBase.open(large[0])
    entry = base.documents[0]
    assert entry.num_tokens >= NUM_TOKENS and check_base(large[0]).sound
    found = base.ask(QUESTION, max_new_tokens=3)
    assert found.num_tokens == entry.num_tokens
    document = base.select()
    text = document.stretches[0].document.text
    for page in (5, 700, entry.num_pages - 1):
        start, end = document.page_spans[page]
        ids = base.lm.tokenizer(text[start:end], add_special_tokens=False)["input_ids"]
        assert abs(len(ids) - 32) <= 4  # the same stretch of text, if it weren't for joins at its ends
    choices = found.answer.retrieval.page_ids[1:]
    assert int(choices.max() - choices[choices > 2].min()) > entry.num_pages // 4


def test_opening_reads_no_pages(large: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def spy(path: object, *arguments: int, **options: int) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", spy)
    started = time.perf_counter()
    assert KnowledgeBase.open(large[0]).documents[0].num_tokens >= NUM_TOKENS
    assert time.perf_counter() - started < 1
    assert not any(PAGES_FILE in path for path in opened)


def test_quantised_pages_take_the_promised_share(tmp_path: Path) -> None:
    """With heads and pages as large as in real models: 8 bits 0.53, 4 bits 0.29 of bfloat16 pages at most."""
    model = save_tiny_model(tmp_path / "model", head_dim=64, num_key_value_heads=2, num_hidden_layers=2)
    sizes = {}
    for bits in (16, 8, 4):
        options = {"kv_budget": 512, "page_size": 128, "store_dtype": "bfloat16", "store_bits": bits}
        base = KnowledgeBase.create(tmp_path / str(bits), model, **options)
        base.add(STORY * 5, name="story")
        sizes[bits] = base.documents[0].files[PAGES_FILE].bytes
        lm = RetroLM.from_pretrained(model, **options)
        expected = lm.read(STORY * 5).ask(QUESTION, max_new_tokens=4)
        assert KnowledgeBase.open(tmp_path / str(bits)).ask(QUESTION, max_new_tokens=4).text == expected.text
        assert torch.equal(base.ask(QUESTION).answer.retrieval.page_ids, expected.retrieval.page_ids)
    assert sizes[8] <= 0.53 * sizes[16] and sizes[4] <= 0.29 * sizes[16]


def test_weights_are_named_for_reading_ahead(desk: Desk, tmp_path: Path) -> None:
    from retrolm.knowledge_base.read_ahead import read_ahead

    base = KnowledgeBase.create(tmp_path / "base", desk.model, kv_budget=96, page_size=16)
    assert read_ahead(base.manifest.setup["weights_folder"]) == 1
    assert read_ahead(str(tmp_path / "nowhere")) == 0 == read_ahead("")


ASKED = """
import sys
from pathlib import Path
from retrolm import KnowledgeBase
from retrolm.engine.memory import PeakMemory
from retrolm.engine.plan import look_around
from retrolm.knowledge_base.plan import plan_asking

def read_bytes():
    io = Path("/proc/self/io")  # where the system counts bytes per process
    fields = dict(line.split(": ") for line in io.read_text().splitlines()) if io.exists() else {"rchar": 0}
    return int(fields["rchar"])

before = look_around()
base = KnowledgeBase.open(sys.argv[1])
expected = plan_asking(base, sys.argv[2], before)
with PeakMemory() as memory:
    started = read_bytes()
    answer = base.ask(sys.argv[2], max_new_tokens=4)
    counted = read_bytes() - started
grown = [peak - before.program_bytes for peak in (expected.host_bytes, memory.host_peak_bytes)]
print(*grown, expected.index_bytes, expected.kv_bytes.disk, counted, answer.page_bytes_read)
"""


def test_a_question_takes_the_planned_memory_and_reads_a_small_part(large: tuple[Path, Path]) -> None:
    """In a process of its own; bytes read as the operating system counts them, index and cited texts included."""
    command = [sys.executable, "-c", ASKED, str(large[0]), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    planned, measured, index, pages, counted, pages_read = map(int, done.stdout.split())
    entry = Snapshot(large[0]).manifest.documents[0]
    files = entry.files
    assert index == files[INDEX_FILE].bytes + files[TEXT_FILE].bytes and pages == files[PAGES_FILE].bytes
    assert measured == pytest.approx(planned, rel=0.2)
    assert pages_read > 0 and counted <= 0.05 * entry.num_bytes
    assert pages_read < counted or not Path("/proc/self/io").exists()
