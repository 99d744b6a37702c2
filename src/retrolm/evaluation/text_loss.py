"""Language-model loss on held-out texts: page methods under causal selection (D22), and full attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.model import RetroLM
from ..engine.prompts import prompt_format
from ..engine.text_files import read_text_file
from ..engine.text_loss import sparse_program, token_losses
from ..errors import UserError
from ..methods import PageMethod
from .adapters import AdapterLoader
from .rows import digest
from .statistics import score_interval
from .tasks.files import iter_rows
from .variants import Variant

STRETCHES = (0, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class LossSet:
    """Pieces of texts, one document each.

    Attributes:
        pieces: token ids [T] with the prefix in front. num_prefix: tokens with a page of their own, not predicted.
        name: what the rows call it. sha: hash of the pieces.
    """

    pieces: list[Tensor]
    num_prefix: int
    name: str
    sha: str


def loss_set(path: Path, tokenizer: Any, num_tokens: int, num_pieces: int, chat_prefix: bool) -> LossSet:
    """Cut the documents of a file into pieces of exactly `num_tokens` and take the first of each document, then the
    second, …

    Args:
        path: JSON lines of {"text"} (.gz, .zst too), or a text.
        chat_prefix: put the chat template's head in front, as a page of its own; else BOS where the tokenizer has one.

    Raises:
        UserError: nothing there, or no document is that long.
    """
    if not path.is_file():
        raise UserError(f"No file {path}. Give a text, or JSON lines with a field 'text'.")
    texts = [row.get("text", "") for row in iter_rows(path)] if ".jsonl" in path.suffixes else [read_text_file(path)]
    head = list(prompt_format(tokenizer, chat=chat_prefix).prefix_ids)
    size = num_tokens - len(head)
    cuts = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cuts.append([torch.tensor(head + ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)])
    longest = max(map(len, cuts), default=0)
    pieces = [cut[turn] for turn in range(longest) for cut in cuts if turn < len(cut)][:num_pieces]
    if not pieces:
        raise UserError(f"No document of {path} has {num_tokens} tokens. Use a smaller --length.")
    sha = digest([piece.tolist() for piece in pieces])
    return LossSet(pieces, len(head) if chat_prefix else 0, path.name, sha)


@torch.no_grad()
def piece_losses(lm: RetroLM, piece_T: Tensor, num_prefix: int) -> Tensor:
    """Loss of each predicted token, float32 or wider [L], on the CPU; page methods choose pages causally.

    Raises:
        UserError: a method that neither chooses pages nor attends everything.
    """
    if lm.method.kind == "dense":
        bookmark = lm.untrained_bookmark()
        return token_losses(lm.backbone, piece_T, None, bookmark, num_prefix).cpu()
    if not isinstance(lm.method, PageMethod):
        raise UserError(f"The loss of method {lm.method.name!r} isn't measured: use page methods, or full.")
    bookmark = lm.untrained_bookmark() if lm.retriever is None else lm.retriever.embedding
    program = sparse_program(lm, lm.config.replace(causal_selection=True), len(piece_T), num_prefix)
    with lm.attachment.run(program):
        return token_losses(lm.backbone, piece_T, program, bookmark, num_prefix).cpu()


def measure_losses(
    loader: AdapterLoader,
    variants: Sequence[Variant],
    texts: LossSet,
    facts: dict[str, Any],
    on_row: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """One row per variant.

    Args:
        facts: what rows state besides (provenance). on_row: called with each row.
    """
    rows = []
    for variant in variants:
        opened = loader.open(variant)
        started = time.perf_counter()
        losses = [piece_losses(opened.lm, piece, texts.num_prefix) for piece in texts.pieces]
        seconds = time.perf_counter() - started
        row = {**opened.facts, "options": {**opened.facts["options"], "causal_selection": True}}
        row |= {
            "task": "lm_loss",
            "documents": texts.name,
            "pieces_sha": texts.sha,
            "chat_prefix": texts.num_prefix > 0,
        }
        row |= {**_figures(losses), "total_s": round(seconds, 3), **facts}
        rows.append(row)
        on_row(row)
    return rows


def _figures(losses: list[Tensor]) -> dict[str, Any]:
    per_piece = [float(piece.double().mean()) for piece in losses]
    low, high = score_interval(per_piece)
    return {
        "num_tokens": len(losses[0]),
        "num_pieces": len(losses),
        "loss": sum(per_piece) / len(per_piece),
        "loss_ci": [low, high],
        "loss_by_piece": [round(value, 6) for value in per_piece],
        "loss_by_position": _stretches(torch.stack(losses).double().mean(0)),
    }


def _stretches(mean_L: Tensor) -> dict[str, float]:
    """Mean loss of the tokens between two positions, by "first-last"."""
    bounds = [bound for bound in STRETCHES if bound < len(mean_L)] + [len(mean_L)]
    return {f"{a}-{b}": float(mean_L[a:b].mean()) for a, b in pairwise(bounds)}
