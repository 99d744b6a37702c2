"""What a forward pass keeps of query pages: their gathered keys and values, and which pages they attend.

Everything stays on the device until the pass is over, so that no layer waits for the host.
Shape letters: S slots, L gathered tokens, P past pages, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import UserError


@dataclass
class LayerChoice:
    """What a query page attended in one layer.

    Attributes:
        ordinals: selected pages, int64 [S], ascending; those of any KV head where each has its own.
        scores: float32 [P] over all past pages, or None where the layer has no scores of its own.
        attended_tokens: gathered and own tokens.
    """

    ordinals: Tensor
    scores: Tensor | None
    attended_tokens: int


@dataclass
class LayerSet:
    """One layer's set as it was gathered.

    Attributes:
        keys, values: [L, K, D], keys rotated.
        valid: which places hold tokens, bool [L], or [K, L] where each KV head has its own set.
        picked: selected ordinals, -1 where a slot is empty. scores: [P], or None.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    picked: Tensor
    scores: Tensor | None


@dataclass
class QueryCapture:
    """A query page's keys and values by layer, ready for decoding once `finish` was called.

    Attributes:
        end: compact position that follows the query's last token.
        first: where the document begins in the page table that chosen ordinals count in.
        num_marks: tokens at the end of each set that are the query's own bookmark: generated tokens don't see it, for
            they continue its page.
        keys: rotated, [L, K, D] per layer. values: [L, K, D] per layer.
        choices: what it attended, by layer.
    """

    end: int
    num_marks: int = 0
    first: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    choices: list[LayerChoice] = field(default_factory=list)
    _sets: list[LayerSet] = field(default_factory=list)

    def keep(self, found: LayerSet) -> None:
        """Keep the next layer's set."""
        self._sets.append(found)

    def finish(self) -> None:
        """Drop the holes of all sets and bring the choices to the host.

        Raises:
            UserError: the KV heads of a layer chose sets of different lengths, which no cache can hold.
        """
        for found in self._sets:
            keys, values = (_without_holes(x, found.valid) for x in (found.keys, found.values))
            self.keys.append(keys[: len(keys) - self.num_marks])
            self.values.append(values[: len(values) - self.num_marks])
            self.choices.append(_choice(found, self.num_marks, self.first))
        self._sets.clear()


def _without_holes(rows_LKD: Tensor, valid: Tensor) -> Tensor:
    if bool(valid.all()):
        return rows_LKD
    if valid.dim() == 1:
        return rows_LKD[valid.nonzero().flatten().to(rows_LKD.device)]
    num_tokens = valid.sum(1)
    if bool((num_tokens != num_tokens[0]).any()):
        raise UserError(
            "With selection_scope='head' the KV heads chose pages of different lengths here, short ones among them. "
            "Use selection_scope='layer' where pages can be short, as in conversations."
        )
    return rows_LKD.transpose(0, 1)[valid.to(rows_LKD.device)].unflatten(0, (len(valid), -1)).transpose(0, 1)


def _choice(found: LayerSet, num_marks: int, first: int) -> LayerChoice:
    picked = found.picked.unique()
    scores = None if found.scores is None else found.scores.cpu()
    num_tokens = int(found.valid.sum(-1).max()) - num_marks
    return LayerChoice(picked[picked >= 0].cpu() - first, scores, num_tokens)
