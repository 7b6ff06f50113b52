"""`jaxrl-llm train_sae`: dictionaries for one or more taps of a model, from text or prompt rows, with its metrics on held-out rows."""

import copy
import itertools
import json
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from jaxrl_llm.config import check_fields, is_named, set_field
from jaxrl_llm.data.prompts import fill_template
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.data.texts import special_tokens
from jaxrl_llm.data.texts import token_rows as texts_to_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, fingerprint
from jaxrl_llm.runtime import parse_mesh

FOLDER = "sae"  # of the dictionary, inside the workdir
# What all dictionaries of a run share, and a list of numbers, whose commas would be read as those between values.
NOT_SWEPT = ("sae.hook_out", "sae.skip", "sae.dtype", "sae.layout", "sae.prefixes", "train.steps", "train.log_every")


def run(config: Any, workdir: str) -> None:
    """Harvests, trains, judges and saves; see configs/train_sae.py for the fields.

    Raises:
      UserError: no model or no text named, a setting out of its range, too few rows; and what reading, loading, harvesting and training raise.
    """
    check(config)
    texts = _texts(config.data)

    import jax

    import models
    import sae
    from jaxrl_llm.checkpoint import until_done
    from jaxrl_llm.curation.processes import from_first, on_this_process
    from jaxrl_llm.train.signals import Interrupted, stop_on_signal

    run_dir = RunDir(workdir, config, kind="train_sae", owns=(FOLDER,))
    folder = run_dir.path / FOLDER
    finished = run_dir.path / "summary.json"
    if from_first(run_dir.resumed and finished.exists()):
        _refuse_changes(run_dir, config)
        if run_dir.is_writer:
            _report(folder, json.loads(finished.read_text()))
        return
    run_dir.truncate_after(0)  # a run that goes on is given its earlier records again
    mesh = parse_mesh(config.mesh)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which take longer to come
    token_rows = texts_to_rows(texts, tokenizer)
    run_dir.same_rows({"text": fingerprint(np.asarray(row, np.int32) for row in token_rows)})
    special = special_tokens(tokenizer) if config.harvest.drop_special else []
    model_cfg, params = models.load(config.model, dtype=config.dtype, mesh=mesh)
    held_out = min(config.data.eval_rows, max(1, len(token_rows) // 5))
    train_rows, eval_rows = token_rows[:-held_out], token_rows[-held_out:]
    hooks = _hooks(config) or [f"blocks.{model_cfg.n_layers // 2}.resid_post"]
    taps = (*hooks, config.sae.hook_out) if config.sae.hook_out else tuple(hooks)
    harvest = config.harvest

    def activations(rows: list[list[int]], names: Sequence[str] = taps) -> Any:
        return sae.harvest_activations(
            model_cfg, params, rows, names, harvest.batch_rows, harvest.context_size, skip_first=harvest.skip_first, mesh=mesh, drop_tokens=special
        )

    widths = {name: next(iter(activations(eval_rows[:1], (name,)))).shape[1] for name in taps}
    tasks, column = {}, 0
    for hook in hooks:
        for name, own in combinations(config).items():
            task = sae.SAETask(_description(own, hook, widths), sae.SAETrainConfig(**own.train), column)
            tasks["/".join(filter(None, (hook if len(hooks) > 1 else "", name)))] = task
        column += widths[hook]
    buffer = sae.ActivationBuffer(lambda: activations(train_rows), config.batch_size, harvest.buffer_rows, config.seed)

    def log(record: dict[str, Any]) -> None:
        run_dir.log({"kind": "train", **{name: value for name, value in record.items() if name != "sae" or value}})

    with until_done(run_dir.checkpoints) as checkpoints:
        with stop_on_signal() as request:
            try:
                trained = sae.train_saes(
                    tasks, buffer, jax.random.key(config.seed), mesh=mesh, on_log=log, checkpoints=checkpoints,
                    checkpoint_every=config.checkpoint_every, stop=request.agreed, on_start=run_dir.note_changes,
                    allow_changes=list(config.train),  # the run directory has compared them
                )  # fmt: skip
            except sae.Stopped as stopped:
                message = f"stopped by signal {request.signum} after step {stopped.step}; the same command " + (
                    "goes on from there" if stopped.saved else "starts over: there is no checkpoint before the rows read ahead are used up"
                )
                logging.warning("%s", message)
                raise Interrupted(request.signum, message) from None
        summary: dict[str, Any] = {"train_rows": len(train_rows), "eval_rows": held_out}
        shared: dict[tuple[str, ...], list[Any]] = {}  # what dictionaries of one tap are judged on
        for name, (dictionary, _) in trained.items():
            dictionary, cfg = on_this_process(dictionary, mesh), tasks[name].cfg
            if config.finetune.steps:
                said = {"kind": "finetune", **({"sae": name} if name else {})}
                settings = _finetuning(config, special)
                dictionary, _ = sae.finetune(dictionary, model_cfg, params, train_rows, settings, on_log=lambda r, said=said: run_dir.log(said | r))
                dictionary = sae.cast(dictionary, config.sae.dtype)
            names = tuple(n for n in (cfg.hook_name, cfg.hook_name_out) if n)
            if config.sweep and names not in shared:
                shared = {names: list(activations(eval_rows, names))}
            rows = shared.get(names) or activations(eval_rows, names)
            metrics = sae.evaluate(dictionary, rows, lm=(model_cfg, params, eval_rows), skip_first=harvest.skip_first, drop_tokens=special)
            figures = {"hook": cfg.hook_name, "d_in": cfg.d_in, "d_sae": cfg.d_sae, **metrics}
            if cfg.hook_name_out:
                figures |= {"hook_out": cfg.hook_name_out, "d_out": cfg.d_out}
            summary |= {name: figures} if name else figures
            if run_dir.is_writer:
                sae.save(folder / name, dictionary, layout=config.sae.layout)
        if run_dir.is_writer:
            run_dir.summary(summary)
            _report(folder, summary)


def _refuse_changes(run_dir: RunDir, config: Any) -> None:
    """A run that is over cannot go on with other settings. Raises UserError where one is named by `allow_changes`."""
    named = [key for key in run_dir.changes if is_named(key, config.allow_changes)]
    if named:
        raise UserError(
            f"{run_dir.path} holds a run that is over, and its checkpoints are gone: it cannot go on with another {named[0]}; train in another "
            "--workdir, or set --config.overwrite=True to clear this one"
        )


def _finetuning(config: Any, special: Sequence[int] = ()) -> Any:
    import sae

    own = {"context_size": config.harvest.context_size, "skip_first": config.harvest.skip_first, "seed": config.seed, "drop_tokens": tuple(special)}
    return sae.FinetuneConfig(**config.finetune, **own)


def _hooks(config: Any) -> list[str]:
    return [name.strip() for name in config.hook.split(",") if name.strip()]


def _description(config: Any, hook: str, widths: dict[str, int]) -> Any:
    """The SAEConfig of one tap's dictionary."""
    import sae
    from sae.architectures import ARCHITECTURES

    out, width, kind = config.sae.hook_out, widths[hook], ARCHITECTURES[config.sae.architecture]
    return sae.SAEConfig(
        architecture=config.sae.architecture,
        d_in=width,
        d_sae=config.sae.d_sae or config.sae.expansion * width,
        k=config.sae.k if kind.needs_k else None,
        prefixes=_prefixes(config) if config.sae.architecture == "matryoshka" else (),
        normalize_activations=config.sae.normalize_activations,
        apply_b_dec_to_input=config.sae.apply_b_dec_to_input and not out,
        hook_name=hook,
        model_name=config.model,
        context_size=config.harvest.context_size,
        dtype="float32" if config.finetune.steps else config.sae.dtype,  # what is rounded is not tuned
        **({"d_out": widths[out], "hook_name_out": out, "skip": config.sae.skip} if out else {}),
    )


def combinations(config: Any) -> dict[str, Any]:
    """The dictionaries of one tap: name -> their config, one for each combination of the values of `sweep`; {"": config} without it.

    Raises UserError for an entry that is no FIELD=VALUE,VALUE, a field that cannot be swept, a value named twice, and what `set_field` raises.
    """
    fields: dict[str, list[str]] = {}
    for entry in config.sweep.split():
        field, equals, values = entry.partition("=")
        named = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not named:
            raise UserError(f"config key 'sweep' has {entry!r}: give FIELD=VALUE,VALUE between blanks, such as sae.k=16,32")
        if field.partition(".")[0] not in ("sae", "train") or field in NOT_SWEPT:
            raise UserError(f"config key 'sweep' has {field!r}: fields of sae and train can be swept, but not {', '.join(NOT_SWEPT)}")
        if field in fields or len(set(named)) < len(named):
            raise UserError(f"config key 'sweep' names {(field if field in fields else entry)!r} twice")
        fields[field] = named
    found = {}
    for values in itertools.product(*fields.values()):
        own = copy.deepcopy(config)
        for field, value in zip(fields, values, strict=True):
            set_field(own, field, value)
        told = (value if value[:1].isalpha() else field.rpartition(".")[2] + value for field, value in zip(fields, values, strict=True))
        found["-".join(told)] = own
    return found


def _prefixes(config: Any) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in config.sae.prefixes.split(",") if number.strip())
    except ValueError:
        raise UserError(f"config key 'sae.prefixes' is {config.sae.prefixes!r}: give whole numbers with commas, such as 64,256") from None


def check(config: Any) -> None:
    """Raises UserError or SAEError for a config that could not be run to its end, before anything is read."""
    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no text: name a file or data set with --config.data.source=...")
    import sae
    from sae.architectures import ARCHITECTURES
    from sae.config import DTYPES, NORMALISATIONS
    from sae.formats import WRITABLE

    choices = {
        "dtype": ("float32", "bfloat16"),
        "data.on_bad": ("error", "skip"),
        "sae.architecture": tuple(ARCHITECTURES),
        "sae.normalize_activations": NORMALISATIONS,
        "sae.dtype": DTYPES,
        "sae.layout": WRITABLE,
    }
    ones = ("data.limit", "data.eval_rows", "harvest.batch_rows", "sae.expansion", "sae.k", "batch_size")
    zeros = ("sae.d_sae", "checkpoint_every", "seed")
    ranges = {
        **dict.fromkeys(ones, (1, inf)),
        **dict.fromkeys(zeros, (0, inf)),
        "harvest.context_size": (2, inf),  # of one token nothing is predicted
        "harvest.skip_first": (0, config.harvest.context_size - 1),
        "harvest.buffer_rows": (2 * config.batch_size, inf),
    }
    each = list(combinations(config).values())
    for own in each:
        check_fields(own, choices, ranges)
        sae.SAETrainConfig(**own.train)  # checks its own fields
        if not ARCHITECTURES[own.sae.architecture].needs_k and not own.train.sparsity_coefficient:
            raise UserError(
                f"config key 'train.sparsity_coefficient' is 0, and nothing else makes a {own.sae.architecture!r} dictionary sparse: "
                "give a positive weight"
            )
    _prefixes(config)
    kinds = {own.sae.architecture for own in each}
    others = {"sae.prefixes": ("matryoshka", config.sae.prefixes), "train.target_l0": ("jumprelu", config.train.target_l0)}
    for name, (owner, value) in others.items():
        if value and owner not in kinds:
            this = " and ".join(sorted(map(repr, kinds)))
            raise UserError(f"config key {name!r} is {value!r}, but it is of {owner!r} dictionaries and this one is {this}: leave it out")
    hooks = _hooks(config)
    if len(set(hooks)) < len(hooks):
        raise UserError(f"config key 'hook' names a tap twice: {config.hook}")
    if config.sae.hook_out and len(hooks) != 1:
        raise UserError("config key 'sae.hook_out' makes a transcoder, which reads one tap: name it with --config.hook=...")
    if config.finetune.steps:
        _finetuning(config)  # checks its own fields
    if config.sae.skip and not config.sae.hook_out:
        raise UserError("config key 'sae.skip' is of transcoders: name the tap to reconstruct with --config.sae.hook_out=...")


def _texts(data: Any) -> list[str]:
    rows = read_rows(
        data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad, separator=data.separator
    )
    if len(rows) < 2:
        raise UserError(f"{data.source} holds one row: give at least two, since the last ones are kept for the metrics")
    return [row["prompt"] if data.template == "none" else fill_template(data.template, row) for row in rows]


def _report(folder: Path, summary: dict[str, Any]) -> None:
    names = ("l0", "explained_variance", "ce_recovered", "dead_share")
    for name, figures in ({"": summary} if "hook" in summary else {n: f for n, f in summary.items() if isinstance(f, dict)}).items():
        told = ", ".join(f"{key} {figures[key]:.3f}" for key in names)
        place = " to ".join(figures[key] for key in ("hook", "hook_out") if key in figures)
        print(f"{folder / name}: {figures['d_sae']} latents on {place}; {told}")
