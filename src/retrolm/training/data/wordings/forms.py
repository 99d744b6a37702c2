"""What a wording of facts is made of."""

from __future__ import annotations

from dataclasses import dataclass

NAME_KEYS = ("person", "invented")
THING_KEYS = ("word_pair", "invented", "plate", "word")
PLACE_KEYS = ("city", "invented")
ANY_KEYS = ("person", "word_pair", "city", "invented", "plate", "number", "uuid", "word", "hex")


@dataclass(frozen=True)
class Wording:
    """One kind of fact: sentences that state it, questions that ask for it, beginnings of the answer.

    Places are {key} and {value}; several keys or values are listed with "and".

    Attributes:
        reverse: questions for the key of a value.
        paraphrases: questions that share no telling word with the statements.
        topic: what the values are, in the singular; "" where the sentences alone tell.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    key_kinds: tuple[str, ...]
    value_kinds: tuple[str, ...]
    reverse: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    topic: str = ""


@dataclass(frozen=True)
class Attribute:
    """Something that keys of some kinds have, and questions for it that don't name it."""

    name: str
    key_kinds: tuple[str, ...]
    value_kinds: tuple[str, ...]
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forms:
    """The wordings of one split: {attribute} is drawn with its kinds of keys and values, the rest by itself."""

    attributes: tuple[Attribute, ...]
    modifiers: tuple[str, ...]
    statements: tuple[str, ...]
    lines: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    reverse: tuple[str, ...]
    headings: tuple[str, ...]
    specific: tuple[Wording, ...]
