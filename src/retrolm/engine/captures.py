"""What a forward pass keeps of query pages: their gathered keys and values, and which pages they attend.

Everything stays on the device until the pass is over, so that no layer waits for the host.
Shape letters: S slots, L gathered tokens, P past pages, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerChoice:
    """What a query page attended in one layer.

    Attributes:
        ordinals: selected pages, int64 [S], ascending. scores: float32 [P] over all past pages, or None where the
            layer has no scores of its own. attended_tokens: gathered and own tokens.
    """

    ordinals: Tensor
    scores: Tensor | None
    attended_tokens: int


@dataclass
class LayerSet:
    """One layer's set as it was gathered.

    Attributes:
        keys, values: [L, K, D], keys rotated. valid_L: which places hold tokens.
        picked: selected ordinals, -1 where a slot is empty. scores: [P], or None.
    """

    keys: Tensor
    values: Tensor
    valid_L: Tensor
    picked: Tensor
    scores: Tensor | None


@dataclass
class QueryCapture:
    """A query page's keys and values by layer, ready for decoding once `finish` was called.

    Attributes:
        end: compact position that follows the query's last token.
        keys: rotated, [L, K, D] per layer. values: [L, K, D] per layer.
        choices: what it attended, by layer.
    """

    end: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    choices: list[LayerChoice] = field(default_factory=list)
    _sets: list[LayerSet] = field(default_factory=list)

    def keep(self, found: LayerSet) -> None:
        """Keep the next layer's set."""
        self._sets.append(found)

    def finish(self) -> None:
        """Drop the holes of all sets and bring the choices to the host."""
        for found in self._sets:
            valid = found.valid_L
            hole_free = bool(valid.all())
            places = None if hole_free else valid.nonzero().flatten().to(found.keys.device)
            self.keys.append(found.keys if places is None else found.keys[places])
            self.values.append(found.values if places is None else found.values[places])
            self.choices.append(_choice(found))
        self._sets.clear()


def _choice(found: LayerSet) -> LayerChoice:
    picked = found.picked.unique()
    scores = None if found.scores is None else found.scores.cpu()
    return LayerChoice(picked[picked >= 0].cpu(), scores, int(found.valid_L.sum()))
