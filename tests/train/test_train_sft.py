"""SFT: it learns, masks, accumulates by tokens, resumes exactly, and runs on a mesh."""

import dataclasses
import itertools
import os
import signal

import jax
import numpy as np
import pytest
import tiny_grpo as tiny

import models
from jaxrl_llm.data.prompts import pack_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.losses.sft import load_balancing_loss
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.config import OptimizerConfig, SFTConfig
from jaxrl_llm.train.sft import micro_batches, train_sft
from jaxrl_llm.train.signals import Interrupted

QUICK = SFTConfig(steps=4, log_every=1, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3))


def data(seed=0, rows=6, width=8):
    """Endless batches: counting up from a random start, ragged, rubbish in the padding."""
    for step in itertools.count():
        rng = np.random.default_rng([seed, step])
        tokens = 2 + (rng.integers(0, 14, (rows, 1)) + np.arange(width)) % 14
        mask = np.arange(width) < rng.integers(2, width + 1, (rows, 1))
        yield np.where(mask, tokens, rng.integers(0, tiny.VOCAB, tokens.shape)), mask


def train(config=QUICK, batches=None, folder=None, **kwargs):
    run_dir = None if folder is None else RunDir(folder, {"name": "sft"}, kind="sft")
    return train_sft(tiny.CONFIG, tiny.params(), data() if batches is None else batches, config, run_dir, progress=False, **kwargs)


def test_first_loss_is_the_mean_nll_of_the_counted_tokens():
    tokens, mask = next(data())
    _, history = train(dataclasses.replace(QUICK, steps=1))
    logits, _ = models.apply(tiny.CONFIG, tiny.params(), tokens)
    logits = np.asarray(logits, np.float64)[:, :-1]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
    assert history[0]["loss"] == pytest.approx(-picked[mask[:, 1:]].mean(), rel=1e-5)
    assert history[0]["tokens"] == mask[:, 1:].sum()


def test_learns_to_count():
    params, history = train(dataclasses.replace(QUICK, steps=120, log_every=40))
    assert history[0]["loss"] > 2 * history[-1]["loss"] and history[-1]["loss"] < 0.3
    rollout = models.generate(tiny.CONFIG, params, [[4, 5, 6]], max_new_tokens=4, temperature=0.0, stop_tokens=())
    assert rollout.completions() == [[7, 8, 9, 10]]


def test_updates_left_out_for_spikes_are_told(monkeypatch):
    from jaxrl_llm.train import state

    monkeypatch.setattr(state, "SPIKE_WARMUP", 1)
    guarded = dataclasses.replace(QUICK.optimizer, spike_factor=1.0001)  # of gradients of one size about half are above their mean
    _, history = train(dataclasses.replace(QUICK, steps=6, log_every=3, optimizer=guarded))
    assert all(record["spike"] * 3 == pytest.approx(round(record["spike"] * 3)) for record in history)
    assert 0 < sum(record["spike"] for record in history) < 2 and "spike" not in train(dataclasses.replace(QUICK, steps=1))[1][0]


def test_tokens_outside_the_mask_are_not_trained_on():
    tokens, mask = next(data())
    narrow = mask & (np.arange(8) >= 3)
    _, history = train(dataclasses.replace(QUICK, steps=1), iter([(tokens, narrow)]))
    assert history[0]["tokens"] == narrow.sum()
    changed = np.where(np.cumsum(mask[:, ::-1], 1)[:, ::-1] > 0, tokens, 3)  # other rubbish past every row's end
    assert train(dataclasses.replace(QUICK, steps=1), iter([(changed, narrow)]))[1][0]["loss"] == pytest.approx(history[0]["loss"], rel=1e-5)


