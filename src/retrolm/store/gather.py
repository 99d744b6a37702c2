"""Selected pages as one contiguous row of keys and values, keys rotated: one kernel where the pages are on a GPU.

Where it can't run, callers read pages and rotate their keys themselves; that is the reference it is tested against.
Shape letters: n rows, S selected slots, O own slots, P pages of a text, L gathered tokens, W page size, K KV heads,
D head dim, R rotary dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .fetch import has_triton

if TYPE_CHECKING:
    from .layout import PageLayout


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there."""
    return device.type == "cuda" and has_triton()


def knows(layout: PageLayout) -> bool:
    """Whether the kernel reads such records: numbers as they are, or quantised ones whose halves hold whole scales."""
    return layout.bits == 16 or (layout.dtype != torch.float64 and (layout.page_bytes // 2) % 2 == 0)


def gather_rotated(
    table: Tensor,
    picked_nS: Tensor,
    ids_P: Tensor,
    own_nO: Tensor,
    layout: PageLayout,
    span: slice,
    cos: Tensor,
    sin: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Lay [selected pages | own pages] of each row behind each other.

    Args:
        table: addresses of the two halves of all stored pages, int64 [2, pages].
        picked_nS: ordinals in 0..P-1, or -1 where a slot is empty and gets the first own page; int64.
        ids_P: where the pages of the text stand in `table`. own_nO: where the own pages stand.
        span: the part of the places [0, (S+O) * W) that is wanted, L of them.
        cos, sin: [n or 1, L, 1, R], of each wanted place.

    Returns:
        Rotated keys and values, [n, L, K, D] in `dtype`, contiguous.
    """
    from .gather_kernel import gather_rotated as launch

    found: tuple[Tensor, Tensor] = launch(table, picked_nS, ids_P, own_nO, layout, span, cos, sin, dtype)
    return found
