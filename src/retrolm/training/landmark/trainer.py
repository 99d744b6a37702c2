"""The trainer of Landmark Attention: language modelling by grouped softmax in a short context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engine.landmark_rows import num_places
from ...engine.landmarks import CONTEXT, NUM_BETWEEN, require_groups, require_window
from ...engine.model import RetroLM
from ..document_pieces import num_prefix_tokens
from ..piece_trainer import PieceTrainer
from ..processes import backbone_place
from ..run_log import Log
from .config import LandmarkRecipe
from .step import LandmarkStep

LANDMARK_FOLDER = "landmark"


def load_backbone(recipe: LandmarkRecipe) -> RetroLM:
    """Load the recipe's backbone on the device of this process; raises `UserError`."""
    train = recipe.train
    place = backbone_place()
    return RetroLM.from_pretrained(train.model, retriever=None, dtype=train.dtype, device_map=place, method="full")


class LandmarkTrainer(PieceTrainer):
    """Trains landmarks and an adapter.

    Args:
        recipe: data and training settings. Others as for `PieceTrainer`.

    Raises:
        UserError: a model that can't take landmarks or pieces, and what `PieceTrainer` refuses.
    """

    recipe: LandmarkRecipe
    step_module: LandmarkStep

    def __init__(
        self,
        recipe: LandmarkRecipe,
        lm: RetroLM,
        data_root: Path,
        out: Path,
        log: Log | None = None,
        trackers: Sequence[Any] = (),
    ) -> None:
        require_groups(lm.backbone)
        require_window(lm.backbone, recipe.data.max_tokens, recipe.train.num_between)
        self.pieces_per_pass = recipe.train.batch
        super().__init__("retrolm-landmark", recipe, lm, data_root, out, log, trackers)

    @property
    def artefact_folder(self) -> Path:
        """Where landmarks and adapter are written."""
        return self.out / LANDMARK_FOLDER

    def _new_step(self) -> LandmarkStep:
        num_between = self.recipe.train.num_between
        context = num_places(self.recipe.data.max_tokens, num_between)
        card = self._new_card("landmark", **{NUM_BETWEEN: num_between, CONTEXT: context})
        prefix = num_prefix_tokens(self.lm.tokenizer, self.recipe.data.prefix)
        return LandmarkStep(self.lm, self.recipe.train, prefix, card)

    def _save_artefact(self) -> None:
        self._note_progress()
        self.step_module.landmarks.save(self.artefact_folder, self.recipe.train.bits)
