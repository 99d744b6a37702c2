"""Multi-hop chains: facts that have to be followed from one to the next, all of them evidence."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from ...planting import distinct
from .context import Asked, BuildContext
from .frames import draw_frame
from .haystacks import hide
from .sample import Stage1Sample

_HAYSTACKS = ("prose", "passages", "filler")
_HAYSTACK_WEIGHTS = (60, 25, 15)
_MAX_HOPS = 4
_MAX_DISTRACTORS = 6


@dataclass(frozen=True)
class Relation:
    """A fact from an entity {a} of one type to one {b} of another: sentences, and a phrase that stands for {b}."""

    subject: str
    object: str
    statements: tuple[str, ...]
    phrase: str


RELATIONS = (
    Relation(
        "person",
        "city",
        ("{a} has lived in {b} for years.", "{b} has been home to {a} since spring."),
        "the town where {a} lives",
    ),
    Relation(
        "person",
        "city",
        ("{a} grew up in {b}.", "As a child {a} went to school in {b}."),
        "the place where {a} grew up",
    ),
    Relation(
        "person",
        "invented",
        ("{a} works for the {b} company.", "The {b} company employs {a}."),
        "the company that employs {a}",
    ),
    Relation("person", "person", ("{a} is married to {b}.", "{b} is the spouse of {a}."), "the spouse of {a}"),
    Relation(
        "person", "person", ("{a} learned the trade from {b}.", "{b} taught {a} everything."), "the teacher of {a}"
    ),
    Relation("person", "person", ("{a} shares an office with {b}.",), "the office mate of {a}"),
    Relation(
        "person", "word_pair", ("{a} owns the boat {b}.", "The boat {b} belongs to {a}."), "the boat that {a} owns"
    ),
    Relation(
        "invented",
        "city",
        ("{a} has its head office in {b}.", "From {b}, {a} runs its business."),
        "the city of {a}'s head office",
    ),
    Relation("invented", "person", ("{a} was founded by {b}.", "{b} started {a} in a garage."), "the founder of {a}"),
    Relation("invented", "word_pair", ("{a} makes the {b} engine.",), "the engine made by {a}"),
    Relation("city", "person", ("The mayor of {a} is {b}.", "{b} was elected mayor of {a}."), "the mayor of {a}"),
    Relation("city", "person", ("The oldest citizen of {a} is {b}.",), "the oldest citizen of {a}"),
    Relation(
        "city", "city", ("{a} is twinned with {b}.", "A treaty makes {b} the twin town of {a}."), "the twin town of {a}"
    ),
    Relation(
        "word_pair",
        "city",
        ("The {a} is kept in {b}.", "Visitors can see the {a} in {b}."),
        "the town that keeps {a}",
    ),
    Relation(
        "word_pair",
        "person",
        ("The {a} was designed by {b}.", "It was {b} who drew up the {a}."),
        "the designer of {a}",
    ),
    Relation("person", "number", ("{a} can be reached at extension {b}.",), "the extension of {a}"),
    Relation("person", "date", ("{a} was born on {b}.",), "the birth date of {a}"),
    Relation("city", "date", ("The fair of {a} opens on {b}.",), "the opening day of the fair of {a}"),
    Relation("city", "measure", ("The tower of {a} measures {b}.",), "the size of the tower in {a}"),
    Relation("invented", "plate", ("Contract {b} was signed with {a}.",), "the contract signed with {a}"),
    Relation("word_pair", "hex", ("The {a} carries the engraving {b}.",), "the engraving on {a}"),
)
_ASKING = {"person": "Who is {phrase}?", "city": "Which town or city is {phrase}?"}
_ASKING_OTHERS = ("What is {phrase}?", "Name {phrase}.", "Find out {phrase}.")
_POINTERS = (
    "The note marked {a} says: go on to {b}.",
    "Whoever opens {a} finds a pointer to {b}.",
    "Step {a} leads to step {b}.",
)
_POINTER_QUESTIONS = (
    "Starting at {a}, where do the notes lead in the end?",
    "Follow the trail from {a}: what comes last?",
)


@dataclass(frozen=True)
class Chain:
    """The sentences of one chain, and the question that only all of them together answer."""

    statements: list[str]
    question: str


def chain_sample(context: BuildContext, source: str, num_tokens: int, rng: random.Random) -> Stage1Sample:
    """Build a text of `num_tokens` with a chain of 2 to 4 facts and chains of the same form as distractors.

    Further questions ask for those.
    """
    frame = draw_frame(rng, context.config.paper_format)
    chains = draw_chains(rng, 1 + rng.randint(0, min(_MAX_DISTRACTORS, context.config.max_keys - 1)))
    facts = [(statement, number) for number, chain in enumerate(chains) for statement in chain.statements]
    rng.shuffle(facts)
    haystack = rng.choices(_HAYSTACKS, weights=_HAYSTACK_WEIGHTS)[0]
    further: list[Asked] = [(chain.question, "") for chain in chains[1:]][: context.config.further_questions]
    answers = [number - 1 if number <= len(further) else -1 for _, number in facts]
    statements, is_evidence = [text for text, _ in facts], [number == 0 for _, number in facts]
    pieces = hide(context, frame, statements, is_evidence, haystack, num_tokens, rng, answers)
    return context.finish(frame, pieces, chains[0].question, source, num_tokens, rng, further=further)


def draw_chains(rng: random.Random, count: int) -> list[Chain]:
    """Draw chains of one form over entities that all differ; the first is meant to be asked."""
    hops = rng.randint(2, _MAX_HOPS)
    if rng.random() < 0.2:
        return _pointer_chains(rng, count, hops)
    path = _path(rng, hops)
    entities = _Entities(rng)
    return [_chain(rng, path, entities) for _ in range(count)]


def _path(rng: random.Random, hops: int) -> list[Relation]:
    """Draw relations of which each begins at the type where the one before ends."""
    path = [rng.choice([relation for relation in RELATIONS if _goes_on(relation)])]
    while len(path) < hops:
        last = len(path) == hops - 1
        path.append(rng.choice([r for r in RELATIONS if r.subject == path[-1].object and (last or _goes_on(r))]))
    return path


def _goes_on(relation: Relation) -> bool:
    return any(other.subject == relation.object for other in RELATIONS)


class _Entities:
    """Draws entities by type, none twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def draw(self, kind: str) -> str:
        name = distinct(self._rng, kind, 1, self._taken)[0]
        self._taken.add(name)
        return name


def _chain(rng: random.Random, path: list[Relation], entities: _Entities) -> Chain:
    subject = entities.draw(path[0].subject)
    phrase = f"the {subject}" if path[0].subject == "word_pair" else subject
    statements = []
    for relation in path:
        following = entities.draw(relation.object)
        statements.append(rng.choice(relation.statements).format(a=subject, b=following))
        phrase = relation.phrase.format(a=phrase)
        subject = following
    form = _ASKING.get(path[-1].object) or rng.choice(_ASKING_OTHERS)
    return Chain(statements, form.format(phrase=phrase))


def _pointer_chains(rng: random.Random, count: int, hops: int) -> list[Chain]:
    kind = rng.choice(("invented", "word_pair", "plate", "hex"))
    names = distinct(rng, kind, count * (hops + 1))
    form = rng.choice(_POINTERS)
    question = rng.choice(_POINTER_QUESTIONS)
    chains = []
    for start in range(0, len(names), hops + 1):
        stops = names[start : start + hops + 1]
        statements = [form.format(a=a, b=b) for a, b in pairwise(stops)]
        chains.append(Chain(statements, question.format(a=stops[0])))
    return chains
