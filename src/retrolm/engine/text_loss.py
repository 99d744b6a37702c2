"""Language-model loss of a whole text in one pass, on retrieved pages or with full attention; differentiable.

Shape letters: T tokens, L tokens with a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import RetroConfig
from ..methods import PageMethod, page_method
from ..ops.cross_entropy import chunked_cross_entropy
from .backbone import Backbone
from .model import RetroLM
from .placement import sent
from .running import checkpoint_contexts
from .sparse_pages import SparsePages
from .sparse_pass import SparseProgram
from .text_layers import takes_text, text_rows
from .visible import require_invisible

Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


def sparse_program(
    lm: RetroLM, config: RetroConfig, num_tokens: int, num_prefix: int = 0, **options: Any
) -> SparseProgram:
    """The program of one text over `lm`'s pages and retriever (see `SparseProgram` for `options`).

    Args:
        num_prefix: leading tokens with a page of their own, as in reading documents; 0 = plain text.

    Raises:
        UserError: bookmarks are visible.
    """
    require_invisible(config, "A whole text in one pass")
    method = lm.method if isinstance(lm.method, PageMethod) else page_method("retrolm")()
    pages = SparsePages.cut(num_tokens, num_prefix, config.page_size)
    program = SparseProgram(lm.backbone, config, method, lm.retriever, pages, adapter=lm.adapter, **options)
    lm.backbone.require_positions(program.num_positions)
    return program


def token_losses(
    backbone: Backbone,
    ids_T: Tensor,
    program: SparseProgram | None,
    bookmark: Tensor,
    num_prefix: int = 0,
    chunk: int = 1024,
) -> Tensor:
    """Negative log-likelihood of each token but the prefix and the first one, [L], in float32 or wider (D21).

    Run it, and the backward pass, inside `Attachment.run(program)`.

    Args:
        ids_T: int64, on any device. program: None = the stock model's own full attention.
        bookmark: embedding [hidden]. num_prefix: leading tokens that are not to be predicted.
        chunk: tokens whose logits exist at once.
    """
    ids_T = sent(ids_T, backbone.device)
    hidden_TC = _hidden(backbone, ids_T, program, bookmark)
    first = max(num_prefix, 1)
    return head_losses(backbone, hidden_TC[first - 1 : len(ids_T) - 1], ids_T[first:], chunk)


def head_losses(backbone: Backbone, rows_LC: Tensor, labels_L: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of each label by the model's head, [L] (see `chunked_cross_entropy`)."""
    head: Any = backbone.model.get_output_embeddings()
    softcap = getattr(backbone.config, "final_logit_softcapping", None)
    rows = rows_LC.to(head.weight.device)
    return chunked_cross_entropy(rows, head.weight, labels_L.to(rows.device), chunk, softcap)


def _hidden(backbone: Backbone, ids_T: Tensor, program: SparseProgram | None, bookmark: Tensor) -> Tensor:
    """What the head reads: [T, hidden]."""
    if program is None:
        hidden: Tensor = backbone.decoder(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
        return hidden
    rows = backbone.embed(ids_T)
    marks = bookmark.detach().to(rows).expand(program.num_bookmarks, -1)
    if takes_text(backbone, program):
        return text_rows(backbone, program, rows, marks)
    inputs = torch.cat([rows, marks])[None]
    positions = torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
    found: Tensor = backbone.decoder(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
    return found[0, : len(ids_T)]


def checkpoint_layers(model: nn.Module, context_fn: Contexts = checkpoint_contexts) -> None:
    """Let each decoder layer keep its input alone and run again in the backward pass; puts the model in training mode.

    The models of `FAMILIES` have no dropout unless their configuration asks for it.

    Args:
        context_fn: contexts of a layer's first and second run, as `torch.utils.checkpoint` takes them.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": context_fn})
    model.train()


def keep_layers(model: nn.Module) -> None:
    """Undo `checkpoint_layers`, and put the model in evaluation mode."""
    disable: Any = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    model.eval()
