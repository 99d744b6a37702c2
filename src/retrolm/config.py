"""Settings of one RetroLM engine: the KV budget and the choices D1-D26 that the paper leaves open.

Sizes are in tokens unless a name says otherwise. Options are refused, never ignored: an unknown key or value raises
`UserError` with the closest allowed one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import UserError, suggest, unknown

MIN_BUDGET_PAGES = 3


@dataclass(frozen=True)
class RetroConfig:
    """How pages are cut, chosen and kept.

    Attributes:
        kv_budget: tokens attended per layer while a page or the question is encoded (sink, previous page, selected
            pages and the page itself; generated tokens come on top). At least three pages.
        page_size: tokens per page (the paper's w).
        strict_budget: count the current page inside the budget; `False` is the paper's own reading (D8a).
        num_local_pages: most recent pages that are always attended (D9).
        first_layer_mode: what the first `num_skip_layers` layers attend, since all bookmarks tie there (D7):
            "recent" = sink + most recent pages, "mean_key" = pages by the mean of their keys,
            "full" = every past page (reported, and outside the budget).
        num_skip_layers: layers without page scores of their own, counted from the first (D7).
        bookmarks: "invisible" = normal tokens don't see bookmarks, which take no position; "visible" = tokens of later
            pages attend the bookmarks of the pages they attend, as further tokens that stand behind their pages, with
            a position and a place in the budget (D1 a, D2 a; a question's own bookmark is not seen by its answer).
        bookmark_span: what a bookmark attends to: "sink_page" = sink, own page, itself; "page" = without sink (D13).
        selection_scope: whether all heads of a layer attend the same pages, by the sum of their scores, or each KV
            head chooses its own (D4).
        score_rope: rotate bookmark queries and keys to their true page index before scoring (D3).
        causal_selection: choose the pages of page i with the bookmark of page i-1, so that no token sees a
            choice made with knowledge of later tokens (D22).
        agreement_layers: with n > 0 a question is encoded twice; the second time all layers attend the pages on which
            its last n layers agreed, by the mean of their standardised scores. 0 = each layer by its own scores, as in
            the paper; `None` = what suits the method (eight for `retrolm` unless heads choose for themselves, else 0).
        word_weight: what a page's share of the question's words counts beside what the layers agree on (BM25 over the
            pages, standardised like their scores); needs `agreement_layers` and a tokenizer. 0 = words don't count, as
            in the paper; `None` = what suits the method.
        whole_sentences: among the words, a sentence that a page border cuts counts for both pages.
        page_positions: where the pages stand that are attended: "compact" = side by side (D6 b); "true" = as far before
            the page that attends them as in the text; "true_for_questions" = so for questions and answers, side by
            side while reading. In a text longer than the model's window, what is left out between pages shrinks in
            proportion, until all is within it. "true" reads more slowly. "ranked_for_questions" = side by side; where a
            question leaves pages out, those chosen by score stand from the worst to the best, which is nearest to it.
        retrieve_every: retrieve again after this many generated tokens; 0 = once per question (D12).
        chunk_pages: pages encoded in one forward pass; any value gives the same result (D10). 0 = as many as suit the
            device.
        dense_bypass: let pages that leave nothing out attend as one dense causal block, as the stock model does; off,
            they are gathered like all others, with the same result.
        prefix_page: give BOS and the chat template's head a sink page of their own.
        device_kv_bytes: cap on the KV bytes kept on the device; `None` keeps all pages there. Pages beyond it stay
            in host memory and are fetched when selected.
        store_dtype: dtype of stored pages ("float32", "bfloat16", "float16"); `None` = the model's dtype.
        store_bits: 16 = stored as they are; 8 or 4 = quantised once, when a page is finished, in every tier: keys per
            channel of a page, values per token.
    """

    kv_budget: int = 2048
    page_size: int = 128
    strict_budget: bool = True
    num_local_pages: int = 1
    first_layer_mode: Literal["recent", "mean_key", "full"] = "recent"
    num_skip_layers: int = 1
    bookmarks: Literal["invisible", "visible"] = "invisible"
    bookmark_span: Literal["sink_page", "page"] = "sink_page"
    selection_scope: Literal["layer", "head"] = "layer"
    score_rope: bool = False
    causal_selection: bool = False
    agreement_layers: int | None = None
    word_weight: float | None = None
    whole_sentences: bool = True
    page_positions: Literal["compact", "ranked_for_questions", "true_for_questions", "true"] = "compact"
    retrieve_every: int = 0
    chunk_pages: int = 0
    dense_bypass: bool = True
    prefix_page: bool = True
    device_kv_bytes: int | None = None
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    store_bits: Literal[16, 8, 4] = 16

    def __post_init__(self) -> None:
        check_choices(self)
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value is None and getattr(type(self), name) is None:  # left to the engine
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"{name} must be a whole number of at least {low}, got {value!r}.")
        if self.kv_budget < MIN_BUDGET_PAGES * self.page_room:
            raise UserError(
                f"kv_budget={self.kv_budget} is under {MIN_BUDGET_PAGES} pages of {self.page_room} tokens "
                f"(sink, previous and current page{', each with its bookmark' if self.page_marks else ''}). "
                f"Use at least {MIN_BUDGET_PAGES * self.page_room}, or a smaller page_size."
            )
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self._check_word_weight()
        cap = self.device_kv_bytes
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap <= 0):
            raise UserError(f"device_kv_bytes must be positive or None, in whole bytes, got {cap!r}.")

    def _check_word_weight(self) -> None:
        weight = self.word_weight
        if weight is None:
            return
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"word_weight must be a number of at least 0, got {weight!r}.")
        if weight and self.agreement_layers == 0:
            raise UserError(
                f"word_weight={weight!r} counts words beside what a question's layers agree on, and agreement_layers=0 "
                "leaves each layer to itself. Set agreement_layers to 1 or more, or word_weight to 0."
            )

    @property
    def page_marks(self) -> int:
        """Bookmarks among the tokens of a stored page: 1 where they are visible, else 0."""
        return int(self.bookmarks == "visible")

    @property
    def page_room(self) -> int:
        """Tokens that a stored page holds: those of the text and, where it is visible, the bookmark behind them."""
        return self.page_size + self.page_marks

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> RetroConfig:
        """Build a config from keyword options; an unknown key raises `UserError` with the closest allowed one."""
        allowed = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in allowed:
                raise unknown("option", key, allowed)
        return cls(**options)

    def replace(self, **changes: Any) -> RetroConfig:
        """Return a copy with some options changed."""
        return self.from_options({**dataclasses.asdict(self), **changes})


_SWITCHES = ("strict_budget", "score_rope", "causal_selection", "whole_sentences", "dense_bypass", "prefix_page")
_LOWEST = {
    "kv_budget": 1,
    "page_size": 1,
    "num_local_pages": 0,
    "num_skip_layers": 0,
    "agreement_layers": 0,
    "retrieve_every": 0,
    "chunk_pages": 0,
}


def check_choices(config: Any) -> None:
    """Refuse values outside the `Literal` type of a dataclass field; raises `UserError`."""
    for name, hint in get_type_hints(type(config)).items():
        choices = _literal_values(hint)
        value = getattr(config, name)
        if choices and value not in choices:
            names = [str(choice) for choice in choices]
            raise UserError(f"{name}={value!r} is not a choice.{suggest(str(value), names)}")


def _literal_values(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    nested: tuple[Any, ...] = ()
    for arg in get_args(hint):
        nested += _literal_values(arg) or ((None,) if arg is type(None) else ())
    return nested if any(get_origin(arg) is Literal for arg in get_args(hint)) else ()
