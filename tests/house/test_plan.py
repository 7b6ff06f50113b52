"""Planning: model shapes by name, target configs, meshes, and numbers that follow the sizes."""

import contextlib
import dataclasses
import importlib.util
import json
import math

import jax
import pytest

from jaxrl_llm import cli
from jaxrl_llm.commands import plan as plan_command
from jaxrl_llm.commands import plan_cost, plan_programs
from jaxrl_llm.commands.plan_target import DEFAULTS, PRESETS, choose_layout, choose_rollout_layout, resolve_model, target_sizes
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.runtime import parse_axes
from jaxrl_llm.train.config import LoraSettings, LossConfig, PairLossConfig, PreferenceLossConfig
from models.errors import ModelError
from models.sharding import make_mesh

TINY = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
PRESET_SIZES = {"qwen2.5-0.5b": 0.494, "Qwen/Qwen2.5-Math-1.5B": 1.544, "qwen2.5-7b": 7.616, "qwen3-30b-a3b": 30.532, "mixtral-8x7b": 46.703}
PRESET_SIZES |= {"deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7.616, "allenai/Llama-3.1-Tulu-3-8B-SFT": 8.030}
SMALL = ("--config.prompts=8", "--config.num_samples=2", "--config.prompt_tokens=16", "--config.max_new_tokens=8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.mark.parametrize(("name", "billions"), PRESET_SIZES.items())
def test_presets_have_the_published_number_of_parameters(name, billions):
    assert resolve_model(name, "bfloat16").param_count() == pytest.approx(billions * 1e9, rel=1e-3)


def test_every_preset_is_a_model():
    assert all(resolve_model(name, "float32").dtype == "float32" for name in PRESETS)


def test_a_model_that_is_nowhere_names_the_nearest_preset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no preset, folder or hub id 'qwen2.5-05b': did you mean qwen2.5-0.5b"):
        resolve_model("qwen2.5-05b", "float32")
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        resolve_model(str(tmp_path), "float32")


PLANS = {
    "one": ("--config.mesh=cpu:1",),
    "four": ("--config.mesh=cpu:4",),
    "tensor": ("--config.mesh=cpu:4", "--config.layout=fsdp=2,tensor=2"),
    "dpo": ("--config.mesh=cpu:1", "--config.target=configs/dpo.py", "--config.remat=True"),
    "kto": ("--config.mesh=cpu:1", "--config.target=configs/dpo.py:kto", "--config.remat=True"),
    "online": ("--config.mesh=cpu:4", "--config.target=configs/online_dpo.py", "--config.remat=True"),
    "simpo": ("--config.mesh=cpu:1", "--config.target=configs/online_dpo.py:simpo", "--config.micro_batch_rows=2"),
    "texts": ("--config.mesh=cpu:1", "--config.target=configs/sft.py", "--config.remat=True", "--config.prompts=16", "--config.micro_batch_rows=8"),
    "apart": ("--config.mesh=cpu:4", "--config.rollout_layout=data=4"),
    "split": ("--config.mesh=cpu:1", "--config.micro_batch_rows=4", "--config.rollout_rows=8", "--config.max_new_tokens=16"),
}
RUN_PLANS = """
import json, sys
from jaxrl_llm import cli
for flags in json.loads(sys.argv[1]):
    assert cli.main(['plan', '--config.json=True', '--config.dtype=float32', *flags]) == 0
"""


@pytest.fixture(scope="module")
def plans(tiny, run_python):
    """Each of PLANS as the command line prints it, from one process with four devices."""
    flags = [[f"--config.model={tiny}", *SMALL, *own] for own in PLANS.values()]
    out = run_python(RUN_PLANS, (json.dumps(flags),), devices=4)
    return dict(zip(PLANS, map(json.loads, out.splitlines()), strict=True))


def test_numbers_follow_the_sizes(plans, tiny):
    one, four = plans["one"], plans["four"]
    model = resolve_model(tiny, "float32")
    assert one["parameters"] == model.param_count() and one["layout"] == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    # fp32 parameters and AdamW's two moments, the step's own arrays beside them.
    state = 3 * 4 * model.param_count()
    assert state < one["train_step"]["argument_bytes"] < state + 4000
    assert four["layout"]["fsdp"] == 4
    assert four["train_step"]["argument_bytes"] < 0.3 * one["train_step"]["argument_bytes"]
    assert four["train_step"]["flops"] == one["train_step"]["flops"] == pytest.approx(4 * one["generate"]["flops"], rel=1e-6)
    assert four["layout"] | {"tensor": 2, "fsdp": 2} == plans["tensor"]["layout"] != four["layout"]
    assert one["generate"]["fits"] is True and one["memory_gib"] > four["memory_gib"] > 0


def test_batches_and_length_change_the_plan(plans):
    one, split = plans["one"], plans["split"]
    assert (one["train_step"]["micro_batches"], split["train_step"]["micro_batches"]) == (1, 4)
    assert (one["generate"]["batches"], split["generate"]["batches"]) == (1, 2)
    # Half of the rows at once takes less memory, although each is longer.
    assert split["train_step"]["temporary_bytes"] < one["train_step"]["temporary_bytes"]
    assert split["train_step"]["flops"] > 1.2 * one["train_step"]["flops"]
    assert split["generate"]["flops"] > 1.2 * one["generate"]["flops"]


SIZES = {"mesh": "cpu:1", "dtype": "float32", "prompts": 4, "num_samples": 2, "prompt_tokens": 16, "max_new_tokens": 8}
OTHERS = {"dtype": "bfloat16", "prompts": 6, "num_samples": 4, "prompt_tokens": 24, "max_new_tokens": 12, "rollout_rows": 4}
OTHERS |= {"micro_batch_rows": 2, "remat": False, "remat_keep": "products", "rollout_refill": True, "lora_rank": 2}
OTHERS |= {"samples_together": 1, "inner_epochs": 2, "updates_per_epoch": 2, "attention": "splash"}


@pytest.fixture
def planned(tiny, monkeypatch):
    """(loss, changes) -> the plan of SIZES with them, traced but not compiled: the arguments stand for all memory."""

    def traced(program, *arguments, endless=1):
        program.trace(*arguments)
        own = plan_cost.bytes_a_device(arguments)
        return {"argument_bytes": own, "output_bytes": 0, "temporary_bytes": 0, "total_bytes": own, "collectives": {}, "refused": ""}

    def plan(loss=None, **changes):
        sizes = target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, **changes}))
        found = plan_command.plan(sizes | ({"loss": LossConfig(**loss), "keeps_start": "kl" in loss} if loss else {}))
        return {name: {key: value for key, value in found[name].items() if key != "compile_seconds"} for name in ("generate", "train_step")}

    monkeypatch.setattr(plan_programs, "compiled", traced)
    return plan


