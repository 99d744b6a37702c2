"""Prompts as text and as tokens: chat wrapping, counting, middle truncation."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Protocol

_PIECE_EDGE = re.compile(r"(?<=[.!?])(?= )|(?<=\n)")


class Tokenizer(Protocol):
    """What the tasks use of a transformers tokenizer."""

    chat_template: Any

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode a string or a list of strings; returns a mapping with "input_ids"."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        """Turn ids back into text."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Wrap messages in the model's chat format."""


def render(tokenizer: Tokenizer, prompt: str, answer_prefix: str = "", chat: bool = True) -> str:
    """Return the full text a model gets: chat-wrapped where asked for and possible, then the answer's opening."""
    if chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return prompt + answer_prefix


class TokenCounter:
    """Counts tokens of many texts that share most of their sentences.

    `exact` tokenises the whole text. `estimate` adds up sentences and lines, each tokenised once in the counter's
    life: within a fraction of a percent of exact, and fast enough to search for a haystack's size at a million tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def exact(self, text: str) -> int:
        """Number of tokens of the text, without special tokens the tokenizer would add."""
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def estimate(self, text: str) -> int:
        """Sum of the tokens of the text's sentences and lines."""
        pieces = _PIECE_EDGE.split(text)
        new = list({piece for piece in pieces if piece and piece not in self._known})
        if new:
            ids = self._tokenizer(new, add_special_tokens=False, verbose=False)["input_ids"]
            self._known.update(zip(new, map(len, ids), strict=True))
        return sum(self._known[piece] for piece in pieces if piece)


def truncate_middle(
    tokenizer: Tokenizer, context: str, question: str, max_tokens: int | None, drop_odd: bool = False
) -> tuple[str, str]:
    """Cut tokens out of the middle of `context + question`; returns the shortened (context, question).

    The first and the last half of `max_tokens` tokens stay and are decoded to text (so the result can tokenise to a
    few tokens more or less), as in LongBench and InfiniteBench. An odd `max_tokens` gives the second half one token
    more, or, with `drop_odd` (LongBench v1), loses one. A question longer than its half is cut at its start.
    """
    if max_tokens is None:
        return context, question
    ids = tokenizer(context + question, verbose=False)["input_ids"]
    if len(ids) <= max_tokens:
        return context, question
    half = max_tokens // 2
    head = tokenizer.decode(ids[:half], skip_special_tokens=True)
    tail = tokenizer.decode(ids[-(half if drop_odd else max_tokens - half) :], skip_special_tokens=True)
    if tail.endswith(question):
        return head + tail.removesuffix(question), question
    return head, tail


def fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the vocabulary, the splitting rules and the chat template; equal for equal tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))  # type: ignore[attr-defined]
    return hashlib.sha256(f"{rules}\n{tokenizer.chat_template}".encode()).hexdigest()[:16]
