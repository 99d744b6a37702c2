"""LongBench v1, E and v2: official prompts, truncation, chat exceptions and scores, on rows written here."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.evaluation.tasks import get_task
from retrolm.evaluation.tasks.longbench_sets import EXTENDED_SETS, SETS
from retrolm.evaluation.tasks.prompt import truncate_middle
from retrolm.evaluation.tasks.sample import EvalSample
from tiny_tokenizer import STORY, tiny_tokenizer

OFFICIAL = json.loads((Path(__file__).parent / "golden" / "longbench_config.json").read_text())
CONTEXTS = {"passage_retrieval_en": "Paragraph 1: A.\n\nParagraph 2: Here.\n\nParagraph 12: B.", "lcc": "x = 1\n" * 40}
INPUTS = {"triviaqa": "Passage:\nA ship came.\nQuestion:\nWho came?\nAnswer:\n", "repobench-p": "y = 2\n" * 20}
ANSWERS = {"passage_retrieval_en": ["Paragraph 2"], "passage_count": ["7"], "trec": ["Food"]}


def _row(name: str, number: int = 0, words: int = 900) -> dict[str, Any]:
    return {
        "_id": f"{name}-{number}",
        "context": CONTEXTS.get(name, f"{number} {STORY}"),
        "input": INPUTS.get(name, f"Who spoke {{first}} in {number}?"),
        "answers": ANSWERS.get(name, ["the captain", "he"]),
        "all_classes": ["Food", "Fo", "Place"] if name == "trec" else None,
        "length": words,
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "longbench"
    folder.mkdir()
    for name in SETS:
        lines = [json.dumps(_row(name, number)) for number in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lines = [json.dumps(_row("qasper", number, words)) for number, words in enumerate((3999, 4000, 8000))]
    (folder / "qasper_e.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder.parent


def _samples(name: str, data_dir: Path, **options: Any) -> list[EvalSample]:
    return get_task(f"longbench/{name}").samples(tiny_tokenizer(), data_dir=data_dir, **options)


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_the_official_ones(name: str, data_dir: Path) -> None:
    sample = _samples(name, data_dir)[0]
    assert sample.prompt == OFFICIAL["prompts"][name].format(**_row(name))
    assert sample.max_new_tokens == OFFICIAL["max_new_tokens"][name]
    assert SETS[name].prompt == OFFICIAL["prompts"][name]


def test_every_official_english_set_is_there() -> None:
    assert set(SETS) == set(OFFICIAL["prompts"])
    assert len(EXTENDED_SETS) == 13


def test_only_few_shot_and_code_sets_go_without_chat_template(data_dir: Path) -> None:
    plain = {name for name in SETS if not _samples(name, data_dir)[0].chat}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def test_the_question_starts_late_where_a_passage_or_code_precedes_it(data_dir: Path) -> None:
    assert _samples("triviaqa", data_dir)[0].question == "Question:\nWho came?\nAnswer:\n"
    assert _samples("lcc", data_dir)[0].question == "x = 1\n" * 10 + "Next line of code:\n"
    assert _samples("repobench-p", data_dir)[0].question == "y = 2\n" * 10 + "Next line of code:\n"


def test_a_long_prompt_loses_its_middle_as_officially(data_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    for length in (120, 121):
        for name in ("hotpotqa", "trec"):
            sample = _samples(name, data_dir, length=length, num_samples=1)[0]
            prompt = OFFICIAL["prompts"][name].format(**_row(name, int(sample.sample_id.split("-")[-1])))
            ids, half = tokenizer(prompt)["input_ids"], int(length / 2)
            assert sample.prompt == tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
            assert sample.prompt.endswith(sample.question)


@given(st.integers(2, 80), st.booleans(), st.integers(0, 60))
def test_truncation_keeps_both_ends(max_tokens: int, drop_odd: bool, question_words: int) -> None:
    question = "why " * question_words
    context, rest = truncate_middle(tiny_tokenizer(), STORY, question, max_tokens, drop_odd)
    ids = tiny_tokenizer()(STORY + question)["input_ids"]
    if len(ids) <= max_tokens:
        assert (context, rest) == (STORY, question)
    else:
        kept = max_tokens - (max_tokens % 2 if drop_odd else 0)
        assert len(tiny_tokenizer()(context + rest)["input_ids"]) <= kept + 2
        assert STORY.startswith(context[: max(len(context) // 4, 1)]) or not context
        assert (STORY + question).endswith(rest)


def test_retrieval_knows_its_paragraph_unless_truncated(data_dir: Path) -> None:
    sample = _samples("passage_retrieval_en", data_dir)[0]
    assert [sample.context[start:end] for start, end in sample.gold_spans] == ["Paragraph 2: Here."]
    assert _samples("passage_retrieval_en", data_dir, length=60)[0].gold_spans == []


def test_scores_use_each_sets_metric(data_dir: Path) -> None:
    def score(name: str, prediction: str) -> float:
        return get_task(f"longbench/{name}").score(prediction, _samples(name, data_dir)[0])

    assert score("hotpotqa", "The Captain!") == 1.0
    assert score("triviaqa", "\n\nhe\nand so on") == 1.0
    assert score("hotpotqa", "\n\nhe\nand so on") < 1.0
    assert score("trec", "Food\nPlace") == 1.0  # the second line doesn't count, nor does "Fo" inside "Food"
    assert score("trec", "Food, Place") == 0.5
    assert score("passage_count", "7 or 8") == 0.5
    assert score("passage_retrieval_en", "Paragraph 2") == 1.0
    assert score("gov_report", "the captain") == pytest.approx(1.0)
    assert score("samsum", "") == 0.0
    assert score("lcc", "# comment\nthe captain") == 1.0


def test_extra_facts(data_dir: Path) -> None:
    assert _samples("samsum", data_dir)[0].extra["stop"] == ["\n"]
    assert _samples("trec", data_dir)[0].extra["all_classes"] == ["Food", "Fo", "Place"]
    assert _samples("triviaqa", data_dir)[0].extra["first_line"] is True
    extended = get_task("longbench-e/qasper").samples(tiny_tokenizer(), data_dir=data_dir)
    assert [sample.extra["bucket"] for sample in extended] == ["0-4k", "4-8k", "8k+"]


def test_fewer_samples_are_a_seeded_choice_that_grows(data_dir: Path) -> None:
    few = _samples("qasper", data_dir, num_samples=5)
    more = _samples("qasper", data_dir, num_samples=9)
    assert {sample.sample_id for sample in few} < {sample.sample_id for sample in more}
    assert few == _samples("qasper", data_dir, num_samples=5)
    assert few != _samples("qasper", data_dir, num_samples=5, seed=1)
    assert len(_samples("qasper", data_dir, num_samples=99)) == 20
    with pytest.raises(UserError, match="at least 1"):
        _samples("qasper", data_dir, num_samples=0)


def test_missing_and_broken_files_are_named(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="THUDM/LongBench"):
        _samples("qasper", tmp_path)
    with pytest.raises(UserError, match="needs a data folder"):
        get_task("longbench/qasper").samples(tiny_tokenizer())
    (tmp_path / "qasper.jsonl").write_text('{"_id": 1}\n{"_id": ')
    with pytest.raises(UserError, match="line 2"):
        _samples("qasper", tmp_path)


def test_packed_and_hub_files_read_alike(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (data_dir / "longbench" / "qasper.jsonl").read_bytes()
    (tmp_path / "qasper.jsonl.gz").write_bytes(gzip.compress(plain))
    assert _samples("qasper", tmp_path) == _samples("qasper", data_dir)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", plain)
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, repo_type: str) -> str:
        asked.append((repo, name))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert _samples("qasper", Path("hub")) == _samples("qasper", data_dir)
    assert asked == [("THUDM/LongBench", "data.zip")]


def test_a_failing_hub_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, name: str, repo_type: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=r"no network.*unpack it"):
        _samples("qasper", Path("hub"))


def test_version_two(tmp_path: Path) -> None:
    row = {"_id": "a", "context": f" {STORY * 3} ", "question": "Who? ", "answer": "C", "difficulty": "hard"}
    row |= {"length": "short", "domain": "Stories", **{f"choice_{letter}": f" {letter * 3}" for letter in "ABCD"}}
    (tmp_path / "data.json").write_text(json.dumps([row]))
    task = get_task("longbench-v2/all")
    sample = task.samples(tiny_tokenizer(), data_dir=tmp_path)[0]
    assert sample.prompt == (
        "Please read the following text and answer the question below.\n\n<text>\n"
        + (STORY * 3).strip()
        + "\n</text>\n\n"
        "What is the correct answer to this question: Who?\nChoices:\n(A) AAA\n(B) BBB\n(C) CCC\n(D) DDD\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    assert sample.extra == {"difficulty": "hard", "length_class": "short", "domain": "Stories"}
    assert task.score("The correct answer is (C).", sample) == 1.0
    assert task.score("The correct answer is (D).", sample) == 0.0
    cut = task.samples(tiny_tokenizer(), 400, data_dir=tmp_path)[0]
    assert cut.question == sample.question and len(cut.context) < len(sample.context)
