"""Uploads to the Hugging Face hub: only where the user asks twice."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from distill.models.pretrained import INSTALL


def check(repo: str | None, dry_run: bool) -> None:
    """Raise ValueError naming `push_to_hub` or `dry_run`."""
    if repo is None and not dry_run:
        raise ValueError("dry_run: found false without push_to_hub; expected push_to_hub=OWNER/NAME")
    if repo is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"push_to_hub: found {repo!r}, expected OWNER/NAME")


def push(folder: Path, repo: str, dry_run: bool) -> list[str]:
    """Upload a folder to a model repository, which is made if it is missing. Returns what was, or would be, uploaded."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    named = [f"  {path.relative_to(folder).as_posix()} ({path.stat().st_size} bytes)" for path in files]
    if dry_run:
        return [
            f"would upload {len(files)} files, {size} bytes, to {repo} (dry_run=false uploads them):",
            *named,
        ]
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(f"push_to_hub: needs the package huggingface_hub: {INSTALL}") from error
    api = hub.HfApi()
    api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(folder))
    return [f"uploaded {len(files)} files, {size} bytes, to {repo}:", *named]
