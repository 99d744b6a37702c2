"""The files of a base: format, every kind of damage, readers beside a writer, archives. No model, no torch."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import kb_plain
from retrolm.errors import UserError
from retrolm.knowledge_base import durable, writer
from retrolm.knowledge_base.archive import export_base, import_base
from retrolm.knowledge_base.check import check_base
from retrolm.knowledge_base.container import read_header
from retrolm.knowledge_base.copying import open_index, open_pages
from retrolm.knowledge_base.durable import open_regular
from retrolm.knowledge_base.faults import BusyBaseError, DamagedBaseError, MismatchError
from retrolm.knowledge_base.folder import Snapshot, create_folder
from retrolm.knowledge_base.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    PAGES_FILE,
    TEXT_FILE,
    Manifest,
    parse,
    read_manifest,
    render,
    require_fields,
)
from retrolm.knowledge_base.writer import Writer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return kb_plain.base_of(tmp_path / "base", "one", "two")


def file_of(base: Path, name: str, document: int = 0) -> Path:
    return base / "documents" / read_manifest(base).documents[document].id / name


# --- what is written can be read, also by others -------------------------------------------------------------------


def test_files_are_ordinary_safetensors(base: Path) -> None:
    pages = load_file(file_of(base, PAGES_FILE))["pages"]
    assert pages.shape == (2, 5, 2, 4, 1, 3) and pages.dtype == np.float32
    index = load_file(file_of(base, INDEX_FILE))
    assert index["token_ids"].tolist() == list(range(20))
    assert read_header(file_of(base, PAGES_FILE), "pages").data_start % 4096 == 0


def test_single_records_are_read_exactly(base: Path) -> None:
    snapshot = Snapshot(base)
    entry = snapshot.manifest.documents[0]
    pages = open_pages(base, entry, kb_plain.SHAPE, open_index(base, entry, kb_plain.SHAPE))
    out = np.zeros((3, kb_plain.SHAPE.record_bytes), np.uint8)
    pages.read(1, [4, 0], out, [2, 0])
    expected = load_file(file_of(base, PAGES_FILE))["pages"]
    assert out[2].tobytes() == expected[1, 4].tobytes() and out[0].tobytes() == expected[1, 0].tobytes()
    assert not out[1].any() and pages.bytes_read == 2 * kb_plain.SHAPE.record_bytes


def test_nothing_of_it_needs_torch(base: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from retrolm.knowledge_base.check import check_base\n"
        "from retrolm.knowledge_base.archive import export_base, import_base\n"
        "from retrolm.knowledge_base.writer import Writer\n"
        f"assert check_base({str(base)!r}).sound\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- damage --------------------------------------------------------------------------------------------------------


def all_files(base: Path) -> list[Path]:
    return [base / MANIFEST_FILE, *(file_of(base, name) for name in (PAGES_FILE, INDEX_FILE, TEXT_FILE))]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_and_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = kb_plain.base_of(tmp_path_factory.mktemp("flip") / "base", "one")
    path = data.draw(st.sampled_from(all_files(base)))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    if path.name == MANIFEST_FILE and b'"version": 1' not in content:
        with pytest.raises((MismatchError, DamagedBaseError)):
            read_manifest(base)
        return
    problems = check_base(base).problems
    assert problems and problems[0].file == path.name


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", [MANIFEST_FILE, PAGES_FILE, INDEX_FILE, TEXT_FILE])
def test_torn_files_are_found(base: Path, name: str, keep: float) -> None:
    path = base / name if name == MANIFEST_FILE else file_of(base, name)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if 0 < keep < 1 else int(keep) % size)
    problems = check_base(base).problems
    assert problems and problems[0].file == name


def test_missing_and_foreign_files_are_found(base: Path) -> None:
    file_of(base, PAGES_FILE).unlink()
    file_of(base, PAGES_FILE, 1).with_name("more.pkl").write_bytes(pickle.dumps({}))
    found = {(problem.document, problem.file) for problem in check_base(base).problems}
    assert found == {("one", PAGES_FILE), ("two", "more.pkl")}
    file_of(base, TEXT_FILE).unlink()
    file_of(base, INDEX_FILE).unlink()
    file_of(base, TEXT_FILE).parent.rmdir()
    assert any("folder" in problem.message for problem in check_base(base).problems)


def test_swapped_records_are_found(base: Path) -> None:
    """Two whole pages that changed places have valid bytes in the wrong place."""
    path, size = file_of(base, PAGES_FILE), kb_plain.SHAPE.record_bytes
    data = bytearray(path.read_bytes())
    data[-size:], data[-2 * size : -size] = data[-2 * size : -size], data[-size:]
    path.write_bytes(data)
    assert {problem.file for problem in check_base(base).problems} == {PAGES_FILE}


def test_a_sound_base_has_no_problems(base: Path) -> None:
    found = check_base(base)
    assert found.sound and (found.num_documents, found.num_records, found.num_unused) == (2, 20, 0)


@pytest.mark.parametrize(("version", "advice"), [(0, "new base"), (2, "Update"), ("1", "Update")])
def test_other_versions_are_refused(base: Path, version: object, advice: str) -> None:
    path = base / MANIFEST_FILE
    path.write_text(path.read_text().replace('"version": 1', f'"version": {json.dumps(version)}'))
    with pytest.raises(MismatchError, match=advice):
        check_base(base)


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no knowledge base"):
        Snapshot(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="isn't empty"):
        create_folder(tmp_path, {}, {}, {})


def forged(manifest: Manifest, **changes: object) -> Manifest:
    return replace(manifest, documents=(replace(manifest.documents[0], **changes),))  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"id": "../../etc"}, {"num_pages": -1}, {"num_pages": 1 << 50}, {"files": {}}])
def test_forged_manifests_are_refused(base: Path, changes: dict[str, object]) -> None:
    data = render(forged(read_manifest(base), **changes))
    with pytest.raises(DamagedBaseError):
        parse(data, "manifest")


def test_a_manifest_that_promises_other_pages_is_refused(base: Path) -> None:
    (base / MANIFEST_FILE).write_bytes(render(forged(read_manifest(base), num_pages=1 << 40)))
    problems = check_base(base).problems
    assert problems and "doesn't fit the manifest" in problems[0].message


@settings(max_examples=80, deadline=None)
@given(header=st.one_of(st.binary(max_size=80), st.builds(lambda x: json.dumps(x).encode(), st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=4) | st.dictionaries(
        st.sampled_from(["a", "dtype", "shape", "data_offsets"]), x, max_size=4), max_leaves=12))))  # fmt: skip
def test_hostile_headers_are_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = tmp_path_factory.mktemp("header") / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        found = read_header(path, "file")
    except DamagedBaseError:
        return
    assert sum(place.num_bytes for place in found.arrays.values()) == 0


@pytest.mark.parametrize("shape", [[1 << 47, 1 << 47], [-1, -4], [2.0], ["2"], [True, True]])
def test_absurd_shapes_are_refused(tmp_path: Path, shape: list[object]) -> None:
    fields = {"pages": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}
    data = json.dumps(fields).encode()
    (tmp_path / "file").write_bytes(len(data).to_bytes(8, "little") + data + b"x")
    with pytest.raises(DamagedBaseError):
        read_header(tmp_path / "file", "file")


@pytest.mark.parametrize("part", ["file", "folder"])
def test_links_are_not_followed(base: Path, tmp_path: Path, part: str) -> None:
    path = file_of(base, TEXT_FILE)
    place = path if part == "file" else path.parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert not check_base(base).sound


@pytest.mark.parametrize("name", ["writer.lock", "documents", "readers"])
def test_a_writer_follows_no_link_out_of_the_base(base: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if name == "writer.lock":
        outside.write_text("precious")
        (base / name).unlink(missing_ok=True)
    else:
        (base / name).rename(outside)
    before = sorted(outside.iterdir()) if outside.is_dir() else outside.read_text()
    (base / name).symlink_to(outside)
    with pytest.raises(DamagedBaseError, match="symbolic link"):
        Writer(base)
    check_base(base)
    assert (sorted(outside.iterdir()) if outside.is_dir() else outside.read_text()) == before


def test_a_reader_makes_no_lock_behind_a_link(base: Path, tmp_path: Path) -> None:
    generation = read_manifest(base).generation
    (base / "readers" / str(generation)).unlink(missing_ok=True)
    (base / "readers" / str(generation)).symlink_to(tmp_path / "made")
    assert check_base(base).sound and not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", [MANIFEST_FILE, TEXT_FILE, INDEX_FILE, PAGES_FILE])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(base: Path, name: str) -> None:
    """Opening one to read waits for someone who writes."""
    path = base / name if name == MANIFEST_FILE else file_of(base, name)
    path.unlink()
    os.mkfifo(path)
    assert not check_base(base).sound
    with pytest.raises(DamagedBaseError, match="no plain file"), open_regular(path, "it"):
        pass


def test_a_missing_documents_folder_is_told(base: Path) -> None:
    shutil.rmtree(base / "documents")
    assert [problem.document for problem in check_base(base).problems] == ["one", "two"]


def test_gc_leaves_what_is_no_folder(base: Path) -> None:
    stray, folder = (base / "documents" / f"0123456789ab-0000000{n}" for n in (0, 1))
    stray.write_text("mine")
    folder.mkdir()
    (folder / "link").symlink_to("/nowhere")
    with Writer(base) as change:
        assert change.collect().num_deleted == 1
    assert stray.exists() and not folder.exists()


def test_an_export_of_a_damaged_base_is_refused(base: Path, tmp_path: Path) -> None:
    file_of(base, TEXT_FILE).write_text("short")
    with pytest.raises(DamagedBaseError, match="5 bytes instead of"):
        export_base(base, tmp_path / "out.tar")
    assert not list(tmp_path.glob("*out.tar*"))


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("fields", [{"name": "\ud800"}, {"metadata": {"x": nested(800)}}], ids=["surrogate", "deep"])
def test_manifests_that_could_not_have_been_written_are_refused(base: Path, fields: dict[str, Any]) -> None:
    head = json.loads((base / MANIFEST_FILE).read_text())
    head["content"]["documents"][0].update(fields)
    text = json.dumps(head["content"], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    head["sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    data = (json.dumps(head, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
    with pytest.raises(DamagedBaseError):
        parse(data, "manifest")


@pytest.mark.parametrize(
    "metadata", [{1: "x"}, {"x": float("nan")}, {"x": (1, 2)}, {"x": b"y"}, {"x": "\udcff"}, {"x": nested(5000)}]
)
def test_metadata_that_would_not_come_back_is_refused(metadata: dict[Any, Any]) -> None:
    with pytest.raises(UserError, match="can't be kept"):
        require_fields("name", metadata)
    require_fields("naïve", {"x": [1, 2.5, None, {"y": "ü"}]})


# --- readers, one writer -------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(base: Path) -> None:
    program = f"from retrolm.knowledge_base.writer import Writer; Writer({str(base)!r})"
    with Writer(base):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert BusyBaseError.__name__ in done.stderr
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readers_keep_their_generation(base: Path) -> None:
    before = Snapshot(base)
    entry = before.manifest.documents[0]
    with Writer(base) as change:
        change.remove([entry.id])
        kb_plain.add(change, "three", 7)
        held = change.collect()
    assert (held.num_deleted, held.num_held) == (0, 1)
    assert [found.name for found in before.manifest.documents] == ["one", "two"]
    assert open_pages(base, entry, kb_plain.SHAPE, open_index(base, entry, kb_plain.SHAPE)).read_run(0, 0, 5)
    assert kb_plain.names_in(base) == ["two", "three"]
    after = Snapshot(base)
    before.close()
    with Writer(base) as change:
        found = change.collect()
    after.close()
    assert (found.num_deleted, found.num_held) == (1, 0) and found.num_bytes > 0
    assert check_base(base).sound and check_base(base).num_unused == 0


def test_a_reader_that_was_killed_holds_nothing(base: Path) -> None:
    program = f"import os; from retrolm.knowledge_base.folder import Snapshot; s = Snapshot({str(base)!r}); os._exit(9)"
    subprocess.run([sys.executable, "-c", program], check=False)
    with Writer(base) as change:
        change.remove([change.manifest.documents[0].id])
        assert change.collect().num_deleted == 1
    assert sorted(path.name for path in (base / "readers").iterdir()) == []


def test_a_replaced_document_keeps_its_place(base: Path) -> None:
    with Writer(base) as change:
        kb_plain.add(change, "one", 8, num_pages=7, replaces=change.manifest.documents[0].id)
    assert kb_plain.names_in(base) == ["one", "two"]
    assert read_manifest(base).documents[0].num_pages == 7


# --- merging -------------------------------------------------------------------------------------------------------


def test_merging_copies_and_knows_duplicates(base: Path, tmp_path: Path) -> None:
    other = kb_plain.make_base(tmp_path / "other")
    with Writer(other) as change:
        kb_plain.add(change, "one", 0)
        kb_plain.add(change, "three", 5)
    source = read_manifest(other)
    with Writer(base) as change:
        added = change.merge(other, source, source.documents)
    assert [entry.name for entry in added] == ["three"]
    assert kb_plain.names_in(base) == ["one", "two", "three"]
    assert check_base(base).sound
    assert file_of(base, PAGES_FILE, 2).read_bytes() == file_of(other, PAGES_FILE, 1).read_bytes()


def test_merging_refuses_other_fingerprints_and_damage(base: Path, tmp_path: Path) -> None:
    other = kb_plain.base_of(tmp_path / "other", "three", "four")
    source = read_manifest(other)
    with Writer(base) as change:
        strange = replace(source, fingerprint={**kb_plain.FINGERPRINT, "page_size": 8})
        with pytest.raises(MismatchError, match="page_size: 4 and 8"):
            change.merge(other, strange, source.documents)
        data = bytearray(file_of(other, PAGES_FILE, 1).read_bytes())
        data[-1] ^= 1
        file_of(other, PAGES_FILE, 1).write_bytes(data)
        with pytest.raises(DamagedBaseError, match="page 4 of layer 1"):
            change.merge(other, source, source.documents)
    assert kb_plain.names_in(base) == ["one", "two", "three"]
    assert check_base(base).sound and check_base(base).num_unused == 0


# --- disk full -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 9))
def test_a_full_disk_leaves_the_base_as_it_was(base: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The n-th write fails, whichever it is."""
    before, count, real = (base / MANIFEST_FILE).read_bytes(), 0, os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with Writer(base) as change:
        monkeypatch.setattr(durable.os, "write", write)
        with pytest.raises(OSError, match="No space"):
            kb_plain.add(change, "three", 3)
        monkeypatch.undo()
        assert (base / MANIFEST_FILE).read_bytes() == before
        assert check_base(base).sound and check_base(base).num_unused == 0
        kb_plain.add(change, "three", 3)
    assert kb_plain.names_in(base) == ["one", "two", "three"]


