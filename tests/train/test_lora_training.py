"""Training an adapter in every objective: gradients by the chain rule of the full model's, the frozen base, resume, a mesh, the verbs."""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_folder
import tiny_grpo as tiny
import tiny_preferences as prefs

import models
from jaxrl_llm.commands import generate, serve
from jaxrl_llm.commands import sft as sft_verb
from jaxrl_llm.config import load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train import preference_step, sft, step
from jaxrl_llm.train.checks import check_dpo, check_grpo, check_online_dpo
from jaxrl_llm.train.config import DPOConfig, GRPOConfig, LoraSettings, LossConfig, OnlineDPOConfig, OptimizerConfig, PairLossConfig, SFTConfig
from jaxrl_llm.train.state import VALUE_HEAD, abstract_state, init_state
from models import ModelError, lora
from models.adapted import Adapted, merged

CONFIG = prefs.CONFIG
LORA = LoraSettings(rank=2, alpha=3.0, targets=("blocks.q", "blocks.o", "blocks.down"))
SCALE = 1.5
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-3)


def drawn(seed=0, settings=LORA):
    """An adapter whose B is not zero."""
    rng = np.random.default_rng(seed)
    fresh = lora.init_lora(CONFIG, settings.adapter, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), fresh)


def by_the_chain_rule(adapter, full):
    """The gradient by A and B, from that by the matrices: dA = scale dW B^T, dB = scale A^T dW, by numpy for each layer and leaf."""
    flat = {"q": (1, 2), "o": (2, 1), "down": (1, 1)}  # axes of inputs and of outputs
    found = {}
    for leaf, pair in adapter["blocks"].items():
        a, b, w = (np.asarray(x, np.float64) for x in (pair["a"], pair["b"], full["blocks"][leaf]))
        inputs = int(np.prod(a.shape[1 : 1 + flat[leaf][0]]))
        A, B, W = a.reshape(len(a), inputs, -1), b.reshape(len(b), b.shape[1], -1), w.reshape(len(w), inputs, -1)
        found[leaf] = {
            "a": SCALE * np.einsum("lio,lro->lir", W, B).reshape(a.shape),
            "b": SCALE * np.einsum("lir,lio->lro", A, W).reshape(b.shape),
        }
    return {"blocks": found}


