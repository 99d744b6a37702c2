"""Runs a list of measurements over the GPUs of one machine, several side by side where they share one.

    python scripts/measure.py configs/measure/answers.toml --out build/measured --seconds 1500 --set data=DATA

Several lists are run as one, in their order. A list is TOML:

    [names]
    qa = "--task longdoc-qa --num-samples 40"   # {qa} in what a job runs

    [[job]]
    name = "requests"                    # its folder under --out: log.txt, finished.json, and what it writes to {out}
    run = "retrolm bench … --output {out}/rows.json"
    share = 1.0                          # of a GPU; 1 = alone, for times; jobs run side by side up to 1 in all
    after = ["other"]                    # jobs that must have finished
    limit_s = 600                        # then it is stopped
    skip_without = ["{data}/books"]      # left out, with a line that says so, where such a path is missing

`{out}` is the job's folder, `{root}` is --out, `{python}` this Python; further names are given by --set NAME=VALUE,
which comes before what the list says of them. A name of the list may use those above it.

Jobs start in the order of the list, each as soon as it fits. The first GPU takes those that run alone while there are
some. What has finished isn't run again; what was stopped or failed runs again, so a command that resumes loses nothing.
Exit code 1 if a job failed, was stopped or did not start; 2 for a list that can't be used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FINISHED = "finished.json"
POLL_S, GRACE_S = 0.2, 20.0


@dataclass(frozen=True)
class Job:
    """One command of a list; see the top of this file."""

    name: str
    run: str
    share: float = 0.125
    after: tuple[str, ...] = ()
    limit_s: float = 3600.0
    skip_without: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        return self.share == 1.0


@dataclass
class Running:
    """A job that runs on a GPU (None: there is none)."""

    job: Job
    process: subprocess.Popen[bytes]
    started: float
    gpu: int | None
    stopped_at: float | None = None

    def stop(self, now: float) -> None:
        """Ask the job's processes to end, and after a while end them."""
        if self.stopped_at is None:
            self.stopped_at = now
            self._send(signal.SIGINT)
        elif now - self.stopped_at > GRACE_S:
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class ListError(Exception):
    """A list that can't be used."""


def read_lists(paths: list[Path], given: dict[str, str]) -> list[Job]:
    """The jobs of all lists, with names filled in."""
    jobs = [job for path in paths for job in _read(path, given)]
    known = [job.name for job in jobs]
    for job in jobs:
        if known.count(job.name) > 1:
            raise ListError(f"Two jobs are named {job.name!r}.")
        if missing := sorted(set(job.after) - set(known)):
            raise ListError(f"{job.name!r} runs after {missing[0]!r}, which is no job of these lists.")
    return jobs


def _read(path: Path, given: dict[str, str]) -> list[Job]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ListError(f"Can't read {path}: {error}") from None
    return [_job(path, row, table.get("names", {}), given) for row in table.get("job", [])]


def _job(path: Path, row: dict[str, Any], names: dict[str, str], given: dict[str, str]) -> Job:
    fields = Job.__dataclass_fields__
    if not {"name", "run"} <= row.keys() <= fields.keys():
        raise ListError(f"{path}: a job has name and run, and may have {', '.join(list(fields)[2:])}. Found: {row}")
    known = {**given, "out": str(Path(given["root"]) / row["name"])}
    try:
        for name, value in names.items():
            known.setdefault(name, _filled(value, known))
        row = {key: _filled(value, known) for key, value in row.items()}
    except KeyError as error:
        raise ListError(f"{path}: {row['name']!r} needs a value: --set {error.args[0]}=…") from None
    job = Job(**row)
    if not 0 < job.share <= 1:
        raise ListError(f"{path}: {job.name!r} has share = {job.share}; a share of a GPU is above 0 and at most 1.")
    return job


def _filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return value.format_map(names)
    return tuple(_filled(item, names) for item in value) if isinstance(value, list) else value