@pytest.mark.parametrize("field", sorted(set(OTHERS) - {"attention"}))
def test_another_value_of_a_size_changes_the_plan(planned, field):
    assert planned(**{field: OTHERS[field]}) != planned()


def test_the_attention_of_a_plan_is_that_of_the_update(tiny, monkeypatch):
    seen = []
    traced = lambda program, *given, endless=1: seen.append(str(program.trace(*given).jaxpr)) or {"collectives": {}}  # noqa: E731
    monkeypatch.setattr(plan_programs, "compiled", traced)
    sizes = target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, "attention": "splash"}))
    mesh = make_mesh({}, jax.devices()[:1])
    for loss, program in ((sizes["loss"], plan_programs.update), (PairLossConfig(), plan_programs.update_pairs)):
        program(resolve_model(tiny, "float32"), sizes | {"loss": loss}, mesh)
    assert len(seen) == 2 and all("pallas_call" in text for text in seen)


def test_every_field_has_such_a_test():
    elsewhere = {"target", "model", "mesh", "layout", "rollout_layout", "json"}
    assert elsewhere | set(OTHERS) == set(field_names(load_config("configs/plan.py")))


def test_what_a_run_holds_beside_each_program_is_counted(planned, tiny):
    base, half, one = planned(), planned(dtype="bfloat16"), 4 * resolve_model(tiny, "float32").param_count()
    # While it samples: the training state (fp32, two moments), of which the sampler's arguments are a part.
    counters = base["generate"]["held_bytes"] - 2 * one
    assert 0 < counters < 64 and base["train_step"]["held_bytes"] == 0
    assert half["generate"]["held_bytes"] == 3 * one + counters and half["train_step"]["held_bytes"] == 0
    # Where something reads it later, the policy that training started from too.
    kl = planned({"kl": "k3", "kl_coef": 0.1}, dtype="bfloat16")
    assert kl["generate"]["held_bytes"] == 3 * one + counters + one // 2 and kl["train_step"]["held_bytes"] == one // 2
    # Keys and values (two heads of 8, one layer) of 16 tokens for each of the 4 x 2 completions, or of as many as are decoded at once.
    copies = lambda **sizes: planned(rollout_refill=True, **sizes)["generate"]["held_bytes"] - base["generate"]["held_bytes"]  # noqa: E731
    assert copies() == 8 * 16 * 2 * (2 * 8) * 4 and copies(rollout_rows=4) == copies() // 2


def test_an_adapter_is_all_that_is_trained(planned, tiny):
    """Its moments and itself in fp32, and the model once, in the dtype it computes in, however many programs and a reference read it."""
    model = resolve_model(tiny, "bfloat16")
    d, heads, kv, ff = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim, model.d_ff
    adapter = 2 * model.n_layers * 4 * (2 * (d + heads) + 2 * (d + kv) + 3 * (d + ff))  # rank x bytes x (inputs + outputs of each matrix)
    base = 2 * model.param_count()
    plain, lora, kl = planned(dtype="bfloat16"), planned(dtype="bfloat16", lora_rank=2), planned({"kl": "k3"}, dtype="bfloat16", lora_rank=2)
    steps = {name: found["train_step"]["argument_bytes"] for name, found in (("plain", plain), ("lora", lora))}
    state = 3 * 4 * model.param_count()
    assert steps["lora"] - base - 3 * adapter == steps["plain"] - state
    assert lora["generate"]["argument_bytes"] == plain["generate"]["argument_bytes"] + adapter
    assert 0 <= lora["generate"]["held_bytes"] - 2 * adapter < 64 and kl["generate"]["held_bytes"] == lora["generate"]["held_bytes"]
    assert kl["train_step"]["held_bytes"] == 0
    assert lora["train_step"]["flops"] == plain["train_step"]["flops"] * 3 // 4


def test_the_start_is_kept_where_something_reads_it(tiny):
    keeps = lambda target: target_sizes(load_config("configs/plan.py", {"model": tiny, "target": target}))["keeps_start"]  # noqa: E731
    named = ("grpo", "grpo.py:ppo", "saerl", "story_rules", "verif", "dpo", "online_dpo", "online_dpo.py:simpo")
    found = [name for name in named if keeps(f"configs/{name}" if ":" in name else f"configs/{name}.py")]
    assert found == ["grpo.py:ppo", "saerl", "story_rules", "verif", "online_dpo"]


def test_kl_and_a_critic_are_counted(planned, tiny):
    step, rows = planned()["train_step"], 4 * 8 * 8
    kl = planned({"kl": "k3", "kl_coef": 0.1})["train_step"]
    assert kl["argument_bytes"] == step["argument_bytes"] + rows and kl["flops"] == step["flops"] * 5 // 4
    priced = planned({"kl": "k1", "kl_coef": 0.1, "kl_place": "sequence_reward"})["train_step"]
    assert priced["flops"] == step["flops"] * 6 // 4
    ppo = planned({"baseline": "value", "advantage_scale": "batch_std"})["train_step"]
    head = 3 * 4 * (resolve_model(tiny, "float32").d_model + 1)
    assert ppo["argument_bytes"] == step["argument_bytes"] + head + rows and ppo["flops"] == step["flops"] * 5 // 4


