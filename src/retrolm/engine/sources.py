"""What can be read: a text, a file, or token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UserError
from .text_files import read_text_file

if TYPE_CHECKING:
    from .model import RetroLM


def tokenise(lm: RetroLM, source: Any) -> tuple[str | None, list[int], list[tuple[int, int]]]:
    """Text, ids and character offsets of one source."""
    if isinstance(source, Path):
        source = read_text_file(source)
    if isinstance(source, str):
        if not source.strip():
            raise UserError("Nothing to read: the text is empty or only whitespace.")
        if lm.tokenizer is None:
            raise UserError("Reading text needs a tokenizer. Pass one, or read token ids.")
        found = lm.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return source, found["input_ids"], found["offset_mapping"]
    if not isinstance(source, Tensor) and not is_ids(source):
        kind = type(source).__name__
        raise UserError(f"Can't read a {kind}. Give a text, a pathlib.Path, token ids, or a list of these.")
    ids = source.tolist() if isinstance(source, Tensor) else [int(i) for i in source]
    if not ids:
        raise UserError("Nothing to read: there are no token ids.")
    require_vocabulary(lm, ids)
    return None, ids, []


def require_vocabulary(lm: RetroLM, ids: list[int]) -> None:
    size = lm.model.get_input_embeddings().num_embeddings
    outside = [i for i in ids if not 0 <= i < size]
    if outside:
        raise UserError(
            f"Token id {outside[0]} is outside the model's vocabulary of {size}. Is it another tokenizer's?"
        )


def is_ids(source: Any) -> bool:
    """Whether a list is one row of token ids rather than several texts."""
    return isinstance(source, (list, tuple)) and len(source) > 0 and all(isinstance(i, int) for i in source)
