"""Wordings of planted facts and of the questions for them, for training only.

Evaluation plants its facts in wordings of its own; a test fails if a template here shares four words in a row with
one of them. The dev split has wordings of its own, too (`wordings.held_out`), so that held-out recall tells what other
wordings will do. Places: {key}, {value}, {attribute}; several keys or values are listed with "and".
"""

from __future__ import annotations

import random
from dataclasses import replace

from .wordings.attributes import ATTRIBUTES, MODIFIERS
from .wordings.forms import Attribute, Forms, Wording
from .wordings.held_out import DEV
from .wordings.questions import ANSWERS, QUESTIONS, REVERSE
from .wordings.specific import SPECIFIC
from .wordings.statements import HEADINGS, LINES, STATEMENTS

FILLER_SENTENCES = (
    "The kettle was on the stove.",
    "A dog barked somewhere.",
    "It rained again in the evening.",
    "Nothing else happened that day.",
    "The road went on and on.",
    "We waited for the bus.",
    "Clouds moved over the hills.",
    "The shop on the corner was closed.",
    "Leaves fell from the trees.",
    "She put the book back on the shelf.",
    "He looked out of the window.",
    "The clock struck four.",
    "They walked to the harbour and home.",
    "Birds sang in the hedge.",
    "Somebody laughed next door.",
    "The soup needed more salt.",
    "A boat passed slowly.",
    "The lamp flickered twice.",
    "Snow covered the roofs.",
    "The letter lay unopened.",
    "Children played in the yard.",
    "It was a long afternoon.",
    "The train was late as usual.",
    "Bread was baking in the oven.",
    "The wind turned north.",
    "He counted the steps once more.",
    "No one had seen the cat.",
    "The garden gate creaked.",
    "Water dripped from the tap.",
    "They spoke about the weather.",
)

TRAIN = Forms(ATTRIBUTES, MODIFIERS, STATEMENTS, LINES, QUESTIONS, ANSWERS, REVERSE, HEADINGS, SPECIFIC)
FORMS = {"train": TRAIN, "dev": DEV}
_SPECIFIC_SHARE = 0.3
_PARAPHRASE_SHARE = 0.3


def draw_wording(rng: random.Random, split: str = "train") -> Wording:
    """Draw one wording of a split: an attribute with all statement forms, or a specific one."""
    forms = FORMS[split]
    if rng.random() < _SPECIFIC_SHARE:
        return rng.choice(forms.specific)
    return _about(_draw_attribute(rng, forms), forms, forms.statements)


def draw_line_wording(rng: random.Random, split: str = "train") -> Wording:
    """Draw a wording of a split whose facts are lines of a list or table."""
    forms = FORMS[split]
    return _about(_draw_attribute(rng, forms), forms, (rng.choice(forms.lines),))


def draw_question(rng: random.Random, wording: Wording, named: bool = False) -> str:
    """Draw a form of question, now and then one in words that the statements don't use.

    Args:
        named: only one that tells what is asked for, beside the key.
    """
    if wording.paraphrases and rng.random() < _PARAPHRASE_SHARE:
        return rng.choice(wording.paraphrases)
    return rng.choice([form for form in wording.questions if wording.topic in form or not named])


def _draw_attribute(rng: random.Random, forms: Forms) -> Attribute:
    drawn = rng.choice(forms.attributes)
    return replace(drawn, name=rng.choice(forms.modifiers) + drawn.name)


def _about(attribute: Attribute, forms: Forms, statements: tuple[str, ...]) -> Wording:
    def filled(group: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(form.replace("{attribute}", attribute.name) for form in group)

    return Wording(
        filled(statements),
        filled(forms.questions),
        filled(forms.answers),
        attribute.key_kinds,
        attribute.value_kinds,
        filled(forms.reverse),
        attribute.paraphrases,
        attribute.name,
    )


def draw_heading(rng: random.Random, wording: Wording, split: str = "train") -> str:
    """Draw what stands above a list of facts of one wording; "" where the facts have no name."""
    return rng.choice(FORMS[split].headings).replace("{attribute}", wording.topic) if wording.topic else ""


def listed(names: list[str]) -> str:
    """Return names as a list in words: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