def assert_chain_rule(with_adapter, without, adapter):
    assert np.abs(with_adapter["blocks"]["q"]["a"]).max() > 1e-4
    for found, wanted in zip(jax.tree.leaves(with_adapter), jax.tree.leaves(by_the_chain_rule(adapter, without)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-6)


def grpo_batch(groups=3, samples=2, width=5):
    rng = np.random.default_rng(1)
    rows = groups * samples
    draw = lambda shape: rng.integers(2, tiny.VOCAB, shape).astype(np.int32)  # noqa: E731
    return {
        "prompts": draw((1, groups, 4)), "prompt_lengths": np.array([[1, 4, 2]], np.int32), "completions": draw((1, rows, width)),
        "lengths": rng.integers(1, width + 1, (1, rows)).astype(np.int32), "sampler_logps": -rng.uniform(0, 3, (1, rows, width)).astype(np.float32),
        "rewards": rng.normal(size=(1, rows)).astype(np.float32), "valid": np.ones((1, rows), bool),
        "group_ids": np.repeat(np.arange(groups), samples)[None].astype(np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_grpo_s_gradient_is_the_chain_rule_of_the_full_one(micro_batches):
    spec = step.step_spec(CONFIG, GRPOConfig(max_new_tokens=5, optimizer=OPTIMIZER, lora=LORA))
    batch = {name: x.reshape(micro_batches, -1, *x.shape[2:]) for name, x in grpo_batch().items()}
    adapter, base = drawn(), prefs.params()
    loss, _, grads, logps = jax.jit(step.loss_and_grads, static_argnums=0)(spec, adapter, batch, base)
    full = dataclasses.replace(spec, lora=None)
    wanted = jax.jit(step.loss_and_grads, static_argnums=0)(full, lora.merge(base, adapter, SCALE), batch)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(logps, wanted[3], rtol=1e-4, atol=1e-5)
    assert_chain_rule(grads, wanted[2], adapter)


@pytest.mark.parametrize("kind", ["sigmoid", "kto"])
def test_preferences_gradient_is_the_chain_rule_of_the_full_one(kind):
    spec = preference_step.preference_spec(CONFIG, DPOConfig(loss=prefs.LOSSES[kind], optimizer=OPTIMIZER, lora=LORA))
    batch = prefs.rows_for(kind, 6).batch(np.arange(6), rows=3, ref_sums=np.random.default_rng(1).normal(-12, 3, (6, 2)).astype(np.float32))
    adapter, base = drawn(), prefs.params()
    loss, _, grads = jax.jit(preference_step.loss_and_grads, static_argnums=0)(spec, adapter, batch, base)
    full = dataclasses.replace(spec, lora=None)
    wanted = jax.jit(preference_step.loss_and_grads, static_argnums=0)(full, lora.merge(base, adapter, SCALE), batch)
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    assert_chain_rule(grads, wanted[2], adapter)


def sft_batches():
    for at in itertools.count():
        rng = np.random.default_rng([4, at])
        tokens = 2 + (rng.integers(0, 14, (6, 1)) + np.arange(8)) % 14
        yield tokens, np.arange(8) < rng.integers(2, 9, (6, 1))


def train_sft(folder=None, settings=LORA, steps=3, cfg=CONFIG, start=None, **changes):
    config = SFTConfig(steps=steps, log_every=1, optimizer=OPTIMIZER, lora=settings, **changes)
    run_dir = None if folder is None else RunDir(folder, {"name": "sft"}, kind="sft")
    return sft.train_sft(cfg, prefs.params() if start is None else start, sft_batches(), config, run_dir, progress=False)


def test_sft_s_gradient_is_the_chain_rule_of_the_full_one():
    spec = sft.SFTSpec(CONFIG, OPTIMIZER, False, None, LORA.adapter)
    batch = sft.micro_batches(*next(sft_batches()), 0)
    adapter, base, of = drawn(), prefs.params(), {"tokens_BT": batch["tokens"][0], "mask_BT": batch["mask"][0], "total": 20.0}
    found = jax.jit(jax.grad(lambda a: sft._micro_loss(a, spec, base, **of)[0]))(adapter)
    full = dataclasses.replace(spec, lora=None)
    wanted = jax.jit(jax.grad(lambda p: sft._micro_loss(p, full, None, **of)[0]))(lora.merge(base, adapter, SCALE))
    assert_chain_rule(found, wanted, adapter)


def assert_adapted(trained, start):
    """Only B and A moved: what they are put into is the start's, bit for bit."""
    adapter = lora.adapter_of(trained)
    assert set(adapter["blocks"]) == {"q", "o", "down"} and np.abs(np.asarray(adapter["blocks"]["q"]["b"])).max() > 1e-3
    base = jax.tree.map(lambda leaf: getattr(leaf, "base", leaf), trained, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sft_learns_with_an_adapter_and_leaves_the_base_alone():
    start = prefs.params()
    trained, history = train_sft(steps=30)
    assert_adapted(trained, start)
    assert history[-1]["loss"] < 0.85 * history[0]["loss"]
    _, full = train_sft(settings=LoraSettings(), steps=1)
    assert history[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-5), "a fresh adapter changes nothing"


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"alpha": 4.0}, {"rank": 3}, {"rank_stabilised": True}, {"targets": ("blocks.q",)}], ids=lambda c: next(iter(c))
)
def test_every_setting_changes_the_result(change, plain_run):
    other = train_sft(settings=dataclasses.replace(LORA, **change), steps=2)[0]
    assert np.abs(tiny.flat(merged(other)) - plain_run).max() > 1e-6


@pytest.fixture(scope="module")
def plain_run():
    return tiny.flat(merged(train_sft(steps=2)[0]))


def test_in_bf16_the_base_is_bf16_and_the_adapter_is_trained_in_fp32():
    cfg = dataclasses.replace(CONFIG, dtype="bfloat16")
    start = jax.tree.map(lambda x: x.astype(jnp.bfloat16), prefs.params())
    trained, _ = train_sft(cfg=cfg, start=start)
    assert_adapted(trained, start)
    kernel = trained["blocks"]["q"]
    assert kernel.base.dtype == jnp.bfloat16 and kernel.a.dtype == kernel.b.dtype == jnp.float32
    far = np.abs(tiny.flat(lora.adapter_of(trained)) - tiny.flat(lora.adapter_of(train_sft()[0])))
    assert 0 < far.max() < 0.03


def grpo(folder, **changes):
    config = dataclasses.replace(tiny.TINY, lora=LORA, keep_checkpoints=9, **changes)
    return tiny.run(folder, config)[0]


@pytest.fixture(scope="module")
def grpo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return folder, grpo(folder)


def test_grpo_trains_the_adapter_and_checkpoints_hold_nothing_else(grpo_run):
    folder, trained = grpo_run
    assert_adapted(trained, tiny.params())
    wanted = abstract_state(tiny.CONFIG, step.step_spec(tiny.CONFIG, tiny.TINY).optimizer, lora=LORA.adapter)
    assert sum(x.size for x in jax.tree.leaves(wanted["params"])) == sum(x.size for x in jax.tree.leaves(lora.adapter_of(trained)))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 4 and all(record["logp_diff_max"] < 1e-4 for record in steps), "the sampler runs the adapted model"


def test_resume_is_bit_exact(grpo_run, tmp_path):
    folder, trained = grpo_run
    shutil.copytree(folder, tmp_path / "run")
    for done in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(done))
    np.testing.assert_array_equal(tiny.flat(grpo(tmp_path / "run")), tiny.flat(trained))


