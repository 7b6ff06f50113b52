"""`overlap_rewards`: the completions of a step are judged in a thread of the host while the devices sample those of the next step.

Let p_0, p_1, ... be the policies, p_t the one before update t. Without overlap update t trains on completions of p_t. With it, the
completions of step t + 1 are sampled while those of step t are judged, which is before update t: they are of p_t, one update old when update
t + 1 trains on them. Step 0 has no step before it and is sampled by p_0 as without overlap, and so is, by the policy as it is, the
first step that a finished run is given more of; an evaluation between two steps changes nothing.

Exact: prompts, randomness of sampling and judging of a step are those of a run without overlap given the same policy; the result is the same
at every run, and after a kill, since a checkpoint holds the completions that wait to be judged. The ratio of the GRPO family is of the trained
policy over the one that sampled, with the sampler's own log-probabilities as the old ones at every step and inner epoch, and so is KL in the
reward; the clip bounds what a stale sample may move.

Not exact: the update is no longer on-policy. The ratio weighs each token by itself, not the prefixes that a newer policy would have reached,
and holds the difference between the sampler's numbers and the trainer's (so `loss.mismatch`, which is for that difference alone, is refused).
A critic's values are those of the policy that is updated. Online DPO has no ratio: its pairs are of a policy one update older. Rewards in the
record of a step, and the schedule's pass rates, are of that older policy; "logp_diff_mean" and "logp_diff_max" include the update between.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np

import models
from jaxrl_llm.errors import UserError
from jaxrl_llm.train.rollout import Experience, Sampled, decode_completions, judged, sample, verdicts_of

if TYPE_CHECKING:
    from jaxrl_llm.train.loop import Run, Schedule

T = TypeVar("T")
AHEAD = "loop.ahead."  # among the schedule's arrays in a checkpoint
ROLLOUT = [field.name for field in dataclasses.fields(models.Rollout)]


class Ahead(NamedTuple):
    """The completions of a step that is to come, sampled and not judged. rows: what the schedule gave for that step."""

    rows: np.ndarray
    sampled: Sampled

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold of it."""
        arrays = {name: getattr(self.sampled.rollout, name) for name in ROLLOUT}
        return {AHEAD + name: np.asarray(value) for name, value in (arrays | {"rows": self.rows}).items()}


def restored(run: Run, host: dict[str, np.ndarray]) -> Ahead | None:
    """What `Ahead.state` put among the arrays of a checkpoint, taken out of them; None where there is none."""
    found = {name: host.pop(AHEAD + name) for name in (*ROLLOUT, "rows") if AHEAD + name in host}
    if not found:
        return None
    rows, rollout = found.pop("rows"), models.Rollout(**found)
    return Ahead(rows, Sampled(run.prompts.take(rows), rollout, decode_completions(run.tokenizer, rollout), 0.0))


def check_overlap(schedule: Schedule) -> None:
    """Raises UserError where completions cannot be judged while others are sampled."""
    if jax.process_count() > 1:
        raise UserError(
            f"setting 'overlap_rewards' is True with {jax.process_count()} processes, which share the judging: they would exchange verdicts while "
            "their devices sample, in an order that may differ between them; set it to False"
        )
    if hasattr(schedule, "see_policy"):
        raise UserError(
            "setting 'overlap_rewards' is True with a schedule that follows the policy: it chooses the prompts of a step by the verdicts of the "
            "step before, which are not known yet; set it to False, or choose another schedule"
        )


class Call(Generic[T]):
    """A function that is called in a thread of its own. The thread ends with the process: one that waits for ever does not keep a run that
    was told twice to stop from ending."""

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Waits for it; what the function raised is raised here."""
        self._thread.join()
        if hasattr(self, "_error"):
            raise self._error
        return self._result


def step_ahead(run: Run, policy: Any, step: int) -> tuple[Experience, np.ndarray, dict[str, float]]:
    """(completions of `step`, their rows, seconds); they are judged while `policy` samples those of the next step, which `run.ahead` then is.

    The schedule gives a step's batch before it is told of the step before. Seconds: "rollout", what this step spent on sampling (the next
    step's completions, the first step's own too); "reward", what the judging took; "reward_waited", for how much of that nothing was sampled.
    """
    began = time.perf_counter()
    rows, sampled = run.ahead or _sample(run, policy, step)
    judging = Call(lambda: verdicts_of(sampled, run.reward))
    # Whatever a run's last step would sample, no step would train on.
    run.ahead = _sample(run, policy, step + 1) if step + 1 < run.config.steps else None
    waits = time.perf_counter()
    verdicts, judging_seconds = judging.result()
    waited = time.perf_counter() - waits
    experience = judged(sampled, verdicts, judging_seconds, run.config)
    run.schedule.observe(step, rows, experience.pass_rates())
    return experience, rows, {"rollout": waits - began, "reward": judging_seconds, "reward_waited": waited, "schedule": 0.0}


def _sample(run: Run, policy: Any, step: int) -> Ahead:
    rows = np.asarray(run.schedule.batch(step))
    key = jax.random.fold_in(run.key, step)
    return Ahead(rows, sample(run.model, policy, run.tokenizer, run.prompts.take(rows), run.config, key, run.sampler_mesh))
