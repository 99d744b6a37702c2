"""What asking a base will take, before it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.plan import PagesAhead, Plan, Surroundings, Trial, expected
from ..store.layout import StoreBytes
from .manifest import INDEX_FILE, PAGES_FILE, TEXT_FILE

if TYPE_CHECKING:
    from .base import KnowledgeBase


def plan_asking(base: KnowledgeBase, question: str, before: Surroundings) -> Plan:
    """Say what asking all documents of a base takes: pages stay on the disk, their index and texts are held.

    What an answer needs beside them is measured on a question to as many made-up pages as fill the budget. `read_s` is
    what reading the texts anew would take.

    Args:
        before: memory before the base's engine was loaded (`engine.plan.look_around`).
    """
    entries = base.documents
    num_tokens = sum(entry.num_tokens for entry in entries)
    files = {name: sum(entry.files[name].bytes for entry in entries) for name in (INDEX_FILE, PAGES_FILE, TEXT_FILE)}
    copies = 1 if len(entries) == 1 else 2  # several documents' digests are joined beside the files' own
    trial = Trial(base.lm, num_tokens)
    trial.read()
    ahead = PagesAhead(
        num_tokens,
        sum(entry.num_pages for entry in entries),
        StoreBytes(device=0, host=0, disk=files[PAGES_FILE]),
        copies * files[INDEX_FILE] + files[TEXT_FILE],
    )
    return expected(trial, trial.ask(question), ahead, before)
