"""More passages than a budget holds: pages that no layer chose, by where all layers rank them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.results import PageUse, Retrieval

if TYPE_CHECKING:
    from .restore import KeptDocument


def best_pages(document: KeptDocument, retrieval: Retrieval, num_pages: int) -> list[PageUse]:
    """The `num_pages` best pages of text: chosen ones as the engine ranks them, then others by mean rank."""
    found = list(retrieval.pages[:num_pages])
    scores_LP = retrieval.scores[document.lm.config.num_skip_layers :]
    scoring_LP = scores_LP[~scores_LP.isnan().any(1)]
    if len(found) == num_pages or not len(scoring_LP):
        return found
    ranks_P = scoring_LP.argsort(1, descending=True).argsort(1).double().mean(0)
    known = {use.page for use in found}
    prefix = range(document.stretches[0].document.entry.num_prefix)
    others = [page for page in ranks_P.argsort(stable=True).tolist() if page not in known and page not in prefix]
    return found + [document.page_use(page, 0.0, ()) for page in others[: num_pages - len(found)]]
