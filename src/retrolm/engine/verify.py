"""Shows that RetroLM is the stock model wherever it should be: at a budget that holds the text, and for any chunking.

The bar is the stock model's own difference between two of its attention implementations, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MIN_BUDGET_PAGES, RetroConfig
from ..errors import UserError
from .attachment import Attachment
from .model import RetroLM
from .visible import require_invisible

SMALLEST_BAR = 1e-4
STOCK_FACTOR = 3.0
_MAX_TOKEN_CHARS = 32  # more than a token has on average: no more of the source code than that is made into tokens


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what is compared. largest: largest absolute logit difference; None where tokens are compared.
        passed: within the bar, or the same tokens.
    """

    name: str
    passed: bool
    largest: float | None = None


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`.

    Attributes:
        num_tokens: tokens compared. stock_difference: the stock model's own, SDPA against eager attention.
        bar: largest difference allowed. small_budget: tokens of the budget used for comparing chunkings.
    """

    num_tokens: int
    num_generated: int
    dtype: str
    kv_budget: int
    small_budget: int
    stock_difference: float
    bar: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(lm: RetroLM, input_ids: Tensor, num_generated: int = 16) -> Verification:
    """Compare RetroLM with the stock model inside it on `input_ids` int64 [T].

    In half precision only the logits at the full budget are compared: there rounding decides which of two pages or
    tokens with nearly the same score comes first.

    `lm` is detached while the comparison runs; documents read before must be read again.

    Raises:
        UserError: bookmarks are visible, the text doesn't fit the model's window, or it is too short for a small
            budget to leave anything out.
    """
    require_invisible(lm.config, "Comparing with the stock model")
    full, small = _budgets(lm, len(input_ids), num_generated)
    lm.detach()
    try:
        stock = _Stock(lm.model, input_ids.to(lm.device), num_generated)
        bar = max(SMALLEST_BAR, STOCK_FACTOR * stock.own_difference)
        exact = lm.backbone.dtype in (torch.float32, torch.float64)
        checks = _against_stock(lm, stock, full, input_ids, num_generated, bar, exact)
        if exact:
            checks += _against_chunks(lm, small, input_ids, num_generated, bar)
    finally:
        lm.attachment = Attachment(lm.backbone)
    return Verification(
        num_tokens=len(input_ids),
        num_generated=num_generated,
        dtype=str(lm.backbone.dtype).removeprefix("torch."),
        kv_budget=full,
        small_budget=small,
        stock_difference=stock.own_difference,
        bar=bar,
        checks=tuple(checks),
    )


def own_source_ids(lm: RetroLM, num_tokens: int) -> Tensor:
    """Token ids int64 [num_tokens] of a text that is always at hand: this package's source code.

    Raises:
        UserError: no tokenizer, or fewer tokens than asked for.
    """
    return text_ids(lm, "\n".join(_sources())[: _MAX_TOKEN_CHARS * num_tokens], num_tokens)


def text_ids(lm: RetroLM, text: str, num_tokens: int) -> Tensor:
    """The first `num_tokens` token ids of `text`, int64 [num_tokens]; raises `UserError` if it has fewer."""
    if lm.format is None:
        raise UserError("This model has no tokenizer, which comparing on a text needs.")
    ids = lm.format.encode(text)
    if len(ids) < num_tokens:
        raise UserError(f"The text has {len(ids)} tokens, but {num_tokens} are asked for. Ask for fewer.")
    return torch.tensor(ids[:num_tokens])


def _sources() -> Iterable[str]:
    for path in sorted(Path(__file__).parent.glob("*.py")):
        yield path.read_text(encoding="utf-8")


def _budgets(lm: RetroLM, num_tokens: int, num_generated: int) -> tuple[int, int]:
    size = lm.config.page_size
    full = max(num_tokens + num_generated, MIN_BUDGET_PAGES * size)
    small = (MIN_BUDGET_PAGES + 1) * size
    if full + size > lm.backbone.window:
        raise UserError(
            f"{num_tokens} tokens don't fit the model's window of {lm.backbone.window} with {num_generated} generated "
            f"and a page to spare. Compare on fewer."
        )
    if num_tokens <= small:
        raise UserError(
            f"{num_tokens} tokens fit a budget of {small} (four pages), so a small budget would select nothing. "
            f"Compare on more tokens, or use a smaller page_size."
        )
    return full, small


def _against_stock(
    lm: RetroLM, stock: _Stock, kv_budget: int, input_ids: Tensor, num_generated: int, bar: float, exact: bool
) -> list[Check]:
    """RetroLM at a budget that holds the text, against the stock model."""
    checks = []
    for label, chunk_pages in (("page by page", 1), ("in chunks", lm.config.chunk_pages)):
        logits, tokens = _run(lm, kv_budget, chunk_pages, input_ids, num_generated)
        checks.append(_within(f"budget ≥ text, {label}: logits = stock", logits, stock.logits, bar))
        if exact:
            checks.append(Check(f"budget ≥ text, {label}: greedy tokens = stock", tokens == stock.tokens))
    return checks


def _against_chunks(lm: RetroLM, kv_budget: int, input_ids: Tensor, num_generated: int, bar: float) -> list[Check]:
    """RetroLM at a budget that leaves most of the text out, one page at a time against chunks of pages."""
    single, single_tokens = _run(lm, kv_budget, 1, input_ids, num_generated)
    chunked, chunked_tokens = _run(lm, kv_budget, lm.config.chunk_pages, input_ids, num_generated)
    return [
        _within("small budget: logits in chunks = page by page", chunked, single, bar),
        Check("small budget: greedy tokens in chunks = page by page", chunked_tokens == single_tokens),
    ]


class _Stock:
    """The stock model: logits by two attention implementations, and greedy tokens."""

    @torch.no_grad()
    def __init__(self, model: Any, input_ids: Tensor, num_generated: int) -> None:
        before = model.config.get_text_config()._attn_implementation
        try:
            model.set_attn_implementation("sdpa")
            self.logits = model(input_ids[None], use_cache=False).logits[0]
            ids = input_ids[None]
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=num_generated, do_sample=False)
            self.tokens = out[0, len(input_ids) :].tolist()
            model.set_attn_implementation("eager")
            self.own_difference = _largest(model(input_ids[None], use_cache=False).logits[0], self.logits)
        finally:
            model.set_attn_implementation(before)


def _run(
    lm: RetroLM, kv_budget: int, chunk_pages: int, input_ids: Tensor, num_generated: int
) -> tuple[Tensor, list[int]]:
    """Logits [T, vocabulary] and greedy tokens at one budget and chunking, every page by its own gathered set."""
    config: RetroConfig = lm.config.replace(kv_budget=kv_budget, chunk_pages=chunk_pages, dense_bypass=False)
    trial = RetroLM(lm.model, lm.tokenizer, config=config, method=lm.method.name, retriever=lm.retriever)
    try:
        logits = trial.logits(input_ids)
        out = trial.generate(input_ids[None], max_new_tokens=num_generated, do_sample=False)
    finally:
        trial.detach()
    return logits, out[0, len(input_ids) :].tolist()


def _within(name: str, logits: Tensor, reference: Tensor, bar: float) -> Check:
    largest = _largest(logits, reference)
    return Check(name, largest <= bar, largest)


def _largest(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, row by row so that no second copy of all logits is made."""
    return max(float((x.to(y.device) - y).abs().max()) for x, y in zip(a, b, strict=True))
