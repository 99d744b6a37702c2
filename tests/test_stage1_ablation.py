"""The ablation list: every run measured on the same questions, written at once, never run twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import stage1_pool_maker
from cli_runner import run_cli
from retrolm.errors import UserError
from retrolm.training.stage1 import ablation as room
from retrolm.training.stage1.ablation import AblationList, Change, load_ablation, run_ablation
from retrolm.training.stage1.config import Stage1Recipe
from retrolm.training.stage1.trainer import Stage1Trainer
from stage1_run_maker import tiny_backbone, tiny_recipe

COMMITTED = Path(__file__).parent.parent / "configs" / "ablation"
CHANGES = (
    Change("as it is", "baseline"),
    Change("no step", "baseline", untrained=True),
    Change("rank 2", "rank", {"rank": 2}),
    Change("shorter", "length", {}, {"max_tokens": 200}),
)
FACTS = {"commit": "0", "versions": {}, "hardware": {}, "command": "test"}


def tiny_list(*changes: Change, **train: Any) -> AblationList:
    return AblationList(tiny_recipe(num_steps=2, accumulate=1, **train), changes or CHANGES)


def run(out: Path, ablation: AblationList, **options: Any) -> list[dict[str, Any]]:
    pool = stage1_pool_maker.tiny_pool()
    return run_ablation(ablation, pool, out, FACTS, load=lambda recipe: tiny_backbone(), **options)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ablation.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a list that was never disturbed."""
    out: Path = tmp_path_factory.mktemp("whole")
    run(out, tiny_list())
    return out


def test_one_row_and_one_line_of_the_table_for_each_change(whole: Path) -> None:
    rows = lines(whole)
    assert [row["name"] for row in rows] == [change.name for change in CHANGES]
    assert [row["steps"] for row in rows] == [2, 0, 2, 2] and rows[1]["tokens"] == 0 < rows[0]["tokens"]
    assert rows[3]["changes"] == {"train": {}, "data": {"max_tokens": 200}}
    assert {"recall", "best_recall", "seed", "commit", "hardware", "dev_samples", "recall_pages"} <= set(rows[0])
    table = (whole / "ablation.md").read_text(encoding="utf-8")
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + len(CHANGES)
    assert "| length | shorter |" in table


def test_nothing_is_trained_twice(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole / "ablation.jsonl").read_bytes()
    monkeypatch.setattr(room, "Stage1Trainer", None)
    shown: list[str] = []
    assert len(run(whole, tiny_list(), on_row=lambda row: shown.append(row["name"]))) == len(CHANGES) == len(shown)
    assert (whole / "ablation.jsonl").read_bytes() == before


def test_a_list_broken_off_goes_on_to_the_same_rows(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Stage1Trainer.save

    def save_and_break(self: Stage1Trainer) -> None:
        saved(self)
        if "rank_2" in str(self.out) and self.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage1Trainer, "save", save_and_break)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_list())
    assert len(lines(tmp_path)) == 2
    with (tmp_path / "ablation.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"torn')
    monkeypatch.undo()
    run(tmp_path, tiny_list())
    wanted, found = lines(whole), lines(tmp_path)
    for row in (*wanted, *found):
        del row["train_s"]
    assert found == wanted


def test_several_processes_share_a_list(whole: Path, tmp_path: Path) -> None:
    """Parts one after the other, in any order, leave the rows and the table of one process."""
    ablation = tiny_list()
    assert [row["name"] for row in run(tmp_path, ablation, only=CHANGES[1::2])] == ["no step", "shorter"]
    assert "| shorter |" in (tmp_path / "ablation.md").read_text(encoding="utf-8")
    shown: list[str] = []
    rows = run(tmp_path, ablation, only=CHANGES[:3:2], on_row=lambda row: shown.append(row["name"]))
    assert [row["name"] for row in rows] == [change.name for change in CHANGES] and shown == ["as it is", "rank 2"]
    wanted, found = ({row["name"]: row for row in lines(folder)} for folder in (whole, tmp_path))
    for row in (*wanted.values(), *found.values()):
        row.pop("train_s")
    assert found == wanted


def test_a_change_of_weights_leaves_the_others() -> None:
    change = Change("more facts", "mixture", {}, {"weights": {"facts": 7}})
    before = tiny_recipe().data.weights
    assert tiny_list(change).recipe_of(change).data.weights == {**before, "facts": 7} != before


def test_time_can_be_the_limit(tmp_path: Path) -> None:
    (row,) = run(tmp_path, tiny_list(CHANGES[0]), seconds=1e-9)
    assert row["steps"] == 1


def test_all_are_measured_on_the_recipes_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Stage1Recipe] = []
    monkeypatch.setattr(
        Stage1Trainer, "dev_recall", lambda self: seen.append(self.recipe) or {"mean": None, "best": None}
    )
    rows = run(tmp_path, tiny_list(CHANGES[3]))
    assert seen[0].data.max_tokens == tiny_recipe().data.max_tokens != 200
    assert rows[0]["recall"] is None and "–" in (tmp_path / "ablation.md").read_text(encoding="utf-8")  # noqa: RUF001


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.toml")), ids=lambda path: path.stem)
def test_the_lists_of_the_project_can_be_run(path: Path) -> None:
    found = load_ablation(path, {"num_steps": 7})
    assert all(found.recipe_of(change).train.num_steps == 7 for change in found.changes)
    choices = {change.choice for change in found.changes}
    assert {"baseline", "D3", "D4", "D9", "D13", "loss", "rank", "page size", "length"} <= choices
    for change in found.changes:
        train = found.recipe_of(change).train
        assert train.page_size * train.recall_pages == 1024


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[changes]]\nname = "a"', "names no recipe"),
        ('recipe = "r.toml"\n[[changes]]\nname = "a"\n[[changes]]\nname = "a"', "two changes of the name 'a'"),
        ('recipe = "r.toml"\n[[changes]]\nname = "a"\ntrain = {rnak = 3}', "Did you mean 'rank'"),
        ('recipe = "r.toml"\n[[changes]]\nname = "a"\ntrian = {rank = 3}', "Unknown key of a change 'trian'"),
        ('recipe = "r.toml"\nstep = 3\n[[changes]]\nname = "a"', "Unknown key of an ablation list 'step'"),
        ('recipe = "r.toml"\n[[changes]]\nchoice = "rank"', "without a name"),
        ('recipe = "r.toml"', "no change"),
    ],
)
def test_lists_that_cannot_be_run_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_bytes((COMMITTED.parent / "stage1" / "smollm2-135m.toml").read_bytes())
    path = tmp_path / "list.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_ablation(path)


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    words = ["train", "ablate", COMMITTED / "stage1-smollm2-135m.toml", "--pool", tmp_path, "--out", tmp_path / "out"]
    run_cli(*words, "--only", "D99").refused_in_one_line("--only 'D99'", "D13")
    for part in ("0/3", "4/3", "2", "a/b"):
        run_cli(*words, "--part", part).refused_in_one_line("--part", "2/6")
    run_cli(*words, "--seconds", 0).refused_in_one_line("--seconds")
    run_cli(*words).refused_in_one_line("is no prepared pool")
