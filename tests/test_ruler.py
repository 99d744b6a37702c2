"""RULER generation: format against published and independently generated prompts, lengths, gold spans, cache."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.evaluation.tasks import get_task
from retrolm.evaluation.tasks.fit import largest_fitting
from retrolm.evaluation.tasks.generator import split_template
from retrolm.evaluation.tasks.prompt import TokenCounter, render
from retrolm.evaluation.tasks.ruler import RulerTask, ruler_tasks
from retrolm.evaluation.tasks.ruler.haystack import Essay
from retrolm.evaluation.tasks.ruler.needles import (
    DEPTHS,
    NEEDLE,
    NEEDLE_TASKS,
    NOISE,
    NeedleGenerator,
    template_of,
)
from retrolm.evaluation.tasks.sample import EvalSample
from tiny_tokenizer import STORY, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"
INDEPENDENT = json.loads((GOLDEN / "ruler_prompts.json").read_text(encoding="utf-8"))["prompts"]
TASKS = {task.name.removeprefix("ruler/"): task for task in ruler_tasks()}
SINGLE = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "essays").mkdir()
    (folder / "essays" / "a.txt").write_text(STORY * 3, encoding="utf-8")
    (folder / "essays" / "b.txt").write_text(STORY * 2, encoding="utf-8")
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": [_article(number) for number in range(6)]}))
    rows = [_hotpot_row(number) for number in range(8)]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    return folder


def _article(number: int) -> dict[str, Any]:
    texts = [f"House {number}-{part} belongs to owner {number}{part} and has {part} doors." for part in range(4)]
    return {"paragraphs": [{"context": text, "qas": _questions(text)} for text in texts]}


def _questions(text: str) -> list[dict[str, Any]]:
    owner = re.search(r"owner \d+", text)
    assert owner
    answers = [{"text": owner.group(), "answer_start": owner.start()}]
    return [{"question": f"Whose is {text[:9]}?", "answers": answers}, {"question": "Unanswerable?", "answers": []}]


def _hotpot_row(number: int) -> dict[str, Any]:
    titles = [f"Title {number}.{part}" for part in range(3)]
    return {
        "_id": str(number),
        "question": f"What links {number}?",
        "answer": f"link {number}",
        "context": [[title, [f"{title} is a text.", f" It holds link {number}."]] for title in titles],
        "supporting_facts": [[titles[0], 1], [titles[2], 1]],
    }


def _samples(task: str, data_dir: Path, length: int = 2000, count: int = 4, **options: Any) -> list[EvalSample]:
    return TASKS[task].samples(tiny_tokenizer(), length, count, data_dir=data_dir, **options)


def _num_tokens(sample: EvalSample, chat: bool = True) -> int:
    text = render(tiny_tokenizer(chat), sample.context + sample.question, sample.answer_prefix)
    return TokenCounter(tiny_tokenizer()).exact(text)


# --- format ---------------------------------------------------------------------------------------------------------


def test_published_rows_are_rendered_byte_for_byte() -> None:
    template, prefix, kind = template_of(NEEDLE_TASKS["niah_multikey_3"])
    for line in (GOLDEN / "ruler_niah_multikey_3.jsonl").read_text().splitlines():
        row = json.loads(line)
        pairs = re.findall(r"^One of the special magic uuids for (\S+) is: (\S+)\.$", row["input"], re.MULTILINE)
        query = next(key for key, value in pairs if value == row["outputs"][0])
        text = "\n".join(NEEDLE.format(kind="uuids", key=key, value=value) for key, value in pairs)
        context, question = split_template(template, text, kind=kind, query=query)
        assert context + question + prefix.format(kind=kind, query=query) == row["input"]


def _masked(context: str, *others: str) -> list[str]:
    """The texts with all keys and values masked; keys are read off the needles in the first one."""
    keys = sorted(re.findall(r"special magic \w+ for (.+?) is: ", context), key=len, reverse=True)
    texts = [context, *others]
    for key in keys:
        texts = [text.replace(key, "KEY") for text in texts]
    texts = [re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text) for text in texts]
    return [re.sub(r"\b\d{7}\b", "NUMBER", text) for text in texts]


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needle_prompts_match_an_independent_generator(task: str, data_dir: Path) -> None:
    theirs = INDEPENDENT[task]
    ours = _samples(task, data_dir)[0]
    prompt, prefix = _masked(theirs["input"], theirs["gen_prefix"])
    head, *body, question = prompt.split("\n")
    our_context, our_question, our_prefix = _masked(ours.context, ours.question, ours.answer_prefix)
    our_head, *our_body = our_context.split("\n")
    assert (our_head, our_question, our_prefix) == (head, "\n" + question, " " + prefix)
    assert len(ours.answers) == len(theirs["outputs"])
    if NEEDLE_TASKS[task].haystack == "essay":
        needle = re.compile(r"One of the special magic \w+ for KEY is: (NUMBER|UUID)\.")
        assert len(needle.findall(our_body[0])) == len(needle.findall(body[0]))
    else:
        assert set(our_body) == set(body)


def test_one_of_eight_needles_is_asked_for(data_dir: Path) -> None:
    task = get_task("needles/one_of_eight")
    (sample,) = task.samples(tiny_tokenizer(), 2000, 1, data_dir=data_dir)
    needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", sample.context)
    assert len(needles) == len(dict(needles)) == 8
    assert [value for key, value in needles if f" {key} " in sample.question] == sample.answers
    assert task.score(sample.answers[0], sample) == 1.0
    with pytest.raises(UserError, match="ask for one in tokens"):
        task.samples(tiny_tokenizer(), None, 1, data_dir=data_dir)


def _shape(text: str) -> str:
    """The prompt with its random words masked and repeated noise lines folded."""
    text = re.sub(r"VAR [A-Z]{5}\b", "VAR LONG", re.sub(r"VAR [A-Z]{3}\b", "VAR SHORT", text))
    text = re.sub(r"\b\d{5}\b", "VALUE", text)
    text = re.sub(r"( ?" + re.escape(NOISE) + r"\s*)+", "<noise>", text.replace("assgined", "assigned"))
    return re.sub(r"\s*<noise>\s*", "<noise>", re.sub(r"(?<= )[A-Z]{3}( [A-Z]{3}){4}", "NAMES", text))


def test_tracking_prompt_matches_an_independent_generator(data_dir: Path) -> None:
    ours = _samples("vt", data_dir)[0]
    theirs = INDEPENDENT["vt"]
    pattern = r"(Memorize.*?:\n\n|Question: .*)"
    prompt = _shape(ours.context + ours.question)
    # Noise lines and statements were joined by a space there (before 2025), by a line break since.
    assert re.findall(r"Memorize[^\n]*\n\n", prompt) == re.findall(r"Memorize[^\n]*\n\n", _shape(theirs["input"]))
    assert re.findall(pattern, prompt) == re.findall(pattern, _shape(theirs["input"]))
    assert _shape(ours.answer_prefix) == " " + _shape(theirs["gen_prefix"]) + " "
    assert "NAMES\n\n\n\nMemorize" in prompt and "NAMES\n\n\n\nMemorize" in _shape(theirs["input"])


@pytest.mark.parametrize("task", ["cwe", "fwe", "qa_1"])
def test_other_prompts_match_an_independent_generator(task: str, data_dir: Path) -> None:
    theirs, ours = INDEPENDENT[task], _samples(task, data_dir)[0]
    full = (theirs["input_example"] + "\n" if "input_example" in theirs else "") + theirs["input"]
    assert (ours.context + ours.question)[:90] == full[:90]
    assert (
        ours.question[: ours.question.rindex("?") + 1].split("\n")[:-1] == _tail(full, ours.question).split("\n")[:-1]
    )
    assert ours.answer_prefix.strip() == theirs["gen_prefix"]
    if task == "cwe":
        example = (
            r"\nQuestion: What are the 10 most common words in the above list\? Answer: .*? are:1\. .* 10\. \S+\nBelow"
        )
        assert re.search(example, full) and re.search(example, ours.context)


def _tail(text: str, question: str) -> str:
    return text[-len(question) :] if text.endswith(question) else text[text.index(question[:20]) :]


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_the_length_and_never_exceed_it(task: str, chat: bool, data_dir: Path) -> None:
    length = 2600 if task == "niah_multikey_1" else 2000
    samples = TASKS[task].samples(tiny_tokenizer(chat), length, 4, data_dir=data_dir)
    used = [_num_tokens(sample, chat) for sample in samples]
    assert used == [sample.extra["num_tokens"] for sample in samples]
    assert max(used) + samples[0].max_new_tokens <= length
    unit = {"cwe": 30, "fwe": 12, "qa_1": 60, "qa_2": 60}.get(task, 60)  # more than one unit takes
    assert used[0] + samples[0].max_new_tokens > length - 2 * unit - 10


@pytest.mark.parametrize("task", ["niah_single_1", "vt", "cwe", "qa_1"])
def test_a_length_too_small_names_the_smallest(task: str, data_dir: Path) -> None:
    with pytest.raises(UserError, match="at least") as error:
        _samples(task, data_dir, length=150)
    smallest = int(re.findall(r"at least (\d+)", str(error.value))[0])
    assert _samples(task, data_dir, length=smallest + 40, count=1)


def test_length_is_required(data_dir: Path) -> None:
    with pytest.raises(UserError, match="4096"):
        TASKS["vt"].samples(tiny_tokenizer(), None, 1)


@given(st.integers(1, 50), st.floats(0.5, 40), st.integers(0, 3000), st.integers(0, 400))
def test_largest_fitting_is_largest(smallest: int, slope: float, budget: int, offset: int) -> None:
    def tokens_of(size: int) -> float:
        return offset + slope * size + 7 * (size % 3 == 0) * (slope > 10)

    def fits(size: int) -> bool:
        return offset + slope * size <= budget

    size = largest_fitting(lambda n: offset + slope * n, budget, smallest)
    assert size == smallest or fits(size)
    assert not fits(size + 1)
    uneven = largest_fitting(tokens_of, budget, smallest)
    assert uneven == smallest or tokens_of(uneven) <= budget


def test_estimated_tokens_are_near_the_exact_ones(data_dir: Path) -> None:
    counter = TokenCounter(tiny_tokenizer())
    for task in TASKS:
        text = _samples(task, data_dir, count=1)[0].prompt
        assert counter.estimate(text) == pytest.approx(counter.exact(text), rel=0.01)


# --- contents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_gold_spans_are_the_asked_needles(task: str, data_dir: Path) -> None:
    for sample in _samples(task, data_dir):
        pieces = [sample.context[start:end] for start, end in sample.gold_spans]
        for piece, answer in zip(pieces, sample.answers, strict=True):
            assert re.fullmatch(rf"One of the special magic \w+ for .+ is: {answer}\.", piece)
            assert sample.context.count(answer) == 1
            key = piece.split(" for ")[1].split(" is:")[0]
            assert key in sample.question
            wanted = 4 if task == "niah_multivalue" else 1
            assert sample.context.count(f" for {key} is: ") == wanted


def test_tracking_spans_are_the_chain(data_dir: Path) -> None:
    for sample in _samples("vt", data_dir):
        chain = [sample.context[start:end] for start, end in sample.gold_spans]
        assert [statement.split()[1] for statement in chain] == sample.answers
        assert chain[0].split()[-1] in sample.question
        assert [statement.split()[-1] for statement in chain[1:]] == sample.answers[:-1]
        assert sample.gold_spans == sorted(sample.gold_spans)


def test_common_words_are_the_most_common(data_dir: Path) -> None:
    for length in (2000, 9000):
        sample = _samples("cwe", data_dir, length=length, count=1)[0]
        words = re.findall(r"\d+\. (\S+)", sample.context.split("Below")[-1])
        often = sorted(set(words), key=words.count, reverse=True)[:10]
        assert set(often) == set(sample.answers)
        assert words.count(often[0]) == (6 if length < 4096 else 30)


def test_coded_words_are_ranks_two_to_four(data_dir: Path) -> None:
    sample = _samples("fwe", data_dir, count=1)[0]
    words = sample.context.split("coded words. ")[1].split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert ranked[0] == "..." and ranked[1:4] == sample.answers


def test_question_documents_hold_the_evidence(data_dir: Path) -> None:
    for sample in _samples("qa_1", data_dir):
        (start, end), answer = sample.gold_spans[0], sample.answers[0]
        assert sample.context[start:end] == answer
        assert sample.context.count(f"{answer} and") == 1
    for sample in _samples("qa_2", data_dir):
        pieces = [sample.context[start:end] for start, end in sample.gold_spans]
        assert len(pieces) == 2 and all(sample.answers[0] in piece for piece in pieces)
        assert [int(number) for number in re.findall(r"^Document (\d+):", sample.context, re.MULTILINE)] == list(
            range(1, 1 + sample.context.count("Document "))
        )


def test_unanswerable_questions_are_left_out(data_dir: Path) -> None:
    samples = TASKS["qa_1"].samples(tiny_tokenizer(), 900, None, data_dir=data_dir)
    assert len(samples) == 24
    assert all("Unanswerable" not in sample.question for sample in samples)


def test_depths_are_the_official_ones_and_all_occur() -> None:
    essay = Essay(STORY * 40, "story")
    generator = NeedleGenerator(NEEDLE_TASKS["niah_single_2"], 4096, essay)
    places = {generator.draft(2000, 0, random.Random(seed)).extra["depths"][0] for seed in range(600)}
    assert places == {float(depth) for depth in DEPTHS}
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[1], DEPTHS[-1]) == (40, 0, 3, 100)


def test_needles_stand_at_their_depth() -> None:
    essay = Essay(" ".join(f"Sentence {number} ends." for number in range(200)), "numbers")
    generator = NeedleGenerator(NEEDLE_TASKS["niah_multivalue"], 4096, essay)
    for seed in range(20):
        draft = generator.draft(600, 0, random.Random(seed))
        before = [draft.context[:start].count("Sentence") for start, _ in sorted(draft.gold_spans)]
        assert before == [int(200 * depth / 100) for depth in draft.extra["depths"]]


def test_sentences_join_back_to_the_words_and_repeat() -> None:
    essay = Essay("One two. Mr. Hale spoke. Three four? five six! Seven", "x")
    assert essay.sentences(10) == ["One two.", "Mr. Hale spoke.", "Three four? five six!", "Seven"]
    assert essay.sentences(13) == [*essay.sentences(10), "One two.", "Mr."]
    assert essay.sentences(4) == ["One two.", "Mr. Hale"]


def test_distractors_never_carry_an_asked_key(data_dir: Path) -> None:
    sample = _samples("niah_multikey_2", data_dir, length=3000, count=1)[0]
    keys = re.findall(r"for (.+) is:", sample.context)
    asked = re.findall(r"for (.+) mentioned", sample.question)[0]
    assert len(keys) > 20 and keys.count(asked) == 1


def test_a_distractor_with_the_asked_key_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_of_three(kind: str, rng: random.Random) -> str:
        return rng.choice("abc")

    monkeypatch.setattr("retrolm.evaluation.tasks.ruler.needles.random_text", one_of_three)
    draft = NeedleGenerator(NEEDLE_TASKS["niah_multikey_3"], 4096).draft(30, 0, random.Random(0))
    asked = re.findall(r"for (.+) mentioned", draft.question)[0]
    assert draft.context.count(f" for {asked} is: ") == 1


# --- seeds, cache, options, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_samples_and_few_are_the_first_of_many(task: str, data_dir: Path) -> None:
    few, many = _samples(task, data_dir, count=2), _samples(task, data_dir, count=4)
    assert few == many[:2]
    assert _samples(task, data_dir, count=2, seed=7) != few


def test_cache_returns_the_stored_samples_and_keeps_settings_apart(data_dir: Path, tmp_path: Path) -> None:
    first = _samples("niah_single_2", data_dir, cache_dir=tmp_path)
    assert _samples("niah_single_2", data_dir, cache_dir=tmp_path) == first
    files = list(tmp_path.rglob("*"))
    assert sum(file.is_file() for file in files) == 1
    assert not [file for file in files if file.name.endswith(".tmp")]
    _samples("niah_single_2", data_dir, cache_dir=tmp_path, seed=1)
    TASKS["niah_single_2"].samples(tiny_tokenizer(chat=False), 1200, 4, data_dir=data_dir, cache_dir=tmp_path)
    assert sum(file.is_file() for file in tmp_path.rglob("*")) == 3


def test_a_broken_cache_file_is_named(data_dir: Path, tmp_path: Path) -> None:
    _samples("vt", data_dir, cache_dir=tmp_path)
    path = next(file for file in tmp_path.rglob("*") if file.is_file())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(path.name)):
        _samples("vt", data_dir, cache_dir=tmp_path)


@pytest.mark.parametrize("task, hint", [("niah_single_2", "essays=PATH"), ("qa_1", "squad_file"), ("qa_2", "hotpot")])
def test_missing_data_says_how_to_get_it(task: str, hint: str, tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(UserError, match=hint):
            TASKS[task].samples(tiny_tokenizer(), 1200, 1, data_dir=folder)


def test_files_can_be_given_as_options(data_dir: Path, tmp_path: Path) -> None:
    options = {"essays": data_dir / "essays" / "a.txt"}
    sample = TASKS["niah_single_2"].with_options(options).samples(tiny_tokenizer(), 1200, 1)[0]
    assert sample.extra["haystack"] == "a.txt"
    with pytest.raises(UserError, match="squad_file"):
        TASKS["qa_1"].with_options({"squad_fil": "x"})
    with pytest.raises(UserError, match="does not exist"):
        TASKS["qa_2"].with_options({"hotpot_file": tmp_path / "no.json"}).samples(tiny_tokenizer(), 900, 1)


def test_haystack_from_packed_books(data_dir: Path, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"title": title, "text": STORY}) + "\n" for title in "ab")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "books.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    (tmp_path / "books" / "README.txt").write_text("not part of the text")
    books = TASKS["niah_single_2"].samples(tiny_tokenizer(), 1200, 1, data_dir=tmp_path)[0]
    assert books.extra["haystack"] == "books"
    (tmp_path / "two.txt").write_text(STORY * 2)
    plain = TASKS["niah_single_2"].with_options({"essays": tmp_path / "two.txt"}).samples(tiny_tokenizer(), 1200, 1)[0]
    assert books.context == plain.context
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No text in"):
        TASKS["niah_single_2"].with_options({"essays": tmp_path / "empty"}).samples(tiny_tokenizer(), 1200, 1)


def test_scores_are_shares_of_references() -> None:
    sample = EvalSample("0", "ruler/x", 100, "", "", ["Alpha", "Beta"], 128)
    needles = RulerTask("ruler/niah_multivalue", 128, "string_match_all")
    assert needles.score("it is alpha.", sample) == 0.5
    assert needles.score("BETA\x00and ALPHA", sample) == 1.0
    assert needles.score("", sample) == 0.0
    assert TASKS["qa_1"].score("it is alpha.", sample) == 1.0
