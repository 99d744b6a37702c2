"""Knowledge bases with an engine: exact and composed reuse, edits, filters, mismatches, on tiny models."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_runner import Desk
from own_process import printed, start
from retrolm.config import RetroConfig
from retrolm.engine.document import Document
from retrolm.engine.model import RetroLM
from retrolm.errors import UserError
from retrolm.knowledge_base.base import KnowledgeBase
from retrolm.knowledge_base.faults import DamagedBaseError, MismatchError
from retrolm.knowledge_base.manifest import PAGES_FILE, TEXT_FILE
from retrolm.paging import PageTable
from test_adapter import random_adapter
from test_against_naive import random_retriever
from tiny_models import tiny_model
from tiny_tokenizer import STORY, tiny_tokenizer

QUESTION = "What did the captain count?"
W = 8


def story(num_chars: int, skip: int = 0) -> str:
    return (STORY * 9)[skip : skip + num_chars]


def engine(
    name: str = "llama", seed: int = 0, retriever: bool = True, method: str = "retrolm", **options: Any
) -> RetroLM:
    config = RetroConfig.from_options({"kv_budget": 128, "page_size": W, "chunk_pages": 5, **options})
    lm = RetroLM(tiny_model(name, vocab_size=600, seed=seed), tiny_tokenizer(True), config=config, method=method)
    if retriever:
        lm.use_retriever(random_retriever(lm, 2))
    return lm


def pages_of(document: Document) -> list[tuple[Tensor, Tensor]]:
    store = document.encoder.parts.store
    return [store.read(layer, document.table.ids) for layer in range(store.layout.num_layers)]


def same_pages(one: Document, other: Document) -> bool:
    pairs = zip(pages_of(one), pages_of(other), strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


# --- exact reuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen2", {"store_dtype": "bfloat16"}),
        ("gemma3", {"store_dtype": "float16"}),
        ("phi3-longrope", {"store_dtype": "float32", "first_layer_mode": "mean_key"}),
        ("mistral-sliding", {"score_rope": True, "causal_selection": True}),
        ("llama-mqa", {"retrieve_every": 4, "num_skip_layers": 2, "agreement_layers": 2}),
        ("llama", {"agreement_layers": 2, "word_weight": 3.0, "page_positions": "ranked_for_questions"}),
        ("llama", {"prefix_page": False, "num_local_pages": 2}),
        ("qwen2", {"store_bits": 8}),
        ("gemma3", {"store_bits": 4}),
        ("llama", {"bookmarks": "visible", "store_bits": 8}),
    ],
)
def test_a_restored_document_is_the_one_that_was_read(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    lm = engine(name, **options)
    text = story(600)
    with KnowledgeBase.create(tmp_path / "base", lm) as base:
        base.add(text, name="story")
    fresh = engine(name, **options)
    session = fresh.read(text)
    with KnowledgeBase.open(tmp_path / "base", engine(name, **options)) as base:
        kept = base.select("story")
        assert same_pages(kept, session)
        assert kept.page_spans == session.page_spans and list(kept.token_ids) == session.token_ids
        expected = session.ask(QUESTION, max_new_tokens=12)
        found = base.ask(QUESTION, max_new_tokens=12)
    assert found.reuse == "exact" and found.answer.token_ids == expected.token_ids
    assert torch.equal(found.answer.retrieval.page_ids, expected.retrieval.page_ids)
    assert torch.equal(found.answer.retrieval.scores.nan_to_num(7), expected.retrieval.scores.nan_to_num(7))
    assert found.answer.pages == expected.pages
    assert found.answer.attended_tokens == expected.attended_tokens
    for passage in found.passages:
        assert text[passage.start_char : passage.end_char] == passage.text and passage.document == "story"


@pytest.mark.parametrize("method", ["mean_key", "quest_pages", "recency", "random"])
def test_every_page_method_is_kept(method: str, tmp_path: Path) -> None:
    lm = engine(method=method, retriever=False)
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(600), name="a")
    expected = lm.read(story(600)).ask(QUESTION, max_new_tokens=6)
    assert base.ask(QUESTION, max_new_tokens=6).answer.token_ids == expected.token_ids
    base.add(story(500, 37), name="b")
    assert base.ask(QUESTION, max_new_tokens=6).reuse == "composed"


def test_conversations_and_streams_go_on_from_a_base(tmp_path: Path) -> None:
    lm = engine()
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(600), name="story")
    talks = [document.conversation() for document in (base.select(), lm.read(story(600)))]
    for question in (QUESTION, "And then?"):
        one, other = (talk.ask(question, max_new_tokens=5) for talk in talks)
        assert one.token_ids == other.token_ids
    assert (
        "".join(base.select().stream(QUESTION, max_new_tokens=5)).strip() == base.ask(QUESTION, max_new_tokens=5).text
    )


def test_only_chosen_pages_are_read(tmp_path: Path) -> None:
    lm = engine(agreement_layers=0)
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(2800), name="story")
    found = base.ask(QUESTION, max_new_tokens=3)
    record = lm.page_layout().page_bytes
    most = (128 // W) * lm.backbone.num_layers * record
    assert 0 < found.page_bytes_read <= most < base.documents[0].files[PAGES_FILE].bytes / 5


# --- composed reuse ------------------------------------------------------------------------------------------------


def side_by_side(lm: RetroLM, texts: list[str], **changes: Any) -> Document:
    """Texts read in one session, their pages put together in memory: one prefix, then all text pages."""
    documents = lm.read(texts)
    num_prefix = documents[0].table.num_sink
    tables = [document.table for document in documents]
    ids = torch.cat([table.ids[num_prefix if i else 0 :] for i, table in enumerate(tables)])
    lengths = torch.cat([table.lengths[num_prefix if i else 0 :] for i, table in enumerate(tables)])
    encoder = documents[0].encoder.with_parts(config=lm.config.replace(num_local_pages=0, **changes))
    tokens = [page for i, document in enumerate(documents) for page in document.token_ids[num_prefix if i else 0 :]]
    spans = [span for i, document in enumerate(documents) for span in document.page_spans[num_prefix if i else 0 :]]
    table = PageTable(ids, lengths, num_prefix, lm.config.page_room)
    return dataclasses.replace(documents[0], encoder=encoder, table=table, token_ids=tokens, page_spans=spans, text="")


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("budget", [128, 480])
def test_composed_documents_are_asked_as_one(name: str, budget: int, tmp_path: Path) -> None:
    """First layer by mean keys at reading and asking, so that a session in memory can do the same."""
    options: dict[str, Any] = {"first_layer_mode": "mean_key", "kv_budget": budget, "chunk_pages": 100}
    texts = [story(301), story(250, 90), story(200, 210)]
    base = KnowledgeBase.create(tmp_path / "base", engine(name, **options))
    for index, text in enumerate(texts):
        base.add(text, name=f"text {index}")
    found = base.ask(QUESTION, max_new_tokens=8)
    expected = side_by_side(engine(name, **options), texts)
    session = expected.ask(QUESTION, max_new_tokens=8)
    assert found.reuse == "composed" and found.documents == ("text 0", "text 1", "text 2")
    assert torch.equal(found.answer.retrieval.page_ids, session.retrieval.page_ids)
    assert found.answer.token_ids == session.token_ids
    assert found.num_pages == len(expected.table)


def test_composed_passages_name_their_document(tmp_path: Path) -> None:
    texts = {"first": story(500), "second": story(450, 120)}
    base = KnowledgeBase.create(tmp_path / "base", engine())
    for name, text in texts.items():
        base.add(text, name=name, metadata={"place": name})
    found = base.query(QUESTION, top_k=30)
    assert {passage.document for passage in found} == set(texts)
    for passage in found:
        assert texts[passage.document][passage.start_char : passage.end_char] == passage.text != ""
        assert passage.metadata == {"place": passage.document}
    assert base.query(QUESTION, top_k=2) == found[:2]


def test_no_page_is_forced_but_the_prefix(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine())
    for index in range(4):
        base.add(story(400, 61 * index), name=str(index))
    retrieval = base.ask(QUESTION, max_new_tokens=1).answer.retrieval
    last = retrieval.scores.shape[1] - 1
    assert (retrieval.page_ids == 0).any(1).all()
    assert not (retrieval.page_ids == last).any(1).all()


@pytest.mark.parametrize("first_layer", ["mean_key", "recent"])
def test_the_first_layer_of_composed_documents_is_a_choice(first_layer: Any, tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine(agreement_layers=0))
    base.add(story(400), name="a")
    base.add(story(400, 99), name="b")
    pages = base.ask(QUESTION, first_layer=first_layer, max_new_tokens=1).answer.retrieval.page_ids[0]
    total = base.select(first_layer=first_layer).num_pages
    recent = [0, *range(total - int((pages >= 0).sum()) + 1, total)]
    assert (pages[pages >= 0].tolist() == recent) == (first_layer == "recent")


@pytest.mark.parametrize("options", [{"prefix_page": False}, {"score_rope": True}])
def test_what_cannot_be_composed_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine(**options))
    base.add(story(300), name="a")
    base.add(story(300, 50), name="b")
    with pytest.raises(UserError, match="Name one document"):
        base.ask(QUESTION)
    assert base.ask(QUESTION, documents="a", max_new_tokens=1).reuse == "exact"


# --- content -------------------------------------------------------------------------------------------------------


def test_duplicates_are_recognised(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine())
    assert base.add(story(300), name="a")[0].status == "added"
    (again,) = base.add(story(300), name="b")
    assert (again.status, again.document.name, again.num_read) == ("duplicate", "a", 0)
    (other,) = base.add(story(300), name="a", metadata={"year": 1910})
    assert other.status == "duplicate" and base.documents[0].metadata == {"year": 1910}
    assert len(base.documents) == 1


def test_a_text_edited_into_another_leaves_no_old_version(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine())
    base.add(story(300), name="a")
    base.add(story(200, 50), name="b")
    (added,) = base.add(story(300), name="b")
    assert (added.status, added.document.name) == ("duplicate", "a")
    assert [entry.name for entry in base.documents] == ["a"]


EDITS: dict[str, Callable[[str], str]] = {
    "appended": lambda text: text + " And so it went on, night by night, with twelve lamps.",
    "changed at the end": lambda text: text[:-30] + "nothing like it was before.",
    "cut": lambda text: text[:300],
    "changed at the start": lambda text: "Never. " + text,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_edits_are_read_from_the_first_changed_page_on(name: str, edit: str, tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(story(600))
    lm = engine(name)
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(file, metadata={"kind": "story"})
    file.write_text(EDITS[edit](story(600)))
    (added,) = base.add(file)
    assert added.status == "updated" and len(base.documents) == 1
    assert base.documents[0].metadata == {"kind": "story"}
    if edit == "changed at the start":
        assert added.num_kept == 0
    else:
        assert added.num_kept > 5 and (added.num_read <= 9 if edit != "cut" else added.num_read <= 1)
    session = lm.read(file)
    kept = base.select()
    assert kept.page_spans == session.page_spans and list(kept.token_ids) == session.token_ids
    for (k1, v1), (k2, v2) in zip(pages_of(kept), pages_of(session), strict=True):
        assert (k1 - k2).abs().max() <= 1e-9 and (v1 - v2).abs().max() <= 1e-9  # float64, chunked otherwise
    for layer in session.encoder.parts.digests.layers():
        rows = [d.encoder.parts.digests.read(layer, d.table.ids) for d in (kept, session)]
        assert (rows[0] - rows[1]).abs().max() <= 1e-9
    assert base.verify().sound
    assert base.gc().num_deleted == 1
    assert base.ask(QUESTION, max_new_tokens=5).answer.token_ids == session.ask(QUESTION, max_new_tokens=5).token_ids


def test_visible_bookmarks_are_kept_edited_and_composed(tmp_path: Path) -> None:
    """Records hold them beside the tokens, which all that speaks of text counts alone."""
    options: dict[str, Any] = {"bookmarks": "visible", "first_layer_mode": "mean_key", "chunk_pages": 100}
    texts, lm = [story(330), story(200, 90)], engine(**options)
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(300), name="text 0")
    (added,) = base.add(texts[0], name="text 0")
    assert added.status == "updated" and added.num_kept > 5
    session = lm.read(texts[0])
    kept = base.select()
    assert list(kept.token_ids) == session.token_ids and kept.page_spans == session.page_spans
    assert kept.num_tokens == session.num_tokens == base.documents[0].num_tokens < session.table.num_tokens
    for (k1, v1), (k2, v2) in zip(pages_of(kept), pages_of(session), strict=True):
        assert (k1 - k2).abs().max() <= 1e-9 and (v1 - v2).abs().max() <= 1e-9
    base.add(texts[1], name="text 1")
    found = base.ask(QUESTION, max_new_tokens=6)
    expected = side_by_side(engine(**options), texts).ask(QUESTION, max_new_tokens=6)
    assert found.reuse == "composed" and found.answer.token_ids == expected.token_ids
    with pytest.raises(MismatchError, match="bookmarks"):
        KnowledgeBase.open(tmp_path / "base", engine(**{**options, "bookmarks": "invisible"})).ask(QUESTION)


def test_causal_selection_reads_an_edited_text_anew(tmp_path: Path) -> None:
    """What a page chose there depends on a probe that isn't kept."""
    base = KnowledgeBase.create(tmp_path / "base", engine(causal_selection=True))
    base.add(story(400), name="a")
    assert base.add(story(420), name="a")[0].num_kept == 0


