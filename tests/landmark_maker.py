"""Random landmarks for a tiny model, as a folder that `--set landmark.weights=` takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from retrolm.engine.adapter import AdapterCard
from retrolm.engine.backbone import Backbone
from retrolm.engine.landmarks import CONTEXT, NUM_BETWEEN, new_landmarks

_FOLDERS = tempfile.TemporaryDirectory(prefix="landmarks")  # goes with the process


def random_landmarks(model: Any, num_between: int) -> Path:
    """Save landmarks and an adapter that matter to `model`, with `num_between` tokens between landmarks."""
    backbone = Backbone(model, 256)
    torch.manual_seed(0)
    card = AdapterCard(backbone.fingerprint(), "random", {NUM_BETWEEN: num_between, CONTEXT: 64})
    start_E = backbone.embed(torch.tensor([0]))[0].detach()
    found = new_landmarks(backbone, start_E, "all", 2, 2.0, card).float()
    with torch.no_grad():
        found.embedding.normal_()
        for pair in found.adapter.pairs:
            pair.up.normal_(std=0.3)
    folder = Path(tempfile.mkdtemp(dir=_FOLDERS.name)) / "landmark"
    found.save(folder, 32)
    return folder
