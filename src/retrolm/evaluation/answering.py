"""Who answers batches of samples for the runner, and what each answer took; see `ray_shards` for other processes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine.memory import PeakMemory
from ..methods import BudgetError
from .readers import Prediction, Reader
from .tasks import EvalSample
from .variants import OpenVariant, Variant, VariantLoader

Batch = Sequence[EvalSample]


@dataclass(frozen=True)
class Answered:
    """What came of one sample.

    Attributes:
        outcome: the answer, or the text of the error that broke it.
        measured: time, batch size and peak memory, for its row.
        provenance: commit, versions, hardware, command and time of the process that answered.
    """

    sample: EvalSample
    outcome: Prediction | str
    measured: dict[str, Any]
    provenance: dict[str, Any]


class Answerer(Protocol):
    """Answers batches under variants."""

    def facts(self, variant: Variant) -> dict[str, Any]:
        """What identifies the variant's rows; raises `UserError` if it can't be opened."""
        ...

    def answers(self, variant: Variant, batches: Iterable[Batch]) -> Iterator[list[Answered]]:
        """Yield each batch once it is answered, in any order. Raises `BudgetError` if a budget was overrun."""
        ...


class LocalAnswerer:
    """Answers in this process, one batch after the other (an `Answerer`).

    Args:
        provenance: facts of this run for its rows (commit, versions, hardware, command, measured_at).
    """

    def __init__(self, loader: VariantLoader, provenance: dict[str, Any]) -> None:
        self._loader = loader
        self._provenance = provenance
        self._open: tuple[Variant, OpenVariant] | None = None

    def facts(self, variant: Variant) -> dict[str, Any]:
        """See `Answerer`."""
        return self._opened(variant).facts

    def answers(self, variant: Variant, batches: Iterable[Batch]) -> Iterator[list[Answered]]:
        """See `Answerer`."""
        for batch in batches:
            yield self.answer(variant, batch)

    def answer(self, variant: Variant, batch: Batch) -> list[Answered]:
        """Answer one batch; where it breaks, its samples are tried one by one."""
        opened = self._opened(variant)
        with PeakMemory([info.device for info in opened.lm.backbone.layers]) as memory:
            started = time.perf_counter()
            outcomes = attempt(opened.reader, batch)
            total_s = time.perf_counter() - started
        if outcomes is None:
            return [answered for sample in batch for answered in self.answer(variant, [sample])]
        measured = {
            "total_s": total_s / len(batch),
            "batch_size": len(batch),
            "peak_device_bytes": memory.device_peak_bytes,
            "peak_host_bytes": memory.host_peak_bytes,
        }
        return [
            Answered(sample, outcome, {**measured, "beyond_window": is_beyond(outcome, opened)}, self._provenance)
            for sample, outcome in zip(batch, outcomes, strict=True)
        ]

    def _opened(self, variant: Variant) -> OpenVariant:
        """The variant, opened if another one was in between."""
        if self._open is None or self._open[0] != variant:
            self._open = (variant, self._loader.open(variant))
        return self._open[1]


def is_beyond(outcome: Prediction | str, opened: OpenVariant) -> bool:
    """Whether the prompt was longer than the model's window."""
    return not isinstance(outcome, str) and outcome.num_tokens > opened.num_window


def attempt(reader: Reader, batch: Batch) -> Sequence[Prediction | str] | None:
    """Answers of a batch; the error's text for a single sample that breaks, None for a batch that does."""
    try:
        return reader.answer(batch)
    except BudgetError:
        raise
    except Exception as error:
        return [f"{type(error).__name__}: {' '.join(str(error).split())}"] if len(batch) == 1 else None
