"""Configurations: load a `configs/*.py` file and variant, apply overrides, lock, write down, compare.

A config file has `get_config(variant: str | None = None) -> ConfigDict`, and `VARIANTS`, the names it knows, when it has any.
"""

import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxrl_llm.errors import UserError, nearest

# Where a config path is looked for after the current folder: beside the package, so that an installed copy finds its own.
PACKAGE_ROOT = Path(__file__).resolve().parent.parent

# Fields, by their own name in whatever group, that say how to run, not what: two runs that differ only here are the same run. The policy is the
# same whatever they are, up to rounding. (Not so the steps between evaluations: `keep_best` chooses among these.)
HOW = (
    "overwrite", "allow_changes",
    "mesh", "rollout_mesh", "attention", "remat", "remat_keep", "logprob_chunk",
    "micro_batch_rows", "length_buckets", "samples_together", "shared_prefix", "rollout_rows", "rollout_refill", "eval_batch", "forward_rows",
    "checkpoint_every", "keep_checkpoints", "watchdog_seconds", "log_every", "sample_every", "samples_per_log", "zero_spread_warning",
    "workers", "timeout", "shown",
)  # fmt: skip
# This loss is not a sum over rows but a product of means over a micro-batch, whose rows these fields choose.
_ROUTER_BALANCE, _CHOOSE_MICRO_BATCHES = "train.router_balance", ("mesh", "micro_batch_rows")

# What other libraries call a field of ours; docs/training.md says what a number means there.
_ALSO_CALLED = {
    "batch_size": ("batch_rows", "batch_prompts", "prompts_per_step"), "total_batch_size": ("batch_rows", "batch_prompts"),
    "epochs": ("steps",), "num_epochs": ("steps",), "num_train_epochs": ("steps",), "max_steps": ("steps",), "max_training_steps": ("steps",),
    "num_generations": ("num_samples",), "num_return_sequences": ("num_samples",), "num_iterations": ("inner_epochs",),
    "max_tokens": ("max_new_tokens",), "max_completion_length": ("max_new_tokens",), "max_tokens_to_generate": ("max_new_tokens",),
    "max_prompt_length": ("max_prompt_tokens",), "gradient_accumulation_steps": ("micro_batch_rows",),
    "per_device_train_batch_size": ("micro_batch_rows",), "train_micro_batch_size": ("micro_batch_rows",),
    "epsilon": ("clip_low",), "epsilon_high": ("clip_high",), "beta": ("kl_coef",), "loss_type": ("aggregation", "kind"),
    "scale_rewards": ("advantage_scale",), "importance_sampling_level": ("ratio",), "simpo_gamma": ("gamma",), "lam": ("gae_lambda",),
    "vf_coef": ("value_coef",), "cliprange_value": ("value_clip",), "clip_range_value": ("value_clip",),
    "precompute_ref_batch_size": ("forward_rows",), "max_grad_norm": ("clip_norm",), "clip_grad": ("clip_norm",),
    "lr_scheduler_type": ("schedule",), "warmup_ratio": ("warmup_steps",),
    "adam_beta1": ("b1",), "adam_beta2": ("b2",), "adam_epsilon": ("eps",),
    "gradient_checkpointing": ("remat",), "attn_implementation": ("attention",), "packing": ("pack",),
    "assistant_only_loss": ("loss_on",), "completion_only_loss": ("loss_on",), "router_aux_loss_coef": ("router_balance",),
    "logging_steps": ("log_every",), "eval_steps": ("eval_every",), "evaluation_steps": ("eval_every",), "eval_every_n_steps": ("eval_every",),
    "save_steps": ("checkpoint_every",), "save_total_limit": ("keep_checkpoints",), "metric_for_best_model": ("keep_best",),
    "load_best_model_at_end": ("keep_best",), "dataset": ("source",), "dataset_name": ("source",), "path": ("source", "model"),
    "checkpoint": ("model",), "model_name_or_path": ("model",), "output_dir": ("workdir",), "save_directory": ("workdir",),
    "lora_r": ("rank",), "lora_alpha": ("alpha",), "lora_target_modules": ("targets",), "use_rslora": ("rank_stabilised",),
}  # fmt: skip


