"""The schedule of the mixture, lengths, and the settings that drive them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.training.data import load_stage1_data_config, stage1_data_config
from retrolm.training.data.mixture import CYCLE, Schedule, text_length
from stage1_pool_maker import tiny_config

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 100), min_size=1)
RECIPES = sorted((Path(__file__).parent.parent / "configs" / "stage1").glob("*.toml"))


@given(weights=WEIGHTS, seed=st.integers(0, 100))
def test_shares_follow_the_weights(weights: dict[str, float], seed: int) -> None:
    schedule = Schedule(weights, seed)
    counts = Counter(schedule.part(index)[0] for index in range(sum(schedule.shares.values())))
    total = sum(weights.values())
    for part, weight in weights.items():
        assert counts[part] == pytest.approx(max(1, CYCLE * weight / total), abs=1)


@given(weights=WEIGHTS, start=st.integers(0, 5000))
def test_occurrences_count_without_gaps(weights: dict[str, float], start: int) -> None:
    schedule = Schedule(weights, 3)
    seen: dict[str, int] = {}
    for index in range(start, start + 300):
        part, occurrence = schedule.part(index)
        assert occurrence == seen.get(part, occurrence - 1) + 1
        seen[part] = occurrence


@given(count=st.integers(1, 50), epoch=st.integers(0, 20))
def test_each_epoch_is_a_permutation(count: int, epoch: int) -> None:
    schedule = Schedule({"a": 1}, 9)
    rows = [schedule.item("a", epoch * count + place, count) for place in range(count)]
    assert sorted(rows) == list(range(count))


def test_lengths_are_grouped_and_log_uniform() -> None:
    config = tiny_config(min_tokens=2048, max_tokens=16384, length_group=8)
    lengths = [text_length(config, index) for index in range(8000)]
    assert all(len(set(lengths[i : i + 8])) == 1 for i in range(0, 8000, 8))
    assert min(lengths) >= 2048 and max(lengths) <= 16384
    halves = Counter(length > 5793 for length in lengths)  # the geometric mean
    assert 0.4 < halves[True] / 8000 < 0.6


def test_curriculum_grows_to_the_longest() -> None:
    config = tiny_config(min_tokens=1000, max_tokens=9000, length_group=1, length_curriculum=1000)
    assert text_length(config, 0) == 1000
    assert max(text_length(config, i) for i in range(400, 500)) <= 5000
    assert max(text_length(config, i) for i in range(1000, 1400)) > 8000


def test_long_texts_come_after_the_curriculum_and_grow() -> None:
    short = {"min_tokens": 1000, "max_tokens": 4000, "length_group": 4, "length_curriculum": 400}
    plain, config = tiny_config(**short), tiny_config(**short, long_share=0.25, long_tokens=16000)
    lengths = [text_length(config, i) for i in range(4000)]
    assert lengths[:400] == [text_length(plain, i) for i in range(400)]
    long = [i for i, length in enumerate(lengths) if length > 4000]
    assert 0.2 < len(long) / 3600 < 0.3
    assert all(length == text_length(plain, i) for i, length in enumerate(lengths) if i not in set(long))
    assert max(lengths[400:500]) <= 4000 + 12000 / 4 < 12000 < max(lengths[800:]) <= 16000
    assert (plain.longest, config.longest) == (4000, 16000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_token": 3}, "Did you mean 'min_tokens'"),
        ({"titles": 1.5}, "share between 0 and 1"),
        ({"max_tokens": 100}, "below min_tokens"),
        ({"weights": {}}, "at least one positive"),
        ({"weights": {"a": -1.0, "b": 1.0}}, "no negative"),
        ({"min_hard_negatives": 40}, "exceeds"),
        ({"sources": []}, "names no source"),
        ({"sources": [{"name": "a", "path": "b"}]}, "lacks: format"),
        ({"sources": [{"name": "a", "path": "b", "format": "csv"}]}, "is not a choice"),
        ({"sources": [{"name": "a", "path": "b", "format": "squad", "pth": 1}]}, "Unknown data option 'pth'"),
        ({"length_group": 0}, "at least 1"),
        ({"long_share": 0.1, "long_tokens": 2000}, "long_share needs long_tokens of at least"),
        ({"long_share": 2}, "share between 0 and 1"),
        ({"min_tokens": "512"}, "min_tokens must be a whole number, got '512'"),
        ({"min_tokens": 512.5}, "min_tokens must be a whole number"),
        ({"min_tokens": True}, "min_tokens must be a whole number"),
        ({"mined_negatives": -1}, "mined_negatives must not be negative"),
        ({"exclude": "eval.jsonl"}, "exclude must be a list of texts"),
        ({"exclude": [1]}, "exclude must be a list of texts"),
        ({"weights": [1, 2]}, "weights must be a table of finite numbers"),
        ({"weights": {"a": "10"}}, "weights must be a table of finite numbers"),
        ({"weights": {"a": float("inf")}}, "weights must be a table of finite numbers"),
        ({"sources": "eval.jsonl"}, r"Write each under a line \[\[data.sources\]\]"),
        ({"sources": {"name": "a", "path": "b", "format": "squad"}}, r"Write each under a line"),
        ({"sources": [{"nam": "a", "path": "b", "format": "squad"}]}, "Did you mean 'name'"),
        ({"sources": [{"path": "b", "format": "squad"}]}, r"A \[\[data.sources\]\] table lacks: name"),
        ({"sources": [{"name": 5, "path": "b", "format": "squad"}]}, "name must be a text, got 5"),
        ({"sources": [{"name": "a", "path": 5, "format": "squad"}]}, "path must be a text, got 5"),
        ({"sources": [{"name": "a", "path": "b", "format": "squad", "drop": "x"}]}, "drop must be a list of texts"),
        ({"sources": [{"name": "a", "path": "b", "format": "squad", "max_rows": "x"}]}, "max_rows must be a whole"),
        ({"sources": [{"name": "a", "path": "b", "format": "squad", "max_rows": 0}]}, "max_rows must be at least 1"),
        ({"sources": [{"name": "a", "path": "b", "format": "squad", "max_bm25_rank": 5}]}, "table of whole numbers"),
    ],
)
def test_settings_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Can't read the recipe"):
        load_stage1_data_config(tmp_path / "none.toml")
    (tmp_path / "empty.toml").write_text("[train]\n")
    with pytest.raises(UserError, match=r"no \[data\] table"):
        load_stage1_data_config(tmp_path / "empty.toml")
    (tmp_path / "value.toml").write_text("data = 5\n")
    with pytest.raises(UserError, match=r"no \[data\] table"):
        load_stage1_data_config(tmp_path / "value.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="Can't read the recipe"):
        load_stage1_data_config(tmp_path / "bytes.toml")


def test_committed_recipes_load() -> None:
    assert len(RECIPES) >= 2
    for path in RECIPES:
        config = load_stage1_data_config(path)
        assert bool(config.weights.get("facts")) == bool(config.weights.get("registers"))
        assert config.exclude, f"{path.name} keeps no evaluation set out of training"
        assert all("covidqa" in source.drop for source in config.sources if source.name == "stage1_pairs")


def test_a_list_in_toml_becomes_a_tuple() -> None:
    source = {"name": "a", "path": "b", "format": "squad", "drop": ["x"]}
    assert stage1_data_config({"sources": [source], "weights": {"a": 1}}).sources[0].drop == ("x",)
