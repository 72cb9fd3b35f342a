"""Uploading a data set to the hub: private, reviewed records alone, and only after a typed confirmation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from srpo_jax.data.formats import REPORT, AnyRecord

PUBLISHABLE = ("accepted", "edited")
CARD = "README.md"
PATTERNS = (CARD, "data.jsonl", "images/*", "*.parquet", "*.array_record-*", "dataset_info.json", "features.json")


class PublishError(ValueError):
    """A data set that must not leave the machine: what is missing and what to do."""


class Hub(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def repo_exists(self, repo_id: str, *, repo_type: str) -> bool: ...
    def repo_info(self, repo_id: str, *, repo_type: str) -> Any: ...
    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> Any: ...
    def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: str, allow_patterns: list[str]) -> Any: ...


def check_reviewed(records: Iterable[AnyRecord]) -> int:
    """How many records there are, all of them accepted or edited by a reviewer.

    Raises:
      PublishError: the others, by id and status.
    """
    count, refused = 0, []
    for record in records:
        count += 1
        review = record.meta.get("review")
        status = review.get("status") if isinstance(review, dict) else None
        if status not in PUBLISHABLE:
            refused.append(f"{record.id} ({status or 'not reviewed'})")
    if refused:
        shown = ", ".join(refused[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        raise PublishError(
            f"{len(refused)} of {count} records have no accepted or edited review: {shown}; review them first "
            "(scripts/review.py) and convert what it exports"
        )
    return count


def publish(
    records: Iterable[AnyRecord], folder: str | Path, repo: str, hub: Hub, ask: Callable[[str], str] = input
) -> int:
    """Uploads a converted data set to a private repository of the hub.

    Args:
      records: those of the folder; each must have been accepted or edited in review.
      folder: written by `formats.convert`, with a data card, `README.md`.
      repo: "owner/name". One that exists must be private.
      hub: a `huggingface_hub.HfApi`.
      ask: shows a text and returns what the user types; anything but the repository's name ends it.

    Returns:
      The number of records uploaded.

    Raises:
      PublishError: unreviewed records, no data card, an unfinished conversion, a public repository, or no confirmation.
    """
    folder = Path(folder)
    if not (folder / REPORT).is_file():
        raise PublishError(f"{folder} holds no finished conversion ({REPORT}); run scripts/convert_data.py to its end")
    if not (folder / CARD).is_file():
        raise PublishError(
            f"{folder} has no data card: write {CARD} (intended and prohibited use, access, removal; docs/data.md)"
        )
    count = check_reviewed(records)
    expected = json.loads((folder / REPORT).read_text(encoding="utf-8"))["records"]
    if count != expected:
        raise PublishError(f"{folder} holds {count} records, its {REPORT} says {expected}; convert it again")
    _check_private(hub, repo)
    typed = ask(f"{count} records of {folder} go to the private data set {repo}. Type its name to upload them: ")
    if typed.strip() != repo:
        raise PublishError("not confirmed; nothing was uploaded")
    hub.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
    _check_private(hub, repo)  # somebody may have made it meanwhile
    hub.upload_folder(repo_id=repo, repo_type="dataset", folder_path=str(folder), allow_patterns=list(PATTERNS))
    return count


def _check_private(hub: Hub, repo: str) -> None:
    if hub.repo_exists(repo, repo_type="dataset") and not hub.repo_info(repo, repo_type="dataset").private:
        raise PublishError(f"{repo} is public; make it private or name another")
