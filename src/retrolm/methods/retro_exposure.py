"""Effective KV exposure: what queries have seen once they were revised, beside what they attended at their own step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

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
        key = (num_new_BJQ.device, num_new_BJQ.shape[2], *(samples or range(len(num_new_BJQ))))
        self._sums[key] = self._sums[key] + num_new_BJQ if key in self._sums else num_new_BJQ

    def by_sample(self) -> list[float]:
        """Tokens seen after all revisions per token attended at a query's own step, for each sample of the batch.

        1 where nothing was revised. The last tokens, revised less often, count as they are.
        """
        own, seen = Counter[int](), Counter[int]()
        for (_, _, *samples), sums_BJQ in self._sums.items():
            for sample, sums_Q in zip(samples, sums_BJQ.sum(1).tolist(), strict=True):
                own[sample] += sums_Q[-1]
                seen[sample] += sum(sums_Q)
        return [seen[sample] / own[sample] for sample in sorted(own)]


class Revises:
    """What methods that revise share: a meter that someone may attach for a while."""

    meter: ExposureMeter | None = None