def test_micro_batches_weigh_by_tokens():
    one_step = dataclasses.replace(QUICK, steps=1)
    whole, _ = train(one_step)
    parts, _ = train(dataclasses.replace(one_step, micro_batch_rows=4))
    np.testing.assert_allclose(tiny.flat(parts), tiny.flat(whole), rtol=1e-4, atol=1e-5)
    shaped = micro_batches(*next(data()), 4, multiple=3)
    assert shaped["tokens"].shape == (1, 6, 8) and micro_batches(*next(data()), 4)["mask"][1, 2:].sum() == 0


def test_remat_and_chunks_change_memory_not_the_result():
    one_step = dataclasses.replace(QUICK, steps=1)
    np.testing.assert_allclose(
        tiny.flat(train(dataclasses.replace(one_step, remat=True, logprob_chunk=7))[0]), tiny.flat(train(one_step)[0]), rtol=1e-4, atol=1e-5
    )


def test_attention_by_a_kernel_trains_the_same():
    one_step = dataclasses.replace(QUICK, steps=1)
    kernel, plain = (train(dataclasses.replace(one_step, attention=kind))[0] for kind in ("splash", "plain"))
    np.testing.assert_allclose(tiny.flat(kernel), tiny.flat(plain), rtol=1e-4, atol=1e-5)
    assert not np.array_equal(tiny.flat(kernel), tiny.flat(plain))  # another program, to rounding


def test_sigterm_saves_and_resume_is_bit_exact(tmp_path):
    whole, _ = train(folder=tmp_path / "whole")

    def terminated():
        for step, batch in enumerate(data()):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted):
        train(batches=terminated(), folder=tmp_path / "run")
    resumed, history = train(folder=tmp_path / "run")
    np.testing.assert_array_equal(tiny.flat(resumed), tiny.flat(whole))
    assert [r["step"] for r in history] == [1, 2, 3, 4]


def test_not_finite_stops_with_the_step(tmp_path):
    explosive = dataclasses.replace(QUICK, steps=9, log_every=1, checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=1e38, clip_norm=0.0))
    with pytest.raises(UserError, match=r"step [2-9]: loss .*not finite.*last good checkpoint is step \d"):
        train(explosive, folder=tmp_path / "run")


def test_records_and_checkpoints_are_as_often_as_set(tmp_path):
    def left(name, **changes):
        history = train(dataclasses.replace(QUICK, **changes), folder=tmp_path / name)[1]
        return [r["step"] for r in history], sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())

    assert left("plain") == ([1, 2, 3, 4], ["4"])
    assert left("rare", log_every=2, checkpoint_every=1) == ([1, 2, 3, 4], ["3", "4"])  # a checkpoint's step has a record
    assert left("seldom", log_every=2) == ([2, 4], ["4"])
    assert left("all", checkpoint_every=1, keep_checkpoints=3) == ([1, 2, 3, 4], ["2", "3", "4"])


def nats(params, tokens, mask):
    """The mean over counted tokens, by float64 logits of whole rows."""
    logits = np.asarray(models.apply(tiny.CONFIG, params, tokens)[0], np.float64)[:, :-1]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0][mask[:, 1:]].mean()


HELD = {"new": next(data(seed=5, rows=7, width=12)), "far": (3 + np.zeros((3, 8), int), np.ones((3, 8), bool))}


