"""Loading backbone and retriever for stage 2, on the device of this process."""

from __future__ import annotations

from ...engine.model import RetroLM
from ...errors import UserError
from ..processes import backbone_place, require_whole
from .config import Stage2Recipe


def load_backbone(recipe: Stage2Recipe) -> RetroLM:
    """Load the recipe's backbone and retriever; raises `UserError`."""
    train = recipe.train
    retriever = None if train.retriever == "none" else train.retriever
    dtype = "float32" if train.weights == "full" else train.dtype
    config = train.engine_config()
    lm = RetroLM.from_pretrained(
        train.model,
        retriever=retriever,
        dtype=dtype,
        device_map=backbone_place(),
        page_size=config.page_size,
        kv_budget=config.kv_budget,
    )
    if train.weights == "full" and getattr(lm.model, "is_quantized", False):
        raise UserError(f'The weights of {train.model!r} are quantised and can\'t be trained. Use weights = "lora".')
    check_lengths(recipe, lm)
    return lm


def check_lengths(recipe: Stage2Recipe, lm: RetroLM) -> None:
    """Raise `UserError` if pieces exceed the window of a model that is trained with full attention."""
    if recipe.train.attention == "full" and recipe.data.max_tokens > lm.backbone.window:
        raise UserError(
            f"max_tokens={recipe.data.max_tokens} exceeds the model's window of {lm.backbone.window} positions, which "
            f"full attention needs. Set max_tokens to {lm.backbone.window} at most, or train on sparse KV."
        )


def check_sharing(recipe: Stage2Recipe, lm: RetroLM) -> None:
    """Raise `UserError` for what can't be trained on a sharded backbone."""
    if recipe.train.weights == "full":
        require_whole(lm, 'weights = "full"')
    if recipe.train.train_retriever:
        require_whole(lm, "train_retriever")  # not every text's backward pass brings a pass for it


def check_retriever(recipe: Stage2Recipe, lm: RetroLM) -> None:
    """Raise `UserError` if the retriever is to be trained and there is none."""
    if recipe.train.train_retriever and lm.retriever is None:
        raise UserError(
            f"No page retriever comes with {recipe.train.model!r}, and train_retriever begins with one. Name one with "
            "retriever, or train one first (`retrolm train stage1`)."
        )
