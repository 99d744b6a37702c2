"""The page retriever: bookmark embedding and bookmark projections W^b (paper eq 5), saved as a small artefact.

W^b is kept as a difference to the model's own projections: `W^b x = W x + delta x`. An untrained retriever has no
delta at all (the paper's "w/o Stage1": W^b is a copy). Shape letters: R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import RetroConfig
from .errors import IncompatibleRetrieverError, UserError

FORMAT_VERSION = 1
WEIGHTS_FILE = "retriever.safetensors"
CARD_FILE = "card.json"
_SCALE = ".scale"


@dataclass(frozen=True)
class ProjectionShape:
    """One projection that bookmark rows pass through with W^b: `name` within its layer, input and output width."""

    layer: int
    name: str
    in_features: int
    out_features: int

    @property
    def key(self) -> str:
        return f"layers_{self.layer}_{self.name}"


@dataclass
class RetrieverCard:
    """What a retriever is and how it came about; stored beside the weights.

    Attributes:
        backbone: fingerprint of the model it was trained on (see `engine.fingerprint`).
        rank: rank of the deltas; 0 = full.
        page_size: page size at training.
        details: data, recipe, seeds, recall table, licence: whatever the trainer recorded.
    """

    backbone: dict[str, Any]
    rank: int
    page_size: int
    name: str = "untitled"
    details: dict[str, Any] = field(default_factory=dict)


class Delta(nn.Module):
    """Difference of one bookmark projection to the model's own: full [out, in], or up [out, R] @ down [R, in]."""

    def __init__(self, shape: ProjectionShape, rank: int) -> None:
        super().__init__()
        self.rank = rank
        if rank:
            down = torch.empty(rank, shape.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down = nn.Parameter(down)
            self.up = nn.Parameter(torch.zeros(shape.out_features, rank))
        else:
            self.weight = nn.Parameter(torch.zeros(shape.out_features, shape.in_features))

    def forward(self, rows: Tensor) -> Tensor:
        """Map normed bookmark rows [..., in] to the difference [..., out], in the dtype of `rows`."""
        if self.rank:
            return nn.functional.linear(nn.functional.linear(rows, self.down.to(rows.dtype)), self.up.to(rows.dtype))
        return nn.functional.linear(rows, self.weight.to(rows.dtype))


class PageRetriever(nn.Module):
    """Bookmark embedding [hidden] and one `Delta` per layer and projection.

    Args:
        shapes: projections of the backbone, in order.
        embedding: start value of the bookmark embedding, [hidden]; the EOS row by default of the caller (D18).
        rank: rank of each delta; 0 for full matrices.
    """

    def __init__(self, shapes: list[ProjectionShape], embedding: Tensor, card: RetrieverCard) -> None:
        super().__init__()
        self.card = card
        self.embedding = nn.Parameter(embedding.detach().clone().float())
        self.deltas = nn.ModuleDict({shape.key: Delta(shape, card.rank) for shape in shapes})

    def delta(self, layer: int, name: str, rows: Tensor) -> Tensor:
        """What to add to the model's own projection `name` of layer `layer` for bookmark rows [..., in]."""
        module: Delta = self.deltas[f"layers_{layer}_{name}"]  # type: ignore[assignment]
        out: Tensor = module(rows)
        return out

    def place(self, devices: Sequence[torch.device]) -> PageRetriever:
        """Move each layer's deltas to the device that the layer computes on, the embedding to the first; in place."""
        self.embedding.data = self.embedding.data.to(devices[0])
        for layer, device in enumerate(devices):
            for key, delta in self.deltas.items():
                if key.startswith(f"layers_{layer}_"):
                    delta.to(device)
        return self

    def save(self, folder: str | Path, bits: int = 32) -> Path:
        """Write weights and card into `folder`; both appear whole or not at all.

        Args:
            bits: 32 (as trained), 16 (bfloat16) or 8 (matrices as integers with one scale per row).
        """
        return _write(Path(folder), dict(self.state_dict()), self.card, bits)


def export_retriever(source: str | Path, folder: str | Path, bits: int, rank: int | None = None) -> Path:
    """Write the retriever in `source` anew into `folder` with 8, 16 or 32 bits per weight; needs no backbone.

    The card says how the weights are kept (`details["bits"]`).

    Args:
        rank: replace each delta by the nearest one of this rank (in the Frobenius norm); None keeps them.

    Raises:
        UserError: `source` holds no readable retriever, `folder` is `source`, or `bits` or `rank` is no choice.
    """
    source, folder = Path(source), Path(folder)
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the retriever itself. Name another folder to export to.")
    card, tensors = read_card(source), _read_tensors(source)
    if rank is not None:
        tensors = _of_rank(tensors, card.rank, rank)
        card = replace(card, rank=rank, details={**card.details, "reduced_from_rank": card.rank})
    return _write(folder, tensors, replace(card, details={**card.details, "bits": bits}), bits)


def _of_rank(tensors: dict[str, Tensor], before: int, rank: int) -> dict[str, Tensor]:
    """Deltas of rank `before` (0 = full) reduced to `rank`: the largest singular values, shared by both factors."""
    if rank < 1 or (before and rank > before):
        raise UserError(f"rank={rank} is no choice: allowed is 1 to {before or 'what the model has'}.")
    found = {"embedding": tensors["embedding"]}
    for key in sorted({name.rpartition(".")[0] for name in tensors} - {""}):
        whole = tensors[f"{key}.up"] @ tensors[f"{key}.down"] if before else tensors[f"{key}.weight"]
        if rank > min(whole.shape):
            raise UserError(f"rank={rank} exceeds the smaller side of {key}, {min(whole.shape)}.")
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        root = values[:rank].sqrt()
        found[f"{key}.up"], found[f"{key}.down"] = left[:, :rank] * root, root[:, None] * right[:rank]
    return found


def _write(folder: Path, tensors: dict[str, Tensor], card: RetrieverCard, bits: int) -> Path:
    if bits not in _PACKERS:
        raise UserError(f"bits={bits!r} is not a choice. Allowed: {', '.join(map(str, sorted(_PACKERS)))}.")
    folder.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        packed.update(_PACKERS[bits](name, value.detach().cpu().contiguous()))
    part = folder / (WEIGHTS_FILE + ".part")
    save_file(packed, part)
    part.replace(folder / WEIGHTS_FILE)
    part = folder / (CARD_FILE + ".part")
    content = {"format_version": FORMAT_VERSION, **asdict(card)}
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / CARD_FILE)
    return folder