def test_held_out_losses_are_those_of_the_policy_and_the_best_one_stays(tmp_path):
    """By hand, in chunks of another size; a run that goes on knows of its best; the rows of "far" grow unlikelier at once."""
    config = dataclasses.replace(QUICK, steps=6, log_every=4, eval_every=2, keep_best="far")
    trained, history = train(config, folder=tmp_path / "run", held_out=HELD)
    evals = [r for r in history if r["kind"] == "eval"]
    assert [(r["step"], r["set"]) for r in evals] == [(step, name) for step in (0, 2, 4, 6) for name in HELD]
    assert [r["step"] for r in history if r["kind"] == "sft"] == [2, 4, 6]
    for record, params in ((evals[0], tiny.params()), (evals[3], trained)):
        tokens, mask = HELD[record["set"]]
        assert record["loss"] == pytest.approx(nats(params, tokens, mask), rel=1e-5) and record["n"] == len(tokens)
        assert record["tokens"] == mask[:, 1:].sum()
    far = [r["loss"] for r in evals if r["set"] == "far"]
    assert far[1] < far[2] < far[3] and sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["2", "6"]
    again, known = train(config, folder=tmp_path / "run", held_out=HELD)
    np.testing.assert_array_equal(tiny.flat(again), tiny.flat(trained))
    assert known == history
    last, plain = train(dataclasses.replace(config, keep_best="", forward_rows=2, eval_every=0), held_out=HELD)
    assert not np.array_equal(tiny.flat(last), tiny.flat(trained)) and [r["step"] for r in plain if r["kind"] == "eval"] == [0, 0, 6, 6]
    assert [r["loss"] for r in plain if r["step"] == 6 and r["kind"] == "eval"] == pytest.approx([r["loss"] for r in evals[-2:]], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "nwe"}, "'keep_best' is 'nwe', which is no held-out set: did you mean new"),
        ({"keep_best": "new"}, "'keep_best' keeps a checkpoint: give a run directory"),
        ({"forward_rows": 0}, "'forward_rows' must be at least 1, got 0"), ({"log_every": 0}, "'log_every' must be at least 1, got 0"),
        ({"steps": 0}, "'steps' must be at least 1, got 0"), ({"eval_every": -1}, "'eval_every' must be at least 0, got -1"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_without_meaning_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(QUICK, **changes), held_out=HELD)


def test_a_held_out_loss_that_is_not_finite_is_named():
    with pytest.raises(UserError, match="the loss of held-out set 'new' after step 0 is nan: lower"):
        train_sft(tiny.CONFIG, jax.tree.map(lambda p: p * np.nan, tiny.params()), data(), QUICK, held_out=HELD, progress=False)


def test_batches_that_run_out_are_named():
    with pytest.raises(UserError, match="ran out at step 3"):
        train(batches=itertools.islice(data(), 2))


