"""Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476, section 3.2 and eq. 11): a batch of groups that all teach something.

A group whose samples all got the same verdict has no advantage. Its prompt gives way to new ones: whole further batches of the schedule are
rolled out until the batch is full of groups with different verdicts, or a number of tries is spent. Verdicts count, not what a length
penalty makes of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.rewards.verdict import reward_values
from jaxrl_llm.train.rollout import Experience, groups_by_id

Part = tuple[int, np.ndarray]  # number of a rollout, and the positions of some of its prompts


class Filled(NamedTuple):
    """What a step rolled out and what it trains on."""

    rollouts: list[Experience]
    trained: list[Part]
    counts: dict[str, int]

    def experience(self) -> Experience:
        """The completions to train on."""
        if len(self.rollouts) == 1:  # all of it, in its order
            return self.rollouts[0]
        return joined([(self.rollouts[number], positions) for number, positions in self.trained])

    def everything(self) -> Experience:
        """All completions of the step."""
        if len(self.rollouts) == 1:
            return self.rollouts[0]
        return joined([(rollout, np.arange(len(rollout.prompts))) for rollout in self.rollouts])


def mixed_groups(experience: Experience) -> np.ndarray:
    """bool [prompts]: whether the verdicts on a prompt's completions differ; those that say nothing (errors, timeouts) do not count, nor do
    completions that nothing is learnt from."""
    values_N, chosen_N = reward_values(experience.verdicts)[0], experience.learnt_N
    rows, count = experience.rollout.group_ids_N[chosen_N], len(experience.prompts)
    top, low = np.full(count, -np.inf), np.full(count, np.inf)
    np.maximum.at(top, rows, values_N[chosen_N])
    np.minimum.at(low, rows, values_N[chosen_N])
    return top > low


def fill(draw: Callable[[int], Experience], tries: int) -> Filled:
    """Rolls out until there are as many mixed groups as the first rollout has prompts, at most `tries` times.

    draw: number of the try -> the next batch of the schedule, rolled out and judged. No prompt id is taken twice. Where the tries do not
    suffice, the first rollout's groups of equal verdicts fill the batch: it keeps its shape, and they teach nothing, as without resampling.
    counts: "rollouts"; "flat_groups", those of equal verdicts among all; "surplus_groups", mixed ones that the batch had no room for; and
    "unfilled_groups", flat ones in the batch.
    """
    rollouts: list[Experience] = []
    trained: list[Part] = []
    taken: set[str] = set()
    size = mixed = 0
    while len(rollouts) < tries and (not rollouts or len(taken) < size):
        rollouts.append(rollout := draw(len(rollouts)))
        size = len(rollouts[0].prompts)
        good, chosen = np.flatnonzero(mixed_groups(rollout)), []
        for i in good:
            if len(taken) < size and rollout.prompts.ids[i] not in taken:
                taken.add(rollout.prompts.ids[i])
                chosen.append(i)
        trained.append((len(rollouts) - 1, np.array(chosen, int)))
        mixed += len(good)
    missing = size - len(taken)
    rest = np.setdiff1d(np.arange(size), trained[0][1])
    # In the order of the first batch, so that a step whose tries are all in vain trains on it as it came.
    trained[0] = (0, np.sort(np.concatenate([trained[0][1], rest[:missing]])))
    counts = {
        "rollouts": len(rollouts),
        "flat_groups": sum(len(rollout.prompts) for rollout in rollouts) - mixed,
        "surplus_groups": mixed - len(taken),
        "unfilled_groups": missing,
    }
    return Filled(rollouts, trained, counts)


def joined(parts: Sequence[tuple[Experience, np.ndarray]]) -> Experience:
    """Some prompts of several rollouts, with all their completions, as one rollout. parts: (rollout, positions of its prompts)."""
    rows = [np.concatenate([np.flatnonzero(e.rollout.group_ids_N == p) for p in at] or [np.empty(0, int)]) for e, at in parts]
    first = np.cumsum([0] + [len(at) for _, at in parts])
    numbers = [np.searchsorted(at, e.rollout.group_ids_N[chosen]) for (e, at), chosen in zip(parts, rows, strict=True)]
    group_ids_N = np.concatenate([n + start for n, start in zip(numbers, first, strict=False)])

    def column(of: Callable[[Experience], np.ndarray]) -> np.ndarray:
        found = [of(e)[chosen] for (e, _), chosen in zip(parts, rows, strict=True)]
        if found[0].ndim == 1:
            return np.concatenate(found)
        width = max(part.shape[1] for part in found)
        return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in found])

    names = ("prompt_tokens_NT", "prompt_lengths_N", "completion_tokens_NT", "completion_lengths_N", "logps_NT", "finish_reason_N")
    rollout = models.Rollout(**{name: column(lambda e, n=name: getattr(e.rollout, n)) for name in names}, group_ids_N=group_ids_N)
    prompts = PromptBatch(
        tokens_NT=np.concatenate([e.prompts.tokens_NT[at] for e, at in parts]),
        lengths_N=np.concatenate([e.prompts.lengths_N[at] for e, at in parts]),
        ids=[e.prompts.ids[i] for e, at in parts for i in at],
        rows=[e.prompts.rows[i] for e, at in parts for i in at],
    )
    return Experience(
        prompts=prompts,
        rollout=rollout,
        texts=[e.texts[i] for (e, _), chosen in zip(parts, rows, strict=True) for i in chosen],
        verdicts=[e.verdicts[i] for (e, _), chosen in zip(parts, rows, strict=True) for i in chosen],
        rewards_N=column(lambda e: e.rewards_N),
        valid_N=column(lambda e: e.valid_N),
        learnt_N=column(lambda e: e.learnt_N),
        groups_N=groups_by_id(prompts.ids)[group_ids_N],
        seconds_rollout=sum(e.seconds_rollout for e, _ in parts),
        seconds_reward=sum(e.seconds_reward for e, _ in parts),
    )
