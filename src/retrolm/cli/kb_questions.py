"""`retrolm kb ask` and `query`: answers and passages from a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError, unknown
from .answer_view import INDENT, answer_json, cost_line
from .kb_options import BaseArgument, DocumentsOption, FirstLayerOption, ModelOption, WhereOption
from .options import JsonFlag
from .passage import passage as best_part
from .screen import ERR, count, note, print_json, size, snippet, waiting
from .startup import quick_imports

if TYPE_CHECKING:
    from ..knowledge_base.answers import KnowledgeAnswer, Passage
    from ..knowledge_base.base import KnowledgeBase
    from ..knowledge_base.restore import KeptDocument

FIRST_LAYERS = ("mean_key", "recent")
QuestionsArgument = Annotated[list[str], typer.Argument(metavar="QUESTION", help="One question, or several.")]


def ask(
    base: BaseArgument,
    questions: QuestionsArgument,
    documents: DocumentsOption = None,
    where: WhereOption = None,
    pages: Annotated[int, typer.Option(help="How many of the pages an answer came from to show.", min=0)] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 64,
    first_layer: FirstLayerOption = "mean_key",
    model: ModelOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer questions from a base. Of what is stored only the pages are read that an answer needs.

    One document is answered exactly as in the session that read it; several are asked as one text whose documents
    have not seen each other. The answer says which ("exact" or "composed").
    """
    opened = _open(base, questions, first_layer, model)
    which, found = _which(documents, where, first_layer), []
    for question in questions:
        with waiting("Answering …"):
            answer = opened.ask(question, max_new_tokens=max_new_tokens, **which)
        if as_json:
            found.append(_answer_json(opened, opened.select(**which), question, answer, pages))
            continue
        if len(questions) > 1:
            note(f"\n{question}")
        print(answer.text, flush=True)
        _show_details(question, answer, pages)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)


def query(
    base: BaseArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for.")],
    documents: DocumentsOption = None,
    where: WhereOption = None,
    top_k: Annotated[int, typer.Option("--top-k", help="How many passages.", min=1)] = 5,
    first_layer: FirstLayerOption = "mean_key",
    model: ModelOption = None,
) -> None:
    """Print the passages that a question retrieves, best first, as JSON; nothing is generated."""
    opened = _open(base, [question], first_layer, model)
    with waiting("Looking …"):
        found = opened.query(question, top_k=top_k, **_which(documents, where, first_layer))
    print_json([_passage_json(one) for one in found])


def _which(documents: list[str] | None, where: list[str] | None, first_layer: str) -> dict[str, Any]:
    """Which documents a question is put to, as `KnowledgeBase` takes it."""
    return {"documents": documents or None, "where": where or None, "first_layer": first_layer}


def _open(base: str, questions: list[str], first_layer: str, model: str | None) -> KnowledgeBase:
    if not all(question.strip() for question in questions):
        raise UserError("A question is empty. Put each question in quotes: retrolm kb ask BASE 'What …?'")
    if first_layer not in FIRST_LAYERS:
        raise unknown("first layer", first_layer, FIRST_LAYERS)
    from ..knowledge_base.base import KnowledgeBase
    from ..knowledge_base.read_ahead import read_ahead

    opened = KnowledgeBase.open(base, model)
    read_ahead(model or str(opened.manifest.setup.get("weights_folder")))
    with waiting(f"Loading {snippet(model or str(opened.manifest.setup.get('model')), 60)} …"), quick_imports():
        from ..engine.quiet import silence_libraries

        silence_libraries()
        opened.lm  # noqa: B018  (loads and compares fingerprints)
    return opened


def _answer_json(
    base: KnowledgeBase, document: KeptDocument, question: str, answer: KnowledgeAnswer, num_pages: int
) -> dict[str, Any]:
    """Everything about one answer: what `retrolm ask` says, and where in the base it comes from."""
    return {
        **answer_json(document, question, answer.answer, base.manifest.setup["model"], 0),
        "reuse": answer.reuse,
        "documents": list(answer.documents),
        "pages": [_passage_json(one) for one in answer.passages[:num_pages]],
        "page_bytes_read": answer.page_bytes_read,
    }


def _passage_json(one: Passage) -> dict[str, Any]:
    return {
        "document": one.document,
        "source": one.source,
        "metadata": one.metadata,
        "page": one.page,
        "start_char": one.start_char,
        "end_char": one.end_char,
        "score": one.score,
        "layers": list(one.layers),
        "text": one.text,
    }


def _show_details(question: str, answer: KnowledgeAnswer, num_pages: int) -> None:
    """Print where an answer came from and what it cost, on stderr."""
    about, width = f"{question} {answer.text}", ERR.width - INDENT
    for one in answer.passages[:num_pages]:
        head = f"{snippet(one.document, 30)} page {one.page:>4}  {one.score:>4.0%} of layers  "
        note(head + best_part(one.text, about, max(width - len(head), 20)), INDENT)
    for line in (*(["stopped at --max-new-tokens"] if answer.answer.truncated else []), *answer.answer.notes):
        note(line, INDENT)
    reuse = "as it was read" if answer.reuse == "exact" else "composed: they haven't seen each other"
    documents = "1 document" if len(answer.documents) == 1 else f"{count(len(answer.documents))} documents"
    note(f"{documents}, {reuse} · {size(answer.page_bytes_read)} of pages read", INDENT)
    note(cost_line(answer.answer), INDENT)
