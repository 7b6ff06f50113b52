"""From prompts to a training batch: sample completions, turn them to text, judge them, lay them out for the update."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.losses.grpo import overlong_penalty
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.verdict import Reward, RewardInput, Status, Verdict, reward_values
from jaxrl_llm.train.config import GRPOConfig, OnlineDPOConfig
from models.decode import bucket
from models.sharding import rows_of_all

CUT_OFF = 0  # of a rollout's finish reasons: the limit of tokens


@dataclasses.dataclass(frozen=True)
class Experience:
    """One step's judged completions. N rows, several a prompt; `rollout.group_ids_N` says which prompt of `prompts` a row is of.

    rewards_N fp32 and valid_N bool: see `reward_values`; the penalty of long completions, if any, is taken off. learnt_N: those of valid_N
    that are learnt from, all or, with `mask_cut_off`, those that ended before max_new_tokens. groups_N: one integer for each
    distinct prompt id, which is what advantages are grouped by (a prompt that is in the batch twice is one group).
    """

    prompts: PromptBatch
    rollout: models.Rollout
    texts: list[str]
    verdicts: list[Verdict]
    rewards_N: np.ndarray
    valid_N: np.ndarray
    learnt_N: np.ndarray
    groups_N: np.ndarray
    seconds_rollout: float
    seconds_reward: float

    def pass_rates(self) -> np.ndarray:
        """float64 [prompts]: the share of PASS among each prompt's valid rows; NaN where it has none."""
        passed = np.array([v.status is Status.PASS for v in self.verdicts], dtype=float)
        rows = self.rollout.group_ids_N
        count = np.bincount(rows[self.valid_N], minlength=len(self.prompts))
        total = np.bincount(rows[self.valid_N], passed[self.valid_N], minlength=len(self.prompts))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def decode_completions(tokenizer, rollout: models.Rollout) -> list[str]:
    """The text of each completion, without special tokens."""
    return list(tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True))


def judge(reward: Reward, prompts: PromptBatch, group_ids_N: np.ndarray, texts: Sequence[str]) -> list[Verdict]:
    """A Verdict for each completion; an exception in the reward becomes an ERROR verdict of its rows.

    Several processes share the work, see `registry.score_shared`.
    """
    inputs = []
    for group, text in zip(group_ids_N, texts, strict=True):
        row = prompts.rows[group]
        answer = row.get("answer")
        inputs.append(RewardInput(prompt=row.get("prompt", ""), response=text, answer=None if answer is None else str(answer), row=row))
    return registry.score_shared(reward, inputs, jax.process_index(), jax.process_count(), rows_of_all)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One step's completions, not yet judged."""

    prompts: PromptBatch
    rollout: models.Rollout
    texts: list[str]
    seconds: float


def sample(
    model: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    config: GRPOConfig | OnlineDPOConfig,
    key: jax.Array,
    mesh=None,
) -> Sampled:
    """Samples `config.num_samples` completions of each prompt with `params`."""
    start = time.perf_counter()
    rollout = models.generate(
        model,
        params,
        prompts.token_lists(),
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_strings=config.stop_strings,
        tokenizer=tokenizer,
        seed=key,
        max_rows=config.rollout_rows,
        refill=config.rollout_refill,
        mesh=mesh,
    )
    return Sampled(prompts, rollout, decode_completions(tokenizer, rollout), time.perf_counter() - start)


def verdicts_of(sampled: Sampled, reward: Reward) -> tuple[list[Verdict], float]:
    """(verdicts, seconds that they took). With one process it uses no device, so that it may run in a thread."""
    start = time.perf_counter()
    return judge(reward, sampled.prompts, sampled.rollout.group_ids_N, sampled.texts), time.perf_counter() - start


def judged(sampled: Sampled, verdicts: list[Verdict], seconds: float, config: GRPOConfig | OnlineDPOConfig) -> Experience:
    """The completions with their verdicts, which took `seconds`, and the rewards that are made of them."""
    rollout, prompts = sampled.rollout, sampled.prompts
    rewards_N, valid_N = reward_values(verdicts)
    if buffer := overlong_tokens(config):
        penalty_N = np.asarray(overlong_penalty(rollout.completion_lengths_N, config.max_new_tokens, buffer))
        rewards_N = np.where(valid_N, rewards_N + config.overlong_penalty * penalty_N, 0.0).astype(np.float32)
    return Experience(
        prompts=prompts,
        rollout=rollout,
        texts=sampled.texts,
        verdicts=verdicts,
        rewards_N=rewards_N,
        valid_N=valid_N,
        learnt_N=valid_N & (rollout.finish_reason_N != CUT_OFF) if config.mask_cut_off else valid_N,
        groups_N=groups_by_id(prompts.ids)[rollout.group_ids_N],
        seconds_rollout=sampled.seconds,
        seconds_reward=seconds,
    )


def overlong_tokens(config: GRPOConfig | OnlineDPOConfig) -> int:
    """The last tokens of a completion over which its penalty grows; 0 without one. A share that is not 0 is one token at least."""
    share = max(round(config.overlong_buffer_share * config.max_new_tokens), 1) if config.overlong_buffer_share else 0
    return config.overlong_buffer or share


