"""All tasks by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from ...errors import unknown
from .groups import GROUPS
from .infinitebench import infinitebench_tasks
from .longbench import longbench_tasks
from .longbench_v2 import longbench_v2_tasks
from .longdoc import longdoc_tasks
from .longgen import longgen_tasks
from .many_keys import many_keys_tasks
from .ruler import ruler_tasks
from .task import Task


@cache
def _tasks() -> dict[str, Task]:
    official = (ruler_tasks(), longbench_tasks(), longbench_v2_tasks(), infinitebench_tasks())
    families = (*official, longdoc_tasks(), longgen_tasks(), many_keys_tasks())
    return {task.name: task for family in families for task in family}


def list_tasks() -> list[str]:
    """Names of all tasks, by family."""
    return list(_tasks())


def get_task(name: str, **options: Any) -> Task:
    """Return a task by its full name, with options of its own set.

    Raises `UserError` for an unknown task or option, with the closest name.
    """
    if name not in _tasks():
        raise unknown("task", name, _tasks())
    return _tasks()[name].with_options(options)


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Replace groups ("ruler-needles") by their tasks; each task once, in the order of first mention.

    Raises `UserError` for a name that is neither a task nor a group.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in GROUPS and name not in _tasks():
            raise unknown("task or group", name, [*_tasks(), *GROUPS])
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(found)
