"""What a config file says of itself: its docstring, and its fields with their values and the comments that stand beside them."""

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxrl_llm.config import config_path, field_names, import_config, load_config, tables


def about(spec: str) -> str:
    """The docstring of a config file; "" where it has none. A command that goes over several lines in the file does so here."""
    text = import_config(config_path(spec)[0]).__doc__ or ""
    # A backslash at the end of a line of a string is gone with its line break; the indentation of the next line is what is left of it.
    return re.sub(r"(?<=\S) {4,}(?=--)", r" \\\n        ", text.strip())


def describe(spec: str) -> str:
    """The variants of a config file, and each field as `--config.key=value  comment`; a table of like groups takes one line."""
    path, _ = config_path(spec)
    config = load_config(spec)
    variants = getattr(import_config(path), "VARIANTS", None)
    lines = [f"variants of {path.name}: {', '.join(variants)}"] if variants else []
    lines.append(f"fields of {spec}:")
    for key, comment in field_comments(path, config).items():
        value: Any = _value(config, key)
        if isinstance(value, ConfigDict):
            field = f"  --config.{key}.{{{','.join(value)}}}.{{{','.join(next(iter(value.values())))}}}"
        else:
            field = f"  --config.{key}={_shown(value)}"
        lines.append(f"{field:<52}  {comment}".rstrip() if len(field) <= 52 or not comment else f"{field}\n{'':<54}{comment}")
    return "\n".join(lines)


_ASSIGNED = re.compile(r"""^\s*["']?([\w.]+)["']?\s*[=:](?!=).*?(?:\s#\s*(.*))?$""")


def field_comments(path: Path, config: ConfigDict) -> dict[str, str]:
    """Dotted key -> the comment at the end of its line in the file, or the comment lines right above it, or its group's.

    In the order of the file; fields that it does not spell out come last. A table (see `tables`) stands for its entries.
    """
    written: list[tuple[str, str]] = []
    above: list[str] = []
    for line in path.read_text().splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.strip().lstrip("# "))
            continue
        match = _ASSIGNED.match(line)
        if match:
            written.append((match.group(1), match.group(2) or " ".join(above)))
        above = []
    names = [name for name, _ in written]
    places: dict[str, int] = {}
    inside = tables(config)
    fields = [key for key in field_names(config) if not any(key.startswith(table + ".") for table in inside)]
    for key in [*fields, *inside]:
        place = _place(key, names, set(places.values()))
        places[key] = len(written) if place is None else place

    def comment(key: str) -> str:
        place = places.get(key, _place(key, names, set()))
        own = written[place][1] if place is not None and place < len(written) else ""
        group = key.rpartition(".")[0]
        return own or (comment(group) if group else "")

    return {key: comment(key) for key in sorted(places, key=lambda key: places[key])}


def _place(key: str, written: list[str], used: set[int]) -> int | None:
    """The line that spells the most of a dotted key ("config.data.source" more than "source"), an unused one first."""
    best: tuple[int, bool, int] | None = None
    for i, name in enumerate(written):
        parts, wanted = name.split("."), key.split(".")
        shared = 0
        while shared < min(len(parts), len(wanted)) and parts[-1 - shared] == wanted[-1 - shared]:
            shared += 1
        # Beside the variable that holds the config, all that is written must be of the key.
        if shared and len(parts) - shared <= 1:
            rank = (shared, i not in used, -i)
            best = rank if best is None or rank > best else best
    return None if best is None else -best[2]


def _value(config: ConfigDict, key: str) -> object:
    for part in key.split("."):
        config = config.get(part)
    return config


def _shown(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(repr(entry)[1:-1] if isinstance(entry, str) else str(entry) for entry in value)
    return str(value)
