"""What a layer of a token method costs the host: operations for each chunk and each generated token, and no waiting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.engine.token_stream import TokenStream
from retrolm.methods.once import Once
from tiny_models import random_ids, tiny_model

# Most operations of a layer, views and RoPE's own aside, on a chunk and on a generated token.
MOST = {
    "infllm": (45, 35),
    "streaming_llm": (18, 15),
    "lm_infinite": (18, 15),
    "h2o_streaming": (33, 32),
    "tokenselect": (27, 27),
}
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "item"}


class Counting(TorchDispatchMode):
    """Counts operations by name while attention of a reading or generating `TokenStream` runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Counter[str]]]:
    """Operations of a layer and chunk in the mean, and all of them by name, while reading and while answering."""
    found: dict[bool, list[Counter[str]]] = {True: [], False: []}
    stock = TokenStream.attend

    def attend(self: Any, layer: int, q: Any, k: Any, v: Any, scale: float, softcap: Any) -> Any:
        is_prefill = next(iter(self._new.values())).is_prefill
        with Counting() as mode:
            out = stock(self, layer, q, k, v, scale, softcap)
        found[is_prefill].append(mode.found)
        return out

    monkeypatch.setattr(TokenStream, "attend", attend)
    for module in ("engine.part_attention", "methods.infllm", "methods.token_select"):
        monkeypatch.setattr(
            f"retrolm.{module}.rotate", lambda x, cos, sin, out=None: x if out is None else out.copy_(x)
        )
    model = tiny_model("llama", num_hidden_layers=12, dtype=torch.float32)
    lm = RetroLM(model, config=RetroConfig(kv_budget=128, page_size=8), method=name)
    ids = tuple(random_ids(400).tolist())
    lm.answer([Prompt((), ids[:-4], ids[-4:])], max_new_tokens=4, do_sample=False, eos_token_id=None)
    late = found[True][len(found[True]) // 2 :], found[False]
    return [(sum(map(Counter.total, some)) / len(some), sum(some, Counter())) for some in late]


@pytest.mark.parametrize("name", list(MOST))
def test_a_layer_takes_few_operations_and_never_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for (number, by_name), most in zip(count(name, monkeypatch), MOST[name], strict=True):
        assert number <= most, by_name
        assert not WAITS & set(by_name)


def test_the_same_tensors_are_worked_on_once() -> None:
    once, asked = Once(), []

    def double(x: torch.Tensor, times: int) -> torch.Tensor:
        asked.append(times)
        return x * times

    one, other = torch.ones(3), torch.ones(3)
    assert once(double, one, 2) is once(double, one, 2) and asked == [2]
    assert once(double, other, 2) is not once(double, one, 2) and asked == [2, 2]
    assert once(double, one, 3).tolist() == [3, 3, 3]


def test_what_no_layer_asks_for_is_forgotten() -> None:
    once, x = Once(), torch.ones(3)
    kept, lost = once(torch.neg, x), once(torch.exp, x)
    for _ in range(5):
        once.next_layer()
        assert once(torch.neg, x) is kept
    assert once(torch.exp, x) is not lost
