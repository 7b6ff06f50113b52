"""The updates of the GRPO family on one rollout: what comes before them is computed once, and then each epoch and part moves the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrl_llm.losses.grpo import kl_estimate
from jaxrl_llm.train.checks import check_parts
from jaxrl_llm.train.rollout import Experience, build_batch
from jaxrl_llm.train.state import State, trunk, whole
from jaxrl_llm.train.step import batch_shardings, compiled_kl, compiled_logprobs, compiled_targets, compiled_update, compiled_values
from models.sharding import batch_ways, place

if TYPE_CHECKING:
    from jaxrl_llm.train.loop import Run


def update_policy(run: Run, state: State, experience: Experience) -> tuple[State, dict[str, Any]]:
    """`inner_epochs` times the updates on a rollout: one, or one on each of `updates_per_epoch` parts. A single one is on-policy at first and
    then yields the old log-probabilities of the later ones; with parts these come before it, and with `overlap_rewards` they are the sampler's
    (see `train.overlap`). Returns the state after them, and their metrics.

    Raises UserError where the rollout's prompts cannot be parted so.
    """
    check_parts(run.config, len(experience.prompts))
    ways, parts, late = 1 if run.mesh is None else batch_ways(run.mesh), run.config.updates_per_epoch, run.config.overlap_rewards
    batch = build_batch(experience, run.config, row_multiple=ways)
    if run.mesh is not None:
        batch = jax.tree.map(lambda x: place(x, batch_shardings(run.mesh)), batch)
    if run.reference is not None and run.config.loss.kl_place == "loss":
        batch["ref_logps"] = compiled_logprobs(run.spec, run.mesh)(run.reference, batch)
    elif run.reference is not None and late:
        reference = compiled_logprobs(run.spec, run.mesh)(run.reference, batch)
        batch["kl"] = kl_estimate(batch["sampler_logps"], reference, run.config.loss.kl)
    elif run.reference is not None:
        batch["kl"] = compiled_kl(run.spec, run.mesh)(trunk(whole(run.spec.lora, state["params"], run.frozen)), run.reference, batch)
    if run.config.loss.critic:
        batch["values"] = compiled_values(run.spec, run.mesh)(whole(run.spec.lora, state["params"], run.frozen), batch)
    if late:
        batch["old_logps"] = batch["sampler_logps"]
    elif parts > 1:
        policy = trunk(whole(run.spec.lora, state["params"], run.frozen))
        batch["old_logps"] = compiled_logprobs(run.spec, run.mesh, adapted=True)(policy, batch)
    batches, differences = [batch], {}
    if parts > 1:
        targets, differences = compiled_targets(run.spec, run.mesh)(batch)
        micros = len(batch["lengths"]) // parts
        batches = [jax.tree.map(lambda x, at=part * micros: x[at : at + micros], batch | targets) for part in range(parts)]
    update = compiled_update(run.spec, run.mesh)
    metrics = []
    for epoch in range(run.config.inner_epochs):
        for each in batches:
            state, measured, logps = update(state, each, run.frozen)
            metrics.append(measured)
        if epoch == 0 and run.config.inner_epochs > 1 and parts == 1 and not late:
            batch["old_logps"] = logps
    host = jax.device_get(metrics)  # one wait for the device a step
    # The sampler is compared with the policy that sampled, and the gradient norm is that of the first epoch; the clip acts in later updates.
    first = host[:parts]
    combined = {name: (np.max if name.endswith("_max") else np.mean)([m[name] for m in first]) for name in host[0]}
    combined |= {name: np.mean([m[name] for m in host]) for name in ("clip_share", "ratio", "loss")}
    combined |= {} if late else jax.device_get(differences)
    combined["finite"] = all(np.isfinite([m["loss"], m["grad_norm"]]).all() for m in host)
    return state, {name: bool(x) if name == "finite" else float(x) for name, x in combined.items()}
