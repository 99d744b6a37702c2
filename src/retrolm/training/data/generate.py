"""Synthetic questions from coherent documents, written by any model behind an OpenAI-compatible endpoint.

A stretch of a document is the background, one to five sentences of it are the evidence, and the model writes a
question that the evidence answers (paper, section on stage-1 data). The result is a file in FlagEmbedding format with
the evidence as answer, so that its place in the background is known.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError
from .rows import Document, content_hash, in_batches
from .sentences import split_sentences

PROMPT = """You write search questions for a reading test.

Background (what the reader has in hand):
<background>
{background}
</background>

Evidence (a part of the background):
<evidence>
{evidence}
</evidence>

Write one question that
- a curious person could ask without having seen the background,
- is answered by the evidence and by nothing else in the background,
- names the people, places or things it is about instead of "he", "it" or "the passage",
- takes one sentence and uses your own words.

If the evidence answers no such question, write NONE. Output the question alone."""
_BACKGROUND_WORDS = 100
_EVIDENCE_SENTENCES = (1, 5)
_MIN_WORDS, _MAX_WORDS = 4, 40
_DEICTIC = re.compile(r"\b(?:passage|background|evidence|excerpt|the text|this story|the author)\b", re.IGNORECASE)
_RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. `url` ends before /chat/completions; the key is read from the environment, never stored.

    Attributes:
        url: base address, such as http://localhost:8000/v1.
        model: the model's name there.
        api_key_variable: environment variable with the key; not sent if it isn't set.
        temperature, max_tokens: of the request.
        timeout_s: for one request. retries: further attempts after a refusal or a broken connection.
        retry_delay_s: wait before the first further attempt; doubled each time.
    """

    url: str
    model: str
    api_key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    max_tokens: int = 128
    timeout_s: float = 120.0
    retries: int = 4
    retry_delay_s: float = 1.0


@dataclass(frozen=True)
class Segment:
    """A background and the evidence in it; `key` names it in the output file."""

    background: str
    evidence: str

    @property
    def key(self) -> str:
        """Hash of background and evidence."""
        return f"{content_hash(f'{self.background} | {self.evidence}'):016x}"


@dataclass
class GenerationCounts:
    """How many questions were written in this and earlier runs, and how many refused for which reason."""

    written: int = 0
    refused: Counter[str] = field(default_factory=Counter)


def segments(documents: Iterable[Document], per_document: int, seed: int) -> Iterator[Segment]:
    """Yield up to `per_document` random segments of each document; the same for the same seed."""
    for document in documents:
        rng = random.Random(f"{seed}:{content_hash(document.text)}")
        sentences = split_sentences(document.text)
        for _ in range(per_document):
            segment = _segment(sentences, rng)
            if segment:
                yield segment


def _segment(sentences: list[str], rng: random.Random) -> Segment | None:
    if not sentences:
        return None
    start = rng.randrange(len(sentences))
    end, words = start, 0
    while end < len(sentences) and words < _BACKGROUND_WORDS:
        words += len(sentences[end].split())
        end += 1
    if words < _BACKGROUND_WORDS:
        return None
    length = min(end - start, rng.randint(*_EVIDENCE_SENTENCES))
    first = rng.randint(start, end - length)
    return Segment(" ".join(sentences[start:end]), " ".join(sentences[first : first + length]))


def ask(endpoint: Endpoint, prompt: str) -> str:
    """Return the model's answer to one prompt.

    Raises `UserError` if the endpoint refuses the request, or can't be reached after all retries.
    """
    for attempt in range(endpoint.retries + 1):
        try:
            return _reply(endpoint, prompt)
        except urllib.error.HTTPError as error:
            problem = f"answered {error.code} ({error.read(200).decode('utf-8', 'replace').strip()})"
            if error.code not in _RETRIED_STATUS:
                break
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            problem = f"can't be reached ({error})"
        if attempt < endpoint.retries:
            time.sleep(endpoint.retry_delay_s * 2**attempt)
    raise UserError(f"The endpoint {endpoint.url} {problem}. Check address, model name and key.")