def test_every_inner_epoch_is_counted(planned, tiny, monkeypatch):
    """... once more the update's passes (itself, twice that backward, recomputed), the weights that they read and what travels; the passes
    before the update once; the first epoch's log-probabilities (4 bytes of 4 x 2 x 8 tokens) are an argument of the others."""
    once, thrice = planned()["train_step"], planned(inner_epochs=3)["train_step"]
    assert (once["epochs"], thrice["epochs"]) == (1, 3) and thrice["argument_bytes"] == once["argument_bytes"] + 4 * 8 * 8
    assert (thrice["flops"], thrice["read_bytes"]) == (3 * once["flops"], 3 * once["read_bytes"])
    kl = {"kl": "k3", "kl_coef": 0.1}
    assert planned(kl, inner_epochs=3)["train_step"]["flops"] == once["flops"] * 13 // 4
    found = {"argument_bytes": 0, "output_bytes": 0, "temporary_bytes": 0, "total_bytes": 0, "refused": ""}
    monkeypatch.setattr(plan_programs, "compiled", lambda *given, **how: found | {"collectives": {"all-gather": 5.0}})
    assert planned(inner_epochs=3)["train_step"]["collectives"] == {"all-gather": 15.0}
    monkeypatch.setattr(plan_programs, "compiled", lambda *given, **how: found | {"collectives": None})
    assert planned(inner_epochs=3)["train_step"]["collectives"] is None
    sizes = lambda target: target_sizes(load_config("configs/plan.py", {"model": tiny, "target": target}))["inner_epochs"]  # noqa: E731
    assert [sizes(f"configs/{name}") for name in ("grpo.py", "grpo.py:ppo", "saerl.py", "online_dpo.py")] == [1, 4, 1, 1]


def test_parts_of_a_rollout_are_updates_of_their_own(planned, monkeypatch, tiny):
    """... each with half the rows and all the weights; the old log-probabilities are one pass more, and an argument as the advantages are."""
    once, halves = planned(num_samples=4)["train_step"], planned(num_samples=4, updates_per_epoch=2)["train_step"]
    assert (once["rows"], halves["rows"], once["updates"], halves["updates"]) == (16, 8, 1, 2)
    assert halves["flops"] == once["flops"] * 5 // 4 and halves["read_bytes"] > 2 * once["read_bytes"]
    of_row = {"completions": 4 * 8, "lengths": 4, "sampler_logps": 4 * 8, "rewards": 4, "valid": 1, "group_ids": 4}
    batch = 4 * 16 * 4 + 4 * 4 + 16 * sum(of_row.values())
    assert halves["argument_bytes"] == once["argument_bytes"] - batch // 2 + 8 * (4 * 8 + 4)
    found = {"argument_bytes": 0, "output_bytes": 0, "temporary_bytes": 0, "total_bytes": 0, "refused": ""}
    monkeypatch.setattr(plan_programs, "compiled", lambda *given, **how: found | {"collectives": {"all-gather": 5.0}})
    assert planned(updates_per_epoch=2, inner_epochs=3)["train_step"]["collectives"] == {"all-gather": 30.0}
    assert target_sizes(load_config("configs/plan.py", {"model": tiny, "target": "configs/grpo.py:gspo"}))["updates_per_epoch"] == 4


def test_the_loss_is_the_targets(tiny):
    sizes = lambda spec: target_sizes(load_config("configs/plan.py", {"model": tiny, "target": spec}))  # noqa: E731
    assert sizes("configs/grpo.py:ppo")["loss"].critic and sizes("configs/grpo.py:ppo")["loss"].kl == "k1"
    assert sizes("configs/story_rules.py")["loss"].kl == "k3" and sizes("configs/saerl.py")["loss"].kl is None
    assert sizes("configs/dpo.py:ipo")["loss"].kind == "ipo"


def test_preferences_are_planned_as_pairs(plans, tiny):
    model = resolve_model(tiny, "float32")
    state = 3 * 4 * model.param_count()
    dpo, kto, online, simpo = (plans[name] for name in ("dpo", "kto", "online", "simpo"))
    # Given pairs: nothing is generated.
    assert "generate" not in dpo and dpo["train_step"]["rows"] == 16 and state < dpo["train_step"]["argument_bytes"] < state + 4000
    assert "train_step" in plan_command.table(dpo) and "generate" not in plan_command.table(dpo)
    assert 0.5 < kto["train_step"]["flops"] / dpo["train_step"]["flops"] < 1
    # Sampled ones, over four devices; what is held beside them is the reference.
    assert online["generate"]["rows"] == 16 and online["layout"]["fsdp"] == 4
    held = online["train_step"]["held_bytes"]
    assert model.param_count() <= held < 2 * model.param_count() and online["train_step"]["argument_bytes"] > state / 4
    assert simpo["train_step"]["micro_batches"] == 4 and simpo["train_step"]["rows"] == 4
    assert online["train_step"]["flops"] == pytest.approx(1.25 * dpo["train_step"]["flops"])


def test_the_sizes_of_preferences_and_what_has_none(tmp_path):
    sizes = target_sizes(load_config("configs/plan.py", {"target": "configs/dpo.py:ipo", "model": "m"}))
    wanted = {"prompts": 32, "prompt_tokens": 256, "max_new_tokens": 256, "sampled": False, "remat": False, "dtype": "float32"}
    assert {name: sizes[name] for name in wanted} == wanted and sizes["loss"].kind == "ipo"
    sizes = target_sizes(load_config("configs/plan.py", {"target": "configs/online_dpo.py", "model": "m", "prompt_tokens": "64"}))
    wanted = {"prompts": 8, "num_samples": 8, "prompt_tokens": 64, "max_new_tokens": 256, "sampled": True}
    assert {name: sizes[name] for name in wanted} == wanted
    with pytest.raises(UserError, match="configs/train_sae.py has no step that plan knows"):
        target_sizes(load_config("configs/plan.py", {"target": "configs/train_sae.py", "model": "m"}))


