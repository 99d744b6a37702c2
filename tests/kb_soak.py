"""Readers and a writer on one base for some minutes: no wrong answer, no leak. Run by `make soak`.

Usage: kb_soak.py FOLDER [--minutes M] [--readers N]. Needs only a tiny model, which it makes.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import torch

from retrolm.errors import UserError
from retrolm.knowledge_base.base import KnowledgeBase
from tiny_folder import save_tiny_model
from tiny_tokenizer import STORY

QUESTION = "What did the captain count?"
STABLE: dict[str, Any] = {"where": ["kind=stable"]}
WARM_UP = 30  # questions before memory is first looked at
LEAK_BYTES = 48 << 20


def make(folder: Path) -> Path:
    """A base with two documents that stay."""
    model = save_tiny_model(folder / "model")
    base = KnowledgeBase.create(folder / "base", model, kv_budget=160, page_size=16)
    base.add(STORY * 3, name="first", metadata={"kind": "stable"})
    base.add(STORY[50:] * 2, name="second", metadata={"kind": "stable"})
    return folder / "base"


def answers(base: KnowledgeBase) -> list[Any]:
    """An exact and a composed answer over the documents that stay."""
    found = [base.ask(QUESTION, documents="first", max_new_tokens=6), base.ask(QUESTION, max_new_tokens=6, **STABLE)]
    return [[one.reuse, list(one.answer.token_ids), [p.text for p in one.passages]] for one in found]


def read(folder: Path, expected: list[Any], stop: Event, seed: int, report: Any) -> None:
    torch.set_num_threads(1)
    base, process = KnowledgeBase.open(folder), psutil.Process()
    rng, count, wrong, before = random.Random(seed), 0, [], (0, 0)
    while not stop.is_set():
        if answers(base) != expected:
            wrong.append(f"reader {seed}: another answer at question {count}")
        try:
            base.ask(QUESTION, max_new_tokens=2)  # whatever is there now
        except UserError as error:
            wrong.append(f"reader {seed}: {error}")
        if rng.random() < 0.1:
            base.close()
            base = KnowledgeBase(folder, base.lm)
        count += 1
        if count == WARM_UP:
            gc.collect()
            before = (process.memory_info().rss, process.num_fds())
    gc.collect()
    grown = process.memory_info().rss - before[0] if count > WARM_UP else 0
    fds = process.num_fds() - before[1] if count > WARM_UP else 0
    report.put({"reader": seed, "questions": count, "wrong": wrong, "grown_bytes": grown, "grown_fds": fds})


def write(folder: Path, stop: Event, report: Any) -> None:
    torch.set_num_threads(1)
    base, rng, count = KnowledgeBase.open(folder), random.Random(7), 0
    while not stop.is_set():
        count += 1
        text = STORY[rng.randrange(100) :] * rng.randint(1, 2) + str(count)
        base.add(text, name=f"passing {count % 5}", metadata={"kind": "passing"})
        if rng.random() < 0.4:
            gone = [entry.name for entry in base.documents if entry.metadata["kind"] == "passing"]
            base.remove(rng.choice(gone))
        base.gc()
    report.put({"writer": True, "changes": count, "wrong": [p.message for p in base.verify().problems]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--readers", type=int, default=8)
    options = parser.parse_args()
    folder = make(options.folder)
    with KnowledgeBase.open(folder) as base:
        expected = answers(base)
    context = multiprocessing.get_context("spawn")
    stop, report = context.Event(), context.Queue()
    processes = [context.Process(target=write, args=(folder, stop, report))]
    processes += [
        context.Process(target=read, args=(folder, expected, stop, n, report)) for n in range(options.readers)
    ]
    for process in processes:
        process.start()
    time.sleep(options.minutes * 60)
    stop.set()
    found = [report.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    print(json.dumps(sorted(found, key=str), indent=1))
    assert all(process.exitcode == 0 for process in processes)
    assert not any(one["wrong"] for one in found), "wrong answers or damage"
    assert all(one.get("grown_bytes", 0) < LEAK_BYTES and one.get("grown_fds", 0) <= 2 for one in found), "a leak"
    left = len(os.listdir(folder / "documents"))
    assert left <= 2 + 5 + 5, f"{left} folders: removed documents pile up"


if __name__ == "__main__":
    main()
