"""`jaxrl-llm generate`: samples from a model, printed or written to a run directory."""

import sys
import zlib
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrl_llm.commands._policy import load_policy
from jaxrl_llm.commands._steer import check_steer, edits_of
from jaxrl_llm.config import check_fields
from jaxrl_llm.data.prompts import PromptBatch, tokenise_prompts
from jaxrl_llm.data.sources import Rows, parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh

FINISH = ("length", "stop token", "stop string")
INF = float("inf")
CHOICES = {"overflow": ("error", "drop", "truncate"), "data.on_bad": ("error", "skip"), "dtype": ("float32", "bfloat16", "float16")}
CHOICES |= {"steer.where": ("all", "prompt", "generated")}
RANGES = dict.fromkeys(("max_prompt_tokens", "num_samples", "max_new_tokens", "batch_prompts", "data.limit"), (1, INF))
RANGES |= {"temperature": (0, INF), "top_k": (0, INF), "top_p": (1e-9, 1), "steer.start": (0, INF)}


def run(config: Any, workdir: str | None = None) -> None:
    """Samples every prompt of the config; see configs/generate.py for the fields.

    Raises:
      UserError: no model or no prompt named, a field out of its range, a prompt that with max_new_tokens does not fit the model's context
        (as `overflow` says); and what reading, tokenising and loading raise.
    """
    import models
    from jaxrl_llm.curation.processes import from_first, is_writer

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    check_fields(config, CHOICES, RANGES)
    check_steer(config.steer)
    rows = _rows(config)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which may take minutes
    run_dir = RunDir(workdir, config, kind="generate") if workdir else None
    mesh = parse_mesh(config.mesh)
    cfg, params = load_policy(config, mesh)
    edits = edits_of(config.steer, cfg, config.model)
    if skipped := sum(rows.skipped.values()):
        print(f"bad rows left out: {skipped}", file=sys.stderr)
    room = cfg.max_position - config.max_new_tokens
    if room < 1:
        told = f"config key 'max_new_tokens' is {config.max_new_tokens}, the context of {config.model} {cfg.max_position} tokens"
        raise UserError(f"{told}: leave room for a prompt")
    room = min(room, config.max_prompt_tokens)
    prompts = tokenise_prompts(rows, tokenizer, max_length=room, template=config.template, overflow=config.overflow)
    if prompts.dropped or prompts.truncated:
        print(f"prompts longer than {room} tokens: {prompts.dropped} left out, {prompts.truncated} shortened", file=sys.stderr)
    written = {(sample["id"], sample["sample"]) for sample in run_dir.samples()} if run_dir and is_writer() else set()
    # A stop may fall inside a batch. It is then sampled again, whole, since its noise belongs to it, and what is missing is written. All
    # processes must sample the same batches, so what the first one finds written goes.
    whole = from_first([all((name, k) in written for k in range(config.num_samples)) for name in prompts.ids])
    batches = [range(start, min(start + config.batch_prompts, len(prompts))) for start in range(0, len(prompts), config.batch_prompts)]
    left = [batch for batch in batches if not np.all(whole[list(batch)])]
    for batch in tqdm(left, desc="generate", unit="batch", disable=None if run_dir else True, mininterval=0.5):
        for record in samples_of(models, cfg, params, tokenizer, prompts.take(batch), config, mesh, edits):
            if (record["id"], record["sample"]) in written:
                continue
            if run_dir:
                run_dir.sample(record)
            elif is_writer():
                _show(record)
    if run_dir and is_writer():
        counts = {"prompts": len(prompts), "samples": len(prompts) * config.num_samples}
        counts |= {"skipped": skipped, "dropped": prompts.dropped, "truncated": prompts.truncated}
        run_dir.summary(counts)
        print(f"{counts['samples']} samples of {counts['prompts']} prompts in {run_dir.path / 'samples.jsonl'}")


def _rows(config: Any) -> Rows:
    if config.prompt and config.data.source:
        raise UserError("both --config.prompt and --config.data.source are given: leave one out")
    if config.prompt:
        rows = Rows()
        rows.append({"id": "prompt", "prompt": config.prompt})
        return rows
    if not config.data.source:
        raise UserError("no prompt: give --config.prompt=TEXT or --config.data.source=FILE")
    data = config.data
    return read_rows(data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad)


def samples_of(
    models: Any, cfg: Any, params: Any, tokenizer: Any, batch: PromptBatch, config: Any, mesh: Any, edits: Any
) -> list[dict[str, Any]]:
    """One record a completion, the completions of a prompt together."""
    rollout = models.generate(
        cfg,
        params,
        batch.token_lists(),
        max_new_tokens=config.max_new_tokens,
        num_samples=config.num_samples,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_strings=tuple(map(str, config.stop_strings)),
        tokenizer=tokenizer,
        seed=_batch_seed(config.seed, batch.ids),
        mesh=mesh,
        interventions=edits,
    )
    prompts = batch.token_lists()
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    # Decoded with its prompt, since some tokenizers drop the space that a text begins with.
    pairs = zip(rollout.group_ids_N, rollout.completions(), strict=True)
    whole = tokenizer.batch_decode([prompts[group] + completion for group, completion in pairs], skip_special_tokens=True)
    return [
        {
            "id": batch.ids[group],
            "sample": i % config.num_samples,
            "prompt": batch.rows[group]["prompt"],
            "completion": whole[i][len(before[group]) :],
            "tokens": int(rollout.completion_lengths_N[i]),
            "logp": float(rollout.logps_NT[i].sum()),
            "finish": FINISH[rollout.finish_reason_N[i]],
        }
        for i, group in enumerate(rollout.group_ids_N)
    ]


def _batch_seed(seed: int, ids: list[str]) -> int:
    """A seed for a batch that does not repeat the noise of another batch, and is the same when a stopped run goes on."""
    return (seed + zlib.crc32("\n".join(ids).encode())) % 2**31


def _show(record: dict[str, Any]) -> None:
    ending = f"[{record['tokens']} tokens, {record['finish']}, log-probability {record['logp']:.2f}]"
    print(f"=== {record['id']}, sample {record['sample'] + 1} {ending}\n{record['prompt']}{record['completion']}\n")