def collect(
    model: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    reward: Reward,
    config: GRPOConfig | OnlineDPOConfig,
    key: jax.Array,
    mesh=None,
) -> Experience:
    """Samples `config.num_samples` completions of each prompt with `params` and judges them."""
    sampled = sample(model, params, tokenizer, prompts, config, key, mesh)
    return judged(sampled, *verdicts_of(sampled, reward), config)


def groups_by_id(ids: Sequence[str]) -> np.ndarray:
    """int32 [prompts]: equal for equal ids, numbered by first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(i, len(numbers)) for i in ids], dtype=np.int32)


def samples_together(num_samples: int, micro_batch_rows: int, ways: int, most: int = 0) -> int:
    """How many of a prompt's completions share one forward of it in an update: all, or where `most` of them or micro_batch_rows over the
    ways (devices that share the rows) leaves less room, the most that fit and divide them."""
    room = max(micro_batch_rows // ways, 1) if micro_batch_rows else num_samples
    room = min(room, most or room)
    return next(size for size in range(min(room, num_samples), 0, -1) if num_samples % size == 0)


def build_batch(experience: Experience, config: GRPOConfig, *, row_multiple: int = 1) -> dict[str, np.ndarray]:
    """The batch of a rollout's update (see `jaxrl_llm.train.step`) in micro-batches, padded with empty rows; with `updates_per_epoch` those of
    its parts, the same number of micro-batches each, one part after the other, each of as many prompts (which it must divide).

    Completions of one prompt stay together when every prompt has the same number of them, so that its prefix is forwarded once; else
    each row carries its own copy of the prompt. A micro-batch with less room than that holds part of a prompt's completions (see
    `samples_together`). row_multiple: over how many devices its rows are spread; each gets as many prompts. Widths are rounded up to a
    few sizes, so that steps share compilations. With `config.length_buckets` a prompt's completions, and then what stays together, are
    sorted by length, so that a micro-batch has completions of similar lengths (see `step.cut_to_length`).
    """
    r, rows = experience.rollout, experience.rollout.group_ids_N
    present, counts = np.unique(rows, return_counts=True)
    complete = len(counts) > 0 and np.all(counts == counts[0])
    S = samples_together(int(counts[0]), config.micro_batch_rows, row_multiple, config.samples_together) if complete else 1
    per_update = len(experience.prompts) // config.updates_per_epoch
    parts = [_ordered(r, np.flatnonzero(rows // per_update == part), S, config) for part in range(config.updates_per_epoch)]
    G = max(len(order) // S for order in parts)
    per_device = -(-G // row_multiple)
    if config.micro_batch_rows:
        per_device = min(per_device, max(config.micro_batch_rows // S // row_multiple, 1))
    per_micro = per_device * row_multiple
    M = -(-G // per_micro)

    def blocks(of_parts, size, fill=0):
        """An array [at most G * size, ...] a part -> [parts * M, per_micro * size, ...], empty rows at the end of each part."""
        pad = lambda part: [(0, M * per_micro * size - len(part))] + [(0, 0)] * (part.ndim - 1)  # noqa: E731
        padded = np.concatenate([np.pad(part, pad(part), constant_values=fill) for part in of_parts])
        return padded.reshape(len(parts) * M, per_micro * size, *padded.shape[1:])

    by_row = lambda array: blocks([array[order] for order in parts], S)  # noqa: E731
    by_prompt = lambda array, fill=0: blocks([array[rows[order[::S]]] for order in parts], 1, fill)  # noqa: E731
    tokens_PT, lengths_P = experience.prompts.tokens_NT, experience.prompts.lengths_N
    width = min(bucket(int(lengths_P.max()), 32), tokens_PT.shape[1])
    longest = bucket(int(r.completion_lengths_N.max()), 16)
    span = slice(0, min(longest, r.completion_tokens_NT.shape[1]))
    return {
        "prompts": by_prompt(tokens_PT[:, :width].astype(np.int32)),
        # A padding prompt has one token, so that there is a state to read.
        "prompt_lengths": by_prompt(lengths_P.astype(np.int32), fill=1),
        "completions": by_row(r.completion_tokens_NT[:, span].astype(np.int32)),
        "lengths": by_row(r.completion_lengths_N.astype(np.int32)),
        "sampler_logps": by_row(r.logps_NT[:, span].astype(np.float32)),
        "rewards": by_row(experience.rewards_N.astype(np.float32)),
        "valid": by_row(experience.learnt_N),
        "group_ids": by_row(experience.groups_N.astype(np.int32)),
    }


def _ordered(rollout: models.Rollout, chosen: np.ndarray, together: int, config: GRPOConfig) -> np.ndarray:
    """The rows `chosen` by prompt, blocks of `together` rows of one prompt; with `length_buckets` by length within a prompt, and the blocks by
    their longest."""
    rows, lengths = rollout.group_ids_N[chosen], rollout.completion_lengths_N[chosen]
    if config.length_buckets == 1:
        return chosen[np.argsort(rows, kind="stable")]
    blocks = chosen[np.lexsort((lengths, rows))].reshape(-1, together)
    return blocks[np.argsort(rollout.completion_lengths_N[blocks].max(axis=1), kind="stable")].ravel()
