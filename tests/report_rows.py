"""Made-up rows of a run, as `retrolm eval` would write them: what the report is tested on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from retrolm.evaluation.journal import write_lines
from retrolm.evaluation.rows import digest
from retrolm.evaluation.tasks import GROUPS

METHODS = [("full", None, None), *[(m, None, b) for m in ("recency", "mean_key") for b in (1024, 2048)]]
METHODS += [("retrolm", name, budget) for name in ("tiny-retriever", "untrained") for budget in (1024, 2048)]
SHARE = {"full": 0.95, "recency": 0.3, "mean_key": 0.5, "retrolm": 0.9}


def made_up_rows(num_samples: int = 25, lengths: tuple[int, ...] = (4096, 8192, 65536)) -> list[dict[str, Any]]:
    """Rows of the needle tasks for all `METHODS`; dense attention fails beyond a window of 32K."""
    rng, rows = random.Random(1), []
    for task in GROUPS["ruler-needles"]:
        for length in lengths:
            for method in METHODS:
                rows += [_row(task, length, *method, str(index), rng) for index in range(num_samples)]
    return rows


def _row(task: str, length: int, method: str, retriever: str | None, budget: int | None, sample_id: str,
         rng: random.Random) -> dict[str, Any]:  # fmt: skip
    beyond = method == "full" and length > 32768
    share = (
        0.05 if beyond else SHARE[method] * (0.5 if retriever == "untrained" else 1.0) * (1 if budget != 1024 else 0.9)
    )
    identity = {"task": task, "length": length, "model": "tiny", "dtype": "bfloat16", "retriever": retriever,
                "adapter": None, "method": method, "prefill": "dense" if method == "full" else "streaming",
                "kv_budget": budget, "seed": 42}  # fmt: skip
    attended = budget or length
    return {
        "key": digest([identity, sample_id]),
        "config_hash": digest(identity),
        "sample_id": sample_id,
        **identity,
        "metric": "string_match_all",
        "labels": {},
        "score": float(rng.random() < share),
        "extra_scores": {},
        "failed": False,
        "prediction": "1",
        "answers": ["1"],
        "num_tokens": length - 128,
        "num_generated": 9,
        "truncated": False,
        "attended_tokens": {"prefill": attended, "decode": attended + 8},
        "ttft_s": length / 40000,
        "tpot_s": 0.02,
        "total_s": length / 30000,
        "prefill_s": 0.0,
        "kv_bytes": {},
        "batch_size": 4,
        "peak_device_bytes": int(1e9 + (length if budget is None else 3000) * 4e4),
        "peak_host_bytes": 2 * 10**9,
        "beyond_window": beyond,
        "commit": "abc",
        "versions": {"torch": "2"},
        "hardware": {"gpus": ["G"]},
        "command": "retrolm eval",
        "measured_at": "now",
    }


def write_run(folder: Path, **options: Any) -> Path:
    """Write made-up rows into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "samples.jsonl", made_up_rows(**options))
    return folder
