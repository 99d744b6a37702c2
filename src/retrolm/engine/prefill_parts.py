"""What streaming prefill works with, shared by all chunks of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import RetroConfig
from ..errors import UserError
from ..methods import PageMethod, page_method
from ..methods.head_scores import ScoresHeads
from ..retriever import PageRetriever
from ..store import DigestIndex, PageStore
from .backbone import Backbone
from .visible import require_bookmarks


@dataclass
class PrefillParts:
    """Model, options and store of one engine.

    Raises:
        UserError: each KV head is to choose its own pages, but the method has no scores of heads; or bookmarks are to
            be visible, but the method encodes none.
    """

    backbone: Backbone
    config: RetroConfig
    retriever: PageRetriever | None
    method: PageMethod
    store: PageStore
    digests: DigestIndex

    def __post_init__(self) -> None:
        if self.config.selection_scope == "head" and not isinstance(self.method, ScoresHeads):
            raise UserError(
                f"Method {self.method.name!r} scores pages for all heads of a layer together. Use "
                "selection_scope='layer', or method 'retrolm' or 'mean_key'."
            )
        require_bookmarks(self.config, self.method)

    def method_for(self, layer: int) -> PageMethod:
        """The first layers' bookmarks tie, so they choose by recency or by mean keys (D7)."""
        if layer >= self.config.num_skip_layers:
            return self.method
        return page_method("mean_key" if self.config.first_layer_mode == "mean_key" else "recency")()

    def scores_pages(self, layer: int) -> bool:
        """Whether a layer's choice rests on scores, not just on recency."""
        return layer >= self.config.num_skip_layers or self.config.first_layer_mode == "mean_key"

    def attends_all(self, layer: int) -> bool:
        """Whether a layer attends every past page, whatever the budget (D7)."""
        return layer < self.config.num_skip_layers and self.config.first_layer_mode == "full"
