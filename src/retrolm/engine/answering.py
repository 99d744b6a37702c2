"""How prompts are answered: one program per kind of method, found by that kind.

A program that reads whole prompts (`PromptProgram`) implements `answer` and `logits`; documents, questions, the budget
check and the command line come from here. `RetroLM.answer` is the entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..registry import Registry
from .encoder import Progress
from .prompt_document import PromptDocument
from .results import Answer, Retrieval, Timings

if TYPE_CHECKING:
    from .model import RetroLM


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids, in the three parts that are joined, and as text where a method looks at text.

    Attributes:
        prefix: BOS and the chat template's head. document: what is asked about. question: what stands behind it, up
            to where the answer begins (wording, template's tail, answer prefix).
        context_text, question_text: document and question as they were written; None where only ids are known.
    """

    prefix: tuple[int, ...]
    document: tuple[int, ...]
    question: tuple[int, ...]
    context_text: str | None = None
    question_text: str | None = None

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.prefix, *self.document, *self.question]


class AnswerProgram(ABC):
    """Reads and answers for one engine, with the methods of one kind.

    Attributes:
        brings_adapter: whether the method's own adapter acts on the model while it answers; it takes no other.
    """

    brings_adapter: ClassVar[bool] = False

    def __init__(self, lm: RetroLM) -> None:
        self.lm = lm

    @property
    def allowed_tokens(self) -> int:
        """Tokens that may be attended in a layer."""
        return self.lm.config.kv_budget

    def knobs(self) -> dict[str, Any]:
        """The method's knobs as results state them."""
        return asdict(self.lm.method.knobs)

    @abstractmethod
    def read(self, sources: list[Any], progress: Progress | None) -> list[Any]:
        """What `RetroLM.read` returns for each source."""

    @abstractmethod
    def ask(self, pairs: Sequence[tuple[Any, Any]], max_new_tokens: int, raw: bool, **options: Any) -> list[Answer]:
        """Answers to (document, question) pairs, documents as `read` returned them."""

    @abstractmethod
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
        """Answers to whole prompts, side by side, the same as one at a time."""

    @abstractmethod
    def logits(self, input_ids: Tensor) -> Tensor:
        """Next-token logits [T, vocabulary] at each of `input_ids` int64 [T]."""

    def require_room(self, num_text_tokens: int, question: list[int]) -> None:
        """Raise `UserError`, before a text of that many tokens is read, for a question that can't be answered."""
        if not question:
            raise UserError("The question is empty.")

    def check_attended(self, answer: Answer, num_tokens: int) -> None:
        """Raise `BudgetError` if an answer to a prompt of `num_tokens` attended more than the budget."""
        attended, num_generated = answer.attended_tokens, len(answer.token_ids)
        self.lm.method.check_attended(attended, num_tokens, num_generated, self.allowed_tokens)


PROGRAMS: Registry[AnswerProgram] = Registry("kind of method")


class PromptProgram(AnswerProgram):
    """Base of programs that take each prompt as a whole: a document is read anew with each question."""

    def read(self, sources: list[Any], progress: Progress | None) -> list[Any]:
        found = [self.lm.tokenise(source) for source in sources]
        return [PromptDocument(self.lm, text, ids) for text, ids, _ in found]

    def ask(self, pairs: Sequence[tuple[Any, Any]], max_new_tokens: int, raw: bool, **options: Any) -> list[Answer]:
        for document, _ in pairs:
            document.require_open()
        prompts = [self._prompt(document, question, raw) for document, question in pairs]
        return self.lm.answer(prompts, max_new_tokens=max_new_tokens, **options)

    def _prompt(self, document: PromptDocument, question: Any, raw: bool) -> Prompt:
        ids = self.lm.question_ids(question, raw)
        text = question if isinstance(question, str) else None
        return Prompt(document.prefix, tuple(document.token_ids), tuple(ids), document.text, text)


@dataclass(frozen=True)
class Outcome:
    """What a program that reads whole prompts measured for one of them.

    Attributes:
        token_ids: generated tokens. ended: generation came to an end of its own.
        prefill, decode: most keys that any prompt token and any generated token attended to, for each layer (the
            largest of its heads, those left dense aside), counted where attention was computed.
        left_dense: layers that the method leaves dense on purpose; they are reported apart.
        dense_heads: in each layer, most keys that a generated token attended by heads that are left dense on purpose,
            reported apart as well; 0 where there is none.
        device_bytes, host_bytes: keys and values kept when generation ended. max_position: highest RoPE position.
        decode_path: what generated, as in `Answer`.
    """

    token_ids: list[int]
    ended: bool
    prefill: list[int]
    decode: list[int]
    timings: Timings
    device_bytes: int
    host_bytes: int = 0
    max_position: int = 0
    left_dense: frozenset[int] = frozenset()
    dense_heads: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    decode_path: str = "generate"


def prompt_answer(lm: RetroLM, outcome: Outcome) -> Answer:
    """The `Answer` to a prompt that was taken as a whole; it has no pages."""
    num_layers = lm.backbone.num_layers
    nothing = Retrieval(torch.empty(num_layers, 0, dtype=torch.int64), torch.empty(num_layers, 0), ())
    return Answer(
        text=lm.tokenizer.decode(outcome.token_ids, skip_special_tokens=True).strip()
        if lm.tokenizer is not None
        else "",
        token_ids=tuple(outcome.token_ids),
        retrieval=nothing,
        attended_tokens=_attended(lm, outcome),
        max_position=outcome.max_position,
        timings=outcome.timings,
        kv_bytes={"device": outcome.device_bytes, "host": outcome.host_bytes, "disk": 0, "cache": 0},
        truncated=not outcome.ended,
        notes=outcome.notes,
        decode_path=outcome.decode_path,
        attended_by_layer={"prefill": tuple(outcome.prefill), "decode": _by_layer(outcome)},
    )


def _attended(lm: RetroLM, outcome: Outcome) -> dict[str, int]:
    """Most by any layer that chooses, and apart by those left dense and those that keep their sliding window."""
    layers = range(lm.backbone.num_layers)
    sliding = [layer for layer in layers if not lm.backbone.retrieves(layer)]
    choosing = [layer for layer in layers if layer not in sliding and layer not in outcome.left_dense]
    found = {
        "prefill": max((outcome.prefill[layer] for layer in choosing), default=0),
        "decode": max((outcome.decode[layer] for layer in choosing), default=0),
    }
    for name, part in (("dense_layers", outcome.left_dense), ("sliding", sliding)):
        if part:
            found[name] = max(max(outcome.prefill[layer], outcome.decode[layer]) for layer in part)
    if any(outcome.dense_heads):
        found["dense_heads"] = max(outcome.dense_heads)
    return found


def _by_layer(outcome: Outcome) -> tuple[int, ...]:
    """Most keys of any head, dense ones too."""
    return tuple(max(both) for both in zip(outcome.decode, outcome.dense_heads or outcome.decode, strict=True))
