"""The policy that a verb starts from, and what one that trains leaves in its workdir: a Hugging Face folder, and its adapter if it has one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, fingerprint
from jaxrl_llm.train.config import LoraSettings

FOLDER = "policy"  # the whole model, an adapter merged into it
ADAPTER = "adapter"  # of a run with lora.rank above 0, as PEFT lays it out
OWNS = (FOLDER, ADAPTER)


def load_policy(config: Any, mesh: Any = None, lora: LoraSettings | None = None, needed_by: RunDir | None = None) -> tuple[Any, Any]:
    """(model config, parameters) of `config.model` with the PEFT folder `config.adapter`, if one is named, merged into it. lora: of a training
    run; where it trains an adapter, the one of the folder stays an adapter, to be trained on. needed_by: a run whose checkpoints do not hold
    all that is loaded here, and which goes on from the same numbers only (`RunDir.same_start`).

    Raises UserError where the adapter to be trained on is of another rank, scale or other matrices than `lora` says, or the numbers are others;
    ModelError for a model or an adapter that cannot be loaded.
    """
    import jax

    import models
    from jaxrl_llm.checkpoint import checksums
    from models.adapted import merged
    from models.lora import adapt, load_lora, lora_axes, lora_targets
    from models.sharding import param_shardings, place, shardings_of

    cfg, params = models.load(config.model, dtype=config.dtype, mesh=mesh)
    adapter, found = load_lora(config.adapter, cfg) if config.adapter else ({}, None)
    if needed_by is not None:  # before they are merged, which may round otherwise on another mesh
        needed_by.same_start(fingerprint([checksums(params), checksums(adapter)]))
    if found is None:
        return cfg, params
    trained = lora.adapter if lora is not None else None
    if trained is not None:
        given, known = ((one.rank, one.scale, sorted(lora_targets(cfg, one))) for one in (trained, found))
        if given != known:
            told = f"rank={found.rank}, alpha={found.alpha:g}, rank_stabilised={found.rank_stabilised}, targets={','.join(known[2])}"
            raise UserError(f"train.lora does not fit the adapter in {config.adapter}: set train.lora's {told}, or rank=0 to merge and train all")
    if mesh is not None:
        adapter = jax.tree.map(lambda x, where: place(np.asarray(x), where), adapter, shardings_of(adapter, lora_axes(cfg, found), mesh))
    params = adapt(params, adapter, found.scale)
    if trained is not None:
        return cfg, params
    params = merged(params)
    return cfg, params if mesh is None else jax.device_put(params, param_shardings(cfg, mesh))


def save_policy(run_dir: RunDir, cfg: Any, trained: Any, lora: LoraSettings, start: str, mesh: Any) -> None:
    """Writes FOLDER and, of parameters with an adapter, ADAPTER. start: folder or hub id of the model that training started from."""
    import models
    from models.lora import adapter_of, save_lora
    from models.sharding import fetch

    models.save(run_dir.path / FOLDER, cfg, trained, tokenizer_from=start)
    if lora.adapter is None:
        return
    adapter = fetch(adapter_of(trained), mesh)
    if run_dir.is_writer:
        save_lora(run_dir.path / ADAPTER, cfg, adapter, lora.adapter, start)


def stopping_at(cfg: Any, tokenizer: Any, end: Sequence[int]) -> Any:
    """The model's config with the last token of `end`, which it is taught to end its answers with, among the tokens that it stops at. A base
    model often does not know the end that its chat template writes, and would write on for ever after it."""
    if not end or end[-1] in cfg.eos_token_ids:
        return cfg
    token = tokenizer.convert_ids_to_tokens(end[-1])
    print(f"the chat template ends an answer with {token}, where this model does not stop: the model that is written does")
    return dataclasses.replace(cfg, eos_token_ids=(*cfg.eos_token_ids, end[-1]))


def summary_of(
    history: Sequence[Mapping[str, Any]], kind: str, steps: int, rows: int, keep_best: str, figures: Sequence[str]
) -> dict[str, Any]:
    """What a run on fixed data comes to: its loss, and of each held-out set the first and the last of `figures`. kind: of its training records."""
    train, evals = ([r for r in history if r["kind"] == wanted] for wanted in (kind, "eval"))
    found: dict[str, Any] = {"steps": steps, "rows": rows, "loss_first": train[0]["loss"], "loss_last": train[-1]["loss"], "evals": {}}
    for name in dict.fromkeys(r["set"] for r in evals):
        of_set = [r for r in evals if r["set"] == name]
        ends = {key: {"first": of_set[0][key], "last": of_set[-1][key]} for key in figures}
        found["evals"][name] = {"n": of_set[-1]["n"], **ends}
        if name == keep_best:
            best = min((r for r in of_set if r["step"] > 0), key=lambda r: r["loss"])
            found["best"] = {"set": name, "step": best["step"], "loss": best["loss"]}
    return found


def of_step(summary: dict[str, Any]) -> str:
    """Of which step the policy is, where it is not the last one's: what stands behind its path."""
    best = summary.get("best")
    return f" (of step {best['step']}, the best on {best['set']})" if best else ""
