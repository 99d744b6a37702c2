"""`retrolm kb list`, `info`, `verify`: looking at a base. None of them loads a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .kb_options import BaseArgument
from .options import JsonFlag
from .screen import OUT, count, error_line, note, print_json, progress_bar, show_table, size


def list_documents(base: BaseArgument, as_json: JsonFlag = False) -> None:
    """List the documents of a base."""
    from ..knowledge_base.manifest import DocumentEntry, read_manifest

    def row(entry: DocumentEntry) -> tuple[str, ...]:
        fields = ", ".join(f"{key}={value}" for key, value in entry.metadata.items())
        return (entry.name, count(entry.num_tokens), count(entry.num_pages), size(entry.num_bytes), fields)

    documents = read_manifest(Path(base)).documents
    if as_json:
        print_json([asdict(entry) | {"bytes": entry.num_bytes} for entry in documents])
        return
    show_table(("document", "tokens", "pages", "size", "metadata"), [row(e) for e in documents], right=(1, 2, 3))


def info(base: BaseArgument, as_json: JsonFlag = False) -> None:
    """Show what a base was made with, and how large it is."""
    from ..knowledge_base.manifest import read_manifest

    manifest = read_manifest(Path(base))
    found = {
        "base": base,
        "version": manifest.generation,
        "num_documents": len(manifest.documents),
        "num_tokens": sum(entry.num_tokens for entry in manifest.documents),
        "num_pages": sum(entry.num_pages for entry in manifest.documents),
        "bytes": sum(entry.num_bytes for entry in manifest.documents),
        "num_removed": len(manifest.removed),
        "setup": manifest.setup,
        "pages": manifest.pages,
        "fingerprint": manifest.fingerprint,
    }
    if as_json:
        print_json(found)
        return
    setup = manifest.setup
    rows = [
        ("documents", count(len(manifest.documents))),
        ("tokens", count(sum(entry.num_tokens for entry in manifest.documents))),
        ("size", size(sum(entry.num_bytes for entry in manifest.documents))),
        ("model", str(setup.get("model"))),
        ("method", str(setup.get("method"))),
        ("retriever", str((manifest.fingerprint.get("retriever") or {}).get("name", "none"))),
        ("budget", f"{manifest.fingerprint.get('kv_budget')} tokens, pages of {manifest.fingerprint.get('page_size')}"),
        ("pages as", f"{manifest.pages.get('dtype')} ({manifest.pages.get('layout', {}).get('bits', 16)} bits)"),
    ]
    show_table(("base", base), rows)
    if manifest.removed:
        note(f"{count(len(manifest.removed))} removed documents still take space: retrolm kb gc {base}")


def verify(base: BaseArgument, as_json: JsonFlag = False) -> int:
    """Check every byte of a base against its checksums. Exits with 1 if anything is wrong."""
    from ..knowledge_base.check import check_base

    with progress_bar(f"Checking {base}", "records") as progress:
        found = check_base(base, progress)
    if as_json:
        print_json(asdict(found) | {"sound": found.sound})
        return 0 if found.sound else 1
    for problem in found.problems:
        error_line(problem.message)
    if found.sound:
        OUT.print(f"{count(found.num_documents)} documents, {count(found.num_records)} page records: all sound")
    if found.num_unused:
        note(f"{count(found.num_unused)} folders belong to no document: retrolm kb gc {base}")
    return 0 if found.sound else 1
