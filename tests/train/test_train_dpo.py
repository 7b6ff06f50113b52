"""Training on fixed preferences: first step by hand, every loss learns, accumulation, resume, mesh, and golden curves."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs

import models
from jaxrl_llm.errors import UserError
from jaxrl_llm.train import dpo
from jaxrl_llm.train.checks import check_dpo
from jaxrl_llm.train.config import DPOConfig, OptimizerConfig, PreferenceLossConfig, from_mapping
from jaxrl_llm.train.dpo import Preferences, with_unrelated
from jaxrl_llm.train.preference_step import preference_batch
from jaxrl_llm.train.signals import Interrupted

ONE = dataclasses.replace(prefs.QUICK, steps=1)
GOLDEN = json.loads(prefs.GOLDEN.read_text())


def of_kind(kind, config=prefs.QUICK):
    return dataclasses.replace(config, loss=prefs.LOSSES[kind])


def sums_by_hand(params, rows, temperature=1.0):
    """[N, 2] float64: each completion's summed log-probability, one row at a time, without padding."""
    sums = np.zeros((len(rows), 2))
    for i, (prompt, pair) in enumerate(zip(rows.prompts, rows.completions, strict=True)):
        for j, completion in enumerate(pair):
            logits = np.asarray(models.apply(prefs.CONFIG, params, np.array([prompt + completion]))[0], np.float64)[0] / temperature
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums[i, j] = sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(completion))
    return sums


def test_first_step_by_hand_at_a_temperature():
    data = prefs.pairs(6)
    _, history = prefs.train(dataclasses.replace(of_kind("simpo", ONE), temperature=0.7), data)
    sums = sums_by_hand(prefs.params(), data, 0.7)
    lengths = np.array([[len(c) for c in pair] for pair in data.completions])
    d = 2.0 * np.diff(sums / lengths)[:, 0] + 1.0  # -(beta x difference - gamma)
    record = history[0]
    assert record["loss"] == pytest.approx(np.log1p(np.exp(d)).mean(), rel=1e-5)
    assert record["logp_chosen"] == pytest.approx(sums[:, 0].mean(), rel=1e-5) and record["tokens"] == lengths.sum()
    assert record["logp_rejected"] == pytest.approx(sums[:, 1].mean(), rel=1e-5)


def test_the_reference_is_the_starting_policy_and_stays_it():
    """At the start the implicit rewards are 0; after it they are beta x the change of the log-probability, row by row."""
    data = prefs.pairs(6)
    params, history = prefs.train(of_kind("sigmoid"), data, held_out={"same": data})
    first, last = (r for r in history if r["kind"] == "eval")
    assert first["step"] == 0 and last["step"] == 4 and first["n"] == 6
    assert abs(first["margin"]) < 1e-5 and first["accuracy"] == pytest.approx(0.5, abs=0.5) and first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    change = 0.5 * (sums_by_hand(params, data) - sums_by_hand(prefs.params(), data))
    assert last["implicit_chosen"] == pytest.approx(change[:, 0].mean(), rel=1e-3)
    assert last["margin"] == pytest.approx((change[:, 0] - change[:, 1]).mean(), rel=1e-3)
    assert last["accuracy"] == pytest.approx(np.mean(change[:, 0] > change[:, 1]))


