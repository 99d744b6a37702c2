"""RetroLM under lm-eval: plain prompts, stop strings, log-likelihoods; lm-eval itself is stood in for."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from retrolm.errors import UserError
from retrolm.evaluation.lm_harness import HarnessModel, main, register
from retrolm.evaluation.plain_prompts import PlainPrompts, cut_at
from tiny_eval import tiny_lm
from tiny_folder import save_tiny_model
from tiny_tokenizer import STORY

PROMPTS = [STORY[:300], STORY[40:520], "Who spoke?"]


class Request:
    """An lm-eval instance, as far as models look at it."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HarnessModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("harness") / "tiny")
    return HarnessModel(str(folder), retriever="none", batch_size="2", kv_budget=64, page_size=8)


def test_at_full_budget_continuations_are_the_stock_models() -> None:
    ours = PlainPrompts(tiny_lm(kv_budget=400)).continue_all(PROMPTS, 7)
    dense = PlainPrompts(tiny_lm(method="full")).continue_all(PROMPTS, 7)
    assert ours == dense and all(dense)


def test_log_likelihoods_are_the_stock_models_at_full_budget() -> None:
    lm = tiny_lm(kv_budget=400)
    ours, dense = PlainPrompts(lm), PlainPrompts(tiny_lm(method="full"))
    for context, continuation in [(STORY[:200], " The captain"), ("", "Nobody spoke."), ("It was ", "late")]:
        left, right = ours.log_likelihood(context, continuation), dense.log_likelihood(context, continuation)
        assert left[0] == pytest.approx(right[0], abs=1e-3) and left[1] == right[1]
    assert ours.log_likelihood_rolling(STORY[:200]) == pytest.approx(
        dense.log_likelihood_rolling(STORY[:200]), abs=1e-3
    )


def test_log_likelihood_is_the_sum_over_the_continuation() -> None:
    prompts = PlainPrompts(tiny_lm(method="full"))
    lm = prompts._lm
    context, continuation = "Nobody spoke.", " The captain"
    start, ids = len(prompts.ids(context)), prompts.ids(context + continuation)
    with torch.no_grad():
        scores = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = sum(float(scores[at - 1, ids[at]]) for at in range(start, len(ids)))
    assert prompts.log_likelihood(context, continuation)[0] == pytest.approx(wanted, abs=1e-4)


def test_the_greedy_continuation_is_known_as_such() -> None:
    prompts = PlainPrompts(tiny_lm(method="full"))
    ids = prompts.ids(STORY[:200])
    logits = prompts._lm.model(torch.tensor([ids])).logits[0, -1]
    best, worst = int(logits.argmax()), int(logits.argmin())
    assert prompts._score([*ids, best], len(ids))[1] and not prompts._score([*ids, worst], len(ids))[1]


def test_requests_are_answered_in_order_and_up_to_their_stops(model: HarnessModel) -> None:
    free = model.generate_until([Request(prompt, {"max_gen_toks": 9}) for prompt in PROMPTS])
    stop = free[0][3]
    settings = [{"max_gen_toks": 9, "until": [stop]}, {"max_gen_toks": 9}, {"max_gen_toks": 9, "until": stop}]
    found = model.generate_until([Request(p, s) for p, s in zip(PROMPTS, settings, strict=True)])
    assert found == [cut_at(free[0], [stop]), free[1], cut_at(free[2], [stop])]
    assert len(model.loglikelihood([Request(PROMPTS[0], " x"), Request("", "y")])) == 2
    assert model.loglikelihood_rolling([Request(PROMPTS[0])])[0] < 0


def test_what_cannot_be_done_is_refused(model: HarnessModel) -> None:
    with pytest.raises(UserError, match="greedy"):
        model.generate_until([Request("A long prompt", {"do_sample": True})])
    with pytest.raises(UserError, match="two tokens"):
        model.generate_until([Request("a", {})])


def test_chat_templates_are_the_tokenizers(model: HarnessModel) -> None:
    text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|user|>Hi<|end|><|assistant|>"
    assert model.chat_template(True) and model.chat_template(False) is None


def test_the_model_is_filed_with_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    filed: dict[str, type[Any]] = {}
    api, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    api.LM = type("LM", (), {"__init__": lambda self: setattr(self, "ready", True)})  # type: ignore[attr-defined]
    registry.register_model = lambda name: lambda cls: filed.setdefault(name, cls)  # type: ignore[attr-defined]
    for name, module in (("lm_eval", types.ModuleType("lm_eval")), ("lm_eval.api", types.ModuleType("lm_eval.api"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", registry)
    register()
    folder = save_tiny_model(tmp_path / "tiny")
    made = filed["retrolm"](pretrained=str(folder), method="full", batch_size=1, kv_budget=64, page_size=8)
    assert made.ready and isinstance(made, api.LM)
    assert len(made.generate_until([Request(PROMPTS[0], {"max_gen_toks": 3})])) == 1


def test_without_lm_eval_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=r"pip install 'retrolm\[harness\]'"):
        register()


def test_its_command_ends_in_a_line_of_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: This needs lm-eval: pip install 'retrolm[harness]'.\n"


def test_knobs_of_the_method_can_be_set(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    options = {"method": "snapkv", "kv_budget": 64, "page_size": 8, "snapkv.observation_window": 5}
    assert HarnessModel(str(folder), **options)._prompts._lm.method.knobs.observation_window == 5
    with pytest.raises(UserError, match="Did you mean 'observation_window'"):
        HarnessModel(str(folder), **{**options, "snapkv.observation_windw": 5})