def test_supervised_training_is_planned_by_its_rows(plans, tiny, planned):
    """Nothing is generated, no prompt is told from its answer; an adapter's update trains the adapter alone."""
    model, texts = resolve_model(tiny, "float32"), plans["texts"]
    state, tokens = 3 * 4 * model.param_count(), 16 * 24  # of a mask of bytes and numbers of four
    assert "generate" not in texts and texts["train_step"]["held_bytes"] == 0
    assert (texts["train_step"]["micro_batches"], texts["train_step"]["rows"]) == (2, 8)
    assert state < texts["train_step"]["argument_bytes"] <= state + 5 * tokens + 100
    assert texts["train_step"]["flops"] == tokens * model.flops_per_token(12) * 4  # with the layers computed again
    assert "train_step" in plan_command.table(texts)

    def traced(packed=False, **changes):
        given = {"target": "configs/sft.py", "model": tiny, "prompts": 16, "prompt_tokens": 16, "max_new_tokens": 8, "remat": True} | changes
        sizes = target_sizes(load_config("configs/plan.py", given))
        sizes["texts"]["packed"] = packed
        return plan_programs.update_texts(model, sizes, make_mesh({}, jax.devices()[:1]))

    whole, packed, adapted = traced(), traced(packed=True), traced(lora_rank=2)
    assert packed["argument_bytes"] == whole["argument_bytes"] + 4 * tokens
    assert adapted["argument_bytes"] < 0.7 * whole["argument_bytes"] and adapted["flops"] == whole["flops"] * 3 / 4
    sizes = target_sizes(load_config("configs/plan.py", {"target": "configs/sft.py:text", "model": "m"}))
    wanted = {"prompts": 32, "prompt_tokens": 256, "max_new_tokens": 256, "sampled": False, "keeps_start": False}
    assert {name: sizes[name] for name in wanted} == wanted


def test_one_stage_needs_what_all_need_together(tiny, monkeypatch):
    model, mesh = dataclasses.replace(resolve_model(tiny, "float32"), n_layers=2), make_mesh({}, jax.devices()[:1])
    sizes = DEFAULTS | {"prompts": 4, "num_samples": 2, "prompt_tokens": 16, "max_new_tokens": 150, "loss": LossConfig(), "lora": LoraSettings()}
    one = plan_programs.generate(model, sizes, mesh)
    module = importlib.import_module("models.generate")
    assert one["stages"] == 4 and module.STAGE == 32
    monkeypatch.setattr(plan_programs, "_one_stage", lambda new: contextlib.nullcontext(4))
    every = plan_programs.generate(model, sizes, mesh)
    assert every["argument_bytes"] == one["argument_bytes"] and every["total_bytes"] == pytest.approx(one["total_bytes"], rel=0.05)


@pytest.fixture
def target(tmp_path, tiny):
    """A config of a run, on a mesh of its own."""
    (tmp_path / "run.py").write_text(f"""
import ml_collections
def get_config(variant=None):
    config = ml_collections.ConfigDict()
    config.model, config.dtype, config.mesh = {tiny!r}, "float32", "fsdp=4,tensor=2"
    config.grpo = ml_collections.ConfigDict(dict(prompts_per_step=12, num_samples=16, max_new_tokens=99, rollout_rows=64, remat=False))
    config.grpo.micro_batch_rows = 32
    return config
""")
    return str(tmp_path / "run.py")


def test_target_config_gives_the_sizes(tmp_path, tiny, target):
    sizes = target_sizes(load_config("configs/plan.py", {"target": target}))
    wanted = {"model": tiny, "dtype": "float32", "prompts": 12, "num_samples": 16, "max_new_tokens": 99, "rollout_rows": 64}
    wanted |= {"remat": False, "micro_batch_rows": 32, "prompt_tokens": DEFAULTS["prompt_tokens"], "mesh": "here"}
    assert {name: sizes[name] for name in wanted} == wanted
    (tmp_path / "none.py").write_text("import ml_collections\ndef get_config(v=None): return ml_collections.ConfigDict()\n")
    with pytest.raises(UserError, match="names no model to load"):
        target_sizes(load_config("configs/plan.py", {"target": str(tmp_path / "none.py")}))


def test_what_is_given_wins_over_the_target(target):
    given = {"prompts": 16, "num_samples": 2, "max_new_tokens": 512, "rollout_rows": 512, "micro_batch_rows": 0, "remat": True}
    given |= {"model": "qwen2.5-0.5b", "dtype": "bfloat16", "prompt_tokens": 256, "layout": "fsdp=-1"}
    sizes = target_sizes(load_config("configs/plan.py", {"target": target, **{name: str(value) for name, value in given.items()}}))
    assert {name: sizes[name] for name in given} == given
    assert choose_layout(sizes, 4) == "fsdp=-1"


def test_the_targets_mesh_is_used_where_it_has_as_many_devices(target):
    sizes = target_sizes(load_config("configs/plan.py", {"target": target}))
    assert choose_layout(sizes, 8) == "fsdp=4,tensor=2"
    # Else as many devices as there are prompts (12) share the batch, and the others the heads.
    layouts = {count: choose_layout(sizes, count) for count in (1, 4, 12, 16, 64, 7, 26)}
    assert layouts[4] == "fsdp=4,tensor=1" and layouts[16] == "fsdp=8,tensor=2" and layouts[64] == "fsdp=8,tensor=8"
    assert layouts[7] == "fsdp=7,tensor=1" and layouts[26] == "fsdp=13,tensor=2" and layouts[1] == "fsdp=1,tensor=1"
    assert layouts[12] == "fsdp=12,tensor=1"


