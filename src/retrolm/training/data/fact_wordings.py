"""Wordings of planted facts and of the questions for them, for training only.

Evaluation plants its facts in wordings of its own; a test fails if a template here shares four words in a row with
one of them. The dev split has wordings of its own, too (`DEV`), so that held-out recall tells what other wordings will
do. Places: {key}, {value}, {attribute}; several keys or values are listed with "and".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAME_KEYS = ("person", "invented")
THING_KEYS = ("word_pair", "invented", "plate", "word")
PLACE_KEYS = ("city", "invented")
ANY_KEYS = ("person", "word_pair", "city", "invented", "plate", "number", "uuid", "word", "hex")


@dataclass(frozen=True)
class Wording:
    """One kind of fact: sentences that state it, questions that ask for it, beginnings of the answer."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    key_kinds: tuple[str, ...]
    value_kinds: tuple[str, ...]
    reverse: tuple[str, ...] = ()


ATTRIBUTES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("access code", ANY_KEYS, ("number", "hex", "uuid", "plate")),
    ("pass phrase", ANY_KEYS, ("word_pair", "invented", "word")),
    ("serial number", THING_KEYS, ("number", "hex", "uuid", "plate")),
    ("locker combination", NAME_KEYS, ("number",)),
    ("registration", ANY_KEYS, ("plate", "uuid", "number")),
    ("phone extension", NAME_KEYS, ("number",)),
    ("birthday", ("person",), ("date",)),
    ("home town", ("person",), ("city",)),
    ("account identifier", ANY_KEYS, ("uuid", "hex", "number")),
    ("delivery date", THING_KEYS, ("date",)),
    ("price", THING_KEYS, ("money",)),
    ("annual budget", (*PLACE_KEYS, "invented"), ("money",)),
    ("weight", THING_KEYS, ("measure",)),
    ("distance marker", PLACE_KEYS, ("measure", "number")),
    ("departure time", (*PLACE_KEYS, "plate"), ("time",)),
    ("destination", ("plate", "person", "word_pair"), ("city",)),
    ("code name", (*NAME_KEYS, "city"), ("word_pair", "word", "invented")),
    ("contact", ANY_KEYS, ("person",)),
    ("supervisor", (*NAME_KEYS, "word_pair"), ("person",)),
    ("lucky number", ("person", "word_pair", "word"), ("number",)),
    ("secret ingredient", ("invented", "person", "word_pair"), ("word", "invented")),
    ("batch reference", THING_KEYS, ("hex", "plate", "number")),
    ("ticket", ("person", "city"), ("plate", "number", "uuid")),
    ("token", ANY_KEYS, ("uuid", "hex", "word_pair", "number")),
    ("label", ANY_KEYS, ("word_pair", "invented", "number")),
    ("checksum", ANY_KEYS, ("hex", "uuid", "number")),
    ("mascot", (*PLACE_KEYS, "person"), ("word", "word_pair")),
    ("sample count", ANY_KEYS, ("number",)),
    ("meeting place", ("person", "word_pair", "date"), ("city",)),
    ("record", ANY_KEYS, ("uuid", "number", "hex", "plate", "date")),
)
ATTRIBUTE_STATEMENTS = (
    "The {attribute} of {key} is {value}.",
    "{key}'s {attribute} is {value}.",
    "For {key}, the {attribute} was set to {value}.",
    "{value} is the {attribute} that belongs to {key}.",
    "Please note: the {attribute} of {key} has become {value}.",
    "According to the register, {key} has {value} as {attribute}.",
    "Someone wrote down {value} as the {attribute} of {key}.",
    "In the case of {key}, use {value} as the {attribute}.",
    "It should be remembered that {key} goes with the {attribute} {value}.",
    "They gave {key} the {attribute} {value}.",
    "A memo lists {value} under {key} as the {attribute}.",
    "{key} received {value} as its {attribute} last week.",
    "Entry: {key}, {attribute}: {value}.",
    "One {attribute} recorded under {key} reads {value}.",
    "A {attribute}, namely {value}, was issued to {key}.",
    "Among the {attribute}s kept for {key} there is {value}.",
    "One {attribute} of {key}: {value}.",
    "{key} has a {attribute}: {value}.",
    "The following {attribute} belongs to {key}: {value}.",
    "Remember this {attribute} for {key}: {value}.",
    "As for {key}, its {attribute} reads {value}.",
    "(The {attribute} of {key}: {value}.)",
    "Here is one more {attribute}, that of {key}: {value}.",
    "{value}: that is a {attribute} of {key}.",
    "Whoever asks after the {attribute} of {key} is told {value}.",
    "NOTE. {attribute} ({key}) = {value}.",
)
ATTRIBUTE_QUESTIONS = (
    "What is the {attribute} of {key}?",
    "What is {key}'s {attribute}?",
    "Which {attribute} belongs to {key}?",
    "Tell me the {attribute} of {key}.",
    "{key} {attribute}?",
    "I need the {attribute} listed under {key}.",
    "What {attribute} was given to {key}?",
    "Look up {key}: what is the {attribute}?",
    "Under {key}, which {attribute} is recorded?",
    "Do you know the {attribute} that goes with {key}?",
    "Give the {attribute} that was noted for {key}.",
    "List every {attribute} given for {key}.",
    "Which {attribute}s does {key} have according to this?",
    "Name all {attribute}s of {key} that were stated.",
    "What does it say about the {attribute} of {key}?",
    "Repeat the {attribute} of {key} exactly.",
    "Please return every {attribute} filed for {key}.",
)
ATTRIBUTE_ANSWERS = (
    "",
    "",
    " The {attribute} of {key} is",
    " {key}:",
    " According to the text, the {attribute} of {key} is",
    " All {attribute}s stated for {key}:",
    " Here is the {attribute} of {key}:",
)
ATTRIBUTE_REVERSE = (
    "Who or what has the {attribute} {value}?",
    "To which name does the {attribute} {value} belong?",
    "{value} is whose {attribute}?",
)
SPECIFIC: tuple[Wording, ...] = (
    Wording(
        ("{key} always parks in bay {value}.", "Bay {value} is kept free for {key}."),
        ("Where does {key} park?", "Which parking bay is reserved for {key}?"),
        ("", " {key} parks in"),
        ("person", "plate"),
        ("number",),
    ),
    Wording(
        ("{key} was born on {value}.", "On {value}, {key} came into the world."),
        ("When was {key} born?", "What is the date of birth of {key}?"),
        ("",),
        ("person",),
        ("date",),
    ),
    Wording(
        ("{key} moved to {value} after the war.", "After the war, {key} settled in {value}."),
        ("Where did {key} live after the war?", "To which town did {key} move?"),
        ("",),
        ("person",),
        ("city",),
        ("Who moved to {value}?",),
    ),
    Wording(
        ("To open the {key} vault, turn the dial to {value}.", "The {key} vault opens with {value}."),
        ("How can the {key} vault be opened?", "What opens the {key} vault?"),
        ("", " Turn the dial to"),
        ("word_pair", "invented", "city"),
        ("number", "hex", "word_pair"),
    ),
    Wording(
        ("The train to {key} leaves at {value}.", "At {value} the train to {key} departs."),
        ("When does the train to {key} leave?", "What time is the train for {key}?"),
        ("",),
        ("city", "invented"),
        ("time",),
    ),
    Wording(
        ("{key} paid {value} for the painting.", "The painting cost {key} {value}."),
        ("How much did {key} pay for the painting?", "What did the painting cost {key}?"),
        ("",),
        ("person",),
        ("money",),
    ),
    Wording(
        ("In {key}, {value} won the election.", "The people of {key} elected {value}."),
        ("Who won the election in {key}?", "Whom did {key} elect?"),
        ("",),
        ("city", "invented"),
        ("person",),
        ("Where did {value} win the election?",),
    ),
    Wording(
        ("Agent {key} answers only to the phrase {value}.", "Say {value} and agent {key} will answer."),
        ("Which phrase does agent {key} answer to?", "What must be said to agent {key}?"),
        ("",),
        ("word", "invented", "person"),
        ("word_pair", "invented", "word"),
    ),
    Wording(
        ("Set variable {key} to {value}.", "{key} := {value}"),
        ("What value does the variable {key} hold?", "{key} = ?"),
        ("", " {key} ="),
        ("invented", "word", "plate"),
        ("number", "hex", "word"),
    ),
)
LINES = (
    "{key}: {value}",
    '"{key}": "{value}",',
    "{key},{value}",
    "| {key} | {value} |",
    "{key} => {value}",
    "{key} = {value}",
    "{attribute} {key}: {value}",
    "- {key} has {value}",
)
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


