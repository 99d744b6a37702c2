"""LoRA adapters that act on normal rows only: bookmark rows go through the weights their retriever was trained on.

An adapter is a folder in PEFT's format (`adapter_model.safetensors`, `adapter_config.json`) with a card beside it; with
8 bits per weight it has a weights file of another name, which PEFT doesn't read. Shape letters: R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import UserError
from .backbone import Backbone
from .running import num_bookmark_rows

CONFIG_FILE = "adapter_config.json"
CARD_FILE = "card.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SMALL_WEIGHTS_FILE = "adapter_model_int8.safetensors"
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}
BITS = (8, 16, 32)
_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")


@dataclass
class AdapterCard:
    """What an adapter is and how it came about.

    Attributes:
        backbone: fingerprint of the model it was trained on; {} = not known (an adapter of another program).
        details: data, recipe, retriever, steps, losses, bits: whatever the trainer recorded.
    """

    backbone: dict[str, Any]
    name: str = "untitled"
    details: dict[str, Any] = field(default_factory=dict)


class LoraPair(nn.Module):
    """The change of one linear module: `scale * up [out, R] @ down [R, in]`."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        down = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, rows: Tensor, out: Tensor, scale: float, num_bookmarks: int) -> Tensor:
        """Add the change to `out` [..., T, out] for all `rows` [..., T, in] but the last `num_bookmarks`.

        Without gradients it is added in place: `out` is what a module just gave, and nobody else's.
        """
        low = linear(rows, self.down.to(rows.dtype)) * scale
        if num_bookmarks:
            low = torch.cat([low[..., :-num_bookmarks, :], torch.zeros_like(low[..., -num_bookmarks:, :])], -2)
        # One kernel adds while it multiplies: `out` is wide, and read and written once this way.
        low, up, wide = low.flatten(0, -2).to(out.dtype), self.up.to(out.dtype), out.flatten(0, -2)
        added = torch.addmm(wide, low, up.T) if torch.is_grad_enabled() else wide.addmm_(low, up.T)
        return added.view_as(out)


class LoraAdapter(nn.Module):
    """One `LoraPair` per adapted module; `attach` lets it act.

    Args:
        shapes: module path inside the model → (in_features, out_features). rank, alpha: as in LoRA: scale alpha/rank.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rank: int, alpha: float, card: AdapterCard) -> None:
        super().__init__()
        self.rank, self.alpha, self.card = rank, alpha, card
        self.paths = list(shapes)
        self.pairs = nn.ModuleList(LoraPair(*shape, rank) for shape in shapes.values())

    def attach(self, backbone: Backbone) -> list[Any]:
        """Let the adapter act on a backbone's modules; returns the handles that remove it."""
        handles = []
        for path, pair in zip(self.paths, self.pairs, strict=True):
            module = backbone.model.get_submodule(path)
            handles.append(module.register_forward_hook(AdapterHook(pair, self.alpha / self.rank)))  # type: ignore[arg-type]
        return handles

    def place(self, backbone: Backbone, dtype: torch.dtype | None = None) -> LoraAdapter:
        """Move each pair to the device of its module, in `dtype` if given; in place."""
        for path, pair in zip(self.paths, self.pairs, strict=True):
            pair.to(device=_device(backbone, path), dtype=dtype)
        return self

    def save(self, folder: Path, bits: int = 16) -> Path:
        """Write the adapter; each file appears whole or not at all.

        Args:
            bits: 32 (as trained), 16 (bfloat16), or 8 (integers with a scale per rank; not readable by PEFT).

        Raises:
            UserError: `bits` is no choice.
        """
        if bits not in BITS:
            raise UserError(f"bits={bits!r} is not a choice. Allowed: {', '.join(map(str, BITS))}.")
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for path, pair in zip(self.paths, self.pairs, strict=True):
            for name, value in (("lora_A", pair.down), ("lora_B", pair.up)):
                tensors |= _packed(f"{_PREFIX}{path}.{name}.weight", value.detach().float().cpu(), bits)  # type: ignore[operator]
        name, other = (WEIGHTS_FILE, SMALL_WEIGHTS_FILE) if bits != 8 else (SMALL_WEIGHTS_FILE, WEIGHTS_FILE)
        part = folder / (name + ".part")
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(folder / name)
        (folder / other).unlink(missing_ok=True)
        _write_json(folder / CONFIG_FILE, self._peft_config())
        card = asdict(self.card)
        card["details"] = {**card["details"], "bits": bits}
        _write_json(folder / CARD_FILE, card)
        return folder

    def _peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.card.details.get("model"),
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted({path.rpartition(".")[2] for path in self.paths}),
        }


