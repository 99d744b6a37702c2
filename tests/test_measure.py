"""The runner of lists of measurements: order, room on a GPU, what comes after what, stopping, running again."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import measure  # noqa: E402


def listed(tmp_path: Path, *jobs: dict[str, Any]) -> Path:
    """A list file; JSON values are TOML values here."""
    rows = ["[[job]]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in job.items()) for job in jobs]
    (tmp_path / "list.toml").write_text("\n\n".join(rows))
    return tmp_path / "list.toml"


def stamped(name: str, seconds: float = 0.3, **more: Any) -> dict[str, Any]:
    """A job that writes when it began and ended."""
    return {"name": name, "run": f"date +%s.%N > {{out}}/times; sleep {seconds}; date +%s.%N >> {{out}}/times", **more}


def times(root: Path, name: str) -> tuple[float, float]:
    began, ended = map(float, (root / name / "times").read_text().split())
    return began, ended


def run(path: Path, root: Path, gpus: list[int | None], seconds: float = 60, only: set[str] = frozenset()) -> int:  # type: ignore[assignment]
    jobs = measure.read_lists([path], measure.settings(["data=DATA"], root))
    return measure.run_all(jobs, root, gpus, seconds, only)


def test_jobs_share_a_gpu_up_to_its_whole_and_one_alone_has_it_for_itself(tmp_path: Path) -> None:
    path = listed(
        tmp_path, stamped("a", share=0.5), stamped("b", share=0.5), stamped("c", share=0.5), stamped("alone", share=1.0)
    )
    assert run(path, tmp_path, [0]) == 0
    alone, a, b, c = (times(tmp_path, name) for name in ("alone", "a", "b", "c"))
    assert alone[1] <= a[0] and max(a[0], b[0]) < min(a[1], b[1]) and c[0] >= min(a[1], b[1])


def test_what_needs_another_comes_after_it_and_not_where_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = listed(
        tmp_path,
        stamped("second", after=["first"]),
        stamped("first"),
        {"name": "broken", "run": "echo why >&2; exit 3"},
        stamped("never", after=["broken"]),
    )
    assert run(path, tmp_path, [None]) == 1
    assert times(tmp_path, "first")[1] <= times(tmp_path, "second")[0]
    said = capsys.readouterr().out
    assert "failed (exit code 3) broken" in said and "did not start never" in said
    assert "why" in (tmp_path / "broken" / "log.txt").read_text()


def test_other_gpus_work_while_one_runs_alone(tmp_path: Path) -> None:
    shown = {"name": "where", "run": "echo $CUDA_VISIBLE_DEVICES > {out}/gpu"}
    path = listed(tmp_path, stamped("alone", 1.0, share=1.0), shown)
    assert run(path, tmp_path, [0, 1]) == 0
    assert (tmp_path / "where" / "gpu").read_text().strip() == "1"
    assert json.loads((tmp_path / "alone" / "finished.json").read_text())["gpu"] == 0


def test_what_finished_is_not_run_again_and_what_was_stopped_is(tmp_path: Path) -> None:
    once = {"name": "once", "run": "echo x >> {root}/once.txt"}
    long = {"name": "long", "run": "sleep $(cat {root}/seconds); touch {out}/through", "limit_s": 0.5}
    path = listed(tmp_path, once, long)
    (tmp_path / "seconds").write_text("30")
    began = time.monotonic()
    assert run(path, tmp_path, [None]) == 1
    assert time.monotonic() - began < 15 and not (tmp_path / "long" / "through").exists()
    (tmp_path / "seconds").write_text("0")
    assert run(path, tmp_path, [None]) == 0
    assert (tmp_path / "once.txt").read_text() == "x\n" and (tmp_path / "long" / "through").exists()


@pytest.mark.parametrize("hearing", [signal.default_int_handler, signal.SIG_IGN])
def test_all_stop_at_the_end_of_the_time(
    hearing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this process doesn't hear Ctrl-C, as what a shell starts in the background."""
    path = listed(tmp_path, stamped("long", 30), stamped("late", share=1.0, after=["long"]))
    monkeypatch.setattr(measure, "GRACE_S", 60.0)
    before, began = signal.signal(signal.SIGINT, hearing), time.monotonic()
    try:
        assert run(path, tmp_path, [0], seconds=0.5) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 15
    assert "stopped long" in (said := capsys.readouterr().out) and "did not start late" in said


