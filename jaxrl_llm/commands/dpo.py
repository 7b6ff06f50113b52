"""`jaxrl-llm dpo`: trains a policy on preferences (pairs, or single labelled completions); writes it as a Hugging Face folder."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrl_llm.commands._policy import FOLDER, OWNS, load_policy, of_step, save_policy, stopping_at, summary_of
from jaxrl_llm.commands.grpo import parse_evals
from jaxrl_llm.data.chats import answer_end
from jaxrl_llm.data.prompts import tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.sources import Rows, parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh

if TYPE_CHECKING:
    from jaxrl_llm.train.dpo import Preferences

PAIR, SINGLE = ("chosen", "rejected"), ("completion",)  # columns of completions
OVERFLOWS = ("drop", "truncate", "error")
LABELS = {"true": True, "1": True, "false": False, "0": False}


def run(config: Any, workdir: str) -> None:
    """Reads, trains and exports; see configs/dpo.py for the fields.

    Raises:
      UserError: no model or data named, a row without what the loss needs, no row short enough; and what reading and training raise.
    """
    import models
    from jaxrl_llm.train.checks import check_choice, check_dpo, check_dtype
    from jaxrl_llm.train.config import DPOConfig, from_mapping
    from jaxrl_llm.train.dpo import train_dpo

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no data: name a file or data set with --config.data.source=...")
    check_dtype(config.dtype)
    check_choice("overflow", config.overflow, OVERFLOWS)
    settings = from_mapping(DPOConfig, config.train)
    check_dpo(settings)
    names = SINGLE if settings.loss.kind == "kto" else PAIR
    rows = _read(config, config.data.source, config.data.limit, names)
    sets = {name: _read(config, source, config.eval_limit, names) for name, source in parse_evals(config.evals).items()}
    run_dir = RunDir(workdir, config, kind="dpo", owns=OWNS)
    mesh = parse_mesh(config.mesh)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which take longer to come
    cfg, params = load_policy(config, mesh, settings.lora, run_dir if settings.lora.rank else None)
    data = encode(rows, tokenizer, cfg.eos_token_ids, config, names)
    held_out = {name: encode(rows, tokenizer, cfg.eos_token_ids, config, names) for name, rows in sets.items()}
    if count := config.data.held_out:
        if not 0 < count < len(data) or "held_out" in held_out:
            raise UserError(f"data.held_out is {count} of {len(data)} rows: leave rows to train on, and name no set of evals 'held_out'")
        data, held_out["held_out"] = data.take(np.arange(len(data) - count)), data.take(np.arange(len(data) - count, len(data)))
    schedule = ShuffledSchedule(len(data), min(config.batch_rows, len(data)), config.seed)
    cfg = stopping_at(cfg, tokenizer, answer_end(tokenizer, cfg.eos_token_ids, config.template))
    start = [params]
    del params  # handed over: training has its own copy
    trained, history = train_dpo(cfg, start.pop, data, schedule, settings, run_dir, held_out, mesh=mesh)
    save_policy(run_dir, cfg, trained, settings.lora, config.model, mesh)
    summary = summary_of(history, "dpo", settings.steps, len(data), settings.keep_best, ("accuracy", "margin", "loss"))
    run_dir.summary(summary)
    if run_dir.is_writer:
        print(f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f}")
        for name, found in summary["evals"].items():
            accuracy, margin = ("{first:.3f} -> {last:.3f}".format(**found[key]) for key in ("accuracy", "margin"))
            print(f"{name}: accuracy {accuracy}, margin {margin} of {found['n']}")
        print(f"policy: {run_dir.path / FOLDER}{of_step(summary)}   report: jaxrl-llm report --workdir={run_dir.path}")


def _read(config: Any, source: str, limit: int | None, names: Sequence[str]) -> Rows:
    """Rows with a text "prompt" and texts under `names`, and for single completions a bool "label"."""
    data = config.data
    source, _, split = source.rpartition("@") if "@" in source else (source, "", data.split)
    required = names if names == PAIR else (*names, "label")
    rows = read_rows(source, parse_fields(data.fields), split=split, limit=limit, required=tuple(required), on_bad=data.on_bad)
    for row in rows:
        where = rows.places[row["id"]]
        _open_chats(row, names, where)
        if not (isinstance(row.get("prompt"), str) and row["prompt"].strip()):
            raise UserError(f"{where}: no text in field 'prompt': give it with a field map such as prompt=COLUMN, or chats under '{names[0]}'")
        if names == SINGLE:
            label = row["label"]
            row["label"] = label if isinstance(label, bool) else LABELS.get(str(label).strip().lower())
            if row["label"] is None:
                raise UserError(f"{where}: field 'label' is {label!r}: give true for a desirable completion, false for another")
    return rows


def _open_chats(row: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Where completions are chats (lists of messages with role and content), makes each the text of its last message, and the messages
    before that, which all must share, the prompt. A chat of one message leaves the row's own prompt."""
    heads = []
    for name in names:
        chat = row[name]
        if isinstance(chat, list):
            if not chat or not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in chat):
                raise UserError(f"{where}: field '{name}' is a list, but not of messages with role and content")
            *head, last = chat
            heads.append([{"role": m["role"], "content": m["content"]} for m in head])
            row[name] = last["content"]
        if not isinstance(row[name], str) or not row[name].strip():
            raise UserError(f"{where}: field '{name}' is {row[name]!r:.40}: give text, or a chat that ends with it")
    if any(head != heads[0] for head in heads):
        raise UserError(f"{where}: the chats under {' and '.join(names)} differ before their last message: they must answer the same")
    if heads and heads[0]:
        row["messages"], row["prompt"] = heads[0], "\n".join(m["content"] for m in heads[0])


