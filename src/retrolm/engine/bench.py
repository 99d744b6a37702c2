"""Times RetroLM against the stock model inside it, pair by pair in one process: read a text, answer a question.

Both sides see the same token ids, generate the same number of tokens and run on the same weights. Pairs are
interleaved, so that a machine that slows down slows both; figures are medians over the pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .decode_round import FirstToken
from .memory import PeakMemory
from .model import RetroLM

QUESTION = "What is this text about?"


@dataclass(frozen=True)
class Timing:
    """One side of one pair.

    Attributes:
        prefill_s: reading the text. total_s: reading and answering.
        peak_bytes: highest memory while it ran: tensors on the GPU, or on a CPU the resident set of the process.
    """

    prefill_s: float
    total_s: float
    peak_bytes: int


@dataclass
class Comparison:
    """All pairs of one length.

    Attributes:
        num_tokens: tokens of the text. num_generated: tokens of the answer.
        ours, dense: timings of each pair; `dense` is empty where the stock model was not run.
    """

    num_tokens: int
    num_generated: int
    kv_bytes: dict[str, int] = field(default_factory=dict)
    ours: list[Timing] = field(default_factory=list)
    dense: list[Timing] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        """Median over the pairs of dense time by ours, read and answer; None without dense runs."""
        if not self.dense:
            return None
        return statistics.median(d.total_s / o.total_s for o, d in zip(self.ours, self.dense, strict=True))


class Bench:
    """Runs pairs on one loaded model.

    Args:
        lm: its model also serves as the stock model; outside RetroLM's own passes it is exactly that.
        num_generated: tokens both sides generate, whatever the answer.
    """

    def __init__(self, lm: RetroLM, num_generated: int) -> None:
        self._lm = lm
        self._num_generated = num_generated
        self._question_ids = lm.question_ids(QUESTION)

    def compare(
        self, input_ids: Tensor, repeats: int, with_dense: bool = True, on_step: Callable[[str], None] = lambda _: None
    ) -> Comparison:
        """Time `repeats` interleaved pairs on a text of `input_ids` int64 [T]; `on_step` is told what runs next."""
        found = Comparison(len(input_ids), self._num_generated)
        for number in range(1, repeats + 1):
            on_step(f"{len(input_ids)} tokens, RetroLM, run {number}/{repeats}")
            timing, found.kv_bytes = self._ours(input_ids)
            found.ours.append(timing)
            if with_dense:
                on_step(f"{len(input_ids)} tokens, dense, run {number}/{repeats}")
                found.dense.append(self._dense(input_ids))
        return found

    def warm_up(self, num_tokens: int) -> None:
        """Run both sides once on a short text, untimed."""
        ids = synthetic_ids(self._lm, num_tokens)
        self._ours(ids)
        self._dense(ids)

    def _ours(self, input_ids: Tensor) -> tuple[Timing, dict[str, int]]:
        with self._measured() as memory:
            started = time.perf_counter()
            document = self._lm.read(input_ids)
            prefill_s = time.perf_counter() - started
            answer = document.ask(QUESTION, max_new_tokens=self._num_generated, min_new_tokens=self._num_generated)
            total_s = time.perf_counter() - started
        return Timing(prefill_s, total_s, self._peak(memory)), answer.kv_bytes

    def _dense(self, input_ids: Tensor) -> Timing:
        prefix = list(self._lm.format.prefix_ids) if self._lm.format else []
        ids = torch.tensor([[*prefix, *input_ids.tolist(), *self._question_ids]], device=self._lm.device)
        first = FirstToken()
        with self._measured() as memory:
            started = time.perf_counter()
            self._lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._num_generated,
                min_new_tokens=self._num_generated,
                do_sample=False,
                pad_token_id=self._lm.pad_id,
                logits_processor=LogitsProcessorList([first]),
            )
            total_s = time.perf_counter() - started
        return Timing(first.at - started, total_s, self._peak(memory))

    def _measured(self) -> PeakMemory:
        return PeakMemory([info.device for info in self._lm.backbone.layers])

    def _peak(self, memory: PeakMemory) -> int:
        return memory.device_peak_bytes if self._lm.device.type == "cuda" else memory.host_peak_bytes


def synthetic_ids(lm: RetroLM, num_tokens: int, seed: int = 0) -> Tensor:
    """Random token ids int64 [num_tokens]; speed depends on how many there are, not on which."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, int(lm.backbone.config.vocab_size), (num_tokens,), generator=generator)


def bench_row(found: Comparison) -> dict[str, Any]:
    """The figures of one length as plain data: medians, the single timings, and what was generated."""
    return {
        "num_tokens": found.num_tokens,
        "num_generated": found.num_generated,
        "speedup": found.speedup,
        "ours": {**medians(found.ours, found.num_tokens), "kv_bytes": found.kv_bytes},
        "dense": medians(found.dense, found.num_tokens) if found.dense else None,
    }


def medians(timings: Sequence[Timing], num_tokens: int) -> dict[str, Any]:
    """Median prefill time, reading speed, total time and peak memory, with all single totals."""
    prefill_s = statistics.median(timing.prefill_s for timing in timings)
    return {
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": num_tokens / prefill_s,
        "total_s": statistics.median(timing.total_s for timing in timings),
        "peak_bytes": max(timing.peak_bytes for timing in timings),
        "runs": [vars(timing) for timing in timings],
    }
