"""`KnowledgeBase`: texts read once, kept on disk, asked in this process or any later one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .answers import KnowledgeAnswer, Passage, passages
from .check import Checked, check_base
from .check import Progress as CheckProgress
from .filters import Where, choose
from .folder import Snapshot, create_folder
from .index import text_sha256
from .manifest import MANIFEST_FILE, DocumentEntry, Manifest, require_fields
from .parts import StoredDocument
from .setup import load_engine, setup_of
from .shard import RecordShape
from .writer import Collected, Writer, require_same

if TYPE_CHECKING:
    from ..engine.model import RetroLM
    from .restore import FirstLayer, KeptDocument
    from .sources import Source

Progress = CheckProgress
_KEPT_OPEN = 4


@dataclass(frozen=True)
class Added:
    """What became of one text.

    Attributes:
        status: "added"; "updated" = it took the place of an earlier version; "duplicate" = the same text is there.
        num_read, num_kept: pages that were read, and taken over from the earlier version.
    """

    status: Literal["added", "updated", "duplicate"]
    document: DocumentEntry
    num_read: int
    num_kept: int


class KnowledgeBase:
    """A base on disk. Make one with `create` or `open`; it is a context manager.

    Readers see one consistent version per call, and the newest one with the next call. The engine is loaded when
    something is first read or asked.
    """

    def __init__(self, folder: str | Path, engine: RetroLM | str | Path | None = None) -> None:
        self.folder = Path(folder)
        self._snapshot = Snapshot(self.folder)
        self._seen = self._signature()
        self._engine = engine
        self._lm: RetroLM | None = None
        self._kept: dict[tuple[tuple[str, ...], str], KeptDocument] = {}

    @classmethod
    def create(cls, folder: str | Path, model: RetroLM | str | Path, **options: Any) -> KnowledgeBase:
        """Make an empty base for one model.

        Args:
            model: an engine, or what `RetroLM.from_pretrained` takes as a model.
            options: as for `RetroLM.from_pretrained`, where `model` is no engine.

        Raises:
            UserError: the folder isn't empty, the model can't be loaded, or its method doesn't choose pages.
        """
        from .fingerprint import fingerprint
        from .setup import described, new_engine
        from .tensors import record_shape

        lm = new_engine(model, options)
        setup = setup_of(lm, model, options)
        pages = record_shape(lm.page_layout()).to_json() | {"layout": described(lm.page_layout())}
        create_folder(Path(folder), setup, fingerprint(lm), pages)
        return cls(folder, lm)

    @classmethod
    def open(cls, folder: str | Path, model: RetroLM | str | Path | None = None) -> KnowledgeBase:
        """Open a base.

        Args:
            model: an engine, or where the base's model lies now; None = where it was when the base was made.

        Raises:
            MismatchError: there is no base, or one of another format version. DamagedBaseError: it is damaged.
        """
        return cls(folder, model)

    @property
    def manifest(self) -> Manifest:
        """The newest version of the base."""
        if self._signature() != self._seen:
            self.refresh()
        return self._snapshot.manifest

    @property
    def documents(self) -> tuple[DocumentEntry, ...]:
        return self.manifest.documents

    @property
    def lm(self) -> RetroLM:
        """The engine, loaded on first use; raises `MismatchError` if it isn't the one the base was read with."""
        if self._lm is None:
            from .fingerprint import fingerprint

            lm = load_engine(self._snapshot.manifest.setup, self._engine)
            require_same(self._snapshot.manifest.fingerprint, fingerprint(lm), f"{self.folder} and this model")
            self._lm = lm
        return self._lm

    def refresh(self) -> None:
        """Go on with the newest version of the base."""
        seen = self._signature()
        newer = Snapshot(self.folder)
        self._snapshot, self._seen = newer, seen  # the older one is let go with the last document that needs it
        ids = {entry.id for entry in newer.manifest.documents}
        self._kept = {key: kept for key, kept in self._kept.items() if ids.issuperset(key[0])}
        for kept in self._kept.values():
            kept.held = newer

    def close(self) -> None:
        """Let go of the base; it can't be used any more."""
        self._snapshot.close()
        self._kept.clear()

    def __enter__(self) -> KnowledgeBase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- content --------------------------------------------------------------------------------------------

    def add(
        self,
        source: str | Path | Source | Iterable[str | Path | Source],
        *,
        name: str | None = None,
        metadata: dict[str, Any] | None = None,
        progress: Progress | None = None,
        wait_s: float = 0.0,
        host_kv_bytes: int | None = None,
    ) -> list[Added]:
        """Read texts and keep them. Each becomes visible, whole, when it is done.

        A text whose name is in the base takes the place of the earlier one, read only from the first changed page on.

        Args:
            source: a text; a `pathlib.Path` to a file or folder; a `Source`; or a list of these.
            name: the document's name, for a single text or file; by default the path, or part of the text's digest.
            metadata: fields to filter by, JSON types. wait_s: how long to wait for another writer.
            host_kv_bytes: cap on KV kept in host memory while reading; the rest lies in a file in the base's folder.
                None = as the engine is set up.

        Returns:
            What became of each text, in order.

        Raises:
            UserError: a text can't be read, or there is no space; what was finished before stays.
        """
        require_fields(name or "", metadata or {})
        found = _sources(source, name)
        lm = self.lm
        if host_kv_bytes is not None:
            lm.use_disk_tier(self.folder, host_kv_bytes)
        added = []
        with Writer(self.folder, wait_s) as writer:
            for one in found:
                added.append(self._add(lm, writer, one, metadata or {}, progress))
        return added

    def _add(
        self, lm: RetroLM, writer: Writer, source: Source, metadata: dict[str, Any], progress: Progress | None
    ) -> Added:
        from .reading import read_text, store_text, stored_bytes

        require_fields(source.name, metadata)
        digest = text_sha256(source.text)
        same = [entry for entry in writer.manifest.documents if entry.sha256 == digest]
        before = [entry for entry in writer.manifest.documents if entry.name == source.name]
        if same:
            return Added("duplicate", _known(writer, same[0], before, metadata), 0, 0)
        old = self._stored(before[0]) if before else None
        read = read_text(lm, source.text, old, progress)
        entry = read.entry(source.name, source.path, metadata or (before[0].metadata if before else {}))
        entry = writer.add(entry, stored_bytes(read), partial(store_text, read), before[0].id if before else None)
        return Added("updated" if before else "added", entry, entry.num_pages - read.num_kept, read.num_kept)

    def remove(
        self, names: str | Iterable[str] | None = None, *, where: Where | None = None, wait_s: float = 0.0
    ) -> list[DocumentEntry]:
        """Take documents out, by name, id, source path or condition; `gc` gives their space back.

        Raises:
            UserError: nothing is named, or nothing there is of that name.
        """
        if names is None and where is None:
            raise UserError("Nothing to remove: name documents, or give a condition.")
        with Writer(self.folder, wait_s) as writer:
            found = choose(writer.manifest, [names] if isinstance(names, str) else names, where)
            return writer.remove(entry.id for entry in found)

    def merge(self, other: KnowledgeBase | str | Path, *, wait_s: float = 0.0) -> list[DocumentEntry]:
        """Copy the documents of another base in, without reading them again; equal texts are left out.

        Raises:
            MismatchError: the other base was read with something else, or two documents share a name.
        """
        snapshot = Snapshot(other.folder if isinstance(other, KnowledgeBase) else other)
        try:
            with Writer(self.folder, wait_s) as writer:
                return writer.merge(snapshot.base, snapshot.manifest, snapshot.manifest.documents)
        finally:
            snapshot.close()

    def gc(self, *, wait_s: float = 0.0) -> Collected:
        """Delete the files of removed documents and leftovers of crashes, as far as no reader wants them."""
        self.refresh()
        with Writer(self.folder, wait_s) as writer:
            return writer.collect()

    def verify(self, progress: Progress | None = None) -> Checked:
        """Check every byte against its checksum; faults are returned, not raised."""
        return check_base(self.folder, progress)

    # --- questions ------------------------------------------------------------------------------------------

    def select(
        self,
        documents: str | Iterable[str] | None = None,
        *,
        where: Where | None = None,
        first_layer: FirstLayer = "mean_key",
    ) -> KeptDocument:
        """One document, or several as one text: a `Document` to ask, stream from or converse about.

        Args:
            documents: names, ids or source paths; None = all.
            where: conditions on metadata: {"field": value} or ["field>=value", …].
            first_layer: what layers without scores take of several documents: pages by "mean_key", or the last ones.

        Raises:
            UserError: no such document, or several can't be asked together. DamagedBaseError: a file is damaged.
        """
        manifest = self.manifest
        found = choose(manifest, [documents] if isinstance(documents, str) else documents, where)
        key = (tuple(entry.id for entry in found), first_layer)
        if key not in self._kept:
            while len(self._kept) >= _KEPT_OPEN:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._restored(found, first_layer)
            self._kept[key].held = self._snapshot
        return self._kept[key]

    def ask(
        self,
        question: str,
        *,
        documents: str | Iterable[str] | None = None,
        where: Where | None = None,
        max_new_tokens: int = 64,
        raw: bool = False,
        first_layer: FirstLayer = "mean_key",
        **options: Any,
    ) -> KnowledgeAnswer:
        """Answer a question from the base.

        Args:
            documents, where, first_layer: as for `select`. The others: as for `Document.ask`.
        """
        document = self.select(documents, where=where, first_layer=first_layer)
        before = _bytes_read(document)
        answer = document.ask(question, max_new_tokens=max_new_tokens, raw=raw, **options)
        return KnowledgeAnswer(
            answer=answer,
            reuse="exact" if len(document.stretches) == 1 else "composed",
            documents=tuple(stretch.document.entry.name for stretch in document.stretches),
            passages=passages(document, answer.pages),
            num_tokens=document.num_tokens,
            num_pages=document.num_pages,
            page_bytes_read=_bytes_read(document) - before,
        )

    def query(
        self,
        question: str,
        *,
        documents: str | Iterable[str] | None = None,
        where: Where | None = None,
        top_k: int = 5,
        raw: bool = False,
        first_layer: FirstLayer = "mean_key",
    ) -> tuple[Passage, ...]:
        """The `top_k` best passages for a question, without an answer.

        First those that layers choose within the budget; further ones, with score 0, by their mean rank.
        """
        from .ranking import best_pages

        document = self.select(documents, where=where, first_layer=first_layer)
        return passages(document, best_pages(document, document.retrieve(question, raw=raw), top_k))

    def _restored(self, entries: Sequence[DocumentEntry], first_layer: FirstLayer) -> KeptDocument:
        from .restore import compose, restore

        stored = [self._stored(entry) for entry in entries]
        return restore(self.lm, stored[0]) if len(stored) == 1 else compose(self.lm, stored, first_layer)

    def _stored(self, entry: DocumentEntry) -> StoredDocument:
        return StoredDocument(self.folder, entry, RecordShape.from_json(self._snapshot.manifest.pages))

    def _signature(self) -> tuple[int, int, int]:
        """What changes whenever the manifest is replaced."""
        try:
            state = os.stat(self.folder / MANIFEST_FILE)
        except OSError:
            return (0, 0, 0)
        return (state.st_ino, state.st_mtime_ns, state.st_size)


