"""`jaxrl-llm sft`: supervised fine-tuning on responses or on whole texts; writes the model as a Hugging Face folder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.commands._policy import FOLDER, OWNS, load_policy, of_step, save_policy, stopping_at, summary_of
from jaxrl_llm.commands.grpo import parse_evals
from jaxrl_llm.data.chats import answer_end, assistant_tokens
from jaxrl_llm.data.prompts import pack_rows, pad_rows, tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.sources import Rows, parse_fields, read_rows
from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.run_dir import RunDir, fingerprint
from jaxrl_llm.runtime import parse_mesh


def run(config: Any, workdir: str) -> None:
    """Reads, trains and exports; see configs/sft.py for the fields.

    Raises:
      UserError: no model or data named, a missing response, no row short enough, a row past the model's context; and what reading and training raise.
    """
    import models
    from jaxrl_llm.train.checks import check_dtype, check_sft
    from jaxrl_llm.train.config import SFTConfig, from_mapping
    from jaxrl_llm.train.sft import train_sft

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not config.data.source:
        raise UserError("no data: name a file or data set with --config.data.source=...")
    for name, known in (("loss_on", ("response", "assistant", "text")), ("overflow", ("drop", "truncate", "error"))):
        if config[name] not in known:
            raise UserError(f"config key '{name}' is '{config[name]}': {nearest(config[name], known)}")
    check_dtype(config.dtype)
    settings = from_mapping(SFTConfig, config.train)
    check_sft(settings)
    rows = _read(config, config.data.source, config.data.limit)
    sets = {name: _read(config, source, config.eval_limit) for name, source in parse_evals(config.evals).items()}
    run_dir = RunDir(workdir, config, kind="sft", owns=OWNS)
    mesh = parse_mesh(config.mesh)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which take longer to come
    cfg, params = load_policy(config, mesh, settings.lora, run_dir if settings.lora.rank else None)
    tokens_NT, mask_NT = encode(rows, tokenizer, cfg.eos_token_ids, config)
    held_out = {name: encode(each, tokenizer, cfg.eos_token_ids, config) for name, each in sets.items()}
    longest = max(tokens.shape[1] for tokens in (tokens_NT, *(tokens for tokens, _ in held_out.values())))
    if longest > cfg.max_position:
        raise UserError(f"the longest row has {longest} tokens, the model's context is {cfg.max_position}: lower max_length to that")
    if count := config.data.held_out:
        if not 0 < count < len(tokens_NT) or "held_out" in held_out:
            raise UserError(f"data.held_out is {count} of {len(tokens_NT)} rows: leave rows to train on, and name no set of evals 'held_out'")
        held_out["held_out"] = tokens_NT[-count:], mask_NT[-count:]
        tokens_NT, mask_NT = tokens_NT[:-count], mask_NT[:-count]
    run_dir.same_rows({"training rows": fingerprint([tokens_NT, mask_NT]), **{name: fingerprint(rows) for name, rows in held_out.items()}})
    schedule = ShuffledSchedule(len(tokens_NT), min(config.batch_rows, len(tokens_NT)), config.seed)
    batches = batches_of(tokens_NT, mask_NT, schedule, config.max_length if config.pack else None)
    template = {"response": config.template, "assistant": "chat", "text": "none"}[config.loss_on]
    cfg = stopping_at(cfg, tokenizer, answer_end(tokenizer, cfg.eos_token_ids, template))
    start = [params]
    del params  # handed over: training has its own copy
    trained, history = train_sft(cfg, start.pop, batches, settings, run_dir, held_out, mesh=mesh)
    save_policy(run_dir, cfg, trained, settings.lora, config.model, mesh)
    summary = summary_of(history, "sft", settings.steps, len(tokens_NT), settings.keep_best, ("loss",))
    run_dir.summary(summary)
    if run_dir.is_writer:
        print(f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} nats a token")
        for name, found in summary["evals"].items():
            print("{name}: loss {first:.4f} -> {last:.4f} nats a token of {n} rows".format(name=name, n=found["n"], **found["loss"]))
        print(f"model: {run_dir.path / FOLDER}{of_step(summary)}   report: jaxrl-llm report --workdir={run_dir.path}")


def _read(config: Any, source: str, limit: int | None) -> Rows:
    data = config.data
    source, _, split = source.rpartition("@") if "@" in source else (source, "", data.split)
    required = ("prompt", config.response_field) if config.loss_on == "response" else ("prompt",)
    return read_rows(
        source,
        parse_fields(data.fields),
        split=split,
        limit=limit,
        required=required,
        on_bad=data.on_bad,
        separator=data.separator,
    )


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: Any, eos_token_ids: tuple[int, ...], config: Any) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [N, T] int32 right-padded, mask [N, T] bool on the tokens that are trained on), by `loss_on`:

    "response": prompt + separator + response + its end (`answer_end`), the mask on the response and its end; prompt and response are tokenised
    apart, as they will be in generation. "text": the prompt and an end token, the mask on all. "assistant": chats under "messages" as the
    tokenizer's chat template writes them, the mask on every turn of the assistant.

    Raises UserError when a row is too long and overflow is "error", a chat has no such turn, or no row is left.
    """
    encoded = _chats(rows, tokenizer) if config.loss_on == "assistant" else _texts(rows, tokenizer, eos_token_ids, config)
    kept, dropped = [], 0
    for row, (tokens, counts) in zip(rows, encoded, strict=True):
        if len(tokens) > config.max_length:
            if config.overflow == "error":
                raise UserError(f"row '{row['id']}' has {len(tokens)} tokens, over max_length={config.max_length}: raise it, or set overflow")
            # A row whose counted tokens are all cut off leaves nothing to learn from.
            if config.overflow == "drop" or not np.any(counts[: config.max_length]):
                dropped += 1
                continue
        kept.append((tokens[: config.max_length], counts[: config.max_length]))
    if not kept:
        raise UserError(f"no row is left: all {dropped} are longer than max_length={config.max_length} tokens")
    if dropped:
        print(f"{dropped} of {len(rows)} rows are longer than {config.max_length} tokens and were left out")
    return pad_rows(kept)