def test_folders_and_lists_of_files(tmp_path: Path) -> None:
    (tmp_path / "docs" / "inner").mkdir(parents=True)
    (tmp_path / "docs" / "one.txt").write_text(story(200))
    (tmp_path / "docs" / "inner" / "two.md").write_text(story(200, 40))
    (tmp_path / "docs" / "picture.png").write_bytes(b"\0\1")
    base = KnowledgeBase.create(tmp_path / "base", engine())
    added = base.add([tmp_path / "docs", "A text of its own, which says little. " * 4])
    assert [Path(one.document.name).name for one in added[:2]] == ["two.md", "one.txt"]
    assert added[2].document.source == "" and len(base.documents) == 3
    with pytest.raises(UserError, match="no file"):
        (tmp_path / "empty").mkdir()
        base.add(tmp_path / "empty")


def test_removal_and_merging_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = engine()
    bases = [KnowledgeBase.create(tmp_path / name, lm) for name in ("one", "two")]
    bases[0].add(story(300), name="a")
    bases[0].add(story(300, 70), name="b")
    bases[1].add(story(300, 90), name="c")
    session = bases[1].ask(QUESTION, max_new_tokens=4)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(RetroLM, "read", refuse)
    (merged,) = bases[0].merge(bases[1])
    assert merged.name == "c"
    assert [entry.name for entry in bases[0].remove(["a", "b"])] == ["a", "b"]
    found = bases[0].ask(QUESTION, max_new_tokens=4)
    assert found.documents == ("c",) and found.answer.token_ids == session.answer.token_ids
    with pytest.raises(UserError, match="Did you mean 'c'"):
        bases[0].remove("cc")
    with pytest.raises(UserError, match="Nothing to remove"):
        bases[0].remove()


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"author": "Jane"}, ["a", "c"]),
        (["year>=1900"], ["b", "c"]),
        (["year < 1900", "author=Jane"], ["a"]),
        (["author!=Jane"], ["b", "d"]),
        (["name~C"], ["c"]),
        ("year=1889", ["a"]),
    ],
)
def test_filters(where: Any, names: list[str], tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine())
    for index, (name, fields) in enumerate(
        {
            "a": {"author": "Jane", "year": 1889},
            "b": {"author": "Mary", "year": 1910},
            "c": {"author": "Jane", "year": 1902},
            "d": {},
        }.items()
    ):
        base.add(story(120, 31 * index), name=name, metadata=fields)
    found = base.ask(QUESTION, where=where, max_new_tokens=1)
    assert list(found.documents) == names
    assert found.reuse == ("exact" if len(names) == 1 else "composed")
    with pytest.raises(UserError, match="No document meets"):
        base.ask(QUESTION, where=["year>2000"])
    with pytest.raises(UserError, match="no condition"):
        base.ask(QUESTION, where=["what"])


