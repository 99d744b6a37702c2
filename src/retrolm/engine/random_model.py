"""Models of a given shape with random weights: what speed and memory depend on, without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import UserError, unknown

SHAPES = Path(__file__).parents[3] / "configs" / "shapes"


def load_shape(name: str) -> Any:
    """The transformers configuration of a shape: a name under configs/shapes of the source tree, or a JSON file.

    Raises:
        UserError: no such shape, or a file that is no model configuration.
    """
    path = Path(name) if name.endswith(".json") else SHAPES / f"{name}.json"
    if not path.is_file():
        raise unknown("shape", name, [found.stem for found in SHAPES.glob("*.json")] or ["a JSON file"])
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no model configuration ({error!r}). It needs JSON with model_type.") from None


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0, **changes: Any) -> Any:
    """A model of this shape in stock initialisation, made on `device`; `changes` override fields of `config`."""
    fields = {**config.to_dict(), **changes}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    config = type(config)(**fields)
    torch.manual_seed(seed)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # random weights must not end an answer early
    return model.to(dtype).eval()
