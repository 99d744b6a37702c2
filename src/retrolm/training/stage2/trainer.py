"""The stage-2 trainer: language modelling on retrieved pages, AdamW on an adapter or on all weights (paper eq 8, 9)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engine.model import RetroLM
from ..document_pieces import num_prefix_tokens
from ..piece_trainer import PieceTrainer
from ..recipe import model_name
from ..run_log import Log
from .artefact import RETRIEVER_FOLDER, save_model, save_retriever
from .backbone import check_lengths, check_retriever, check_sharing
from .config import Stage2Recipe
from .step import Stage2Step, retriever_digest

ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"


class Stage2Trainer(PieceTrainer):
    """Trains a backbone on sparse KV, or with full attention as a control.

    Args:
        recipe: data and training settings. Others as for `PieceTrainer`.

    Raises:
        UserError: pieces that a model can't take, and what `PieceTrainer` refuses.
    """

    recipe: Stage2Recipe
    step_module: Stage2Step

    def __init__(
        self,
        recipe: Stage2Recipe,
        lm: RetroLM,
        data_root: Path,
        out: Path,
        log: Log | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        check_lengths(recipe, lm)
        check_retriever(recipe, lm)
        check_sharing(recipe, lm)
        self._first_retriever = retriever_digest(lm)
        super().__init__("retrolm-stage2", recipe, lm, data_root, out, log, trackers)

    @property
    def artefact_folder(self) -> Path:
        """Where what was trained is written: an adapter, or a model with its retriever."""
        return self.out / (ADAPTER_FOLDER if self.step_module.adapter is not None else MODEL_FOLDER)

    @property
    def retriever_folder(self) -> Path | None:
        """Where the retriever is written, if it is trained together with an adapter."""
        alone = self.step_module.apart is None or self.step_module.adapter is None
        return None if alone else self.out / RETRIEVER_FOLDER

    def _new_step(self) -> Stage2Step:
        train = self.recipe.train
        kind = "full-attention" if train.attention == "full" else "joint" if train.train_retriever else "stage2"
        card = self._new_card(kind, retriever=self.lm.retriever_name)
        card.details["recipe"]["train"]["retriever"] = model_name(train.retriever)
        prefix = num_prefix_tokens(self.lm.tokenizer, self.recipe.data.prefix)
        return Stage2Step(self.lm, train, prefix, card)

    def _save_artefact(self) -> None:
        self._note_progress()
        adapter, frozen = self.step_module.adapter, self.step_module.frozen
        if adapter is not None:
            adapter.save(self.artefact_folder, self.recipe.train.bits)
            if self.retriever_folder is not None:
                save_retriever(self.lm, self.card, self.retriever_folder, self.recipe.train.bits)
        elif frozen is not None and self.step == self.recipe.train.num_steps:
            save_model(self.lm, frozen, self.step_module.bookmark, self.card, self.artefact_folder)  # type: ignore[arg-type]

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "retriever": self._first_retriever}
