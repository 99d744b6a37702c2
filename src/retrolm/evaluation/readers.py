"""Who answers: RetroLM with any page method, or the stock model with dense attention. Both get the same token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.model import RetroLM
from ..engine.prompts import PromptFormat, prompt_format
from ..engine.results import Answer
from ..engine.stock import stock_answers
from ..errors import RetroLMError
from .stopping import StopAfter, cut_answer, stop_strings
from .tasks.sample import EvalSample

FULL = "full"
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
}


class BudgetError(RetroLMError):
    """A method attended more than its budget on a text longer than it: the run proves nothing."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of a sample in the three parts that are joined: prefix, document, question with answer prefix."""

    prefix: tuple[int, ...]
    document: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All ids in order."""
        return [*self.prefix, *self.document, *self.question]


@dataclass(frozen=True)
class Prediction:
    """One answer and what it took.

    Attributes:
        text: the answer up to its stop string. num_tokens: of the prompt. num_generated: of the answer.
        attended_tokens: most keys that a prompt token ("prefill") and a generated token ("decode") attended to.
        ttft_s: from the start of reading to the first token of the batch. tpot_s: each further token. prefill_s:
            reading alone, without the question (0 where it isn't a step of its own).
        kv_bytes: keys and values kept, by place. pages: what was retrieved, if asked for.
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
    pages: dict[str, Any] | None = None


class Reader(Protocol):
    """Answers samples of one task, several at once, the same as one at a time."""

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        """Read the samples side by side and answer them; all have the same settings (limit, stops, chat)."""
        ...


def sample_format(lm: RetroLM, sample: EvalSample) -> PromptFormat:
    """How the sample's parts are wrapped; raw where the task or the tokenizer has no chat template."""
    return prompt_format(lm.tokenizer, chat=None if sample.chat else False)


def prompt_of(lm: RetroLM, sample: EvalSample) -> Prompt:
    """Token ids of a sample; the answer prefix stands behind the chat template's tail."""
    shape = sample_format(lm, sample)
    wrapped = sample.chat and bool(getattr(lm.tokenizer, "chat_template", None))
    question = sample.question + (shape.tail if wrapped else "") + sample.answer_prefix
    prefix = shape.prefix_ids if lm.config.prefix_page else ()
    return Prompt(tuple(prefix), tuple(shape.encode(sample.context)), tuple(shape.encode(question)))


def answer_settings(lm: RetroLM, sample: EvalSample) -> dict[str, Any]:
    """Generation options of a sample: greedy, to its limit or stop string."""
    options = {"max_new_tokens": sample.max_new_tokens, **GREEDY}
    stops = stop_strings(sample)
    return {**options, "stopping_criteria": [StopAfter(lm.tokenizer, stops)]} if stops else options


class FullReader:
    """The stock model with dense attention to the whole prompt."""

    def __init__(self, lm: RetroLM) -> None:
        self._lm = lm

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        """See `Reader`."""
        prompts = [prompt_of(self._lm, sample).ids for sample in samples]
        answers = stock_answers(self._lm, prompts, **answer_settings(self._lm, samples[0]))
        return [
            Prediction(
                text=cut_answer(answer.text, stop_strings(sample)),
                num_tokens=len(ids),
                num_generated=len(answer.token_ids),
                truncated=answer.truncated,
                attended_tokens={"prefill": len(ids), "decode": answer.num_attended},
                ttft_s=answer.ttft_s,
                tpot_s=answer.tpot_s,
            )
            for sample, ids, answer in zip(samples, prompts, answers, strict=True)
        ]


class RetroReader:
    """RetroLM: reads documents page by page, asks, and gives their pages back."""

    def __init__(self, lm: RetroLM, keep_pages: bool = False) -> None:
        self._lm = lm
        self._keep_pages = keep_pages

    def answer(self, samples: Sequence[EvalSample]) -> list[Prediction]:
        """See `Reader`. Raises `BudgetError` if more was attended than the budget allows."""
        lm, prompts = self._lm, [prompt_of(self._lm, sample) for sample in samples]
        lm.format = sample_format(lm, samples[0])
        documents = lm.read([list(prompt.document) for prompt in prompts])
        try:
            pairs = [(document, prompt.question) for document, prompt in zip(documents, prompts, strict=True)]
            answers = lm.ask_batch(pairs, **answer_settings(lm, samples[0]))
        finally:
            for document in documents:
                document.close()
        return [self._prediction(*found) for found in zip(samples, prompts, answers, strict=True)]

    def _prediction(self, sample: EvalSample, prompt: Prompt, answer: Answer) -> Prediction:
        num_tokens, num_generated = len(prompt.ids), len(answer.token_ids)
        self._check_budget(answer.attended_tokens, num_tokens, num_generated)
        return Prediction(
            text=cut_answer(answer.text, stop_strings(sample)),
            num_tokens=num_tokens,
            num_generated=num_generated,
            truncated=answer.truncated,
            attended_tokens=dict(answer.attended_tokens),
            ttft_s=answer.timings.prefill_s + answer.timings.ttft_s,
            tpot_s=answer.timings.tpot_s,
            prefill_s=answer.timings.prefill_s,
            kv_bytes=dict(answer.kv_bytes),
            pages=_pages(answer) if self._keep_pages else None,
        )

    def _check_budget(self, attended: dict[str, int], num_tokens: int, num_generated: int) -> None:
        config = self._lm.config
        allowed = config.kv_budget + (0 if config.strict_budget else config.page_size)
        most = max(attended["prefill"], attended["decode"] - max(num_generated - 1, 0))
        reported = config.first_layer_mode == "full" and config.num_skip_layers > 0
        if num_tokens > allowed and most > allowed and not reported:
            raise BudgetError(
                f"Method {self._lm.method.name!r} attended {most} tokens of a text of {num_tokens}; its budget is "
                f"{allowed}. The run was stopped: its scores would not be those of this budget."
            )


def _pages(answer: Answer) -> dict[str, Any]:
    """Pages of the text by vote, and the pages attended in each layer."""
    ranked = [
        {"page": use.page, "score": round(use.score, 4), "layers": list(use.layers)} for use in answer.retrieval.pages
    ]
    layers = [[page for page in row if page >= 0] for row in answer.retrieval.page_ids.tolist()]
    return {"ranked": ranked, "layers": layers}
