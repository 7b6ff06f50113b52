"""A run that goes on from a checkpoint, and what one that cannot says."""

from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir


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