@pytest.mark.parametrize("variant", ["qwen2.5-math-1.5b", "qwen2.5-math-7b"])
@pytest.mark.parametrize(("name", "devices"), [("v5e:2x4", 8), ("v5e:16x16", 256), ("v6e:2x4", 8), ("v5p:4x4x4", 64)])
def test_the_large_configs_have_a_layout_on_each_slice(variant, name, devices):
    config = load_config("configs/plan.py", {"target": f"configs/saerl.py:{variant}", "mesh": name})
    sizes = target_sizes(config)
    axes = parse_axes(choose_layout(sizes, devices))
    assert math.prod(axes.values()) == devices and axes["fsdp"] <= sizes["prompts"] == 128
    model = resolve_model(sizes["model"], sizes["dtype"])
    assert model.d_model % axes["fsdp"] == 0 and model.n_kv_heads % axes.get("tensor", 1) == 0  # nothing is kept whole
    assert sizes["prompt_tokens"] + sizes["max_new_tokens"] <= model.max_position


@pytest.mark.parametrize("variant", ["tulu-3-8b", "r1-distill-qwen-7b"])
def test_the_papers_settings_of_verif_are_planned(variant):
    """512 responses of 4096 tokens to prompts of 1024, a KL term and its reference, on the mesh that the config names."""
    sizes = target_sizes(load_config("configs/plan.py", {"target": f"configs/verif.py:{variant}", "mesh": "v5p:2x2x4"}))
    wanted = {"prompts": 32, "num_samples": 16, "prompt_tokens": 1024, "max_new_tokens": 4096, "dtype": "bfloat16", "sampled": True, "sae": None}
    assert {name: sizes[name] for name in wanted} == wanted and sizes["keeps_start"] and sizes["remat"]
    assert sizes["loss"] == LossConfig(aggregation="token_mean", kl="k3", kl_coef=1e-3, entropy_coef=1e-3, advantage_eps=1e-6)
    assert (choose_layout(sizes, 16), choose_rollout_layout(sizes, 16)) == ("fsdp=16", "data=16")
    assert resolve_model(sizes["model"], sizes["dtype"]).d_model % 16 == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mesh=v5x:2x4", "unknown mesh 'v5x:2x4'"),
        ("--config.mesh=v5e:big", "give the slice's shape in chips, such as v5e:2x4"),
        ("--config.mesh=cpu:none", "give the number of devices"),
        ("--config.mesh=cpu:4096", "plan in a process of its own"),
        ("--config.layout=fsdp", "'fsdp' is not AXIS=NUMBER"),
        ("--config.layout=model=2", "unknown mesh axis 'model'"),
        ("--config.prompts=0", "config key 'prompts' is 0"),
        ("--config.micro_batch_rows=-1", "config key 'micro_batch_rows' is -1: give 0 or more"),
        ("--config.max_new_tokens=999999", "prompt_tokens=256 and max_new_tokens=999999 make 1000255, the context of"),
        ("--config.dtype=float8", "config key 'dtype' is 'float8'"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny, flag, message):
    import jax

    jax.devices()  # this process has its devices already
    assert cli.main(["plan", f"--config.model={tiny}", "--config.mesh=cpu:1", flag]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_without_the_tpu_compiler_it_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest))
    with pytest.raises(UserError, match=r"pip install 'jaxrl-llm\[tpu\]'"):
        plan_command.resolve_devices("v5e:2x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jaxrl-llm[tpu]'")
def test_a_tpu_slice_is_planned_on_this_machine(run_python, tiny):
    flags = [[f"--config.model={tiny}", "--config.mesh=v5e:2x4", *SMALL]]
    found = json.loads(run_python(RUN_PLANS, (json.dumps(flags),)))
    assert found["devices"] == 8 and "v5" in found["device_kind"] and found["memory_gib"] == 16
    least = found["train_step"]["roofline"]
    assert found["train_step"]["fits"] and least["seconds"] == max(least["compute"], least["memory"], least["links"]) > 0
    assert found["generate"]["collectives"]["all-gather"] > 0


@pytest.mark.parametrize(("bytes_there", "fits"), [(10**6, True), (10**5, False)])
def test_a_gpu_mesh_is_planned_on_fake_devices(tiny, monkeypatch, bytes_there, fits):
    """The state of 13,000 parameters takes 160 kB; 24 tokens of 8 rows at one FLOP/s take as long as their FLOPs are many."""
    monkeypatch.setitem(plan_cost.CHIPS, "h200", plan_cost.Chip(bytes_there / 2**30, 1.0, 1e9, 1e9, tpu=False))
    own = lambda program, *given, endless=1: plan_cost.bytes_a_device(given)  # noqa: E731
    sizes = {"output_bytes": 0, "temporary_bytes": 0, "collectives": {"all-reduce": 5e9}, "refused": ""}
    compiled = lambda *given, **how: sizes | dict.fromkeys(("argument_bytes", "total_bytes"), own(*given, **how))  # noqa: E731
    monkeypatch.setattr(plan_programs, "compiled", compiled)
    found = plan_command.plan(target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, "mesh": "h200:1"})))
    step, text = found["train_step"], plan_command.table(found)
    assert (found["device_kind"], found["compiler"], found["memory_gib"]) == ("h200", "cpu", bytes_there / 2**30)
    assert step["fits"] is fits and ("train_step does not fit; try" in text) is not fits
    assert step["roofline"]["compute"] == step["roofline"]["seconds"] == step["flops"] > 0 and step["roofline"]["links"] == 5
    assert "mesh   h200:1: 1 x h200" in text and "links 5.00" in text and "compiled by the CPU's compiler, not by that of h200" in text
    plain = plan_command.plan(target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES})))
    assert plain["device_kind"] == plain["compiler"] == "cpu" and "CPU's compiler" not in plan_command.table(plain)
    assert plain["train_step"]["roofline"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mesh": "h200:2x4"}, "mesh 'h200:2x4': give the number of devices, such as h200:4"),
        ({"mesh": "h300:8"}, "unknown mesh 'h300:8': did you mean h200"),
        ({"mesh": "h200:1", "attention": "cudnn"}, "has no kernel of attention='cudnn': plan with --config.attention=plain"),
    ],
)
def test_what_a_gpu_mesh_cannot_be(tiny, flags, message):
    with pytest.raises(UserError, match=message):
        plan_command.plan(target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, **flags})))


