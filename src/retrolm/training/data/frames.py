"""The words around a sample: an instruction in front of the text and a frame around the question.

The paper's own format (Fig 5 and 6) and the engine's own question template come first; the others keep the retriever
from depending on them. None of the others shares four words in a row with an evaluation prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ...engine.prompts import QUESTION_TEMPLATE

PAPER_INSTRUCTION = "Read the following text and find key information for the question.\n"
PAPER_QUESTION = "\nNow, find key information for the question.\nQuestion: {question}"


@dataclass(frozen=True)
class Frame:
    """`instruction` opens the text page; `question` is the question page with a place for the question."""

    instruction: str
    question: str


PAPER_FRAME = Frame(PAPER_INSTRUCTION, PAPER_QUESTION)
ENGINE_SHARE = 0.3  # of the samples not in the paper's format
ENGINE_FRAME = Frame("", QUESTION_TEMPLATE)
OTHER_FRAMES = (
    Frame("", "\n\n{question}"),
    Frame("", "\n\nQuestion: {question}"),
    Frame("", "\n\nQuestion: {question}\nAnswer:"),
    Frame("", "\nQ: {question}\nA:"),
    Frame("", "\n\n---\n\n{question}\nReply in a few words."),
    Frame("Context:\n", "\n\nUse the context to respond: {question}"),
    Frame("Study these notes, a query comes last.\n\n", "\n\nQuery: {question}"),
    Frame("Reference material:\n\n", "\n\nWith the reference material in mind: {question}\nKeep it short."),
    Frame("I have pasted several pages here.\n\n", "\n\nThat was all of it. {question}"),
    Frame("Below you'll find some background.\n", "\n\nGiven this background, {question}"),
    Frame("", "\n\nBased on what you just read, {question}"),
    Frame("A long text comes first and a request afterwards.\n\n", "\n\nRequest: {question}\nResponse:"),
    Frame("Please go through this carefully.\n\n", "\n\nNow tell me: {question}"),
)


def draw_frame(rng: random.Random, paper_share: float) -> Frame:
    """Draw the paper's frame with this probability, else the engine's or one of the others."""
    if rng.random() < paper_share:
        return PAPER_FRAME
    return ENGINE_FRAME if rng.random() < ENGINE_SHARE else rng.choice(OTHER_FRAMES)
