"""Layer × page maps of page scores, the gold pages marked (the paper's Figures 2 to 4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from ...errors import UserError


def draw_heatmap(scores: Mapping[str, Tensor], gold: Collection[int], title: str, path: Path) -> None:
    """Draw one panel per index into a PNG: colour is the page's rank within its layer, 1 = best.

    Args:
        scores: float [L, P] by index name. gold: pages that hold the evidence, marked at the top edge and by lines.
    """
    figure = _figure(len(scores))
    panels = figure.subplots(len(scores), 1, squeeze=False, sharex=True)[:, 0]
    for panel, (name, scores_LP) in zip(panels, scores.items(), strict=True):
        image = panel.imshow(_ranks(scores_LP), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        for page in gold:
            panel.axvline(page - 0.5, color="red", linewidth=0.8)
            panel.axvline(page + 0.5, color="red", linewidth=0.8)
            panel.plot(page, -0.9, marker="v", color="red", markersize=7, clip_on=False)
        panel.set_ylabel("layer")
        for axis in (panel.xaxis, panel.yaxis):
            axis.get_major_locator().set_params(integer=True)
        panel.set_title(name.replace("_", " "), loc="left", fontsize=10, pad=10)
        panel.set_ylim(len(scores_LP) - 0.5, -0.5)
    panels[-1].set_xlabel("page of the text (red: holds the evidence)")
    figure.suptitle(title)
    figure.colorbar(image, ax=list(panels), label="rank of the page in its layer (1 = best)")
    figure.savefig(path, dpi=130)


def _figure(num_panels: int):  # type: ignore[no-untyped-def]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Plots need matplotlib: pip install 'retrolm[evaluation]'.") from None
    return Figure(figsize=(9, 1.2 + 2.6 * num_panels), layout="constrained")


def _ranks(scores_LP: Tensor) -> Tensor:
    """Share of the other pages that each page beats in its layer, 0 to 1."""
    order = scores_LP.argsort(dim=1).argsort(dim=1)
    return order / max(scores_LP.shape[1] - 1, 1)
