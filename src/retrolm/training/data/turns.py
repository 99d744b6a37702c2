"""Passages as turns of a conversation, for questions over meetings and chats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...planting import person, phrases
from .encoder import TextEncoder
from .excerpt import Excerpt
from .sample import TokenArray

_ROLES = phrases(
    """
    Chair | Engineer | Designer | Analyst | Host | Guest | Treasurer | Reviewer | Editor | Scientist | Advisor |
    Clerk | Director | Producer | Speaker A | Speaker B | Speaker C | Speaker D | Member 1 | Member 2 | Member 3
    | Professor | Student | Interviewer | Minister
    """
)
_INTERJECTIONS = phrases(
    """
    Yeah. | Right. | Okay. | Mm-hmm. | Hmm, okay. | Sure. | I see. | Uh, yes. | Go on. | Oh, really? | Exactly.
    | Well, maybe. | Alright then. | I guess so. | Um, let me think. | Could you say more? | That makes sense. |
    Okay, next one. | No, not quite. | Thanks for that.
    """
)
_OPENERS = ("", "", "", "So, ", "Well, ", "Um, ", "Okay, so ", "I mean, ", "Right, ", "You know, ")
_LABELS = ("{name}: ", "{name}: ", "**{name}**: ", "[{name}] ", "{name} - ", "<{name}> ")
_TURN_SENTENCES = (1, 4)
INTERJECTION_SHARE = 0.35


@dataclass(frozen=True)
class Dialogue:
    """Who speaks in one conversation and how speakers are marked; `main` says the evidence."""

    speakers: tuple[str, ...]
    main: str
    label: str

    @classmethod
    def draw(cls, rng: random.Random, main: str | None = None) -> Dialogue:
        """Draw 3 to 8 speakers, all with names or all with roles; `main` is one of them if given."""
        names = draw_speakers(rng)
        speakers = names if main is None else [main, *(name for name in names if name != main)]
        return cls(tuple(speakers), main or speakers[0], rng.choice(_LABELS))

    def turns(self, encoder: TextEncoder, excerpt: Excerpt, by_main: bool, rng: random.Random) -> TokenArray:
        """Return an excerpt as turns of one speaker, with short interjections of others; int32 ids."""
        teller = self.main if by_main else rng.choice(self.speakers)
        parts: list[TokenArray] = []
        for begin, end in _turn_bounds(excerpt.starts, len(excerpt), rng):
            opening = self.label.format(name=teller) + rng.choice(_OPENERS)
            spaced = opening if begin == 0 else opening.rstrip()  # later sentences bring their own space
            parts += [encoder.encode_repeated(spaced), excerpt.ids[begin:end], encoder.encode_repeated("\n")]
            if rng.random() < INTERJECTION_SHARE:
                interjection = self.label.format(name=rng.choice(self.speakers)) + rng.choice(_INTERJECTIONS)
                parts.append(encoder.encode_repeated(f"{interjection}\n"))
        return np.concatenate(parts) if parts else excerpt.ids


def draw_speakers(rng: random.Random) -> list[str]:
    """Draw 3 to 8 different speakers: full names, first names, or roles."""
    count, style = rng.randint(3, 8), rng.random()
    if style < 0.4:
        return rng.sample(_ROLES, count)
    names = [person(rng) for _ in range(count)]
    return list(dict.fromkeys(names if style < 0.7 else [name.split()[0] for name in names]))


def _turn_bounds(starts: Sequence[int], length: int, rng: random.Random) -> list[tuple[int, int]]:
    bounds = []
    begin = 0
    while begin < len(starts):
        step = rng.randint(*_TURN_SENTENCES)
        end = starts[begin + step] if begin + step < len(starts) else length
        bounds.append((starts[begin], end))
        begin += step
    return bounds


def speaker_topic_question(rng: random.Random, speaker: str, topic: str) -> str:
    """Ask what a speaker said about a topic, or what all said."""
    return rng.choice(_QUESTIONS).format(speaker=speaker, topic=topic)


_QUESTIONS = (
    "What did {speaker} say about {topic}?",
    "What was {speaker}'s opinion of {topic}?",
    "Summarise the part of the conversation on {topic}.",
    "How did {speaker} describe {topic}?",
    "What did they discuss regarding {topic}?",
    "Why did {speaker} bring up {topic}?",
    "What was concluded on {topic}?",
    "Describe the exchange on {topic}.",
    "According to {speaker}, what matters in relation to {topic}?",
    "{topic}: what did {speaker} think?",
)
