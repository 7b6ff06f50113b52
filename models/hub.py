"""A local folder for whatever names a checkpoint: a path, or a Hugging Face hub id."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from models.errors import ModelError

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?")


def split_revision(source: str) -> tuple[str, str | None]:
    """(what stands before it, the revision or None) of a hub id "org/name[@revision]"; a revision may hold slashes ("refs/pr/1")."""
    name, _, revision = source.partition("@")
    return name, revision or None


def resolve(source: str | os.PathLike, patterns: Sequence[str]) -> Path:
    """The folder at `source`, or the downloaded snapshot of hub id `source` ("org/name", optionally "@revision").

    Only files matching `patterns` are downloaded. Raises ModelError when there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{source}: is a file; give the folder that holds config.json, or a hub id")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ModelError(f"{source}: no such folder")
    import huggingface_hub

    name, revision = split_revision(source)
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # many kinds: not found, gated, offline, no route, a full disk
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        kind = type(error).__name__
        raise ModelError(f"{source}: no such folder, and not to be had from the hub ({kind}: {reason})") from error