def new_adapter(backbone: Backbone, targets: str, rank: int, alpha: float, card: AdapterCard) -> LoraAdapter:
    """An adapter that changes nothing yet, on all modules of the decoder's layers that `TARGETS[targets]` names."""
    return LoraAdapter(_shapes(backbone, TARGETS[targets]), rank, alpha, card)


def load_adapter(folder: str | Path, backbone: Backbone) -> LoraAdapter:
    """Load an adapter for this backbone, ours or one that PEFT saved.

    Raises:
        UserError: no readable adapter, a kind that can't be honoured, or one of another backbone, with the reason.
    """
    folder = Path(folder)
    config = _read_config(folder)
    card = read_card(folder)
    check_backbone(card, backbone)
    tensors = _read_tensors(folder)
    shapes = {path: _fitting(backbone, path, tensors, folder) for path in _paths(tensors)}
    return _filled(shapes, tensors, config, card).place(backbone, backbone.dtype).requires_grad_(False)


def read_card(folder: Path) -> AdapterCard:
    """The card of an adapter; one of another program has none, and says nothing about its backbone.

    Raises:
        UserError: it can't be read, or isn't a card.
    """
    if not (folder / CARD_FILE).is_file():
        return AdapterCard({}, folder.name)
    try:
        return AdapterCard(**_read_json(folder, CARD_FILE))
    except TypeError:
        raise UserError(f"{folder / CARD_FILE} is no card of an adapter. Save the adapter again.") from None


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Name, folder, rank, alpha, number of modules, bytes of weights, backbone and details; raises `UserError`."""
    config, card, tensors = _read_config(folder), read_card(folder), _read_tensors(folder)
    return {
        "name": card.name,
        "folder": str(folder),
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "num_modules": len(_paths(tensors)),
        "weights_bytes": _weights_path(folder).stat().st_size,
        "backbone": card.backbone,
        "details": card.details,
    }


def export_adapter(folder: Path, out: Path, bits: int) -> Path:
    """Write an adapter anew into `out` with other bits per weight.

    Raises:
        UserError: no readable adapter, `bits` that are no choice, or `out` is where it lies.
    """
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the adapter itself. Name another folder with --out.")
    config, tensors = _read_config(folder), _read_tensors(folder)
    shapes = {p: (tensors[f"{p}.lora_A.weight"].shape[1], len(tensors[f"{p}.lora_B.weight"])) for p in _paths(tensors)}
    return _filled(shapes, tensors, config, read_card(folder)).save(out, bits)


def _filled(
    shapes: Mapping[str, tuple[int, int]], tensors: dict[str, Tensor], config: dict[str, Any], card: AdapterCard
) -> LoraAdapter:
    adapter = LoraAdapter(shapes, int(config["r"]), float(config["lora_alpha"]), card)
    for path, pair in zip(adapter.paths, adapter.pairs, strict=True):
        pair.load_state_dict({"down": tensors[f"{path}.lora_A.weight"], "up": tensors[f"{path}.lora_B.weight"]})
    return adapter


def _paths(tensors: dict[str, Tensor]) -> list[str]:
    """Modules that an adapter's tensors belong to."""
    return list(dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors))


def check_backbone(card: AdapterCard, backbone: Backbone) -> None:
    """Refuse an adapter whose backbone differs; raises `UserError` that names each difference."""
    differing = [
        f"{key}: adapter has {card.backbone[key]!r}, model has {value!r}"
        for key, value in backbone.fingerprint().items()
        if card.backbone.get(key, value) != value
    ]
    if differing:
        raise UserError(
            f"Adapter {card.name!r} was trained for another backbone ({'; '.join(differing)}). Load it with the model "
            "it was trained on."
        )


