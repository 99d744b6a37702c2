"""The contract of a method: what it says of itself, its knobs, and how its budget is checked.

A method is of one *kind*, and the engine (or `rag/`) has one program per kind that does the work:

* "pages": chooses whole pages, one set per layer (`PageMethod`, below).
* "tokens": says for each chunk and layer which tokens are attended and at which positions (`token_base.TokenMethod`).
* "prune": keeps a part of the prompt's keys and values after a dense prefill (`prune_base.PruneMethod`).
* "landmarks": retrieves blocks by landmarks among the tokens, which a model was trained to work with (`landmark`).
* "dense": attends everything.
* "rag": changes the prompt, not the attention.

Shape letters: N pages of a chunk, P past pages, W page size, H query heads, K KV heads, D head dim, E digest width,
F probe width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..errors import RetroLMError, UserError
from ..registry import Registry
from .knobs import NoKnobs, build_knobs

Rope = Callable[[Tensor], tuple[Tensor, Tensor]]
Kind = Literal["pages", "tokens", "prune", "landmarks", "dense", "rag"]


PLACE = ("trained", "unit", "index", "query", "scope", "when")


class BudgetError(RetroLMError):
    """A method attended more than its budget on a text longer than it, or did not act at all."""


class Method:
    """Base of all methods. Instances hold their knobs and nothing of any text.

    Args:
        knobs: an instance of `Knobs`; None = its defaults.

    Attributes:
        kind: which program runs it (see the module's text).
        name, paper, summary: what it is called, a link, one line.
        prefill: "streaming" = the budget holds while the prompt is read, too; "dense" = the prompt is read in full.
        budget_split: what `kv_budget` tokens are spent on. keeps: what stays in memory, and where.
        positions: where kept tokens stand for RoPE. exact_when: the setting in which it equals full attention.
        trained, unit, index, query, scope, when: its place among the others (docs/methods.md): what is trained; what is
            chosen; what each is known by; what looks for it; what shares a choice; when one is made.
        Knobs: frozen dataclass of its settings (`--set name.knob=value`, `method_options={…}`).
        has_budget: whether `kv_budget` means anything to it.
        needs_bookmarks: whether it reads bookmark tokens (and takes a page retriever).
        agreement_layers: of how many last layers a question's pages are those they agree on, unless the configuration
            says otherwise; 0 = each layer has its own.
        word_weight: what a page's share of the question's words counts beside that, unless the configuration says
            otherwise; 0 = nothing.
        true_positions: whether positions run on to the prompt's length, rather than to the budget's.
        config_fields: the options of `RetroConfig` that change its results; None = all.
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    prefill: ClassVar[Literal["streaming", "dense"]]
    budget_split: ClassVar[str]
    keeps: ClassVar[str]
    positions: ClassVar[str]
    exact_when: ClassVar[str]
    trained: ClassVar[str] = "nothing"
    unit: ClassVar[str] = "token"
    index: ClassVar[str] = "none"
    query: ClassVar[str] = "none"
    scope: ClassVar[str] = "layer"
    when: ClassVar[str] = "never"
    Knobs: ClassVar[type[Any]] = NoKnobs
    has_budget: ClassVar[bool] = True
    needs_bookmarks: ClassVar[bool] = False
    agreement_layers: ClassVar[int] = 0
    word_weight: ClassVar[float] = 0.0
    true_positions: ClassVar[bool] = False
    config_fields: ClassVar[tuple[str, ...] | None] = ("prefix_page",)

    def __init__(self, knobs: Any = None) -> None:
        self.knobs = self.Knobs() if knobs is None else knobs
        self.check_knobs()

    @classmethod
    def with_options(cls, options: Mapping[str, Any] | None = None) -> Self:
        """The method with some knobs set; raises `UserError` for unknown or ill-typed ones."""
        return cls(build_knobs(cls.name, cls.Knobs, options or {}))

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """What `retrolm methods` shows: the texts above and the knobs with their defaults."""
        keys = ("name", "kind", "summary", "paper", "prefill", "budget_split", "keeps", "positions", "exact_when")
        found = {key: getattr(cls, key) for key in (*keys, "has_budget", "needs_bookmarks")}
        found |= {key: getattr(cls, key) for key in PLACE}
        return {**found, "knobs": dataclasses.asdict(cls.Knobs())}

    def check_knobs(self) -> None:
        """Raise `UserError` for knobs out of range, whatever the budget."""

    def check_budget(self, kv_budget: int) -> None:
        """Raise `UserError` for a budget that the knobs can't be served from."""

    def check_attended(self, attended: Mapping[str, int], num_tokens: int, num_generated: int, allowed: int) -> None:
        """Hold what was really attended in the layers that choose against the budget.

        A method that did nothing attended everything, so that this finds it too.

        Args:
            attended: {"prefill", "decode"}: most keys of any prompt token, of any generated token.
            num_tokens: of the prompt. num_generated: generated tokens; they may come on top of the budget.
            allowed: the budget.

        Raises:
            BudgetError: more was attended than the budget of a text longer than it.
        """
        most = attended["decode"] - max(num_generated - 1, 0)
        if self.prefill == "streaming":
            most = max(most, attended["prefill"])
        if self.has_budget and num_tokens > allowed and most > allowed:
            raise BudgetError(
                f"Method {self.name!r} attended {most} tokens of a text of {num_tokens}; its budget is {allowed}. "
                "The run was stopped: its scores would not be those of this budget."
            )


METHODS: Registry[Method] = Registry("method")


@dataclass
class PageTensors:
    """What a method may look at of freshly encoded pages in one layer. Queries and keys are before RoPE.

    Attributes:
        q_NWHD, k_NWKD: rows at or past `lengths` are padding. There are no queries if the method reads none.
        lengths: tokens of each page, int64 [N].
        ordinals: index of each page in its document, int64 [N].
        bookmark_q_NHD, bookmark_k_NKD: the bookmarks' rows, if the method asks for bookmarks; keys without the
            constant bias of the projection, except under `score_rope`.
        page_cos, page_sin: RoPE tables at each page's true start, [N, R]; only if `score_rope` is on.
        rope, page_size: positions int64 [...] → cos, sin [..., R], and the room of a page; only if the method asks.
    """

    layer: int
    q_NWHD: Tensor
    k_NWKD: Tensor
    lengths: Tensor
    ordinals: Tensor
    bookmark_q_NHD: Tensor | None = None
    bookmark_k_NKD: Tensor | None = None
    page_cos: Tensor | None = None
    page_sin: Tensor | None = None
    rope: Rope | None = None
    page_size: int = 0


class PageMethod(Method, ABC):
    """Base of all methods that choose whole pages, one set per layer shared by all heads.

    A method turns each finished page into a *digest* kept on the device, each page that is being encoded into a
    *probe*, and scores probes against digests. Forced pages, causality, budget and ties are the base's business
    (`selection.choose_pages`).
    """

    kind = "pages"
    prefill = "streaming"
    budget_split = "sink page + previous page + best pages + current page"
    keeps = "all pages, on the device or (beyond device_kv_bytes) in host memory; a digest per page"
    positions = "compact: the gathered pages stand at 0, 1, 2, …, the current page behind them"
    exact_when = "kv_budget ≥ text and question"
    unit = "page"
    when = "each page while reading, once per question"
    config_fields = None
    needs_rope: ClassVar[bool] = False  # whether it wants `rope` and `page_size`
    reads_queries: ClassVar[bool] = True  # whether it looks at normal tokens' queries
    digest_is_place: ClassVar[bool] = False  # whether `digest` looks at `ordinals` alone

    @abstractmethod
    def digest(self, pages: PageTensors) -> Tensor:
        """Return what is kept of each page for scoring, [N, E]."""

    @abstractmethod
    def probe(self, pages: PageTensors) -> Tensor:
        """Return what each page looks for, [N, F]."""

    @abstractmethod
    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        """Score past pages, float32 [N, P]; higher is better. Pages not in the past are masked by the caller."""


def valid_rows(pages: PageTensors) -> Tensor:
    """Which token rows exist, bool [N, W]."""
    inside = torch.arange(pages.k_NWKD.shape[1], device=pages.lengths.device)
    return inside < pages.lengths[:, None]


def sum_groups(q_NHD: Tensor, num_kv_heads: int) -> Tensor:
    """Add the queries of each KV head's group: [N, H, D] → [N, K, D] (D4: heads share one score per layer)."""
    N, H, D = q_NHD.shape
    return q_NHD.reshape(N, num_kv_heads, H // num_kv_heads, D).sum(2)


def page_method(name: str) -> type[PageMethod]:
    """The page method of this name; raises `UserError` for an unknown one, or one of another kind."""
    found = METHODS.get(name)
    if not issubclass(found, PageMethod):
        pages = [key for key in METHODS if issubclass(METHODS.get(key), PageMethod)]
        raise UserError(f"Method {name!r} doesn't choose pages, which this needs. Use one of {', '.join(pages)}.")
    return found
