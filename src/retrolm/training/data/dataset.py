"""The stage-1 training set: sample i as a function of the pool, the settings and i."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ...errors import UserError, suggest
from .chains import chain_sample
from .composed import composed_sample
from .config import SYNTHETIC_KINDS, Stage1DataConfig
from .context import BuildContext
from .encoder import TextEncoder
from .fact_wordings import listed
from .facts import facts_sample
from .mixture import Schedule, text_length
from .packed import packed_sample
from .pool import TokenPool
from .quoted import quoted_sample
from .registers import register_sample
from .sample import Stage1Sample
from .transcripts import transcript_sample

_BUILDERS: dict[str, Callable[[BuildContext, str, int, random.Random], Stage1Sample]] = {
    "facts": facts_sample,
    "registers": register_sample,
    "chains": chain_sample,
    "quoted": quoted_sample,
    "transcripts": transcript_sample,
    "composed": composed_sample,
}
_IN_PROSE = ("quoted", "facts", "registers", "chains")


class Stage1Dataset(Dataset[Stage1Sample]):
    """Samples by index, without state, for any number of workers.

    Args:
        pool_dir: a folder written by `prepare_pool`.
        tokenizer: the tokenizer it was written for.
        config: mixture and sample settings; sources and other settings of preparation are not used here.
        num_samples: length of the set (indices beyond are refused).
        split: "train", or "dev" for held-out questions and books.

    Raises `UserError` if the pool doesn't fit the tokenizer or lacks a part that has a weight.
    """

    def __init__(
        self,
        pool_dir: Path,
        tokenizer: Any,
        config: Stage1DataConfig,
        num_samples: int,
        split: Literal["train", "dev"] = "train",
    ) -> None:
        pool = TokenPool(pool_dir, tokenizer)
        self.context = BuildContext(pool, TextEncoder(tokenizer), config, split)
        self.num_samples = num_samples
        self._rows = {part: pool.rows_of(part, split) for part in config.weights if part not in SYNTHETIC_KINDS}
        _check_parts(self.context, self._rows)
        self._schedule = Schedule(config.weights, config.seed)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Stage1Sample:
        """Return sample `index`; its length follows `mixture.text_length`. Raises `IndexError` beyond the end."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"Sample {index} of {self.num_samples}")
        return self.sample(index)

    def sample(self, index: int, num_tokens: int | None = None) -> Stage1Sample:
        """Return sample `index` with a text of `num_tokens` instead of the length that belongs to the index."""
        config = self.context.config
        rng = random.Random(f"{config.seed}:{self.context.split}:{index}")
        part, occurrence = self._schedule.part(index)
        length = num_tokens or text_length(config, index)
        if part in _BUILDERS:
            return _BUILDERS[part](self.context, part, length, rng)
        rows = self._rows[part]
        row = self.context.pool.row(int(rows[self._schedule.item(part, occurrence, len(rows))]))
        return packed_sample(self.context, [row], self.context.wording(row, rng), part, length, rng)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "pool_dir": self.context.pool.folder,
            "tokenizer": self.context.encoder.tokenizer,
            "config": self.context.config,
            "num_samples": self.num_samples,
            "split": self.context.split,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _check_parts(context: BuildContext, rows: dict[str, NDArray[np.int64]]) -> None:
    weights = context.config.weights
    empty = sorted(part for part, found in rows.items() if weights[part] > 0 and not len(found))
    if empty:
        allowed = [*context.pool.source_names, *SYNTHETIC_KINDS]
        raise UserError(
            f"The pool has no {context.split} question for: {', '.join(empty)}. Set these weights to 0 or prepare the "
            f"pool with them.{suggest(empty[0], allowed)}"
        )
    if (weights.get("composed") or weights.get("transcripts")) and not context.natural_rows:
        raise UserError("composed and transcripts are made of people's questions: give at least one of them a weight.")
    if not context.pool.num_books and any(weights.get(kind) for kind in _IN_PROSE):
        raise UserError(f"The pool holds no books, which {listed(list(_IN_PROSE))} need. Add a source of documents.")