def _texts(rows, tokenizer, eos_token_ids, config) -> Iterator[tuple[list[int], np.ndarray]]:
    prompts = tokenise_prompts(rows, tokenizer, max_length=2**30, template=config.template).token_lists()
    end = answer_end(tokenizer, eos_token_ids, config.template if config.loss_on == "response" else "none")
    responses = [end] * len(rows)
    if config.loss_on == "response":
        texts = [config.separator + str(row[config.response_field]) for row in rows]
        responses = [ids + end for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for prompt, response in zip(prompts, responses, strict=True):
        tokens = prompt + response
        yield tokens, np.arange(len(tokens)) >= (0 if config.loss_on == "text" else len(prompt))


def _chats(rows, tokenizer) -> Iterator[tuple[list[int], np.ndarray]]:
    places = getattr(rows, "places", {})
    for row in rows:
        where = f"{places.get(row['id'], 'row')}: '{row['id']}'"
        if not row.get("messages"):
            raise UserError(f"{where} is no chat: loss_on=assistant reads a list of messages; name its column with data.fields prompt=COLUMN")
        yield assistant_tokens(row["messages"], tokenizer, where)


def batches_of(tokens_NT: np.ndarray, mask_NT: np.ndarray, schedule: ShuffledSchedule, pack: int | None = None) -> Iterator[tuple[np.ndarray, ...]]:
    """Shuffled epochs without end. Each batch is cut to a few widths, or packed into a few numbers of rows of `pack` tokens, so that short
    rows cost little and programs are shared."""
    from jaxrl_llm.train.sft import reach
    from models.decode import bucket

    reach_N = reach(mask_NT)
    step = 0
    while True:
        chosen = schedule.batch(step)
        if pack is None:
            width = min(bucket(int(reach_N[chosen].max()), 32), tokens_NT.shape[1])
            yield tokens_NT[chosen, :width], mask_NT[chosen, :width]
        else:
            packed = pack_rows([(tokens_NT[i, : reach_N[i]], mask_NT[i, : reach_N[i]]) for i in chosen], pack)
            empty = ((0, bucket(len(packed[0])) - len(packed[0])), (0, 0))
            yield tuple(np.pad(part, empty, constant_values=fill) for part, fill in zip(packed, (0, False, -1), strict=True))
        step += 1
