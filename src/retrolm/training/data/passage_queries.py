"""Questions made from passages by rule, without a language model.

Four kinds (`config.PASSAGE_QUERY_KINDS`): questions by pattern ("when was X founded"), keyword queries as typed into a
search engine, cloze questions (a sentence with a part asked for) and whole sentences (the inverse cloze task).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from .question_rules import rule_questions
from .rows import Passage
from .sample import Span
from .sentences import sentence_starts

NUM_COMMON_WORDS = 4000
_COMMON_SHARE = 0.1
MIN_SALIENT_WORDS = 3
MIN_SENTENCE_WORDS, MAX_SENTENCE_WORDS = 7, 45
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")
_YEAR = re.compile(r"1\d{3}|20\d{2}")


@dataclass(frozen=True)
class PassageQuery:
    """A question whose answer is a passage; `cut` is the character span of the sentence that it quotes, or None."""

    kind: str
    query: str
    cut: Span | None = None


def common_words(texts: Iterable[str], count: int = NUM_COMMON_WORDS) -> frozenset[str]:
    """Return the lower-case words that occur in most texts (at most a tenth of all): they say little about one."""
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update({word.lower() for word in _WORD.findall(text)})
    return frozenset(word for word, _ in frequency.most_common(min(count, int(_COMMON_SHARE * len(frequency)))))


def salient_words(text: str, common: frozenset[str]) -> list[re.Match[str]]:
    """Return the words of a text that are not common, in order, each once."""
    seen: set[str] = set()
    found: list[re.Match[str]] = []
    for match in _WORD.finditer(text):
        word = match.group().lower()
        if word not in common and word not in seen and len(word) > 1:
            seen.add(word)
            found.append(match)
    return found


def passage_query(kind: str, passage: Passage, common: frozenset[str], rng: random.Random) -> PassageQuery | None:
    """Make one question of a kind from a passage, or None if the passage doesn't lend itself to it."""
    return _MAKERS[kind](passage, common, rng)


def _rule_question(passage: Passage, common: frozenset[str], rng: random.Random) -> PassageQuery | None:
    questions = rule_questions(passage.text, passage.title)
    if not questions:
        return None
    question = rng.choice(questions)
    style = rng.random()
    if style < 0.45:
        question = question.lower()
    elif style < 0.9:
        question = question[0].upper() + question[1:] + "?"
    return PassageQuery("rule_questions", question)


def _keywords(passage: Passage, common: frozenset[str], rng: random.Random) -> PassageQuery | None:
    words = [match.group() for match in salient_words(passage.text, common)]
    if len(words) < 4:
        return None
    count = rng.randint(2, 5)
    start = rng.randrange(max(1, len(words) - 2 * count))  # words from one place, as one subject would be
    near = words[start : start + 2 * count]
    chosen = [near[i] for i in sorted(rng.sample(range(len(near)), min(count, len(near))))]
    if passage.title and rng.random() < 0.4:
        chosen = [passage.title, *chosen[:2]]
    return PassageQuery("keywords", ", ".join(chosen))


_KEYWORD_FORMS = (
    "{spaced}",
    "{spaced}",
    "{listed}",
    "What is known about {listed}?",
    "Which document is about {listed}?",
    "information on {spaced}",
    "tell me about {listed}",
)


def keyword_question(keywords: str, rng: random.Random) -> str:
    """Turn a list of keywords ("a, b, c") into a query as typed into a search engine, or into a question."""
    form = rng.choice(_KEYWORD_FORMS).format(spaced=keywords.replace(",", ""), listed=keywords)
    return form.lower() if rng.random() < 0.5 else form


def _usable_sentences(text: str) -> list[Span]:
    starts = [*sentence_starts(text), len(text)]
    return [(s, e) for s, e in pairwise(starts) if MIN_SENTENCE_WORDS <= len(text[s:e].split()) <= MAX_SENTENCE_WORDS]


def _sentence(passage: Passage, common: frozenset[str], rng: random.Random) -> PassageQuery | None:
    usable = _usable_sentences(passage.text)
    spans = [(s, e) for s, e in usable if len(salient_words(passage.text[s:e], common)) >= MIN_SALIENT_WORDS]
    if not spans:
        return None
    start, end = rng.choice(spans)
    sentence = passage.text[start:end].rstrip()
    is_only = len(sentence) > 0.6 * len(passage.text)
    return PassageQuery("sentences", sentence, None if is_only else (start, start + len(sentence)))


def _cloze(passage: Passage, common: frozenset[str], rng: random.Random) -> PassageQuery | None:
    spans = _usable_sentences(passage.text)
    rng.shuffle(spans)
    for start, end in spans:
        question = cloze_question(passage.text[start:end].strip(), common, rng)
        if question:
            return PassageQuery("cloze", question)
    return None


def cloze_question(sentence: str, common: frozenset[str], rng: random.Random) -> str | None:
    """Ask for one salient word of a sentence: "Detroit was founded in what year?"; None if it says too little."""
    words = salient_words(sentence, common)
    if len(words) < MIN_SALIENT_WORDS:
        return None
    start, end = _widened(sentence, rng.choice(words))
    before, after = _near(sentence[:start], sentence[end:], rng)
    gap = "____" if rng.random() < 0.3 else _question_words(sentence[start:end], before)
    body = f"{before} {gap}{after}".strip().rstrip(".;:, ")
    if len(_WORD.findall(body.replace(gap, ""))) < MIN_SALIENT_WORDS:
        return None
    return f"{body[0].upper()}{body[1:]}?" if gap != "____" else body


def _widened(sentence: str, match: re.Match[str]) -> Span:
    """Take neighbouring capitalised words into the gap, so that names are asked for whole."""
    start, end = match.span()
    if not match.group()[0].isupper():
        return start, end
    following = re.compile(r"(?: [A-Z][\w'\u2019-]*)*").match(sentence, end)
    preceding = re.search(r"(?:[A-Z][\w'\u2019-]* )*$", sentence[:start])
    return (preceding.start() if preceding else start), (following.end() if following else end)


def _near(before: str, after: str, rng: random.Random) -> tuple[str, str]:
    left = rng.randint(5, 16)
    right = rng.randint(0 if len(before.split()) >= 5 else 6, 12)
    tail = re.findall(r"\S+\s*", after[1:]) if after[:1] == " " else re.findall(r"\S+\s*", after)
    joined = "".join(tail[:right]).rstrip()
    spaced = f" {joined}" if joined and after[:1] == " " else joined
    return " ".join(before.split()[-left:]), spaced


def _question_words(gap: str, before: str) -> str:
    preceding = before.split()[-1].lower() if before.split() else ""
    if _YEAR.fullmatch(gap):
        return "what year"
    if gap[0].isdigit():
        return "how many"
    if gap[0].isupper():
        return {"by": "whom", "in": "which place", "at": "which place", "from": "which place"}.get(
            preceding, "who or what"
        )
    return "what"


_MAKERS: dict[str, Callable[[Passage, frozenset[str], random.Random], PassageQuery | None]] = {
    "rule_questions": _rule_question,
    "keywords": _keywords,
    "cloze": _cloze,
    "sentences": _sentence,
}
