"""The tiny models are worth testing with: every feature of every family moves the logits."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FEATURES, random_ids, tiny_model

CASES = [(name, feature) for name, features in FEATURES.items() for feature in features]


@pytest.mark.parametrize(("name", "feature"), CASES)
@torch.no_grad()
def test_switching_a_feature_off_moves_the_logits(name: str, feature: str) -> None:
    ids = random_ids(100)[None]
    model = tiny_model(name)
    with_it = model(ids).logits
    without = FEATURES[name][feature](name, model)(ids).logits
    assert (with_it - without).abs().max() > 1e-2
    assert with_it.isfinite().all()
