"""Who answers: an engine with any method. All methods get the same token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.answering import Prompt
from ..engine.model import RetroLM
from ..engine.prompts import PromptFormat, prompt_format
from ..engine.results import Answer
from .stopping import StopAfter, cut_answer, stop_strings
from .tasks.sample import EvalSample

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True)
class Prediction:
    """One answer and what it took.

    Attributes:
        text: the answer up to its stop string. num_tokens: of the prompt. num_generated: of the answer.
        attended_tokens: most keys that a prompt token ("prefill") and a generated token ("decode") attended to.
        ttft_s: from the start of reading to the first token of the batch. tpot_s: each further token. prefill_s:
            reading alone, without the question (0 where it isn't a step of its own).
        kv_bytes: keys and values kept, by place. attended_by_layer: as `attended_tokens`, for each layer apart; empty
            for page methods. pages: what was retrieved, if asked for. decode_path: what generated, as in `Answer`.
    """

    text: str
    num_tokens: int
    num_generated: int
    truncated: bool
    attended_tokens: dict[str, int]
    ttft_s: float
    tpot_s: float
    prefill_s: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    attended_by_layer: dict[str, list[int]] = field(default_factory=dict)
    pages: dict[str, Any] | None = None
    decode_path: str = ""


class Reader(Protocol):
    """Answers samples of one task, several at once, the same as one at a time."""

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        """Read the samples side by side and answer them; all have the same settings (limit, stops, chat)."""
        ...


def sample_format(lm: RetroLM, sample: EvalSample) -> PromptFormat:
    """How the sample's parts are wrapped; raw where the task or the tokenizer has no chat template."""
    return prompt_format(lm.tokenizer, chat=None if sample.chat else False)


def prompt_of(lm: RetroLM, sample: EvalSample) -> Prompt:
    """Token ids and texts of a sample; the answer prefix stands behind the chat template's tail."""
    shape = sample_format(lm, sample)
    wrapped = sample.chat and bool(getattr(lm.tokenizer, "chat_template", None))
    question = sample.question + (shape.tail if wrapped else "") + sample.answer_prefix
    return Prompt(
        tuple(shape.prefix_ids),
        tuple(shape.encode(sample.context)),
        tuple(shape.encode(question)),
        sample.context,
        sample.question,
    )


def answer_settings(lm: RetroLM, sample: EvalSample) -> dict[str, Any]:
    """Generation options of a sample: greedy, to its limit or stop string."""
    options = {"max_new_tokens": sample.max_new_tokens, **GREEDY}
    stops = stop_strings(sample)
    return {**options, "stopping_criteria": [StopAfter(lm.tokenizer, stops)]} if stops else options


class RetroReader:
    """An engine with any method; nothing is kept from one batch to the next."""

    def __init__(self, lm: RetroLM, keep_pages: bool = False) -> None:
        self._lm = lm
        self._keep_pages = keep_pages

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        """See `Reader`. Raises `BudgetError` if more was attended than the budget allows."""
        lm, prompts = self._lm, [prompt_of(self._lm, sample) for sample in samples]
        lm.format = sample_format(lm, samples[0])
        answers = lm.answer(prompts, **answer_settings(lm, samples[0]))
        return [self._prediction(*found) for found in zip(samples, prompts, answers, strict=True)]

    def _prediction(self, sample: EvalSample, prompt: Prompt, answer: Answer) -> Prediction:
        return Prediction(
            text=cut_answer(answer.text, stop_strings(sample)),
            num_tokens=len(prompt.ids),
            num_generated=len(answer.token_ids),
            truncated=answer.truncated,
            attended_tokens=dict(answer.attended_tokens),
            ttft_s=answer.timings.prefill_s + answer.timings.ttft_s,
            tpot_s=answer.timings.tpot_s,
            prefill_s=answer.timings.prefill_s,
            kv_bytes=dict(answer.kv_bytes),
            attended_by_layer={key: list(value) for key, value in answer.attended_by_layer.items()},
            pages=_pages(answer) if self._keep_pages else None,
            decode_path=answer.decode_path,
        )


def _pages(answer: Answer) -> dict[str, Any]:
    """Pages of the text by vote, and the pages attended in each layer."""
    ranked = [
        {"page": use.page, "score": round(use.score, 4), "layers": list(use.layers)} for use in answer.retrieval.pages
    ]
    layers = [[page for page in row if page >= 0] for row in answer.retrieval.page_ids.tolist()]
    return {"ranked": ranked, "layers": layers}
