"""Text metrics of the benchmarks: strings in, a score in [0, 1] out. They know no model and no tokenizer."""

from .choice import longbench_v2_choice, longbook_choice
from .labels import classification_score, code_similarity, count_score, retrieval_score
from .matching import clean_prediction, string_match_all, string_match_part
from .numbers import first_integer, kv_retrieval, math_find
from .qa import normalize_answer, qa_f1, token_f1
from .rouge import rouge_l, rouge_lsum

__all__ = [
    "classification_score",
    "clean_prediction",
    "code_similarity",
    "count_score",
    "first_integer",
    "kv_retrieval",
    "longbench_v2_choice",
    "longbook_choice",
    "math_find",
    "normalize_answer",
    "qa_f1",
    "retrieval_score",
    "rouge_l",
    "rouge_lsum",
    "string_match_all",
    "string_match_part",
    "token_f1",
]