def test_kl_is_against_the_base(tmp_path):
    """Nothing at the first step, where B is zero, and more at the last; the reference takes no memory of its own."""
    loss = LossConfig(kl="k2", kl_coef=0.1)
    grpo(tmp_path / "run", loss=loss)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [record["kl"] for record in records if record["kind"] == "train"]
    assert kl[0] < 1e-9 < 1e-5 < kl[-1]


def test_a_critic_is_trained_beside_the_adapter():
    loss = LossConfig(baseline="value", advantage_scale="batch_std", kl="k1", kl_coef=0.1, kl_place="token_reward")
    spec = step.step_spec(CONFIG, GRPOConfig(max_new_tokens=5, optimizer=OPTIMIZER, loss=loss, lora=LORA))
    base, batch = prefs.params(), grpo_batch()
    state = init_state(CONFIG, spec.optimizer, base, critic=True, lora=spec.lora)
    whole = step.whole(spec.lora, state["params"], base)
    batch["kl"] = step.compiled_kl(spec)(step.trunk(whole), base, batch)
    batch["values"] = step.compiled_values(spec)(whole, batch)
    assert np.abs(batch["kl"]).max() < 1e-5 and np.all(np.asarray(batch["values"]) == 0)
    state, _, _ = step.compiled_update(spec)(state, batch, base)
    assert set(state["params"]) == {"blocks", VALUE_HEAD} and np.abs(state["params"][VALUE_HEAD]["kernel"]).max() > 0
    assert np.abs(state["params"]["blocks"]["q"]["b"]).max() > 0


def test_dpo_and_online_dpo_train_the_adapter_against_the_base(tmp_path):
    start = prefs.params()
    trained, history = prefs.train(dataclasses.replace(prefs.QUICK, lora=LORA), folder=tmp_path / "dpo")
    assert_adapted(trained, start)
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "policy and reference are the same at the first step"
    assert history[-1]["loss"] < history[0]["loss"]
    again, _ = prefs.train(dataclasses.replace(prefs.QUICK, lora=LORA), folder=tmp_path / "dpo")
    np.testing.assert_array_equal(tiny.flat(again), tiny.flat(trained))
    trained, _ = prefs.train_online(tmp_path / "online", dataclasses.replace(prefs.ONLINE, lora=LORA, steps=2))
    assert_adapted(trained, start)
    records = [json.loads(line) for line in (tmp_path / "online" / "metrics.jsonl").read_text().splitlines()]
    first = next(record for record in records if record["kind"] == "train")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_tuning_an_adapted_policy_tunes_all_of_it():
    adapted = lora.adapt(prefs.params(), drawn(), SCALE)
    batches = list(itertools.islice(sft_batches(), 2))
    tune = sft.fine_tuner(CONFIG)
    found, wanted = (tune(params, batches, 1e-2) for params in (adapted, merged(adapted)))
    np.testing.assert_array_equal(tiny.flat(found), tiny.flat(wanted))
    assert not lora.adapter_of(found)


