"""From options to a loaded engine and a document that was read. Everything that can be refused early is."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from ..errors import UserError
from .known_methods import known_methods
from .options import EngineOptions, whole_bytes
from .screen import progress_bar, snippet, waiting

if TYPE_CHECKING:
    from ..engine.document import Document
    from ..engine.model import RetroLM


def read_source(source: str) -> str:
    """Text of a file, or of standard input for "-"; raises `UserError` for what can't be read."""
    from ..engine.text_files import read_stdin, read_text_file

    return read_stdin() if source == "-" else read_text_file(source)


def source_name(source: str) -> str:
    """How a source is called in messages."""
    return "standard input" if source == "-" else snippet(source, 40)


def load_engine(options: EngineOptions, host_kv_gb: float | None = None) -> RetroLM:
    """Load the model and attach; raises `UserError` for unknown names and values.

    Args:
        host_kv_gb: cap on KV in host memory; None = all that isn't on the device stays there.
    """
    options.check()
    cap = whole_bytes("--host-kv-gb", host_kv_gb)
    if cap is not None:
        require_pages(options, "ask --host-kv-gb")
    with waiting(f"Loading {snippet(options.model, 60)} …"):
        from ..engine.model import RetroLM
        from ..engine.quiet import silence_libraries

        silence_libraries()
        known_methods()
        retriever = None if options.retriever == "none" else options.retriever
        lm = RetroLM.from_pretrained(
            options.model,
            retriever=retriever,
            adapter=None if options.adapter == "none" else options.adapter,
            method=options.method,
            method_options=options.method_options(),
            dtype=options.dtype,
            **options.stated(),
        )
    if cap is not None:
        lm.use_disk_tier(tempfile.gettempdir(), cap)
    return lm


def require_pages(options: EngineOptions, command: str) -> None:
    """Raise `UserError` for a method that has no pages, in a command that works on them."""
    methods = known_methods()
    if methods.get(options.method).kind != "pages":
        pages = [name for name in methods if methods.get(name).kind == "pages"]
        raise UserError(
            f"`retrolm {command}` works on pages; --method {options.method} has none. Use {_either(pages)}."
        )


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def check_questions(lm: RetroLM, text: str, questions: list[str]) -> None:
    """Refuse, before a long read, a question that is empty or leaves no room for the text; raises `UserError`."""
    from ..engine import preflight

    preflight.check_questions(lm, preflight.count_tokens(lm, text), questions)


def read_document(lm: RetroLM, text: str, name: str) -> Document:
    """Read a text with a progress bar."""
    with progress_bar(f"Reading {name}") as progress:
        document: Document = lm.read(text, progress=progress)
    return document


def refuse_stdin(source: str, command: str) -> None:
    """Raise `UserError` where standard input is needed for something else."""
    if source == "-":
        raise UserError(f"`retrolm {command}` needs standard input for your questions. Give a file instead of -.")
