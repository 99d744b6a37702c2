"""Measures knowledge bases: cold start, a million tokens, reading beyond host memory, pages of fewer bits.

    python scripts/kb_bench.py cold      --text BOOK --folder DIR --tokens 200000
    python scripts/kb_bench.py million   --text BOOK --folder DIR --tokens 1000000 --store-bits 8
    python scripts/kb_bench.py spill     --text BOOK --folder DIR --tokens 65536 --host-kv-gb 0.5
    python scripts/kb_bench.py quantised --text BOOK --folder DIR --tokens 16384 --facts 12

Each prints one JSON object. Large documents are made of a short text's real pages, repeated; what is said of reading
speed is measured on `--read-tokens` tokens and, for longer texts, projected (reading time per page is constant once the
budget is full). `cold` drops the file cache where it may (root), else only that of the base and the model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from retrolm import KnowledgeBase, RetroLM
from retrolm.engine.memory import PeakMemory
from retrolm.engine.plan import look_around, plan
from retrolm.engine.preflight import count_tokens
from retrolm.engine.provenance import provenance
from retrolm.knowledge_base.answers import KnowledgeAnswer
from retrolm.knowledge_base.manifest import PAGES_FILE
from retrolm.knowledge_base.plan import plan_asking
from retrolm.knowledge_base.synthesise import add_repeated
from retrolm.planting import Fact, random_facts

QUESTION = "What is this text about?"
FACT_QUESTION = "What is the special magic number for {key} mentioned in the text?"
FACT_SENTENCE = " One of the special magic numbers for {key} is: {value}. "
SEED_TOKENS = 4096

# Run in a process of its own; argv: base, question, wall time just before it was started.
CHILD = """
import json, sys, time
from pathlib import Path

def io():
    return {k: int(v) for k, v in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}

started = float(sys.argv[3])
from retrolm.knowledge_base.base import KnowledgeBase
from retrolm.knowledge_base.read_ahead import read_ahead

base = KnowledgeBase.open(sys.argv[1])
read_ahead(base.manifest.setup["weights_folder"])
opened = time.time()
from retrolm.cli.startup import quick_imports
with quick_imports():
    import retrolm.engine.model
    imported = time.time()
    base.lm
