"""Recall on held-out questions: by layer, and by kind of text, since a mean hides what a mixture lacks.

Shape letters: S kinds of text, L layers with a loss, N questions.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import unknown
from ..data.config import PASSAGE_QUERY_KINDS, SYNTHETIC_KINDS, Stage1DataConfig
from ..data.dataset import Stage1Dataset
from ..data.mixture import text_length
from ..loop import rounded
from .batches import Collate, micro_batches
from .step import Stage1Step, StepResult

PEOPLE = "people"
_MOST_ALIKE = 4  # texts of one length, so that few of them already cover the lengths


def kind_of(source: str) -> str:
    """The kind of a mixture part: questions that people wrote are one, whatever they are taken from."""
    return source if source in (*SYNTHETIC_KINDS, *PASSAGE_QUERY_KINDS) else PEOPLE


def dev_config(data: Stage1DataConfig, min_tokens: int, max_tokens: int) -> Stage1DataConfig:
    """The training mixture at all lengths from the first sample on; 0 = the mixture's own shortest or longest."""
    longest = max_tokens or max(data.longest, min_tokens)
    return dataclasses.replace(
        data,
        length_curriculum=0,
        long_share=0.0,
        length_group=min(data.length_group, _MOST_ALIKE),
        min_tokens=min(min_tokens or data.min_tokens, longest),
        max_tokens=longest,
    )


def only_kinds(data: Stage1DataConfig, kinds: Collection[str]) -> Stage1DataConfig:
    """The mixture cut down to some kinds of text, each as frequent as the others; raises `UserError` for one it lacks.

    Within people's questions the sources keep their shares.
    """
    totals: dict[str, float] = defaultdict(float)
    for part, weight in data.weights.items():
        totals[kind_of(part)] += weight
    for kind in kinds:
        if not totals.get(kind):
            raise unknown("kind of text in the recipe's mixture", kind, [kind for kind in totals if totals[kind]])
    weights = {
        part: weight / totals[kind_of(part)] if kind_of(part) in kinds else 0.0 for part, weight in data.weights.items()
    }
    return dataclasses.replace(data, weights=weights)


def dev_batches(config: Stage1DataConfig, num_samples: int, tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of the first samples, grouped as `micro_batches` does."""
    return micro_batches((text_length(config, index) for index in range(num_samples)), tokens_per_batch)


@torch.no_grad()
def held_out_recall(
    steps: Sequence[Stage1Step],
    data: Stage1Dataset,
    batches: Iterable[list[int]],
    collate: Collate,
    device: torch.device,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> list[dict[str, Any]]:
    """Measure each step's retriever (its running mean, where it has one) on the same batches of held-out samples.

    Args:
        steps: on one backbone, which reads each batch once if dense. data: of the split "dev".
        total: sums counts over processes.

    Returns:
        For each step "mean" and "best" over layers, "layers", "kinds": the mean over layers by kind of text, None
        where no question counts, "agreed" and "agreed_kinds": what the last layers agree on, with words if `collate`
        counts them, and "asked": how many questions count. Further questions count for the kind of their text.
    """
    kinds = sorted({kind_of(part) for part, weight in data.context.config.weights.items() if weight > 0})
    counts = [torch.zeros(len(kinds), len(step.layers) + 1, 2, device=device) for step in steps]
    for step in steps:
        step.eval()
    for indices in batches:
        batch = collate([data[index] for index in indices]).to(device)
        of_text = torch.tensor([kinds.index(kind_of(source)) for source in batch.sources], device=device)
        frozen = steps[0].read(batch) if steps[0].reads_alike else None
        for step, found in zip(steps, counts, strict=True):
            result = step(batch, frozen)
            hits_LN = torch.cat([result.hits_LN, result.agreed_N[None]])
            found.index_add_(0, of_text[batch.sequence_N], _each(hits_LN))
    for step in steps:
        step.train()
    return [_figures(kinds, total(found).cpu()) for found in counts]


def hits_and_counts(result: StepResult) -> Tensor:
    """Hits and questions that count, by layer: [L, 2]."""
    return _each(result.hits_LN).sum(0)


def _each(hits_LN: Tensor) -> Tensor:
    """Whether each question was found, and whether it counts, by layer: [N, L, 2]."""
    hits_NL = hits_LN.T
    return torch.stack([hits_NL.nan_to_num(0.0), (~hits_NL.isnan()).float()], 2)


def _figures(kinds: list[str], counts_SL2: Tensor) -> dict[str, Any]:
    """From counts by layer, and last what layers agree on."""
    agreed, agreed_by_kind = _shares(counts_SL2[:, -1].sum(0)), _shares(counts_SL2[:, -1])
    counts_SL2 = counts_SL2[:, :-1]
    by_layer, by_kind = (_shares(counts) for counts in (counts_SL2.sum(0), counts_SL2))
    return {
        "mean": rounded(by_layer.mean()),
        "best": rounded(by_layer.max()),
        "layers": [rounded(share) for share in by_layer],
        "kinds": {kind: rounded(shares.mean()) for kind, shares in zip(kinds, by_kind, strict=True)},
        "agreed": rounded(agreed),
        "agreed_kinds": {kind: rounded(share) for kind, share in zip(kinds, agreed_by_kind, strict=True)},
        "asked": {kind: int(count) for kind, count in zip(kinds, counts_SL2[:, 0, 1], strict=True)},
    }


def _shares(counts: Tensor) -> Tensor:
    return counts[..., 0] / counts[..., 1]
