"""Sentence embedders: texts to vectors whose inner product says how well they fit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.pull import resolve_model
from ..errors import UserError

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class EmbedderCard:
    """How an embedder wants to be used: what stands before a query, and whether vectors get length 1."""

    model: str
    query_prefix: str = ""
    normalise: bool = True


# By the names used in papers; any other name is a catalogue name, a folder or a Hugging Face id.
KNOWN = {
    "minilm": EmbedderCard("all-minilm-l6-v2"),
    "contriever": EmbedderCard("facebook/contriever", normalise=False),
    "bge-large": EmbedderCard(
        "BAAI/bge-large-en-v1.5", query_prefix="Represent this sentence for searching relevant passages: "
    ),
}

_LOADED: dict[tuple[str, str], Embedder] = {}
_LOCK = threading.Lock()


class Embedder:
    """A sentence-transformers model.

    Args:
        name: a known name, a catalogue name (`retrolm pull all-minilm-l6-v2`), a folder or a Hugging Face id.
        device: where it computes.

    Raises:
        UserError: sentence-transformers is not installed, or the model is not there.
    """

    def __init__(self, name: str, device: Any = None) -> None:
        self._card = KNOWN.get(name, EmbedderCard(name))
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("RAG by embeddings needs sentence-transformers: pip install 'retrolm[rag]'.") from None
        folder = resolve_model(self._card.model)
        try:
            self._model: Any = SentenceTransformer(folder, device=None if device is None else str(device))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Could not load the embedder {name!r} ({reason}). Give a folder or a Hugging Face id of a "
                "sentence-transformers model, or run: retrolm pull all-minilm-l6-v2"
            ) from None

    def queries(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, width] of queries."""
        return self._encode([self._card.query_prefix + text for text in texts])

    def passages(self, texts: Sequence[str]) -> Vectors:
        """Vectors [N, width] of passages."""
        return self._encode(list(texts))

    def _encode(self, texts: list[str]) -> Vectors:
        found: Vectors = self._model.encode(
            texts, convert_to_numpy=True, normalize_embeddings=self._card.normalise, show_progress_bar=False
        )
        return found


def load_embedder(name: str, device: Any = None) -> Embedder:
    """The embedder of that name on a device, loaded once in a process."""
    with _LOCK:
        key = (name, str(device))
        if key not in _LOADED:
            _LOADED[key] = Embedder(name, device)
        return _LOADED[key]
