"""Reading and writing dictionaries: our own layout and those of other libraries.

A layout is a row of `LAYOUTS`, one file each: how it is told, and how it is read into the canonical parameters of the architecture table; norms
and scales that a format keeps apart are folded in.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.hub import split_revision
from sae.architectures import ARCHITECTURES
from sae.config import DTYPES, choice
from sae.dictionary import Dictionary, check_params
from sae.errors import SAEError
from sae.formats.common import Layout, from_transformer_lens, to_transformer_lens
from sae.formats.gemma_scope import GEMMA_SCOPE
from sae.formats.llama_scope import LLAMA_SCOPE, LLAMASCOPIUM
from sae.formats.native import NATIVE
from sae.formats.opensae import OPENSAE
from sae.formats.saelens import SAELENS
from sae.formats.sparsify import SPARSIFY
from sae.formats.torch_files import DICTIONARY_LEARNING, OPENAI, QWEN_SCOPE

__all__ = ["LAYOUTS", "WRITABLE", "from_transformer_lens", "load", "locate", "save", "to_transformer_lens"]

LAYOUTS: dict[str, Layout] = {  # the first whose files are there is taken
    "native": NATIVE,
    "sparsify": SPARSIFY,
    "saelens": SAELENS,
    "gemma_scope": GEMMA_SCOPE,
    "llama_scope": LLAMA_SCOPE,
    "llamascopium": LLAMASCOPIUM,
    "opensae": OPENSAE,
    "dictionary_learning": DICTIONARY_LEARNING,
    "qwen_scope": QWEN_SCOPE,
    "openai": OPENAI,
}
WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.write is not None)


def load(folder_or_hub_id: str | os.PathLike, dtype: str | None = None) -> Dictionary:
    """The dictionary in a local folder or file, or on the Hugging Face hub as "owner/repository[/folder/or/file/in/it][@revision]".

    The layout is told by the files present (see LAYOUTS). dtype: of the parameters, "float32", "bfloat16" or "float16" (default: what the
    files say). Tensors are memory-mapped and cast as they are read, so they are never in memory twice.
    Raises SAEError naming the file and what is wrong in it.
    """
    if dtype is not None:
        choice("dtype", dtype, DTYPES)
    place = locate(folder_or_hub_id)
    for layout in LAYOUTS.values():
        if layout.found(place):
            return layout.read(place, dtype)
    there = sorted(p.name for p in place.iterdir())[:12] if place.is_dir() else [place.name]
    known = "; ".join(f"{name}: {layout.holds}" for name, layout in LAYOUTS.items())
    raise SAEError(f"{place}: no dictionary in a known layout; it holds {', '.join(there) or 'nothing'}. Known layouts are {known}")


def locate(folder_or_hub_id: str | os.PathLike) -> Path:
    """A local folder or file, downloaded first if the name is a hub id; where the hub does not answer, what was downloaded before.

    A name that begins with a folder that is here is a path that was misspelt; with a revision it is a hub id all the same.
    """
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if folder.exists():
        return folder
    bare, revision = split_revision(name)
    parts = bare.split("/")
    if len(parts) < 2 or name.startswith((".", "/", "~")) or not all(re.fullmatch(r"[\w.\-]+", p) for p in (*parts, *(revision or "-").split("/"))):
        raise SAEError(f"{name}: no such folder, and not a hub id (owner/repository[/folder][@revision]){nearest_path(folder)}")
    if revision is None and Path(parts[0]).is_dir():
        way_out = f"for a repository of the hub whose owner has the name of {parts[0]}/ here add @main"
        raise SAEError(f"{name}: no such folder{nearest_path(folder)}; {way_out}")
    from huggingface_hub import list_repo_files, snapshot_download  # slow to import, and needed here only

    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        wanted = hub_files(list_repo_files(repository, revision=revision), inside, bare)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted)) / inside
    except SAEError:
        raise
    except Exception as error:  # the hub client raises many kinds: network, authentication, absence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        try:
            snapshot = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except Exception:
            raise SAEError(f"{name}: no such folder here, none downloaded before, and the hub answered: {reason}") from None
    there = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    hub_files(there, inside, f"{bare}, as downloaded before (the hub answered: {reason})")
    return snapshot / inside


def nearest_path(path: Path) -> str:
    """"; did you mean ...?" of the first part of a path that is not there, where its folder holds something of a like name; else ""."""
    for part in (*reversed(path.parents), path):
        if not part.exists():
            there: list[str] = []
            with contextlib.suppress(OSError):  # no folder, or one that may not be read
                there = os.listdir(part.parent)
            near = difflib.get_close_matches(part.name, there, n=1)
            return f"; did you mean {part.with_name(near[0])}?" if near else ""
    return ""


def hub_files(there: list[str], inside: str, name: str) -> list[str]:
    """Which of a repository's files a dictionary at `inside` (a folder or a file; "": the top) needs: those of the layouts, in that folder alone.

    Raises SAEError where there are none, naming folders that hold some, and where a folder holds several dictionaries in files of their own.
    """
    if inside in there:
        beside = f"{inside.rpartition('/')[0]}/config.json".lstrip("/")
        return [inside] + [beside] * (beside in there)
    before = f"{inside}/" if inside else ""
    own = {file.removeprefix(before): file for file in there if file.startswith(before)}
    patterns = sorted({pattern for layout in LAYOUTS.values() for pattern in layout.hub_files})

    def fits(file: str) -> bool:  # a pattern's * stands for no slash here
        return any(file.count("/") == pattern.count("/") and fnmatch.fnmatchcase(file, pattern) for pattern in patterns)

    wanted = sorted(file for short, file in own.items() if fits(short))
    torch_files = [file for file in wanted if file.endswith(".pt") and file.rpartition("/")[2] != "ae.pt"]
    if len(torch_files) > 1:
        raise SAEError(f"{name}: holds {len(torch_files)} dictionaries, {', '.join(torch_files[:4])}...: name one, such as {name}/{torch_files[0]}")
    if not wanted:
        others = sorted({file.rpartition("/")[0] for file in there if fits(file.rpartition("/")[2])} - {""})
        hint = f"; folders with some: {', '.join(others[:5])}" if others else ""
        raise SAEError(f"{name}: the repository has no files of a dictionary there{hint}")
    return wanted


def save(folder: str | os.PathLike, d: Dictionary, layout: str = "native") -> None:
    """Writes the dictionary to `folder` (made if absent), each file whole or not at all; files of the other layouts there go.

    layout: one of WRITABLE. Raises SAEError for a dictionary that the layout has no form for, or still being trained ("batchtopk"), and for a NaN
    or an infinity, also of an input scale that is folded in for the layout: what lay in the folder stays then.
    """
    if layout not in WRITABLE:
        raise SAEError(f"sae.save: cannot write layout {layout!r}; known: {', '.join(WRITABLE)}")
    folder, row = Path(folder), LAYOUTS[layout]
    if layout != "native" and ARCHITECTURES[d.cfg.architecture].finish is not None:
        raise SAEError(f"sae.save: a {d.cfg.architecture} SAE is one in training; what train_sae returns can be saved as {layout}")
    assert row.write is not None
    files = row.write(d)
    for name, contents in files.items():
        if not name.endswith(".json"):
            check_params(contents, d.cfg.dtype, f"{folder / name} is not written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():  # the config last: it is what a folder is told by
            partial = folder / (name + ".partial")
            if name.endswith(".json"):
                partial.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
            else:
                _save_tensors(contents, partial)
            os.replace(partial, folder / name)
        for name in _files_of_others(files):  # else `load` would not know which of two dictionaries is meant
            (folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise SAEError(f"{folder}: cannot be written ({error})") from None


def _save_tensors(tensors: dict[str, Any], path: Path) -> None:
    save_file({name: np.ascontiguousarray(np.asarray(value)) for name, value in tensors.items()}, path)


def _files_of_others(files: dict[str, Any]) -> set[str]:
    written = {name for key in WRITABLE for name in LAYOUTS[key].hub_files}
    return written - files.keys()
