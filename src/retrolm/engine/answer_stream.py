"""An answer piece by piece, generated in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import TextIteratorStreamer

from .stop_criteria import StopWhen

if TYPE_CHECKING:
    from .model import RetroLM


def stream_answer(
    lm: RetroLM, document: Any, question: str, *, max_new_tokens: int, raw: bool = False, **options: Any
) -> Iterator[str]:
    """Yield the answer's text as it is generated; errors of the generating thread are raised here.

    Generation stops when the iterator is closed.
    """
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop, failed = threading.Event(), list[BaseException]()
    options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), StopWhen(stop)]

    def work() -> None:
        try:
            lm.ask_batch([(document, question)], max_new_tokens=max_new_tokens, raw=raw, streamer=streamer, **options)
        except BaseException as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]