def test_every_chip_has_rates_and_its_mesh_a_name():
    assert {"a100", "h100", "h200"} == {name for name, chip in plan_cost.CHIPS.items() if not chip.tpu}
    for chip in plan_cost.CHIPS.values():
        assert 8 <= chip.memory_gib <= 200 and chip.flops > chip.memory_rate > chip.link_rate > 1e11


def test_sampling_on_another_layout_waits_for_no_parameters(plans, tiny):
    same, apart = plans["four"], plans["apart"]
    assert apart["layout"] == same["layout"] == same["rollout_layout"] and apart["rollout_layout"]["data"] == 4
    assert apart["train_step"]["collectives"] == same["train_step"]["collectives"]
    with_fsdp, whole = (found["generate"]["collectives"].get("all-gather", 0) for found in (same, apart))
    size = 4 * resolve_model(tiny, "float32").param_count()
    # At the least once what three of four devices have: of so small a model the compiler takes the gathers out of the loop over tokens.
    assert with_fsdp > 0.9 * 3 / 4 * size and whole < 0.01 * with_fsdp
    assert apart["generate"]["argument_bytes"] > 3 * same["generate"]["argument_bytes"]
    # What training holds meanwhile shares nothing with it.
    assert apart["generate"]["held_bytes"] > same["generate"]["held_bytes"]
    assert "move" not in same and apart["move"]["argument_bytes"] > size / 4 and apart["move"]["held_bytes"] > 3 * size / 4
    assert 0.5 * size < sum(apart["move"]["collectives"].values()) < 1.5 * size


def test_the_target_s_layout_of_sampling_counts_where_it_fits():
    sizes = {"rollout_layout": "", "target_rollout_layout": "data=2,tensor=4"}
    assert [choose_rollout_layout(sizes, devices) for devices in (8, 4)] == ["data=2,tensor=4", ""]
    assert choose_rollout_layout(sizes | {"rollout_layout": "data=4"}, 4) == "data=4"
    assert choose_rollout_layout(sizes | {"target_rollout_layout": ""}, 8) == ""


HLO = """HloModule jit_step, num_partitions=8
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%fused_start (p: bf16[4,2]) -> bf16[4,16] {
  ROOT %g = bf16[4,16]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8,'y'=2] {'x'}, dimensions={1}
}
%fused_done (p: bf16[4,2]) -> bf16[4,16] {
  ROOT %g = bf16[4,16]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8,'y'=2] {'x'}, dimensions={1}
}
%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = bf16[4,16] fusion(%p), kind=kCustom, calls=%fused_start
  %done = bf16[4,16] fusion(%start), kind=kCustom, calls=%fused_done
  %r = f32[8]{0:T(128)} all-reduce(%x), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%inner_cond (t: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %loop = (s32[], f32[8]) while(%t), condition=%inner_cond, body=%inner_body
  %s = f32[2]{0} reduce-scatter(%x), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
}
%outer_cond (t: (s32[], f32[8])) -> pred[] {
  ROOT %go = pred[] fusion(%t), kind=kLoop, calls=%all_done
}
%all_done (t: (s32[], f32[8])) -> pred[] {
  ROOT %go = pred[] not(%x)
}
%small (x: f32[4]) -> f32[4] {
  %e = (f32[2], f32[2]) all-to-all(%x, %y), channel_id=10, replica_groups={{0,1}}
}
%few (x: f32[4]) -> f32[4] {
  %e = f32[1] all-gather(%x), channel_id=12, replica_groups={{0,1}}
}
%large (x: f32[4]) -> f32[4] {
  %p = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %q = f32[4] collective-permute-done(%p)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]) while(%t), condition=%outer_cond, body=%outer_body
  %either = f32[4] conditional(%i, %a, %b), branch_computations={%small, %large}
  %or = f32[4] conditional(%i, %a, %b), true_computation=%few, false_computation=%small
  %two = (f32[5], f32[5]) all-reduce-start(%a, %b), channel_id=13, replica_groups={}, to_apply=%add
  %both = ((f32[1], f32[3]), (f32[8], f32[24])) all-gather-start(%a, %b), channel_id=14, replica_groups={}
  %cut = ((f32[16]), f32[2]) reduce-scatter-start(%a), channel_id=15, replica_groups={}, to_apply=%add
}
"""


def test_what_travels_between_devices_by_hand():
    """24 rounds of a gather of 4 x 16 x 2 bytes over 8 devices (once, though start and end name it) and a sum of 8 x 4 bytes over 4; outside of
    them a scatter of 2 x 4 bytes over 4; all 5 times; the larger branch of two conditionals; and three that start, over all 8."""
    found = plan_cost.collectives(HLO, endless=5)
    wanted = {"all-gather": 5 * 24 * 128 * 7 / 8 + 128 * 7 / 8, "all-reduce": 5 * 24 * 2 * 32 * 3 / 4 + 2 * 40 * 7 / 8}
    assert found == wanted | {"reduce-scatter": 5 * 8 * 3 + 8 * 7, "collective-permute": 16, "all-to-all": 16 / 2}


