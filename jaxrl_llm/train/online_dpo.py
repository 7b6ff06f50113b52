"""Online DPO: sample several completions of each prompt from the policy as it is, judge them, train on the best against the worst.

Source: Guo et al. 2024, "Direct language model alignment from online AI feedback" (arXiv 2402.04792), with any reward of
`jaxrl_llm.rewards.registry` as the judge. Rollout, evaluation, checkpoints and resume are GRPO's (`train.loop`). Log-probabilities are
summed over the completion, at the sampling temperature; the reference is the policy that training started from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.rewards.verdict import Reward
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.checks import check_online_dpo
from jaxrl_llm.train.config import OnlineDPOConfig, from_mapping
from jaxrl_llm.train.loop import Run, Schedule, train
from jaxrl_llm.train.preference_step import by_length, compiled_sums, compiled_update, preference_batch, preference_spec, to_host
from jaxrl_llm.train.rollout import Experience
from jaxrl_llm.train.state import State
from jaxrl_llm.train.step import batch_shardings
from models.sharding import batch_ways, place


def pick_pairs(rewards_N: np.ndarray, valid_N: np.ndarray, groups_N: np.ndarray) -> tuple[np.ndarray, int]:
    """(int64 [K, 2], tied): the rows of the highest and of the lowest reward among the valid rows of each group; the first such row
    where several have it. Groups are told apart by id, rows may come in any order. Groups whose valid rewards are all equal teach
    nothing and are left out: `tied` counts those with two valid rows or more. A group with fewer has no pair either."""
    pairs, tied = [], 0
    for group in np.unique(groups_N):
        rows = np.flatnonzero(valid_N & (groups_N == group))
        if len(rows) < 2:
            continue
        best, worst = rows[np.argmax(rewards_N[rows])], rows[np.argmin(rewards_N[rows])]
        if rewards_N[best] > rewards_N[worst]:
            pairs.append((best, worst))
        else:
            tied += 1
    return np.array(pairs, np.int64).reshape(-1, 2), tied


def pair_batch(experience: Experience, pairs_K2: np.ndarray, config: OnlineDPOConfig, multiple: int = 1) -> dict[str, np.ndarray]:
    """The update's batch (see `preference_step`): one pair a prompt of the step, padding where a prompt has none, so that every step has
    one shape. With `config.length_buckets` pairs are sorted by length."""
    rollout, prompts = experience.rollout, experience.prompts.token_lists()
    completions, missing = rollout.completions(), len(prompts) - len(pairs_K2)
    if config.length_buckets > 1:
        pairs_K2 = pairs_K2[by_length(rollout.completion_lengths_N[pairs_K2])]
    of_pair = rollout.group_ids_N[pairs_K2[:, 0]]
    batch = preference_batch(
        [prompts[g] for g in of_pair] + [[]] * missing,
        [(completions[best], completions[worst]) for best, worst in pairs_K2] + [([], [])] * missing,
        config.micro_batch_rows,
        multiple,
    )
    M, _, C = batch["completions"].shape
    sampled = np.zeros((len(pairs_K2) * 2, C), np.float32)
    width = min(C, rollout.logps_NT.shape[1])
    sampled[:, :width] = rollout.logps_NT[pairs_K2.reshape(-1), :width]
    empty = batch["lengths"].size - len(sampled)
    return batch | {"sampler_logps": np.pad(sampled, ((0, empty), (0, 0))).reshape(M, -1, C)}


def train_online_dpo(
    model_cfg: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    reward: Reward,
    schedule: Schedule,
    config: OnlineDPOConfig | Mapping[str, Any],
    run_dir: RunDir,
    evals: Mapping[str, PromptBatch] | None = None,
    *,
    mesh=None,
    progress: bool = True,
):
    """Trains a policy by online DPO and returns (parameters, summary); arguments, files and errors as of `loop.train_grpo`.

    Each step's record has, beside the rollout's figures, "pairs" and "tied" (groups without a pair because their rewards are equal), and
    over the pairs "loss", "margin" and "accuracy" of the implicit reward, "implicit_chosen", "implicit_rejected", "logp_chosen",
    "logp_rejected" (sums, nats), "logp_diff_max" (trainer against sampler) and "grad_norm".
    """
    config = from_mapping(OnlineDPOConfig, config)
    check_online_dpo(config)
    spec = preference_spec(model_cfg, config)
    run = Run(
        model_cfg, tokenizer, prompts, reward, schedule, config, spec, _update, run_dir, evals or {}, mesh, "online dpo",
        compares=config.loss.needs_reference,
    )  # fmt: skip
    return train(run, params, progress)


def _update(run: Run, state: State, experience: Experience) -> tuple[State, dict[str, Any]]:
    pairs_K2, tied = pick_pairs(experience.rewards_N, experience.learnt_N, experience.groups_N)
    batch = pair_batch(experience, pairs_K2, run.config, 1 if run.mesh is None else batch_ways(run.mesh))
    if run.mesh is not None:
        batch = jax.tree.map(lambda x: place(x, batch_shardings(run.mesh)), batch)
    if run.reference is not None:
        sums = compiled_sums(dataclasses.replace(run.spec, lora=None), run.mesh)(run.reference, batch)
        batch["ref_sums"] = sums if run.mesh is None else place(np.asarray(sums), batch_shardings(run.mesh))
    state, metrics = compiled_update(run.spec, run.mesh)(state, batch, run.frozen)
    return state, to_host(metrics) | {"pairs": len(pairs_K2), "tied": tied}
