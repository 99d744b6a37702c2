"""`retrolm retriever push`: what would be uploaded, what is, and what the user hears when the hub says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runner import run_cli
from retrolm.engine.push import push_retriever
from retrolm.errors import UserError
from retrolm.retriever import CARD_FILE, WEIGHTS_FILE, PageRetriever, ProjectionShape, RetrieverCard

BACKBONE = {"model_type": "llama", "num_layers": 1}
DETAILS = {"recipe": "tiny.toml", "licence": "CC0", "recall": {"8192": 0.5}}


class FakeHub:
    """Keeps what it is given; refuses like the hub if `error` is set."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.repositories: list[tuple[str, bool]] = []
        self.commits: list[tuple[str, dict[str, bytes], str]] = []

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert repo_type == "model" and exist_ok
        if self.error:
            raise RuntimeError(self.error)
        self.repositories.append((repo_id, private))

    def create_commit(self, repo_id: str, *, operations: list[Any], commit_message: str, repo_type: str) -> None:
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        self.commits.append((repo_id, files, commit_message))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shapes = [ProjectionShape(0, "q_proj", 4, 4)]
    card = RetrieverCard(BACKBONE, rank=2, page_size=32, name="tiny", details=DETAILS)
    return PageRetriever(shapes, torch.zeros(4), card).save(tmp_path / "retriever")


def test_one_commit_holds_weights_card_and_a_page(folder: Path) -> None:
    hub = FakeHub()
    plan = push_retriever(folder, "me/tiny", private=True, api=hub)
    assert hub.repositories == [("me/tiny", True)]
    ((repo_id, files, message),) = hub.commits
    assert repo_id == "me/tiny" and "tiny" in message
    assert files[WEIGHTS_FILE] == (folder / WEIGHTS_FILE).read_bytes()
    assert files[CARD_FILE] == (folder / CARD_FILE).read_bytes()
    assert plan.files == {name: len(content) for name, content in files.items()}
    page = files["README.md"].decode()
    assert page.startswith("---\nlibrary_name:") and "rank 2" in page and "hf download me/tiny" in page
    found = json.loads(page.split("```json\n")[1].split("\n```")[0])
    assert found == {"backbone": BACKBONE, **DETAILS}


def test_a_dry_run_uploads_nothing(folder: Path) -> None:
    outcome = run_cli("retriever", "push", folder, "me/tiny", "--dry-run")
    assert outcome.code == 0 and outcome.out.endswith("Would go to https://huggingface.co/me/tiny\n")
    found = run_cli("retriever", "push", folder, "me/tiny", "--dry-run", "--json").json
    assert found["uploaded"] is False and set(found["files"]) == {WEIGHTS_FILE, CARD_FILE, "README.md"}


def test_what_the_hub_refuses_is_said_in_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"didn't take me/tiny \(401 who are you\?\)\. Log in"):
        push_retriever(folder, "me/tiny", api=FakeHub("401\nwho are you?"))


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "/tiny", "me/", "me/my tiny"])
def test_a_name_that_is_no_repository_is_refused(folder: Path, name: str) -> None:
    run_cli("retriever", "push", folder, name, "--dry-run").refused_in_one_line("NAMESPACE/NAME")


def test_an_incomplete_retriever_is_refused(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    run_cli("retriever", "push", folder, "me/tiny", "--dry-run").refused_in_one_line(WEIGHTS_FILE, "missing")
