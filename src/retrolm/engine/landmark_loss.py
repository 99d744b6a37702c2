"""Language-model loss of texts with landmarks among their tokens, by grouped softmax; differentiable.

Shape letters as in `landmark_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.landmark_attention import grouped_attention
from .backbone import Backbone
from .landmark_rows import places_of_tokens, with_landmarks
from .placement import sent
from .text_loss import head_losses


class LandmarkPass:
    """A pass over whole texts at true positions (a `Program` for `Attachment.run`)."""

    def __init__(self, num_between: int) -> None:
        self._block = num_between + 1

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        return grouped_attention(q, k, v, self._block, scale).transpose(1, 2)


def landmark_hidden(backbone: Backbone, ids_BT: Tensor, landmark_C: Tensor, num_between: int) -> Tensor:
    """What the head reads at each place, [B, S, C]; run it inside `Attachment.run(LandmarkPass(num_between))`."""
    rows = with_landmarks(backbone.embed(ids_BT), landmark_C, num_between)
    backbone.require_positions(rows.shape[1])
    positions = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
    found: Tensor = backbone.decoder(inputs_embeds=rows, position_ids=positions, use_cache=False).last_hidden_state
    return found


def landmark_losses(
    backbone: Backbone, ids_BT: Tensor, landmark_C: Tensor, num_between: int, first: int = 1, chunk: int = 1024
) -> Tensor:
    """Negative log-likelihood of the tokens from number `first` on, flat, in float32 or wider.

    A token is predicted at the place before its own, which is a landmark's where it begins a block. Landmarks are not
    predicted (the published code leaves that open as an option).

    Args:
        ids_BT: int64, on any device. landmark_C: the landmarks' embedding. chunk: tokens whose logits exist at once.
    """
    ids_BT = sent(ids_BT, backbone.device)
    hidden = landmark_hidden(backbone, ids_BT, landmark_C, num_between)
    before = places_of_tokens(ids_BT.shape[1], num_between, device=hidden.device)[first:] - 1
    return head_losses(backbone, hidden[:, before].flatten(0, 1), ids_BT[:, first:].flatten(), chunk)