@pytest.mark.parametrize("kind", prefs.LOSSES)
def test_the_curve_is_the_golden_one(kind, tmp_path):
    """Loss, margin and gradient norm of four steps of every recipe; made by tests/train/tiny_preferences.py."""
    for name, values in prefs.curve(kind, tmp_path / "run").items():
        np.testing.assert_allclose(values, GOLDEN["curves"][kind][name], rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_learns_what_is_preferred(kind):
    config = dataclasses.replace(of_kind(kind), steps=40, log_every=10)
    _, history = prefs.train(config, prefs.rows_for(kind, 48), held_out={"new": prefs.rows_for(kind, 32, seed=1)}, batch=16)
    first, last = (r for r in history if r["kind"] == "eval")
    assert last["accuracy"] > 0.8 > first["accuracy"] and last["margin"] > first["margin"] + 0.5 and last["loss"] < first["loss"]
    assert [r["step"] for r in history if r["kind"] == "dpo"] == [10, 20, 30, 40]


def untimed(history):
    return [{k: v for k, v in r.items() if "second" not in k and k != "tokens_per_s"} for r in history]


@pytest.mark.parametrize(("kind", "buckets"), [("kto", 1), ("kto", 8), ("sigmoid", 8)])
def test_micro_batches_train_the_same_policy(kind, buckets):
    """Also where padding fills the last micro-batch, and cut to their lengths; KTO's baseline is that of the whole batch."""
    config = dataclasses.replace(of_kind(kind), steps=2)
    whole, parts = prefs.train(config), prefs.train(dataclasses.replace(config, micro_batch_rows=4, length_buckets=buckets))
    np.testing.assert_allclose(tiny.flat(parts[0]), tiny.flat(whole[0]), rtol=1e-4, atol=1e-5)
    for one, other in zip(untimed(parts[1]), untimed(whole[1]), strict=True):
        if one["step"] == 1:  # the sign of a margin of 0 is that of its rounding
            one.pop("accuracy"), other.pop("accuracy")
        assert one.pop("kind") == other.pop("kind") and one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_with_buckets_the_pairs_of_a_step_come_by_length(monkeypatch):
    """... with all that belongs to them; the same pairs as without."""
    seen, batch = [], Preferences.batch

    def watched(self, indices, *args, **kwargs):
        made = batch(self, indices, *args, **kwargs)
        if "ref_sums" in kwargs:  # a step's
            seen.append((np.asarray(indices), made))
        return made

    monkeypatch.setattr(Preferences, "batch", watched)
    data = prefs.pairs(12)
    for buckets in (1, 8):
        prefs.train(dataclasses.replace(of_kind("sigmoid", ONE), micro_batch_rows=2, length_buckets=buckets), data)
    (plain, one), (ordered, other) = seen
    assert sorted(plain) == sorted(ordered) and plain.tolist() != ordered.tolist()
    assert (np.diff(data.lengths(ordered).max(axis=1)) >= 0).all()
    places = [plain.tolist().index(i) for i in ordered]
    for name in ("ref_sums", "lengths"):
        np.testing.assert_array_equal(other[name].reshape(-1, 2), one[name].reshape(-1, 2)[places])


def test_what_saves_memory_or_work_does_not_change_the_result():
    base = tiny.flat(prefs.train(of_kind("sigmoid", ONE))[0])
    for change in (dict(remat=True, logprob_chunk=7, forward_rows=5), dict(shared_prefix=False)):
        np.testing.assert_allclose(tiny.flat(prefs.train(dataclasses.replace(of_kind("sigmoid", ONE), **change))[0]), base, rtol=1e-4, atol=1e-5)


def test_forward_rows_are_what_is_forwarded_at_once(monkeypatch):
    shapes, batch = [], Preferences.batch

    def watched(self, *args, **kwargs):
        made = batch(self, *args, **kwargs)
        shapes.append(made["prompts"].shape[:2])
        return made

    monkeypatch.setattr(Preferences, "batch", watched)
    prefs.train(dataclasses.replace(of_kind("sigmoid", ONE), forward_rows=5))
    assert shapes == [(1, 5)] * 3 + [(1, 6)]  # the reference of twelve rows, then the step


def test_every_field_of_the_loop_does_what_it_says(tmp_path):
    config = dataclasses.replace(of_kind("simpo"), steps=4, log_every=2, eval_every=2, checkpoint_every=1, keep_checkpoints=3)
    _, history = prefs.train(config, folder=tmp_path / "run", held_out={"new": prefs.pairs(4, seed=5)})
    assert [(r["kind"], r["step"]) for r in history] == [
        ("eval", 0), ("dpo", 1), ("dpo", 2), ("eval", 2), ("dpo", 3), ("dpo", 4), ("eval", 4),
    ]  # fmt: skip
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [2, 3, 4]
    quiet = dataclasses.replace(config, checkpoint_every=0, eval_every=0)
    _, history = prefs.train(quiet, folder=tmp_path / "quiet")
    assert [r["step"] for r in history] == [2, 4]
    assert sorted(int(p.name) for p in (tmp_path / "quiet" / "checkpoints").iterdir()) == [4]


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_sigterm_saves_and_resume_is_bit_exact(kind, tmp_path, monkeypatch):
    config, held = of_kind(kind), {"new": prefs.rows_for(kind, 4, seed=5)}
    whole, wanted = prefs.train(config, folder=tmp_path / "whole", held_out=held)
    batch = Preferences.batch
    calls = []

    def terminated(self, *args, **kwargs):
        if "ref_sums" in kwargs:
            calls.append(0)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *args, **kwargs)

    monkeypatch.setattr(Preferences, "batch", terminated)
    with pytest.raises(Interrupted, match="after step 2") as stopped:
        prefs.train(config, folder=tmp_path / "run", held_out=held)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    # Another start must not matter: parameters and the reference's log-probabilities come from the checkpoint.
    resumed, history = prefs.train(config, folder=tmp_path / "run", held_out=held, start=prefs.params(7))
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(whole))
    assert untimed(history) == untimed(wanted)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(history)


def test_no_reference_is_computed_where_the_loss_has_none(monkeypatch):
    monkeypatch.setattr(dpo, "_sums", None)
    for loss in (prefs.LOSSES["simpo"], prefs.LOSSES["orpo"], PreferenceLossConfig(reference=False)):
        prefs.train(dataclasses.replace(ONE, loss=loss))
    with pytest.raises(TypeError):
        prefs.train(ONE)


