"""What one layer remembers of a text with landmarks, and how a chunk attends it.

Keys are kept before RoPE. Shape letters: H query heads, K KV heads, Q queries of the chunk, P past blocks, W places of
a block, k retrieved blocks, L local places, S keys, D head dim; C is Q where each query has blocks of its own, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..methods.base import Rope
from ..methods.landmark import Landmark, LandmarkSplit, attended_slots, scoring_slots
from ..ops.landmark_attention import grouped_softmax
from ..ops.rotary import rotate

_GATHERED_NUMBERS = 1 << 26  # of keys that exist at once where each query has blocks of its own


@dataclass
class LandmarkMemory:
    """Complete blocks that can be retrieved, and what stands behind them.

    Attributes:
        keys_KPWD, values_KPWD: past blocks; a block's landmark stands at its last place.
        local_keys_KLD, local_values_KLD: the places behind them.
    """

    keys_KPWD: Tensor
    values_KPWD: Tensor
    local_keys_KLD: Tensor
    local_values_KLD: Tensor

    @classmethod
    def empty(cls, k_KQD: Tensor, block: int) -> LandmarkMemory:
        """Nothing yet, of the shape, dtype and device of these keys."""
        blocks, local = k_KQD.new_empty(len(k_KQD), 0, block, k_KQD.shape[2]), k_KQD[:, :0]
        return cls(blocks, blocks, local, local)

    @property
    def num_past(self) -> int:
        return self.keys_KPWD.shape[1]

    @property
    def num_places(self) -> int:
        """Tokens and landmarks kept."""
        return self.num_past * self.keys_KPWD.shape[2] + self.local_keys_KLD.shape[1]

    def append(self, k_KQD: Tensor, v_KQD: Tensor) -> None:
        """Put new places behind the local ones."""
        self.local_keys_KLD = torch.cat([self.local_keys_KLD, k_KQD], 1)
        self.local_values_KLD = torch.cat([self.local_values_KLD, v_KQD], 1)

    def store_blocks(self) -> None:
        """Let the local blocks that have their landmark become past ones."""
        block = self.keys_KPWD.shape[2]
        whole = self.local_keys_KLD.shape[1] // block * block
        if whole:
            self.keys_KPWD = torch.cat([self.keys_KPWD, self.local_keys_KLD[:, :whole].unflatten(1, (-1, block))], 1)
            values = self.local_values_KLD[:, :whole].unflatten(1, (-1, block))
            self.values_KPWD = torch.cat([self.values_KPWD, values], 1)
            self.local_keys_KLD = self.local_keys_KLD[:, whole:].clone()
            self.local_values_KLD = self.local_values_KLD[:, whole:].clone()


@dataclass(frozen=True)
class ChunkAttention:
    """How a chunk attends in one layer.

    Attributes:
        memory: it ends with the chunk's own places. rope: positions int64 [...] → cos, sin [..., R] of this layer.
    """

    method: Landmark
    split: LandmarkSplit
    memory: LandmarkMemory
    rope: Rope
    scale: float

    @property
    def num_slots(self) -> int:
        """Blocks retrieved."""
        return min(self.split.top_k, self.memory.num_past)

    @property
    def num_attended(self) -> int:
        """Keys that the chunk's last query attends, landmarks included."""
        return self.num_slots * self.split.block + self.memory.local_keys_KLD.shape[1]

    def __call__(self, q_HQD: Tensor) -> Tensor:
        """Attention of the chunk's queries, before RoPE, [H, Q, D]."""
        num_local = self.memory.local_keys_KLD.shape[1]
        places_L = torch.arange(num_local, device=q_HQD.device)
        positions_L = (self.num_slots + 1) * self.split.block + places_L
        places_Q = places_L[num_local - q_HQD.shape[1] :]
        q_HQD = self._placed(q_HQD, positions_L[num_local - q_HQD.shape[1] :])
        local_keys = self._placed(self.memory.local_keys_KLD, positions_L)
        chosen = self._chosen(q_HQD)
        step = self._queries_at_once(q_HQD, chosen)
        parts = [slice(start, start + step) for start in range(0, q_HQD.shape[1], step)]
        return torch.cat(
            [self._attended(q_HQD[:, part], places_Q[part], local_keys, chosen[:, part]) for part in parts], 1
        )

    def _chosen(self, q_HQD: Tensor) -> Tensor:
        """Numbers of the retrieved blocks, int64 [H or 1, C, k]."""
        num_past, last = self.memory.num_past, self.split.block - 1
        slots = scoring_slots(num_past, self.num_slots, q_HQD.device)
        landmarks_KPD = self._placed(self.memory.keys_KPWD[:, :, last], slots * self.split.block + last)
        # In float32: in the first layer, landmarks in one slot are equal, and a float64 product may round them apart.
        return self.method.choose(self._logits(q_HQD, landmarks_KPD).float(), self.num_slots)

    def _queries_at_once(self, q_HQD: Tensor, chosen_HCk: Tensor) -> int:
        H, Q, D = q_HQD.shape
        if chosen_HCk.shape[1] == 1:
            return Q
        return max(_GATHERED_NUMBERS // max(H * self.num_slots * self.split.block * D, 1), 1)

    def _attended(self, q_HQD: Tensor, places_Q: Tensor, local_keys_KLD: Tensor, chosen_HCk: Tensor) -> Tensor:
        memory, num_retrieved = self.memory, self.num_slots * self.split.block
        keys, values = self._retrieved(chosen_HCk, q_HQD.shape[0])
        grouped = q_HQD.unflatten(1, (keys.shape[1], -1))  # queries that share their blocks
        logits = torch.cat(
            [_wide(grouped @ keys.mT * self.scale).flatten(1, 2), self._logits(q_HQD, local_keys_KLD)], -1
        )
        weights = grouped_softmax(logits, num_retrieved + places_Q, self.split.block).to(q_HQD.dtype)
        retrieved, local = weights.split([num_retrieved, weights.shape[-1] - num_retrieved], -1)
        out = (retrieved.unflatten(1, (keys.shape[1], -1)) @ values).flatten(1, 2)
        return out + (self._by_kv_head(local) @ memory.local_values_KLD[:, None]).flatten(0, 1)

    def _retrieved(self, chosen_HCk: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
        """Keys in their slots and values of the chosen blocks, [H, C, k·W, D]."""
        memory = self.memory
        slots = attended_slots(chosen_HCk, memory.num_past)
        heads = torch.arange(num_heads, device=slots.device) // (num_heads // len(memory.keys_KPWD))
        heads = heads[:, None, None]
        # Keys are turned before they are gathered where fewer blocks in fewer slots than choices are to be turned.
        if memory.num_past * (self.num_slots + 1) * len(memory.keys_KPWD) < num_heads * chosen_HCk[0].numel():
            keys = self._in_all_slots[heads, chosen_HCk, slots]
        else:
            keys = self._placed(memory.keys_KPWD[heads, chosen_HCk], self._slot_positions(slots))
        return keys.flatten(2, 3), memory.values_KPWD[heads, chosen_HCk].flatten(2, 3)

    @cached_property
    def _in_all_slots(self) -> Tensor:
        """Keys of every block in every slot, [K, P, k + 1, W, D]."""
        slots = torch.arange(self.num_slots + 1, device=self.memory.keys_KPWD.device)
        keys = self.memory.keys_KPWD[:, :, None].expand(-1, -1, len(slots), -1, -1)
        return self._placed(keys, self._slot_positions(slots))

    def _slot_positions(self, slots: Tensor) -> Tensor:
        """Positions of a block's places in slots [...], int64 [..., W]."""
        return slots[..., None] * self.split.block + torch.arange(self.split.block, device=slots.device)

    def _logits(self, q_HQD: Tensor, keys_KSD: Tensor) -> Tensor:
        """[H, Q, S] in float32 or wider."""
        return _wide((self._by_kv_head(q_HQD) @ keys_KSD[:, None].mT).flatten(0, 1) * self.scale)

    def _by_kv_head(self, x_HQE: Tensor) -> Tensor:
        """[K, H / K, Q, E]."""
        return x_HQE.unflatten(0, (len(self.memory.keys_KPWD), -1))

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rows [..., S, D] turned to positions [..., S]."""
        return rotate(x, *self.rope(positions))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