def _reply(endpoint: Endpoint, prompt: str) -> str:
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(endpoint.api_key_variable):
        headers["Authorization"] = f"Bearer {key}"
    address = f"{endpoint.url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=endpoint.timeout_s) as response:
        return _content(response.read(), endpoint)


def _content(body: bytes, endpoint: Endpoint) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{endpoint.url} didn't answer in the chat-completions format: {body[:200]!r}.") from error
    return content if isinstance(content, str) else ""


def refusal(question: str, segment: Segment) -> str | None:
    """Return why a question is of no use for training, or None if it is fine."""
    words = question.split()
    if question.strip().upper().startswith("NONE"):
        return "no question possible"
    if not _MIN_WORDS <= len(words) <= _MAX_WORDS or "\n" in question.strip():
        return "length"
    if not question.rstrip().endswith("?"):
        return "not a question"
    if _DEICTIC.search(question):
        return "speaks of the passage"
    known = {word.lower() for word in re.findall(r"\w{5,}", segment.background)}
    if not known & {word.lower() for word in re.findall(r"\w{5,}", question)}:
        return "shares no word with the background"
    return "copied" if question.rstrip(" ?").lower() in segment.background.lower() else None


def generate_pairs(
    documents: Iterable[Document],
    endpoint: Endpoint,
    out_path: Path,
    num_pairs: int,
    per_document: int = 4,
    seed: int = 0,
    parallel: int = 4,
    progress: Callable[[int], None] = lambda written: None,
) -> GenerationCounts:
    """Write `num_pairs` rows {"id", "query", "pos", "neg", "answers"} to `out_path` (JSON lines, FlagEmbedding format).

    A broken-off run leaves `<out_path>.partial` and goes on from there with the same arguments. `parallel` requests
    run at a time; the rows' order doesn't depend on it. `progress` gets the number of rows so far. Raises `UserError`
    if the endpoint fails or the documents don't yield a single question.
    """
    partial = out_path.with_name(f"{out_path.name}.partial")
    counts = GenerationCounts()
    done, asked = _read_partial(partial)
    counts.written = len(done)
    todo = (segment for segment in segments(documents, per_document, seed) if segment.key not in done)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as stream, ThreadPoolExecutor(parallel) as pool:
        for batch in in_batches(todo, parallel):
            if counts.written >= num_pairs:
                break
            questions = pool.map(lambda segment: ask(endpoint, _prompt(segment)), batch)
            rows = _accepted(zip(batch, questions, strict=True), asked, counts)
            for row in islice(rows, num_pairs - counts.written):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts.written += 1
            stream.flush()
            progress(counts.written)
    if not counts.written:
        raise UserError(f"No question was written (refused: {dict(counts.refused)}). Give longer documents.")
    os.replace(partial, out_path)
    return counts


def _prompt(segment: Segment) -> str:
    return PROMPT.replace("{background}", segment.background).replace("{evidence}", segment.evidence)


def _accepted(
    answers: Iterable[tuple[Segment, str]], asked: set[int], counts: GenerationCounts
) -> Iterator[dict[str, Any]]:
    for segment, answer in answers:
        question = answer.strip().strip('"').strip()
        reason = refusal(question, segment) or ("duplicate" if content_hash(question) in asked else None)
        if reason:
            counts.refused[reason] += 1
            continue
        asked.add(content_hash(question))
        row = {"id": segment.key, "query": question, "pos": [segment.background], "neg": []}
        yield {**row, "answers": [segment.evidence]}


def _read_partial(path: Path) -> tuple[set[str], set[int]]:
    """Return (segments done, questions asked) of a broken-off run, and cut a half-written last line off its file."""
    if not path.is_file():
        return set(), set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {row["id"] for row in rows}, {content_hash(row["query"]) for row in rows}
