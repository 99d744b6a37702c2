"""Questions with known evidence, as token ids with gold pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...engine.model import RetroLM
from ...engine.page_batch import PageBatch, page_batch
from ...metrics.gold_pages import evidence_pages
from ..tasks.sample import EvalSample

MAX_GOLD_PAGES = 4


@dataclass(frozen=True)
class RetrievalCase:
    """One question: pages of its text, and which of them hold the evidence (page 0 = first text page).

    Attributes:
        spans: token ranges of the evidence in the text, half open.
    """

    sample_id: str
    batch: PageBatch
    gold: frozenset[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        return self.batch.lengths_BM.shape[1] - 1


def retrieval_cases(lm: RetroLM, samples: Iterable[EvalSample]) -> tuple[list[RetrievalCase], dict[str, int]]:
    """Turn samples with gold spans into cases.

    Returns:
        The cases, and how many samples were left out by reason: no evidence known, more than 4 gold pages, or evidence
        only in the last page (which is always attended).
    """
    cases: list[RetrievalCase] = []
    left_out = {"no_evidence": 0, "many_gold_pages": 0, "in_forced_page": 0}
    for sample in samples:
        case = retrieval_case(lm, sample)
        if not case.gold:
            left_out["no_evidence"] += 1
        elif len(case.gold) > MAX_GOLD_PAGES:
            left_out["many_gold_pages"] += 1
        elif case.num_pages - 1 in case.gold:
            left_out["in_forced_page"] += 1
        else:
            cases.append(case)
    return cases, left_out


def retrieval_case(lm: RetroLM, sample: EvalSample) -> RetrievalCase:
    """Cut one sample into pages, in the format that `lm.format` says; without gold spans `gold` is empty."""
    found = lm.tokenizer(sample.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = found["offset_mapping"]
    spans = []
    for start, end in sample.gold_spans:
        inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    gold, _ = evidence_pages(spans, lm.config.page_size)
    assert lm.format is not None
    tail = lm.format.tail if sample.chat else ""
    question = lm.format.encode(sample.question + tail + sample.answer_prefix)
    batch = page_batch(lm.format.prefix_ids, [found["input_ids"]], [question], lm.config.page_size, lm.pad_id)
    return RetrievalCase(sample.sample_id, batch, frozenset(gold), tuple(spans))
