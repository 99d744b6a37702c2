"""Loading the frozen backbone for training, on the device of this process."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...config import MIN_BUDGET_PAGES
from ...engine.model import RetroLM
from ...errors import UserError
from ..processes import backbone_place, require_whole
from .config import Stage1Recipe


def load_backbone(recipe: Stage1Recipe) -> RetroLM:
    """Load the recipe's backbone so that whole training texts fit its RoPE tables; raises `UserError`."""
    train = recipe.train
    smallest = MIN_BUDGET_PAGES * (train.page_size + 1)
    lm = RetroLM.from_pretrained(
        train.model,
        retriever=None,
        dtype=train.dtype,
        device_map=backbone_place(),
        page_size=train.page_size,
        kv_budget=smallest,
        bookmarks=train.bookmarks,
        bookmark_span=train.bookmark_span,
        score_rope=train.score_rope,
    )
    check_window(recipe, lm)
    lm.detach()
    longest = max(recipe.data.longest, train.dev_max_tokens, smallest)
    budget = longest if train.encode == "dense" else train.encode_budget
    return RetroLM(without_head(lm.model), lm.tokenizer, config=lm.config.replace(kv_budget=budget))


def without_head(model: Any) -> Any:
    """The model without its output matrix, a gigabyte at 8B that training never uses, unless it is the embedding."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.set_output_embeddings(nn.Identity())
    return model


def check_sharing(recipe: Stage1Recipe, lm: RetroLM) -> None:
    """Raise `UserError` for ways of reading that don't work with a sharded backbone."""
    if recipe.train.encode == "streaming":
        require_whole(lm, "encode='streaming'")  # longer texts take more passes
    if recipe.train.bookmarks == "visible":
        require_whole(lm, "bookmarks='visible'")  # its last layer would be taken apart before its gradients are known


def check_window(recipe: Stage1Recipe, lm: RetroLM) -> None:
    """Raise `UserError` if the recipe's texts are to be read whole and exceed the backbone's window."""
    longest = "long_tokens" if recipe.data.long_share else "max_tokens"
    lengths = {longest: recipe.data.longest, "dev_max_tokens": recipe.train.dev_max_tokens}
    for name, length in lengths.items():
        if recipe.train.encode == "dense" and length > lm.backbone.window:
            raise UserError(
                f"{name}={length} exceeds the model's window of {lm.backbone.window} positions, in which training "
                f"reads whole texts. Set {name} to {lm.backbone.window} at most, or encode='streaming'."
            )
