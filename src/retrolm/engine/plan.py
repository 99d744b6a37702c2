"""What reading a text will take, before it is read: pages, KV bytes, peak memory, time.

KV bytes follow exactly from the page layout. Working memory and speed are measured: one chunk of pages is encoded at
the place where the budget is full (every later chunk costs the same), and one question is answered behind it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from ..paging import PageTable, page_lengths
from ..store import PageStore
from ..store.layout import StoreBytes
from .chunk import Chunk, text_group
from .document import Document
from .memory import PeakMemory, tensor_bytes
from .model import RetroLM
from .page_reading import cut_pages, paged_text
from .page_stores import SPARE_PAGES, least_pages, new_store

_TIMED_TOKENS = 4


@dataclass(frozen=True)
class Plan:
    """What to expect of one text.

    Attributes:
        num_tokens, num_pages: prefix page included, as `Document` counts them.
        kv_bytes: KV of all pages by place, exact but for what the file system adds on disk.
        index_bytes: what the method keeps of each page to choose by.
        weights_bytes: the model. working_bytes: activations, gathered sets and caches, at most at one time.
        program_bytes: the process before the model was loaded.
        host_bytes, device_bytes: expected peak of the whole process; device 0 where the model runs on the CPU.
        free_host_bytes, free_device_bytes: what there was before the model was loaded.
        free_disk_bytes: room where the disk tier's file is to go; None without one.
        read_s, ttft_s, tpot_s: seconds to read the text, to an answer's first token, and per further token.
    """

    num_tokens: int
    num_pages: int
    kv_bytes: StoreBytes
    index_bytes: int
    weights_bytes: int
    working_bytes: int
    program_bytes: int
    host_bytes: int
    device_bytes: int
    free_host_bytes: int
    free_device_bytes: int
    free_disk_bytes: int | None
    read_s: float
    ttft_s: float
    tpot_s: float

    @property
    def tokens_per_s(self) -> float:
        """Reading speed."""
        return self.num_tokens / self.read_s

    @property
    def fits(self) -> bool:
        """Whether the memory and the disk space expected are there."""
        host = self.host_bytes - self.program_bytes <= self.free_host_bytes
        device = self.device_bytes <= max(self.free_device_bytes, 0)
        return host and device and (self.free_disk_bytes is None or self.kv_bytes.disk <= self.free_disk_bytes)


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

    Raises:
        UserError: a cap holds fewer pages than one page attends.
    """
    prefix, joined = lm.split_head()
    num_tokens = len(prefix) + len(joined) + num_text_tokens
    num_pages = sum(len(page_lengths(n, lm.config.page_size)) for n in (len(prefix), num_tokens - len(prefix)))
    trial = Trial(lm, num_tokens)
    read_bytes = trial.read()
    peaks = [max(both) for both in zip(read_bytes, trial.ask(question), strict=True)]
    index_bytes = trial.index_bytes * num_pages // len(trial.pages)
    ahead = PagesAhead(num_tokens, num_pages, _kv_bytes(lm, num_pages), index_bytes)
    return expected(trial, Peaks(*peaks), ahead, before)


class Peaks(NamedTuple):
    """Most memory that a part of a trial took, in bytes, its pages and their index left out."""

    host: int
    device: int


class PagesAhead(NamedTuple):
    """What there will be to ask: as the attributes of `Plan`."""

    num_tokens: int
    num_pages: int
    kv_bytes: StoreBytes
    index_bytes: int


def expected(trial: Trial, peaks: Peaks, ahead: PagesAhead, before: Surroundings) -> Plan:
    """What a trial comes to with so many pages; `peaks` is what it took beside its own."""
    lm, kv, index = trial.lm, ahead.kv_bytes, ahead.index_bytes
    weights, on_gpu = tensor_bytes(lm.model), lm.device.type == "cuda"
    host = peaks.host + (kv.host if on_gpu else kv.host + kv.device + index)
    return Plan(
        **ahead._asdict(),
        weights_bytes=weights,
        working_bytes=peaks.device if on_gpu else max(peaks.host - weights - before.program_bytes, 0),
        program_bytes=before.program_bytes,
        host_bytes=host,
        device_bytes=weights + kv.device + index + peaks.device if on_gpu else 0,
        free_host_bytes=before.free_host_bytes,
        free_device_bytes=before.free_device_bytes,
        free_disk_bytes=shutil.disk_usage(lm.disk_tier[0]).free if lm.disk_tier else None,
        read_s=ahead.num_tokens * trial.s_per_token,
        ttft_s=trial.ttft_s,
        tpot_s=trial.tpot_s,
    )


