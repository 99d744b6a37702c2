"""`retrolm eval attention`: what a question attends to, beside what page retrievers choose, layer by position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import unknown
from .eval_options import BackboneOptions, SetOptions
from .eval_retrieval import load_bare, load_retrievers
from .options import with_options

if TYPE_CHECKING:
    from ..evaluation.runner import SampleSet
    from ..evaluation.tasks import EvalSample


@with_options(sets=SetOptions(), backbone=BackboneOptions())
def attention(
    sets: SetOptions,
    backbone: BackboneOptions,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and pages.")],
    sample: Annotated[
        list[str],
        typer.Option("--sample", help="Id of a sample to draw; may be repeated.", show_default="each set's first"),
    ] = [],  # noqa: B006
    strip_tokens: Annotated[int, typer.Option(help="Tokens per column of the map of full attention.", min=1)] = 16,
) -> None:
    """Draw full attention of a question beside page scores, layer by position, the evidence marked: PNG and HTML."""
    from ..engine.whole_folder import require_folder

    require_folder(out)
    sets.check()
    from ..evaluation.attention_maps import attention_map
    from ..evaluation.report.maps import write_map

    lm = load_bare(backbone)
    retrievers = load_retrievers(lm, backbone.retriever)
    for part in sets.make(lm.tokenizer):
        for chosen in _chosen(part, sample):
            for path in write_map(attention_map(lm, chosen, retrievers, strip_tokens), out):
                print(path)


def _chosen(part: SampleSet, sample_ids: list[str]) -> Iterator[EvalSample]:
    by_id = {sample.sample_id: sample for sample in part.samples}
    for sample_id in sample_ids or list(by_id)[:1]:
        if sample_id not in by_id:
            raise unknown(f"sample of {part.task.name}", sample_id, list(by_id)[:20])
        yield by_id[sample_id]
