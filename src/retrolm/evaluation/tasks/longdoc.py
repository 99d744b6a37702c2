"""Long-document questions with known evidence: short-document sets packed to any length, papers and meetings.

These aren't published benchmarks: prompts are LongBench's for the same kind of data (msmarco has one of our own), and
each sample tells where its evidence stands, so that retrieval can be measured beside answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ... import metrics
from ...errors import unknown
from .files import Source, find_file, has_file, read_json, read_rows
from .generated import GeneratedTask
from .generator import Draft, Generator, split_template
from .longbench_sets import MEETING_PROMPT, PASSAGES_PROMPT, TEXT_PROMPT
from .packing import (
    ArticleGenerator,
    GoldText,
    PackedQuestion,
    PackGenerator,
    PackStyle,
    hash_texts,
    shuffled,
)
from .prompt import Tokenizer
from .qa_files import HopParagraph, HopQuestion, SquadParagraph, read_multihop, read_squad
from .sample import EvalSample

PASSAGES = PackStyle(PASSAGES_PROMPT, "Passage {number}:\n", "\n")
ARTICLES = PackStyle(TEXT_PROMPT, "", "\n\n")
NUMBERED = PackStyle(
    "Below are numbered paragraphs and a question. Find the paragraph that answers the question.\n\n{context}\n\n"
    'Question: {input}\n\nGive only the number of the paragraph that answers the question, such as "Paragraph 1".\n\n'
    "Answer:",
    "Paragraph {number}: ",
    "\n\n",
    asks_number=True,
)
COVIDQA = Source(
    title="COVID-QA",
    places=("covidqa_longdoc/covidqa.jsonl.gz", "covidqa/COVID-QA.json", "COVID-QA.json"),
    how="COVID-QA.json is in the repository deepset-ai/COVID-QA (data/question-answering).",
)
XQUAD = Source(
    title="XQuAD",
    places=("squad_like_eval/xquad.en.json", "xquad/xquad.en.json", "xquad.en.json"),
    how="xquad.en.json is in the repository deepmind/xquad.",
)
MULTIHOP = Source(
    title="Multi-hop questions",
    places=("multihop_dev/{stem}.jsonl.gz", "multihop/{stem}.jsonl", "multihop/{stem}.json", "{stem}.json"),
    how=(
        "Put the dev set of HotpotQA (distractor), 2WikiMultihopQA or MuSiQue there under that name; their projects "
        "publish them at hotpotqa.github.io, Alab-NII/2wikimultihop and StonyBrookNLP/musique."
    ),
)
CORPUS = Source(
    title="Passages of 2WikiMultihopQA",
    places=("multihop_dev/2wiki_corpus.json.gz", "multihop/2wiki_corpus.json"),
    how="2wikimultihopqa_corpus.json is in the repository OSU-NLP-Group/HippoRAG.",
)
QMSUM = Source(
    title="QMSum",
    places=("qmsum/{stem}.jsonl.gz", "qmsum/{stem}.jsonl", "QMSum/data/ALL/jsonl/{stem}.jsonl"),
    how="The folder data/ALL/jsonl is in the repository Yale-LILY/QMSum.",
)
MSMARCO = Source(
    title="MS MARCO dev queries with passages",
    places=("msmarco_sample/msmarco_dev_300q.jsonl.gz", "msmarco/dev.jsonl"),
    how="Rows need query_id, query and passages of {text, relevance}, best from a BM25 run over MS MARCO's passages.",
)
MULTIHOP_FILES = {"hotpotqa": "hotpot_dev200", "2wikimqa": "2wiki_dev164", "musique": "musique_dev200"}
QMSUM_SPLITS = ("test", "val", "train")


@dataclass(frozen=True)
class LongDocTask(GeneratedTask):
    """One set. `length=None` gives each question its own texts only; a length packs others around them."""

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`."""
        task = self.name.split("/")[1]
        return _BUILDERS[task](task, data_dir, seed)

    def score(self, prediction: str, sample: EvalSample) -> float:
        """Token F1, ROUGE-L (LongBench's) or share of right numbers; best over the answers."""
        if self.metric == "qa_f1":
            return metrics.qa_f1(prediction, sample.answers)
        metric = metrics.rouge_l if self.metric == "rouge_l" else metrics.retrieval_score
        return max(metric(prediction, answer) for answer in sample.answers)


@dataclass(frozen=True)
class MeetingTask(LongDocTask):
    """QMSum isn't packed (most meetings are about the same product): a length leaves out longer meetings.

    Attributes:
        split: "test", "val" or "train".
    """

    split: str = "test"
    options: ClassVar[tuple[str, ...]] = ("split",)

    def generator(self, tokenizer: Tokenizer, length: int | None, seed: int, data_dir: Path | str | None) -> Generator:
        """See `GeneratedTask.generator`."""
        meetings = read_rows(find_file(QMSUM, data_dir, self.split), ("meeting_transcripts", "specific_query_list"))
        return MeetingGenerator(meetings, self.split, seed)

    def with_options(self, options: dict[str, Any]) -> MeetingTask:
        """See `Task.with_options`."""
        changed = super().with_options(options)
        if changed.split not in QMSUM_SPLITS:
            raise unknown("split of QMSum", changed.split, QMSUM_SPLITS)
        return changed