# ------------------------------------------------------------------------------------------------------------ a mesh

MESH = """
import sys; sys.path.insert(0, "tests/train")
import jax, numpy as np, models.sharding
import tiny_grpo as tiny, tiny_preferences as prefs, test_lora_training as t
from jaxrl_llm.train import preference_step, step
from jaxrl_llm.train.state import abstract_state, init_state, start_params
from jaxrl_llm.train.config import DPOConfig, GRPOConfig
assert len(jax.devices()) == 8
cfg = t.CONFIG
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
for settings in (t.LORA, None):  # from a folder: an adapter to train on, or merged
    from jaxrl_llm.commands._policy import load_policy
    import tempfile, pathlib
    from types import SimpleNamespace
    folder = pathlib.Path(tempfile.mkdtemp())
    models.save(folder / "m", cfg, prefs.params())
    t.lora.save_lora(folder / "a", cfg, t.drawn(), t.LORA.adapter)
    params = load_policy(SimpleNamespace(model=str(folder / "m"), adapter=str(folder / "a"), dtype="float32"), mesh, settings)[1]
    assert bool(t.lora.adapter_of(params)) == (settings is not None)
    np.testing.assert_array_equal(tiny.flat(start_params(cfg, params, mesh)), tiny.flat(t.lora.merge(prefs.params(), t.drawn(), t.SCALE)))
    if settings:
        state = init_state(cfg, t.OPTIMIZER, params, mesh, lora=settings.adapter)["params"]
        assert not state["blocks"]["down"]["a"].sharding.is_fully_replicated
        np.testing.assert_array_equal(tiny.flat(state), tiny.flat(t.drawn()))
batch = {name: np.concatenate([x, x], axis=1)[:, :4 if name.startswith("prompt") else 8] for name, x in t.grpo_batch().items()}
spec = step.step_spec(cfg, GRPOConfig(max_new_tokens=5, optimizer=t.OPTIMIZER, lora=t.LORA))
def run(mesh):
    base = start_params(cfg, prefs.params(), mesh)
    state = init_state(cfg, spec.optimizer, None, mesh, lora=spec.lora, seed=3)
    b = batch if mesh is None else jax.device_put(batch, step.batch_shardings(mesh))
    for _ in range(2):
        state, metrics, logps = step.compiled_update(spec, mesh)(state, b, base)
    return state, jax.device_get(metrics), np.asarray(logps)
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
one, many = run(None), run(mesh)
wanted = abstract_state(cfg, spec.optimizer, mesh, lora=spec.lora)
assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, many[0], wanted))
assert not many[0]["params"]["blocks"]["down"]["a"].sharding.is_fully_replicated
np.testing.assert_allclose(tiny.flat(many[0]["params"]), tiny.flat(one[0]["params"]), rtol=1e-3, atol=1e-5)
for a, b in zip(jax.tree.leaves(many[1:]), jax.tree.leaves(one[1:])):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
config = DPOConfig(steps=2, optimizer=t.OPTIMIZER, lora=t.LORA, forward_rows=8)
ends = [prefs.train(config, batch=4, mesh=m, held_out={"same": prefs.pairs(8)}) for m in (None, mesh)]
np.testing.assert_allclose(tiny.flat(ends[1][0]), tiny.flat(ends[0][0]), rtol=1e-3, atol=1e-5)
for one, two in zip(*(end[1] for end in ends)):
    assert abs(one["loss"] - two["loss"]) < 1e-5, (one, two)
print("equal")
"""