MESH = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, test_train_sft as t
config = dataclasses.replace(t.QUICK, steps=2)
one, wanted = t.train(config, held_out=t.HELD)
packed, _ = t.train(config, t.packed(t.data(), 20), mesh=models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
np.testing.assert_allclose(tiny.flat(packed), tiny.flat(one), rtol=1e-4, atol=1e-5)
many, history = t.train(config, held_out=t.HELD, mesh=models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
np.testing.assert_allclose([r["loss"] for r in history], [r["loss"] for r in wanted], rtol=1e-5)
np.testing.assert_allclose(tiny.flat(many), tiny.flat(one), rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_mesh_of_eight_devices_trains_the_same(run_python):
    assert "equal" in run_python(MESH, devices=8)


def packed(batches, width):
    """The same rows behind one another, as `pack_rows` lays them."""
    for tokens, mask in batches:
        lengths = tokens.shape[1] - np.argmax(mask[:, ::-1], axis=1)
        yield pack_rows([(row[:n], counts[:n]) for row, counts, n in zip(tokens, mask, lengths, strict=True)], width)


@pytest.mark.parametrize("changes", [{}, {"micro_batch_rows": 1}, {"remat": True}], ids=str)
def test_packed_rows_train_as_the_rows_themselves(changes):
    """Loss, count and parameters after two steps; the packed rows are fewer."""
    config = dataclasses.replace(QUICK, steps=2)
    whole, history = train(config)
    parts, packed_history = train(dataclasses.replace(config, **changes), packed(data(), 20))
    assert len(next(packed(data(), 20))[0]) < 4 and packed_history[0]["tokens"] == history[0]["tokens"]
    assert packed_history[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-5)
    np.testing.assert_allclose(tiny.flat(parts), tiny.flat(whole), rtol=1e-4, atol=1e-5)


def test_rows_packed_without_segments_would_not():
    """What the segments are for: behind one another alone, texts see those before them."""
    config = dataclasses.replace(QUICK, steps=1)
    mixed = (part[:2] for part in packed(data(), 20))
    assert abs(train(config, mixed)[1][0]["loss"] - train(config)[1][0]["loss"]) > 1e-3


EXPERTS = dataclasses.replace(tiny.CONFIG, mlp="experts", n_experts=4, experts_per_token=1, d_ff=8)


def crowded():
    """Parameters whose router has much to say of the last expert and little of the others."""
    params = models.init(EXPERTS, jax.random.key(0))
    loud = jax.random.normal(jax.random.key(1), params["blocks"]["router"].shape) * jax.numpy.array([0.1, 0.1, 0.1, 1.0])
    return params | {"blocks": params["blocks"] | {"router": loud}}


def unevenness(params):
    taps = tuple(f"blocks.{i}.router_logits" for i in range(EXPERTS.n_layers))
    tokens, mask = next(data(seed=9))
    logits = models.apply(EXPERTS, params, np.where(mask, tokens, 2), taps=taps)[1]
    return float(load_balancing_loss(np.stack([logits[name] for name in taps]), mask, 1))


def test_router_balance_spreads_tokens_over_experts():
    config = dataclasses.replace(QUICK, steps=30, log_every=30)
    run = lambda **changes: train_sft(EXPERTS, crowded(), data(), dataclasses.replace(config, **changes), progress=False)  # noqa: E731
    (free, history), (balanced, told) = run(), run(router_balance=0.5)
    assert unevenness(balanced) < unevenness(free) - 0.1
    # The loss told is that of the tokens: both learn.
    assert history[0]["loss"] == pytest.approx(told[0]["loss"], rel=0.3)
    assert "router_balance" not in history[0] and 1 <= told[0]["router_balance"] <= 4


def test_router_balance_of_micro_batches_weighs_them_by_tokens():
    """Two micro-batches of the same rows balance as one of them does."""
    tokens, mask = next(data(rows=3))
    one_step = dataclasses.replace(QUICK, steps=1, router_balance=0.5)
    run = lambda rows, config: train_sft(EXPERTS, crowded(), iter([rows]), config, progress=False)[0]  # noqa: E731
    twice = run((np.concatenate([tokens] * 2), np.concatenate([mask] * 2)), dataclasses.replace(one_step, micro_batch_rows=3))
    np.testing.assert_allclose(tiny.flat(twice), tiny.flat(run((tokens, mask), one_step)), rtol=1e-4, atol=1e-6)


BALANCED = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, numpy as np, models.sharding
import tiny_grpo as tiny, test_train_sft as t
config = dataclasses.replace(t.QUICK, steps=2, log_every=1, router_balance=0.5)
run = lambda mesh: t.train_sft(t.EXPERTS, t.crowded(), t.data(), config, mesh=mesh, progress=False)
one, told = run(None)
free = t.train_sft(t.EXPERTS, t.crowded(), t.data(), dataclasses.replace(config, router_balance=0.0), progress=False)[0]
assert np.abs(tiny.flat(free) - tiny.flat(one)).max() > 1e-3
for shape in ({"expert": 4, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}):
    many, found = run(models.sharding.make_mesh(shape))
    np.testing.assert_allclose(tiny.flat(many), tiny.flat(one), rtol=1e-4, atol=1e-5)
    for name in ("router_balance", "loss"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in told], rtol=1e-5)
print("equal")
"""


def test_router_balance_on_eight_devices_is_that_of_one(run_python):
    """Each group of devices has a part of the rows and of the experts; the shares are of all tokens."""
    assert "equal" in run_python(BALANCED, devices=8)


def test_router_balance_is_for_experts():
    with pytest.raises(UserError, match="router_balance=0.1 is for mixtures of experts; this .* has none: set it to 0"):
        train(dataclasses.replace(QUICK, router_balance=0.1))
    with pytest.raises(UserError, match="'router_balance' must not be below 0"):
        train(dataclasses.replace(QUICK, router_balance=-0.1))
