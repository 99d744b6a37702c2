"""The example in docs/add_a_method.md does what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrolm.config import RetroConfig
from retrolm.engine.model import RetroLM
from retrolm.methods import METHODS
from tiny_models import random_ids, tiny_model

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def key_norm() -> Iterator[None]:
    code = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_method.md").read_text(encoding="utf-8"), re.DOTALL)
    before = dict(METHODS._entries)
    namespace: dict[str, Any] = {}
    exec(compile(code[0], "add_a_method.md", "exec"), namespace)
    yield
    METHODS._entries.clear()
    METHODS._entries.update(before)


def test_the_documented_method_selects_within_the_budget(key_norm: None) -> None:
    model, ids = tiny_model("llama"), random_ids(100)
    lm = RetroLM(model, config=RetroConfig(kv_budget=32, page_size=8), method="key_norm")
    recent = RetroLM(model, config=RetroConfig(kv_budget=32, page_size=8), method="recency")
    assert lm.logits(ids).shape[0] == 100
    assert not torch.equal(lm.logits(ids), recent.logits(ids))


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
