"""Long generation: the register task, dictated rows in ordinary generation, exposure, rows on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive_tokens as naive
from cli_runner import run_cli
from grids import some
from naive_retro import NaiveRetro
from retrolm.config import RetroConfig
from retrolm.engine.answering import Prompt
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.evaluation.dictation import Dictation
from retrolm.evaluation.generation_columns import column_of, with_full_first
from retrolm.evaluation.journal import read_lines
from retrolm.evaluation.long_generation import ROWS_FILE
from retrolm.evaluation.tasks import get_task
from retrolm.methods.retro_exposure import ExposureMeter
from tiny_folder import save_tiny_model
from tiny_models import exact_model, random_ids
from tiny_tokenizer import tiny_tokenizer

NEW, BUDGET = 9, 24
SMALL = {"page": 4, "num_dense_layers": 1}


# --- the task --------------------------------------------------------------------------------------------------


def register(num_questions: Any = 3, length: int = 4000) -> Any:
    task = get_task("longgen/register", num_questions=num_questions)
    return task, task.samples(tiny_tokenizer(), length, 1, seed=1)[0]


def test_every_question_of_the_register_has_its_card() -> None:
    task, sample = register()
    assert 0.9 * 4000 < sample.extra["num_tokens"] + task.max_new_tokens <= 4000
    cards = [sample.context[start:end] for start, end in sample.gold_spans]
    for number, (card, key) in enumerate(zip(cards, sample.answers, strict=True), 3):
        assert f"{number}. Which locker does {card.partition(' is a ')[0]} have?" in sample.context
        assert card.endswith(f"is {key}.")


def test_an_answer_counts_only_on_its_own_line() -> None:
    task, sample = register()
    one, two, three = sample.answers
    full = f" A has {one}.\nAnswer 4: B has {two}.\n\nAnswer 5: {three}."
    assert task.score(full, sample) == 1.0 and task.extra_scores(full, sample) == {"answered": 1.0}
    assert task.score(f" {two}\nAnswer 4: {one}\nAnswer 4: {two}", sample) == 0.0
    assert task.score(f" 1{one}\nAnswer 5: {three}", sample) == pytest.approx(1 / 3)
    assert task.extra_scores("", sample) == {"answered": pytest.approx(1 / 3)}  # "Answer 3:" is given


@pytest.mark.parametrize("number", ["0", "many", -1])
def test_a_number_of_questions_that_makes_no_sense_is_refused(number: Any) -> None:
    with pytest.raises(UserError, match="num_questions"):
        get_task("longgen/register", num_questions=number)


# --- dictation -------------------------------------------------------------------------------------------------


def generate(
    method: str, told: Tensor, num_rows: int, kv_budget: int = BUDGET, retrieve_every: int = 0, **knobs: Any
) -> tuple[Dictation, RetroLM, ExposureMeter]:
    config = RetroConfig(kv_budget=kv_budget, page_size=4, retrieve_every=retrieve_every)
    lm = RetroLM(exact_model("llama", seed=3), config=config, method=method, method_options=knobs)
    meter = lm.method.meter = ExposureMeter()
    ids = random_ids(50, seed=5).tolist()
    dictation = Dictation(told, num_rows, NEW, lm.eos_ids)
    prompts = [Prompt((), tuple(ids[:-4]), tuple(ids[-4:]))] * num_rows
    lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[dictation], eos_token_id=None)
    return dictation, lm, meter


NOBODY = torch.empty(0, NEW, dtype=torch.int64)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("quest", SMALL),
    ("quest_retro", {**SMALL, "window": 3}),
    ("retrolm", {"retrieve_every": 4}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_row_that_is_told_what_it_would_say_agrees_with_itself(method: str, options: dict[str, Any]) -> None:
    free, _, _ = generate(method, NOBODY, 1, **options)
    told, _, _ = generate(method, free.said(), 2, **options)
    assert torch.equal(told.said(), free.said().expand(2, -1)) and told.agrees().all()
    assert (told.losses() - free.losses()).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_told_row_has_the_losses_of_its_own_tokens(method: str, options: dict[str, Any]) -> None:
    """With room for everything, those of one dense pass."""
    words = random_ids(NEW, seed=9)
    budget = {} if method == "full" else {"kv_budget": 96}
    told, lm, _ = generate(method, words[None], 2, **budget, **options)
    ids = torch.cat([random_ids(50, seed=5), words])
    logits = lm.model(ids[None]).logits[0, 49:-1].float()
    logits[:, list(lm.eos_ids)] = -torch.inf
    expected = -logits.log_softmax(-1).gather(1, words[:, None])[:, 0]
    assert torch.equal(told.said()[0], words) and (told.losses()[0] - expected).abs().max() < 1e-5
    assert torch.equal(told.agrees()[0], logits.argmax(-1) == words)
    assert not torch.equal(told.said()[1], words)


def test_rows_may_be_answered_one_after_the_other() -> None:
    """As full attention answers them where layers slide."""
    lm = RetroLM(exact_model("gemma3"), config=RetroConfig(kv_budget=BUDGET, page_size=4), method="full")
    ids = random_ids(50, seed=5).tolist()
    dictation = Dictation(random_ids(NEW, seed=9)[None], 3, NEW, lm.eos_ids)
    prompts = [Prompt((), tuple(row[:-4]), tuple(row[-4:])) for row in (ids, ids, ids[::-1])]
    answers = lm.answer(prompts, max_new_tokens=NEW, do_sample=False, logits_processor=[dictation], eos_token_id=None)
    assert dictation.num_parts == 3 and dictation.said().tolist() == [list(answer.token_ids) for answer in answers]
    assert torch.equal(dictation.said()[0], random_ids(NEW, seed=9)) and dictation.agrees()[1:].all()


def test_ends_are_ruled_out_and_noted() -> None:
    dictation = Dictation(torch.tensor([[3, 3, 3]]), 2, 3, (1,))
    for best in ([2, 2], [1, 2], [2, 1]):
        scores = torch.zeros(2, 5).scatter(1, torch.tensor(best)[:, None], 9.0)
        chosen = dictation(torch.zeros(2, 1), scores).argmax(-1)
        assert chosen[0] == 3 and chosen[1] != 1
    assert dictation.ends() == [1, 2]
    assert not dictation.agrees()[0].any() and dictation.agrees()[1].all()


# --- exposure --------------------------------------------------------------------------------------------------


def naive_exposure(window: int, partials: str, words: list[int]) -> float:
    """Tokens of all pages seen by each query over those of its own step's pages, over heads and sparse layers."""
    model, ids = exact_model("llama", seed=3), random_ids(50, seed=5)
    rule = naive.Quest(BUDGET, 4, 1)
    reader = NaiveRetro(model, rule, window, partials == "kept")
    reader.chunk(ids[:-1].tolist())
    own: dict[tuple[int, int, int], set[int]] = {}
    for token in [int(ids[-1]), *words[:-1]]:
        reader.step(token)
        newest = reader.num_tokens - 1
        own |= {place: set(pages) for place, pages in reader.seen.items() if place[2] == newest}
    sparse = [place for place in own if place[0] >= rule.num_dense]

    def tokens(pages: dict[tuple[int, int, int], set[int]]) -> int:
        return sum(j // 4 in pages[place] for place in sparse for j in range(place[2] + 1))

    return tokens(reader.seen) / tokens(own)


@pytest.mark.parametrize(("window", "partials"), some([2, 4], ["recomputed", "kept"], each=1))
def test_exposure_is_what_a_naive_count_says(window: int, partials: str) -> None:
    words = random_ids(NEW, seed=9)
    _, _, meter = generate("quest_retro", words[None], 1, window=window, partials=partials, **SMALL)
    (found,) = meter.by_sample()
    assert found > 1.02 and found == pytest.approx(naive_exposure(window, partials, words.tolist()))


def test_nothing_is_seen_later_without_revisions_or_with_room_for_everything() -> None:
    assert generate("quest_retro", NOBODY, 2, window=1, **SMALL)[2].by_sample() == [1.0, 1.0]
    assert generate("quest_retro", NOBODY, 1, kv_budget=96, window=4, **SMALL)[2].by_sample() == [1.0]
    assert generate("quest", NOBODY, 1, **SMALL)[2].by_sample() == []


# --- columns and rows ------------------------------------------------------------------------------------------


def test_columns_tell_knobs_from_options() -> None:
    column = column_of("quest_retro", {"window": 4})
    assert (column.knobs, column.options, column.name) == ({"window": 4}, {}, "quest_retro,window=4")
    assert column_of("retrolm", {"retrieve_every": 32}).options == {"retrieve_every": 32}
    assert [c.name for c in with_full_first([column, column])] == ["full", "quest_retro,window=4"]
    with pytest.raises(UserError, match="window"):
        column_of("quest_retro", {"windw": 4})
    with pytest.raises(UserError, match="no settings"):
        with_full_first([column_of("full", {"chunk_pages": 4})])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("generation")
    model = save_tiny_model(folder / "tiny", max_position_embeddings=4096)
    found = ["eval", "generation", "--model", model, "--out", folder / "out", "--length", 1000, "--num-tokens", 20]
    return [*found, "--task-option", "num_questions=2", "--page-size", 16, "--budget-share", 0.35]


def test_rows_are_written_as_methods_finish_and_not_measured_again(words: list[object]) -> None:
    path = Path(str(words[5])) / ROWS_FILE
    few = [*words, "--method", "quest,page=8,num_dense_layers=1"]
    assert run_cli(*few).code == 0
    before = path.read_bytes()
    assert [row["column"] for row in read_lines(path)] == ["full"] * 2 + ["quest,page=8,num_dense_layers=1"] * 2
    more = ["--method", "quest_retro,page=8,num_dense_layers=1,window=4", "--method", "retrolm,retrieve_every=8"]
    outcome = run_cli(*few, *more)
    assert outcome.code == 0 and "quest_retro,page=8" in outcome.out
    rows = list(read_lines(path))
    assert path.read_bytes().startswith(before) and len(rows) == 8
    assert [row["seed"] for row in rows] == [42, 43] * 4
    for row in rows:
        assert {"commit", "versions", "hardware", "command", "knobs", "options", "kv_budget"} <= {*row, "knobs"}
        assert 0 <= row["agreement"] <= 1 <= row["perplexity"] and row["tpot_s"] > 0 and row["batch_size"] == 4
        assert row["kv_budget"] in (None, int(0.35 * min(r["num_tokens"] for r in rows)) // 16 * 16)
    assert rows[0]["agreement"] == 1.0 and len(rows[0]["token_ids"]) == 20  # float32: one pass says the same
    assert rows[4]["exposure"] > 1.0 == rows[2]["exposure"] and rows[2]["perplexity"] != rows[0]["perplexity"]


def test_other_continuations_are_other_rows(words: list[object], tmp_path: Path) -> None:
    words = [tmp_path if word == words[5] else word for word in words]
    for seed in (1, 2):
        assert run_cli(*words, "--seed", seed, "--num-seeds", 1, "--method", "full").code == 0
    assert len({row["key"] for row in read_lines(tmp_path / ROWS_FILE)}) == 2


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--method", "quest,windw=2"], ["windw"]),
        (["--method", "quest,window"], ["METHOD,key=value"]),
        (["--budget-share", "0.01"], ["three pages"]),
        (["--budget-share", "1.5"], ["at most 1"]),
        (["--retriever", "auto", "--retriever", "none"], ["more than once"]),
        (["--task", "longgen/registr"], ["longgen/register"]),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[object], more: list[str], parts: list[str]) -> None:
    run_cli(*words, *more).refused_in_one_line(*parts)
