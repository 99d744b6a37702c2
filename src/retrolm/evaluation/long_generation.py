"""Long generation: how far methods stray from full attention in an answer of thousands of tokens.

Full attention writes an answer of fixed length to each sample, its ends ruled out. Every other column then runs one
batch: half of its rows are told that answer token by token (agreement, perplexity), the other half answers by itself
(score). Time per token is that of the batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.memory import PeakMemory
from ..engine.model import RetroLM
from ..engine.results import Answer
from ..errors import UserError
from ..methods.retro_exposure import ExposureMeter, Revises
from .dictation import Dictation
from .generation_columns import Column, ColumnOpener
from .journal import Journal
from .readers import GREEDY, prompt_of, sample_format
from .rows import digest
from .tasks import EvalSample, Task
from .variants import OpenVariant

FORMAT = 1
ROWS_FILE = "generation.jsonl"
_STRETCH = 512
_CHUNK = 256


@dataclass(frozen=True)
class GenerationSet:
    """One sample per seed, and how many tokens each column generates."""

    task: Task
    length: int | None
    samples: dict[int, EvalSample]
    num_tokens: int


@dataclass(frozen=True)
class Generated:
    """What one column generated: rows as in `Dictation`, answers of the same rows, and what it took."""

    dictation: Dictation
    answers: list[Answer]
    exposure: list[float]
    measured: dict[str, Any]


def generation_set(
    task: Task, tokenizer: Any, length: int | None, seeds: Sequence[int], num_tokens: int
) -> GenerationSet:
    """One sample of the task per seed, with room for answers of `num_tokens`; raises `UserError` for fewer than two."""
    if num_tokens < 2:
        raise UserError(f"num_tokens must be at least 2, got {num_tokens}.")
    task = dataclasses.replace(task, max_new_tokens=num_tokens)
    samples = {seed: task.samples(tokenizer, length, 1, seed)[0] for seed in seeds}
    return GenerationSet(task, length, samples, num_tokens)


def budget_of(lm: RetroLM, samples: Sequence[EvalSample], share: float, page_size: int) -> int:
    """A share of the shortest prompt, in whole pages; raises `UserError` where that is under three pages."""
    if not 0 < share <= 1:
        raise UserError(f"The budget's share must be above 0 and at most 1, got {share}.")
    shortest = min(len(prompt_of(lm, sample).ids) for sample in samples)
    budget = int(share * shortest) // page_size * page_size
    if budget < 3 * page_size:
        raise UserError(
            f"A share of {share} of {shortest} prompt tokens is under three pages of {page_size} tokens. Use a longer "
            "text, a larger share or smaller pages."
        )
    return budget


class LongGeneration:
    """Measures columns into a folder, one row per column and seed; what is there is not measured again.

    Args:
        provenance: facts of this run for its rows. on_rows: called with the rows of each column.
    """

    def __init__(
        self,
        opener: ColumnOpener,
        part: GenerationSet,
        out: Path,
        provenance: dict[str, Any],
        on_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> None:
        self._opener = opener
        self._part = part
        self._out = out
        self._provenance = provenance
        self._on_rows = on_rows

    def run(self, columns: Sequence[Column]) -> list[dict[str, Any]]:
        """The rows of all columns, full attention's first.

        Raises:
            UserError: the folder is in use, or a column can't be opened. BudgetError: a budget was overrun.
        """
        for column in columns:
            with self._opener.open(column):
                pass  # what can't be opened is refused before any work is done
        found: list[dict[str, Any]] = []
        teacher: list[dict[str, Any]] = []
        with Journal(self._out / ROWS_FILE) as journal:
            for column in columns:
                with self._opener.open(column) as opened:
                    rows = self._column(journal, column, opened, teacher)
                teacher = teacher or rows
                found += rows
                self._on_rows(rows)
        return found

    def _column(
        self, journal: Journal, column: Column, opened: OpenVariant, teacher: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        heads = [self._head(column, opened, i, teacher) for i in range(len(self._part.samples))]
        if not all(head["key"] in journal.rows for head in heads):
            found = generate(opened.lm, self._part, teacher)
            for row, head in enumerate(heads):
                own = self._row(opened.lm, found, row, teacher)
                journal.append({**head, **own, **found.measured, **self._provenance})
        return [journal.rows[head["key"]] for head in heads]

    def _head(self, column: Column, opened: OpenVariant, row: int, teacher: list[dict[str, Any]]) -> dict[str, Any]:
        seed, sample = list(self._part.samples.items())[row]
        identity = {
            "format": FORMAT,
            "task": self._part.task.name,
            "length": self._part.length,
            "num_generated": self._part.num_tokens,
            "num_rows": 2 * len(self._part.samples),
            "generation": GREEDY,
            "column": column.name,
            **opened.facts,
        }
        own = {"seed": seed, "sample": digest(sample.to_json())}
        own["continuation"] = digest(teacher[row]["token_ids"]) if teacher else None
        return {"key": digest({**identity, **own}), "config_hash": digest(identity), **identity, **own}

    def _row(self, lm: RetroLM, found: Generated, row: int, teacher: list[dict[str, Any]]) -> dict[str, Any]:
        """Figures of one sample: its dictated row, and the one that answered by itself."""
        dictation, num_samples = found.dictation, len(self._part.samples)
        sample, free = list(self._part.samples.values())[row], row + num_samples
        said, losses, agrees = dictation.said(), dictation.losses()[row], dictation.agrees()[row]
        if not teacher:
            agrees = agrees_in_one_pass(lm, prompt_of(lm, sample).ids, said[row])
        told = said[row] if not teacher else torch.tensor(teacher[row]["token_ids"])
        natural = dictation.ends()[row] if not teacher else teacher[row]["num_to_end"]
        answer, end = found.answers[free], dictation.ends()[free]
        text = lm.tokenizer.decode(said[free, :end].tolist(), skip_special_tokens=True)
        return {
            "num_tokens": len(prompt_of(lm, sample).ids),
            **_figures(agrees, losses, natural),
            "full_perplexity": teacher[row]["perplexity"] if teacher else _perplexity(losses),
            "exposure": found.exposure[row],
            "score": self._part.task.score(text, sample),
            "extra_scores": self._part.task.extra_scores(text, sample),
            "num_to_end_free": end,
            "num_same": int((said[free] == told).int().cumprod(0).sum()),
            "repeated": _repeated(said[free, :end].tolist()),
            "attended_tokens": dict(answer.attended_tokens),
            "kv_bytes": dict(answer.kv_bytes),
            "decode_path": answer.decode_path,
            "ttft_s": answer.timings.prefill_s + answer.timings.ttft_s,
            "prediction": text,
            **({} if teacher else {"token_ids": said[row].tolist()}),
        }


def generate(lm: RetroLM, part: GenerationSet, teacher: list[dict[str, Any]]) -> Generated:
    """One batch of each sample twice: told what `teacher` rows say (nobody, if there are none), then free."""
    samples = list(part.samples.values())
    prompts = [prompt_of(lm, sample) for sample in samples] * 2
    lm.format = sample_format(lm, samples[0])
    told = torch.tensor([row["token_ids"] for row in teacher], dtype=torch.int64).reshape(len(teacher), part.num_tokens)
    dictation = Dictation(told, len(prompts), part.num_tokens, lm.eos_ids)
    meter = ExposureMeter()
    if isinstance(lm.method, Revises):
        lm.method.meter = meter
    with PeakMemory([info.device for info in lm.backbone.layers]) as memory:
        started = time.perf_counter()
        answers = lm.answer(
            prompts, max_new_tokens=part.num_tokens, logits_processor=[dictation], eos_token_id=None, **GREEDY
        )
        lm.wait()
        finished = time.perf_counter()
    together = (finished - dictation.first_at) / (part.num_tokens - 1)
    apart = sum(answer.timings.tpot_s for answer in answers) / len(answers)
    measured = {
        "tpot_s": together if dictation.num_parts == 1 else apart,
        "total_s": finished - started,
        "batch_size": len(prompts) // dictation.num_parts,
        "peak_device_bytes": memory.device_peak_bytes,
        "peak_host_bytes": memory.host_peak_bytes,
    }
    return Generated(dictation, answers, meter.by_sample() or [1.0] * len(prompts), measured)


@torch.no_grad()
def agrees_in_one_pass(lm: RetroLM, prompt_ids: Sequence[int], said_T: Tensor) -> Tensor:
    """Whether full attention, reading prompt and answer in one pass, would say the same, bool [T]: rounding's share."""
    ids = torch.tensor([[*prompt_ids, *said_T.tolist()]], device=lm.device)
    hidden_TC = lm.backbone.decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt_ids) - 1 : -1]
    head: Any = lm.model.get_output_embeddings()
    found = []
    for rows in hidden_TC.split(_CHUNK):
        logits = head(rows.to(head.weight.device)).float()
        logits[:, list(lm.eos_ids)] = -torch.inf
        found.append(logits.argmax(-1).cpu())
    return torch.cat(found) == said_T


