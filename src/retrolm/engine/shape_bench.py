"""Speed and memory of a model shape with random weights: RetroLM, the stock model, and the ceiling, in one run.

Every measurement is one row, written as soon as it is taken. What doesn't fit the device's memory is a row, too.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RetroConfig
from ..errors import UserError, unknown
from ..methods.base import PageMethod, page_method
from ..retriever import PageRetriever, RetrieverCard
from .attachment import Attachment
from .decode_round import Query
from .document import Document
from .fast_decode import fast_decode_of
from .generate_options import GenerateOptions
from .generation import Generator
from .model import RetroLM
from .random_model import random_model
from .selections import RecordingMethod, ReplayMethod
from .stock_steps import StockSteps, pace
from .verify import Verification, verify

MEASUREMENTS = (
    "stock-prefill",
    "ceiling",
    "ours-device",
    "ours-host",
    "decode",
    "stock-decode",
    "stock-decode-compiled",
    "stock-request",
)
_WARMED_UP_ALONE = ("stock-decode-compiled", "stock-request")  # compiling takes a minute, and each cache its own
_QUESTION_TOKENS = 32
RETRIEVER_RANK = 48  # that of the shipped ones
_CHECK_LAYERS = 2


@dataclass(frozen=True)
class ShapePlan:
    """What to measure.

    Attributes:
        lengths: tokens of the text. measurements: names out of `MEASUREMENTS`. batches: for decoding.
        config: of RetroLM with all pages on the device. host_kv_bytes: device cap of the host tier's runs.
        num_generated: tokens of an answer. dense_limit: longest text of the stock model, or None.
        recorded_LPS: selections to replay; None = every page as likely as any other.
        method: page method whose work is done besides.
    """

    lengths: tuple[int, ...]
    config: RetroConfig
    measurements: tuple[str, ...] = MEASUREMENTS
    batches: tuple[int, ...] = (1,)
    host_kv_bytes: int = 1_000_000_000
    num_generated: int = 64
    dense_limit: int | None = None
    recorded_LPS: Tensor | None = None
    method: str = "retrolm"

    def __post_init__(self) -> None:
        for name in self.measurements:
            if name not in MEASUREMENTS:
                raise unknown("measurement", name, MEASUREMENTS)


@dataclass
class Row:
    """One measurement.

    Attributes:
        what: a name out of `MEASUREMENTS`. batch: samples at once.
        figures: seconds, tokens/s, bytes; empty where `error` says why there are none.
    """

    what: str
    num_tokens: int
    batch: int = 1
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """The row as one flat dictionary."""
        found = asdict(self)
        return {**{key: found[key] for key in ("what", "num_tokens", "batch", "error")}, **self.figures}


class RowFile:
    """A JSON Lines file that grows row by row and is on disk after each one. None = nowhere."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        if path is not None:
            path.write_text("", encoding="utf-8")
        self.add(head)

    def add(self, row: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


class ShapeBench:
    """Measures one random model.

    Args:
        model: as `random_model` makes it. plan: what to measure.
    """

    def __init__(self, model: Any, plan: ShapePlan) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._lm = RetroLM(model, config=plan.config)
        self._lm.use_retriever(_small_retriever(self._lm))
        self._plan = replace(plan, config=self._lm.config)
        self._method = page_method(plan.method)()
        self._stock = StockSteps(model, self._lm.backbone)
        self._now = self._stock.now
        self._requests: dict[int, dict[str, Any]] = {}
        self._question = self._ids(_QUESTION_TOKENS, seed=1)

    def run(self, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
        """Yield one row per measurement, the shortest text first."""
        on_step("warming up")
        self._warm_up()
        for num_tokens in sorted(self._plan.lengths):
            for what in self._plan.measurements:
                for batch in self._plan.batches if "decode" in what else (1,):
                    if what.startswith("stock") and num_tokens > (self._plan.dense_limit or num_tokens):
                        continue
                    on_step(f"{num_tokens} tokens, {what}, batch {batch}")
                    yield self._measured(what, num_tokens, batch)

    def _warm_up(self) -> None:
        """Run everything once past the budget, and at each length of short texts, as compilation does."""
        config = self._plan.config
        steady = config.kv_budget + 2 * config.chunk_pages * config.page_size
        lengths = {min(steady, max(self._plan.lengths)), *(n for n in self._plan.lengths if n < steady)}
        for what in self._plan.measurements:
            if what in _WARMED_UP_ALONE:
                continue
            for num_tokens in sorted(lengths):
                self._measured(what, num_tokens, 1)

    def _measured(self, what: str, num_tokens: int, batch: int) -> Row:
        if what.startswith("stock"):
            self._lm.detach()  # compilation would stumble over our hooks
            self._lm.attachment = None  # type: ignore[assignment]  # its caches and graphs are not part of what is measured
        elif what == "ceiling":
            fast_decode_of(self._lm.attachment, self._lm.backbone).release()
        self._clean()
        row = Row(what, num_tokens, batch)
        measure = {
            "stock-prefill": self._stock_prefill,
            "ceiling": self._ceiling,
            "ours-device": self._ours_device,
            "ours-host": self._ours_host,
            "decode": self._decode,
            "stock-decode": self._stock.growing,
            "stock-decode-compiled": self._stock.compiled,
            "stock-request": self._stock_requests,
        }[what]
        try:
            row.figures = measure(num_tokens, batch)
        except torch.OutOfMemoryError:
            row.error = "out of device memory"
        if what.startswith("stock"):
            self._lm.attachment = Attachment(self._lm.backbone)
        if self._device.type == "cuda":
            row.figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self._device)
            row.figures["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return row

    # --- reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stock_prefill(self, num_tokens: int, batch: int) -> dict[str, Any]:
        ids = self._ids(num_tokens)[None].to(self._device)
        started = self._now()
        self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax()
        return _speed(num_tokens, self._now() - started)

    @torch.no_grad()
    def _ceiling(self, num_tokens: int, batch: int) -> dict[str, Any]:
        """The stock forward in the chunks that RetroLM reads, attention giving zeros."""
        config = self._plan.config
        width = config.chunk_pages * config.page_size
        ids = self._ids(num_tokens)[None].to(self._device)
        started = self._now()
        with self._lm.attachment.run(_ZeroProgram()):
            for first in range(0, num_tokens, width):
                self._lm.backbone.decoder(ids[:, first : first + width], use_cache=False)
        return _speed(num_tokens, self._now() - started)

    def _ours_device(self, num_tokens: int, batch: int) -> dict[str, Any]:
        return self._ours(num_tokens, None)

    def _ours_host(self, num_tokens: int, batch: int) -> dict[str, Any]:
        return self._ours(num_tokens, self._plan.host_kv_bytes)

    def _ours(self, num_tokens: int, device_kv_bytes: int | None) -> dict[str, Any]:
        document, seconds = self._read(num_tokens, device_kv_bytes)
        self._ask(document, 1)  # captures the graph, where there is none yet
        query = self._ask(document, 1)[0]
        store = document.encoder.parts.store
        stored, pages = store.bytes(), document.num_pages * self._lm.backbone.num_layers
        stats = store.stats()
        with_pinning, seconds = seconds, seconds - stats.pin_s  # a process pins its memory once
        return {
            **_speed(num_tokens, seconds),
            "seconds_with_pinning": with_pinning,
            "ttft_after_question_s": query.ttft_s,
            "s_per_token": query.tpot_s,
            "request_s": seconds + query.ttft_s + query.tpot_s * (self._plan.num_generated - 1),
            "num_generated": self._plan.num_generated,
            "decode_path": query.decode_path,
            "kv_device_bytes": stored.device,
            "kv_host_bytes": stored.host,
            "pages_fetched_per_page": stats.pages_missed / pages,
            "fetched_gb_per_s": stats.bytes_to_device / seconds / 1e9,
            **{f"store_{key}": value for key, value in asdict(stats).items()},
            "hit_rate": stats.hit_rate,
        }

    def _read(self, num_tokens: int, device_kv_bytes: int | None) -> tuple[Document, float]:
        """Read a text with replayed selections; the time covers everything from ids to the last page."""
        pages = -(-num_tokens // self._plan.config.page_size)
        self._lm.config = self._plan.config.replace(device_kv_bytes=device_kv_bytes)
        inner, layers = self._method, self._lm.backbone.num_layers
        self._lm.method = ReplayMethod(inner, self._plan.recorded_LPS, layers, pages, self._device)
        try:
            ids = self._ids(num_tokens)
            started = self._now()
            document = self._lm.read(ids)
            return document, self._now() - started
        finally:
            self._lm.method = inner
            self._lm.config = self._plan.config

    # --- decoding -------------------------------------------------------------------------------------------

    def _decode(self, num_tokens: int, batch: int) -> dict[str, Any]:
        document, _ = self._read(num_tokens, self._plan.host_kv_bytes)
        self._ask(document, batch)  # captures the graph
        query = self._ask(document, batch)[0]
        return {**pace(query.tpot_s, batch), "decode_path": query.decode_path}

    def _ask(self, document: Document, batch: int) -> list[Query]:
        """Answers of fixed length to `batch` questions about one document."""
        new = self._plan.num_generated
        options = GenerateOptions(self._model, {"do_sample": False, "min_new_tokens": new}, (), 0, None)
        tokens = self._question.tolist()
        queries = [Query(document.table, tokens, document.token_ids) for _ in range(batch)]
        for ids in Generator(document.encoder).run(queries, new, options):
            document.encoder.parts.store.release(ids)
        return queries

    def _stock_requests(self, num_tokens: int, batch: int) -> dict[str, Any]:
        """A whole request of the stock model; all lengths are taken at once, which share what is compiled."""
        if not self._requests:
            lengths = sorted(n for n in self._plan.lengths if n <= (self._plan.dense_limit or n))
            prompts = [torch.cat([self._ids(n), self._question]) for n in lengths]
            found = self._stock.requests(prompts, self._plan.num_generated)
            self._requests = dict(zip(lengths, found, strict=True))
        return self._requests[num_tokens]

    # --- aids -----------------------------------------------------------------------------------------------

    def _ids(self, num_tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, int(self._lm.backbone.config.vocab_size), (num_tokens,), generator=generator)

    def _clean(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


class _ZeroProgram:
    """Attention that costs nothing (a `Program`)."""

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks in this pass."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        return torch.zeros_like(q.transpose(1, 2))


def _small_retriever(lm: RetroLM) -> PageRetriever:
    """One that takes the time and memory of a trained one."""
    card = RetrieverCard(lm.backbone.fingerprint(), RETRIEVER_RANK, lm.config.page_size, "untrained")
    return PageRetriever(lm.backbone.projection_shapes(), lm.untrained_bookmark(), card)


def _speed(num_tokens: int, seconds: float) -> dict[str, Any]:
    return {"seconds": seconds, "tokens_per_s": num_tokens / seconds}


def check_shape(
    shape: Any, config: RetroConfig, dtype: torch.dtype, device: torch.device, num_tokens: int
) -> list[Verification]:
    """Compare RetroLM with the stock model on a few layers of the shape: in float32, tokens too, and in `dtype`.

    On CUDA the tokens come from the captured step with its kernels, as the measured ones do. Pages of fewer bits aren't
    meant to equal: the same engine is checked with whole ones.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, int(shape.vocab_size), (num_tokens,), generator=generator)
    found, config = [], config.replace(store_bits=16)
    for kind in dict.fromkeys((torch.float32, dtype)):
        model = random_model(shape, kind, device, num_hidden_layers=_CHECK_LAYERS)
        lm = RetroLM(model, config=config)
        found.append(verify(lm, ids))
        lm.detach()
        del model, lm
    return found


def speed_ups(rows: list[Row]) -> dict[int, dict[str, float]]:
    """By length, how often faster than the stock model: prefill (best tier), decode (against its best setting)."""
    found: dict[int, dict[str, float]] = {}
    for num_tokens in sorted({row.num_tokens for row in rows}):
        best = {
            row.what: row.figures for row in rows if row.num_tokens == num_tokens and row.batch == 1 and not row.error
        }
        entry = {}
        ours = [best[name]["seconds"] for name in ("ours-device", "ours-host") if name in best]
        if ours and "stock-prefill" in best:
            entry["prefill"] = best["stock-prefill"]["seconds"] / min(ours)
        if ours and "ceiling" in best:
            entry["of_ceiling"] = best["ceiling"]["seconds"] / min(ours)
        stock = [best[name]["s_per_token"] for name in ("stock-decode", "stock-decode-compiled") if name in best]
        if stock and "decode" in best:
            entry["decode"] = min(stock) / best["decode"]["s_per_token"]
        found[num_tokens] = entry
    return found


def recorded_selections(lm: RetroLM, text: str) -> Tensor:
    """Which pages `lm`'s method ranks first while it reads `text`, int64 [layers, pages, picks], best first.

    Raises:
        UserError: the method has no scores that could be recorded (it doesn't choose whole pages).
    """
    inner = lm.method
    if not isinstance(inner, PageMethod):
        raise UserError(f"Method {inner.name!r} doesn't choose pages. Use --method retrolm.")
    recording = RecordingMethod(inner, lm.config.kv_budget // lm.config.page_size)
    lm.method = recording
    try:
        document = lm.read(text)
    finally:
        lm.method = inner
    found = recording.selections(lm.backbone.num_layers, document.num_pages)
    document.close()
    return found
