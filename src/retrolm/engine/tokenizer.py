"""A model's tokenizer without the model."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
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


def splitting_rules(tokenizer: Any) -> str:
    """What a fast tokenizer makes of texts, as JSON.

    How it cuts and pads is left out: each call of a tokenizer with such an option changes that.
    """
    core = tokenizer.backend_tokenizer
    if core.truncation is not None or core.padding is not None:
        core = Tokenizer.from_str(core.to_str())
        core.no_truncation()
        core.no_padding()
    return str(core.to_str())