def load_config(spec: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """The locked config of "configs/x.py:variant" with overrides applied.

    Args:
      spec: path of a config file, found from the current folder or else beside the package, and an optional ":variant".
      overrides: dotted key -> value. A string is read by the type of the field it replaces ("None" empties a field); other
        values must have that type.

    Raises:
      UserError: no such file, variant or key (the nearest known one is named), a value that does not fit its field, or a file that is
        no Python that runs (its line is named).
    """
    path, variant = config_path(spec)
    module = import_config(path)
    known = getattr(module, "VARIANTS", None)
    if variant is not None and known is not None and variant not in known:
        raise UserError(f"unknown variant '{variant}' of {path.name}: {nearest(variant, known)}")
    with _mistakes_in(path):
        config = module.get_config(variant)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned {type(config).__name__}, not an ml_collections ConfigDict")
    for key, value in (overrides or {}).items():
        set_field(config, key, value)
    return config.lock()


def set_field(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a dotted key of a config in place; a string value is read by the type of the field.

    Raises:
      UserError: unknown key (the nearest is named), or a value that does not fit.
    """
    *parents, name = key.split(".")
    node: Any = config
    for part in parents:
        node = node[part] if isinstance(node, ConfigDict) and part in node else None
    if not isinstance(node, ConfigDict) or name not in node:
        raise UserError(f"unknown config key '{key}': {_nearest_key(key, config)}")
    if isinstance(node.get(name), ConfigDict):
        inside = ", ".join(f"{key}.{entry}" for entry in list(node[name])[:6])
        raise UserError(f"config key '{key}' is a group of fields, set one of them: {inside}")
    field_type = node.get_type(name)
    if value is True and field_type not in (bool, type(None)):
        raise UserError(f"config key '{key}' is {_type_name(field_type)} and needs a value: --config.{key}=...")
    new = _parse(value, field_type, node.get(name), key) if isinstance(value, str) else value
    try:
        with node.unlocked():
            if field_type is type(None):
                with node.ignore_type():
                    node[name] = new
            else:
                node[name] = new
    except (TypeError, ValueError) as error:
        raise UserError(f"config key '{key}' is {_type_name(field_type)}, got {value!r}") from error


def _nearest_key(key: str, config: ConfigDict) -> str:
    """The end of the message on an unknown dotted key: the fields whose own name is most like it, or goes by it elsewhere ("lr"); where
    none is like it, those of the group that it names."""
    fields, (group, _, name) = field_names(config), key.rpartition(".")
    if "workdir" in (name, *_ALSO_CALLED.get(name, ())):
        return "the run's folder is given by --workdir=..."

    def likeness(field: str) -> tuple[float, float]:
        own = field.rpartition(".")[2]
        # "lr" are the initials of learning_rate.
        same = own in _ALSO_CALLED.get(name, ()) or name == "".join(word[0] for word in own.split("_") if "_" in own)
        match = 1.0 if same else difflib.SequenceMatcher(None, name, own).ratio()
        return match, difflib.SequenceMatcher(None, key, field).ratio()

    best = max(fields, key=likeness, default=None)
    if best is not None and likeness(best)[0] >= 0.6:
        return f"did you mean {best}?"
    inside = [field for field in fields if field.startswith(f"{group}.")] if group else []
    groups = dict.fromkeys(field.partition(".")[0] + (".*" if "." in field else "") for field in fields)
    return f"known: {', '.join(inside or groups)}" if fields else "there are none"


def check_fields(
    config: Any, choices: Mapping[str, Sequence[Any]] | None = None, ranges: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """What can be known to be wrong before any work, by dotted key.

    choices: the values that a field, or every entry of a list field, may have. ranges: (least, greatest) of a number, both allowed. A field
    that is None has no value to check.

    Raises:
      UserError: naming the first such field, its value and what it may be.
    """
    for key, known in (choices or {}).items():
        value = _at(config, key)
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if entry is not None and entry not in known:
                raise UserError(f"config key '{key}' is {value!r}: no {entry!r}; {nearest(str(entry), [str(k) for k in known])}")
    for key, (least, greatest) in (ranges or {}).items():
        value = _at(config, key)
        if value is not None and not least <= value <= greatest:
            upper = "or more" if greatest == float("inf") else f"to {greatest:g}"
            raise UserError(f"config key '{key}' is {value}: give {least:g} {upper}")


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every dotted key of a config, in its order."""
    names: list[str] = []
    for name in config:
        value = config.get(name)
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def flat_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; an empty group is a value."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        fields |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return fields


def to_dict(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A config as plain JSON values: tuples become lists, paths strings."""
    return json.loads(to_json(config))


def to_json(config: Mapping[str, Any] | ConfigDict) -> str:
    """A config as readable JSON."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.dumps(plain, indent=2, default=str)


def config_hash(config: Mapping[str, Any] | ConfigDict) -> str:
    """16 hex digits that two configs share exactly when they describe the same run."""
    fields = flat_fields(to_dict(config))
    described = {key: value for key, value in fields.items() if says_what(key, fields)}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, wherever two plain configs differ, those of `HOW` too."""
    a, b = flat_fields(one), flat_fields(other)
    values = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in [*a, *(key for key in b if key not in a)]}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1]}


def says_what(key: str, *configs: Mapping[str, Any]) -> bool:
    """Whether a field counts when two plain configs are compared; see `HOW`."""
    name = key.rpartition(".")[2]
    if name in _CHOOSE_MICRO_BATCHES and any(flat_fields(config).get(_ROUTER_BALANCE) for config in configs):
        return True
    return name not in HOW


def is_named(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key, or a group that it is in, is among names."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def resolve_path(path: str | Path) -> Path:
    """A path as given where it exists from the current folder, else beside the installed package, else as given."""
    given = Path(path).expanduser()
    beside = PACKAGE_ROOT / given
    return beside if not given.exists() and not given.is_absolute() and beside.exists() else given


def config_path(spec: str) -> tuple[Path, str | None]:
    """The file and the variant of "configs/x.py:variant"; raises UserError where there is no such file."""
    name, colon, variant = spec.partition(".py:")
    name = name + ".py" if colon else spec
    path = resolve_path(name)
    if path.suffix != ".py" or not path.is_file():
        known = [f"configs/{found.name}" for found in sorted((PACKAGE_ROOT / "configs").glob("[!_]*.py"))]
        raise UserError(f"no config file '{name}': {nearest(name, known)}")
    return path, variant or None


def import_config(path: Path) -> Any:
    """The module of a config file; raises UserError where it cannot run (its line is named) or has no get_config."""
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _mistakes_in(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(variant=None): it is not a config file")
    return module


@contextlib.contextmanager
def _mistakes_in(path: Path) -> Iterator[None]:
    """Says of whatever is raised inside in which line of the config file it arose: it is a user's own program."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A file that is no Python has no frame of its own, and is named by the error.
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        reason = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        raise UserError(f"{where}: the config file stops with {type(error).__name__}: {reason}") from error


def check_shape(config: ConfigDict, spec: str, like_spec: str) -> None:
    """Refuses a config file of another shape than the one that the verb reads: a misspelt field would be passed over, a missing one a crash.

    Args:
      config: of the file `spec`.
      like_spec: the verb's own config file. A table of it (see `tables`) may have other rows, and a group in its `OPEN` more fields, which
        are checked where they are read.

    Raises:
      UserError: naming the first field that one has and the other has not, and the nearest.
    """
    name = f"configs/{Path(like_spec).name}"
    like, free = load_config(like_spec), getattr(import_config(config_path(like_spec)[0]), "OPEN", ())
    inside = [*tables(config, least=1), *tables(like, least=1)]
    given, known = ([key for key in field_names(one) if not any(key.startswith(table + ".") for table in inside)] for one in (config, like))
    unknown, missing = ([key for key in one if key not in other] for one, other in ((given, known), (known, given)))
    unknown = [key for key in unknown if key.partition(".")[0] not in free]
    if unknown:
        raise UserError(f"{spec} has a field '{unknown[0]}' that {name} has not: {nearest(unknown[0], missing or known)}")
    if missing:
        raise UserError(f"{spec} has no field '{missing[0]}', which {name} has: start from that file's get_config()")


def tables(config: ConfigDict, prefix: str = "", least: int = 2) -> list[str]:
    """The dotted keys of groups that hold nothing but groups with the same fields, `least` of them or more: rows of a table."""
    found = []
    for name in config:
        group = config.get(name)
        if not isinstance(group, ConfigDict):
            continue
        rows = list(group.values())
        if len(rows) >= least and all(isinstance(row, ConfigDict) and set(row) == set(rows[0]) for row in rows):
            found.append(prefix + name)
        else:
            found += tables(group, f"{prefix}{name}.", least)
    return found


def _parse(text: str, field_type: type, current: Any, key: str) -> Any:
    if text in ("None", "null"):
        if current is None or field_type is type(None):
            return None
        way_out = f"; to empty it write --config.{key}=" if field_type in (str, tuple, list) else ""
        raise UserError(f"config key '{key}' is {_type_name(field_type)} and cannot be None{way_out}")
    try:
        if field_type is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if field_type is int:
            number = float(text) if any(letter in text for letter in ".eE") else int(text)
            if number != int(number):
                raise ValueError(text)
            return int(number)
        if field_type is float:
            return float(text)
        if field_type in (tuple, list):
            return field_type(_parse_sequence(text, current))
        return _literal(text) if field_type is type(None) else text
    except (KeyError, ValueError, SyntaxError, OverflowError) as error:
        raise UserError(f"config key '{key}' is {_type_name(field_type)}, cannot read '{text}' as that") from error


def _parse_sequence(text: str, current: Any) -> list[Any]:
    """Entries between commas; those in quotes may hold commas, spaces and escapes such as \\n, as in Python."""
    if (not current or isinstance(current[0], str)) and any(quote in text for quote in "'\""):
        with contextlib.suppress(ValueError, SyntaxError):
            return list(ast.literal_eval(f"[{text.strip().strip('()[]')}]"))
    entries = [entry.strip() for entry in text.strip().strip("()[]").split(",")]
    entries = [entry.strip("'\"") for entry in entries if entry]
    if current:
        kind = type(current[0])
        return [_parse(entry, kind, None, "an entry") for entry in entries]
    return [_literal(entry) for entry in entries]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _type_name(field_type: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list such as 1,2,3"}
    return names.get(field_type, field_type.__name__)
