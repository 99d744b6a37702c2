"""Reading the chosen option out of a free-form answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LEADS = ("answer is:", "answer:", "answer is", "option is")
_MARKS = str.maketrans(dict.fromkeys("\n\"'.,?!{}", " "))
_LETTER = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def longbook_choice(prediction: str, label: Sequence[str]) -> float:
    """InfiniteBench's En.MC rule, 1 or 0; `label` = [text of the right option, its letter].

    A prediction that starts with a capital A to D is taken as that letter whatever follows ("According to" is A), and
    words made of neighbouring letters ("BCD") pass as a letter too: both as in the official scorer.
    """
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in label)
    if text in label:
        return 1.0
    return float(_right_inside(re.sub(" +", " ", text.translate(_MARKS)), label))


def _right_inside(text: str, label: Sequence[str]) -> bool:
    for lead in _LEADS:
        start = text.find(lead)
        if start >= 0:
            return text[start + len(lead) + 1 :].startswith(tuple(label))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return letter is not None and letter in label


def longbench_v2_choice(prediction: str, letter: str) -> float:
    """1 if the prediction says "The correct answer is (X)" with the right letter (brackets optional, * ignored)."""
    text = prediction.replace("*", "")
    match = _LETTER[0].search(text) or _LETTER[1].search(text)
    return float(match is not None and match.group(1) == letter)
