"""A model's tokenizer without the model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from ..errors import UserError
from .pull import resolve_model


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a model: Hugging Face id, local folder, or the name of a demo backbone.

    Raises:
        UserError: no such model here, or it has no tokenizer that can be read.
    """
    folder = resolve_model(model)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"Can't load the tokenizer of {model!r}: {reason} Give a folder, a Hugging Face id or a demo name."
        ) from None
