"""Adapters that come with the package, found by the backbone they belong to."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .adapter import CARD_FILE, CONFIG_FILE, read_card
from .backbone import Backbone
from .shipped import first_fitting, folders_with

SHIPPED = Path(__file__).parent.parent / "adapters"


def shipped_adapters() -> list[Path]:
    """Folders of all shipped adapters."""
    return folders_with(CARD_FILE, SHIPPED)


def find_shipped_adapter(backbone: Backbone) -> Path | None:
    """Folder of the adapter shipped for this backbone, or None."""
    return first_fitting(backbone, shipped_adapters(), read_card)


def resolve_adapter(name: str | Path) -> Path:
    """Folder of an adapter given as a folder or by the name of a shipped one; raises `UserError` otherwise."""
    if Path(name).is_dir():
        return Path(name)
    by_name = {path.name: path for path in shipped_adapters()}
    if str(name) in by_name:
        return by_name[str(name)]
    raise UserError(
        f"No adapter {str(name)!r}: neither a folder with {CONFIG_FILE} nor a shipped one "
        f"({', '.join(by_name) or 'none'}). Train one with `retrolm train stage2`."
    )


def adapter_for(backbone: Backbone, name: str | Path) -> Path | None:
    """Folder of the adapter that `name` means for a backbone.

    Args:
        name: "auto" (the one shipped for this backbone), "none", a folder or a shipped name.

    Returns:
        None for "none", and for "auto" where no adapter is shipped.
    """
    if str(name) == "none":
        return None
    return find_shipped_adapter(backbone) if str(name) == "auto" else resolve_adapter(name)
