"""LongBench's metrics for classes, counts, paragraph numbers and lines of code."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+")


def classification_score(prediction: str, label: str, all_classes: Sequence[str]) -> float:
    """1/n if the label is among the n class names found in the prediction, else 0.

    Names that are part of the label's own name don't count. The official loop removes them from the list it walks and
    so skips the name behind each removed one; scores are only comparable with that quirk.
    """
    found = [name for name in all_classes if name in prediction]
    index = 0
    while index < len(found):
        if found[index] != label and found[index] in label:
            del found[index]
        index += 1
    return 1.0 / len(found) if label in found else 0.0


def count_score(prediction: str, count: str) -> float:
    """Share of the integers in the prediction that equal `count`."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(count) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, paragraph: str) -> float:
    """Share of the integers in the prediction that equal the number in `paragraph` ("Paragraph 7")."""
    match = re.search(r"Paragraph (\d+)", paragraph)
    if not match:
        raise ValueError(f"The answer must look like 'Paragraph 7', got {paragraph!r}.")
    return count_score(prediction, match.group(1))


def code_similarity(prediction: str, line: str) -> float:
    """Edit similarity of the first line of code in the prediction (no backtick, # or //) to `line`, in steps of 0.01.

    Equals `fuzzywuzzy.fuzz.ratio / 100` on difflib; with python-Levenshtein installed fuzzywuzzy itself can differ.
    """
    lines = prediction.lstrip("\n").split("\n")
    guess = next((text for text in lines if not any(mark in text for mark in ("`", "#", "//"))), "")
    if guess == line:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, guess, line).ratio()) / 100
