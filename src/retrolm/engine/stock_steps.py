"""What a benchmark measures of the stock model's decoding: a growing cache, and a static one compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from .backbone import Backbone
from .cache_argument import cache_argument

_STEPS, _WARM_UPS = 16, 3


class StockSteps:
    """Steps of a stock model, which nothing is attached to.

    Args:
        model: it. backbone: what is known of it.
    """

    def __init__(self, model: Any, backbone: Backbone) -> None:
        self._model = model
        self._backbone = backbone
        self._device = backbone.device

    @torch.no_grad()
    def growing(self, num_tokens: int, batch: int) -> dict[str, Any]:
        """Seconds per eager step behind `num_tokens` tokens of noise."""
        cache, backbone = DynamicCache(), self._backbone
        shape = (batch, backbone.num_kv_heads, num_tokens, backbone.head_dim)
        for layer in range(backbone.num_layers):
            keys = torch.randn(shape, dtype=backbone.dtype, device=self._device)
            cache.update(keys, keys.clone(), layer)
        return pace(self._seconds_per_step(self._model, cache, batch), batch)

    @torch.no_grad()
    def compiled(self, num_tokens: int, batch: int) -> dict[str, Any]:
        """The same over a static cache; compiled with CUDA graphs where there is CUDA."""
        cache = self._static(num_tokens + _STEPS + _WARM_UPS + 1, batch)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(num_tokens)
        with self._compiled() as forward:
            return {**pace(self._seconds_per_step(forward, cache, batch), batch), "compiled": self._compiles}

    @torch.no_grad()
    def requests(self, prompts: list[Tensor], num_generated: int) -> list[dict[str, Any]]:
        """Whole requests over a static cache: one eager pass over a prompt [T], then compiled greedy steps.

        One cache serves all, as long as the longest needs, so that the step is compiled once, before the clock runs.
        """
        cache = self._static(max(map(len, prompts)) + num_generated, 1)
        with self._compiled() as forward:
            self._request(forward, cache, prompts[0], 2 * _WARM_UPS)
            return [self._request(forward, cache, prompt, num_generated) for prompt in prompts]

    def _request(self, forward: Callable[..., Any], cache: Any, prompt: Tensor, num_generated: int) -> dict[str, Any]:
        cache.reset()
        started = self.now()
        held = cache_argument(self._model, cache)
        logits = self._model(prompt[None].to(self._device), **held, use_cache=True, logits_to_keep=1)
        token = logits.logits[:, -1].argmax(-1, keepdim=True)
        first = self.now() - started
        for _ in range(num_generated - 1):
            token = self._step(forward, cache, token)
        total = self.now() - started
        pace_s = (total - first) / max(num_generated - 1, 1)
        return {"request_s": total, "ttft_s": first, "s_per_token": pace_s, "num_generated": num_generated}

    def _seconds_per_step(self, forward: Callable[..., Any], cache: Any, batch: int) -> float:
        """Seconds per greedy step over `cache`, after a few untimed ones."""
        token = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        started = 0.0
        for step in range(_WARM_UPS + _STEPS):
            if step == _WARM_UPS:
                started = self.now()
            token = self._step(forward, cache, token)
        return (self.now() - started) / _STEPS

    def _step(self, forward: Callable[..., Any], cache: Any, token: Tensor) -> Tensor:
        if forward is not self._model:
            torch.compiler.cudagraph_mark_step_begin()
        logits = forward(token, **cache_argument(self._model, cache), use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True).clone()

    def _static(self, room: int, batch: int) -> Any:
        backbone = self._backbone
        cache: Any = StaticCache(config=self._model.config, max_cache_len=room)
        cache.early_initialization(batch, backbone.num_kv_heads, backbone.head_dim, backbone.dtype, self._device)
        return cache

    @property
    def _compiles(self) -> bool:
        return self._device.type == "cuda"

    @contextmanager
    def _compiled(self) -> Iterator[Callable[..., Any]]:
        if not self._compiles:
            yield self._model
            return
        try:
            yield torch.compile(self._model.forward, mode="reduce-overhead")
        finally:
            torch.compiler.reset()  # also gives the graphs' memory back

    def now(self) -> float:
        """Seconds, when the device has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def pace(seconds_per_step: float, batch: int) -> dict[str, Any]:
    """Speed of decoding, from the time of a step of a whole batch."""
    return {"s_per_token": seconds_per_step, "tokens_per_s": batch / seconds_per_step}
