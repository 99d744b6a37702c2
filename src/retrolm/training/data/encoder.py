"""Text to token ids, and the parts of the chat template around a user's text."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import UserError
from .sample import Span, TokenArray

_MARK = "\u241fuser text\u241f"
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
        head, self.tail_text = template_parts(tokenizer)
        self.prefix_ids = self.encode(head)

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

    def decode(self, ids: TokenArray) -> str:
        """Return the text of some ids."""
        return str(self._backend.decode(ids.tolist(), skip_special_tokens=True))

    def question_ids(self, question: str, answer_prefix: str = "") -> TokenArray:
        """Return the ids of the question page: the text behind the document, closed by the chat template's tail.

        `answer_prefix` is the beginning of the model's answer, where a prompt gives one.
        """
        return self.encode(question + self.tail_text + answer_prefix)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]


def template_parts(tokenizer: Any) -> tuple[str, str]:
    """Return (head, tail) of one user turn: what the chat template puts before and behind the user's text.

    Without a chat template the head is the BOS token (if there is one) and the tail is empty. Raises `UserError` if
    the template doesn't reproduce the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", ""
    turns = [{"role": "user", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    head, found, tail = rendered.partition(_MARK)
    if not found:
        raise UserError("The chat template changes the user's text, so the text can't be paged. Use another template.")
    return head, tail


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a sha256 of the tokenizer's rules and chat template; pools are tied to it."""
    content = tokenizer.backend_tokenizer.to_str() + str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(content.encode()).hexdigest()
