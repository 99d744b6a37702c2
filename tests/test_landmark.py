"""Landmark Attention reading and answering: equal to loops (slots, scores, choices), and to grouped softmax in full."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runner import Desk, run_cli
from landmark_maker import random_landmarks
from naive_landmark import naive_model_logits
from naive_landmark_reading import naive_logits
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.landmark_stream import LandmarkStream
from retrolm.engine.landmarks import load_landmarks
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.methods import METHODS
from retrolm.methods.landmark import attended_slots, scoring_slots
from tiny_folder import save_tiny_model
from tiny_models import random_ids, tiny_model

BETWEEN = 4
BLOCK = BETWEEN + 1
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}


def engine(name: str = "llama", kv_budget: int = 6 * BLOCK, **knobs: Any) -> RetroLM:
    """A budget of six blocks; a `top_k` of 2 leaves three of them for a chunk."""
    model = tiny_model(name, num_hidden_layers=2)
    knobs = {"weights": str(random_landmarks(model, num_between=BETWEEN)), "top_k": 2, **knobs}
    config = RetroConfig(kv_budget=kv_budget, page_size=4)
    return RetroLM(model, config=config, method="landmark", method_options=knobs)


def landmarks_of(lm: RetroLM) -> Any:
    return load_landmarks(Path(lm.method.knobs.weights), lm.backbone)


def answer(lm: RetroLM, ids: list[int], num_new: int) -> Any:
    (found,) = lm.answer([Prompt((), tuple(ids[:-3]), tuple(ids[-3:]))], max_new_tokens=num_new, **GREEDY)
    return found


@pytest.mark.parametrize(
    ("name", "retrieval"),
    [("llama", "token"), ("llama", "head"), ("llama", "layer"), ("llama-mha", "token"), ("llama-mqa", "head"),
     ("phi3", "layer")],
)  # fmt: skip
def test_reading_equals_loops(name: str, retrieval: str) -> None:
    """Chunks of three blocks, two blocks retrieved; eight blocks and an incomplete one."""
    lm = engine(name, retrieval=retrieval)
    ids = random_ids(35)
    expected = naive_logits(lm.backbone, landmarks_of(lm), ids.tolist(), 35, 3 * BLOCK, 2, retrieval)
    assert torch.allclose(lm.logits(ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_prompt", "retrieval"), [(11, "token"), (24, "token"), (27, "token"), (24, "head"), (27, "layer")]
)
def test_answering_equals_loops(num_prompt: int, retrieval: str) -> None:
    """Past two block ends; a prompt that ends with a chunk, with a block, with neither."""
    lm = engine(retrieval=retrieval)
    ids = random_ids(num_prompt).tolist()
    found = list(answer(lm, ids, 10).token_ids)
    logits = naive_logits(lm.backbone, landmarks_of(lm), ids + found[:-1], num_prompt, 3 * BLOCK, 2, retrieval)
    assert found == logits[num_prompt - 1 :].argmax(-1).tolist()


def test_chunks_of_a_block_are_one_token_at_a_time() -> None:
    """Where each token has blocks of its own, a chunk of one block attends what its tokens would attend alone."""
    lm, ids = engine(kv_budget=4 * BLOCK), random_ids(35)
    stream = LandmarkStream(lm.backbone, lm.method, landmarks_of(lm), 4 * BLOCK)  # type: ignore[arg-type]
    assert stream.chunk_tokens == BETWEEN
    with torch.no_grad(), lm.attachment.run(stream), landmarks_of(lm).acting(lm.backbone):
        alone = [lm.model(**stream.inputs(token[None, None]), use_cache=False).logits[0, -1] for token in ids]
    assert torch.allclose(lm.logits(ids), torch.stack(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_budget", [24 * BLOCK, 12 * BLOCK])
def test_with_room_for_all_blocks_it_is_full_grouped_softmax(kv_budget: int) -> None:
    """Read in one chunk, or in two with all blocks before the second retrieved: the model as it was trained."""
    lm, ids = engine(kv_budget=kv_budget, top_k=8), random_ids(33)
    landmarks = landmarks_of(lm)
    with landmarks.acting(lm.backbone):
        full = naive_model_logits(lm.backbone, ids, landmarks.embedding.double(), BETWEEN)
    predicting = [t + (t + 1) // BETWEEN for t in range(33)]
    assert torch.allclose(lm.logits(ids), full[predicting], rtol=0, atol=1e-5)
    found = answer(lm, ids.tolist(), 3)
    assert found.attended_tokens["decode"] == 35 + 35 // BETWEEN


def test_the_budget_is_kept_and_stated() -> None:
    lm = engine(kv_budget=40, top_k=None)
    found = answer(lm, random_ids(150).tolist(), 6)
    # 40 tokens: three blocks, a spare one and four of the chunk; nine chunks leave a block and two tokens
    assert found.attended_tokens == {"prefill": 3 * BLOCK + 4 * BLOCK, "decode": 3 * BLOCK + BLOCK + 2}
    assert found.max_position == 8 * BLOCK - 1
    num_bytes = (155 + 155 // BETWEEN) * 2 * 2 * 2 * 12 * 8
    assert found.kv_bytes["device"] == num_bytes


def test_gathering_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = engine(), random_ids(35)
    whole = lm.logits(ids)
    monkeypatch.setattr("retrolm.engine.landmark_memory._GATHERED_NUMBERS", 7000)
    assert torch.allclose(lm.logits(ids), whole, rtol=0, atol=1e-12)


def test_slots() -> None:
    """Nine past blocks, three retrieved: old ones are scored in slot 0; those not recent leave a slot spare."""
    assert scoring_slots(9, 3, torch.device("cpu")).tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3]
    chosen = torch.tensor([[6, 7, 8], [0, 7, 8], [2, 5, 6], [1, 3, 5]])
    assert attended_slots(chosen, 9).tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert scoring_slots(2, 2, torch.device("cpu")).tolist() == [1, 2]


def test_nothing_stays_on_the_model() -> None:
    lm, ids = engine(), random_ids(30)
    full = RetroLM(lm.model, method="full")
    before = full.logits(ids)
    first = answer(lm, ids.tolist(), 4).token_ids
    assert torch.equal(full.logits(ids), before)
    assert answer(lm, ids.tolist(), 4).token_ids == first


def test_what_can_not_be_used_is_refused(tmp_path: Path) -> None:
    lm = engine()
    with pytest.raises(UserError, match=r"--set landmark\.weights=FOLDER"):
        METHODS.get("landmark").with_options({})
    with pytest.raises(UserError, match="holds no landmarks"):
        engine(weights=str(tmp_path))
    with pytest.raises(UserError, match="trained for another backbone"):
        engine("llama-mha", weights=lm.method.knobs.weights)
    with pytest.raises(UserError, match="kv_budget=24 is too small for landmark"):
        engine(kv_budget=24, top_k=3)
    with pytest.raises(UserError, match="this model's slide"):
        engine("mistral-sliding")
    with pytest.raises(UserError, match="decoding='fast' can't be had"):
        lm.answer([Prompt((), (2, 3), (4,))], max_new_tokens=2, decoding="fast")
    with pytest.raises(UserError, match="one sequence per prompt"):
        lm.answer([Prompt((), (2, 3), (4,))], max_new_tokens=2, num_beams=2)
    with pytest.raises(UserError, match="brings an adapter of its own"):
        lm.use_adapter(Path(lm.method.knobs.weights) / "adapter")


def test_ask_and_eval_on_the_command_line(desk: Desk, tmp_path: Path) -> None:
    """Rows tell the landmarks by what they are, not by where they lie."""
    words = ["ask", desk.text, "Who spoke?", "--method", "landmark", *desk.options]
    run_cli(*words).refused_in_one_line("landmark needs what was trained for it", "--set landmark.weights=FOLDER")
    run_cli(*words, "--set", f"landmark.weights={tmp_path}").refused_in_one_line("holds no landmarks")
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    folder = random_landmarks(RetroLM.from_pretrained(model, method="full").model, num_between=8)
    setting = f"landmark.weights={folder}"
    found = run_cli(*words, "--model", model, "--set", setting, "--json").json
    assert found["method"] == "landmark" and 0 < found["attended_tokens"]["prefill"] <= 96
    words = ["eval", "--model", model, "--task", "ruler/niah_single_1", "--lengths", 700, "--num-samples", 1]
    words += ["--kv-budget", 96, "--page-size", 16, "--method", "landmark", "--out", tmp_path / "rows"]
    assert run_cli(*words, "--set", setting).code == 0
    before = (tmp_path / "rows" / "samples.jsonl").read_bytes()
    copied = shutil.copytree(folder, tmp_path / "copied")
    assert run_cli(*words, "--set", f"landmark.weights={copied}").code == 0
    assert (tmp_path / "rows" / "samples.jsonl").read_bytes() == before
    refused = run_cli(*words, "--set", setting, "--adapter", folder / "adapter")
    assert refused.code == 2 and "brings an adapter of its own" in refused.err
