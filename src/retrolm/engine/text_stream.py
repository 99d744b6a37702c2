"""A streamer for transformers' `generate` that hands text to a function as it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class CallbackStreamer(TextStreamer):
    """Calls `on_text` with each finished piece of the answer, in the thread that generates."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