def test_not_finite_stops_with_the_step(tmp_path):
    explosive = dataclasses.replace(of_kind("ipo"), steps=9, checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=1e38, clip_norm=0.0))
    with pytest.raises(UserError, match=r"step [2-9]: loss .*not finite.*last good checkpoint is step \d"):
        prefs.train(explosive, folder=tmp_path / "run")


def test_a_broken_starting_model_is_named():
    broken = jax.tree.map(lambda p: p * np.nan, prefs.params())
    with pytest.raises(UserError, match="log-probability of row 'r.*' is not finite"):
        prefs.train(ONE, start=broken)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="'kto' needs single labelled completions, these are pairs"):
        prefs.train(of_kind("kto"), prefs.pairs())
    with pytest.raises(UserError, match="'sigmoid' needs pairs"):
        prefs.train(of_kind("sigmoid"), prefs.labelled())
    long = Preferences([[3] * 20], [([4] * 5, [4] * 13)], ["long"])
    with pytest.raises(UserError, match="row 'long' has 33 tokens, over the model's context of 32"):
        prefs.train(ONE, long)
    with pytest.raises(UserError, match="evals: no rows"):
        prefs.train(ONE, held_out={"evals": Preferences([], [], [])})


@pytest.mark.parametrize(
    "change,message",
    [
        ({"steps": 0}, "'steps' must be at least 1"),
        ({"forward_rows": 0}, "'forward_rows'"),
        ({"temperature": 0.0}, "'temperature' must be above 0"),
        ({"loss": {"kind": "sigmod"}}, "must be one of 'sigmoid'"),
        ({"loss": {"beta": 0.0}}, "'loss.beta' must be above 0"),
        ({"loss": {"label_smoothing": 0.5}}, "below 0.5"),
        ({"loss": {"kind": "ipo", "label_smoothing": 0.1}}, "no meaning with loss.kind 'ipo'"),
        ({"loss": {"kind": "kto", "reference": False}}, "'kto' measures against a reference"),
        ({"loss": {"kind": "kto", "desirable_weight": -1.0}}, "'loss.desirable_weight'"),
        ({"loss": {"undesirable_weight": 1.5}}, "'loss.undesirable_weight' is 1.5, a weight of loss.kind 'kto', and the kind is 'sigmoid'"),
        ({"loss": {"kind": "ipo", "gamma": 0.5}}, "'loss.gamma' is 0.5, the margin of loss.kind 'simpo', and the kind is 'ipo'"),
        ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule"),
    ],
)
def test_settings_without_meaning_are_one_clear_line(change, message):
    with pytest.raises(UserError, match=message):
        check_dpo(from_mapping(DPOConfig, change))


def test_unrelated_completions_belong_to_other_prompts():
    prompts, own = [[3], [3], [4, 4], [5]], [[1], [2], [6, 7, 8], [9]]
    pairs = with_unrelated(prompts, own, max_length=4)
    assert pairs == [([1], [6, 7, 8]), ([2], [6, 7, 8]), ([6, 7, 8], [9]), ([9], [1])]
    assert with_unrelated(prompts, own, max_length=3)[0] == ([1], [6, 7])  # cut behind this prompt
    assert with_unrelated([[3], [3]], [[1], [2]], 4) == [([1], [2]), ([2], [1])]


def test_batch_layout_and_padding():
    made = preference_batch([[3, 4], [5], [6]], [([7], [8, 9]), ([1, 1, 1], [2]), ([4], [4])], 2, labels=np.array([True, False, True]))
    assert made["prompts"].shape[:2] == (2, 2) and made["completions"].shape[:2] == (2, 4)
    assert made["lengths"].tolist() == [[1, 2, 3, 1], [1, 1, 0, 0]] and made["prompt_lengths"].tolist() == [[2, 1], [1, 1]]
    assert made["labels"].tolist() == [[True, False], [True, False]] and made["completions"][0, 1, :3].tolist() == [8, 9, 0]
    sums = np.arange(6, dtype=np.float32).reshape(3, 2)
    wide = preference_batch([[3], [5], [6]], [([7], [8])] * 3, 2, multiple=4, ref_sums=sums)
    assert wide["prompts"].shape[:2] == (1, 4) and wide["ref_sums"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


MESH = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, tiny_preferences as prefs
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
config = dataclasses.replace(prefs.QUICK, steps=2, loss=prefs.LOSSES["kto"], micro_batch_rows=4, length_buckets=8, forward_rows=5)
held = {"new": prefs.labelled(6, seed=5)}
one, wanted = prefs.train(config, held_out=held)
many, found = prefs.train(config, held_out=held, mesh=mesh)
np.testing.assert_allclose(tiny.flat(many), tiny.flat(one), rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(found[-1]["margin"], wanted[-1]["margin"], rtol=1e-3, atol=1e-5)
print("equal")
"""


def test_mesh_of_eight_devices_trains_the_same(run_python):
    """KTO, which has all parts; online DPO's test has pairs on a mesh."""
    assert "equal" in run_python(MESH, devices=8)
