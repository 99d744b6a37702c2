"""`retrolm kb create`, `add`, `remove`, `merge`, `gc`: what a base holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .kb_options import BaseArgument, ModelOption, WaitOption, WhereOption, parse_metadata
from .loading import require_pages
from .options import EngineOptions, JsonFlag, whole_bytes, with_engine_options
from .screen import count, error_line, note, plain, print_json, progress_bar, seconds, size, snippet, waiting

if TYPE_CHECKING:
    from ..knowledge_base.base import Added, KnowledgeBase
    from ..knowledge_base.sources import Source


@with_engine_options()
def create(engine: EngineOptions, base: BaseArgument, as_json: JsonFlag = False) -> None:
    """Make an empty base for one model, retriever, method and budget; these stay what they are."""
    engine.check()
    require_pages(engine, "kb create")
    with waiting(f"Loading {snippet(engine.model, 60)} …"):
        from ..engine.quiet import silence_libraries
        from ..knowledge_base.base import KnowledgeBase

        silence_libraries()
        made = KnowledgeBase.create(
            base,
            engine.model,
            retriever=None if engine.retriever == "none" else engine.retriever,
            adapter=None if engine.adapter == "none" else engine.adapter,
            method=engine.method,
            method_options=engine.method_options(),
            dtype=engine.dtype,
            **engine.stated(),
        )
    lm = made.lm
    if as_json:
        print_json({"base": base, "fingerprint": made.manifest.fingerprint})
        return
    print(f"{base}: ready for texts. Next: retrolm kb add {base} FILE")
    note(f"{engine.model} · budget {count(lm.config.kv_budget)} · method {lm.method.name} · {lm.retriever_name}")


def add(
    base: BaseArgument,
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Files, folders, or - for standard input.")
    ],
    name: Annotated[str | None, typer.Option(help="The document's name, for a single text.")] = None,
    meta: Annotated[list[str] | None, typer.Option("--meta", help="key=value to filter by; may be repeated.")] = None,
    host_kv_gb: Annotated[
        float | None, typer.Option(help="Cap on KV in host memory while reading, in GB; the rest goes to disk.",
                                   show_default="none")
    ] = None,
    model: ModelOption = None,
    wait_s: WaitOption = 0.0,
    as_json: JsonFlag = False,
) -> int:  # fmt: skip
    """Read texts into a base. A text that is there already is left out; an edited one is read from its first changed
    page on. Exits with 1 if some of several files could not be read."""
    metadata, cap = parse_metadata(meta), whole_bytes("--host-kv-gb", host_kv_gb)
    failed: list[str] = []
    found: list[Source] = list(_sources(sources, name, failed))
    opened = open_with_engine(base, model)
    added = []
    for source in found:
        with progress_bar(f"Reading {snippet(source.name, 40)}") as progress:
            added += opened.add(source, metadata=metadata, progress=progress, wait_s=wait_s, host_kv_bytes=cap)
        if not as_json:
            print(plain(_added_line(added[-1])), flush=True)
    if as_json:
        print_json({"added": [_added_json(one) for one in added], "failed": failed})
    return 1 if failed else 0


def remove(
    base: BaseArgument,
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME…", help="Names, ids or source paths.")] = None,
    where: WhereOption = None,
    wait_s: WaitOption = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Take documents out of a base; `retrolm kb gc` gives their space back."""
    from ..knowledge_base.base import KnowledgeBase

    gone = KnowledgeBase.open(base).remove(names or None, where=where or None, wait_s=wait_s)
    if as_json:
        print_json({"removed": [entry.name for entry in gone], "bytes": sum(entry.num_bytes for entry in gone)})
        return
    for entry in gone:
        print(plain(f"removed {entry.name}"))
    note(f"{size(sum(entry.num_bytes for entry in gone))} to be freed by: retrolm kb gc {base}")


def merge(
    base: BaseArgument,
    others: Annotated[list[str], typer.Argument(metavar="OTHER…", help="Bases whose documents to copy in.")],
    wait_s: WaitOption = 0.0,
    as_json: JsonFlag = False,
) -> None:
    """Copy the documents of other bases in, without reading them again."""
    from ..knowledge_base.base import KnowledgeBase

    opened = KnowledgeBase.open(base)
    added = [entry for other in others for entry in opened.merge(other, wait_s=wait_s)]
    if as_json:
        print_json({"added": [entry.name for entry in added]})
        return
    for entry in added:
        print(plain(f"added {entry.name}"))
    note(f"{count(len(added))} documents copied; equal texts are left out.")


def gc(base: BaseArgument, wait_s: WaitOption = 0.0, as_json: JsonFlag = False) -> None:
    """Delete the files of removed documents and what a crash left behind."""
    from ..knowledge_base.base import KnowledgeBase

    found = KnowledgeBase.open(base).gc(wait_s=wait_s)
    if as_json:
        print_json(asdict(found))
        return
    print(f"{count(found.num_deleted)} folders deleted, {size(found.num_bytes)} freed")
    if found.num_held:
        note(f"{count(found.num_held)} removed documents wait for a reader that still has an older version open.")


def open_with_engine(base: str, model: str | None) -> KnowledgeBase:
    """Open a base and load its engine, which compares fingerprints."""
    from ..engine.quiet import silence_libraries
    from ..knowledge_base.base import KnowledgeBase

    opened = KnowledgeBase.open(base, model)
    with waiting(f"Loading {snippet(model or str(opened.manifest.setup.get('model')), 60)} …"):
        silence_libraries()
        opened.lm  # noqa: B018  (loads and compares fingerprints, before any text is read)
    return opened


def _sources(given: list[str], name: str | None, failed: list[str]) -> Iterator[Source]:
    """All texts; of several files those that can't be read are told and left out."""
    from ..knowledge_base.sources import file_source, files_in, text_source

    paths: list[str | Path] = []
    for one in given:
        paths += [one] if one == "-" else files_in([one])
    if name is not None and len(paths) > 1:
        raise UserError(f"One --name can't stand for {len(paths)} files. Add them one by one, or leave it out.")
    for path in paths:
        try:
            if path == "-":
                from ..engine.text_files import read_stdin

                yield text_source(read_stdin(), name or "standard input")
            else:
                yield file_source(path, name)
        except UserError as error:
            if len(paths) == 1:
                raise
            failed.append(str(path))
            error_line(str(error))


def _added_line(added: Added) -> str:
    entry = added.document
    if added.status == "duplicate":
        return f"{entry.name}: there already"
    kept = f", {count(added.num_kept)} taken over" if added.num_kept else ""
    speed = added.num_read * 1.0 / max(entry.prefill_s, 1e-9)
    return (
        f"{entry.name}: {added.status}, {count(entry.num_tokens)} tokens, {count(added.num_read)} pages read{kept}, "
        f"{seconds(entry.prefill_s)} ({speed:.1f} pages/s), {size(entry.num_bytes)}"
    )


def _added_json(added: Added) -> dict[str, Any]:
    entry = added.document
    return {
        "status": added.status,
        "name": entry.name,
        "id": entry.id,
        "num_tokens": entry.num_tokens,
        "num_pages": entry.num_pages,
        "num_pages_read": added.num_read,
        "num_pages_kept": added.num_kept,
        "prefill_s": entry.prefill_s,
        "bytes": entry.num_bytes,
    }
