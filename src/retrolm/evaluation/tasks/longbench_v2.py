"""LongBench v2: four-way choice over long texts (Bai et al. 2024, arXiv:2412.15204), the zero-shot setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...metrics import longbench_v2_choice
from .files import Source, find_file
from .generator import split_template
from .prompt import Tokenizer, truncate_middle
from .row_task import RowTask
from .sample import EvalSample

# Protocol data of THUDM/LongBench (MIT), prompts/0shot.txt.
PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n"
    "(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
SOURCE = Source(
    title="LongBench v2",
    places=(
        "longbench_v2/data.json",
        "LongBench-v2/data.json",
        "longbench_v2/longbench_v2_le60k_words.jsonl.gz",
        "longbench_v2.jsonl",
        "data.json",
    ),
    how="Download data.json of THUDM/LongBench-v2 from the Hugging Face hub, or pass the data folder 'hub'.",
    hub_repo="THUDM/LongBench-v2",
    hub_file="data.json",
)
CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")


@dataclass(frozen=True)
class LongBenchV2Task(RowTask):
    """All questions; extra tells their "difficulty", "length_class" (short, medium, long) and "domain".

    `length` is the most tokens of a prompt before chat wrapping: a longer one loses its middle.
    """

    fields: ClassVar[tuple[str, ...]] = (
        "_id", "context", "question", "answer", "difficulty", "length", "domain", *CHOICES
    )  # fmt: skip

    def file(self, data_dir: Path | str | None) -> Path:
        """See `RowTask.file`."""
        return find_file(SOURCE, data_dir)

    def sample(self, tokenizer: Tokenizer, row: dict[str, Any], length: int | None) -> EvalSample:
        """See `RowTask.sample`."""
        values = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        parts = split_template(PROMPT, row["context"].strip(), question=row["question"].strip(), **values)
        context, question = truncate_middle(tokenizer, *parts, length)
        return EvalSample(
            sample_id=row["_id"],
            task=self.name,
            length=length,
            context=context,
            question=question,
            answers=[row["answer"]],
            max_new_tokens=self.max_new_tokens,
            extra={"difficulty": row["difficulty"], "length_class": row["length"], "domain": row["domain"]},
        )

    def score(self, prediction: str, sample: EvalSample) -> float:
        """1 for the right letter in the asked wording, else 0."""
        return longbench_v2_choice(prediction, sample.answers[0])


def longbench_v2_tasks() -> list[LongBenchV2Task]:
    """The one task longbench-v2/all."""
    return [LongBenchV2Task("longbench-v2/all", 128, "accuracy")]
