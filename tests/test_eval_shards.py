"""Samples shared out over shards: the same rows as one process gives, whatever gets lost on the way."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrolm.errors import UserError
from retrolm.evaluation.answering import Answered, Batch, LocalAnswerer
from retrolm.evaluation.journal import read_lines
from retrolm.evaluation.ray_shards import RayShards, shard_resources
from retrolm.evaluation.readers import Prediction
from retrolm.evaluation.runner import SAMPLES_FILE, Runner
from retrolm.evaluation.shards import MAX_LOSSES, LostShardError, share_out
from retrolm.evaluation.variants import Variant
from retrolm.methods import BudgetError
from tiny_eval import PROVENANCE, VARIANTS, run_stories, story_sample, story_set, tiny_answerer

ANSWER = Prediction("e", 9, 1, False, {"prefill": 9, "decode": 9}, 0.1, 0.1)
VARIANT = Variant("recency", 64)
RESULT = ("key", "score", "prediction", "num_generated", "failed", "error")


class FakeShards:
    """Shards that are lost whenever a sample in `killers` is given to them, as often as it says there."""

    def __init__(self, num_shards: int, killers: dict[str, int]) -> None:
        self.num_shards = num_shards
        self._killers = dict(killers)
        self._tickets: dict[int, tuple[int, Batch]] = {}
        self.busy: set[int] = set()
        self.num_replaced = 0

    def start(self, shard: int, variant: Variant, batch: Batch) -> int:
        assert shard not in self.busy
        self.busy.add(shard)
        self._tickets[ticket := len(self._tickets)] = (shard, batch)
        return ticket

    def wait(self, tickets: Collection[int]) -> int:
        return max(tickets)

    def result(self, ticket: int) -> list[Answered]:
        shard, batch = self._tickets[ticket]
        self.busy.remove(shard)
        for sample in batch:
            if self._killers.get(sample.sample_id, 0):
                self._killers[sample.sample_id] -= 1
                raise LostShardError("gone")
        return [Answered(sample, ANSWER, {}, PROVENANCE) for sample in batch]

    def replace(self, shard: int) -> None:
        self.num_replaced += 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.dictionaries(st.sampled_from("01234567"), st.integers(1, 5), max_size=4)
)
def test_every_sample_comes_back_once_whatever_is_lost(
    num_shards: int, batch_size: int, killers: dict[str, int]
) -> None:
    samples = [story_sample(number) for number in range(8)]
    batches = [samples[first : first + batch_size] for first in range(0, 8, batch_size)]
    shards = FakeShards(num_shards, killers)
    found = [answered for part in share_out(shards, VARIANT, batches, PROVENANCE) for answered in part]
    assert sorted(answered.sample.sample_id for answered in found) == list("01234567")
    broken = {answered.sample.sample_id for answered in found if isinstance(answered.outcome, str)}
    assert broken <= {name for name, count in killers.items() if count >= MAX_LOSSES - (batch_size > 1)}
    assert {name for name, count in killers.items() if count >= MAX_LOSSES} <= broken
    assert shards.num_replaced <= sum(killers.values())


def test_what_a_shard_raises_ends_the_run() -> None:
    class Overrun(FakeShards):
        def result(self, ticket: int) -> list[Answered]:
            raise BudgetError("too much")

    with pytest.raises(BudgetError):
        list(share_out(Overrun(2, {}), VARIANT, [[story_sample(1)]], PROVENANCE))


def test_shards_get_a_gpu_each_or_the_processors_of_a_machine() -> None:
    assert shard_resources([(16, 4), (16, 4)], None) == ({"num_cpus": 1, "num_gpus": 1}, 8)
    assert shard_resources([(16, 4)], 2)[1] == 2
    assert shard_resources([(8, 0), (16, 0)], None) == ({"num_cpus": 8, "num_gpus": 0}, 2)
    assert shard_resources([(2, 0)], 2) == ({"num_cpus": 1, "num_gpus": 0}, 2)
    with pytest.raises(UserError, match="more than the cluster's 4 GPUs"):
        shard_resources([(16, 4)], 5)
    with pytest.raises(UserError, match="2 CPUs"):
        shard_resources([(2, 0)], 3)


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(UserError, match=rf"No Ray cluster can be used at '{address}' .*refused"):
            RayShards(address, LocalAnswerer, {})


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"retrolm\[ray\]"):
        RayShards("local", tiny_answerer, PROVENANCE)


# --- on Ray itself -------------------------------------------------------------------------------------------------


class Fragile(LocalAnswerer):
    """Ends its own process the first time it meets sample 3."""

    marker: Path

    def answer(self, variant: Variant, batch: Batch) -> list[Answered]:
        if any(sample.sample_id == "3" for sample in batch) and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(variant, batch)


def fragile_answerer(marker: Path) -> LocalAnswerer:
    found = tiny_answerer()
    found.__class__ = Fragile
    found.marker = marker  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayShards]:
    """Shards on Ray, one of which is lost during the first cell: the only one, or (slow) one of two."""
    marker = tmp_path_factory.mktemp("marker") / "was lost"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the shards import this file
        patch.setenv("OMP_NUM_THREADS", "1")
        with RayShards("local", functools.partial(fragile_answerer, marker), PROVENANCE, request.param) as found:
            yield found


def rows_of(out: Path) -> list[tuple[Any, ...]]:
    return sorted(tuple(str(row.get(key)) for key in RESULT) for row in read_lines(out / SAMPLES_FILE))


def test_shards_give_the_rows_of_one_process_although_one_is_lost(shards: RayShards, tmp_path: Path) -> None:
    part = story_set(5)
    broken = story_sample(9, context="", question="")
    part.samples.append(broken)
    cells = Runner(shards, tmp_path / "ray").run([part], VARIANTS)
    run_stories(tmp_path / "alone", extra=[broken])
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "alone")
    assert [cell["num_failed"] for cell in cells] == [0, 1, 1] and len(rows_of(tmp_path / "ray")) == 18
    assert shards._make.args[0].exists()  # type: ignore[attr-defined]


def test_a_variant_that_cannot_be_opened_is_refused_as_in_one_process(shards: RayShards) -> None:
    with pytest.raises(UserError, match="exceeds the model's window"):
        shards.facts(Variant("recency", 1 << 20))
