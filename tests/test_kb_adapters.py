"""The retrievers for LangChain and LlamaIndex, against the smallest stand-ins of their interfaces."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from retrolm.errors import UserError
from retrolm.knowledge_base.base import KnowledgeBase
from test_kb_base import engine, story

QUESTION = "What did the captain count?"
ADAPTERS = ("retrolm.knowledge_base.langchain", "retrolm.knowledge_base.llama_index")


@dataclass
class FakeDocument:
    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)


class FakeLangChainRetriever:
    """Keyword arguments become fields, `invoke` calls the hook: what pydantic and langchain-core do."""

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            assert name in type(self).__annotations__, name
            setattr(self, name, value)

    def invoke(self, question: str) -> list[Any]:
        found: list[Any] = self._get_relevant_documents(question, run_manager=object())  # type: ignore[attr-defined]
        return found


@dataclass
class FakeNode:
    text: str
    metadata: dict[str, Any]


@dataclass
class FakeScored:
    node: FakeNode
    score: float


@dataclass
class FakeBundle:
    query_str: str


class FakeLlamaRetriever:
    def __init__(self) -> None:
        self.ready = True

    def retrieve(self, question: str) -> list[Any]:
        assert self.ready
        found: list[Any] = self._retrieve(FakeBundle(question))  # type: ignore[attr-defined]
        return found


FAKES = {
    "langchain_core": {},
    "langchain_core.documents": {"Document": FakeDocument},
    "langchain_core.retrievers": {"BaseRetriever": FakeLangChainRetriever},
    "llama_index": {},
    "llama_index.core": {},
    "llama_index.core.retrievers": {"BaseRetriever": FakeLlamaRetriever},
    "llama_index.core.schema": {"NodeWithScore": FakeScored, "TextNode": FakeNode},
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, content in FAKES.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ADAPTERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ADAPTERS:
        sys.modules.pop(name, None)


@pytest.fixture
def base(tmp_path: Path) -> KnowledgeBase:
    found = KnowledgeBase.create(tmp_path / "base", engine())
    found.add(story(400), name="a", metadata={"year": 1910})
    found.add(story(400, 70), name="b", metadata={"year": 1920})
    return found


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_passages_are_handed_over(framework: str, base: KnowledgeBase, fakes: None) -> None:
    module = importlib.import_module(f"retrolm.knowledge_base.{framework}")
    options: dict[str, Any] = {"top_k": 3, "where": ["year>1915"]}
    expected = base.query(QUESTION, top_k=3, where=["year>1915"])
    if framework == "langchain":
        found = module.KnowledgeBaseRetriever(base=base, **options).invoke(QUESTION)
        texts, fields = [one.page_content for one in found], [one.metadata for one in found]
    else:
        found = module.KnowledgeBaseRetriever(base, **options).retrieve(QUESTION)
        texts, fields = [one.node.text for one in found], [one.node.metadata for one in found]
        assert [one.score for one in found] == [one.score for one in expected]
    assert texts == [one.text for one in expected] and len(texts) == 3
    assert [(one["document"], one["page"], one["year"]) for one in fields] == [("b", e.page, 1920) for e in expected]


@pytest.mark.parametrize("framework", ["langchain", "llama_index"])
def test_a_missing_package_is_named(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"langchain": "langchain_core", "llama_index": "llama_index"}[framework]
    for name in [name for name in (*sys.modules, *FAKES) if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"retrolm.knowledge_base.{framework}", raising=False)
    with pytest.raises(UserError, match="pip install"):
        importlib.import_module(f"retrolm.knowledge_base.{framework}")