def test_jobs_without_their_files_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = listed(tmp_path, stamped("needs", skip_without=["{data}/books"]), stamped("other"))
    assert run(path, tmp_path, [None], only={"needs"}) == 0
    assert "left out needs: there is no DATA/books" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"name": "a"}, "a job has name and run"),
        ({"name": "a", "run": "x", "gpus": 2}, "a job has name and run"),
        ({"name": "a", "run": "{pool}"}, "needs a value: --set pool="),
        ({"name": "a", "run": "x", "share": 2.0}, "a share of a GPU"),
        ({"name": "a", "run": "x", "after": ["b"]}, "runs after 'b', which is no job"),
    ],
)
def test_lists_that_can_not_be_used(
    job: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure.main([str(listed(tmp_path, job)), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_names_stand_for_values_and_lists_follow_each_other(tmp_path: Path) -> None:
    first = listed(tmp_path, {"name": "a", "run": "echo {words} > {out}/said"})
    first.write_text('[names]\nwords = "list"\n\n' + first.read_text())
    second = tmp_path / "second.toml"
    second.write_text('[[job]]\nname = "b"\nrun = "cat {root}/a/said > {out}/said"\nafter = ["a"]\n')
    assert measure.main([str(first), str(second), "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one" / "b" / "said").read_text() == "list\n"
    assert measure.main([str(first), "--out", str(tmp_path / "two"), "--set", "words=given"]) == 0
    assert (tmp_path / "two" / "a" / "said").read_text() == "given\n"


def test_two_jobs_of_one_name_and_names_of_no_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = {"name": "a", "run": "true"}
    assert measure.main([str(listed(tmp_path, job, job)), "--out", str(tmp_path)]) == 2
    assert measure.main([str(listed(tmp_path, job)), "--out", str(tmp_path), "--only", "b"]) == 2
    assert measure.main([str(tmp_path / "none.toml"), "--out", str(tmp_path)]) == 2
    assert "There are: a." in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((SCRIPTS.parent / "configs" / "measure").glob("*.toml")), ids=lambda p: p.stem)
def test_the_lists_that_come_along_can_be_read(path: Path, tmp_path: Path) -> None:
    assert measure.read_lists([path], measure.settings(["data=D", "pools=P", "stage2=S"], tmp_path))


def test_an_adapter_trained_with_its_retriever_is_measured_with_it() -> None:
    jobs = measure.read_lists(
        [SCRIPTS.parent / "configs" / "measure" / "training.toml"],
        measure.settings(["data=DATA", "pools=POOLS", "stage2=STAGE2"], Path("ROOT")),
    )
    joint = [job for job in jobs if "_joint/run/adapter" in job.run]
    assert len(joint) == 2
    for job in joint:
        folder = job.run.partition("--adapter ")[2].partition("/adapter")[0]
        assert f"--retriever {folder}/retriever" in job.run


def test_a_name_may_use_names_above_it_and_what_is_given_comes_first(tmp_path: Path) -> None:
    path = listed(tmp_path, {"name": "who", "run": "echo {greeting} > {out}/said"})
    path.write_text('[names]\nwhom = "world"\ngreeting = "hello {whom} of {data} in {out}"\n\n' + path.read_text())
    (job,) = measure.read_lists([path], measure.settings(["data=DATA", "whom=you"], tmp_path))
    assert job.run == f"echo hello you of DATA in {tmp_path}/who > {tmp_path}/who/said"


@pytest.mark.parametrize("path", sorted((SCRIPTS.parent / "configs" / "measure").glob("*.toml")), ids=lambda p: p.stem)
def test_nothing_is_left_to_fill_in_the_lists(path: Path, tmp_path: Path) -> None:
    given = [f"{name}={name.upper()}" for name in ("data", "pools", "stage2")]
    for job in measure.read_lists([path], measure.settings(given, tmp_path)):
        assert not re.search(r"[{}]", job.run.replace("${", "")), job.run
