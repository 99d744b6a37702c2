"""Loading a stock transformers model and the token ids that end or pad its texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..errors import UserError, unknown
from .backbone import check_family
from .placement import device_of
from .pull import CARD


def load_model(folder: str, dtype: Any, device_map: Any, model_options: dict[str, Any]) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder or hub id; a CUDA device is used if there is one.

    A `device_map` that is a function places the model itself, once it is loaded on the host.
    dtype "auto" is what the model's config says; demo backbones compute in float32 on a CPU, in bfloat16 on a GPU.

    Raises:
        UserError: unknown dtype, or nothing that loads; UnsupportedModelError: a family RetroLM can't attach to.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise unknown("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    if dtype == "auto" and torch.cuda.is_available() and (Path(folder) / CARD).is_file():
        dtype = torch.bfloat16  # pulled models say float32, which is for CPUs
    try:
        check_family(AutoConfig.from_pretrained(folder).get_text_config())
        place = device_map if callable(device_map) else None
        places = None if place is not None else device_map
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=places, **model_options)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if place is not None:
            place(model)
        elif device_map is None and torch.cuda.is_available() and not _is_on_cuda(model):
            model = model.to("cuda")
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        hint = "" if isinstance(error, ImportError) else " Give a folder, a Hugging Face id or a demo name."
        raise UserError(f"Can't load the model {folder!r}: {reason}{hint}") from None
    return model.eval(), tokenizer


def _is_on_cuda(model: Any) -> bool:
    """Whether the model is on a GPU already, where quantisers put it themselves and let nobody move it."""
    return device_of(model.get_input_embeddings()).type == "cuda"


def freeze(model: Any) -> None:
    """Let no weight of a backbone be trained; gradients still go through it.

    A quantised one is put in training mode (there is no dropout): on some CPUs bitsandbytes computes without a gradient
    in evaluation mode, and stays with it.
    """
    model.requires_grad_(False).train(getattr(model, "is_quantized", False))


def eos_ids(*sources: Any) -> tuple[int, ...]:
    """All end-of-sequence ids that the sources name, first named first."""
    found: list[int] = []
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(dict.fromkeys(int(i) for i in found))


def pad_id(tokenizer: Any, ends: tuple[int, ...]) -> int:
    """The tokenizer's padding id, else the first end-of-sequence id, else 0."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return int(pad) if pad is not None else ends[0] if ends else 0
