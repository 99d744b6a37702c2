"""The Triton kernel of `fetch`; imported only where Triton is installed."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_words(sources, targets, num_jobs, words, blocks, BLOCK: tl.constexpr):
    for job in range(tl.program_id(0), num_jobs, tl.num_programs(0)):
        item = job // blocks
        at = (job % blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = at < words
        source = tl.load(sources + item).to(tl.pointer_type(tl.int64))
        target = tl.load(targets + item).to(tl.pointer_type(tl.int64))
        tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)
