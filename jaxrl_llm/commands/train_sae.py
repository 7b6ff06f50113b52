"""`jaxrl-llm train_sae`: a dictionary for one tap of a model, from text or prompt rows, with its metrics on held-out rows."""

import json
from math import inf
from pathlib import Path
from typing import Any

from jaxrl_llm.config import check_fields
from jaxrl_llm.data.prompts import fill_template
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh

FOLDER = "sae"  # of the dictionary, inside the workdir


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
    from sae.architectures import ARCHITECTURES

    run_dir = RunDir(workdir, config, kind="train_sae", owns=(FOLDER,))
    folder = run_dir.path / FOLDER
    finished = run_dir.path / "summary.json"
    if from_first(run_dir.resumed and finished.exists()):
        if run_dir.is_writer:
            _report(folder, json.loads(finished.read_text()))
        return
    run_dir.truncate_after(0)  # a run that goes on is given its earlier records again
    mesh = parse_mesh(config.mesh)
    token_rows = _token_rows(texts, models.load_tokenizer(config.model))  # before the weights, which take longer to come
    model_cfg, params = models.load(config.model, dtype=config.dtype, mesh=mesh)
    held_out = min(config.data.eval_rows, max(1, len(token_rows) // 5))
    train_rows, eval_rows = token_rows[:-held_out], token_rows[-held_out:]
    hook = config.hook or f"blocks.{model_cfg.n_layers // 2}.resid_post"
    harvest = config.harvest

    def activations(rows: list[list[int]]) -> Any:
        return sae.harvest_activations(
            model_cfg, params, rows, hook, harvest.batch_rows, harvest.context_size, skip_bos=harvest.skip_bos, mesh=mesh
        )

    width, kind = next(iter(activations(eval_rows))).shape[1], ARCHITECTURES[config.sae.architecture]
    cfg = sae.SAEConfig(
        architecture=config.sae.architecture,
        d_in=width,
        d_sae=config.sae.d_sae or config.sae.expansion * width,
        k=config.sae.k if kind.needs_k else None,
        normalize_activations=config.sae.normalize_activations,
        apply_b_dec_to_input=config.sae.apply_b_dec_to_input,
        hook_name=hook,
        model_name=config.model,
        context_size=harvest.context_size,
        dtype=config.sae.dtype,
    )
    buffer = sae.ActivationBuffer(lambda: activations(train_rows), config.batch_size, harvest.buffer_rows, config.seed)
    settings = sae.SAETrainConfig(**config.train)
    with until_done(run_dir.checkpoints) as checkpoints:
        dictionary, _ = sae.train_sae(
            cfg, buffer, settings, jax.random.key(config.seed), mesh=mesh, on_log=lambda record: run_dir.log({"kind": "train", **record}),
            checkpoints=checkpoints, checkpoint_every=config.checkpoint_every,
        )  # fmt: skip
        dictionary = on_this_process(dictionary, mesh)
        metrics = sae.evaluate(dictionary, activations(eval_rows), lm=(model_cfg, params, eval_rows))
        summary = {"hook": hook, "d_in": cfg.d_in, "d_sae": cfg.d_sae, "train_rows": len(train_rows), "eval_rows": held_out, **metrics}
        if run_dir.is_writer:
            sae.save(folder, dictionary, layout=config.sae.layout)
            run_dir.summary(summary)
            _report(folder, summary)


def check(config: Any) -> None:
    """Raises UserError or SAEError for a config that could not be run to its end, before anything is read."""
    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no text: name a file or data set with --config.data.source=...")
    import sae
    from sae.architectures import ARCHITECTURES
    from sae.config import DTYPES, NORMALISATIONS
    from sae.formats import LAYOUTS

    choices = {
        "dtype": ("float32", "bfloat16"),
        "data.on_bad": ("error", "skip"),
        "sae.architecture": tuple(ARCHITECTURES),
        "sae.normalize_activations": NORMALISATIONS,
        "sae.dtype": DTYPES,
        "sae.layout": tuple(LAYOUTS),
    }
    ones = ("data.limit", "data.eval_rows", "harvest.batch_rows", "sae.expansion", "sae.k", "batch_size")
    zeros = ("sae.d_sae", "checkpoint_every", "seed")
    ranges = {
        **dict.fromkeys(ones, (1, inf)),
        **dict.fromkeys(zeros, (0, inf)),
        "harvest.context_size": (2, inf),  # of one token nothing is predicted
        "harvest.buffer_rows": (2 * config.batch_size, inf),
    }
    check_fields(config, choices, ranges)
    sae.SAETrainConfig(**config.train)  # checks its own fields
    if ARCHITECTURES[config.sae.architecture].penalty is not None and not config.train.sparsity_coefficient:
        kind = config.sae.architecture
        raise UserError(f"config key 'train.sparsity_coefficient' is 0, and nothing else makes a {kind!r} dictionary sparse: give a positive weight")


def _texts(data: Any) -> list[str]:
    rows = read_rows(
        data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad, separator=data.separator
    )
    if len(rows) < 2:
        raise UserError(f"{data.source} holds one row: give at least two, since the last ones are kept for the metrics")
    return [row["prompt"] if data.template == "none" else fill_template(data.template, row) for row in rows]


def _token_rows(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, opened by BOS where the tokenizer has one: what the model saw when it was trained."""
    bos = tokenizer.bos_token_id
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows]


def _report(folder: Path, summary: dict[str, Any]) -> None:
    names = ("l0", "explained_variance", "ce_recovered", "dead_share")
    figures = ", ".join(f"{name} {summary[name]:.3f}" for name in names)
    print(f"{folder}: {summary['d_sae']} latents on {summary['hook']}; {figures}")
