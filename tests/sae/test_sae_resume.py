"""Training that was stopped and started again ends bit for bit like training left in peace."""

import jax
import numpy as np
import pytest

import models
import sae
from jaxrl_llm.checkpoint import until_done
from sae import harvest

D, F, K, B = 16, 48, 3, 32
HOOK = "blocks.0.resid_post"
# AuxK acts on latents that have not fired for 100 rows, so the counters of dead latents decide the result.
SETTINGS = {"steps": 24, "learning_rate": 1e-2, "warmup_steps": 5, "init_rows": 100, "log_every": 3, "dead_after": 100, "aux_coefficient": 0.5}


@pytest.fixture(scope="module")
def lm():
    cfg = models.ModelConfig(
        vocab_size=23, d_model=D, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_position=32, bos_token_id=1, eos_token_ids=(2,)
    )
    return cfg, models.init(cfg, jax.random.key(0))


def token_rows():
    rng = np.random.default_rng(0)
    return [[1, *rng.integers(3, 23, n).tolist()] for n in rng.integers(2, 20, 60)]


def endless():
    while True:
        yield from token_rows()


def made_rows():
    """[500, D] along four directions, so that most latents have nothing to do."""
    rng = np.random.default_rng(0)
    return (np.eye(4)[rng.integers(0, 4, 500)] @ rng.standard_normal((4, D)) + 0.01 * rng.standard_normal((500, D))).astype(np.float32)


def stream(kind, lm):
    """A fresh stream of batches: over several passes of a harvest, over one endless pass, over a plain iterator, over an array."""
    if kind == "passes":
        return sae.ActivationBuffer(lambda: sae.harvest_activations(*lm, token_rows(), HOOK, 8), B, 100, seed=3)
    if kind == "endless":
        return sae.ActivationBuffer(sae.harvest_activations(*lm, endless(), HOOK, 8), B, 100, seed=3)
    rows = made_rows()
    if kind == "plain":
        return sae.ActivationBuffer((rows[i % 490 : i % 490 + 7] for i in range(0, 5000, 7)), B, 100, seed=3)
    return sae.array_batches(rows, B)


def train(batches, checkpoints=None, stop_after=None, every=4, allow_changes=(), **changes):
    """(parameters, history) of training that is stopped by an exception after a logged step."""
    cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K, normalize_activations="expected_average_only_in")
    seen = []

    def log(record):
        seen.append(record)
        if record["step"] == stop_after:
            raise KeyboardInterrupt

    settings = sae.SAETrainConfig(**(SETTINGS | changes))
    d, history = sae.train_sae(
        cfg, batches, settings, jax.random.key(1), on_log=log, progress=False, checkpoints=checkpoints, checkpoint_every=every,
        allow_changes=allow_changes,
    )  # fmt: skip
    assert seen == history  # the records of before the stop are given again
    return d, history


@pytest.mark.parametrize("kind", ["passes", "endless", "plain", "array"])
def test_stopped_training_ends_as_undisturbed(kind, lm, tmp_path):
    d, history = train(stream(kind, lm))
    assert any(record["dead_share"] > 0 and record["aux"] > 0 for record in history)
    for stop_after in (3, 9, 15, 24):  # before the first checkpoint; between two; after one that a resumed run made; at the end
        with pytest.raises(KeyboardInterrupt), until_done(tmp_path) as checkpoints:
            train(stream(kind, lm), checkpoints, stop_after)
    with until_done(tmp_path) as checkpoints:
        assert checkpoints.steps() == [16, 20]
        again, told = train(stream(kind, lm), checkpoints)
        assert checkpoints.steps() == [20, 24]
    assert not tmp_path.exists()  # the run is over
    assert told == history and again.cfg == d.cfg and d.cfg.input_scale != 1.0
    jax.tree.map(np.testing.assert_array_equal, again.params, d.params)


def test_resuming_runs_the_model_once_for_what_was_trained_on(lm, tmp_path, monkeypatch):
    """The window comes from the checkpoint; the harvest is wound on without the model, but for the array it stopped in."""
    calls, tap = [], harvest.tap
    monkeypatch.setattr(harvest, "tap", lambda *args: calls.append(1) or tap(*args))
    with pytest.raises(KeyboardInterrupt), until_done(tmp_path) as checkpoints:
        train(stream("endless", lm), checkpoints, stop_after=21)
    before, calls[:] = len(calls), []
    with until_done(tmp_path) as checkpoints:
        train(stream("endless", lm), checkpoints, every=0)
    assert before > 8 and len(calls) <= 1 + 4 * B // 50 + 2  # 4 of 24 steps are left


def test_no_checkpoint_before_the_rows_read_ahead_are_used_up(lm, tmp_path):
    with pytest.raises(KeyboardInterrupt), until_done(tmp_path) as checkpoints:
        train(stream("passes", lm), checkpoints, stop_after=9, every=1, init_rows=7 * B)
    with until_done(tmp_path) as checkpoints:
        assert checkpoints.steps() == [7, 8]


@pytest.mark.parametrize(("changes", "named"), [({"learning_rate": 1e-3}, "train.learning_rate"), ({"steps": 30}, "train.steps")])
def test_checkpoints_of_another_run_are_refused(changes, named, lm, tmp_path):
    with pytest.raises(KeyboardInterrupt), until_done(tmp_path) as checkpoints:
        train(stream("array", lm), checkpoints, stop_after=9)
    for allowed in ((), ("beta1",)):
        with pytest.raises(sae.SAEError, match=f"another {named}"), until_done(tmp_path) as checkpoints:
            train(stream("array", lm), checkpoints, allow_changes=allowed, **changes)
    with pytest.raises(sae.SAEError, match="checkpoint is of step 8, past steps = 5: give as many or more"), until_done(tmp_path) as checkpoints:
        train(stream("array", lm), checkpoints, allow_changes=("steps",), steps=5)
    with until_done(tmp_path) as checkpoints:  # how often it tells of itself is its own affair
        train(stream("array", lm), checkpoints, allow_changes=changes, log_every=2, **changes)
        assert checkpoints.steps()[0] > 8, "it went on"


