"""From page scores to the pages attended: forced pages, causality, budget, order and ties (D8, D9, D23)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import launch


def choose_pages(
    scores_NP: Tensor,
    num_past: list[int],
    room: list[int],
    num_sink: int,
    num_local: int,
    pinned_P: Tensor | None = None,
    there: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Choose, for each page, its sinks, its `num_local` most recent past pages and the best-scored others.

    Args:
        scores_NP: float [N, P]; higher is better. Ties go to the more recent page.
        num_past: pages before each of the N pages; only these can be chosen.
        room: pages besides the sinks that each page may choose. Local pages count and never exceed it.
        num_sink: leading pages that are always chosen.
        pinned_P: further pages that are always chosen, before local ones, bool [P]; they count as `room`.
        there: `num_past` and `room` on the device of the scores, int64 [N], where the caller has them.

    Returns:
        Page indices, int64 [N, S], ascending, empty places -1 at the left. S is the largest set of any page.
    """
    device, P = scores_NP.device, scores_NP.shape[1]
    num_past_N, room_N = there or (torch.tensor(x).to(device, non_blocking=True) for x in (num_past, room))
    width = max(0, *(min(past - num_sink, free) for past, free in zip(num_past, room, strict=True)))
    num_sinks = min(num_sink, max(num_past))
    if scores_NP.dtype == torch.float32 and scores_NP.stride(1) == 1 and launch.runs_on(scores_NP):
        from ..ops.choose_kernel import choose

        chosen: Tensor = choose(scores_NP, num_past_N, room_N, width, num_sink, num_sinks, num_local, pinned_P)
        return chosen
    index_P = torch.arange(P, device=device)
    past_NP = index_P < num_past_N[:, None]
    local_NP = index_P >= (num_past_N - num_local)[:, None]
    rank_NP = scores_NP.to(torch.float64).masked_fill(local_NP, torch.finfo(torch.float64).max)
    if pinned_P is not None:
        rank_NP = rank_NP.masked_fill(pinned_P, torch.inf)
    rank_NP = rank_NP.masked_fill(~past_NP | (index_P < num_sink), -torch.inf)
    best = _best_first(rank_NP)[:, :width]
    usable = rank_NP.gather(1, best) > -torch.inf
    usable &= torch.arange(best.shape[1], device=device) < room_N[:, None]
    best = best.masked_fill(~usable, -1)
    sinks = index_P[:num_sinks].expand(len(num_past), -1)
    sinks = sinks.masked_fill(sinks >= num_past_N[:, None], -1)
    return torch.cat([sinks, best], 1).sort(1).values


def best_last(
    picked_NS: Tensor, scores_NP: Tensor, num_sink: int, first_local_N: Tensor, pinned_P: Tensor | None = None
) -> Tensor:
    """The same pages, those chosen by score from worst to best; sinks stay in front, local and pinned pages behind.

    Args:
        picked_NS: as `choose_pages` gives them for scores_NP. first_local_N: the first local page, int64 [N].

    Returns:
        int64 [N, S], empty places at the left. Of equal scores the later page comes last.
    """
    places = picked_NS.clamp(min=0)
    forced_NS = places >= first_local_N[:, None]
    if pinned_P is not None:
        forced_NS |= pinned_P[places]
    rank_NS = scores_NP.gather(1, places).masked_fill(forced_NS, torch.inf)
    return picked_NS.gather(1, rank_NS.masked_fill(picked_NS < num_sink, -torch.inf).argsort(dim=1, stable=True))


def _best_first(rank_NP: Tensor) -> Tensor:
    """Indices of each row from best to worst; sorting the reversed row puts the later of equals in front."""
    order = rank_NP.flip(1).argsort(dim=1, descending=True, stable=True)
    return rank_NP.shape[1] - 1 - order
