"""Benchmark tasks: samples for any tokenizer, and scores between 0 and 1.

`get_task("ruler/niah_single_1").samples(tokenizer, 4096, num_samples=25)` gives `EvalSample`s; `Task.score` rates a
prediction. Families: ruler, longbench, longbench-e, longbench-v2, infinitebench, longdoc, longgen.
"""

from .catalogue import expand_tasks, get_task, list_tasks
from .groups import GROUPS
from .prompt import Tokenizer, render
from .sample import EvalSample
from .task import Task

__all__ = ["GROUPS", "EvalSample", "Task", "Tokenizer", "expand_tasks", "get_task", "list_tasks", "render"]
