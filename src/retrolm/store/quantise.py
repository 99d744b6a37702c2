"""Pages in 8 or 4 bits: keys per channel, values per token, with their scales in front of the record.

Keys before RoPE have channels that stand far from zero in all tokens; a scale per channel of a page follows them.
Values have no such channels but tokens of unlike size. Both are asymmetric: number = code * scale + zero.
Shape letters: N pages, W page size, K KV heads, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fetch import has_triton

_WIDER = 1 + 2.0**-10  # scales and zeros are rounded to float16, always so that every number lies within

_LARGEST = torch.finfo(torch.float16).max


def record_bytes(page_shape: tuple[int, int, int], bits: int) -> int:
    """Bytes of one quantised page: scales and zeros (float16) of keys and values, then their codes; even."""
    return sum(_sizes(page_shape, bits))


def quantise(keys_NWKD: Tensor, values_NWKD: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise pages into records and return these in two halves, uint8 [N, record_bytes / 2] each.

    Tokens whose keys are all zero are padding: they widen no channel's range, and read as anything finite.
    """
    there = keys_NWKD.ne(0).any(-1, keepdim=True).any(-2, keepdim=True)
    key_codes, key_scales = _codes(keys_NWKD, 1, bits, there)
    value_codes, value_scales = _codes(values_NWKD, 3, bits, None)
    parts = [key_scales, value_scales, _packed(key_codes, bits), _packed(value_codes, bits)]
    record = torch.cat([part.flatten(1).view(torch.uint8) for part in parts], 1)
    first, second = record.chunk(2, 1)
    return first.contiguous(), second.contiguous()


def dequantise(
    first: Tensor, second: Tensor, page_shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [N, W, K, D] in `dtype` from the two halves of records."""
    if first.is_cuda and dtype != torch.float64 and first.shape[1] % 2 == 0 and has_triton():
        from .quantise_kernel import dequantise_records

        found_on_gpu: tuple[Tensor, Tensor] = dequantise_records(first, second, page_shape, bits, dtype)
        return found_on_gpu
    return dequantise_reference(first, second, page_shape, bits, dtype)


def dequantise_reference(
    first: Tensor, second: Tensor, page_shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`dequantise` in plain PyTorch."""
    W, K, D = page_shape
    record = torch.cat([first, second], 1)
    key_scales, value_scales, key_codes, value_codes = (
        part.contiguous() for part in record.split(_sizes(page_shape, bits), 1)
    )
    wide = torch.promote_types(dtype, torch.float32)
    found = []
    for codes, scales, shape in ((key_codes, key_scales, (1, K, D)), (value_codes, value_scales, (W, K, 1))):
        zero, scale = scales.view(torch.float16).to(wide).unflatten(1, (2, *shape)).unbind(1)
        whole = _unpacked(codes.unflatten(1, (W, K, -1)), bits).to(wide)
        found.append(torch.addcmul(zero, whole, scale).to(dtype))
    return found[0], found[1]


def _sizes(page_shape: tuple[int, int, int], bits: int) -> list[int]:
    """Bytes of key scales and zeros, value scales and zeros, key codes, value codes."""
    W, K, D = page_shape
    codes = W * K * _packed_width(D, bits)
    return [4 * K * D, 4 * W * K, codes, codes]


def _codes(x_NWKD: Tensor, dim: int, bits: int, there: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, W, K, D] with one range along `dim`, and zeros and scales float16 [N, 2, ...]."""
    wide = x_NWKD.to(torch.promote_types(x_NWKD.dtype, torch.float32))
    low, high = wide, wide
    if there is not None:
        low, high = wide.masked_fill(~there, torch.inf), wide.masked_fill(~there, -torch.inf)
    low, high = (x.nan_to_num(0.0, 0.0, 0.0) for x in (low.amin(dim, True), high.amax(dim, True)))
    zero = (low - low.abs() * (_WIDER - 1)).clamp(-_LARGEST, _LARGEST).to(torch.float16)
    span = (high - zero.to(wide.dtype)).clamp(min=0) * _WIDER
    scale = (span / _levels(bits)).clamp(min=2.0**-20).to(torch.float16)
    codes = ((wide - zero.to(wide.dtype)) / scale.to(wide.dtype)).round_().clamp_(0, _levels(bits)).to(torch.uint8)
    return codes, torch.stack([zero, scale], 1)


def _levels(bits: int) -> int:
    return int(2**bits) - 1


def _packed_width(head_dim: int, bits: int) -> int:
    return math.ceil(head_dim * bits / 8)


def _packed(codes_NWKD: Tensor, bits: int) -> Tensor:
    """Two codes of 4 bits in a byte: the first half of the dims below, the second above."""
    if bits == 8:
        return codes_NWKD.contiguous()
    half = codes_NWKD.shape[-1] // 2
    return codes_NWKD[..., :half] | codes_NWKD[..., half:] << 4


def _unpacked(packed_NWKP: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return packed_NWKP
    return torch.cat([packed_NWKP & 15, packed_NWKP >> 4], -1)
