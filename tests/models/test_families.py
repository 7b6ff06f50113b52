"""config.json in both styles, what is refused, and that what we write says the same again."""

import dataclasses
import importlib.util
import json
import re

import jax
import numpy as np
import parity_cases as cases
import pytest

import models
from models import ModelConfig, ModelError, RopeScaling, families
from models.hf_rope import rope_to_hf

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def test_the_documented_table_is_that_of_the_rows(repo):
    """Regenerate with `python -c "from models.families import table; print(table())"`."""
    assert families.table() in (repo / "docs" / "families.md").read_text()
    named = (repo / "README.md").read_text()
    assert all(name.split(" (")[0] in named for family in families.FAMILIES.values() for name in family.models.split(", ") if name != "3.x")


@pytest.mark.parametrize("name", cases.CASES)
def test_config_round_trip(name):
    cfg = ModelConfig.from_hf(cases.CASES[name])
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


def test_both_styles_of_rope_read_alike():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    old = ModelConfig.from_hf({**cases.LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelConfig.from_hf({**cases.LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 64))


def test_written_config_holds_both_styles():
    cfg = ModelConfig(rope_theta=2e4, rope_scaling=RopeScaling("linear", 2.0))
    hf = cfg.to_hf()
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 2e4
    assert hf["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert hf["dtype"] == hf["torch_dtype"] == "float32"
    assert ModelConfig().to_hf()["rope_scaling"] is None


@pytest.mark.parametrize(
    ("base", "changes", "expected"),
    [
        (cases.MISTRAL, {"sliding_window": 9}, (9, 9)),
        (cases.MISTRAL, {"sliding_window": None}, ()),
        (cases.MISTRAL, {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]}, (None, 9)),
        (cases.QWEN2, {"sliding_window": 9, "use_sliding_window": False, "max_window_layers": 0}, ()),
        (cases.QWEN2, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, (None, 9)),
        (cases.QWEN2, {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, ()),
        (
            cases.QWEN3,
            {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            (9, None),
        ),
        (cases.LLAMA, {"sliding_window": 9}, ()),
    ],
)
def test_windows(base, changes, expected):
    assert ModelConfig.from_hf({**base, **changes}).layer_windows == expected


def test_a_family_with_listed_windows_always_writes_them():
    """Ministral's class in transformers needs a window and a list of layer types even where no layer slides."""
    hf = ModelConfig(family="ministral", n_layers=2, bos_token_id=1, eos_token_ids=(2,), max_position=64).to_hf()
    assert (hf["sliding_window"], hf["layer_types"]) == (64, ["full_attention"] * 2)
    mixed = ModelConfig.from_hf(
        {**cases.MISTRAL, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]}
    )
    assert mixed.to_hf()["layer_types"] == ["full_attention", "sliding_attention"]
    assert "layer_types" not in ModelConfig.from_hf({**cases.MISTRAL, "sliding_window": 9}).to_hf()


def test_absent_fields_get_the_family_defaults():
    """The defaults of transformers' own config classes (checked against them where transformers is there)."""
    mistral = {k: v for k, v in cases.MISTRAL.items() if k not in ("sliding_window", "num_key_value_heads")}
    cfg = ModelConfig.from_hf({**mistral, "num_attention_heads": 16})
    assert (cfg.n_kv_heads, cfg.layer_windows) == (8, (4096, 4096))
    llama = {k: v for k, v in cases.LLAMA.items() if k not in ("head_dim", "num_key_value_heads", "rms_norm_eps")}
    cfg = ModelConfig.from_hf(llama)
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.norm_eps, cfg.rope_theta) == (4, 8, 1e-6, 10000.0)
    qwen3 = {k: v for k, v in cases.QWEN3.items() if k != "head_dim"}
    assert ModelConfig.from_hf(qwen3).head_dim == 128
    assert ModelConfig.from_hf({**qwen3, "head_dim": None}).head_dim == 8
    assert ModelConfig.from_hf({**cases.QWEN2, "num_key_value_heads": None}).n_kv_heads == 4


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_defaults_agree_with_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 32, "hidden_size": 2048, "num_hidden_layers": 30, "model_type": model_type}
    theirs = transformers.AutoConfig.for_model(**sizes)
    given = {"vocab_size": 60_000, "intermediate_size": 10}  # end-of-text ids have defaults up to 50,279
    silent = ModelConfig.from_hf({**sizes, **given})
    spoken = ModelConfig.from_hf({**theirs.to_dict(), **given})
    assert silent == spoken


def test_eos_may_be_several():
    assert ModelConfig.from_hf({**cases.LLAMA, "eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert ModelConfig.from_hf({**cases.QWEN2, "eos_token_id": None}).eos_token_ids == ()
    assert dataclasses.replace(ModelConfig(), eos_token_ids=(7, 9)).to_hf()["eos_token_id"] == [7, 9]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"architectures": ["Qwen7ForCausalLM"], "model_type": "qwen7"},
            ["Qwen7ForCausalLM", "nearest", "Qwen3ForCausalLM"],
        ),
        ({"architectures": None, "model_type": "qwen4"}, ["model_type", "'qwen4'", "nearest known is 'qwen"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": None}, ["architectures", "model_type"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers", "'two'"]),
        ({"num_attention_heads": 3}, ["num_attention_heads=3", "num_key_value_heads=2"]),
        ({"head_dim": 7}, ["head_dim=7"]),
        ({"hidden_act": "swish6"}, ["hidden_act", "swish6", "silu"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["rope_scaling.rope_type", "longrope", "yarn"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "layer type"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
    ],
)
def test_refused_with_the_field_named(changes, told):
    with pytest.raises(ModelError) as error:
        ModelConfig.from_hf({**cases.LLAMA, **changes})
    assert "\n" not in str(error.value)
    for part in told:
        assert part in str(error.value)


BASES = {
    "llama": cases.LLAMA,
    "qwen2": {**cases.QWEN2, "use_sliding_window": True, "sliding_window": 4},
    "mistral": cases.MISTRAL,
    "phi3": cases.PHI3,
    "gemma2": cases.GEMMA2,
    "gemma3": cases.GEMMA3,
    "gpt2": cases.GPT2,
    "gpt_neox": cases.GPT_NEOX,
    "gptj": {**cases.GPTJ, "rotary_dim": 4},
}
LONGROPE = {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
SLIDING_LINEAR = {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
WRONG_TYPES = [
    *[("llama", {name: value}, f"{name} must be a positive integer") for name in SIZES for value in ("4", 0, -2, 4.0, True, None, [4])],
    *[("llama", {name: v}, f"{name} must be a positive integer") for name in ("num_key_value_heads", "head_dim") for v in ("4", 0, -2)],
    *[("llama", {"rms_norm_eps": v}, "rms_norm_eps must be a number above 0") for v in ("1e-5", 0, -1e-5, None, float("nan"), True)],
    *[("llama", {"rope_theta": v}, "rope_theta must be a number above 0") for v in ("1e4", 0, None, float("inf"))],
    *[("llama", {"initializer_range": v}, "initializer_range must be a number of at least 0") for v in ("0.02", -1, None)],
    *[("llama", {"tie_word_embeddings": v}, "tie_word_embeddings must be true or false") for v in ("false", 0, 1, None)],
    ("llama", {"attention_bias": "false"}, "attention_bias must be true or false, not 'false'"),
    ("llama", {"mlp_bias": 0}, "mlp_bias must be true or false, not 0"),
    ("llama", {"hidden_act": None}, "hidden_act=null is not supported"),
    ("llama", {"dtype": 32}, "dtype=32 is not supported"),
    ("llama", {"dtype": ""}, "dtype='' is not supported"),
    ("llama", {"torch_dtype": ["float32"], "dtype": None}, "is not supported; known: float32"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures must be a list of names, not 'LlamaForCausalLM'"),
    ("llama", {"architectures": [1]}, "architectures must be a list of names"),
    ("llama", {"architectures": None, "model_type": ["llama"]}, "model_type must be a name"),
    *[("llama", {name: v}, f"{name} must be null or a token id (0..63") for name in ("bos_token_id", "pad_token_id") for v in ("1", 64, True)],
    *[("llama", {"eos_token_id": v}, "eos_token_id must be null, a token id (0..63") for v in ("2", 64, -1, [2, "3"], True, {"id": 2})],
    *[("llama", {name: v}, f"{name} must be null or an object") for name in ("rope_scaling", "rope_parameters") for v in ("x", "", 0, [], False)],
    ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling.rope_type=['linear'] is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor must be a number above 0, not '2'"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor must be a number above 0, not 0"),
    ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta must be a number above 0, not '1e4'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": "half"}}, "rope_parameters.partial_rotary_factor must be a number"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "64"}},
        "rope_scaling.original_max_position_embeddings must be a positive integer, not '64'",
    ),
    (
        "llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 0},
        "original_max_position_embeddings must be a positive integer, not 0",
    ),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": "no"}}, "rope_scaling.truncate must be true or false"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": -1}}, "rope_scaling.mscale must be a number of at least 0"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": "32"}}, "rope_scaling.beta_fast must be a number above 0"),
    ("qwen2", {"use_sliding_window": "false"}, "use_sliding_window must be true or false, not 'false'"),
    ("qwen2", {"max_window_layers": None}, "max_window_layers must be an integer of at least 0, not null"),
    ("qwen2", {"max_window_layers": "1"}, "max_window_layers must be an integer of at least 0, not '1'"),
    ("qwen2", {"layer_types": "full_attention"}, "layer_types must be a list with a name for each layer"),
    ("qwen2", {"layer_types": [0, 1]}, "layer_types must be a list with a name for each layer"),
    *[("mistral", {"sliding_window": v}, "sliding_window must be a positive integer") for v in ("4096", 0, -1, False)],
    ("phi3", LONGROPE, "rope_scaling.rope_type='longrope' is not supported; known: default"),
    ("phi3", {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 rotates 3 of head_dim=8 units; it must be an even number of them"),
    ("phi3", {"partial_rotary_factor": 2.0}, "rotates 16 of head_dim=8 units"),
    ("phi3", {"layer_types": ["full_attention"] * 2}, "layer_types=['full_attention', 'full_attention'] is not supported; known: null"),
    *[(k, {"use_bidirectional_attention": True}, "use_bidirectional_attention=true is not supported") for k in ("gemma2", "gemma3")],
    *[("gemma2", {"attn_logit_softcapping": v}, "attn_logit_softcapping must be a number above 0") for v in ("50", 0, -1.0, True)],
    *[("gemma2", {"query_pre_attn_scalar": v}, "query_pre_attn_scalar must be a number above 0") for v in (None, 0, "256")],
    ("gemma2", {"sliding_window": None}, "sliding_window must be a positive integer, not null"),
    ("gemma2", {"hidden_activation": None}, "hidden_activation=null is not supported"),
    ("gemma2", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one rotary embedding for each layer type is not supported"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported; known: null"),
    ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive integer, not 0"),
    ("gemma3", {"rope_local_base_freq": 0}, "rope_local_base_freq must be a number above 0, not 0"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must be an object with full_attention and sliding_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention must be null or an object, not 3"),
    ("gemma3", SLIDING_LINEAR, "rope_parameters.sliding_attention.rope_type='linear' is not supported; known: default"),
    *[("gpt2", {name: v}, f"{name} must be a positive integer") for name in ("n_embd", "n_layer", "n_head", "n_positions") for v in ("4", 0)],
    ("gpt2", {"n_inner": 0}, "n_inner must be a positive integer, not 0"),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a number above 0, not 0"),
    ("gpt2", {"activation_function": "swish6"}, "activation_function='swish6' is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false is not supported; known: true"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true is not supported"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true is not supported"),
    ("gpt_neox", {"use_parallel_residual": "yes"}, "use_parallel_residual must be true or false, not 'yes'"),
    ("gpt_neox", {"rotary_pct": 0.1}, "rotary_pct=0.1 rotates 0 of head_dim=8 units"),
    ("gpt_neox", {"rotary_emb_base": 0}, "rotary_emb_base must be a number above 0, not 0"),
    ("gptj", {"rotary_dim": None}, "rotary_dim must be a positive integer, not null"),
    *[("gptj", {"rotary_dim": v}, f"rotary_dim={v} rotates {v} of head_dim=8 units") for v in (3, 10)],
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "told"), WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_refused_by_name(base, changes, told):
    """A string that counted as true, a zero width, a null: each was once a model that is not the checkpoint's, or a traceback."""
    with pytest.raises(ModelError) as error:
        ModelConfig.from_hf({**BASES[base], **changes})
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)
    assert told in str(error.value), str(error.value)


@pytest.mark.parametrize("contents", [[], "llama", None, 3])
def test_a_config_that_is_no_object_is_refused(contents):
    with pytest.raises(ModelError, match=r"config.json: must hold a JSON object, not"):
        ModelConfig.from_hf(contents)


def test_old_exports_without_a_padding_token_are_read():
    assert ModelConfig.from_hf({**cases.LLAMA, "pad_token_id": -1}).pad_token_id is None


def test_refused_layer_types():
    on = {**cases.QWEN3, "use_sliding_window": True, "sliding_window": 4}
    with pytest.raises(ModelError, match="layer_types='chunked_attention'"):
        ModelConfig.from_hf({**on, "layer_types": ["chunked_attention", "full_attention"]})
    with pytest.raises(ModelError, match="layer_types names 1"):
        ModelConfig.from_hf({**on, "layer_types": ["full_attention"]})
    with pytest.raises(ModelError, match="use_sliding_window is false"):
        ModelConfig.from_hf({**on, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 2})


@pytest.mark.parametrize(
    ("cfg", "told"),
    [
        (ModelConfig(family="llama", n_layers=2, layer_windows=(4, 4)), "layer_windows"),
        (ModelConfig(family="llama", qkv_bias=True), "o_bias=False"),
        (ModelConfig(family="mistral", mlp_bias=True), "mlp_bias"),
        (ModelConfig(family="qwen2", n_layers=3, layer_windows=(4, None, 5), qkv_bias=True), "layer_windows"),
        (ModelConfig(family="qwen5"), "qwen5"),
        (ModelConfig(family="llama", logit_softcap=30.0, embed_scale=2.0), "logit_softcap=30.0, embed_scale=2.0"),
        (ModelConfig(family="gpt2", rope_theta=5.0), "norm='rms'"),
        (dataclasses.replace(ModelConfig.from_hf(cases.GEMMA2), embed_scale=1.0), "embed_scale=1.0"),
        (dataclasses.replace(ModelConfig.from_hf(cases.PHI3), layer_windows=(4, None)), "layer_types"),
        (dataclasses.replace(ModelConfig.from_hf(cases.GPT2), n_kv_heads=2), "n_kv_heads=2"),
        (dataclasses.replace(ModelConfig.from_hf(BASES["gptj"]), rope_theta=5e5), "rope_theta=500000.0"),
    ],
)
def test_what_a_family_cannot_express_is_not_written(cfg, told):
    with pytest.raises(ModelError, match=told):
        cfg.to_hf()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block": "sandwich"}, "block='sandwich' is not known; known: pre, post, pre_post, parallel, parallel_shared"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"rotary_dim": 3}, "rotary_dim=3 must be even and within 1..head_dim=64"),
        ({"rotary_dim": 66}, "rotary_dim=66"),
    ],
)
def test_a_kind_that_there_is_not_is_refused(changes, told):
    with pytest.raises(ModelError, match=re.escape(told)):
        ModelConfig(**changes)


def test_both_styles_of_gemma3_read_alike():
    new = ModelConfig.from_hf(
        {
            **cases.GEMMA3,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        }
    )
    old = ModelConfig.from_hf({**cases.CASES["gemma3_pattern"], "tie_word_embeddings": False})
    assert new == old
    assert (new.rope_theta, new.local_rope_theta, new.rope_scaling) == (1e6, 1000.0, RopeScaling("linear", 8.0))
    assert (new.layer_windows, new.embed_scale, new.query_scalar) == ((7, None), 32**0.5, 24.0)


def test_what_is_rotated_is_written_as_the_share_that_reads_back():
    """int(head_dim * share) rounds down, so the share must not lie below the whole number."""
    for head_dim in range(2, 130, 2):
        cfg = ModelConfig.from_hf({**cases.PHI3, "head_dim": head_dim})
        for units in range(2, head_dim, 2):
            part = dataclasses.replace(cfg, rotary_dim=units)
            hf = rope_to_hf(part, families.FAMILIES["phi3"])
            assert int(head_dim * hf["partial_rotary_factor"]) == units


def test_param_count_equals_the_tree():
    for config in cases.CASES.values():
        cfg = ModelConfig.from_hf(config)
        assert cfg.param_count() == sum(leaf.size for leaf in jax.tree.leaves(models.abstract_params(cfg)))


def test_flops_by_hand():
    """2 FLOPs a weight of every matrix, 4 N H a key attended to; windows cap the context of their layers."""
    cfg = ModelConfig(vocab_size=100, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=2, d_ff=16)
    matrices = 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 100
    assert cfg.flops_per_token() == 2 * matrices
    assert cfg.flops_per_token(context=10) == 2 * matrices + 2 * 4 * 4 * 2 * 10
    plain = dataclasses.replace(cfg, mlp="plain")
    assert plain.flops_per_token() == 2 * (matrices - 2 * 8 * 16)
    windowed = dataclasses.replace(cfg, layer_windows=(3, None))
    assert windowed.flops_per_token(context=10) == 2 * matrices + 4 * 4 * 2 * (3 + 10)


@pytest.mark.parametrize("changes", [{}, {"mlp": "plain", "block": "parallel_shared", "norm": "layer"}])
def test_flops_match_the_compiler(changes):
    """XLA counts the matrix products of an unrolled forward at full attention within 5% (it adds the elementwise)."""
    cfg = ModelConfig(vocab_size=512, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=512, **changes)
    tokens = jax.ShapeDtypeStruct((1, 64), np.int32)

    def logits(params, tokens):
        return models.unembed(cfg, params, models.forward(cfg, params, tokens, unroll=True).hidden)

    counted = jax.jit(logits).lower(models.abstract_params(cfg), tokens).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(64 * cfg.flops_per_token(context=64), rel=0.05)


def test_a_family_is_one_row(monkeypatch, tmp_path):
    """A family of its own names and biases is read and written by adding a row to the table."""
    row = families.Family(
        "newton",
        "NewtonForCausalLM",
        qkv_bias=True,
        windows="all",
        tensors={"final_norm.scale": families.Tensor("model.last_norm.weight", "D", "D")},
    )
    monkeypatch.setitem(families.FAMILIES, "newton", row)
    config = {**cases.LLAMA, "model_type": "newton", "architectures": ["NewtonForCausalLM"], "sliding_window": 5}
    cfg = ModelConfig.from_hf(config)
    params = cases.random_params(cfg)
    models.save(tmp_path / "new", cfg, params)
    again, loaded = models.load(tmp_path / "new")
    assert (again, again.qkv_bias, again.layer_windows) == (cfg, True, (5, 5))
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    from safetensors import safe_open

    with safe_open(tmp_path / "new" / "model.safetensors", "numpy") as file:
        assert "model.last_norm.weight" in file.keys()  # noqa: SIM118
