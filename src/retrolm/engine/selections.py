"""Page selections recorded from a trained retriever, and replayed on weights that would choose arbitrarily.

Speed depends on which pages are read: on how often the same ones come back. A recording is scaled to other lengths
in two steps. Pages are taken from it in blocks of consecutive ones, so that what changes from page to page is as
recorded; the place of each selected page is stretched.
Shape letters: L layers, P pages, N pages of a chunk, S selected pages, best first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..methods.base import PageMethod, PageTensors

_BLOCK = 16
_NONE = 2**40
_MORE_PAGES = 8  # than those of the text: a prefix, questions
_SPREAD = 40503  # odd number whose multiples fall everywhere


class _Watching(PageMethod):
    """Another method's work, with page and layer told to `score`; what comes of the scores is up to subclasses."""

    paper = "https://arxiv.org/abs/2502.11444"

    def __init__(self, inner: PageMethod) -> None:
        super().__init__()
        self._inner = inner
        self.needs_bookmarks = inner.needs_bookmarks  # type: ignore[misc]

    def digest(self, pages: PageTensors) -> Tensor:
        return self._inner.digest(pages)

    def probe(self, pages: PageTensors) -> Tensor:
        probe = self._inner.probe(pages)
        layer = torch.full_like(pages.ordinals, pages.layer)
        return torch.cat([probe, torch.stack([pages.ordinals, layer], 1).to(probe.dtype)], 1)

    def score(self, probe_NF: Tensor, digest_PE: Tensor) -> Tensor:
        ordinals, layers = probe_NF[:, -2:].long().unbind(1)
        return self._judge(self._inner.score(probe_NF[:, :-2], digest_PE), ordinals, layers)

    def _judge(self, scores_NP: Tensor, ordinals_N: Tensor, layers_N: Tensor) -> Tensor:
        raise NotImplementedError


class RecordingMethod(_Watching):
    """Notes which pages the inner method ranks first.

    Args:
        keep: how many per page and layer.
    """

    name = "recording"
    summary = "notes what another method chooses"

    def __init__(self, inner: PageMethod, keep: int) -> None:
        super().__init__(inner)
        self._keep = keep
        self._found: dict[tuple[int, int], list[int]] = {}

    def _judge(self, scores_NP: Tensor, ordinals_N: Tensor, layers_N: Tensor) -> Tensor:
        past = torch.arange(scores_NP.shape[1], device=scores_NP.device) < ordinals_N[:, None]
        ranked = scores_NP.float().masked_fill(~past, -torch.inf).argsort(1, descending=True)[:, : self._keep]
        for ordinal, layer, best in zip(ordinals_N.tolist(), layers_N.tolist(), ranked.tolist(), strict=True):
            self._found[layer, ordinal] = best[: min(ordinal, self._keep)]
        return scores_NP

    def selections(self, num_layers: int, num_pages: int) -> Tensor:
        """What was noted, int64 [L, P, S], empty places -1 at the right; layers without scores are all -1."""
        out = torch.full((num_layers, num_pages, self._keep), -1)
        for (layer, ordinal), best in self._found.items():
            if ordinal < num_pages:
                out[layer, ordinal, : len(best)] = torch.tensor(best, dtype=torch.int64)
        return out


class ReplayMethod(_Watching):
    """Chooses recorded pages, after doing the inner method's work, so that its time counts.

    Args:
        recorded_LPS: as `RecordingMethod.selections` gives them; None = every page as likely as any other.
        num_layers, num_pages: of the text that is read now.
        device: where scores are; what is chosen waits there, since making it ready is no part of reading.
    """

    name = "replay"
    summary = "chooses recorded pages"

    def __init__(
        self,
        inner: PageMethod,
        recorded_LPS: Tensor | None,
        num_layers: int,
        num_pages: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(inner)
        self._picked_LPS = None if recorded_LPS is None else _stretched(recorded_LPS, num_layers, num_pages).to(device)

    def _judge(self, scores_NP: Tensor, ordinals_N: Tensor, layers_N: Tensor) -> Tensor:
        if self._picked_LPS is None:
            return torch.rand(scores_NP.shape, device=scores_NP.device)
        num_rows, num_past = scores_NP.shape
        picked_NS = self._picked_LPS[layers_N, ordinals_N].clamp(max=num_past)  # behind all: what isn't there
        worth_S = torch.arange(picked_NS.shape[1], 0, -1, dtype=torch.float32, device=scores_NP.device)
        found = worth_S.new_zeros(num_rows, num_past + 1)
        return found.scatter_reduce_(1, picked_NS, worth_S.expand(num_rows, -1), "amax")[:, :num_past]


def _stretched(recorded_LPS: Tensor, num_layers: int, num_pages: int) -> Tensor:
    """Recorded pages of like places, stretched to this text, int64 [layers, pages, S]; a large number = none."""
    recorded_layers, num_recorded, _ = recorded_LPS.shape
    stretch = num_pages / num_recorded
    blocks, recorded_blocks = (-(-num // _BLOCK) for num in (num_pages, num_recorded))
    ordinals_P = torch.arange(num_pages + _MORE_PAGES)
    block_P = ordinals_P // _BLOCK * recorded_blocks // blocks
    pages_P = (block_P * _BLOCK + ordinals_P % _BLOCK).clamp(max=num_recorded - 1)
    rows_L = torch.arange(num_layers) * recorded_layers // num_layers
    picked_LPS = recorded_LPS[rows_L[:, None], pages_P]
    # Which of the pages that a recorded one stands for: any, but always the same one.
    shift = picked_LPS * _SPREAD % max(int(stretch), 1)
    return ((picked_LPS * stretch).long() + shift).where(picked_LPS >= 0, _NONE)


def save_selections(path: Path, recorded_LPS: Tensor, about: dict[str, Any]) -> None:
    """Write a recording as .npz, whole or not at all; `about`: what it was recorded from, as strings and numbers."""
    with tempfile.NamedTemporaryFile(dir=path.absolute().parent, suffix=".npz", delete=False) as file:
        try:
            np.savez_compressed(file, selections=recorded_LPS.to(torch.int32).numpy(), **about)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load_selections(path: Path) -> Tensor:
    """Read a recording, int64 [L, P, S]; raises `UserError` for a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as found:
            recorded = torch.from_numpy(found["selections"].astype(np.int64))
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{path} holds no recorded selections. Make one with `retrolm bench --record-selections FILE.npz`."
        ) from None
    if recorded.dim() != 3:
        raise UserError(f"{path} holds selections of shape {tuple(recorded.shape)}; (layers, pages, picks) is needed.")
    return recorded
