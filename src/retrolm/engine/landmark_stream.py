"""Reading and generating with Landmark Attention: chunks of whole blocks, then the tokens that follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.landmark import Landmark
from ..ops.rotary import unscaled
from .backbone import Backbone
from .landmark_memory import ChunkAttention, LandmarkMemory
from .landmark_rows import with_landmarks
from .landmarks import Landmarks


class LandmarkStream:
    """The forward passes of one prompt (a `Program` for `Attachment.run`).

    Every pass takes the rows that `rows` made for it, at position 0 for the stock model.

    Attributes:
        most_attended: most keys that a query attended in any pass, by layer. last_attended: those of the last one.
        max_position: highest RoPE position that can be used.
    """

    def __init__(self, backbone: Backbone, method: Landmark, landmarks: Landmarks, kv_budget: int) -> None:
        self._backbone, self._method, self._landmarks = backbone, method, landmarks
        self.split = method.split(kv_budget, landmarks.num_between + 1)
        self._memories: list[LandmarkMemory | None] = [None] * backbone.num_layers
        self._num_tokens = 0
        self.most_attended = [0] * backbone.num_layers
        self.last_attended = 0
        self.max_position = self.split.num_positions - 1
        backbone.require_positions(self.split.num_positions)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a prompt read at a time."""
        return self.split.chunk // self.split.block * self._landmarks.num_between

    def rows(self, ids: Tensor) -> Tensor:
        """The next tokens `ids` int64 [1, T], embedded, with the landmarks of the blocks that they complete."""
        before = self._num_tokens
        self._num_tokens += ids.shape[1]
        embedded = self._backbone.embed(ids)
        return with_landmarks(embedded, self._landmarks.embedding, self._landmarks.num_between, before)

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Arguments of the stock model for the next tokens."""
        rows = self.rows(ids)
        zeros = torch.zeros(rows.shape[:2], dtype=torch.int64, device=rows.device)
        return {"inputs_embeds": rows, "position_ids": zeros}

    def kept_bytes(self) -> int:
        """Bytes of keys and values kept."""
        backbone = self._backbone
        row_bytes = 2 * backbone.num_kv_heads * backbone.head_dim * backbone.dtype.itemsize
        return sum(memory.num_places * row_bytes for memory in self._memories if memory is not None)

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self._backbone.rope(layer)
        q, k = (unscaled(x, rope.scaling, rope.rotary_dims) for x in (q, k))
        memory = self._memories[layer] or LandmarkMemory.empty(k[0], self.split.block)
        self._memories[layer] = memory
        memory.append(k[0], v[0])
        attention = ChunkAttention(self._method, self.split, memory, rope.at, scale)
        out = attention(q[0])
        self.last_attended = attention.num_attended
        self.most_attended[layer] = max(self.most_attended[layer], self.last_attended)
        memory.store_blocks()
        return out.transpose(0, 1)[None]
