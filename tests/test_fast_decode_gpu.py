"""On a GPU the captured step generates what transformers' `generate` generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from retrolm.config import RetroConfig
from retrolm.engine.decode_step import fused_obstacle
from retrolm.engine.fast_decode import compact_runner, fast_decode_of
from retrolm.engine.model import RetroLM
from retrolm.engine.stock import stock_answers
from retrolm.evaluation.readers import RetroReader
from test_adapter import random_adapter
from test_decode_stopping import Watch, compare, ragged, story_lm
from test_eval_decoding import stopping_samples
from test_fast_decode import FIXED, W, scramble
from tiny_eval import tiny_lm
from tiny_models import random_ids, tiny_model

pytestmark = pytest.mark.gpu


def attach(
    name: str, dtype: torch.dtype = torch.float32, model: dict[str, Any] | None = None, **options: Any
) -> RetroLM:
    options = {"kv_budget": 64, "page_size": W, **options}
    return RetroLM(tiny_model(name, dtype=dtype, **(model or {})).cuda(), config=RetroConfig.from_options(options))


def generated(lm: RetroLM, ids: Tensor, **options: Any) -> list[list[int]]:
    out = lm.generate(ids.cuda(), max_new_tokens=25, do_sample=False, eos_token_id=[], **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("name", "batch"), [*((name, 1) for name in FIXED), ("gemma3", 3), ("qwen3", 3), ("llama", 32)]
)
def test_greedy_tokens_equal_generate(name: str, batch: int) -> None:
    lm = attach(name)
    ids = torch.stack([random_ids(150, seed) for seed in range(batch)])
    fast, plain = generated(lm, ids, decoding="fast"), generated(lm, ids, decoding="plain")
    same = sum(a == b for a, b in zip(fast, plain, strict=True))
    assert same >= batch - batch // 16  # in float32 a near tie may fall either way


def test_it_is_the_default_on_a_gpu_and_says_so() -> None:
    lm = attach("llama")
    generated(lm, random_ids(90)[None])
    (runner,) = fast_decode_of(lm.attachment, lm.backbone)._runners.values()
    assert runner.path == "fused layers, CUDA graph"


def test_an_adapter_decodes_in_a_graph_of_its_own() -> None:
    lm, ids = attach("qwen2"), random_ids(90)[None]
    bare = generated(lm, ids, decoding="fast")
    lm.use_adapter(random_adapter(lm).place(lm.backbone, torch.float32))
    assert generated(lm, ids, decoding="fast") == generated(lm, ids, decoding="plain") != bare
    (runner,) = fast_decode_of(lm.attachment, lm.backbone)._runners.values()
    assert runner.path == "stock layers, CUDA graph"


def test_sampling_follows_the_seed() -> None:
    lm = attach("llama")
    ids = random_ids(90)[None].cuda()
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(lm.generate(ids, max_new_tokens=20, do_sample=True, decoding="fast").tolist())
    assert outs[0] == outs[1]


def test_retrieving_again_refills_the_same_graph() -> None:
    lm = attach("llama", retrieve_every=5)
    ids = random_ids(90)[None]
    fast = generated(lm, ids, decoding="fast")
    runners = list(fast_decode_of(lm.attachment, lm.backbone)._runners.values())
    assert fast == generated(lm, ids, decoding="plain")
    assert generated(lm, ids, decoding="fast") == fast
    assert list(fast_decode_of(lm.attachment, lm.backbone)._runners.values()) == runners and len(runners) == 1


@pytest.mark.parametrize("ahead", [0, 8])
@pytest.mark.parametrize("stops", [[3, 9, 6], [1, 1, 1], [30, 4, 30]], ids=str)
def test_rows_stop_one_by_one_as_in_generate(stops: list[int], ahead: int) -> None:
    ids, mask = (x.cuda() for x in ragged())
    options = {"attention_mask": mask, "max_new_tokens": 17, "do_sample": False, "decode_ahead": ahead}
    for ends in (list(range(2, 9)), []):
        compare(attach("qwen2"), ids, stops, eos_token_id=ends, **options)


class OnTheDevice(Watch):
    """Looks at where it is asked; needs the ids on the GPU, with what it made there before."""

    def __init__(self, stops: list[int]) -> None:
        super().__init__(stops)
        self.known = torch.arange(128, device="cuda")
        self.streams: list[torch.cuda.Stream] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert bool((self.known[input_ids] == input_ids).all())
        self.streams.append(torch.cuda.current_stream())
        return super().__call__(input_ids, scores, **kwargs).cuda()


def test_criteria_are_asked_beside_the_steps() -> None:
    lm, watch = attach("llama"), OnTheDevice([11])
    ids = random_ids(90)[None].cuda()
    free = lm.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[], decoding="fast")
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [], "decoding": "fast"}
    out = lm.generate(ids, stopping_criteria=[watch], **options)
    assert out.tolist() == free[:, :101].tolist()
    widths = [len(seen[0]) for seen, _, _ in watch.calls]  # of what the budget keeps, as `generate` would be given it
    assert widths == list(range(widths[0], widths[0] + 11))
    assert torch.cuda.default_stream() not in watch.streams


def test_sampled_rows_that_stop_are_those_that_do_not() -> None:
    """With the same seed: neither stops nor what is generated ahead of them change a draw before."""
    lm, ids = attach("llama"), random_ids(90)[None].cuda()
    outs = []
    for criteria in ([], [Watch([3, 12, 7])]):
        torch.manual_seed(5)
        options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "eos_token_id": []}
        out = lm.generate(ids, max_new_tokens=16, decoding="fast", stopping_criteria=criteria, **options)
        outs.append(out[:, 90:].tolist())
    for row, stop in enumerate((3, 12, 7)):
        assert outs[1][row][:stop] == outs[0][row][:stop]
    assert len(outs[1][0]) == 12


def test_draws_for_what_is_thrown_away_are_given_back() -> None:
    lm, ids, found = attach("llama"), random_ids(90)[None].cuda(), []
    for ahead in (0, 8):
        torch.manual_seed(5)
        options: dict[str, Any] = {"do_sample": True, "decoding": "fast", "decode_ahead": ahead, "max_new_tokens": 16}
        found.append([lm.generate(ids, stopping_criteria=[Watch([stop])], **options).tolist() for stop in (3, 1, 20)])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3"])
def test_dense_answers_are_the_stock_models(name: str) -> None:
    lm = RetroLM(tiny_model(name, dtype=torch.float32).cuda(), method="full")
    rows = [random_ids(length, length).tolist() for length in (1, 300, 700, 20)]
    options: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": []}
    with torch.no_grad():
        expected = [
            lm.model.generate(torch.tensor([ids]).cuda(), pad_token_id=1, **options)[0, len(ids) :].tolist()
            for ids in rows
        ]
    together = stock_answers(lm, rows, **options)
    assert {answer.decode_path.split(", ")[1] for answer in together} == {"CUDA graph"}
    assert sum(list(a.token_ids) == b for a, b in zip(together, expected, strict=True)) >= 3  # a near tie may turn
    watch = Watch([4, 20, 9, 1])
    stopped = stock_answers(lm, rows, stopping_criteria=[watch], **options)
    assert [a.token_ids for a in stopped] == [a.token_ids[:n] for a, n in zip(together, watch.stops, strict=True)]


def test_a_dense_answer_holds_one_cache() -> None:
    """Against `generate`: no more at the peak but rounding; what stays goes with the attachment."""
    lm = RetroLM(tiny_model("llama", dtype=torch.float32, **SHAPES[2]).cuda(), method="full")
    ids, spare = random_ids(8000).tolist(), 96 << 20  # workspaces of a captured step
    peaks, held = {}, {}
    for decoding in ("plain", "fast"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stock_answers(lm, [ids], max_new_tokens=20, do_sample=False, decoding=decoding)
        peaks[decoding] = torch.cuda.max_memory_allocated() - before
        held[decoding] = torch.cuda.memory_allocated() - before
    (runner,) = fast_decode_of(lm.attachment, lm.backbone)._runners.values()
    size = runner.cache.bytes()
    del runner
    assert size > 2 * spare
    assert peaks["fast"] <= peaks["plain"] + size // 8 + spare
    assert held["fast"] <= held["plain"] + size + spare
    lm.detach()
    assert torch.cuda.memory_allocated() - before <= spare


def test_stop_strings_stop_the_graph() -> None:
    here = story_lm()
    here.detach()
    lm = RetroLM(here.model.float().cuda(), here.tokenizer, config=here.config)
    ids = random_ids(40)[None].cuda()
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    free = lm.generate(ids, **options)[0, 40:]
    stop = lm.tokenizer.decode(free[4:7])[1:]
    found = [
        lm.generate(ids, decoding=decoding, stop_strings=[stop], **options)[0, 40:] for decoding in ("fast", "plain")
    ]
    assert found[0].tolist() == found[1].tolist() and stop in lm.tokenizer.decode(found[0])


def test_evaluation_decodes_with_the_graph() -> None:
    here = tiny_lm()
    here.detach()
    lm = RetroLM(here.model.cuda(), here.tokenizer, config=here.config)
    found = RetroReader(lm).answer(stopping_samples(["e", "the"]))
    assert {prediction.decode_path for prediction in found} == {"fused layers, CUDA graph"}
    assert all(prediction.tpot_s > 0 for prediction in found if prediction.num_generated > 1)


SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1100},
    {"hidden_size": 896, "head_dim": 96, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 256},
    {
        "hidden_size": 1024,
        "head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
    },
]


LAYER_CASES = [
    *(("llama", shape, torch.bfloat16, batch) for shape in SHAPES for batch in (1, 16)),
    *((name, SHAPES[2], dtype, 1) for name in ("qwen2", "qwen3") for dtype in (torch.float32, torch.float16)),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "batch"), LAYER_CASES)
def test_fused_layers_equal_stock_layers(name: str, shape: dict[str, Any], dtype: torch.dtype, batch: int) -> None:
    """Against the stock layers over the same cache in float32: as near as the stock layers in the same dtype."""
    lm, exact = attach(name, dtype, shape), attach(name, torch.float32, shape)
    assert fused_obstacle(lm.backbone) is None
    found = [_steps(lm, batch, fused=True), _steps(lm, batch, fused=False), _steps(exact, batch, fused=False)]
    ours, stock = ((x - found[2]).abs().max() for x in found[:2])
    assert ours <= max(3 * float(stock), 1e-4 * float(found[2].abs().max()))


def _steps(lm: RetroLM, batch: int, fused: bool) -> Tensor:
    runner = compact_runner(lm.backbone, batch, places=512, fused=fused)
    with torch.no_grad(), lm.attachment.run(runner.program):
        runner.prepare()
        scramble(runner.cache)
        return torch.stack([runner.step().float().clone() for _ in range(3)])
