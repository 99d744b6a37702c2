"""A tiny model under evaluation: a task of short stories, and a run of it that can be killed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.evaluation.answering import LocalAnswerer
from retrolm.evaluation.runner import Runner, SampleSet
from retrolm.evaluation.tasks import EvalSample, Task
from retrolm.evaluation.variants import Variant, VariantLoader
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

PROVENANCE = {"commit": "0", "versions": {}, "hardware": {}, "command": "test", "measured_at": "now"}
VARIANTS = [Variant("full"), Variant("recency", 64), Variant("retrolm", 64, "none")]
CONFIG = RetroConfig(kv_budget=64, page_size=8)


@dataclass(frozen=True)
class StoryTask(Task):
    """Stories of different lengths; the score is the share of letters of the answer that are an `e` or a space."""

    num_samples: int = 5

    def samples(self, tokenizer: Any, length: Any = None, *_: Any) -> list[EvalSample]:
        """Stories that begin at different places."""
        return [story_sample(number, 420 + 13 * number) for number in range(self.num_samples)]

    def score(self, prediction: str, sample: EvalSample) -> float:
        """A number between 0 and 1 that depends on the prediction."""
        return sum(letter in "e " for letter in prediction) / max(len(prediction), 1)

    def extra_scores(self, prediction: str, sample: EvalSample) -> dict[str, float]:
        """Whether anything was said."""
        return {"spoke": float(bool(prediction))}


def story_sample(number: int, num_chars: int = 420, **changes: Any) -> EvalSample:
    """One question about a story."""
    fields: dict[str, Any] = {
        "sample_id": str(number),
        "task": "tiny/story",
        "length": None,
        "context": "Read: " + (STORY * 4)[7 * number :][:num_chars],
        "question": "\nWho spoke?",
        "answers": ["nobody"],
        "max_new_tokens": 6,
        "answer_prefix": "It was",
    }
    return EvalSample(**{**fields, **changes})


def story_set(num_samples: int = 5) -> SampleSet:
    task = StoryTask("tiny/story", 6, "letters", num_samples=num_samples)
    return SampleSet(task, None, task.samples(tiny_tokenizer()))


def tiny_lm(name: str = "llama", chat: bool = True, method: str = "retrolm", **options: Any) -> RetroLM:
    model = tiny_model(name, vocab_size=600, dtype=torch.float32)
    return RetroLM(model, tiny_tokenizer(chat), config=CONFIG.replace(**options), method=method)


def tiny_answerer() -> LocalAnswerer:
    """The tiny model, answering in this process."""
    return LocalAnswerer(VariantLoader(tiny_lm(), "tiny", CONFIG), PROVENANCE)


def run_stories(
    out: Path,
    num_samples: int = 5,
    variants: list[Variant] = VARIANTS,
    extra: Sequence[EvalSample] = (),
    **options: Any,
) -> list[Any]:
    """Evaluate the stories and `extra` samples into `out`; returns the cells."""
    torch.set_num_threads(1)
    part = story_set(num_samples)
    part.samples.extend(extra)
    return Runner(tiny_answerer(), out, **options).run([part], variants)