class Trial:
    """One steady-state chunk and one answer behind it, on pages that were never written: numbers don't matter here.

    Attributes:
        pages: token ids of its pages. index_bytes: what the method keeps of them.
        s_per_token, ttft_s, tpot_s: seconds, known once it was read and asked.
    """

    def __init__(self, lm: RetroLM, num_tokens: int) -> None:
        config, size = lm.config, lm.config.page_size
        prefix, _ = lm.split_head()
        steady = config.kv_budget + config.chunk_pages * size
        self.pages = cut_pages(prefix, [lm.pad_id] * min(num_tokens - len(prefix), steady), size)
        self.lm = lm
        self._store: PageStore = self._new_store()
        self._table: PageTable = paged_text(self._store, self.pages, len(page_lengths(len(prefix), size)), config).table
        self._encoder = lm.encoder_over(self._store)

    def _new_store(self) -> PageStore:
        """A store as the text will have it. One with a disk tier gets the smallest upper tier, which the trial fills:
        then pages come from the file, as they will."""
        lm = self.lm
        if lm.disk_tier is None:
            return lm.new_store(len(self.pages))
        least = least_pages(lm) * lm.page_layout().page_bytes * lm.backbone.num_layers
        return new_store(lm, len(self.pages), host_kv_bytes=min(least, lm.disk_tier[1]))

    def read(self) -> Peaks:
        """Encode the last chunk."""
        first = max(len(self.pages) - self.lm.config.chunk_pages, 0)
        tokens = self.pages[first:]
        group = text_group(self._table, first, tokens, self.lm.config, self._encoder.kept_window)
        warm_up = text_group(self._table, first, tokens[:1], self.lm.config, self._encoder.kept_window)
        with self._memory() as memory:
            self._encoder.encode(Chunk([warm_up], len(tokens[0])))
            started = self._now()
            self._encoder.encode(Chunk([group], max(map(len, tokens))))
            self.s_per_token = (self._now() - started) / sum(map(len, tokens))
        self.index_bytes = self._encoder.parts.digests.bytes()
        self._device_start_bytes = memory.device_start_bytes
        return self._peaks(memory)

    def ask(self, question: str) -> Peaks:
        """Answer a question behind the chunk that was read."""
        spans = [(0, 0)] * len(self.pages)
        document = Document(
            self.lm, self._encoder, None, self._table, spans, self.pages, prefill_s=0.0, peak_attended=0
        )
        with self._memory() as memory:
            answer = document.ask(question, max_new_tokens=_TIMED_TOKENS, min_new_tokens=_TIMED_TOKENS)
        self.ttft_s, self.tpot_s = answer.timings.ttft_s, answer.timings.tpot_s
        return self._peaks(memory)

    def _memory(self) -> PeakMemory:
        return PeakMemory([info.device for info in self.lm.backbone.layers])

    def _peaks(self, memory: PeakMemory) -> Peaks:
        on_gpu = self.lm.device.type == "cuda"
        host = memory.host_peak_bytes - self._host_store_bytes() - (0 if on_gpu else self.index_bytes)
        device = memory.device_peak_bytes - self._device_start_bytes - self.index_bytes
        return Peaks(host, device)

    def _host_store_bytes(self) -> int:
        """Host memory that the trial's own pages take: plain memory only where written, pinned memory all of it."""
        lm, layout = self.lm, self._store.layout
        if lm.device.type == "cuda":
            return self._store.bytes().host
        if lm.disk_tier is not None:
            return self._store.bytes().device + self._store.bytes().host
        num_written = min(len(self.pages), lm.config.chunk_pages)
        return num_written * layout.page_bytes * layout.num_layers * (1 if lm.config.device_kv_bytes is None else 2)

    def _now(self) -> float:
        self.lm.wait()
        return time.perf_counter()


def _kv_bytes(lm: RetroLM, num_pages: int) -> StoreBytes:
    """What the store will say it holds once all pages are read."""
    layout = lm.page_layout()
    unit = layout.page_bytes * layout.num_layers

    def capped(cap_bytes: int) -> int:
        return min(cap_bytes // unit, num_pages + SPARE_PAGES) * unit

    cap = lm.config.device_kv_bytes
    if lm.disk_tier is None:
        return StoreBytes(num_pages * unit, 0) if cap is None else StoreBytes(capped(cap), num_pages * unit)
    host = lm.disk_tier[1]
    return StoreBytes(*((capped(host), 0) if cap is None else (capped(cap), capped(host))), disk=num_pages * unit)
