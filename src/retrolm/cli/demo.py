"""`retrolm demo`: read the example book and ask it questions whose answers are known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .answer_view import answer_json, cost_line, page_lines, read_line, setup_line, speed
from .loading import check_questions, load_engine, read_document, require_pages
from .options import EngineOptions, JsonFlag, with_engine_options
from .passage import passage
from .pull import fetch_if_missing
from .screen import OUT, count, note, print_json, seconds, show_table, size, waiting

if TYPE_CHECKING:
    from ..engine.demo_questions import Example, ExpectedAnswer
    from ..engine.document import Document
    from ..engine.model import RetroLM
    from ..engine.results import Answer

LABELS = 14  # what the panel's frame and labels take of the width


@with_engine_options(max_new_tokens=48, adapter="auto")
def command(
    engine: EngineOptions,
    book: Annotated[bool, typer.Option("--book", help="Read the whole book, not just its opening.")] = False,
    examples: Annotated[
        Path | None, typer.Option(help="Folder with questions.json and the book.", show_default="the checkout's")
    ] = None,
    pages: Annotated[int, typer.Option(help="How many of the pages an answer came from to show.", min=0)] = 3,
    as_json: JsonFlag = False,
) -> None:
    """Read the example book's opening, or with --book all of it, and ask questions that were written down beforehand.

    The model is fetched first if it is a demo model that isn't here.
    """
    engine.check()
    require_pages(engine, "demo")
    from ..engine.demo_questions import EXAMPLES, load_example

    example = load_example(examples or EXAMPLES, whole_book=book)
    fetch_if_missing(engine.model)
    lm = load_engine(engine)
    questions = [asked.question for asked in example.questions]
    check_questions(lm, example.text, questions)
    if not as_json:
        part = "all" if book else "the opening"
        note(f"Reading {part} of {example.title} by {example.author}: {count(len(example.text.split()))} words …")
    document = read_document(lm, example.text, example.title)
    answers = []
    for asked in example.questions:
        with waiting("Answering …"):
            answer = document.ask(asked.question, max_new_tokens=engine.max_new_tokens)
        answers.append(answer)
        if not as_json:
            OUT.print(_panel(document, asked, answer, pages))
    if as_json:
        print_json(_as_json(example, document, answers, engine.model, pages))
    else:
        _close(document, answers, engine.model)


def _panel(document: Document, asked: ExpectedAnswer, answer: Answer, num_pages: int) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("expected", Text(asked.expected))
    grid.add_row("answer", Text(answer.text or "(nothing)", style="bold"))
    lines = page_lines(asked.question, answer, num_pages, OUT.width - LABELS)
    grid.add_row("pages", Text("\n".join(lines), style="dim"))
    evidence = _evidence(document, asked, answer)
    if evidence is not None:
        where = f"page {evidence.page:>4}  attended in {evidence.num_layers} of {evidence.all_layers} layers  "
        quoted = passage(asked.evidence, asked.expected, OUT.width - LABELS - len(where))
        grid.add_row("evidence", Text(where + quoted, style="dim"))
    grid.add_row("cost", Text(cost_line(answer), style="dim"))
    return Panel(grid, title=Text(asked.question), title_align="left")


@dataclass(frozen=True)
class Evidence:
    """Where the expected answer stands: its page, and how many layers attended it while answering."""

    page: int
    num_layers: int
    all_layers: int


def _evidence(document: Document, asked: ExpectedAnswer, answer: Answer) -> Evidence | None:
    """Find the quoted evidence in the document; None where there is no quotation, or it isn't in what was read."""
    at = (document.text or "").find(asked.evidence) if asked.evidence else -1
    if at < 0:
        return None
    page = next(number for number, (_, end) in enumerate(document.page_spans) if at < end)
    chosen = answer.retrieval.page_ids
    return Evidence(page, int((chosen == page).any(1).sum()), len(chosen))


def _close(document: Document, answers: list[Answer], model: str) -> None:
    """The closing table: what reading and answering took."""
    rows = [
        (
            str(number),
            count(answer.attended_tokens["decode"]),
            seconds(answer.timings.ttft_s),
            speed(answer),
            size(answer.kv_bytes["device"]),
            size(answer.kv_bytes["host"]),
        )
        for number, answer in enumerate(answers, start=1)
    ]
    columns = ("question", "tokens attended", "first token", "tokens/s", "KV on device", "KV on host")
    show_table(columns, rows, title=f"\n{read_line(document)}", right=range(6))
    OUT.print(Text(setup_line(document, model)))
    OUT.print(Text(_picked_by(document.lm)))


def _picked_by(lm: RetroLM) -> str:
    """Plain words on what picked the pages."""
    if not lm.method.needs_bookmarks:
        return f"Pages were picked by {lm.method.name}, which is not trained."
    if lm.retriever is None:
        return "Pages were picked by untrained bookmarks: no trained page retriever for this model is here."
    under = "" if lm.adapter is None else f" The model reads with the adapter {lm.adapter.card.name}."
    return f"Pages were picked by the trained page retriever {lm.retriever_name}.{under}"


def _as_json(example: Example, document: Document, answers: list[Answer], model: str, num_pages: int) -> dict[str, Any]:
    found = []
    for asked, answer in zip(example.questions, answers, strict=True):
        evidence = _evidence(document, asked, answer)
        facts = {"expected": asked.expected, "evidence": None if evidence is None else asdict(evidence)}
        found.append({**facts, **answer_json(document, asked.question, answer, model, num_pages)})
    return {
        "title": example.title,
        "author": example.author,
        "num_words": len(example.text.split()),
        "num_tokens": document.num_tokens,
        "prefill_s": document.prefill_s,
        "answers": found,
    }
