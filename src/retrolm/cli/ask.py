"""`retrolm ask`: read a text, answer questions."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UserError
from .answer_view import answer_json, show_details, show_opening
from .loading import check_questions, load_engine, read_document, read_source, source_name
from .options import EngineOptions, HostCapOption, JsonFlag, SourceArgument, with_engine_options
from .screen import note, print_json, waiting


@with_engine_options()
def command(
    engine: EngineOptions,
    file: SourceArgument,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One question, or several.")],
    pages: Annotated[int, typer.Option(help="How many of the pages an answer came from to show.", min=0)] = 5,
    host_kv_gb: HostCapOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Read a text and answer questions about it.

    Answers go to stdout, everything else to stderr. With --json: one object for one question, a list for several.
    """
    engine.check()
    if not all(question.strip() for question in questions):
        raise UserError("A question is empty. Put each question in quotes: retrolm ask FILE 'What …?'")
    text = read_source(file)
    lm = load_engine(engine, host_kv_gb)
    check_questions(lm, text, questions)
    document = read_document(lm, text, source_name(file))
    if not as_json:
        show_opening(document, engine.model)
    found = []
    for question in questions:
        with waiting("Answering …"):
            answer = document.ask(question, max_new_tokens=engine.max_new_tokens)
        if as_json:
            found.append(answer_json(document, question, answer, engine.model, pages))
            continue
        if len(questions) > 1:
            note(f"\n{question}")
        print(answer.text, flush=True)
        show_details(question, answer, pages)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
