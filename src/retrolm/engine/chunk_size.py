"""How many pages one forward pass reads, where the settings leave it open.

A pass over more pages costs a GPU's host no more launches, and fills the GPU; its activations take memory that grows
with it. So a GPU reads as many as keep these at a fixed size, or more where layers are so small that it would be done
with one before the host has launched the next; a processor gains nothing beyond a few.
"""

from __future__ import annotations

from ..config import RetroConfig
from .backbone import Backbone

_PAGES_ON_CPU = 16
_ACTIVATION_BYTES = 768 * 2**20
_LAYER_FLOP = 2**42  # of a layer's matrix products in 16 bits: 6 ms and more, which is what launching a layer takes
_FEWEST_TOKENS, _MOST_TOKENS = 2048, 32768
_HIDDEN_COPIES, _INNER_COPIES = 8, 3  # of a row's hidden and inner states that are alive at once, about


def with_chunk_size(config: RetroConfig, backbone: Backbone) -> RetroConfig:
    """`config` with `chunk_pages` decided."""
    return config if config.chunk_pages else config.replace(chunk_pages=_chunk_pages(config.page_size, backbone))


def _chunk_pages(page_size: int, backbone: Backbone) -> int:
    if any(info.device.type != "cuda" for info in backbone.layers):
        return _PAGES_ON_CPU
    return max(1, chunk_tokens(backbone) // page_size)


def chunk_tokens(backbone: Backbone) -> int:
    """Tokens of one pass on a GPU: a power of two, with which its matrix products go best."""
    heads = 2 * (backbone.num_heads + backbone.num_kv_heads) * backbone.head_dim
    inner, itemsize = int(backbone.config.intermediate_size), backbone.dtype.itemsize
    row_bytes = (_HIDDEN_COPIES * backbone.hidden_size + _INNER_COPIES * inner + heads) * itemsize
    row_flop = 2 * backbone.hidden_size * (heads + 3 * inner) * itemsize // 2
    fitting = 1 << (max(_ACTIVATION_BYTES // row_bytes, _LAYER_FLOP // row_flop).bit_length() - 1)
    return min(max(fitting, _FEWEST_TOKENS), _MOST_TOKENS)