def encode(rows: Rows, tokenizer: Any, eos_token_ids: Sequence[int], config: Any, names: Sequence[str]) -> "Preferences":
    """Tokenised preferences: prompts by the template, completions with the separator before and their end (`answer_end`) after them. Prompt and
    completion are tokenised apart, as they will be in generation.

    Raises UserError when a row is too long and overflow is "error", or no row is left.
    """
    from jaxrl_llm.train.dpo import Preferences, with_unrelated

    prompts = tokenise_prompts(rows, tokenizer, max_length=2**30, template=config.template).token_lists()
    end, places, limit = answer_end(tokenizer, eos_token_ids, config.template), getattr(rows, "places", {}), config.max_length
    completions = []
    for name in names:
        ids = tokenizer([config.separator + row[name] for row in rows], add_special_tokens=False)["input_ids"]
        completions.append([tokens + end for tokens in ids])
    kept, dropped = [], 0
    for i, (prompt, *answers) in enumerate(zip(prompts, *completions, strict=True)):
        longest = len(prompt) + max(map(len, answers))
        if longest > limit:
            if config.overflow == "error":
                raise UserError(
                    f"{places.get(rows[i]['id'], '')}: row '{rows[i]['id']}' has {longest} tokens, over max_length={limit}: raise it, or set overflow"
                )
            # A prompt that fills the whole row leaves nothing to learn from.
            if config.overflow == "drop" or len(prompt) >= limit:
                dropped += 1
                continue
        kept.append((i, prompt, tuple(tokens[: limit - len(prompt)] for tokens in answers)))
    if not kept:
        raise UserError(f"no row is left: all {dropped} are longer than max_length={limit} tokens")
    if dropped:
        print(f"{dropped} of {len(rows)} rows are longer than {limit} tokens and were left out")
    chosen, kept_prompts, kept_answers = (list(column) for column in zip(*kept, strict=True))
    ids = [rows[i]["id"] for i in chosen]
    if names == SINGLE:
        labels = np.array([rows[i]["label"] for i in chosen], bool)
        return Preferences(kept_prompts, with_unrelated(kept_prompts, [own for (own,) in kept_answers], limit), ids, labels)
    if equal := sum(one == other for one, other in kept_answers):
        print(f"{equal} of {len(rows)} pairs have the same text as chosen and as rejected")
    return Preferences(kept_prompts, kept_answers, ids)
