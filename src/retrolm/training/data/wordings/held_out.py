"""The wordings of the dev split: none of them is trained on, so that held-out recall tells what other wordings do."""

from __future__ import annotations

from .forms import ANY_KEYS, Attribute, Forms, Wording

DEV = Forms(
    attributes=(
        Attribute(
            "registry mark",
            ANY_KEYS,
            ("number", "hex", "uuid", "plate"),
            ("With which sign did the office brand {key}?",),
        ),
        Attribute(
            "call sign",
            ANY_KEYS,
            ("word_pair", "word", "invented", "plate"),
            ("How do radio stations greet {key} on air?",),
        ),
        Attribute("quota", ANY_KEYS, ("number", "measure"), ("At most how much is allotted to {key}?",)),
        Attribute("patron", ANY_KEYS, ("person",), ("Thanks to whose generosity does {key} exist?",)),
        Attribute("cipher", ANY_KEYS, ("number", "uuid", "word_pair"), ("Which spell makes {key} vanish?",)),
        Attribute(
            "hash",
            ("uuid", "hex", "number", "plate"),
            ("uuid", "hex", "number"),
            ("What comes out when one digests {key}?",),
        ),
    ),
    modifiers=("", "long lost ", "rare "),
    statements=(
        "There is a {attribute} on file for {key}, and it is {value}.",
        "Somewhere it was jotted down: {key} uses {value} for a {attribute}.",
        "The clerk assigned {value} to {key} as a new {attribute}.",
        "{key} -- {attribute} -- {value}.",
        "Of all {attribute}s, {value} is what {key} got.",
        "{key} sent word at noon. Its message held nothing but {value}, obviously a {attribute}.",
        '"Which {attribute} shall we put for {key}?" "Put {value}."',
        "2041/03/17 notice: {attribute} {value} bound to {key}",
        "Chosen by lot, {value} became what {key} treasures as {attribute}.",
        "An extraordinary {attribute} was found on {key}: {value}.",
    ),
    lines=(
        "{key}\t{value}",
        "{attribute}[{key}] = {value}",
        "{key} :: {value}",
        "the {attribute} at {key} says {value}",
    ),
    questions=(
        "Can you recall which {attribute} {key} uses?",
        "State the {attribute} that {key} was assigned.",
        "Find every {attribute} connected with {key}.",
        "How does the {attribute} of {key} read?",
        "What were all {attribute}s connected with {key}?",
        "If {key} were called up, what {attribute} would appear?",
        "{key} must have some {attribute}; print it.",
        "Scan for {key} and report its {attribute}.",
        "On {key}: what did you learn?",
    ),
    answers=("", " Every {attribute} connected with {key}:", " It reads", " Reported {attribute}:"),
    reverse=("Which name goes with the {attribute} {value}?", "Trace {value} back to its owner."),
    headings=("All known {attribute}s follow.\n\n", "=== {attribute} book ===\n"),
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
        Wording(
            ("Satellite {key} fell into the sea near {value}.", "Near {value}, debris of {key} washed ashore."),
            ("Where did satellite {key} fall?", "Which coast saw the end of {key}?"),
            ("",),
            ("plate", "hex", "invented"),
            ("city",),
            ("What fell down near {value}?",),
        ),
        Wording(
            ("Recipe {key} calls for {value} of flour.", "Bakers who follow {key} measure off {value} of flour."),
            ("How much flour does recipe {key} need?", "What quantity goes into the dough of {key}?"),
            ("",),
            ("number", "word_pair"),
            ("measure",),
        ),
        Wording(
            ("Pigeon {key} wears ring {value}.", "Ring {value} was put on the leg of pigeon {key}."),
            ("Which ring does pigeon {key} wear?", "What did they fasten to {key}?"),
            ("", " Pigeon {key} wears"),
            ("word", "invented", "word_pair"),
            ("uuid", "number", "plate"),
            ("Which pigeon wears {value}?",),
        ),
    ),
)
