"""Fixtures that several test files share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from cli_runner import Desk
from tiny_folder import save_tiny_model, write_story

settings.register_profile("suite", max_examples=50)
settings.load_profile("suite")  # where a test names no number of its own


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: collections, which every measured answer begins with, needn't look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One model and text for all tests that only read them."""
    folder = tmp_path_factory.mktemp("desk")
    return Desk(folder, save_tiny_model(folder / "model"), write_story(folder / "story.txt"))


@pytest.fixture
def exact_matmul() -> Iterator[None]:
    """On a GPU, where TF32 would round what is compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
