"""`retrolm chat`: a conversation about a text in the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..errors import UserError
from .answer_view import answer_json, show_details, show_opening
from .loading import load_engine, read_document, read_source, refuse_stdin, require_pages, source_name
from .options import EngineOptions, HostCapOption, JsonFlag, with_engine_options
from .screen import ERR, error_line, note

if TYPE_CHECKING:
    from ..engine.document import Conversation
    from ..engine.results import Answer

QUIT = ("/quit", "/exit")


@with_engine_options(max_new_tokens=256)
def command(
    engine: EngineOptions,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Text to read (.txt, .md, .html, .pdf).")],
    pages: Annotated[int, typer.Option(help="How many of the pages an answer came from to show.", min=0)] = 3,
    host_kv_gb: HostCapOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Talk about a text: each line is a question, and earlier turns are remembered.

    End with /quit or Ctrl-D. With --json every answer is one line of JSON.
    """
    engine.check()
    refuse_stdin(file, "chat")
    require_pages(engine, "chat")
    text = read_source(file)
    lm = load_engine(engine, host_kv_gb)
    document = read_document(lm, text, source_name(file))
    if not as_json:
        show_opening(document, engine.model)
        note("Ask away; /quit or Ctrl-D ends.")
    conversation = document.conversation()
    for question in _questions():
        try:
            answer = _reply(conversation, question, engine.max_new_tokens, shown=not as_json)
        except UserError as error:  # the conversation goes on
            error_line(str(error))
            continue
        if as_json:
            found = answer_json(document, question, answer, engine.model, pages)
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            show_details(question, answer, pages)


def _reply(conversation: Conversation, question: str, max_new_tokens: int, shown: bool) -> Answer:
    """One turn; the answer appears as it is generated if `shown`."""
    from ..engine.text_stream import CallbackStreamer

    if not shown:
        return conversation.ask(question, max_new_tokens=max_new_tokens)
    streamer = CallbackStreamer(conversation.document.lm.tokenizer, lambda piece: print(piece, end="", flush=True))
    try:
        return conversation.ask(question, max_new_tokens=max_new_tokens, streamer=streamer)
    finally:
        print(flush=True)


def _questions() -> Iterator[str]:
    """Lines of standard input until it ends or the user quits; empty ones are passed over."""
    while True:
        if sys.stdin.isatty():
            ERR.print(Text("\n> ", style="bold"), end="")
        line = sys.stdin.readline()
        if not line or line.strip() in QUIT:
            return
        if line.strip():
            yield line.strip()