@dataclass(frozen=True)
class Forms:
    """The wordings of one split: {attribute} is drawn with its kinds of keys and values, the rest by itself."""

    attributes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    modifiers: tuple[str, ...]
    statements: tuple[str, ...]
    lines: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    reverse: tuple[str, ...]
    specific: tuple[Wording, ...]


TRAIN = Forms(
    ATTRIBUTES,
    ("", "", "", "secret ", "odd ", "official ", "hidden ", "very first ", "spare "),
    ATTRIBUTE_STATEMENTS,
    LINES,
    ATTRIBUTE_QUESTIONS,
    ATTRIBUTE_ANSWERS,
    ATTRIBUTE_REVERSE,
    SPECIFIC,
)
DEV = Forms(
    attributes=(
        ("registry mark", ANY_KEYS, ("number", "hex", "uuid", "plate")),
        ("call sign", ANY_KEYS, ("word_pair", "word", "invented", "plate")),
        ("quota", ANY_KEYS, ("number", "measure")),
        ("patron", ANY_KEYS, ("person",)),
    ),
    modifiers=("", "long lost ", "rare "),
    statements=(
        "There is a {attribute} on file for {key}, and it is {value}.",
        "Somewhere it was jotted down: {key} uses {value} for a {attribute}.",
        "The clerk assigned {value} to {key} as a new {attribute}.",
        "{key} -- {attribute} -- {value}.",
        "Of all {attribute}s, {value} is what {key} got.",
    ),
    lines=("{key}\t{value}", "{attribute}[{key}] = {value}"),
    questions=(
        "Can you recall which {attribute} {key} uses?",
        "State the {attribute} that {key} was assigned.",
        "Find every {attribute} connected with {key}.",
        "How does the {attribute} of {key} read?",
        "What were all {attribute}s connected with {key}?",
    ),
    answers=("", " Every {attribute} connected with {key}:", " It reads"),
    reverse=("Which name goes with the {attribute} {value}?",),
    specific=(
        Wording(
            ("The {key} expedition climbed {value}.", "It was {value} that the {key} expedition climbed."),
            ("How far did the {key} expedition climb?", "What height did the {key} expedition reach?"),
            ("",),
            ("invented", "word_pair"),
            ("measure",),
        ),
        Wording(
            ("{key} keeps a {value} as a pet.", "The pet of {key} is a {value}."),
            ("What pet does {key} keep?", "Which animal or thing does {key} keep as a pet?"),
            ("",),
            ("person",),
            ("word",),
        ),
        Wording(
            ("Parcel {key} was left with {value}.", "{value} took in parcel {key}."),
            ("Who has parcel {key}?", "With whom was parcel {key} left?"),
            ("",),
            ("plate", "number", "uuid"),
            ("person",),
            ("Which parcel did {value} take in?",),
        ),
    ),
)
FORMS = {"train": TRAIN, "dev": DEV}
_SPECIFIC_SHARE = 0.3


def draw_wording(rng: random.Random, split: str = "train") -> Wording:
    """Draw one wording of a split: an attribute with all statement forms, or a specific one."""
    forms = FORMS[split]
    if rng.random() < _SPECIFIC_SHARE:
        return rng.choice(forms.specific)
    return _attribute_wording(rng, forms, forms.statements)


def draw_line_wording(rng: random.Random, split: str = "train") -> Wording:
    """Draw a wording of a split whose facts are lines of a list or table."""
    forms = FORMS[split]
    return _attribute_wording(rng, forms, (rng.choice(forms.lines),))


def _attribute_wording(rng: random.Random, forms: Forms, statements: tuple[str, ...]) -> Wording:
    attribute, key_kinds, value_kinds = rng.choice(forms.attributes)
    attribute = rng.choice(forms.modifiers) + attribute
    about = [tuple(_about(attribute, form) for form in group) for group in (statements, forms.questions, forms.answers)]
    reverse = tuple(_about(attribute, form) for form in forms.reverse)
    return Wording(about[0], about[1], about[2], key_kinds, value_kinds, reverse)


def _about(attribute: str, form: str) -> str:
    return form.replace("{attribute}", attribute)


def listed(names: list[str]) -> str:
    """Return names as a list in words: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
