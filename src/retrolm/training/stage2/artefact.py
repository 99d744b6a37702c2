"""Writing a model that was trained with all its weights, with the retriever that belongs to it."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.adapter import AdapterCard
from ...engine.frozen_projections import FrozenProjections
from ...engine.model import RetroLM
from ...engine.whole_folder import whole_folder
from ...retriever import RetrieverCard

RETRIEVER_FOLDER = "retriever"


def save_retriever(lm: RetroLM, card: AdapterCard, folder: Path, bits: int) -> None:
    """Write a retriever that was trained together with an adapter; weights and card each appear whole or not at all.

    Its card tells of both trainings, and of the choices that bookmarks are read with.
    """
    assert lm.retriever is not None
    before, kept = lm.retriever.card, copy.copy(lm.retriever)
    details = {"recipe": before.details.get("recipe"), "joint": card.details, "before": before.details}
    kept.card = RetrieverCard(before.backbone, before.rank, before.page_size, f"{card.name}-retriever", details)
    kept.save(folder, bits)


@torch.no_grad()
def save_model(lm: RetroLM, frozen: FrozenProjections, bookmark: Tensor, card: AdapterCard, folder: Path) -> None:
    """Write model, tokenizer, card and (in `retriever/`) the page retriever; the folder appears whole or not at all.

    The trained weights moved away from those that W^b was learned on, so W^b is written out in full.
    """
    with whole_folder(folder) as part:
        lm.model.save_pretrained(part)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(part)
        details: dict[str, Any] = {"stage2": card.details, "before": lm.retriever and lm.retriever.card.details}
        name = f"{card.name}-retriever"
        kept = RetrieverCard(lm.backbone.fingerprint(), 0, lm.config.page_size, name, details)
        frozen.written_out(lm.retriever, bookmark, kept).save(part / RETRIEVER_FOLDER, bits=16)
        text = json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False) + "\n"
        (part / "card.json").write_text(text, encoding="utf-8")
