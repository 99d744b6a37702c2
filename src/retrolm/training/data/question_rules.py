"""Patterns that turn a statement about a subject into questions people ask about it."""

from __future__ import annotations

import re

from ...planting import words
from .sentences import split_sentences

_SUBJECT = re.compile(r"^(?P<subject>[^,;:.]{2,60}?),? (?:is|are|was|were|refers to|consists of|has|have) ")
_PRONOUNS = frozenset(
    words("it he she they this that these those there we i you his her its their here in on at as of")
)
_ACTIVE = {
    "founded": "founded",
    "built": "built",
    "directed": "directed",
    "written": "wrote",
    "produced": "produced",
    "designed": "designed",
    "invented": "invented",
    "discovered": "discovered",
    "created": "created",
    "developed": "developed",
    "published": "published",
    "owned": "owns",
    "composed": "composed",
    "led": "led",
    "painted": "painted",
    "performed": "performed",
    "recorded": "recorded",
}
_DATED = (
    "founded|established|built|opened|released|published|launched|created|formed|invented|discovered|written|"
    "introduced|signed|completed|elected|appointed|named|abolished|recorded|adopted|incorporated"
)
_RULES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"\b(?:was|is|were) born\b|\(born\b|\(b\. "), ("when was {s} born", "what is the birth date of {s}")),
    (re.compile(r"\bborn[^.]{0,40} in [A-Z][a-z]+"), ("where was {s} born", "what is the birthplace of {s}")),
    (re.compile(r"\bdied (?:on|in|at)\b"), ("when did {s} die", "how did {s} die")),
    (
        re.compile(r"\b(?:located|situated|based|headquartered|lies) (?:in|on|near)\b"),
        ("where is {s}", "where is {s} located"),
    ),
    (
        re.compile(r"\b(?:also|formerly|sometimes|commonly) (?:known|called|referred)"),
        ("what is another name for {s}",),
    ),
    (re.compile(r"\bpopulation\b"), ("what is the population of {s}", "how many people live in {s}")),
    (re.compile(r"\b(?:caused by|causes|results from)\b"), ("what causes {s}", "what is the cause of {s}")),
    (re.compile(r"\bused (?:to|for|in|as)\b"), ("what is {s} used for", "what do people use {s} for")),
    (
        re.compile(r"\b(?:consists? of|made (?:up )?of|composed of)\b"),
        ("what does {s} consist of", "what is {s} made of"),
    ),
    (re.compile(r"\b(?:stars?|starring)\b"), ("who stars in {s}", "cast of {s}")),
    (re.compile(r"\b(?:won|awarded|Award|Prize)\b"), ("what award did {s} win", "what did {s} win")),
    (re.compile(r"\b(?:costs?|priced? at|\$\d)"), ("how much does {s} cost", "{s} price")),
    (
        re.compile(r"\btakes? (?:about |around |up to )?\w+ (?:minutes|hours|days|weeks|months|years)"),
        ("how long does {s} take",),
    ),
    (
        re.compile(r"\bis an? [A-Z][a-z]+(?:ese|ish|ian|ican|ch|an) "),
        ("what nationality is {s}", "which country is {s} from"),
    ),
    (re.compile(r"\btreat(?:ed|ment)\b"), ("how is {s} treated", "treatment of {s}")),
    (re.compile(r"\bsymptoms?\b"), ("what are the symptoms of {s}", "signs of {s}")),
    (re.compile(r"\bcapital\b"), ("what is the capital of {s}",)),
    (re.compile(r"\bmarried\b|\bwife\b|\bhusband\b"), ("who is {s} married to", "who was the spouse of {s}")),
    (re.compile(r"\b(?:son|daughter) of\b"), ("who were the parents of {s}", "who is the father of {s}")),
    (
        re.compile(r"\b(?:largest|tallest|longest|oldest|smallest|highest)\b"),
        ("how big is {s}", "what is special about {s}"),
    ),
)
_DEFINITION = re.compile(r"\b(?:is|are|was|were|refers to) (?:an?|the|one of)\b")
_PERSON = re.compile(
    r"\b(?:born|actor|actress|politician|singer|player|writer|director|king|queen|composer|s?he|his|her)\b"
)
_THING_FORMS = ("what is {s}", "what does {s} mean", "{s} definition", "explain {s}", "{s}")
_PERSON_FORMS = ("who is {s}", "who was {s}", "what is {s} known for", "{s}", "{s} biography")


def rule_questions(text: str, title: str) -> list[str]:
    """Return all questions whose pattern the first two sentences of a passage match, unpunctuated; may be empty."""
    opening = " ".join(split_sentences(text)[:2])
    subject = subject_of(opening, title)
    if not subject:
        return []
    forms = [form for pattern, forms in _RULES if pattern.search(opening) for form in forms]
    forms += _verb_forms(opening)
    if _DEFINITION.search(opening):
        forms += _PERSON_FORMS if _PERSON.search(opening) else _THING_FORMS
    return [form.format(s=subject) for form in forms]


def subject_of(opening: str, title: str) -> str | None:
    """Return what a passage is about: its title if the opening mentions it, else the subject of the first sentence."""
    name = re.sub(r"\s*\([^)]*\)", "", title).strip()
    if name and name.split()[-1].lower() in opening.lower():
        return name
    match = _SUBJECT.match(re.sub(r"\s*\([^)]*\)", "", opening))
    subject = match["subject"].strip(" \"'`") if match else ""
    is_plain = 0 < len(subject.split()) <= 7 and subject.split()[0].lower() not in _PRONOUNS
    return subject if is_plain else None


def _verb_forms(opening: str) -> list[str]:
    forms: list[str] = []
    for match in re.finditer(rf"\b({_DATED})\b[^.]{{0,30}}? (?:in|on) [^.]{{0,20}}\d{{4}}", opening):
        forms += [f"when was {{s}} {match[1]}", f"what year was {{s}} {match[1]}"]
    for match in re.finditer(rf"\b({'|'.join(_ACTIVE)}) by\b", opening):
        forms += [f"who {_ACTIVE[match[1]]} {{s}}", f"{{s}} was {match[1]} by whom"]
    return forms
