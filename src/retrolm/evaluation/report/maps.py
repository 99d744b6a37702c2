"""Pictures and pages of attention maps."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ..attention_maps import AttentionMap, gold_ranks
from ..journal import write_whole
from .table import MISSING

TEMPLATE = Path(__file__).parent / "map.html.j2"
_SMALLEST = 1e-6  # share of attention that still has a colour
_EVIDENCE = "#d62728"


def write_map(found: AttentionMap, out: Path) -> list[Path]:
    """Write the map of one sample as PNG and as a self-contained HTML page; returns both paths.

    Raises `UserError` where matplotlib or jinja2 is missing.
    """
    sample = found.sample
    name = f"attention_{sample.task.replace('/', '_')}_{sample.length or 'natural'}_{_file_part(sample.sample_id)}"
    png = draw_map(found)
    page = map_page(found, png)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.png", out / f"{name}.html"]
    paths[0].write_bytes(png)
    write_whole(paths[1], page)
    return paths


def draw_map(found: AttentionMap) -> bytes:
    """One panel for full attention and one per retriever, with the evidence marked in red."""
    figure = _figure(1 + len(found.scores))
    panels = list(figure.subplots(1 + len(found.scores), 1, sharex=True))
    _attention_panel(figure, panels[0], found)
    for panel, (name, scores_LP) in zip(panels[1:], found.scores.items(), strict=True):
        _score_panel(figure, panel, found, name, scores_LP)
    for panel in panels:
        panel.set_ylabel("layer")
        panel.yaxis.get_major_locator().set_params(integer=True)
        _mark_evidence(panel, found)
    panels[-1].set_xlabel("position in the text (tokens); red: the evidence; grey: no page scores in this layer")
    figure.suptitle(map_title(found), fontsize=11)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def map_title(found: AttentionMap) -> str:
    """Task, sample and length in words."""
    return f"{found.sample.task}, sample {found.sample.sample_id}, {found.num_tokens:,} tokens of text"


def map_page(found: AttentionMap, png: bytes) -> str:
    """The picture with the question, and the rank of the evidence in every layer."""
    try:
        import jinja2
    except ImportError:
        raise UserError("The HTML page needs jinja2: pip install 'retrolm[evaluation]'.") from None
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=map_title(found),
        png=base64.b64encode(png).decode(),
        question=found.sample.question.strip(),
        answers=", ".join(found.sample.answers),
        pages=", ".join(map(str, sorted(found.gold))),
        page_size=found.page_size,
        strip_tokens=found.strip_tokens,
        num_pages=found.mass_LP.shape[1],
        columns=["layer", "attention on the evidence", "rank by full attention", *found.scores],
        rows=rank_rows(found),
    )


def rank_rows(found: AttentionMap) -> list[list[str]]:
    """Per layer: share of attention on pages with evidence, and their best rank by attention and by each retriever."""
    if not found.gold:
        return []
    shares = found.mass_LP[:, sorted(found.gold)].sum(1)
    ranks = [gold_ranks(scores, found.gold) for scores in (found.mass_LP, *found.scores.values())]
    return [
        [
            str(layer),
            f"{float(share):.4f}",
            *(MISSING if column[layer] is None else str(column[layer]) for column in ranks),
        ]
        for layer, share in enumerate(shares)
    ]


def _attention_panel(figure: Any, panel: Any, found: AttentionMap) -> None:
    shares = found.attention_LS.clamp(min=_SMALLEST).log10()
    image = _show(panel, shares, found, vmin=-6, vmax=float(shares.max()))
    figure.colorbar(image, ax=panel, label=f"share of attention\nper {found.strip_tokens} tokens, log10", pad=0.01)
    panel.set_title("full attention of the question", loc="left", fontsize=10, pad=11)


def _score_panel(figure: Any, panel: Any, found: AttentionMap, name: str, scores_LP: Tensor) -> None:
    spread = scores_LP.std(1, keepdim=True, correction=0).clamp(min=1e-9)
    image = _show(panel, (scores_LP - scores_LP.mean(1, keepdim=True)) / spread, found, vmin=-3, vmax=3)
    figure.colorbar(image, ax=panel, label="page score, in standard\ndeviations of its layer", pad=0.01)
    panel.set_title(f"page retriever: {name.replace('_', ' ')}", loc="left", fontsize=10, pad=11)


def _show(panel: Any, values: Tensor, found: AttentionMap, **limits: float) -> Any:
    """Draw [layers, strips or pages] over the tokens they stand for; the last one may be short. NaN stays grey."""
    panel.set_facecolor("0.85")
    width = found.strip_tokens if values.shape[1] == found.attention_LS.shape[1] else found.page_size
    edges = [min(column * width, found.num_tokens) for column in range(values.shape[1] + 1)]
    rows = [layer - 0.5 for layer in range(values.shape[0] + 1)]
    return panel.pcolormesh(edges, rows, values.numpy(), cmap="viridis", rasterized=True, **limits)


def _mark_evidence(panel: Any, found: AttentionMap) -> None:
    for start, end in found.spans:
        panel.axvspan(start, end, facecolor="none", edgecolor=_EVIDENCE, linewidth=1.0)
        middle = (start + end) / 2
        panel.plot(middle, 1.03, "v", color=_EVIDENCE, transform=panel.get_xaxis_transform(), clip_on=False)


def _figure(num_panels: int) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("Plots need matplotlib: pip install 'retrolm[evaluation]'.") from None
    return Figure(figsize=(10, 1.0 + 2.7 * num_panels), layout="constrained")


def _file_part(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)
