"""The manifest: what a base holds and with what it was read. Replacing it is what commits a change.

The file must be, byte for byte, what `render` makes of its content, and carries that content's sha256: any changed
byte is found.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .durable import open_regular, read_exactly, replace_file
from .faults import DamagedBaseError, MismatchError

FORMAT = "retrolm-knowledge-base"
VERSION = 1
MANIFEST_FILE = "manifest.json"
PAGES_FILE = "pages.safetensors"
INDEX_FILE = "index.safetensors"
TEXT_FILE = "text.txt"
DOCUMENT_FILES = (PAGES_FILE, INDEX_FILE, TEXT_FILE)
DOCUMENT_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")
MAX_MANIFEST_BYTES = 256 << 20
_MAX_COUNT = 1 << 48


@dataclass(frozen=True)
class FileEntry:
    """One file of a document.

    Attributes:
        sha256: digest of the whole file; of the header alone for pages, whose records have checksums of their own.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class DocumentEntry:
    """One document that was read whole.

    Attributes:
        id: name of its folder. sha256: digest of its text (UTF-8). source: path it came from, or "".
        num_sink: leading pages that are always attended. num_prefix: of them, those that hold no text.
        prefill_s: seconds reading took. peak_attended: most tokens that any of its pages attended.
        metadata: the user's own fields. added_at: UTC, ISO 8601.
    """

    id: str
    name: str
    source: str
    sha256: str
    num_tokens: int
    num_pages: int
    num_sink: int
    num_prefix: int
    prefill_s: float
    peak_attended: int
    added_at: str
    files: dict[str, FileEntry]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Removed:
    """A document's folder that no longer belongs to the base since `generation`; `gc` deletes it."""

    id: str
    generation: int


@dataclass(frozen=True)
class Manifest:
    """Content of a base at one moment.

    Attributes:
        base_id: random name of the base. generation: grows by one with every change.
        setup: how the engine was made (model, retriever, method, dtype, options), to make it again.
        fingerprint: all that changes a stored number.
        pages: shape of stored pages: dtype, num_layers, page_size, num_kv_heads, head_dim.
    """

    base_id: str
    generation: int
    setup: dict[str, Any]
    fingerprint: dict[str, Any]
    pages: dict[str, Any]
    documents: tuple[DocumentEntry, ...] = ()
    removed: tuple[Removed, ...] = ()

    def next(self, documents: list[DocumentEntry], removed: list[Removed]) -> Manifest:
        """The manifest that follows this one."""
        return replace(self, generation=self.generation + 1, documents=tuple(documents), removed=tuple(removed))


def require_fields(name: str, metadata: dict[str, Any]) -> None:
    """Raise `UserError` for a name or metadata that a manifest would not give back as they are."""
    try:
        fields = [name, metadata]
        same = json.loads(json.dumps(fields, ensure_ascii=False).encode()) == fields
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(
            f"Name or metadata of {name!a} can't be kept: metadata takes text, finite numbers, true, false, null, and "
            "lists and dicts of these under text keys; text must be Unicode. Leave the rest out."
        )


def render(manifest: Manifest) -> bytes:
    """The manifest's file, byte for byte."""
    content = asdict(manifest)
    head = {"format": FORMAT, "version": VERSION, "sha256": _digest(content), "content": content}
    return (json.dumps(head, indent=1, ensure_ascii=False, sort_keys=False) + "\n").encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit: put this manifest in place of the one before."""
    replace_file(folder / MANIFEST_FILE, render(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check a base's manifest.

    Raises:
        MismatchError: no knowledge base, or one of another format version. DamagedBaseError: a damaged one.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        raise MismatchError(f"{folder} is no knowledge base: {MANIFEST_FILE} is missing. See: retrolm kb create --help")
    with open_regular(path, str(path)) as (descriptor, size):
        if size > MAX_MANIFEST_BYTES:
            raise _damaged(str(path), f"it has {size} bytes")
        data = read_exactly(descriptor, 0, size, str(path))
    return parse(data, str(path))


def parse(data: bytes, what: str) -> Manifest:
    """The manifest in `data`; raises `DamagedBaseError` or `MismatchError` naming `what`."""
    try:
        head = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(what, "it is no JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise _damaged(what, f"it doesn't say format {FORMAT!r}")
    _require_version(head.get("version"), what)
    content = head.get("content")
    try:
        if not isinstance(content, dict) or head.get("sha256") != _digest(content):
            raise _damaged(what, "its checksum doesn't match")
        manifest = _from_json(content)
        written = render(manifest)
    except DamagedBaseError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(what, f"a field is missing or of a wrong kind ({error})") from None
    if written != data:
        raise _damaged(what, "it was changed since it was written")
    return manifest


def _require_version(version: Any, what: str) -> None:
    if version == VERSION:
        return
    older = isinstance(version, int) and version < VERSION
    advice = "Read the texts into a new base" if older else "Update retrolm"
    raise MismatchError(f"{what} has format version {version}; this retrolm reads version {VERSION}. {advice}.")


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _from_json(content: dict[str, Any]) -> Manifest:
    fields = dict(content)
    documents = tuple(_document(entry) for entry in fields.pop("documents"))
    removed = tuple(Removed(**entry) for entry in fields.pop("removed"))
    manifest = Manifest(**fields, documents=documents, removed=removed)
    ids = [entry.id for entry in documents] + [entry.id for entry in removed]
    if not all(DOCUMENT_ID.fullmatch(found) for found in ids) or len(set(ids)) < len(ids):
        raise ValueError("document ids")
    if not all(isinstance(found, dict) for found in (manifest.setup, manifest.fingerprint, manifest.pages)):
        raise ValueError("setup, fingerprint or pages")
    _require_counts(manifest.generation, *(entry.generation for entry in removed))
    return manifest


def _document(fields: dict[str, Any]) -> DocumentEntry:
    files = {name: FileEntry(**file) for name, file in fields["files"].items()}
    entry = DocumentEntry(**{**fields, "files": files})
    if set(files) != set(DOCUMENT_FILES) or not isinstance(entry.metadata, dict):
        raise ValueError(f"files or metadata of {entry.id}")
    strings = (entry.id, entry.name, entry.source, entry.sha256, entry.added_at, *(f.sha256 for f in files.values()))
    if not all(isinstance(value, str) for value in strings):
        raise ValueError(f"names of {entry.id}")
    counts = (entry.num_tokens, entry.num_pages, entry.num_sink, entry.num_prefix, entry.peak_attended)
    _require_counts(*counts, *(file.bytes for file in files.values()))
    return entry


def _require_counts(*counts: Any) -> None:
    if not all(type(count) is int and 0 <= count < _MAX_COUNT for count in counts):
        raise ValueError("a count")


def _damaged(what: str, reason: str) -> DamagedBaseError:
    return DamagedBaseError(f"{what} is damaged: {reason}. Restore it from a copy of the base.")
