"""RULER's 13 tasks, generated for any tokenizer and length (Hsieh et al. 2024, arXiv:2404.06654).

Prompts, task settings and scoring follow NVIDIA/RULER (Apache-2.0) as of July 2026. Sample i is drawn from a random
generator of its own, so that a set of 25 samples is the beginning of the set of 500.
"""

from .task import RulerTask, ruler_tasks

__all__ = ["RulerTask", "ruler_tasks"]
