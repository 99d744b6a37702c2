"""`push`: a trained page retriever onto the Hugging Face hub, with a page that says what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import UserError
from ..retriever import CARD_FILE, WEIGHTS_FILE, RetrieverCard, read_card

README = "README.md"


@dataclass(frozen=True)
class PushPlan:
    """What is uploaded: path in the repository -> number of bytes."""

    repo_id: str
    files: dict[str, int]


def push_retriever(
    folder: Path, repo_id: str, *, private: bool = False, dry_run: bool = False, api: Any = None
) -> PushPlan:
    """Upload the retriever in `folder` to the hub's model repository `repo_id`, in one commit.

    Args:
        dry_run: only say what would be uploaded; needs no network and no account.
        api: a `huggingface_hub.HfApi`; None = one with the account that is logged in.

    Raises:
        UserError: `folder` holds no complete retriever, `repo_id` is no NAMESPACE/NAME, or the hub refuses.
    """
    _check_name(repo_id)
    card = read_card(folder)
    contents = {name: _read(folder / name) for name in (CARD_FILE, WEIGHTS_FILE)}
    contents[README] = hub_page(card, repo_id).encode()
    plan = PushPlan(repo_id, {name: len(content) for name, content in contents.items()})
    if not dry_run:
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()]
        _upload(api or HfApi(), repo_id, private, operations, card)
    return plan


def _upload(api: Any, repo_id: str, private: bool, operations: list[CommitOperationAdd], card: RetrieverCard) -> None:
    try:
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.create_commit(
            repo_id, operations=operations, commit_message=f"Page retriever {card.name}", repo_type="model"
        )
    except Exception as error:  # the hub client has a dozen classes for "no network", "no account" and "not yours"
        reason = " ".join(str(error).split())
        raise UserError(
            f"The hub didn't take {repo_id} ({reason}). Log in with `hf auth login`, or try --dry-run."
        ) from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path.parent} holds no complete retriever: {path.name} is missing. Export it again.")
    return path.read_bytes()


def _check_name(repo_id: str) -> None:
    namespace, _, name = repo_id.partition("/")
    if not namespace or not name or "/" in name or " " in repo_id:
        raise UserError(f"{repo_id!r} is no repository of the hub. Give NAMESPACE/NAME, such as me/my-retriever.")


def hub_page(card: RetrieverCard, repo_id: str) -> str:
    """The repository's README: what the retriever is for, how it is used, and its whole card."""
    backbone = str(card.backbone.get("name") or card.backbone.get("model_type") or "see the card below")
    rank = f"rank {card.rank}" if card.rank else "full rank"
    head = {"library_name": "retrolm", "tags": ["retrolm", "page-retriever", "long-context"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {card.name}", "", f"A RetroLM page retriever: {rank}, pages of {card.page_size} tokens."]
    lines += [f"Backbone: {backbone}. It is refused on any other.", ""]
    lines += ["```bash", f"hf download {repo_id} --local-dir my-retriever"]
    lines += ["retrolm ask book.txt 'A question?' --model BACKBONE --retriever my-retriever", "```", ""]
    details = json.dumps({"backbone": card.backbone, **card.details}, indent=2, ensure_ascii=False)
    return "\n".join([*lines, "What it was trained on, and how well it did:", "", "```json", details, "```", ""])
