"""One frozen dense forward pass that keeps every layer's keys and values before RoPE (D14 a)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.attention import shapes_may_vary
from ..ops.causal import causal_attention
from ..ops.rotary import rotate, unscaled
from .attachment import Attachment, PassIsOver
from .backbone import Backbone
from .page_batch import PageBatch
from .prefill_layers import can_fuse, fused_rows
from .question_attention import SeparateQuestions
from .rope_table import RopeTable

Observer = Callable[[int, Tensor, Tensor], None]


@dataclass
class DenseStates:
    """Keys and values by layer, before RoPE: each [B, T, K, D]."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class DenseProgram:
    """Full causal attention at true positions (a `Program`).

    Args:
        observe: called with (layer, queries, keys) before RoPE, [B, T, H, D] and [B, T, K, D], for page indexes that
            look at normal tokens.
        questions: set if texts have several questions.
    """

    def __init__(
        self, backbone: Backbone, observe: Observer | None = None, questions: SeparateQuestions | None = None
    ) -> None:
        self._backbone = backbone
        self._observe = observe
        self._questions = questions
        self._turns: dict[int, tuple[Tensor, Tensor]] = {}
        self.states = DenseStates()

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks in this pass."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        rope = self._backbone.rope(layer)
        q, k = (unscaled(x, rope.scaling, rope.rotary_dims) for x in (q, k))
        if self._observe is not None:
            self._observe(layer, q.transpose(1, 2), k.transpose(1, 2))
        self.states.keys.append(k.transpose(1, 2))
        self.states.values.append(v.transpose(1, 2))
        if layer == self._backbone.num_layers - 1:
            raise PassIsOver
        cos, sin = self._turn(rope, q.shape[2], q.device)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        window = self._backbone.layers[layer].window
        out = causal_attention(q, k, v, scale, softcap, window)
        if self._questions is not None:
            self._questions.attend(q, k, v, out, scale, softcap, window)
        return out.transpose(1, 2)

    def _turn(self, rope: RopeTable, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cos and sin of all tokens, [1 or B, 1, T, R]; kept for the layers that share them."""
        if id(rope) not in self._turns:
            positions = torch.arange(num_tokens, device=device)[None]
            if self._questions is not None:
                positions = self._questions.positions_BT
            cos, sin = (x[:, None] for x in rope.at(positions))
            self._turns[id(rope)] = cos, sin
        return self._turns[id(rope)]


@torch.no_grad()
def dense_pass(
    backbone: Backbone, attachment: Attachment, batch: PageBatch, observe: Observer | None = None
) -> DenseStates:
    """Run the frozen backbone over `batch` once, up to the last layer's keys and values."""
    backbone.require_positions(batch.tokens_BT.shape[1])
    questions = SeparateQuestions(batch) if batch.num_questions > 1 else None
    program = DenseProgram(backbone, observe, questions)
    with attachment.run(program), shapes_may_vary(backbone.device):
        rows = backbone.embed(batch.tokens_BT)
        if can_fuse(backbone):
            fused_rows(backbone, program, rows, wanted=False)
        else:
            positions = torch.zeros_like(batch.tokens_BT, device=backbone.device)
            backbone.decoder(inputs_embeds=rows, position_ids=positions, use_cache=False)
    return program.states
