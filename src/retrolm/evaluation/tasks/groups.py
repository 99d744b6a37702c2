"""Names that stand for several tasks, mostly the rows and columns of the paper's tables."""

from __future__ import annotations

from .infinitebench import infinitebench_tasks
from .longbench_sets import EXTENDED_SETS, SETS
from .longdoc import longdoc_tasks
from .ruler import ruler_tasks
from .ruler.needles import NEEDLE_TASKS

_QA6 = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
_PAPER12 = (*_QA6, "gov_report", "multi_news", "qmsum", "trec", "triviaqa", "samsum")
_PAPER4 = ("longbook_qa_eng", "longbook_sum_eng", "longbook_choice_eng", "math_find")

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": tuple(task.name for task in ruler_tasks()),
    "ruler-needles": tuple(f"ruler/{task}" for task in NEEDLE_TASKS),
    "longbench": tuple(f"longbench/{name}" for name in SETS),
    "longbench-paper12": tuple(f"longbench/{name}" for name in _PAPER12),
    "longbench-qa6": tuple(f"longbench/{name}" for name in _QA6),
    "longbench-e": tuple(f"longbench-e/{name}" for name in EXTENDED_SETS),
    "longbench-v2": ("longbench-v2/all",),
    "infinitebench": tuple(task.name for task in infinitebench_tasks()),
    "infinitebench-paper4": tuple(f"infinitebench/{name}" for name in _PAPER4),
    "longdoc": tuple(task.name for task in longdoc_tasks()),
    "longdoc-qa": tuple(task.name for task in longdoc_tasks() if task.metric == "qa_f1"),
}
