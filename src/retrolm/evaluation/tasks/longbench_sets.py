"""LongBench's English data sets: prompts, limits and metrics.

Prompts and limits are protocol data of THUDM/LongBench (MIT), LongBench/config/dataset2prompt.json and
dataset2maxlen.json, and stay as they are there, slips of the pen included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal["qa_f1", "rouge_l", "classification", "count", "retrieval", "code_similarity"]


@dataclass(frozen=True)
class LongBenchSet:
    """How one data set is asked and scored.

    Attributes:
        prompt: template with {context} and, mostly, {input}.
        chat: whether the prompt goes into the chat template (few-shot and code prompts are plain continuations).
        first_line: only the first non-empty line of the answer is scored.
        asks: what counts as the question when the prompt is split in two (the prompt itself stays the same): all that
            follows {context}, or only from the last "Question:" on (triviaqa puts its passage in front of it), or the
            last ten lines of code.
    """

    prompt: str
    max_new_tokens: int
    metric: Metric
    chat: bool = True
    first_line: bool = False
    asks: Literal["tail", "question", "lines"] = "tail"


PASSAGES_PROMPT = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
MEETING_PROMPT = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one "
    "or more sentences.\n\nQuery: {input}\nAnswer:"
)
TEXT_PROMPT = (
    "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
    "text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)


def _code_set(tail: str) -> LongBenchSet:
    prompt = "Please complete the code given below. \n{context}" + tail
    return LongBenchSet(prompt, 64, "code_similarity", chat=False, asks="lines")


SETS = {
    "narrativeqa": LongBenchSet(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. "
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "qasper": LongBenchSet(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: {context}\n\n"
        " Answer the question based on the above article as concisely as you can, using a single phrase or sentence "
        "if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "multifieldqa_en": LongBenchSet(TEXT_PROMPT, 64, "qa_f1"),
    "hotpotqa": LongBenchSet(PASSAGES_PROMPT, 32, "qa_f1"),
    "2wikimqa": LongBenchSet(PASSAGES_PROMPT, 32, "qa_f1"),
    "musique": LongBenchSet(PASSAGES_PROMPT, 32, "qa_f1"),
    "gov_report": LongBenchSet(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": LongBenchSet(MEETING_PROMPT, 512, "rouge_l"),
    "multi_news": LongBenchSet(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "trec": LongBenchSet(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "classification",
        chat=False,
        first_line=True,
    ),
    "triviaqa": LongBenchSet(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n{context}\n\n{input}",
        32,
        "qa_f1",
        chat=False,
        first_line=True,
        asks="question",
    ),
    "samsum": LongBenchSet(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "rouge_l",
        chat=False,
        first_line=True,
    ),
    "passage_count": LongBenchSet(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should only "
        "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": LongBenchSet(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "lcc": _code_set("Next line of code:\n"),
    "repobench-p": _code_set("{input}Next line of code:\n"),
}
EXTENDED_SETS = tuple(name for name in SETS if name not in ("narrativeqa", "musique", "qmsum"))
