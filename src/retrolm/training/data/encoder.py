"""Text to token ids: passages and facts piece by piece, question pages closed by the chat template's tail."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from ...engine.prompts import prompt_format
from ...engine.tokenizer import splitting_rules
from ...errors import UserError
from .sample import Span, TokenArray

_CACHED_STRINGS = 4096


class TextEncoder:
    """A fast tokenizer without special tokens, with a cache for short strings that repeat (headings, separators).

    Args:
        tokenizer: a fast transformers tokenizer (it has `backend_tokenizer`). Raises `UserError` for a slow one.

    Texts are tokenised piece by piece and their ids joined, so that spans are exact by construction; at a joint the
    ids can differ from those of the joined text, which is why joints lie at line breaks or sentence starts.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("Stage-1 data needs a fast tokenizer. Load it with use_fast=True or convert it.")
        self.tokenizer = tokenizer
        self._backend = backend
        self._cached = lru_cache(_CACHED_STRINGS)(self.encode)
        self._format = prompt_format(tokenizer)
        self.prefix_ids = np.array(self._format.prefix_ids, dtype=np.int32)

    def encode(self, text: str) -> TokenArray:
        """Return the ids of a text, int32 [T]."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_repeated(self, text: str) -> TokenArray:
        """Return the same as `encode`, remembered; the array must not be written to."""
        return self._cached(text)

    def encode_spans(self, text: str) -> tuple[TokenArray, list[Span]]:
        """Return the ids of a text and the character span of each."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), encoding.offsets

    def encode_batch(self, texts: list[str]) -> list[tuple[list[int], list[Span]]]:
        """Return ids and character spans of many texts at once."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_each(self, texts: list[str]) -> list[TokenArray]:
        """Return the ids of many texts, int32 [T] each, quicker than one by one."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: TokenArray) -> str:
        """Return the text of some ids."""
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=True))

    def question_ids(self, question: str, answer_prefix: str = "") -> TokenArray:
        """Return the ids of the question page: the text behind the document, closed by the chat template's tail.

        `answer_prefix` is the beginning of the model's answer, where a prompt gives one.
        """
        return self.encode(question + self._format.tail + answer_prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a sha256 of the tokenizer's rules and chat template; pools are tied to it."""
    content = splitting_rules(tokenizer) + str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(content.encode()).hexdigest()