class AdapterHook:
    """Adds a pair's change to what its module gives (a forward hook)."""

    def __init__(self, pair: LoraPair, scale: float) -> None:
        self.pair = pair
        self._scale = scale

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        changed: Tensor = self.pair(args[0], out, self._scale, num_bookmark_rows())
        return changed


def adapter_hooks(model: nn.Module) -> list[AdapterHook]:
    """What attached adapters do to a model, module by module."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, AdapterHook)]


def _shapes(backbone: Backbone, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Adaptable modules of the decoder's layers: path → (in_features, out_features)."""
    of_layers = {id(module) for layer in backbone.decoder.layers for module in layer.modules()}
    return {
        path: _features(module)
        for path, module in backbone.model.named_modules()
        if path.rpartition(".")[2] in names and id(module) in of_layers
    }


def _features(module: Any) -> tuple[int, int]:
    return int(module.in_features), int(module.out_features)


def _device(backbone: Backbone, path: str) -> torch.device:
    layer = int(path.partition("layers.")[2].partition(".")[0])
    return backbone.layers[layer].device


def _fitting(backbone: Backbone, path: str, tensors: dict[str, Tensor], folder: Path) -> tuple[int, int]:
    """Shape of the module an adapter's pair belongs to; raises `UserError` if there is none that fits."""
    known = _shapes(backbone, TARGETS["all"])
    down, up = tensors.get(f"{path}.lora_A.weight"), tensors.get(f"{path}.lora_B.weight")
    if path not in known or down is None or up is None or (down.shape[1], up.shape[0]) != known[path]:
        got = None if down is None or up is None else (down.shape[1], up.shape[0])
        raise UserError(
            f"The adapter in {folder} doesn't fit this model: {path} is {got} there and "
            f"{known.get(path, 'missing')} here. Load it with the model it was trained on."
        )
    return known[path]


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter; raises `UserError` for none, or one of a kind that can't be honoured."""
    config = _read_json(folder, CONFIG_FILE)
    _check_kind(folder, config)
    return config


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    extra = [key for key in _UNSUPPORTED if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    if kind != "LORA" or extra:
        what = ", ".join(extra) or f"peft_type {kind!r}"
        raise UserError(
            f"The adapter in {folder} can't be used: {what}. Allowed: plain LoRA. Others can be merged into the model."
        )
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{folder / CONFIG_FILE} names no rank and alpha (r, lora_alpha). Save the adapter again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter: {name} is missing. Give a folder with {CONFIG_FILE}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / name} can't be read ({error}). Save the adapter again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / name} is no JSON object. Save the adapter again.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Float32 tensors by "path.lora_A.weight"; raises `UserError` for what is missing or damaged."""
    path = _weights_path(folder)
    try:
        found = load_file(path)
        plain = {
            key: _unpacked(value, found.get(key + ".scale")) for key, value in found.items() if ".scale" not in key
        }
    except Exception as error:
        raise UserError(f"{path} can't be read ({error}). Save the adapter again.") from None
    if not plain or not all(bool(value.isfinite().all()) for value in plain.values()):
        raise UserError(f"{path} is damaged: it is empty or a number isn't finite. Save the adapter again.")
    return {key.removeprefix(_PREFIX): value for key, value in plain.items()}


def _weights_path(folder: Path) -> Path:
    path = next((folder / name for name in (WEIGHTS_FILE, SMALL_WEIGHTS_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no adapter weights: {WEIGHTS_FILE} is missing. Save the adapter again.")
    return path


def _packed(key: str, value: Tensor, bits: int) -> dict[str, Tensor]:
    if bits != 8:
        return {key: (value if bits == 32 else value.to(torch.bfloat16)).contiguous()}
    over = 1 if ".lora_A." in key else 0  # one scale per rank
    scale = value.abs().amax(over, keepdim=True).clamp(min=1e-12) / 127
    return {key: (value / scale).round().to(torch.int8).contiguous(), key + ".scale": scale.contiguous()}


def _unpacked(value: Tensor, scale: Tensor | None) -> Tensor:
    if value.dtype == torch.int8:
        if scale is None:
            raise ValueError("a scale is missing")
        return value.float() * scale
    return value.float()
