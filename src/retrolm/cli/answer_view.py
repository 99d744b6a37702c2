"""An answer as JSON and as text: the same facts in every command that asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .passage import passage
from .screen import ERR, count, note, seconds, size

if TYPE_CHECKING:
    from ..engine.document import Document
    from ..engine.prompt_document import PromptDocument
    from ..engine.results import Answer, PageUse

INDENT = 2


def answer_json(
    document: Document | PromptDocument, question: str, answer: Answer, model: str, num_pages: int
) -> dict[str, Any]:
    """Everything about one answer; keys are stable. `num_pages`: how many of its pages to list."""
    lm = document.lm
    return {
        "question": question,
        "answer": answer.text,
        "truncated": answer.truncated,
        "model": model,
        "method": lm.method.name,
        "retriever": lm.retriever_name,
        "kv_budget": lm.config.kv_budget,
        "page_size": lm.config.page_size,
        "num_tokens": document.num_tokens,
        "num_pages": document.num_pages,
        "attended_tokens": answer.attended_tokens,
        "attended_by_layer": {key: list(value) for key, value in answer.attended_by_layer.items()},
        "pages": [page_json(page) for page in answer.pages[:num_pages]],
        "prefill_s": answer.timings.prefill_s,
        "ttft_s": answer.timings.ttft_s,
        "tpot_s": answer.timings.tpot_s,
        "decode_path": answer.decode_path,
        "kv_bytes": answer.kv_bytes,
        "notes": list(answer.notes),
    }


def page_json(page: PageUse) -> dict[str, Any]:
    """One page that an answer could draw on."""
    return {
        "page": page.page,
        "start_char": page.start_char,
        "end_char": page.end_char,
        "score": page.score,
        "text": page.text,
    }


def page_lines(question: str, answer: Answer, num_pages: int, width: int) -> list[str]:
    """One line per page, best first: number, share of layers that chose it, its part nearest to the question."""
    about = f"{question} {answer.text}"
    lines = []
    for page in answer.pages[:num_pages]:
        head = f"page {page.page:>4}  {page.score:>4.0%} of layers  "
        lines.append(head + passage(page.text, about, max(width - len(head), 20)))
    return lines


def cost_line(answer: Answer) -> str:
    """What the answer cost: tokens attended, times, bytes."""
    attended, kv = answer.attended_tokens, answer.kv_bytes
    parts = [
        f"attended {count(attended['prefill'])} tokens reading, {count(attended['decode'])} answering"
        + _dense(attended),
        f"first token {seconds(answer.timings.ttft_s)}",
        f"{speed(answer)} tokens/s",
        f"KV {size(kv['device'])} device, {size(kv['host'])} host"
        + (f", {size(kv['disk'])} disk" if kv["disk"] else ""),
    ]
    return " · ".join(parts)


def _dense(attended: dict[str, int]) -> str:
    """What layers and heads attended that the method leaves dense; nothing if there are none."""
    kinds = {"dense_layers": "dense layers", "dense_heads": "dense heads"}
    found = [f"{count(attended[key])} in {name}" for key, name in kinds.items() if key in attended]
    return f" ({', '.join(found)})" if found else ""


def speed(answer: Answer) -> str:
    """Tokens generated per second behind the first one; "-" if there is only one."""
    return f"{1 / answer.timings.tpot_s:.1f}" if len(answer.token_ids) > 1 and answer.timings.tpot_s else "-"


def read_line(document: Document | PromptDocument) -> str:
    """What reading the document took."""
    if not document.is_cached:
        return f"{count(document.num_tokens)} tokens, read anew with each question: this method keeps no pages"
    per_s = document.num_tokens / max(document.prefill_s, 1e-9)
    return (
        f"Read {count(document.num_tokens)} tokens in {count(document.num_pages)} pages: "
        f"{seconds(document.prefill_s)}, {count(per_s)} tokens/s"
    )


def setup_line(document: Document | PromptDocument, model: str) -> str:
    """With what it was read."""
    lm = document.lm
    budget = f"budget {count(lm.config.kv_budget)}" if lm.method.has_budget else "no budget"
    parts = [model, budget, f"method {lm.method.name}"]
    if document.is_cached:
        trained = "trained " if lm.method.needs_bookmarks and lm.retriever else ""
        parts.append(f"retriever: {trained}{lm.retriever_name}")
    return " · ".join(parts)


def show_opening(document: Document | PromptDocument, model: str) -> None:
    """Print on stderr what reading took, and with what it was read."""
    note(read_line(document))
    note(setup_line(document, model))


def show_details(question: str, answer: Answer, num_pages: int) -> None:
    """Print an answer's pages and cost on stderr."""
    stopped = ["stopped at --max-new-tokens"] if answer.truncated else []
    lines = [*page_lines(question, answer, num_pages, ERR.width - INDENT), *stopped, *answer.notes, cost_line(answer)]
    for line in lines:
        note(line, INDENT)
