"""What reading a text will take, before it is read: pages, KV bytes, peak memory, time.

KV bytes follow exactly from the page layout. Working memory and speed are measured: one chunk of pages is encoded at
the place where the budget is full (every later chunk costs the same), and one question is answered behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from ..paging import PageTable, page_lengths
from ..store import PageLayout, PageStore
from ..store.layout import StoreBytes
from .chunk import Chunk, text_group
from .document import Document
from .memory import PeakMemory, tensor_bytes
from .model import RetroLM
from .page_reading import cut_pages, paged_text
from .page_stores import SPARE_PAGES

_TIMED_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What to expect of one text.

    Attributes:
        num_tokens, num_pages: prefix page included, as `Document` counts them.
        kv_bytes: KV of all pages by place, exact.
        weights_bytes: the model. working_bytes: activations, gathered sets and caches, at most at one time.
        program_bytes: the process before the model was loaded.
        host_bytes, device_bytes: expected peak of the whole process; device 0 where the model runs on the CPU.
        free_host_bytes, free_device_bytes: what there was before the model was loaded.
        read_s, ttft_s, tpot_s: seconds to read the text, to an answer's first token, and per further token.
    """

    num_tokens: int
    num_pages: int
    kv_bytes: StoreBytes
    weights_bytes: int
    working_bytes: int
    program_bytes: int
    host_bytes: int
    device_bytes: int
    free_host_bytes: int
    free_device_bytes: int
    read_s: float
    ttft_s: float
    tpot_s: float

    @property
    def tokens_per_s(self) -> float:
        """Reading speed."""
        return self.num_tokens / self.read_s

    @property
    def fits(self) -> bool:
        """Whether the memory expected is there."""
        host = self.host_bytes - self.program_bytes <= self.free_host_bytes
        return host and self.device_bytes <= max(self.free_device_bytes, 0)


@dataclass(frozen=True)
class Surroundings:
    """Memory before a model is loaded, in bytes: this process, and what is free on the host and on the GPU."""

    program_bytes: int
    free_host_bytes: int
    free_device_bytes: int


def look_around() -> Surroundings:
    """Take stock of memory; call it before loading the model that is planned for."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return Surroundings(psutil.Process().memory_info().rss, psutil.virtual_memory().available, free)


def plan(lm: RetroLM, num_text_tokens: int, question: str, before: Surroundings) -> Plan:
    """Say what reading `num_text_tokens` tokens and answering `question` will take; takes about one chunk's time.

    Args:
        before: memory before `lm` was loaded (`look_around`).
    """
    prefix, joined = lm.split_head()
    num_own, size = len(joined) + num_text_tokens, lm.config.page_size
    num_pages = len(page_lengths(len(prefix), size)) + len(page_lengths(num_own, size))
    trial = _Trial(lm, prefix, num_own)
    kv = _kv_bytes(trial.store.layout, num_pages, lm.config.device_kv_bytes)
    trial.run(question)
    weights, on_gpu = tensor_bytes(lm.model), lm.device.type == "cuda"
    rest = trial.host_peak_bytes - trial.host_store_bytes
    host = rest + (kv.host if on_gpu else kv.host + kv.device)
    working_device = trial.memory.device_peak_bytes - trial.memory.device_start_bytes
    return Plan(
        num_tokens=len(prefix) + num_own,
        num_pages=num_pages,
        kv_bytes=kv,
        weights_bytes=weights,
        working_bytes=working_device if on_gpu else max(rest - weights - before.program_bytes, 0),
        program_bytes=before.program_bytes,
        host_bytes=host,
        device_bytes=weights + kv.device + working_device if on_gpu else 0,
        free_host_bytes=before.free_host_bytes,
        free_device_bytes=before.free_device_bytes,
        read_s=(len(prefix) + num_own) * trial.s_per_token,
        ttft_s=trial.ttft_s,
        tpot_s=trial.tpot_s,
    )


class _Trial:
    """One steady-state chunk and one answer behind it, on pages that were never written: numbers don't matter here."""

    def __init__(self, lm: RetroLM, prefix: list[int], num_own_tokens: int) -> None:
        config, size = lm.config, lm.config.page_size
        steady = config.kv_budget + config.chunk_pages * size
        self.pages = cut_pages(prefix, [lm.pad_id] * min(num_own_tokens, steady), size)
        self.store: PageStore = lm.new_store(len(self.pages))
        self.table: PageTable = paged_text(self.store, self.pages, len(page_lengths(len(prefix), size)), size).table
        self.memory = PeakMemory([info.device for info in lm.backbone.layers])
        self._lm = lm
        self._encoder = lm.encoder_over(self.store)

    def run(self, question: str) -> None:
        spans = [(0, 0)] * len(self.pages)
        document = Document(
            self._lm, self._encoder, None, self.table, spans, self.pages, prefill_s=0.0, peak_attended=0
        )
        first = max(len(self.pages) - self._lm.config.chunk_pages, 0)
        tokens = self.pages[first:]
        group = text_group(self.table, first, tokens, self._lm.config, self._encoder.kept_window)
        warm_up = text_group(self.table, first, tokens[:1], self._lm.config, self._encoder.kept_window)
        with self.memory:
            self._encoder.encode(Chunk([warm_up], len(tokens[0])))
            started = self._now()
            self._encoder.encode(Chunk([group], max(map(len, tokens))))
            self.s_per_token = (self._now() - started) / sum(map(len, tokens))
            answer = document.ask(question, max_new_tokens=_TIMED_TOKENS, min_new_tokens=_TIMED_TOKENS)
        self.ttft_s, self.tpot_s = answer.timings.ttft_s, answer.timings.tpot_s
        self.host_peak_bytes = self.memory.host_peak_bytes
        self.host_store_bytes = self._host_store_bytes(len(tokens))

    def _host_store_bytes(self, num_written: int) -> int:
        """Host memory that the trial's own pages take: plain memory only where written, pinned memory all of it."""
        if self._lm.device.type == "cuda":
            return self.store.bytes().host
        tiered = self._lm.config.device_kv_bytes is not None
        return num_written * self.store.layout.page_bytes * self.store.layout.num_layers * (2 if tiered else 1)

    def _now(self) -> float:
        self._lm.wait()
        return time.perf_counter()


def _kv_bytes(layout: PageLayout, num_pages: int, device_kv_bytes: int | None) -> StoreBytes:
    """What the store will say it holds once all pages are read."""
    per_page = layout.page_bytes * layout.num_layers
    if device_kv_bytes is None:
        return StoreBytes(device=num_pages * per_page, host=0)
    slots = min(device_kv_bytes // per_page, num_pages + SPARE_PAGES)
    return StoreBytes(device=slots * per_page, host=num_pages * per_page)