def _pack_32(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value}


def _pack_16(name: str, value: Tensor) -> dict[str, Tensor]:
    return {name: value.to(torch.bfloat16)}


def _pack_8(name: str, value: Tensor) -> dict[str, Tensor]:
    """A matrix [rows, columns] as int8 with a float32 scale per row; vectors stay float32."""
    if value.dim() != 2:
        return {name: value}
    scale = value.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return {name: (value.float() / scale).round().to(torch.int8), name + _SCALE: scale[:, 0]}


def _unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float32 tensors of a saved retriever, whatever it was packed as; raises `ValueError` if a scale is missing."""
    if bare := [n for n, value in tensors.items() if value.dtype == torch.int8 and n + _SCALE not in tensors]:
        raise ValueError(f"{bare[0]} has no scale")
    plain = {name: value.float() for name, value in tensors.items() if not name.endswith(_SCALE)}
    for name, scale in tensors.items():
        if name.endswith(_SCALE):
            plain[name.removesuffix(_SCALE)] *= scale[:, None]
    return plain


_PACKERS = {8: _pack_8, 16: _pack_16, 32: _pack_32}


def read_card(folder: str | Path) -> RetrieverCard:
    """Read the card of a saved retriever; raises `UserError` if the folder holds none."""
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} holds no page retriever: {CARD_FILE} is missing. Point to a folder saved by RetroLM."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format_version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable retriever card ({error}). Export the retriever again.") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}; this version reads {FORMAT_VERSION}. Export the retriever again."
        )
    try:
        return _checked(RetrieverCard(**fields))
    except TypeError as error:
        raise UserError(f"{path} is not a readable retriever card ({error}). Export the retriever again.") from None


def _checked(card: RetrieverCard) -> RetrieverCard:
    """The card, if its fields are of the right types; raises `TypeError`."""
    whole = all(isinstance(n, int) and n >= low for n, low in ((card.rank, 0), (card.page_size, 1)))
    if not (whole and isinstance(card.backbone, dict) and isinstance(card.details, dict)):
        raise TypeError("rank, page_size, backbone or details is of a wrong kind")
    return card


def load_retriever(folder: str | Path, shapes: list[ProjectionShape], backbone: Mapping[str, Any]) -> PageRetriever:
    """Load a retriever for the model with these projections and fingerprint.

    Raises:
        IncompatibleRetrieverError: it was trained for another backbone; the message names what differs.
        UserError: the folder holds no readable retriever.
    """
    card = read_card(folder)
    check_backbone(card, backbone)
    tensors = _read_tensors(Path(folder))
    retriever = PageRetriever(shapes, tensors["embedding"], card)
    try:
        retriever.load_state_dict(tensors)
    except RuntimeError as error:
        raise IncompatibleRetrieverError(f"The retriever in {folder} doesn't fit this model: {error}") from None
    return retriever


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Float32 tensors of a saved retriever; raises `UserError` for what is missing, damaged or not finite."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no retriever weights: {WEIGHTS_FILE} is missing. Export the retriever again.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = _unpacked({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path} can't be read ({error}). Export the retriever again.") from None
    if "embedding" not in tensors or not all(bool(value.isfinite().all()) for value in tensors.values()):
        raise UserError(f"{path} is damaged: a tensor is missing or not finite. Export the retriever again.")
    return tensors


def check_backbone(card: RetrieverCard, backbone: Mapping[str, Any]) -> None:
    """Refuse a retriever whose backbone fingerprint differs; the message names each difference."""
    differing = [
        f"{key}: retriever has {card.backbone.get(key)!r}, model has {value!r}"
        for key, value in backbone.items()
        if card.backbone.get(key) != value
    ]
    if differing:
        raise IncompatibleRetrieverError(
            f"Retriever {card.name!r} was trained for another backbone ({'; '.join(differing)}). "
            "Load it with the model it was trained on, or train one for this model."
        )


def check_choices(card: RetrieverCard, config: RetroConfig) -> None:
    """Refuse an engine in which bookmarks are read otherwise than in training (D1, D3, D13), as far as that is known.

    Raises:
        IncompatibleRetrieverError: the message names each difference.
    """
    recipe = card.details.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("train"), dict):
        return
    recipe = recipe["train"]
    trained = {name: recipe.get(name, getattr(RetroConfig, name)) for name in _TRAINED_CHOICES}
    if differing := [name for name, value in trained.items() if getattr(config, name) != value]:
        there, here = (", ".join(f"{name}={of[name]!r}" for name in differing) for of in (trained, vars(config)))
        raise IncompatibleRetrieverError(
            f"Retriever {card.name!r} was trained with {there}, this engine is set up with {here}. "
            "Set the engine up alike, or train a retriever for it."
        )


_TRAINED_CHOICES = ("bookmarks", "bookmark_span", "score_rope")
