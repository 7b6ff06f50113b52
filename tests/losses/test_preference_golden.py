"""Preference losses and metrics equal those of TRL 1.16's own code on the same log-probabilities (tests/make_golden_preference.py)."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.preference import dpo_loss, kto_baseline, kto_loss, orpo_loss, sequence_logprobs, simpo_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "preference.json").read_text())
# TRL's names of what we measure too.
NAMES = {
    "rewards/chosen": "implicit_chosen", "rewards/rejected": "implicit_rejected", "rewards/margins": "margin", "rewards/accuracies": "accuracy",
    "logps/chosen": "logp_chosen", "logps/rejected": "logp_rejected", "nll": "nll", "log_odds": "log_odds", "kl": "kl",
}  # fmt: skip


def loss_of(case, settings):
    """(loss, metrics) of ours; TRL's rows are all chosen completions, then all rejected ones."""
    logps, lengths = np.array(GOLDEN["logps"], np.float32), np.array(GOLDEN["lengths"])
    sums, counted = sequence_logprobs(jnp.asarray(logps), jnp.arange(logps.shape[1]) < lengths[:, None])
    np.testing.assert_array_equal(counted, lengths)
    ref = jnp.asarray(GOLDEN["ref_sums"], jnp.float32)
    if case == "kto":
        unrelated = jnp.roll(sums, 1)
        baseline = kto_baseline(unrelated, counted, unrelated - 0.7)
        return kto_loss(sums, counted, ref, jnp.arange(len(sums)) < len(sums) // 2, baseline, **settings)
    sums_P2, lengths_P2, ref_P2 = (x.reshape(2, -1).T for x in (sums, counted, ref))
    if case == "simpo":
        return simpo_loss(sums_P2, lengths_P2, **settings)
    if case == "orpo":
        return orpo_loss(sums_P2, lengths_P2, **settings)
    kind = {"sigmoid_sharp": "sigmoid", "conservative": "sigmoid"}.get(case, case)
    return dpo_loss(sums_P2, lengths_P2, ref_P2, kind=kind, **settings)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equal_to_trl(case):
    found = GOLDEN["cases"][case]
    loss, metrics = loss_of(case, found["settings"])
    ours = {"loss": loss, **{theirs: metrics[name] for theirs, name in NAMES.items() if theirs in found["expected"]}}
    assert ours.keys() == found["expected"].keys()
    for name, value in found["expected"].items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_file_says_what_made_it():
    assert GOLDEN["versions"]["trl"] == "1.16.0" and GOLDEN["command"].startswith("python tests/make_golden_preference.py")