def test_a_source_that_has_become_shorter_is_refused(lm, tmp_path):
    with pytest.raises(KeyboardInterrupt), until_done(tmp_path) as checkpoints:
        train(stream("plain", lm), checkpoints, stop_after=21)
    with until_done(tmp_path) as checkpoints, pytest.raises(sae.SAEError, match="source is shorter"):
        train(sae.ActivationBuffer(iter([made_rows()]), B, 100, seed=3), checkpoints)


def test_a_mesh_goes_on_too(run_python, tmp_path):
    """The state is restored sharded over the latents; two kinds of stop on two devices."""
    code = f"""
import sys
import jax, numpy as np, sae
from jaxrl_llm.checkpoint import until_done
from models.sharding import make_mesh
mesh = make_mesh({{"data": 2, "tensor": 2}})
rows = np.random.default_rng(0).standard_normal((500, {D})).astype(np.float32)

def stop(record):
    if record["step"] == 5:
        raise KeyboardInterrupt

def train(checkpoints=None, on_log=None):
    cfg, settings = sae.SAEConfig(d_in={D}, d_sae={F}, k={K}), sae.SAETrainConfig(steps=8, init_rows=64, log_every=1, learning_rate=1e-2)
    buffer = sae.ActivationBuffer((rows[i : i + 9] for i in range(0, 490, 9)), 32, 64)
    return sae.train_sae(cfg, buffer, settings, jax.random.key(0), mesh=mesh, progress=False, checkpoints=checkpoints, checkpoint_every=2,
                         on_log=on_log)[0]

wanted = train()
try:
    with until_done(sys.argv[1]) as checkpoints:
        train(checkpoints, stop)
except KeyboardInterrupt:
    pass
with until_done(sys.argv[1]) as checkpoints:
    assert checkpoints.steps() == [2, 4]
    found = train(checkpoints)
for name in wanted.params:
    np.testing.assert_array_equal(np.asarray(found.params[name]), np.asarray(wanted.params[name]))
print("equal")
"""
    assert run_python(code, args=(str(tmp_path / "c"),), devices=4).strip().endswith("equal")


def test_a_source_that_fails_midway_is_gone_on_with(tmp_path, lm):
    """The text's reader breaks off at its 70th row; the same command over a whole text ends as if it never had, and every activation is
    served as often as in a run left in peace."""
    served = {"peace": [], "broken": []}

    class Seen(sae.ActivationBuffer):
        """Notes what it serves; what is wound past on the way back is not served."""

        def __init__(self, name, source):
            super().__init__(source, B, 100, seed=3)
            self.name = name

        def __iter__(self):
            for batch in super().__iter__():
                served[self.name].append(batch.copy())
                yield batch

    def text(fails_at=None):
        for number, row in enumerate(endless()):
            if number == fails_at:
                raise OSError("the disk with the text went away")
            yield row

    def harvested(fails_at=None):
        return sae.harvest_activations(*lm, text(fails_at), HOOK, 8)

    peace = train(Seen("peace", harvested()))
    with pytest.raises(OSError, match="the disk with the text went away"), until_done(tmp_path) as checkpoints:
        train(Seen("broken", harvested(fails_at=70)), checkpoints)
    trained_on = len(served["broken"])
    assert 4 <= trained_on < len(served["peace"])
    with until_done(tmp_path) as checkpoints:
        again = train(Seen("broken", harvested()), checkpoints)
    jax.tree.map(np.testing.assert_array_equal, again[0], peace[0])
    assert again[1] == peace[1]
    resumed_at = trained_on // 4 * 4  # of the newest checkpoint; the batches after it are served again since what they did is gone
    whole = served["broken"][:resumed_at] + served["broken"][trained_on:]
    assert len(whole) == len(served["peace"])
    for ours, theirs in zip(whole, served["peace"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_dictionaries_do_not_change_places(tmp_path):
    """Two alike in all but their names: a checkpoint of the one is none of the other."""
    rows, settings = np.concatenate([made_rows(), made_rows()[::-1]], axis=1), sae.SAETrainConfig(**(SETTINGS | {"steps": 8}))
    cfg = sae.SAEConfig(d_in=D, d_sae=F, k=K)

    def run(checkpoints, names, stop=None):
        tasks = {name: sae.SAETask(cfg, settings, reads) for name, reads in names.items()}
        return sae.train_saes(tasks, sae.array_batches(rows, B), jax.random.key(0), progress=False, checkpoints=checkpoints, stop=stop)

    for step in (3, 5):  # the first four batches are read ahead, and nothing is saved before they are used up
        with pytest.raises(sae.Stopped) as stopped, until_done(tmp_path) as checkpoints:
            run(checkpoints, {"a": 0, "b": D}, stop=iter([False] * (step - 1) + [True]).__next__)
        assert (stopped.value.step, stopped.value.saved) == (step, step > 4)
    with until_done(tmp_path) as checkpoints, pytest.raises(sae.SAEError, match="another tasks"):
        run(checkpoints, {"b": D, "a": 0})
    with until_done(tmp_path) as checkpoints:
        assert set(run(checkpoints, {"a": 0, "b": D})) == {"a", "b"}
