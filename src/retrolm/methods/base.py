"""The contract of a page-selection method.

A method turns each finished page into a *digest* kept on the device, each page that is being encoded into a *probe*,
and scores probes against digests. Forced pages, causality, budget and ties are the base's business
(`selection.choose_pages`). Shape letters: N pages of a chunk, P past pages, W page size, H query heads, K KV heads,
D head dim, E digest width, F probe width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..registry import Registry


@dataclass
class PageTensors:
    """What a method may look at of freshly encoded pages in one layer. Queries and keys are before RoPE.

    Attributes:
        q_NWHD, k_NWKD: rows at or past `lengths` are padding.
        lengths: tokens of each page, int64 [N].
        ordinals: index of each page in its document, int64 [N].
        bookmark_q_NHD, bookmark_k_NKD: the bookmarks' rows, if the method asks for bookmarks; keys without the
            constant bias of the projection, except under `score_rope`.
        page_cos, page_sin: RoPE tables at each page's true start, [N, R]; only if `score_rope` is on.
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


class PageMethod(ABC):
    """Base of all methods that choose whole pages, one set per layer shared by all heads."""

    name: ClassVar[str]
    paper: ClassVar[str]
    summary: ClassVar[str]
    needs_bookmarks: ClassVar[bool] = False

    @abstractmethod
    def digest(self, pages: PageTensors) -> Tensor:
        """Return what is kept of each page for scoring, [N, E]."""

    @abstractmethod
    def probe(self, pages: PageTensors) -> Tensor:
        """Return what each page looks for, [N, F]."""

    @abstractmethod
    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        """Score past pages, float32 [N, P]; higher is better. Pages not in the past are masked by the caller."""


METHODS: Registry[PageMethod] = Registry("method")


def valid_rows(pages: PageTensors) -> Tensor:
    """Which token rows exist, bool [N, W]."""
    inside = pages.lengths.new_tensor(range(pages.k_NWKD.shape[1]))
    return inside < pages.lengths[:, None]


def sum_groups(q_NHD: Tensor, num_kv_heads: int) -> Tensor:
    """Add the queries of each KV head's group: [N, H, D] → [N, K, D] (D4: heads share one score per layer)."""
    N, H, D = q_NHD.shape
    return q_NHD.reshape(N, num_kv_heads, H // num_kv_heads, D).sum(2)
