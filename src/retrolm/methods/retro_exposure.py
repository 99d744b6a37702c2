"""Effective KV exposure: what queries have seen once they were revised, beside what they attended at their own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ExposureMeter:
    """Adds up, over all generated tokens, heads and layers, what revisions let queries see.

    Set it as the `meter` of a method that revises, before generating, and read it afterwards.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, ...], Tensor] = {}

    def note(self, num_new_BJQ: Tensor, samples: Sequence[int] | None = None) -> None:
        """Note one step in one layer.

        Args:
            num_new_BJQ: tokens that each query attends for the first time; the newest query stands last, and those
                before it are revised.
            samples: numbers of the B samples; None = in order.
        """
        sums_BQ = num_new_BJQ.double().mean(1)
        own_and_more = torch.stack([sums_BQ[:, -1], sums_BQ[:, :-1].sum(1)], 1)
        key = (num_new_BJQ.device, *(range(len(sums_BQ)) if samples is None else samples))
        self._sums[key] = self._sums[key] + own_and_more if key in self._sums else own_and_more

    def by_sample(self) -> list[float]:
        """Tokens seen after all revisions per token attended at a query's own step, for each sample of the batch.

        1 where nothing was revised. The last tokens, revised less often, count as they are.
        """
        found: dict[int, Tensor] = {}
        for (_, *samples), sums in self._sums.items():
            for sample, row in zip(samples, sums.cpu(), strict=True):
                found[sample] = found[sample] + row if sample in found else row
        return [float(1 + found[sample][1] / found[sample][0]) for sample in sorted(found)]


class Revises:
    """What methods that revise share: a meter that someone may attach for a while."""

    meter: ExposureMeter | None = None
