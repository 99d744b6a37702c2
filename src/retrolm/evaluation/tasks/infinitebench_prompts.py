"""InfiniteBench's prompts and answer limits, in three variants.

Protocol data: "base" and "chat" are the yarn-mistral and gpt4 templates of OpenBMB/InfiniteBench (MIT, src/prompt.py,
src/eval_utils.py); "infllm" is what thunlp/InfLLM (MIT) asks. The RetroLM authors' own harness uses "base" inside a
chat template.
"""

from __future__ import annotations

from dataclasses import dataclass

_OPTIONS = "A. {A}\nB. {B}\nC. {C}\nD. {D}"
_ONE_LETTER = (
    "Only one of the following options is correct, tell me the answer using one single letter (A, B, C, or D). "
    "Don't say anything else.\n"
)
_CHOICE = "Read the book and answer the question.\n\n{context}\n\nQuestion: {question}\n"
_CHAT_CHOICE = _CHOICE + "\n" + _ONE_LETTER + _OPTIONS
_CHAT_SUMMARY = "Summarize the following book.\n\n{context}"
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_QUIZ = "I will quiz you about the important information there.\n\n{context}\n\n{question}"
_PASSKEY = f"{_HIDDEN} and memorize them. {_QUIZ}"
_NUMBER_STRING = f"{_HIDDEN}. {_QUIZ}"
_KEY_VALUE = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{question}"
_MATH_FIND = "What is {target} in the following list?\n\n{context}\n\n{question}"


@dataclass(frozen=True)
class PromptSet:
    """Templates with {context} and {question} (and options or target), and limits on new tokens, by task."""

    templates: dict[str, str]
    max_new_tokens: dict[str, int]


_OFFICIAL_LIMITS = {
    "longbook_qa_eng": 40,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "math_find": 3,
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
}
PROMPT_SETS = {
    "base": PromptSet(
        {
            "longbook_qa_eng": (
                "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
                "Question: {question}\nAnswer:"
            ),
            "longbook_sum_eng": "Summarize the book below.\n\n{context}\n\nSummary:",
            "longbook_choice_eng": _CHOICE + _OPTIONS + "\n\nThe letter of the correct answer is",
            "math_find": _MATH_FIND,
            "passkey": _PASSKEY + "\n\nThe pass key is",
            "number_string": _NUMBER_STRING + "\n\nThe sequence of digits is",
            "kv_retrieval": _KEY_VALUE,
        },
        _OFFICIAL_LIMITS,
    ),
    "chat": PromptSet(
        {
            "longbook_qa_eng": (
                "Read the book below and answer a question.\n\n{context}\n\nQuestion: {question}\n\nBe very concise."
            ),
            "longbook_sum_eng": _CHAT_SUMMARY,
            "longbook_choice_eng": _CHAT_CHOICE,
            "math_find": _MATH_FIND,
            "passkey": _PASSKEY,
            "number_string": _NUMBER_STRING,
            "kv_retrieval": _KEY_VALUE,
        },
        _OFFICIAL_LIMITS,
    ),
    "infllm": PromptSet(
        {
            "longbook_qa_eng": (
                "Read the book below and answer a question.\n\n{context}\n\nQuestion: {question}\n\n"
                "Please answer as short as possible. The answer is:"
            ),
            "longbook_sum_eng": _CHAT_SUMMARY,
            "longbook_choice_eng": _CHAT_CHOICE,
            "math_find": _MATH_FIND,
        },
        {"longbook_qa_eng": 32, "longbook_sum_eng": 1536, "longbook_choice_eng": 32, "math_find": 32},
    ),
}
