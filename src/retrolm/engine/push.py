"""`push`: a page retriever or an adapter onto the Hugging Face hub, with a page that says what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import UserError
from ..retriever import CARD_FILE, WEIGHTS_FILE, RetrieverCard, read_card
from . import adapter as adapters
from .adapter import AdapterCard, describe_adapter

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
    return _push(contents, repo_id, f"Page retriever {card.name}", private, None if dry_run else api or HfApi())


def push_adapter(
    folder: Path, repo_id: str, *, private: bool = False, dry_run: bool = False, api: Any = None
) -> PushPlan:
    """Upload the adapter in `folder`, as `push_retriever` does; raises `UserError` as that does."""
    _check_name(repo_id)
    name = describe_adapter(folder)["name"]
    files = (adapters.CONFIG_FILE, adapters.CARD_FILE, adapters.WEIGHTS_FILE, adapters.SMALL_WEIGHTS_FILE)
    contents = {file: (folder / file).read_bytes() for file in files if (folder / file).is_file()}
    contents[README] = adapter_page(adapters.read_card(folder), repo_id).encode()
    return _push(contents, repo_id, f"Adapter {name}", private, None if dry_run else api or HfApi())


def _push(contents: dict[str, bytes], repo_id: str, message: str, private: bool, api: Any) -> PushPlan:
    """Upload files in one commit; without an API only say what would be."""
    plan = PushPlan(repo_id, {name: len(content) for name, content in contents.items()})
    if api is not None:
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()]
        _upload(api, repo_id, private, operations, message)
    return plan


def _upload(api: Any, repo_id: str, private: bool, operations: list[CommitOperationAdd], message: str) -> None:
    try:
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.create_commit(repo_id, operations=operations, commit_message=message, repo_type="model")
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
    rank = f"rank {card.rank}" if card.rank else "full rank"
    what = f"A RetroLM page retriever: {rank}, pages of {card.page_size} tokens."
    return _page(card, what, "retriever", "page-retriever", repo_id)


def adapter_page(card: AdapterCard, repo_id: str) -> str:
    """The same for an adapter."""
    what = "A LoRA adapter for RetroLM (stage 2): its backbone learned to work with the pages it gets."
    return _page(card, what, "adapter", "lora", repo_id)


def _page(card: RetrieverCard | AdapterCard, what: str, kind: str, tag: str, repo_id: str) -> str:
    backbone = str(card.backbone.get("name") or card.backbone.get("model_type") or "see the card below")
    head = {"library_name": "retrolm", "tags": ["retrolm", tag, "long-context"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# {card.name}", "", what, f"Backbone: {backbone}. It is refused on any other.", ""]
    lines += ["```bash", f"hf download {repo_id} --local-dir my-{kind}"]
    lines += [f"retrolm ask book.txt 'A question?' --model BACKBONE --{kind} my-{kind}", "```", ""]
    details = json.dumps({"backbone": card.backbone, **card.details}, indent=2, ensure_ascii=False)
    return "\n".join([*lines, "What it was trained on, and how well it did:", "", "```json", details, "```", ""])
