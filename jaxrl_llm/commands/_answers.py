"""Whose responses `jaxrl-llm eval` judges: a policy of ours, a server's model, or none where the responses are read from a file.

Every response goes to samples.jsonl as it comes, so a run that was stopped goes on with what is missing. A prompt that gets no response (it is
longer than the model reads, or the server refuses it) is written down with the reason, never as an empty response.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxrl_llm.commands._policy import load_policy
from jaxrl_llm.data.prompts import tokenise_prompts
from jaxrl_llm.data.sources import Rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir

INF = float("inf")
CHOICES = {"policy.dtype": ("float32", "bfloat16", "float16"), "policy.overflow": ("error", "drop", "truncate")}
RANGES: dict[str, tuple[float, float]] = dict.fromkeys(
    ("policy.max_new_tokens", "policy.max_prompt_tokens", "policy.batch_prompts", "policy.workers"), (1, INF)
)
RANGES |= {"policy.temperature": (0, INF), "policy.timeout": (0.001, INF), "policy.seed": (0, INF)}
CACHE = "answers.sqlite"  # what a server has answered
CHUNK = 64  # prompts a server is asked before they are written down
HOPELESS = (400, 413, 422)  # a server's refusal of one prompt, such as one that is too long for it


def check_policy(policy: Any, elsewhere: str) -> None:
    """Raises UserError unless exactly one answers. elsewhere: what else responses could come from, for the message."""
    if bool(policy.model) == bool(policy.url):
        told = "both policy.model and policy.url are given: leave one out" if policy.model else "nobody answers"
        raise UserError(f"{told}; give --config.policy.model=FOLDER_OR_HUB_ID, --config.policy.url=http://... or {elsewhere}")
    if policy.url and not policy.name:
        raise UserError("policy.url without policy.name: name the model that the server is to use")
    if policy.adapter and policy.url:
        raise UserError("policy.adapter is of a model of ours: leave it out, or give policy.model in place of policy.url")


def named(policy: Any) -> str:
    """How the one who answers is called in reports."""
    return f"{policy.name} at {policy.url}" if policy.url else " + ".join(filter(None, (policy.model, policy.adapter)))


def answers(policy: Any, rows: Sequence[Mapping[str, Any]], run_dir: RunDir) -> dict[str, dict[str, Any]]:
    """{row id: {"id", "response" (None where there is none), "reason"}} of the rows that are settled; the others are asked again by the next start.

    rows: each with "id", "prompt" and, of chats, "messages". Raises UserError and ModelError: a prompt that is too long (as `overflow` says), what
    loading and tokenising raise, a server that answers nothing at all, and RewardStopped of one that is gone.
    """
    known = _settled(run_dir)
    done = [row["id"] in known for row in rows]
    if not policy.url:  # all processes must sample the same batches
        from jaxrl_llm.curation.processes import from_first

        done = from_first(done)
    left = Rows()
    left.places = getattr(rows, "places", {})  # messages name a row by them
    left += [row for row, there in zip(rows, done, strict=True) if not there]
    why = ""
    if left and (not policy.url or run_dir.is_writer):
        if policy.url:
            why = _of_server(policy, left, run_dir)
        else:
            _of_model(policy, left, run_dir)
        known = _settled(run_dir)
    missing = sum(row["id"] not in known for row in rows)
    if why and missing == len(rows):
        raise UserError(f"{policy.url} answered none of {missing} prompts ({why}): see that it is up; the same command asks again")
    if missing:
        print(f"{missing} prompts have no response yet: the server did not answer; the same command asks it again", file=sys.stderr)
    return known


def _settled(run_dir: RunDir) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in run_dir.samples() if "response" in record}


def _of_model(policy: Any, rows: list[Mapping[str, Any]], run_dir: RunDir) -> None:
    """Samples of a policy of ours, one a row, longest prompts first so that batches hold prompts of like length."""
    import models
    from jaxrl_llm.commands.generate import samples_of
    from jaxrl_llm.config import ConfigDict
    from jaxrl_llm.runtime import parse_mesh

    tokenizer = models.load_tokenizer(policy.model)  # before the weights, which may take minutes
    mesh = parse_mesh(policy.mesh)
    cfg, params = load_policy(policy, mesh)
    room = min(cfg.max_position - policy.max_new_tokens, policy.max_prompt_tokens or cfg.max_position)
    if room < 1:
        told = f"config key 'policy.max_new_tokens' is {policy.max_new_tokens}, the context of {policy.model} {cfg.max_position} tokens"
        raise UserError(f"{told}: leave room for a prompt")
    prompts = tokenise_prompts(rows, tokenizer, max_length=room, template=policy.template, overflow=policy.overflow)
    if prompts.truncated:
        print(f"{prompts.truncated} prompts are longer than {room} tokens and are answered from their end alone", file=sys.stderr)
    fits = set(prompts.ids)
    for row in rows:
        if row["id"] not in fits:
            run_dir.sample({"id": row["id"], "response": None, "reason": f"the prompt is longer than {room} tokens"})
    how = {"max_new_tokens": policy.max_new_tokens, "temperature": policy.temperature, "seed": policy.seed}
    settings = ConfigDict({**how, "num_samples": 1, "top_k": 0, "top_p": 1.0, "stop_strings": ()})
    order = np.argsort(-prompts.lengths_N, kind="stable")
    batches = [order[start : start + policy.batch_prompts] for start in range(0, len(order), policy.batch_prompts)]
    for batch in tqdm(batches, desc="responses", unit="batch", disable=None, mininterval=0.5):
        for record in samples_of(models, cfg, params, tokenizer, prompts.take(batch), settings, mesh, {}):
            told = {"id": record["id"], "response": record["completion"], "reason": "", "tokens": record["tokens"], "finish": record["finish"]}
            run_dir.sample(told)


def _of_server(policy: Any, rows: list[Mapping[str, Any]], run_dir: RunDir) -> str:
    """Answers of a server; a cut-off answer is one, for so is a model's that runs into its limit. Returns why the last that has none has none."""
    from jaxrl_llm.rewards.chat import ChatClient, ChatConfig, Fault, Request

    client = ChatClient(ChatConfig(
        policy.url, policy.name, policy.key_variable, timeout=policy.timeout, workers=policy.workers, max_tokens=policy.max_new_tokens,
        temperature=policy.temperature, cache=str(run_dir.path / CACHE),
    ))  # fmt: skip
    parameters, why = {"seed": policy.seed} if policy.temperature else {}, ""
    try:
        chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        for chunk in tqdm(chunks, desc="responses", unit=f"{CHUNK} prompts", disable=None, mininterval=0.5):
            chats = [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in chunk]
            found = client.ask_all([Request(chat, parameters, partial=True) for chat in chats])
            for row, answer in zip(chunk, found, strict=True):
                if answer.fault is None:
                    whole = answer.text.encode("utf-8", "replace").decode()  # servers may send halves of surrogate pairs
                    run_dir.sample({"id": row["id"], "response": whole, "reason": ""})
                elif answer.fault is Fault.REFUSED and answer.status in HOPELESS:
                    run_dir.sample({"id": row["id"], "response": None, "reason": f"refused: {answer.reason}"})
                else:
                    why = answer.reason
    finally:
        client.close()
    return why