def test_too_little_space_is_said_before_writing(base: Path) -> None:
    entry, text = kb_plain.made_up("big", 1)
    with Writer(base) as change, pytest.raises(UserError, match="Make room"):
        change.add(entry, 1 << 60, lambda into: kb_plain.fill(into, entry, text))
    assert check_base(base).num_unused == 0


# --- archives ------------------------------------------------------------------------------------------------------


def test_export_and_import_give_the_same_base(base: Path, tmp_path: Path) -> None:
    with Writer(base) as change:
        gone = change.remove([change.manifest.documents[1].id])
    num_bytes = export_base(base, tmp_path / "base.tar")
    assert num_bytes == (tmp_path / "base.tar").stat().st_size
    import_base(tmp_path / "base.tar", tmp_path / "again")
    assert read_manifest(tmp_path / "again").documents == read_manifest(base).documents
    assert check_base(tmp_path / "again").sound
    assert not (tmp_path / "again" / "documents" / gone[0].id).exists()
    with pytest.raises(UserError, match="already"):
        import_base(tmp_path / "base.tar", tmp_path / "again")
    with pytest.raises(UserError, match="already"):
        export_base(base, tmp_path / "base.tar")


def rebuilt(source: Path, target: Path, change: Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]) -> Path:
    """A copy of an archive with each member passed through `change`, which adds what it likes."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None
            change(new, member, content.read())
    return target


def put(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def traversal(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    put(archive, member, data)
    if member.name == MANIFEST_FILE:
        put(archive, tarfile.TarInfo("../evil.txt"), b"evil")


def absolute(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    member.name = member.name if member.name == MANIFEST_FILE else f"/{member.name}"
    put(archive, member, data)


def pickled(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    put(archive, member, data)
    if member.name.endswith(TEXT_FILE):
        put(archive, tarfile.TarInfo(member.name.replace(TEXT_FILE, "pages.pt")), pickle.dumps([1]))


def linked(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    if member.name.endswith(TEXT_FILE):
        member.type, member.linkname, data = tarfile.SYMTYPE, "/etc/passwd", b""
    put(archive, member, data)


def hard_linked(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    if member.name.endswith(TEXT_FILE):
        member.type, member.linkname, data = tarfile.LNKTYPE, MANIFEST_FILE, b""
    put(archive, member, data)


def inflated(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    put(archive, member, data + b"x" * 4096 if member.name.endswith(TEXT_FILE) else data)


def doubled(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    put(archive, member, data)
    if member.name.endswith(TEXT_FILE):
        put(archive, member, data)


def flipped(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    put(archive, member, data[:-1] + bytes([data[-1] ^ 1]) if member.name.endswith(PAGES_FILE) else data)


def left_out(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    if not member.name.endswith(INDEX_FILE):
        put(archive, member, data)


def sparse(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    """A file that is nearly all holes, of the size that the manifest names."""
    if member.name.endswith(PAGES_FILE):
        size = str(len(data))
        member.pax_headers = {"GNU.sparse.map": f"0,1,{size},0", "GNU.sparse.size": size, "GNU.sparse.numblocks": "2"}
        data = data[:1]
    put(archive, member, data)


@pytest.mark.parametrize(
    "change", [traversal, absolute, pickled, linked, hard_linked, inflated, doubled, flipped, left_out, sparse]
)
def test_hostile_archives_are_refused(
    base: Path, tmp_path: Path, change: Callable[[tarfile.TarFile, tarfile.TarInfo, bytes], None]
) -> None:
    export_base(base, tmp_path / "base.tar")
    hostile = rebuilt(tmp_path / "base.tar", tmp_path / "hostile.tar", change)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DamagedBaseError):
        import_base(hostile, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_headers_of_absurd_size_are_refused(kind: bytes, base: Path, tmp_path: Path) -> None:
    export_base(base, tmp_path / "base.tar")
    whole = (tmp_path / "base.tar").read_bytes()
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = kind, 8**11 - 1
    header = huge.tobuf(tarfile.GNU_FORMAT)
    manifest = 512 + -(-len(render(read_manifest(base))) // 512) * 512
    (tmp_path / "hostile.tar").write_bytes(whole[:manifest] + header + whole[manifest:])
    with pytest.raises(DamagedBaseError):
        import_base(tmp_path / "hostile.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_manifest_that_names_a_path_outside_is_refused(base: Path, tmp_path: Path) -> None:
    export_base(base, tmp_path / "base.tar")

    def outside(archive: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
        if member.name == MANIFEST_FILE:
            data = render(forged(parse(data, ""), id="../../../evil-00000000"))
        put(archive, member, data)

    with pytest.raises(DamagedBaseError, match="document ids"):
        import_base(rebuilt(tmp_path / "base.tar", tmp_path / "hostile.tar", outside), tmp_path / "new")


def test_absurd_sizes_are_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    manifest = read_manifest(base)
    entry = manifest.documents[0]
    files = {name: replace(file, bytes=1 << 47) for name, file in entry.files.items()}
    data = render(forged(manifest, files=files))
    with tarfile.open(tmp_path / "hostile.tar", "w") as archive:
        put(archive, tarfile.TarInfo(MANIFEST_FILE), data)
    with pytest.raises(UserError, match="free"):
        import_base(tmp_path / "hostile.tar", tmp_path / "new")


def test_compressed_and_other_files_are_refused(base: Path, tmp_path: Path) -> None:
    """What could blow up while it is unpacked is never unpacked."""
    export_base(base, tmp_path / "base.tar")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr(MANIFEST_FILE, b"0" * (1 << 20))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as bomb_tar:
        bomb_tar.add(tmp_path / "base.tar", MANIFEST_FILE)
    (tmp_path / "pickle").write_bytes(pickle.dumps(asdict(read_manifest(base))))
    (tmp_path / "empty").touch()
    for name in ("bomb.zip", "bomb.tar.gz", "pickle", "empty"):
        with pytest.raises(DamagedBaseError):
            import_base(tmp_path / name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_loads_pickles() -> None:
    source = Path(writer.__file__).parent
    code = "\n".join(path.read_text(encoding="utf-8") for path in source.glob("*.py"))
    assert "import pickle" not in code and "torch.load" not in code
