"""Many numbered questions on one text, answered in one long output, as in LongGenBench (arXiv 2410.04199).

A register of people is made up, with a numbered list of questions behind it; the answers repeat what stands on each
card, so that a hundred of them take 2,000 tokens. No data is needed.
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
QUESTION = "{number}. What is the locker number of {name}?"
TASK = (
    "\n\nAnswer all {count} questions in order, one line for each, with trade, town and locker number as they stand on "
    "the card. Write each line like this:\nAnswer 1: Ann Example, a cooper from Exampleton, has the locker number 1234."
)
PREFIX = "Answer 1:"
_ANSWER = re.compile(r"Answer\s+(\d+)\s*:")


class RegisterGenerator(Generator):
    """A register of `size` cards, `num_questions` of which are asked for in an order of their own."""

    fit_each = True

    def __init__(self, num_questions: int) -> None:
        self._num_questions = num_questions

    def smallest(self, index: int) -> int:
        """See `Generator`: a card for each question."""
        return self._num_questions

    def largest(self, index: int) -> int:
        """See `Generator`: numbers of four digits."""
        return 9000

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"num_questions": self._num_questions}

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        names, keys = distinct(rng, "person", size), [str(key) for key in rng.sample(range(1000, 10000), size)]
        cards = [_card(name, key, rng) for name, key in zip(names, keys, strict=True)]
        asked = rng.sample(range(size), self._num_questions)
        questions = [QUESTION.format(number=n, name=names[card]) for n, card in enumerate(asked, 1)]
        head = HEAD.format(size=size) + "\n".join(cards) + LIST.format(count=len(asked))
        context = head + "\n".join(questions)
        return Draft(
            context,
            TASK.format(count=len(asked)),
            PREFIX,
            [keys[card] for card in asked],
            find_spans(context, [cards[card] for card in asked]),
        )


def _card(name: str, key: str, rng: random.Random) -> str:
    trade, city = rng.choice(TRADES), rng.choice(CITIES)
    return CARD.format(
        name=name, trade=trade, city=city, year=rng.randint(1840, 1990), rent=rng.randint(11, 99), key=key
    )


@dataclass(frozen=True)
class RegisterTask(GeneratedTask):
    """The register; `length` counts prompt and answer.

    Attributes:
        num_questions: questions of a sample; about 21 tokens of answer each.
    """

    num_questions: int = 100
    options: ClassVar[tuple[str, ...]] = ("num_questions",)

    def __post_init__(self) -> None:
        if not str(self.num_questions).isdecimal() or not 1 <= int(self.num_questions) <= 5000:
            raise UserError(f"num_questions must be a whole number from 1 to 5000, got {self.num_questions!r}.")
        object.__setattr__(self, "num_questions", int(self.num_questions))

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`."""
        return RegisterGenerator(self.num_questions)

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Share of the questions whose own line has the right number."""
        found = answer_lines(prediction)
        right = [_has(found.get(n, ""), answer) for n, answer in enumerate(sample.answers, 1)]
        return sum(right) / len(right)

    def extra_scores(self, prediction: str, sample: EvalSample) -> dict[str, float]:
        """Share of the questions that have a line at all."""
        found = answer_lines(prediction)
        return {"answered": sum(n in found for n in range(1, len(sample.answers) + 1)) / len(sample.answers)}


def answer_lines(prediction: str) -> dict[int, str]:
    """What stands behind each "Answer n:", of several with the same number the first; `PREFIX` was given."""
    parts = _ANSWER.split(PREFIX + prediction)[1:]
    found: dict[int, str] = {}
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        found.setdefault(int(number), text)
    return found


def _has(text: str, answer: str) -> bool:
    return answer in re.findall(r"\d+", text)


def longgen_tasks() -> list[RegisterTask]:
    """One set."""
    return [RegisterTask("longgen/register", 2048, "share_right")]