def _known(writer: Writer, same: DocumentEntry, before: list[DocumentEntry], metadata: dict[str, Any]) -> DocumentEntry:
    """The entry of a text that is there already, with its new fields; an outdated one under its name goes."""
    if before and before[0].id != same.id:
        writer.remove([before[0].id])
    elif before and metadata and metadata != same.metadata:
        same = dataclasses.replace(same, metadata=metadata)
        writer.change(same)
    return same


def _bytes_read(document: KeptDocument) -> int:
    from .restored import RestoredStore

    store = document.encoder.parts.store
    assert isinstance(store, RestoredStore)
    return store.bytes_read


def _sources(given: str | Path | Source | Iterable[str | Path | Source], name: str | None) -> Iterable[Source]:
    """Each text, read when its turn comes."""
    from .sources import Source, files_in

    listed = [given] if isinstance(given, (str, Path, Source)) else list(given)
    found: list[str | Path | Source] = []
    for one in listed:
        found += files_in([one]) if isinstance(one, Path) else [one]
    if name is not None and len(found) != 1:
        raise UserError(f"One name can't stand for {len(found)} texts. Add them one by one, or leave it out.")
    return (_source(one, name) for one in found)


def _source(given: str | Path | Source, name: str | None) -> Source:
    from .sources import file_source, text_source

    if isinstance(given, Path):
        return file_source(given, name)
    if isinstance(given, str):
        return text_source(given, name or f"text {text_sha256(given)[:8]}")
    return given if name is None else dataclasses.replace(given, name=name)
