"""A run that goes on from a checkpoint, and what one that cannot says."""

import itertools
from collections.abc import Iterable

import numpy as np

from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, fingerprint


def tokens_fingerprint(rows: Iterable[list[int]], more: Iterable[object] = ()) -> str:
    """For `RunDir.same_rows`: of lists of token ids and of what else there is of the rows."""
    return fingerprint(itertools.chain((np.asarray(tokens, np.int32) for tokens in rows), more))


def prompts_fingerprint(prompts: PromptBatch) -> str:
    """Of the tokens and of all columns, by which a reward may judge."""
    return tokens_fingerprint(prompts.token_lists(), prompts.rows)


def check_steps(step: int, steps: int, run_dir: RunDir) -> None:
    """Raises UserError where the newest checkpoint, of `step`, is past the run's end."""
    if step > steps:
        raise UserError(f"{run_dir.path} holds a checkpoint of step {step}, past setting 'steps'={steps}: give as many or more, or another --workdir")


def not_finite(
    step: int, loss: float, grad_norm: float, checkpoints: Checkpoints | None, run_dir: RunDir | None, more: str = ""
) -> UserError:
    """What to raise when the loss or the gradient of `step` is no number. more: further advice, between commas."""
    steps = [] if checkpoints is None else checkpoints.steps()
    kept = f"the last good checkpoint is step {steps[-1]} in {checkpoints.path}" if steps and checkpoints else "no checkpoint was saved before"
    way_on = "" if run_dir is None else run_dir.way_on("train.optimizer")
    return UserError(
        f"step {step}: loss {loss:g}, gradient norm {grad_norm:g} is not finite; training stopped and {kept}. "
        f"Lower the learning rate or set optimizer.clip_norm{more}{way_on}"
    )