@dataclass
class Schedule:
    """What waits, runs and has ended."""

    root: Path
    gpus: list[int | None]
    waiting: list[Job]
    running: list[Running] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    def start_what_fits(self, now: float) -> None:
        """Start waiting jobs, in order, each on the first GPU with room for it."""
        for job in list(self.waiting):
            if not set(job.after) <= self.finished:
                continue
            gpu = next((place for place in range(len(self.gpus)) if self._fits(job, place)), None)
            if gpu is not None:
                self.waiting.remove(job)
                self.running.append(start(job, self.root, self.gpus[gpu], now))

    def _fits(self, job: Job, place: int) -> bool:
        there = [other.job for other in self.running if other.gpu == self.gpus[place]]
        if place == 0 and not job.alone and (any(other.alone for other in there) or self._one_runs_alone_next()):
            return False
        if job.alone:
            return place == 0 and not there
        return sum(other.share for other in there) + job.share <= 1 + 1e-9

    def _one_runs_alone_next(self) -> bool:
        return any(job.alone and set(job.after) <= self.finished for job in self.waiting)

    def end_what_is_over(self, now: float, deadline: float) -> None:
        """Take note of jobs that have ended; stop those whose time is up."""
        for ran in list(self.running):
            code = ran.process.poll()
            if code is None:
                if now > min(deadline, ran.started + ran.job.limit_s):
                    ran.stop(now)
                continue
            self.running.remove(ran)
            self._note(ran, code, now)

    def _note(self, ran: Running, code: int, now: float) -> None:
        seconds = round(now - ran.started, 1)
        if code == 0 and ran.stopped_at is None:
            self.finished.add(ran.job.name)
            row = {"command": ran.job.run, "seconds": seconds, "gpu": ran.gpu, "share": ran.job.share}
            whole = self.root / ran.job.name / FINISHED
            whole.with_suffix(".part").write_text(json.dumps(row) + "\n", encoding="utf-8")
            whole.with_suffix(".part").replace(whole)
            say(f"finished {ran.job.name} after {seconds} s")
        else:
            self.failed.append(ran.job.name)
            how = "stopped" if ran.stopped_at else f"failed (exit code {code})"
            say(f"{how} {ran.job.name} after {seconds} s: see {self.root / ran.job.name / 'log.txt'}")


def start(job: Job, root: Path, gpu: int | None, now: float) -> Running:
    """Start a job in a process group of its own."""
    folder = root / job.name
    folder.mkdir(parents=True, exist_ok=True)
    seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with (folder / "log.txt").open("ab") as log:
        log.write(f"$ {job.run}\n".encode())
        log.flush()
        process = subprocess.Popen(
            ["bash", "-c", job.run], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=_hear_ctrl_c, env={**os.environ, "PYTHONUNBUFFERED": "1", **seen},
        )  # fmt: skip
    say(f"started {job.name}" + ("" if gpu is None else f" on GPU {gpu}"))
    return Running(job, process, now, gpu)


def _hear_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would the jobs, which are stopped by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def say(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def to_run(jobs: list[Job], root: Path, only: set[str]) -> tuple[list[Job], set[str]]:
    """Jobs that are to run now, and the names of those that have finished before."""
    finished = {job.name for job in jobs if (root / job.name / FINISHED).exists()}
    waiting = []
    for job in jobs:
        missing = [path for path in job.skip_without if not Path(path).exists()]
        if job.name in finished or (only and job.name not in only):
            continue
        if missing:
            say(f"left out {job.name}: there is no {missing[0]}")
            continue
        waiting.append(job)
    return waiting, finished


def run_all(jobs: list[Job], root: Path, gpus: list[int | None], seconds: float, only: set[str]) -> int:
    """Run the jobs; returns the exit code."""
    waiting, finished = to_run(jobs, root, only)
    schedule = Schedule(root, gpus, waiting, finished=finished)
    deadline = time.monotonic() + seconds
    while True:
        try:
            now = time.monotonic()
            schedule.end_what_is_over(now, deadline)
            if now < deadline:
                schedule.start_what_fits(now)
            if not schedule.running:
                break
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            say("stopping")
            deadline = -float("inf")
    for job in schedule.waiting:
        say(f"did not start {job.name}")
    return 1 if schedule.failed or schedule.waiting else 0


def settings(pairs: list[str], root: Path) -> dict[str, str]:
    """What stands for the names of a list."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ListError(f"--set takes NAME=VALUE; {wrong[0]!r} has no '='.")
    given = dict(pair.split("=", 1) for pair in pairs)
    return {"root": str(root), "python": shlex.quote(sys.executable), **given}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop all jobs after so long")
    parser.add_argument("--only", default="", help="names of jobs, parted by commas")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args(arguments)
    # A shell lets what it starts in the background ignore Ctrl-C, which ends this run in order.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        jobs = read_lists(given.lists, settings(given.set, given.out.absolute()))
        only = set(given.only.split(",")) - {""}
        if unknown := sorted(only - {job.name for job in jobs}):
            raise ListError(f"There is no job {unknown[0]!r}. There are: {', '.join(job.name for job in jobs)}.")
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    gpus: list[int | None] = [*range(torch.cuda.device_count())] or [None]
    return run_all(jobs, given.out.absolute(), gpus, given.seconds, only)


if __name__ == "__main__":
    sys.exit(main())
