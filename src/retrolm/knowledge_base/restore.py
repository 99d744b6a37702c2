"""Stored documents as documents of the engine: one as it was read, or several as one text.

Exact reuse, one document: the numbers are those of the session that read it. Composed reuse, several: each was read
behind the same prefix without seeing the others; a question retrieves from all of them in (document, page) order, no
page is forced but the prefix, and what a first layer without scores takes is `first_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import RetroConfig
from ..engine.document import Document
from ..errors import UserError
from ..methods import METHODS, PageMethod, PageTensors
from ..paging import PageTable
from .folder import Snapshot
from .index import DIGESTS, MEAN_KEYS, TokenPages
from .parts import StoredDocument
from .restored import RestoredDigests, RestoredStore, Rows, Stretch
from .tensors import to_tensor

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from ..store import PageStore

FirstLayer = Literal["mean_key", "recent"]


@dataclass
class KeptDocument(Document):
    """A document whose pages lie in a base.

    Attributes:
        stretches: the stored documents it consists of. held: the version of the base that keeps their files there.
    """

    stretches: tuple[Stretch, ...] = ()
    held: Snapshot | None = None

    def page_text(self, page: int) -> str:
        document, inner = self.locate(page)
        return document.page_text(inner)

    def locate(self, page: int) -> tuple[StoredDocument, int]:
        """Which stored document a page belongs to, and its number there."""
        for stretch in self.stretches:
            if page < stretch.num_pages:
                return stretch.document, page + stretch.skip
            page -= stretch.num_pages
        raise IndexError(page)

    def close(self) -> None:
        """Nothing to give back: the pages stay in the base."""
        self._closed = True


def restore(lm: RetroLM, document: StoredDocument, fresh: PageStore | None = None) -> KeptDocument:
    """One document exactly as it was when it had just been read.

    Args:
        fresh: where pages read from now on go; None = beside the model.
    """
    layers = _layers(document, DIGESTS)
    digests: dict[int, Rows] = {layer: partial(_rows, [Stretch(document, 0)], DIGESTS, layer) for layer in layers}
    return _kept(lm, lm.config, [Stretch(document, 0)], digests, fresh)


def compose(lm: RetroLM, documents: Sequence[StoredDocument], first_layer: FirstLayer) -> KeptDocument:
    """Several documents as one text to ask.

    Raises:
        UserError: the base can't be asked as a whole: no prefix page, or scores that depend on true positions.
    """
    prefixes = {document.entry.num_prefix for document in documents}
    if prefixes == {0} or len(prefixes) > 1 or lm.config.score_rope:
        reason = "scores pages at their true positions (score_rope)" if lm.config.score_rope else "has no prefix page"
        raise UserError(f"Several documents can't be asked together here, since this base {reason}. Name one document.")
    config = lm.config.replace(num_local_pages=0, first_layer_mode=first_layer)
    stretches = [Stretch(doc, doc.entry.num_prefix if i else 0) for i, doc in enumerate(documents)]
    assert isinstance(lm.method, PageMethod)
    digests = {layer: _composed_rows(lm.method, config, stretches, layer) for layer in _layers(documents[0], DIGESTS)}
    return _kept(lm, config, stretches, digests, None)


def _kept(
    lm: RetroLM, config: RetroConfig, stretches: list[Stretch], digests: dict[int, Rows], fresh: PageStore | None
) -> KeptDocument:
    store = RestoredStore(lm.page_layout(), stretches, fresh)
    encoder = lm.encoder_over(store, config=config, digests=RestoredDigests(store.num_stored, digests))
    entry = stretches[0].document.entry
    lengths = np.concatenate([stretch.document.index.lengths[stretch.skip :] for stretch in stretches])
    stored_lengths = torch.from_numpy(lengths.astype(np.int64)) + config.page_marks
    table = PageTable(torch.arange(store.num_stored), stored_lengths, entry.num_sink, config.page_room)
    spans = np.concatenate([stretch.document.index.spans[stretch.skip :] for stretch in stretches])
    return KeptDocument(
        lm=lm,
        encoder=encoder,
        text=None,
        table=table,
        page_spans=[(start, end) for start, end in spans.tolist()],
        token_ids=TokenPages(np.concatenate([_token_ids(stretch) for stretch in stretches]), lengths),  # type: ignore[arg-type]
        prefill_s=0.0,
        peak_attended=max(stretch.document.entry.peak_attended for stretch in stretches),
        stretches=tuple(stretches),
    )


def _token_ids(stretch: Stretch) -> np.ndarray:
    index = stretch.document.index
    return index.token_ids[int(index.lengths[: stretch.skip].sum()) :]


def _layers(document: StoredDocument, front: str) -> list[int]:
    return document.index.layers(front)


def _rows(stretches: Sequence[Stretch], front: str, layer: int) -> Tensor:
    """Digests of all pages in one layer, read from disk: [P, E]."""
    found = [to_tensor(*stretch.document.index.rows(front, layer))[stretch.skip :] for stretch in stretches]
    return found[0] if len(found) == 1 else torch.cat(found)


def _composed_rows(method: PageMethod, config: RetroConfig, stretches: Sequence[Stretch], layer: int) -> Rows:
    """What a layer of a composed text scores."""
    if layer < config.num_skip_layers and config.first_layer_mode == "mean_key":
        front = MEAN_KEYS if layer in _layers(stretches[0].document, MEAN_KEYS) else DIGESTS
        return partial(_rows, stretches, front, layer)
    used = METHODS.get("recency")() if layer < config.num_skip_layers else method
    assert isinstance(used, PageMethod)
    if used.digest_is_place:
        return partial(_places, used, layer, sum(stretch.num_pages for stretch in stretches))
    return partial(_rows, stretches, DIGESTS, layer)


def _places(method: PageMethod, layer: int, num_pages: int) -> Tensor:
    """Digests that say where a page stands, for the pages of a composed text."""
    none = torch.empty(num_pages, 0, 0, 0)
    lengths = torch.ones(num_pages, dtype=torch.int64)
    return method.digest(PageTensors(layer, none, none, lengths, torch.arange(num_pages)))
