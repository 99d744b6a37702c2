"""Who may import whom: every arrow between the rooms of the package points down."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retrolm

ROWS: dict[str, int] = {
    **dict.fromkeys(("cli", "server"), 6),
    **dict.fromkeys(("training", "evaluation", "knowledge_base", "rag"), 5),
    "engine": 4,
    "methods": 3,
    **dict.fromkeys(
        ("bookmarks", "retriever", "metrics", "planting", "bm25_library", "word_index", "asked_words", "cut_sentences"),
        2,
    ),
    **dict.fromkeys(("paging", "store", "ops"), 1),
    **dict.fromkeys(("config", "registry", "errors"), 0),
}
STRANGERS = {5, 1}  # rows whose rooms never import one another
MODEL_PACKAGES = {"transformers", "tokenizers"}  # only the engine knows models and tokenizers
SOURCE = Path(retrolm.__file__).parent


def module_of(file: Path, source: Path) -> tuple[str, ...]:
    """Return the parts of the package that relative imports in `file` count from, `retrolm` itself being ()."""
    return file.relative_to(source).parent.parts


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of all imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            kept = ("retrolm", *package)[: len(package) + 2 - node.level] if node.level else ()
            base = ".".join([*kept, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def complaint(room: str, name: str) -> str | None:
    """Return what is wrong with a module of `room` importing `name`, or None."""
    top, *rest = name.split(".")
    if top != "retrolm":
        return foreign_complaint(room, top)
    target = rest[0] if rest else ""
    if target in (room, "__version__"):
        return None
    if target not in ROWS:
        return f"imports {name}, which is in no row"
    if ROWS[target] > ROWS[room]:
        return f"imports {target} (row {ROWS[target]}) from row {ROWS[room]}"
    if ROWS[target] == ROWS[room] and ROWS[room] in STRANGERS:
        return f"imports its neighbour {target}"
    return "knows the store" if (room, target) == ("methods", "store") else None


def foreign_complaint(room: str, package: str) -> str | None:
    """Return what is wrong with a module of `room` importing another package, or None."""
    if package in MODEL_PACKAGES and room != "engine":
        return f"imports {package}, which only the engine may"
    if ROWS[room] == 0 and package not in sys.stdlib_module_names:
        return f"imports {package}, not of the standard library"
    return None


def broken_arrows(source: Path) -> list[str]:
    """Return one line per forbidden import under `source`; the package's own `__init__` may re-export anything."""
    found = []
    for file in sorted(source.rglob("*.py")):
        room = file.relative_to(source).with_suffix("").parts[0]
        if room == "__init__":
            continue
        if room not in ROWS:
            found.append(f"{file.relative_to(source)}: {room} is in no row")
            continue
        for line, name in imported(parse(file), module_of(file, source)):
            if (wrong := complaint(room, name)) is not None:
                found.append(f"{file.relative_to(source)}:{line} {wrong}")
    return found


def test_every_import_points_down() -> None:
    assert broken_arrows(SOURCE) == []


def test_the_walk_sees_the_package() -> None:
    names = {name for file in SOURCE.rglob("*.py") for _, name in imported(parse(file), module_of(file, SOURCE))}
    assert "retrolm.errors.UserError" in names and len(names) > 50


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("store/disk.py", "from ..engine.model import RetroLM", "imports engine (row 4) from row 1"),
        ("methods/quest.py", "def f():\n    from ..engine import load", "imports engine (row 4) from row 3"),
        ("store/disk.py", "from ..paging import Pages", "imports its neighbour paging"),
        ("training/stage1/step.py", "from ...evaluation import tasks", "imports its neighbour evaluation"),
        ("training/stage1/step.py", "import retrolm.rag.pipeline", "imports its neighbour rag"),
        ("methods/quest.py", "from ..store import Resident", "knows the store"),
        ("training/data/pool.py", "from transformers import AutoTokenizer", "imports transformers"),
        ("evaluation/runner.py", "import tokenizers.models", "imports tokenizers"),
        ("config.py", "import torch", "not of the standard library"),
        ("errors.py", "from . import paging", "imports paging (row 1) from row 0"),
        ("engine/load.py", "from .. import misc", "imports retrolm.misc, which is in no row"),
        ("helpers.py", "import os", "helpers is in no row"),
    ],
)
def test_a_planted_arrow_is_found(tmp_path: Path, file: str, code: str, message: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(code)
    (found,) = broken_arrows(tmp_path)
    assert message in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("engine/load.py", "import torch, transformers\nfrom ..store import layout\nfrom .rope_table import Table"),
        ("engine/__init__.py", "from .load import load"),
        ("training/stage1/step.py", "from ..data import pool\nfrom ...engine import load\nfrom . import loss"),
        ("cli/main.py", "from .. import __version__\nfrom ..server import app\nfrom ..rag import pipeline"),
        ("retriever.py", "from .bookmarks import Projection\nimport torch"),
        ("config.py", "from .errors import UserError\nimport dataclasses"),
        ("__init__.py", "from .engine import RetroLM"),
    ],
)
def test_allowed_arrows_pass(tmp_path: Path, file: str, code: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(code)
    assert broken_arrows(tmp_path) == []


def parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))
