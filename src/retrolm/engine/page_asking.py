"""Questions to documents that were read page by page: answers, retrievals, turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .agreement import encode_questions
from .answers import build_answer, build_retrieval
from .chunk import query_lengths, query_pages
from .decode_round import Query
from .document import Document, Past
from .generate_options import GenerateOptions
from .generation import word_matches
from .page_reading import cut_pages
from .prompts import QUESTION_TEMPLATE
from .results import Answer, Retrieval
from .retro_generation import generator_over
from .sources import require_vocabulary

if TYPE_CHECKING:
    from .model import RetroLM


def ask_pages(
    lm: RetroLM,
    pairs: Sequence[tuple[Document, str | Sequence[int]]],
    max_new_tokens: int,
    raw: bool,
    **options: Any,
) -> list[Answer]:
    """`ask_batch` of page methods."""
    checked = answer_options(lm, options)
    for document, _ in pairs:
        document.require_open()
    groups: dict[int, list[int]] = {}
    for index, (document, _) in enumerate(pairs):
        groups.setdefault(id(document.encoder), []).append(index)
    answers: dict[int, Answer] = {}
    for members in groups.values():
        part = [pairs[i] for i in members]
        queries = [
            Query(doc.table, question_ids(lm, question, raw), doc.token_ids, doc.words) for doc, question in part
        ]
        encoder = part[0][0].encoder
        for ids in generator_over(encoder).run(queries, max_new_tokens, checked):
            encoder.parts.store.release(ids)
        for i, (document, _), query in zip(members, part, queries, strict=True):
            answers[i] = build_answer(document, query)
    return [answers[i] for i in range(len(pairs))]


def retrieve(lm: RetroLM, document: Document, question: str, *, raw: bool = False) -> Retrieval:
    """Which pages of `document` the question attends in each layer."""
    document.require_open()
    encoder, tokens = document.encoder, question_ids(lm, question, raw)
    ids = encoder.parts.store.reserve(len(query_lengths(len(tokens), lm.config)))
    try:
        groups = [encoder.query(document.table, ids, tokens)]
        query = Query(document.table, tokens, document.token_ids, document.words)
        (capture,) = encode_questions(encoder, groups, word_matches([query], groups, lm.config))
    finally:
        encoder.parts.store.release(ids)
    return build_retrieval(document, document.table, capture.choices)


def turn(
    lm: RetroLM,
    document: Document,
    past: Past,
    question: str,
    *,
    max_new_tokens: int,
    raw: bool = False,
    **options: Any,
) -> tuple[Answer, Past]:
    """One turn of a conversation, and what is past for the next one: the turn has become pages."""
    encoder = document.encoder
    tokens = question_ids(lm, question, raw, follow_up=len(past.turn_ids) > 0)
    query = Query(past.table, tokens, past.token_ids, document.words)
    checked = answer_options(lm, options)
    (held,) = generator_over(encoder).run([query], max_new_tokens, checked)
    lengths = query_lengths(len(query.tokens), lm.config)
    table = query.table.extended(held[-len(lengths) :], torch.tensor(lengths))
    token_ids = [*query.past, *query_pages(query.tokens, lm.config)]
    try:
        rest = cut_pages([], _unencoded(lm, query), lm.config.page_size)
        if rest:
            table, ids = encoder.extend(table, rest)
            held = torch.cat([held, ids])
    except BaseException:
        encoder.parts.store.release(held)
        raise
    return build_answer(document, query), Past(table, [*token_ids, *rest], torch.cat([past.turn_ids, held]))


def _unencoded(lm: RetroLM, query: Query) -> list[int]:
    """Generated tokens that are not pages yet, without the end-of-sequence token (the next turn begins with it)."""
    every = lm.config.retrieve_every
    start = (max(len(query.generated) - 1, 0) // every) * every if every else 0
    return [token for token in query.generated[start:] if token not in lm.eos_ids]


def question_ids(lm: RetroLM, question: str | Sequence[int], raw: bool = False, follow_up: bool = False) -> list[int]:
    """Token ids of a question page, chat template's tail included; ids are taken as they stand."""
    if not isinstance(question, str):
        ids = [int(i) for i in question]
        if not ids:
            raise UserError("The question is empty.")
        require_vocabulary(lm, ids)
        return ids
    if lm.format is None:
        raise UserError("Asking needs a tokenizer. Pass one, or use generate(input_ids).")
    if not question.strip():
        raise UserError("The question is empty.")
    if raw or follow_up:
        return lm.format.question_ids(question, follow_up)
    return lm.format.question_ids(QUESTION_TEMPLATE.format(question=question))


def answer_options(lm: RetroLM, options: dict[str, Any]) -> GenerateOptions:
    checked = lm.options_for(options, lm.eos_ids)
    if checked.num_return_sequences > 1:
        raise UserError("A question has one answer: leave out num_return_sequences, or use generate(input_ids).")
    return checked
