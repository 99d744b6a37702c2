"""Many numbered questions on one text, answered in one long output, as in LongGenBench (arXiv 2410.04199).

A register of people is made up, with a numbered list of questions behind it; the answers repeat what stands on each
card, so that 80 of them take 2,000 tokens. No data is needed.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import UserError
from ...planting import CITIES, distinct
from .generated import GeneratedTask
from .generator import Draft, Generator, find_spans
from .prompt import Tokenizer
from .sample import EvalSample

TRADES = ("glazier", "baker", "surveyor", "printer", "tailor", "potter", "joiner", "dyer", "miller", "saddler")
HEAD = "These are the cards of a register of {size} people.\n\n"
CARD = (
    "{name} is a {trade} from {city} who joined in {year} and pays a rent of {rent}. "
    "The locker number of {name} is {key}."
)
LIST = "\n\nThese are {count} questions about the register.\n\n"
QUESTION = "{number}. Which locker does {name} have?"
TASK = "\n\nAnswer all {count} questions in order, one line for each, with what stands on the card."
ANSWER = "Answer {number}: {name}, a {trade} from {city}, has the locker number {key}.\n"
MOST = 5000  # questions
NUM_GIVEN = 2  # answers that open the output, so that small models go on likewise
OPENING = "Answer {number}:"
_ANSWER = re.compile(r"Answer\s+(\d+)\s*:")


class RegisterGenerator(Generator):
    """A register of `size` cards, some of which are asked for in an order of their own; the first answers are given."""

    fit_each = True

    def __init__(self, num_questions: int) -> None:
        self._num_questions = num_questions

    def smallest(self, index: int) -> int:
        """See `Generator`: a card for each question."""
        return self._num_questions + NUM_GIVEN

    def largest(self, index: int) -> int:
        """See `Generator`: numbers of four digits."""
        return 9000

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"num_questions": self._num_questions}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        people = _people(size, rng)
        asked = [people[card] for card in rng.sample(range(size), self._num_questions + NUM_GIVEN)]
        questions = [QUESTION.format(number=number, **person) for number, person in enumerate(asked, 1)]
        register = HEAD.format(size=size) + "\n".join(CARD.format(**person) for person in people)
        context = register + LIST.format(count=len(asked)) + "\n".join(questions)
        given = [ANSWER.format(number=number, **person) for number, person in enumerate(asked[:NUM_GIVEN], 1)]
        prefix, left = "".join(given) + OPENING.format(number=NUM_GIVEN + 1), asked[NUM_GIVEN:]
        spans = find_spans(context, [CARD.format(**person) for person in left])
        return Draft(context, TASK.format(count=len(asked)), prefix, [person["key"] for person in left], spans)


def _people(count: int, rng: random.Random) -> list[dict[str, str]]:
    """What stands on each card."""
    names, keys = distinct(rng, "person", count), rng.sample(range(1000, 10000), count)
    return [
        {
            "name": name,
            "key": str(key),
            "trade": rng.choice(TRADES),
            "city": rng.choice(CITIES),
            "year": str(rng.randint(1840, 1990)),
            "rent": str(rng.randint(11, 99)),
        }
        for name, key in zip(names, keys, strict=True)
    ]


@dataclass(frozen=True)
class RegisterTask(GeneratedTask):
    """The register; `length` counts prompt and answer.

    Attributes:
        num_questions: questions left to answer; about 25 tokens of answer each.
    """

    num_questions: int = 90
    options: ClassVar[tuple[str, ...]] = ("num_questions",)

    def __post_init__(self) -> None:
        if not str(self.num_questions).isdecimal() or not 1 <= int(self.num_questions) <= MOST:
            raise UserError(f"num_questions must be a whole number from 1 to {MOST}, got {self.num_questions!r}.")
        object.__setattr__(self, "num_questions", int(self.num_questions))

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`."""
        return RegisterGenerator(self.num_questions)

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Share of the questions whose own line has the right number."""
        found = answer_lines(prediction)
        right = [_has(found.get(n, ""), answer) for n, answer in enumerate(sample.answers, NUM_GIVEN + 1)]
        return sum(right) / len(right)

    def extra_scores(self, prediction: str, sample: EvalSample) -> dict[str, float]:
        """Share of the questions that have a line at all."""
        found, count = answer_lines(prediction), len(sample.answers)
        return {"answered": sum(n in found for n in range(NUM_GIVEN + 1, NUM_GIVEN + 1 + count)) / count}


def answer_lines(prediction: str) -> dict[int, str]:
    """What stands behind each "Answer n:", of several with the same number the first; the first `OPENING` was given."""
    parts = _ANSWER.split(OPENING.format(number=NUM_GIVEN + 1) + prediction)[1:]
    found: dict[int, str] = {}
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(int(number), text)
    return found


def _has(text: str, answer: str) -> bool:
    return answer in re.findall(r"\d+", text)


def longgen_tasks() -> list[RegisterTask]:
    """One set."""
    return [RegisterTask("longgen/register", 2048, "share_right")]