loaded, before = time.time(), io()
first = base.ask(sys.argv[2], max_new_tokens=1)
done, after = time.time(), io()
second = base.ask(sys.argv[2] + " Why?", max_new_tokens=1)
print(json.dumps({
    "open_s": opened - started, "import_s": imported - opened, "load_s": loaded - imported, "ask_s": done - loaded,
    "first_token_s": done - started, "next_ttft_s": second.answer.timings.ttft_s,
    "page_bytes_read": first.page_bytes_read, "read_syscall_bytes": after["rchar"] - before["rchar"],
    "disk_bytes": after["read_bytes"] - before["read_bytes"],
}))
"""


def main() -> None:
    options = _options()
    found = globals()[options.what](options)
    print(json.dumps({"what": options.what, **found, **provenance(sys.argv)}, indent=1))


def cold(options: argparse.Namespace) -> dict[str, Any]:
    """Process start to first token beside reading the text again."""
    base, written_s = _large_base(options)
    entry, folder = base.documents[0], str(base.folder)
    reading = _reading(base.lm, options)
    weights = base.manifest.setup["weights_folder"]
    runs = []
    for _ in range(options.repeats):
        dropped = _drop_caches([Path(folder), Path(weights)])
        command = [sys.executable, "-c", CHILD, folder, QUESTION, repr(time.time())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append({"cache_dropped": dropped, **json.loads(done.stdout.splitlines()[-1])})
    most = max(run["read_syscall_bytes"] for run in runs)
    return {
        "num_tokens": entry.num_tokens,
        "base_bytes": entry.num_bytes,
        "written_s": written_s,
        "runs": runs,
        "share_read": most / entry.num_bytes,
        "reading_again": reading | {"projected_s": entry.num_tokens / reading["tokens_per_s"]},
    }


def million(options: argparse.Namespace) -> dict[str, Any]:
    """Opening and asking a base far larger than memory, and what was expected of it."""
    before = look_around()
    base, written_s = _large_base(options)
    lm = base.lm
    base.close()
    started = time.perf_counter()
    base = KnowledgeBase.open(options.folder / "base", lm)
    open_s = time.perf_counter() - started
    found = plan_asking(base, QUESTION, before)
    asked = []
    for number in range(options.repeats):
        with PeakMemory() as memory:
            started = time.perf_counter()
            answer = base.ask(f"{QUESTION} ({number})", max_new_tokens=8)
            seconds = time.perf_counter() - started
        grown = memory.host_peak_bytes - memory.host_start_bytes
        asked.append({"ask_s": seconds, "ttft_s": answer.answer.timings.ttft_s, "host_bytes_grown": grown,
                      "host_peak_bytes": memory.host_peak_bytes,
                      "page_bytes_read": answer.page_bytes_read})  # fmt: skip
    entry = base.documents[0]
    return {"num_tokens": entry.num_tokens, "base_bytes": entry.num_bytes, "written_s": written_s, "open_s": open_s,
            "asked": asked, "planned_host_bytes": found.host_bytes}  # fmt: skip


def spill(options: argparse.Namespace) -> dict[str, Any]:
    """Reading a text into a base with a cap on host memory, and what was expected of it."""
    before = look_around()
    base = _new_base(options)
    text = _text_of(base.lm, options, options.tokens)
    base.lm.use_disk_tier(base.folder, int(options.host_kv_gb * 1e9))
    expected = plan(base.lm, count_tokens(base.lm, text), QUESTION, before)
    with PeakMemory() as memory:
        (added,) = base.add(text, name="text")
    entry = added.document
    return {
        "num_tokens": entry.num_tokens,
        "tokens_per_s": entry.num_tokens / entry.prefill_s,
        "host_kv_bytes": int(options.host_kv_gb * 1e9),
        "page_bytes": entry.files[PAGES_FILE].bytes,
        "host_bytes_grown": memory.host_peak_bytes - memory.host_start_bytes,
        "host_peak_bytes": memory.host_peak_bytes,
        "planned_host_bytes": expected.host_bytes,
        "planned_bytes_grown": expected.host_bytes - memory.host_start_bytes,
        "answer": base.ask(QUESTION, max_new_tokens=8).text,
        "sound": base.verify().sound,
    }


def quantised(options: argparse.Namespace) -> dict[str, Any]:
    """Size, chosen pages, recall of evidence and answers with 8 and 4 bits beside 16, for facts planted in the text."""
    facts = random_facts(random.Random(options.seed), options.facts, "word_pair", "number")
    plain, rows = None, []
    for bits in (16, 8, 4):
        options.store_bits = bits
        base = _new_base(options)
        base.add(_planted(_text_of(base.lm, options, options.tokens), facts), name="text")
        found = [base.ask(FACT_QUESTION.format(key=fact.key), max_new_tokens=24) for fact in facts]
        plain = plain or (base.documents[0].files[PAGES_FILE].bytes, found)
        rows.append({
            "bits": bits,
            "bytes_against_16": base.documents[0].files[PAGES_FILE].bytes / plain[0],
            "same_answers": sum(a.text == b.text for a, b in zip(found, plain[1], strict=True)) / len(found),
            "answered": sum(f.values[0] in a.text for f, a in zip(facts, found, strict=True)) / len(found),
            "evidence_recall": sum(map(_evidence_recall, found, facts)) / len(found),
            "chosen_pages_shared": _overlap(found, plain[1]),
        })  # fmt: skip
    return {"num_facts": len(facts), "seed": options.seed, "rows": rows}


def _planted(text: str, facts: list[Fact]) -> str:
    """The text with the facts spread over it."""
    step = len(text) // len(facts)
    parts = [text[i * step : (i + 1) * step] for i in range(len(facts))]
    return "".join(
        part + FACT_SENTENCE.format(key=fact.key, value=fact.values[0]) for part, fact in zip(parts, facts, strict=True)
    )


def _evidence_recall(answer: KnowledgeAnswer, fact: Fact) -> float:
    """Share of the layers with a choice of their own that attend a page with the fact."""
    return max((passage.score for passage in answer.passages if fact.values[0] in passage.text), default=0.0)


def _overlap(found: list[Any], plain: list[Any]) -> float:
    """Share of the pages that each layer chose with 16 bits which it chooses here too."""
    shared = total = 0
    for one, other in zip(found, plain, strict=True):
        pairs = zip(one.answer.retrieval.page_ids.tolist(), other.answer.retrieval.page_ids.tolist(), strict=True)
        for mine, theirs in pairs:
            shared, total = shared + len(set(mine) & set(theirs) - {-1}), total + len(set(theirs) - {-1})
    return shared / max(total, 1)


def _new_base(options: argparse.Namespace) -> KnowledgeBase:
    folder = options.folder / "base"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"kv_budget": options.kv_budget, "store_bits": options.store_bits}
    if options.store_dtype:
        settings["store_dtype"] = options.store_dtype
    return KnowledgeBase.create(folder, options.model, **settings)


def _large_base(options: argparse.Namespace) -> tuple[KnowledgeBase, float]:
    """A base with one made-up document, and the seconds it took to write."""
    base = _new_base(options)
    text = _text_of(base.lm, options, SEED_TOKENS)
    started = time.perf_counter()
    add_repeated(base, text, options.tokens, "large")
    return base, time.perf_counter() - started


def _text_of(lm: RetroLM, options: argparse.Namespace, num_tokens: int) -> str:
    """The beginning of the text, repeated if it is too short: about `num_tokens` tokens."""
    text: str = options.text.read_text(encoding="utf-8")
    per_char = len(lm.tokenizer(text[:20000])["input_ids"]) / len(text[:20000])
    wanted = int(num_tokens / per_char)
    return (text * (wanted // len(text) + 1))[:wanted]


def _reading(lm: RetroLM, options: argparse.Namespace) -> dict[str, Any]:
    """Reading speed on the text itself."""
    document = lm.read(_text_of(lm, options, options.read_tokens))
    return {"num_tokens": document.num_tokens, "prefill_s": document.prefill_s,
            "tokens_per_s": document.num_tokens / document.prefill_s}  # fmt: skip


def _drop_caches(paths: list[Path]) -> str:
    """Empty the file cache: "all" of it with root's rights, else "files" of these folders."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "all"
    except OSError:
        pass
    for path in (file for folder in paths for file in folder.rglob("*") if file.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "files"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cold", "million", "spill", "quantised"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="Where the base is made; needs its size in space.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--read-tokens", type=int, default=16_384)
    parser.add_argument("--kv-budget", type=int, default=2048)
    parser.add_argument("--store-bits", type=int, default=16, choices=[16, 8, 4])
    parser.add_argument("--store-dtype", default="bfloat16")
    parser.add_argument("--host-kv-gb", type=float, default=0.5)
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
