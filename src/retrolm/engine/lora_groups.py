"""An adapter's pairs, laid out for modules that read the same rows, in the dtype of the backbone.

All pairs of one shape are converted together, a few kernels each way for the whole adapter.
Shape letters: N pairs of one shape, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import LoraAdapter, LoraPair
from .backbone import Backbone

# Modules of a Llama-type layer that read the same rows.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_RANK_STEP = 8  # matrix products are fast where each row begins at a whole number of 16 bytes


@dataclass(frozen=True)
class LoraGroup:
    """The pairs of one group of modules.

    Attributes:
        down: [sum of ranks, in], or None without pairs. ups: [out, rank] of each module, None where it has no pair.
    """

    down: Tensor | None
    ups: tuple[Tensor | None, ...]


def lora_groups(backbone: Backbone, adapter: LoraAdapter | None) -> list[list[LoraGroup]]:
    """The groups of each layer, in the order of `GROUPS`; differentiable in the adapter's parameters."""
    if adapter is None:
        return [[LoraGroup(None, (None,) * len(names)) for names in GROUPS] for _ in backbone.layers]
    at = {id(backbone.model.get_submodule(p)): pair for p, pair in zip(adapter.paths, adapter.pairs, strict=True)}
    layers: list[Any] = list(backbone.decoder.layers)
    members = [[at.get(id(layer.get_submodule(name))) for name in names] for layer in layers for names in GROUPS]
    there: list[list[Any]] = [[pair for pair in group if pair is not None] for group in members]
    downs = iter(_downs(there, backbone.dtype))
    ups = iter(_ups([pair for group in there for pair in group], backbone.dtype))
    found = [
        LoraGroup(next(downs) if pairs else None, tuple(None if pair is None else next(ups) for pair in group))
        for group, pairs in zip(members, there, strict=True)
    ]
    return [found[first : first + len(GROUPS)] for first in range(0, len(found), len(GROUPS))]


def _downs(groups: Sequence[Sequence[Any]], dtype: torch.dtype) -> list[Tensor]:
    """First halves of each group's pairs below each other, of the groups that have any."""
    groups = [group for group in groups if group]
    found: dict[int, Tensor] = {}
    for width in {group[0].down.shape[1] for group in groups}:
        same = [n for n, group in enumerate(groups) if group[0].down.shape[1] == width]
        x_NRI = torch.stack([pair.down for n in same for pair in groups[n]]).to(dtype)
        parts = _padded(x_NRI, (0, 0), 1).split([len(groups[n]) for n in same])
        found |= {n: part.flatten(0, 1) for n, part in zip(same, parts, strict=True)}
    return [found[n] for n in range(len(groups))]


def _ups(pairs: Sequence[LoraPair], dtype: torch.dtype) -> list[Tensor]:
    """Second halves of all pairs."""
    found: dict[int, Tensor] = {}
    for width in {len(pair.up) for pair in pairs}:
        same = [n for n, pair in enumerate(pairs) if len(pair.up) == width]
        x_NOR = torch.stack([pairs[n].up for n in same]).to(dtype)
        found |= dict(zip(same, _padded(x_NOR, (), 2).unbind(), strict=True))
    return [found[n] for n in range(len(pairs))]


def _padded(x: Tensor, before: tuple[int, ...], dim: int) -> Tensor:
    """`x` with zeros behind dimension `dim`, the rank, up to a whole number of steps."""
    missing = -x.shape[dim] % _RANK_STEP
    return F.pad(x, (*before, 0, missing)) if missing else x
