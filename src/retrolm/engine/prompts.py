"""The chat template around a document: its head (the sink page), a question's tail, and what separates turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError

QUESTION_TEMPLATE = "\n\nAnswer the question from the text above, in a few words.\nQuestion: {question}"
_MARKS = ("<<retrolm-0>>", "<<retrolm-1>>", "<<retrolm-2>>")


@dataclass(frozen=True)
class PromptFormat:
    """How a document, questions and answers become token ids. Ids are joined, never strings.

    Attributes:
        prefix_ids: BOS and the template's head; empty where the tokenizer has neither.
        tail: text behind a question, up to where the answer begins.
        between: text from an answer's end to the next question.
    """

    tokenizer: Any
    prefix_ids: tuple[int, ...]
    tail: str
    between: str

    def question_ids(self, question: str, follow_up: bool = False) -> list[int]:
        """Ids of a question page; a follow-up begins with what closes the last answer."""
        head = self.between if follow_up else ""
        return self.encode(head + question + self.tail)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it stands, without special tokens added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def prompt_format(tokenizer: Any, chat: bool | None = None) -> PromptFormat:
    """Read the format off a tokenizer.

    Args:
        chat: use the chat template; None = if there is one. True without a template raises `UserError`.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UserError("This tokenizer has no chat template. Use chat=False, or an instruction-tuned model.")
    if not has_template or chat is False:
        return PromptFormat(tokenizer, tuple(_bos(tokenizer)), "\nAnswer:", "\n")
    document, answer, question = _MARKS
    first = _render(tokenizer, [("user", document)])
    second = _render(tokenizer, [("user", document), ("assistant", answer), ("user", question)])
    head, tail = first.split(document)
    between = second.split(answer)[1].split(question)[0]
    prefix = tokenizer(head, add_special_tokens=False)["input_ids"]
    return PromptFormat(tokenizer, tuple(prefix), tail, between)


def _render(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _bos(tokenizer: Any) -> list[int]:
    """The ids a tokenizer puts before every text, if any."""
    ids: list[int] = tokenizer("", add_special_tokens=True)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
