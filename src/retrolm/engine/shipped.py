"""Retrievers that come with the package, found by the backbone they belong to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..retriever import CARD_FILE, read_card
from .backbone import Backbone

SHIPPED = Path(__file__).parent.parent / "retrievers"


def find_shipped(backbone: Backbone) -> Path | None:
    """Folder of the retriever shipped for this backbone, or None."""
    return first_fitting(backbone, shipped_retrievers(), read_card)


def shipped_retrievers() -> list[Path]:
    """Folders of all shipped retrievers."""
    return folders_with(CARD_FILE, SHIPPED)


def folders_with(card_file: str, place: Path) -> list[Path]:
    """Folders in `place` that hold a card, sorted; none where there is no such place."""
    return sorted(path.parent for path in place.glob(f"*/{card_file}")) if place.is_dir() else []


def first_fitting(backbone: Backbone, folders: list[Path], card_of: Callable[[Path], Any]) -> Path | None:
    """The first folder whose card names this backbone, or None."""
    fingerprint = backbone.fingerprint()
    for path in folders:
        if all(card_of(path).backbone.get(key) == value for key, value in fingerprint.items()):
            return path
    return None


def resolve_retriever(name: str) -> Path:
    """Folder of a retriever given as a folder or by the name of a shipped one; raises `UserError` otherwise."""
    if (Path(name) / CARD_FILE).is_file():
        return Path(name)
    by_name = {path.name: path for path in shipped_retrievers()}
    if name in by_name:
        return by_name[name]
    raise UserError(
        f"No page retriever {name!r}: neither a folder with {CARD_FILE} nor a shipped one "
        f"({', '.join(by_name) or 'none'}). Train one with `retrolm train stage1`."
    )
