"""Kills writers of a base with SIGKILL and checks what is left; needs no torch. Also run by `make soak`.

Usage: kb_crash_worker.py FOLDER --trials N [--seed S] [--steps]. With --steps each durable operation is a place to
die, one after the other; otherwise the time is random.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import kb_plain
from retrolm.knowledge_base import durable
from retrolm.knowledge_base.check import check_base
from retrolm.knowledge_base.manifest import read_manifest
from retrolm.knowledge_base.writer import Writer


def work(base: Path, other: Path, seed: int, done: int) -> None:
    """Add, replace, remove, merge and collect at random; each finished change is told through the pipe `done`."""
    rng = random.Random(seed)
    with Writer(base) as writer:
        while True:
            own = [entry for entry in writer.manifest.documents if entry.name.startswith("doc")]
            change = rng.choice(["add", "add", "replace", "remove", "merge", "gc"])
            if change == "add":
                name = f"doc {seed} {rng.random()}"
                kb_plain.add(writer, name, rng.randrange(1 << 30), num_pages=rng.randint(1, 40))
            elif change == "replace" and own:
                entry = rng.choice(own)
                kb_plain.add(writer, entry.name, rng.randrange(1 << 30), rng.randint(1, 40), replaces=entry.id)
            elif change == "remove" and len(own) > 3:
                writer.remove([rng.choice(writer.manifest.documents).id])
            elif change == "merge":
                source = read_manifest(other)
                writer.merge(other, source, source.documents[: rng.randint(1, 2)])
            elif change == "gc":
                writer.collect()
            os.write(done, (render_state(writer) + "\n").encode())


def render_state(writer: Writer) -> str:
    """All document ids of the present version, which nobody may lose any more."""
    return f"{writer.manifest.generation} " + ",".join(entry.id for entry in writer.manifest.documents)


def die_at(step: int) -> Callable[[], None]:
    """Die before the n-th durable operation."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def plant(tick: Callable[[], None]) -> None:
    """Let every write, sync, replace and delete tick first."""

    def wrapped(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            tick()
            return real(*arguments, **options)

        return call

    durable.sync = wrapped(durable.sync)  # type: ignore[assignment]
    for name in ("write", "replace", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, wrapped(getattr(os, name)))


def live(base: Path, other: Path, seed: int, done: int, step: int | None) -> NoReturn:
    """The life of one writer, which only SIGKILL should end."""
    try:
        if step is not None:
            plant(die_at(step))
        work(base, other, seed, done)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def trial(base: Path, other: Path, seed: int, step: int | None) -> int:
    """One writer that is killed; returns how many changes it had finished. Raises `AssertionError` for any loss."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        live(base, other, seed, writing, step)
    os.close(writing)
    if step is None:
        time.sleep(random.Random(seed).expovariate(40))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, f"seed {seed}, step {step}: the writer ended by itself ({status})"
    check(base, lines, f"seed {seed}, step {step}")
    return len(lines)


def check(base: Path, told: list[str], where: str) -> None:
    found = check_base(base)
    assert found.sound, f"{where}: {found.problems}"
    manifest = read_manifest(base)
    if told:
        generation, _, ids = told[-1].partition(" ")
        assert manifest.generation >= int(generation), f"{where}: a finished change is lost"
        if manifest.generation == int(generation):
            assert ids == ",".join(entry.id for entry in manifest.documents), f"{where}: other documents"
        else:  # the change under way was finished but not told: one document more, less or other
            assert len(set(ids.split(",")) ^ {entry.id for entry in manifest.documents}) <= 2, where
    with Writer(base) as writer:  # the lock of the dead is free
        writer.collect()
        kept = writer.manifest.documents[-6:]
        writer.remove(entry.id for entry in writer.manifest.documents if entry not in kept)
        writer.collect()
    after = check_base(base)
    assert after.sound and after.num_unused == 0, f"{where}: {after}"
    leftovers = [path.name for path in base.iterdir() if path.name.startswith(".")]
    assert not leftovers, f"{where}: {leftovers}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", action="store_true")
    options = parser.parse_args()
    base = kb_plain.base_of(options.folder / "base", "one", "two")
    other = kb_plain.base_of(options.folder / "other", "three", "four", "five")
    finished = 0
    for number in range(options.trials):
        finished += trial(base, other, options.seed + number, number + 1 if options.steps else None)
    print(f"{options.trials} writers killed, {finished} changes finished before, nothing lost")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