COUNTED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxrl_llm.commands.plan_cost import collectives
from models.sharding import make_mesh
mesh = make_mesh({"fsdp": 8})
at = lambda *spec: NamedSharding(mesh, P(*spec))

def program(x, w):
    def body(x, w_i):
        w_i = jax.lax.with_sharding_constraint(w_i, at())
        return jnp.tanh(x @ w_i), None
    return jax.lax.scan(body, x, w)[0]

shapes = [jax.ShapeDtypeStruct((64, 32), "float32", sharding=at("fsdp")), jax.ShapeDtypeStruct((5, 32, 32), "float32", sharding=at(None, "fsdp"))]
text = jax.jit(program, out_shardings=at("fsdp")).lower(*shapes).compile().as_text()
found = collectives(text)
assert found == {"all-gather": 5 * 32 * 32 * 4 * 7 / 8}, found
print("counted")
"""


def test_what_travels_in_a_compiled_loop(run_python):
    assert "counted" in run_python(COUNTED, devices=8)


def test_the_weights_that_a_device_reads(tiny):
    mesh = make_mesh({}, jax.devices()[:1])
    tied = resolve_model(tiny, "float32")
    assert plan_programs._weight_bytes(tied, mesh, 5) == 4 * tied.param_count()
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert plan_programs._weight_bytes(untied, mesh, 5) == 4 * (untied.param_count() - untied.vocab_size * untied.d_model)
    moe = dataclasses.replace(tied, mlp="experts", n_experts=8, experts_per_token=2)
    one = 4 * moe.n_layers * 3 * moe.d_model * moe.d_ff
    read = [plan_programs._weight_bytes(moe, mesh, tokens) for tokens in (1, 3, 4, 100)]
    assert [read[3] - size for size in read] == [6 * one, 2 * one, 0, 0] and read[3] == 4 * moe.param_count()


def test_roofline_by_hand():
    chip = plan_cost.Chip(16, flops=100.0, memory_rate=10.0, link_rate=2.0)
    found = plan_cost.roofline(chip, 4, flops=800.0, read_bytes=30.0, moved={"all-gather": 4.0, "all-reduce": 6.0})
    assert found == {"compute": 2.0, "memory": 3.0, "links": 5.0, "seconds": 5.0}
    assert plan_cost.roofline(chip, 4, 800.0, 30.0, None)["links"] == 0


def test_what_does_not_fit_is_answered_with_a_setting(tiny):
    mesh = make_mesh({"fsdp": -1})
    ways, sizes = mesh.size, DEFAULTS | {"remat": True, "loss": LossConfig()}
    told = lambda name, rows, **changes: plan_command._smaller(name, {"rows": rows}, sizes | changes, mesh)  # noqa: E731
    assert told("train_step", 64 * ways, remat=False).startswith("--config.remat=True")
    assert told("train_step", 64 * ways).startswith(f"--config.micro_batch_rows={32 * ways} ")
    assert told("train_step", 2 * ways).startswith(f"--config.micro_batch_rows={ways} ")
    assert told("train_step", ways).startswith("--config.layout with tensor=2")
    pairs = {"loss": PreferenceLossConfig()}
    assert told("train_step", 64 * ways, **pairs).startswith(f"--config.micro_batch_rows={16 * ways} ")
    assert told("train_step", 2 * ways, **pairs).startswith("--config.layout with tensor=2")
    assert told("move", 0).startswith("--config.rollout_layout with tensor=2")
    assert told("generate", 64 * ways).startswith(f"--config.rollout_rows={32 * ways} ")
    assert told("generate", 8 * ways).startswith("--config.rollout_layout with tensor=2")


def test_saerl_s_autoencoder_is_planned_too(planned, tiny, tmp_path):
    target = tmp_path / "own.py"
    lines = ["from configs.saerl import get_config as get", "def get_config(variant=None):", "    c = get()", "    c.sae.d_sae, c.sae.k = 96, 4"]
    target.write_text("\n".join([*lines, "    return c\n"]))
    sizes = target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, "target": str(target), "prompt_tokens": 16}))
    found = plan_command.plan(sizes)
    assert found["sae_train"]["rows"] == 1024 and found["sae_train"]["flops"] == 3 * 4 * 32 * 96 * 1024
    state = 3 * 4 * (2 * 96 * 32 + 96 + 32)
    assert state < found["sae_train"]["argument_bytes"] - 1024 * 32 * 4 < state + 4 * 96 + 100
    assert found["sae_encode"]["rows"] == 256 and "sae_encode" in plan_command.table(found)
    assert found["sae_train"]["held_bytes"] == 4 * resolve_model(tiny, "float32").param_count()
    # Another place, and another model, than the policy's middle block.
    for line, width in (("    c.sae.hook = 'blocks.0.mlp_act'", 64), ("    c.sae.model = 'qwen2.5-0.5b'", 896)):
        target.write_text("\n".join([*lines, line, "    return c\n"]))
        sizes = target_sizes(load_config("configs/plan.py", {"model": tiny, **SIZES, "target": str(target), "prompt_tokens": 16}))
        assert plan_command.plan(sizes)["sae_train"]["flops"] == 3 * 4 * width * 96 * 1024
    given = tmp_path / "given.py"
    given.write_text("\n".join([*lines, "    c.sae.path = 'sae'", "    return c\n"]))
    assert target_sizes(load_config("configs/plan.py", {"model": tiny, "target": str(given)}))["sae"] is None


def test_what_the_compiler_refuses_is_an_answer_not_a_failure(monkeypatch, tiny):
    class Refusing:
        words = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.82G) exceeds available HBM"

        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.words)

    refusing, place = Refusing(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = plan_cost.compiled(refusing, {"x": jax.ShapeDtypeStruct((3, 5), "float32", sharding=place)})
    assert found["argument_bytes"] == 60 and found["temporary_bytes"] == int(20.82 * 2**30) == found["total_bytes"] - 60
    assert "exceeds available HBM" in found["refused"]
    program = found | {"rows": 8, "batches": 1, "micro_batches": 1, "flops": 1.0, "read_bytes": 1, "stages": 1}
    for name in ("generate", "update"):
        monkeypatch.setattr(plan_programs, name, lambda model, sizes, mesh: dict(program))
    planned = plan_command.plan(target_sizes(load_config("configs/plan.py", {"model": tiny, "mesh": "cpu:1"})))
    text = plan_command.table(planned)
    assert planned["generate"]["fits"] is False and "20.82" in text and "NO" in text and "generate was refused: RESOURCE_EXHAUSTED" in text
    refusing.words = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan_cost.compiled(refusing)
    assert plan_cost.bytes_named("no figure") is None
    other = "Total hbm usage >= 16.25G: reserved 258.03M program 14.67G arguments 1.33G Output size 1.33G. Program hbm requirement 14.67G"
    assert plan_cost.bytes_named(other) == int(14.67 * 2**30)


def test_table_says_what_does_not_fit():
    program = {"compile_seconds": 7.0, "flops": 1e12}
    program |= {"rows": 8, "argument_bytes": 2**30, "output_bytes": 0, "temporary_bytes": 2**31, "total_bytes": 3 * 2**30, "refused": ""}
    program |= {"held_bytes": 2**30, "collectives": {"all-gather": 3e9, "all-reduce": 5e9}}
    least = {"compute": 0.5, "memory": 0.2, "links": 0.75, "seconds": 0.75}
    found = {
        "model": "m", "parameters": 10**9, "dtype": "bfloat16", "mesh": "v5e:2x4", "devices": 8, "device_kind": "TPU", "memory_gib": 2,
        "layout": {"fsdp": 8}, "rollout_layout": {"tensor": 8}, "lora_rank": 0, "compiler": "tpu",
        "generate": {**program, "batches": 2, "fits": True, "roofline": least, "stages": 6, "try": ""},
        "train_step": {**program, "micro_batches": 3, "fits": False, "roofline": None, "try": "--config.remat=True"},
    }  # fmt: skip
    text = plan_command.table(found)
    row = next(line for line in text.splitlines() if line.startswith("train_step"))
    assert row.split() == ["train_step", "1.00", "0.00", "2.00", "1.00", "4.00", "NO"]
    assert "1.000 B parameters" in text and "2 GiB each" in text and "adapter" not in text
    assert "in bfloat16, an adapter of rank 8 is trained" in plan_command.table(found | {"lora_rank": 8})
    lines = {line.split()[0]: line for line in text.splitlines() if "TFLOP" in line}
    assert "compiled in 7 s" in lines["generate"] and "one cache for all new tokens; a run's 6 stages" in text
    assert lines["train_step"].startswith("train_step") and "NO" in text and "2 x 8 rows; compiled in 7 s" in lines["generate"]
    assert "at least 0.75 s: arithmetic 0.50, memory 0.20, links 0.75; GB to a device: all-reduce 5.0, all-gather 3.0\n" in text
    again = plan_command.table(found | {"train_step": found["train_step"] | {"updates": 4}})
    assert "3 x 8 rows; compiled" in text and "3 x 8 rows, 4 times; compiled" in again
    assert "fsdp=8; while sampling tensor=8" in text and "train_step does not fit; try --config.remat=True" in text


@pytest.fixture(scope="module")
def pods_table(repo):
    spec = importlib.util.spec_from_file_location("pods_table", repo / "docs" / "pods_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_of_the_documented_table_can_be_planned(pods_table):
    for name, flags in pods_table.RECIPES.items():
        sizes = target_sizes(load_config("configs/plan.py", dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)))
        devices = math.prod(int(side) for side in sizes["mesh"].partition(":")[2].split("x"))
        for layout in (choose_layout(sizes, devices), choose_rollout_layout(sizes, devices)):
            assert not layout or math.prod(parse_axes(layout).values()) == devices, (name, layout)
        assert resolve_model(sizes["model"], sizes["dtype"]).param_count() > 4e8 and sizes["remat"], name


def test_the_documented_table_has_every_recipe_and_all_fit(pods_table, repo):
    page = (repo / "docs" / "pods.md").read_text()
    made = page.partition(pods_table.BEGIN)[2].partition(pods_table.END)[0]
    rows = [line for line in made.splitlines() if line.startswith("|")][2:]
    assert [row.split(",")[0] + "," + row.split(",")[1] for row in rows if not row.startswith("|  |")] == [f"| {name}" for name in pods_table.RECIPES]
    assert all("| yes |" in row for row in rows) and len(rows) == 2 * len(pods_table.RECIPES) + 2 * 2 + 5
    assert all(f"jaxrl-llm plan {' '.join(flags)}\n" in made for flags in pods_table.RECIPES.values())


def test_a_row_of_the_documented_table(pods_table):
    program = {"argument_bytes": 2**30, "temporary_bytes": 2**29, "held_bytes": 2**28, "total_bytes": 3 * 2**29, "fits": True, "flops": 1.5e15}
    program |= {"roofline": {"compute": 1.0, "memory": 2.0, "links": 0.5, "seconds": 2.0}, "rows": 8, "batches": 3, "micro_batches": 4}
    plan = {"mesh": "v5e:2x4", "layout": {"fsdp": 8, "tensor": 1}, "rollout_layout": {"data": 8}, "generate": program, "train_step": program}
    rows = [line for line in pods_table.table({"a recipe": plan}).splitlines() if line.startswith("|")]
    sizes = "1.00 | 0.50 | 0.25 | 1.75 | yes | 1,500 | 2.00 | 1.00, 2.00, 0.50 |"
    assert rows[2] == f"| a recipe, v5e:2x4: fsdp=8; sampling data=8 | sampling | 3 x 8 | {sizes}" and rows[3] == f"|  | update | 4 x 8 | {sizes}"
