"""InfiniteBench's synthetic tasks, made anew in kind (after its data/construct_synthetic_dataset.py, MIT)."""

from __future__ import annotations

import random
import uuid
from abc import abstractmethod
from typing import Any

from .generator import Draft, Generator, find_spans, split_template

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
PASSKEY = "The pass key is {key}. Remember it. {key} is the pass key.\n"
DIGITS = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n"
RANKS = {"largest": 1, "second largest": 2, "third largest": 3, "smallest": -1, "second smallest": -2} | {
    "third smallest": -3,
    "median": 0,
}
HIGHEST = 99
UPPER_ENDS = range(int(0.8 * HIGHEST), HIGHEST + 1)
LOWER_ENDS = range(int(0.2 * HIGHEST) + 1)


class SyntheticGenerator(Generator):
    """A synthetic task under one prompt template; `full_size` is the size of the benchmark's own samples."""

    full_size: int

    def __init__(self, template: str) -> None:
        self.template = template

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"template": self.template}

    def natural_size(self, index: int) -> int | None:
        """See `Generator`: the benchmark's size."""
        return self.full_size


class NumberListGenerator(SyntheticGenerator):
    """math_find: a list of `size` numbers from 0 to 99 and a question about its k-th largest, smallest or median."""

    full_size = 60_000
    step = 25

    def smallest(self, index: int) -> int:
        """See `Generator`: enough numbers for a third smallest one."""
        return 50

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`. The seven kinds of question take turns."""
        kind = list(RANKS)[index % len(RANKS)]
        low, high = _bounds(kind, rng)
        numbers = [rng.randint(low, high) for _ in range(size)]
        question = f"You should answer with only one number, no other words. The {kind} number of the list is: "
        parts = split_template(self.template, str(numbers), target=f"the {kind} number", question=question)
        return Draft(*parts, "", [str(ranked_number(numbers, RANKS[kind]))], extra={"kind": kind})


def _bounds(kind: str, rng: random.Random) -> tuple[int, int]:
    """Range of the numbers: the end that is asked for is redrawn, so that constant guesses rarely hit."""
    upper = "largest" in kind or (kind == "median" and rng.random() < 0.5)
    if upper:
        return 0, rng.randint(UPPER_ENDS[0], UPPER_ENDS[-1])
    return rng.randint(LOWER_ENDS[0], LOWER_ENDS[-1]), HIGHEST


def ranked_number(numbers: list[int], rank: int) -> int | float:
    """The k-th largest distinct number (rank k), the k-th smallest (-k), or the median (0; a float if even many)."""
    if rank:
        return sorted(set(numbers))[-rank if rank > 0 else -rank - 1]
    middle, ordered = len(numbers) // 2, sorted(numbers)
    return ordered[middle] if len(numbers) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


class HiddenKeyGenerator(SyntheticGenerator):
    """passkey and number_string: one sentence with digits among `size` lines of noise."""

    full_size = 5220
    step = 5

    def __init__(self, template: str, sentence: str, question: str) -> None:
        super().__init__(template)
        self._sentence = sentence
        self._question = question

    @abstractmethod
    def key(self, rng: random.Random) -> str:
        """Draw the digits."""

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        place, key = rng.randint(0, size), self.key(rng)
        line = self._sentence.format(key=key)
        text = NOISE * place + line + NOISE * (size - place)
        context, question = split_template(self.template, text, question=self._question)
        depth = round(100 * place / size, 1) if size else 0.0
        return Draft(context, question, "", [key], find_spans(context, [line.rstrip()]), {"depths": [depth]})


class PasskeyGenerator(HiddenKeyGenerator):
    """Five random digits."""

    def __init__(self, template: str) -> None:
        super().__init__(template, PASSKEY, "What is the pass key?")

    def key(self, rng: random.Random) -> str:
        """See `HiddenKeyGenerator`."""
        return "".join(str(rng.randint(0, 9)) for _ in range(5))


class NumberStringGenerator(HiddenKeyGenerator):
    """Ten digits: five random ones, of which five times one is written twice."""

    def __init__(self, template: str) -> None:
        super().__init__(template, DIGITS, "What is the sequence of digits?")

    def key(self, rng: random.Random) -> str:
        """See `HiddenKeyGenerator`."""
        digits = [str(rng.randint(0, 9)) for _ in range(5)]
        for _ in range(5):
            place = rng.randrange(len(digits))
            digits.insert(place, digits[place])
        return "".join(digits)


class KeyValueGenerator(SyntheticGenerator):
    """kv_retrieval: a JSON object of `size` pairs of UUIDs, one of which is asked for."""

    full_size = 1855
    step = 5

    def smallest(self, index: int) -> int:
        """See `Generator`: the pair that is asked for."""
        return 1

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        asked = rng.random()
        pairs = [f'"{_uuid(rng)}": "{_uuid(rng)}"' for _ in range(size)]
        pair = pairs[int(asked * size)]
        _, key, _, value, _ = pair.split('"')
        ask = f'Key: "{key}"\nThe value associated with the specified key is: '
        context, question = split_template(self.template, "JSON data:\n{" + ", ".join(pairs) + "}", question=ask)
        return Draft(context, question, "", [value], find_spans(context, [pair]))


def _uuid(rng: random.Random) -> uuid.UUID:
    return uuid.UUID(int=rng.getrandbits(128), version=4)


GENERATORS: dict[str, type[SyntheticGenerator]] = {
    "math_find": NumberListGenerator,
    "passkey": PasskeyGenerator,
    "number_string": NumberStringGenerator,
    "kv_retrieval": KeyValueGenerator,
}