def test_an_empty_base_says_so(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", engine())
    with pytest.raises(UserError, match="holds no document yet"):
        base.ask(QUESTION)


# --- another process, another version, another model ---------------------------------------------------------------


def test_a_later_process_answers_alike(desk: Desk, tmp_path: Path) -> None:
    lm = RetroLM.from_pretrained(desk.model, kv_budget=96, page_size=16)
    expected = lm.read(desk.text).ask(QUESTION, max_new_tokens=6)
    KnowledgeBase.create(tmp_path / "base", desk.model, kv_budget=96, page_size=16).add(desk.text)
    assert printed(*start(_ask, tmp_path / "base")).splitlines()[-1] == str(list(expected.token_ids))


def _ask(base: Path) -> list[int]:
    return list(KnowledgeBase.open(base).ask(QUESTION, max_new_tokens=6).answer.token_ids)


def test_readers_see_what_a_writer_finished(tmp_path: Path) -> None:
    lm = engine()
    writer = KnowledgeBase.create(tmp_path / "base", lm)
    reader = KnowledgeBase.open(tmp_path / "base", lm)
    writer.add(story(300), name="a")
    before = reader.ask(QUESTION, max_new_tokens=3)
    kept = reader.select("a")
    writer.add(story(300, 80), name="b")
    writer.remove("a")
    assert writer.gc().num_deleted == 0  # the reader still holds the version with it
    assert reader.ask(QUESTION, max_new_tokens=3).documents == ("b",)
    assert writer.gc().num_deleted == 0  # so does the document taken from it
    assert kept.ask(QUESTION, max_new_tokens=3).token_ids == before.answer.token_ids
    del kept
    gc.collect()
    assert writer.gc().num_deleted == 1


def adapted() -> RetroLM:
    lm = engine()
    lm.use_adapter(random_adapter(lm))
    return lm


DIFFERENT: dict[str, tuple[Callable[[], RetroLM], str]] = {
    "weights": (lambda: engine(seed=1), "weights"),
    "family": (lambda: engine("qwen2", retriever=False), "backbone"),
    "retriever": (lambda: engine(retriever=False), "retriever"),
    "adapter": (adapted, "adapter"),
    "bits": (lambda: engine(store_bits=8), "store_bits: 16 and 8"),
    "budget": (lambda: engine(kv_budget=136), "kv_budget: 128 and 136"),
    "page size": (lambda: engine(page_size=4), "page_size: 8 and 4"),
    "stored dtype": (lambda: engine(store_dtype="bfloat16"), "stored_dtype: 'float64' and 'bfloat16'"),
    "method": (lambda: engine(method="mean_key", retriever=False), "method"),
    "first layer": (lambda: engine(first_layer_mode="mean_key"), "first_layer_mode"),
    "positions": (lambda: engine(page_positions="true"), "page_positions: 'compact' and 'true'"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_engine_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    make, reason = DIFFERENT[case]
    KnowledgeBase.create(tmp_path / "base", engine()).add(story(200), name="a")
    with pytest.raises(MismatchError, match=reason):
        KnowledgeBase.open(tmp_path / "base", make()).ask(QUESTION)


@pytest.mark.parametrize("positions", ["ranked_for_questions", "true_for_questions"])
def test_how_questions_attend_pages_is_free(positions: str, tmp_path: Path) -> None:
    """The pages are read alike, so they serve every way of asking; the answer is that of a session with this one."""
    KnowledgeBase.create(tmp_path / "base", engine()).add(story(600), name="a")
    other = engine(page_positions=positions)
    found = KnowledgeBase.open(tmp_path / "base", other).select("a").ask(QUESTION, max_new_tokens=12)
    assert found.token_ids == other.read(story(600)).ask(QUESTION, max_new_tokens=12).token_ids


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    KnowledgeBase.create(tmp_path / "base", engine()).add(story(200), name="a")
    other = engine()
    other.tokenizer = tiny_tokenizer(True).train_new_from_iterator(["aaa bbb"], 600)
    with pytest.raises(MismatchError, match="tokenizer"):
        KnowledgeBase.open(tmp_path / "base", other).ask(QUESTION)


def test_a_fine_tuned_model_is_refused(tmp_path: Path) -> None:
    """The norms, which the retriever's check looks at, are unchanged."""
    KnowledgeBase.create(tmp_path / "base", engine()).add(story(200), name="a")
    other = engine()
    up, down = torch.randn(48, 2), torch.randn(2, 48)
    with torch.no_grad():
        other.model.model.layers[2].self_attn.q_proj.weight += (up @ down) * 1e-3
    with pytest.raises(MismatchError, match="weights"):
        KnowledgeBase.open(tmp_path / "base", other).ask(QUESTION)


def test_an_adapter_belongs_to_the_base(tmp_path: Path) -> None:
    base = KnowledgeBase.create(tmp_path / "base", adapted())
    base.add(story(300), name="a")
    again = adapted()
    expected = again.read(story(300)).ask(QUESTION, max_new_tokens=5)
    found = KnowledgeBase.open(tmp_path / "base", again).ask(QUESTION, max_new_tokens=5)
    assert found.answer.token_ids == expected.token_ids
    with pytest.raises(MismatchError, match="adapter"):
        KnowledgeBase.open(tmp_path / "base", engine()).ask(QUESTION)


def test_options_of_speed_and_of_answers_may_differ(tmp_path: Path) -> None:
    KnowledgeBase.create(tmp_path / "base", engine()).add(story(300), name="a")
    other = engine(chunk_pages=3, device_kv_bytes=1 << 20, agreement_layers=2)
    assert KnowledgeBase.open(tmp_path / "base", other).ask(QUESTION, max_new_tokens=1).reuse == "exact"


@pytest.mark.parametrize("name", [PAGES_FILE, TEXT_FILE])
def test_damage_is_found_while_answering(name: str, tmp_path: Path) -> None:
    lm = engine()
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(200), name="a")
    path = tmp_path / "base" / "documents" / base.documents[0].id / name
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedBaseError, match=f"{name} of 'a'"):
        KnowledgeBase.open(tmp_path / "base", lm).ask(QUESTION)


def test_a_lost_document_is_named_and_others_go_on(tmp_path: Path) -> None:
    lm = engine()
    base = KnowledgeBase.create(tmp_path / "base", lm)
    base.add(story(200), name="a")
    base.add(story(200, 60), name="b")
    shutil.rmtree(tmp_path / "base" / "documents" / base.documents[0].id)
    with pytest.raises(DamagedBaseError, match="'a': its folder"):
        base.ask(QUESTION)
    assert base.ask(QUESTION, documents="b", max_new_tokens=1).documents == ("b",)
    base.remove("a")
    assert base.verify().sound
    assert base.add(story(200), name="a")[0].status == "added"


def test_a_method_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pages"):
        KnowledgeBase.create(tmp_path / "base", engine(method="full", retriever=False))
    assert not (tmp_path / "base").exists()


def test_a_text_larger_than_host_memory_goes_through_the_disk_tier(tmp_path: Path) -> None:
    lm = engine()
    session = lm.read(story(1500))
    spilled = engine()
    cap = 20 * lm.page_layout().page_bytes * lm.backbone.num_layers
    spilled.use_disk_tier(tmp_path, cap)
    base = KnowledgeBase.create(tmp_path / "base", spilled)
    base.add(story(1500), name="a")
    assert same_pages(base.select(), session)
    assert base.ask(QUESTION, max_new_tokens=5).answer.token_ids == session.ask(QUESTION, max_new_tokens=5).token_ids