def test_mesh_of_eight_devices_gives_the_same_update(run_python):
    assert "equal" in run_python(MESH, devices=8)


# ---------------------------------------------------------------------------------------------------------- settings


def test_settings_without_meaning_are_one_clear_line(tmp_path):
    for check, kind in ((check_grpo, GRPOConfig), (check_dpo, DPOConfig), (check_online_dpo, OnlineDPOConfig)):
        with pytest.raises(UserError, match="lora.rank.*got -1"):
            check(kind(lora=LoraSettings(rank=-1)))
        with pytest.raises(UserError, match="lora.alpha.*got"):
            check(kind(lora=LoraSettings(rank=1, alpha=0.0)))
        with pytest.raises(UserError, match="lora.targets.*empty"):
            check(kind(lora=LoraSettings(rank=1, targets=())))
    with pytest.raises(UserError, match="lora.rank.*got -1"):
        train_sft(settings=LoraSettings(rank=-1))
    with pytest.raises(ModelError, match=r"'q_proj' names no matrix.*nearest: blocks\.q"):
        train_sft(settings=LoraSettings(rank=1, targets=("q_proj",)))


# ------------------------------------------------------------------------------------------------------------- verbs


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("model"))


VERBS = {
    "sft": {"data.fields": "prompt=question,answer=good", "batch_rows": 8, "max_length": 16},
    "dpo": {"data.fields": "prompt=question,chosen=good,rejected=bad", "batch_rows": 8, "max_length": 16},
    "grpo": {
        "data.fields": "prompt=question,answer=good", "reward.name": "exact", "train.num_samples": 8, "train.max_new_tokens": 2,
        "max_prompt_tokens": 16, "schedule.batch_prompts": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_writes_the_merged_policy_and_the_adapter_beside_it(verb, start_folder, tmp_path):
    from jaxrl_llm.cli import main

    folder, source = start_folder
    fields = VERBS[verb] | {
        "model": folder, "data.source": source, "train.steps": 2, "train.optimizer.learning_rate": 0.03, "train.optimizer.warmup_steps": 0,
        "train.lora.rank": 2, "train.lora.targets": '("blocks.q", "blocks.down")',
    }  # fmt: skip
    command = [verb, f"--config=configs/{verb}.py", *(f"--config.{name}={value}" for name, value in fields.items()), f"--workdir={tmp_path / 'run'}"]
    assert main(command) in (None, 0)
    cfg, base = models.load(folder)
    adapter, settings = lora.load_lora(tmp_path / "run" / "adapter", cfg)
    assert (set(settings.targets), settings.rank, settings.alpha) == ({"blocks.q", "blocks.down"}, 2, 32.0)
    assert json.loads((tmp_path / "run" / "adapter" / lora.CONFIG).read_text())["base_model_name_or_path"] == str(folder)
    policy = models.load(tmp_path / "run" / "policy")[1]
    for one, other in zip(jax.tree.leaves(lora.merge(base, adapter, settings.scale)), jax.tree.leaves(policy), strict=True):
        np.testing.assert_array_equal(one, other)
    if verb != "grpo":  # whose reward may have been the same for all samples
        assert np.abs(np.asarray(policy["blocks"]["q"]) - np.asarray(base["blocks"]["q"])).max() > 1e-4
    if importlib.util.find_spec("peft"):
        import peft
        import transformers

        theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run" / "adapter")
        found = theirs.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"].numpy()
        np.testing.assert_allclose(found, np.asarray(policy["blocks"]["down"])[0].T, atol=1e-6)


@pytest.fixture(scope="module")
def adapter_folder(start_folder, tmp_path_factory):
    """A PEFT folder of an adapter whose B is not zero."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    lora.save_lora(folder, CONFIG, drawn(), LORA.adapter, str(start_folder[0]))
    return folder


OF_LORA = {"train.lora.rank": 2, "train.lora.alpha": 3.0, "train.lora.targets": '("blocks.q", "blocks.o", "blocks.down")'}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_starts_from_an_adapter(verb, start_folder, adapter_folder, tmp_path):
    """Steps of no length: it is trained on and written again for the same base, or merged. The reference, if any, is the adapted policy."""
    folder, source = start_folder
    fields = VERBS[verb] | {"model": str(folder), "data.source": str(source), "adapter": str(adapter_folder), "train.steps": 1}
    fields |= {"train.optimizer.learning_rate": 0.0}
    if verb == "grpo":
        fields |= {"train.loss.kl": "k3", "train.loss.kl_coef": 0.1}
    run = importlib.import_module(f"jaxrl_llm.commands.{verb}").run
    cfg, base = models.load(folder)
    wanted = lora.merge(base, drawn(), SCALE)
    for name, more in (("on", OF_LORA), ("merged", {})):
        run(load_config(f"configs/{verb}.py", fields | more), str(tmp_path / name))
        found = models.load(tmp_path / name / "policy")[1]
        np.testing.assert_allclose(tiny.flat(found), tiny.flat(wanted), rtol=1e-6, atol=1e-6)
        record = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        if verb != "sft":
            assert record["loss"] == pytest.approx(np.log(2), abs=1e-5) if verb == "dpo" else abs(record["kl"]) < 1e-6
    jax.tree.map(np.testing.assert_array_equal, lora.load_lora(tmp_path / "on" / "adapter", cfg)[0], drawn())
    assert json.loads((tmp_path / "on" / "adapter" / lora.CONFIG).read_text())["base_model_name_or_path"] == str(folder)
    assert not (tmp_path / "merged" / "adapter").exists()


def test_an_adapter_trained_on_is_that_of_the_folder(start_folder, adapter_folder, tmp_path):
    folder, source = start_folder
    fields = VERBS["sft"] | {"model": str(folder), "data.source": str(source), "adapter": str(adapter_folder), "train.steps": 2}
    for change in ({"train.lora.rank": 3}, {"train.lora.alpha": 4.0}, {"train.lora.targets": "blocks.q"}):
        told = r"set train.lora's rank=2, alpha=3, rank_stabilised=False, targets=blocks.down,blocks.o,blocks.q, or rank=0"
        with pytest.raises(UserError, match=told):
            sft_verb.run(load_config("configs/sft.py", fields | OF_LORA | change), str(tmp_path / "run"))
    with pytest.raises(ModelError, match="nowhere/adapter_config.json: no such file"):
        sft_verb.run(load_config("configs/sft.py", fields | {"adapter": str(tmp_path / "nowhere")}), str(tmp_path / "run"))


def test_sampling_and_serving_take_an_adapter(start_folder, adapter_folder, monkeypatch, capsys):
    folder, _ = start_folder
    wanted, seen = lora.merge(models.load(folder)[1], drawn(), SCALE), []
    config = load_config("configs/generate.py", {"model": str(folder), "adapter": str(adapter_folder), "prompt": "1 +", "max_new_tokens": 2})
    real = models.generate
    monkeypatch.setattr(models, "generate", lambda cfg, params, *args, **how: seen.append(params) or real(cfg, params, *args, **how))
    generate.run(config)
    assert "=== prompt" in capsys.readouterr().out

    class Stop(Exception):
        pass

    def engine(cfg, params, **_):
        seen.append(params)
        raise Stop

    monkeypatch.setattr("jaxrl_llm.serve.engine.Engine", engine)
    with pytest.raises(Stop):
        serve.make_server(load_config("configs/serve.py", {"model": str(folder), "adapter": str(adapter_folder)}))
    assert len(seen) == 2
    for params in seen:
        np.testing.assert_array_equal(tiny.flat(params), tiny.flat(wanted))


def test_pair_losses_without_a_reference_need_no_base(tmp_path):
    """SimPO has none: the adapter is all that there is beside the frozen parameters."""
    trained, _ = prefs.train(dataclasses.replace(prefs.QUICK, steps=1, loss=prefs.LOSSES["simpo"], lora=LORA))
    assert_adapted(trained, prefs.params())
    assert not PairLossConfig(kind="simpo").needs_reference
