"""InfiniteBench's rules for answers that are numbers or keys; each gives 1 or 0."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"\d+\.\d+|\d+")
_MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def math_find(prediction: str, label: int | float) -> float:
    """Compare the first number in the prediction: as an integer if the label is one, else as a float (medians).

    A decimal number against an integer label is wrong (the official code raises there).
    """
    match = _NUMBER.search(prediction)
    if match is None:
        return 0.0
    if isinstance(label, int):
        return float(match.group().isdecimal() and int(match.group()) == label)
    return float(float(match.group()) == label)


def first_integer(prediction: str, label: str) -> float:
    """Compare the first run of digits, digit by digit (pass keys and digit sequences)."""
    match = re.search("[0-9]+", prediction)
    return float(match is not None and match.group() == label)


def kv_retrieval(prediction: str, label: str) -> float:
    """Whether the value is one of the prediction's words, quotes and punctuation aside."""
    return float(label in prediction.translate(_MARKS).split())
