"""What dtype "auto" means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retrolm.engine import loading
from retrolm.engine.pull import CARD
from retrolm.errors import UserError
from tiny_models import tiny_model


@pytest.mark.parametrize(
    ("pulled", "cuda", "asked", "loaded"),
    [
        (True, True, "auto", torch.bfloat16),
        (True, False, "auto", "auto"),
        (False, True, "auto", "auto"),
        (True, True, "float32", "float32"),
    ],
)
def test_demo_backbones_compute_in_bfloat16_on_a_gpu(
    pulled: bool, cuda: bool, asked: str, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    if pulled:
        (tmp_path / CARD).write_text("{}")
    seen = []

    def note(folder: str, dtype: Any, **_: Any) -> None:
        seen.append(dtype)
        raise OSError("no weights here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", note)
    with pytest.raises(UserError, match="no weights here"):
        loading.load_model(str(tmp_path), asked, None, {})
    assert seen == [loaded]
