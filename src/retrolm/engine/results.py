"""What the engine hands back: retrievals and answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class PageUse:
    """One page of the document that an answer could draw on.

    Attributes:
        page: page number (an index into `Document.page_spans`).
        start_char, end_char: its place in the text. text: what stands there.
        score: share of the scoring layers whose best pages include it, 0 to 1.
        layers: those layers.
    """

    page: int
    start_char: int
    end_char: int
    score: float
    layers: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Retrieval:
    """Which pages a question attends.

    Attributes:
        page_ids: int64 [num_layers, k], ascending, empty places -1 at the left; layers that keep a sliding window
            instead of choosing have the pages the window reaches.
        scores: float32 [num_layers, num_pages] of all pages; NaN in layers that score nothing.
        pages: pages ranked by how many scoring layers chose them.
    """

    page_ids: Tensor
    scores: Tensor
    pages: tuple[PageUse, ...]


@dataclass(frozen=True)
class Timings:
    """Seconds: reading the document, question to first token, each further token."""

    prefill_s: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Answer:
    """A generated answer and where it came from.

    Attributes:
        token_ids: the generated tokens, special ones included.
        attended_tokens: KV attended per layer: {"prefill": most by any page, "decode": most by a generated token}, in
            layers that choose pages; {"sliding"} by the layers, if any, that keep their sliding window instead;
            {"dense_layers"}, {"dense_heads"} by those, if any, that the method leaves dense on purpose.
        max_position: highest compact position used.
        kv_bytes: {"device", "host", "disk"} bytes of stored pages, {"cache"} of the compact cache.
        truncated: generation stopped at `max_new_tokens`.
        decode_path: what generated: the engine's own loop, or transformers' `generate` and, where known, why.
        attended_by_layer: most keys attended in each layer, {"prefill", "decode"}; empty for page methods.
    """

    text: str
    token_ids: tuple[int, ...]
    retrieval: Retrieval
    attended_tokens: dict[str, int]
    max_position: int
    timings: Timings
    kv_bytes: dict[str, int]
    truncated: bool
    notes: tuple[str, ...] = field(default=())
    decode_path: str = ""
    attended_by_layer: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def pages(self) -> tuple[PageUse, ...]:
        """Pages of the text ranked by how many layers chose them."""
        return self.retrieval.pages
