"""How a model's KV heads look back at repeats: one dense pass over a text of random tokens that repeats itself.

Echo heads attend to earlier places of the token they stand at, induction heads to what followed it there
(RazorAttention, section 3.2). Shape letters: L layers, K KV heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..methods.token_base import RepeatScores, RepeatText
from ..ops.causal import causal_attention, mass_on
from .attachment import Attachment
from .backbone import Backbone


class RepeatReading:
    """Dense attention that notes what heads give to repeats (a `Program`).

    Args:
        ids_T: the text, int64 on the CPU. first_row: where the second repetition begins.

    Attributes:
        echo_LK, induction_LK: see `RepeatScores`.
    """

    uses_stock_rope = True

    def __init__(self, backbone: Backbone, ids_T: Tensor, first_row: int) -> None:
        self._backbone = backbone
        self._ids_T = ids_T
        self._first_row = first_row
        nothing = torch.full((backbone.num_layers, backbone.num_kv_heads), -torch.inf)
        self.echo_LK, self.induction_LK = nothing, nothing.clone()

    def project(self, layer: int, name: str, rows: Tensor, out: Tensor) -> Tensor | None:
        """There are no bookmarks."""
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Tensor:
        window = self._backbone.layers[layer].window
        if self._backbone.retrieves(layer):
            marks = repeat_marks(self._ids_T.to(q.device))
            mass = mass_on(q, k, marks, scale, softcap, window, self._first_row)
            self.echo_LK[layer], self.induction_LK[layer] = mass.mean((1, 4)).amax(2).cpu()
        return causal_attention(q, k, v, scale, softcap, window).transpose(1, 2)


def repeat_marks(ids_T: Tensor) -> Callable[[int, int], Tensor]:
    """For rows start … end: earlier places of each row's token, and the places right behind, bool [2, rows, end]."""

    def marks(start: int, end: int) -> Tensor:
        places, rows = torch.arange(end, device=ids_T.device), torch.arange(start, end, device=ids_T.device)
        echo = (ids_T[start:end, None] == ids_T[:end]) & (places < rows[:, None])
        return torch.stack([echo, torch.nn.functional.pad(echo, (1, 0))[:, :-1]])

    return marks


def repeated_ids(backbone: Backbone, text: RepeatText) -> Tensor:
    """The text, int64 on the CPU: BOS if the model has one, then `repeats` times the same random tokens.

    Raises `UserError` for a window that can't hold two tokens of each repetition.
    """
    fits = (backbone.window - 1) // text.repeats
    num_random = min(2500, fits) if text.num_random is None else text.num_random
    if not 2 <= num_random <= fits:
        raise UserError(
            f"A text of {num_random} random tokens repeated {text.repeats} times doesn't suit this model, whose window "
            f"is {backbone.window} tokens. Use between 2 and {fits} tokens, or fewer repeats."
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(backbone.config.vocab_size), (num_random,), generator=generator)
    bos = backbone.config.bos_token_id
    return torch.cat([ids.new_tensor([] if bos is None else [bos]), ids.repeat(text.repeats)])


@torch.no_grad()
def repeat_scores(backbone: Backbone, attachment: Attachment, text: RepeatText) -> RepeatScores:
    """Read the text and score the heads; raises `UserError` for one that the model can't hold."""
    ids = repeated_ids(backbone, text)
    reading = RepeatReading(backbone, ids, len(ids) - len(ids) // text.repeats * (text.repeats - 1))
    with attachment.run(reading):
        backbone.decoder(inputs_embeds=backbone.embed(ids[None]), use_cache=False)
    return RepeatScores(reading.echo_LK, reading.induction_LK)