def _figures(agrees_T: Tensor, losses_T: Tensor, natural: int) -> dict[str, Any]:
    """Agreement and perplexity of all tokens, of those before the answer's own end, and by position."""
    bounds = [*range(0, len(losses_T), _STRETCH), len(losses_T)]
    return {
        "agreement": float(agrees_T.double().mean()),
        "perplexity": _perplexity(losses_T),
        "num_to_end": natural,
        "to_end": _pair(agrees_T[:natural], losses_T[:natural]) if natural else None,
        "by_position": {f"{a}-{b}": _pair(agrees_T[a:b], losses_T[a:b]) for a, b in pairwise(bounds)},
    }


def _pair(agrees_T: Tensor, losses_T: Tensor) -> dict[str, float]:
    return {"agreement": float(agrees_T.double().mean()), "perplexity": _perplexity(losses_T)}


def _perplexity(losses_T: Tensor) -> float:
    return float(losses_T.double().mean().exp())


def _repeated(ids: list[int], size: int = 16) -> float:
    """Share of the stretches of `size` tokens that stood in the answer before: a model that goes round in circles."""
    seen, again = set[tuple[int, ...]](), 0
    places = range(len(ids) - size + 1)
    for start in places:
        stretch = tuple(ids[start : start + size])
        again += stretch in seen
        seen.add(stretch)
    return again / max(len(places), 1)
