"""Uploads to the Hub with `huggingface_hub`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from .card import CARD_NAME


def push(save: Callable[[Path, str], None], repo_id: str, **options: Any) -> CommitInfo:
    """Uploads the files that `save` writes to a model repository of the Hub, which is created if needed.

    Args:
        save: writes the files, given a folder, which contains only the repository's card if there is one, and the
            repository's full id.
        repo_id: such as `me/my-adapter`.
        options: `token`; `private`, for a new repository; `revision`, a branch, created if needed; all others are
            passed to `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The commit info of `huggingface_hub`.
    """
    api = HfApi(token=options.pop("token", None))
    revision = options.get("revision")
    repo_id = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            there = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision))
            (folder / CARD_NAME).write_bytes(there.read_bytes())
        except RemoteEntryNotFoundError:
            pass  # the repository has no card
        save(folder, repo_id)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
