"""Training the page retriever by the loss of the text it serves (joint stage 2; D20 b).

Choosing pages has no gradient. In its place `score - score.detach()` is added to the attention logits of every page
that was chosen from others: nothing in the forward pass, and in the backward pass a page whose tokens should weigh more
pulls its score up. Sink and local pages, which are always there, pull no score.
Shape letters: L layers that choose, M pages, T tokens, S slots, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.page_pull import with_pull
from ..retriever import PageRetriever
from .bookmark_stream import bookmark_stream
from .dense_pass import DenseStates
from .layer_call import LayerCall
from .page_batch import PageBatch
from .sparse_pages import SparsePages

if TYPE_CHECKING:
    from .model import RetroLM
    from .sparse_pass import SparseProgram
    from .sparse_sets import SetRun


class PagePulls:
    """What a backward pass over one text leaves for the retriever.

    Args:
        layers: those in which bookmarks choose. num_local: pages right before each page that are always chosen.

    Attributes:
        keys, values: layer → of all tokens before RoPE, without gradient [T, K, D].
        by_layer: layer → gradient of the loss in the score of each page (column) for each page (row), [M, M].
    """

    def __init__(self, pages: SparsePages, layers: Collection[int], num_local: int) -> None:
        self._pages, self._layers, self._num_local = pages, layers, num_local
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.by_layer: dict[int, Tensor] = {}

    def keep(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Keep what the layer's bookmarks read."""
        self.keys[layer], self.values[layer] = k_TKD.detach(), v_TKD.detach()

    def dense_states(self, dtype: torch.dtype) -> DenseStates:
        """What was kept, as a pass over a batch of one would have left it."""
        layers = range(len(self.keys))
        return DenseStates(*([x[layer][None].to(dtype) for layer in layers] for x in (self.keys, self.values)))

    def watch(
        self,
        call: LayerCall,
        run: SetRun,
        picked_nS: Tensor,
        out: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """`out` of a run of pages, whose backward pass notes what pages were worth.

        Args:
            picked_nS: pages of the run's slots, their own in the last one.
        """
        if call.layer not in self._layers or not out.requires_grad:
            return out
        slots = picked_nS.shape[1], self._pages.page_size, run.layout.span.start
        note = partial(self._note, call.layer, run, picked_nS)
        return with_pull(out, qkv, run.layout.bias_nQL, call.scale, call.softcap, slots, note)

    def _note(self, layer: int, run: SetRun, picked_nS: Tensor, gradients_nS: Tensor) -> None:
        M = len(self._pages.lengths)
        if layer not in self.by_layer:
            self.by_layer[layer] = gradients_nS.new_zeros(M, M)
        own_n1 = torch.arange(run.rows.start, run.rows.stop, device=picked_nS.device)[:, None]
        free = (picked_nS > 0) & (picked_nS < own_n1 - self._num_local) & (run.size < own_n1)
        self.by_layer[layer][run.rows].scatter_(1, picked_nS, gradients_nS.where(free, 0))


def retriever_gradients(lm: RetroLM, program: SparseProgram) -> list[Tensor]:
    """Gradients of a text's loss in the parameters of `lm.retriever`, in their order, after its backward pass.

    The text's keys and values are constants here: nothing but the retriever is trained for what bookmarks read.
    """
    assert lm.retriever is not None and program.pulls is not None
    parameters, by_layer = list(lm.retriever.parameters()), program.pulls.by_layer
    if not by_layer:
        return [torch.zeros_like(value) for value in parameters]
    scores_LMM = _scores(lm, lm.retriever, program, program.pulls, sorted(by_layer))
    pulls_LMM = torch.stack([by_layer[layer].to(lm.device) for layer in sorted(by_layer)])
    found = torch.autograd.grad((scores_LMM * pulls_LMM).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _scores(
    lm: RetroLM, retriever: PageRetriever, program: SparseProgram, pulls: PagePulls, layers: list[int]
) -> Tensor:
    """Scores of all pages (columns) for all pages (rows), [L, M, M], differentiable in the retriever."""
    with _plain(lm.backbone.model):
        states = bookmark_stream(
            lm.backbone,
            lm.attachment,
            retriever,
            retriever.embedding,
            _batch(program.pages).to(lm.device),
            pulls.dense_states(lm.backbone.dtype),
            program.config,
            program.frozen,
        )
    q_LMHD, k_LMKD = (torch.stack([x[n][0].to(lm.device) for n in layers]) for x in (states.queries, states.keys))
    wide = torch.promote_types(q_LMHD.dtype, torch.float32)
    queries = q_LMHD.to(wide).unflatten(2, (k_LMKD.shape[2], -1)).sum(3) * q_LMHD[0, 0].numel() ** -0.5
    scores = queries.flatten(2) @ k_LMKD.to(wide).flatten(2).transpose(1, 2)
    if program.pages.pad_left:
        scores = F.pad(scores, (1, 0, 1, 0))
    return torch.cat([scores[:, :1], scores[:, :-1]], 1) if program.config.causal_selection else scores


def _batch(pages: SparsePages) -> PageBatch:
    """A text as the bookmark stream takes it: a short page in front is a prefix there, which has no bookmark."""
    num_prefix = pages.lengths[0] if pages.pad_left else 0
    lengths = torch.tensor([pages.lengths[bool(num_prefix) :]])
    starts = num_prefix + lengths.cumsum(1) - lengths
    return PageBatch(torch.zeros(1, pages.num_tokens, dtype=torch.int64), num_prefix, starts, lengths)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Keep checkpointing, which is for long texts, out of a pass over a few rows."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
