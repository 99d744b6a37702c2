"""What Landmark Attention learns: the landmarks' embedding, and a LoRA adapter that lets a model work with them.

On disk it is a folder: `landmark.safetensors` (the embedding) and `adapter/`, a LoRA adapter with its card, which names
the backbone and how many tokens lie between landmarks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from .adapter import AdapterCard as LandmarkCard
from .adapter import LoraAdapter, load_adapter, new_adapter
from .backbone import Backbone
from .landmark_rows import num_places
from .whole_folder import whole_folder

EMBEDDING_FILE = "landmark.safetensors"
ADAPTER_FOLDER = "adapter"
NUM_BETWEEN = "num_between"  # keys of the card's details
CONTEXT = "context"


class Landmarks(nn.Module):
    """Embedding and adapter.

    Args:
        embedding: [hidden], trained in float32. adapter: its card's details name `num_between` and `context`.
    """

    def __init__(self, embedding: Tensor, adapter: LoraAdapter) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding.detach().clone().float())
        self.adapter = adapter

    @property
    def card(self) -> LandmarkCard:
        return self.adapter.card

    @property
    def num_between(self) -> int:
        """Tokens between landmarks."""
        return int(self.card.details[NUM_BETWEEN])

    @property
    def context(self) -> int:
        """Places (tokens and landmarks) of the texts that it was trained on."""
        return int(self.card.details[CONTEXT])

    def digest(self) -> str:
        """Short hash of all weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            found.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    @contextmanager
    def acting(self, backbone: Backbone) -> Iterator[None]:
        """Let the adapter act on the model until the block ends."""
        handles = self.adapter.attach(backbone)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path, bits: int) -> None:
        """Write the folder, whole or not at all.

        Args:
            bits: of each weight of the adapter (see `LoraAdapter.save`); the embedding is kept in float32.
        """
        with whole_folder(folder) as part:
            self.adapter.save(part / ADAPTER_FOLDER, bits)
            save_file({"embedding": self.embedding.detach().cpu().contiguous()}, part / EMBEDDING_FILE)


def new_landmarks(
    backbone: Backbone, embedding_E: Tensor, targets: str, rank: int, alpha: float, card: LandmarkCard
) -> Landmarks:
    """Untrained ones: landmarks embedded as given, an adapter that changes nothing yet."""
    found = Landmarks(embedding_E.float(), new_adapter(backbone, targets, rank, alpha, card))
    found.adapter.place(backbone)
    return found.to(backbone.device)


def load_landmarks(folder: Path, backbone: Backbone) -> Landmarks:
    """Load what was trained for this backbone, frozen.

    Raises:
        UserError: nothing that can be read, or it belongs to another backbone, with the reason.
    """
    path = folder / EMBEDDING_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no landmarks: {EMBEDDING_FILE} is missing. Give the folder that `retrolm train landmark` "
            "wrote."
        )
    adapter = load_adapter(folder / ADAPTER_FOLDER, backbone)
    try:
        found = Landmarks(load_file(path)["embedding"], adapter)
        usable = found.embedding.shape == (backbone.hidden_size,) and found.num_between > 0 and found.context > 0
    except Exception as error:
        raise UserError(f"The landmarks in {folder} can't be read ({error!r}). Save them again.") from None
    if not usable or not bool(torch.isfinite(found.embedding).all()):
        raise UserError(f"The landmarks in {folder} are damaged or don't fit the model. Save them again.")
    found.embedding.data = found.embedding.data.to(backbone.device)
    return found.requires_grad_(False).eval()


def require_groups(backbone: Backbone) -> None:
    """Raise `UserError` for a model whose attention can't be grouped."""
    if any(layer.window is not None for layer in backbone.layers):
        raise UserError("Landmark Attention needs layers that attend everything; this model's slide. Use another one.")
    if getattr(backbone.config, "attn_logit_softcapping", None):
        raise UserError("Landmark Attention knows no cap on attention's logits, which this model has. Use another one.")


def require_window(backbone: Backbone, num_tokens: int, num_between: int) -> None:
    """Raise `UserError` if a text with its landmarks exceeds the model's window."""
    needed = num_places(num_tokens, num_between)
    if needed > backbone.window:
        raise UserError(
            f"max_tokens={num_tokens} and their landmarks take {needed} positions; the model's window has "
            f"{backbone.window}. Lower max_tokens."
        )
