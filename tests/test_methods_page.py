"""docs/methods.md is what the methods say of themselves. Run this file to write it anew."""

from __future__ import annotations

from pathlib import Path

from retrolm.cli.known_methods import known_methods
from retrolm.methods.methods_page import methods_page

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == methods_page(known_methods()), "python tests/test_methods_page.py"


def test_every_method_has_a_row_with_its_place() -> None:
    methods, text = known_methods(), methods_page(known_methods())
    for name in methods:
        (row,) = [line for line in text.splitlines() if line.startswith(f"| [{name}](")]
        assert all(cell.strip() for cell in row.strip("|").split("|")) and row.count("|") == 12


def test_placing_needs_more_than_defaults() -> None:
    """Methods that look for what they attend say by what, and those with a budget when."""
    for name in (methods := known_methods()):
        kind = methods.get(name)
        assert kind.when != "never" or not kind.has_budget, name
        assert kind.index != "none" or not kind.has_budget, name
        assert kind.trained == "nothing" or kind.needs_bookmarks or kind.kind in ("rag", "landmarks"), name


if __name__ == "__main__":
    PAGE.write_text(methods_page(known_methods()), encoding="utf-8")