class MeetingGenerator(Generator):
    """Questions about one part of a meeting; the turns of that part are the evidence."""

    fit_each = True
    fills = False

    def __init__(self, meetings: list[dict[str, Any]], split: str, seed: int) -> None:
        places = [(m, q) for m, meeting in enumerate(meetings) for q in range(len(meeting["specific_query_list"]))]
        self._places: list[tuple[int, int]] = shuffled(places, random.Random(seed))
        self._queries = [meeting["specific_query_list"] for meeting in meetings]
        self._meetings = [_turns(meeting) for meeting in meetings]
        self._split = split

    def facts(self) -> dict[str, Any]:
        """See `Generator`."""
        return {"texts": hash_texts(["\n".join(turns) for turns in self._meetings])}

    def num_samples(self) -> int | None:
        """See `Generator`."""
        return len(self._places)

    def largest(self, index: int) -> int | None:
        """See `Generator`: there is only the meeting."""
        return 0

    def natural_size(self, index: int) -> int | None:
        """See `Generator`."""
        return 0

    def draft(self, size: int, index: int, rng: random.Random) -> Draft:
        """See `Generator`."""
        meeting, number = self._places[index]
        turns, query = self._meetings[meeting], self._queries[meeting][number]
        context, tail = split_template(MEETING_PROMPT, "\n".join(turns), input=query["query"])
        start = len(context) - len("\n".join(turns))
        spans = [_turn_span(turns, start, int(first), int(last)) for first, last in query["relevant_text_span"]]
        return Draft(context, tail, "", [query["answer"].strip()], spans, {"id": f"{self._split}-{meeting}-{number}"})


def _turns(meeting: dict[str, Any]) -> list[str]:
    return [f"{turn['speaker']}: {turn['content']}" for turn in meeting["meeting_transcripts"]]


def _turn_span(turns: list[str], start: int, first: int, last: int) -> tuple[int, int]:
    """Character range of turns `first` to `last`, both included."""
    begin = start + sum(len(turn) + 1 for turn in turns[:first])
    return begin, begin + len("\n".join(turns[first : last + 1]))


def _multihop(task: str, data_dir: Path | str | None, seed: int) -> Generator:
    rows = read_multihop(find_file(MULTIHOP, data_dir, MULTIHOP_FILES[task]))
    pool = sorted({_titled(part) for row in rows for part in row.paragraphs})
    return PackGenerator([_hop_packed(row) for row in rows], [pool, _corpus(data_dir)], PASSAGES, seed)


def _hop_packed(row: HopQuestion) -> PackedQuestion:
    gold = [GoldText(_titled(part), [(0, len(_titled(part)))]) for part in row.paragraphs if part.gold]
    own = [_titled(part) for part in row.paragraphs if not part.gold]
    return PackedQuestion(row.id, row.text, row.answers, gold, own)


def _titled(part: HopParagraph) -> str:
    return f"{part.title}\n{part.text}"


def _corpus(data_dir: Path | str | None) -> list[str]:
    """Passages to fill longer contexts with, where they are at hand."""
    if not has_file(CORPUS, data_dir):
        return []
    return [f"{row['title']}\n{row['text']}" for row in read_json(find_file(CORPUS, data_dir))]


def _xquad(task: str, data_dir: Path | str | None, seed: int) -> Generator:
    paragraphs = read_squad(find_file(XQUAD, data_dir))
    pool = [paragraph.text for paragraph in paragraphs]
    questions = [packed for paragraph in paragraphs for packed in _squad_packed(paragraph, paragraphs)]
    return PackGenerator(questions, [pool, _corpus(data_dir)], PASSAGES, seed)


def _covidqa(task: str, data_dir: Path | str | None, seed: int) -> Generator:
    papers = read_squad(find_file(COVIDQA, data_dir))
    questions = [packed for paper in papers for packed in _squad_packed(paper, [])]
    return ArticleGenerator(questions, [paper.text for paper in papers], ARTICLES, seed)


def _squad_packed(paragraph: SquadParagraph, others: list[SquadParagraph]) -> list[PackedQuestion]:
    own = [other.text for other in others if other.article == paragraph.article and other.text != paragraph.text]
    return [
        PackedQuestion(
            question.id,
            question.text,
            question.answers,
            [GoldText(paragraph.text, [(question.start, question.start + len(question.answers[0]))])],
            own,
        )
        for question in paragraph.questions
        if question.start is not None
    ]


def _msmarco(task: str, data_dir: Path | str | None, seed: int) -> Generator:
    rows = read_rows(find_file(MSMARCO, data_dir), ("query_id", "query", "passages"))
    pool = sorted({passage["text"] for row in rows for passage in row["passages"]})
    questions = [_msmarco_packed(row) for row in rows if any(passage["relevance"] for passage in row["passages"])]
    return PackGenerator(questions, [pool], NUMBERED, seed)


def _msmarco_packed(row: dict[str, Any]) -> PackedQuestion:
    relevant = [passage["text"] for passage in row["passages"] if passage["relevance"]]
    own = [passage["text"] for passage in row["passages"] if not passage["relevance"]]
    gold = [GoldText(text, [(0, len(text))]) for text in relevant]
    return PackedQuestion(str(row["query_id"]), row["query"], [], gold, own)


_BUILDERS: dict[str, Callable[[str, Path | str | None, int], Generator]] = {
    "covidqa": _covidqa,
    "xquad": _xquad,
    "hotpotqa": _multihop,
    "2wikimqa": _multihop,
    "musique": _multihop,
    "msmarco": _msmarco,
}


def longdoc_tasks() -> list[LongDocTask]:
    """Seven sets: five scored by F1, meeting summaries by ROUGE-L, and the number of the answering paragraph."""
    answers = [LongDocTask(f"longdoc/{task}", 32, "qa_f1") for task in ("xquad", *MULTIHOP_FILES)]
    return [
        LongDocTask("longdoc/covidqa", 64, "qa_f1"),
        *answers,
        MeetingTask("longdoc/qmsum", 512, "rouge_l"),
        LongDocTask("longdoc/msmarco", 16, "retrieval"),
    ]
