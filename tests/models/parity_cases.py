"""Small random checkpoints, one or more a family, made from a seed with numpy alone, and what to run on them.

Used by the golden parity tests, the live ones and `tests/make_golden.py`, so that all see the same weights.
"""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import models

BATCH, TOKENS = 2, 24
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
LLAMA = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}
QWEN3 = {**SMALL, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
MISTRAL = {**SMALL, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}

MIXTRAL = {**SMALL, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **{name: value for name, value in SMALL.items() if name != "intermediate_size"},
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
OLMO2 = {**SMALL, "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
PHI3 = {**SMALL, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "pad_token_id": 0}
_GEMMA = {
    **{name: value for name, value in SMALL.items() if name != "hidden_act"},
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
}
GEMMA2 = {**_GEMMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = {**_GEMMA, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
_GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
GPT2 = {**_GPT, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
GPTJ = {**_GPT, "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "activation_function": "gelu_new", "tie_word_embeddings": False}
GPT_NEOX = {
    **{name: value for name, value in SMALL.items() if name not in ("rms_norm_eps", "head_dim", "num_key_value_heads")},
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def rope(kind: str, theta: float = 10000.0, **values) -> dict:
    """The rope_parameters of transformers 5."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


# name -> config.json. Sequences have 24 tokens, so a window of 7 or a maximum of 16 positions is passed.
CASES: dict[str, dict] = {
    "llama2": {**LLAMA, "num_key_value_heads": 4, "rope_theta": 10000.0, "rope_scaling": None},
    "llama3_scaled": {
        **LLAMA,
        "tie_word_embeddings": True,
        "head_dim": 16,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama_biases_linear": {
        **LLAMA,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_dynamic": {**LLAMA, "max_position_embeddings": 16, **rope("dynamic", factor=2.0)},
    "llama_yarn": {**LLAMA, "head_dim": 16, **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    "llama_yarn_options": {
        **LLAMA,
        "head_dim": 16,
        **rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=1.3,
            truncate=False,
        ),
    },
    "llama_gelu": {**LLAMA, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1, **rope("default")},
    "qwen2": {**QWEN2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **rope("default", 1e6)},
    "qwen2_upper_window": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "rope_theta": 1e6,
    },
    "qwen3": {**QWEN3, "head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, **rope("default", 1e6)},
    "qwen3_layer_types": {
        **QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        **rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=64, attention_factor=0.9),
    },
    "mistral": {**MISTRAL, "num_key_value_heads": 1, **rope("default", 1e6)},
    "ministral_layer_types": {
        **MISTRAL,
        "model_type": "ministral",
        "architectures": ["MinistralForCausalLM"],
        "sliding_window": 7,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_theta": 10000.0,
    },
    "mistral_window": {**MISTRAL, "sliding_window": 7, "rope_theta": 10000.0},
    "mixtral": {**MIXTRAL, "sliding_window": None, "rope_theta": 1e6},
    "mixtral_window": {**MIXTRAL, "sliding_window": 7, "tie_word_embeddings": True, "num_experts_per_tok": 1, **rope("default", 1e6)},
    "qwen3_moe": {**QWEN3_MOE, "head_dim": 16, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3_moe_unnormalised": {**QWEN3_MOE, "attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmo2": {**OLMO2, **rope("default", 5e5)},
    "olmo2_biases": {**OLMO2, "attention_bias": True, "num_key_value_heads": 1, "rope_theta": 10000.0},
    "gemma2": {
        **GEMMA2,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 10.0,
        "rope_theta": 10000.0,
    },
    "gemma2_uncapped": {
        **GEMMA2,
        "attention_bias": True,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        **rope("linear", factor=4.0),
    },
    # The style of transformers 4, then that of 5.
    "gemma3_pattern": {
        **GEMMA3,
        "tie_word_embeddings": True,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3": {
        **GEMMA3,
        "num_hidden_layers": 3,
        "final_logit_softcapping": 10.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {**PHI3, "sliding_window": 7, "rope_theta": 10000.0},
    "phi3_part": {**PHI3, "num_key_value_heads": 4, **rope("default", partial_rotary_factor=0.5)},
    "gpt2": {**GPT2, "n_inner": None, "tie_word_embeddings": True},
    "gpt2_untied": {**GPT2, "n_inner": 48, "activation_function": "relu", "tie_word_embeddings": False},
    "gpt_neox": {**GPT_NEOX, "rotary_pct": 0.5, "rotary_emb_base": 10000, "use_parallel_residual": True},
    "gpt_neox_sequential": {
        **GPT_NEOX,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_parallel_residual": False,
        **rope("linear", 1000.0, factor=4.0, partial_rotary_factor=0.25),
    },
    "gptj": {**GPTJ, "n_inner": None, "rotary_dim": 4},
    "gptj_whole": {**GPTJ, "n_inner": 48, "rotary_dim": 8},
}


def tensors(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Random weights by checkpoint name, of a size that makes every part matter (fp32)."""
    rng = np.random.default_rng(seed)
    if config["model_type"].startswith("gpt"):
        return gpt_tensors(config, rng)
    d, f, h = config["hidden_size"], config.get("moe_intermediate_size", config.get("intermediate_size")), config["head_dim"]
    n, k = config["num_attention_heads"], config["num_key_value_heads"]
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    bias = config.get("attention_bias", kind == "qwen2")
    out: dict[str, np.ndarray] = {}

    def linear(name, rows, columns, with_bias=False):
        out[f"{name}.weight"] = rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)
        if with_bias:
            out[f"{name}.bias"] = rng.standard_normal(rows) * 0.3

    def norm(name, size):
        out[f"{name}.weight"] = (0 if gemma else 1) + 0.2 * rng.standard_normal(size)

    # Gemma's are scaled up when read; tied, large ones would make every model repeat its last token.
    out["model.embed_tokens.weight"] = rng.standard_normal((config["vocab_size"], d)) * (0.3 if gemma else 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        if kind != "olmo2":
            norm(f"{layer}.input_layernorm", d)
        norm(f"{layer}.post_attention_layernorm", d)
        if gemma:
            norm(f"{layer}.pre_feedforward_layernorm", d)
        if gemma or kind == "olmo2":
            norm(f"{layer}.post_feedforward_layernorm", d)
        fused = kind == "phi3"
        for name, rows in (("qkv", (n + 2 * k) * h),) if fused else (("q", n * h), ("k", k * h), ("v", k * h)):
            linear(f"{layer}.self_attn.{name}_proj", rows, d, bias)
        linear(f"{layer}.self_attn.o_proj", d, n * h, bias and kind != "qwen2")
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            norm(f"{layer}.self_attn.q_norm", h)
            norm(f"{layer}.self_attn.k_norm", h)
        if kind == "olmo2":
            norm(f"{layer}.self_attn.q_norm", n * h)
            norm(f"{layer}.self_attn.k_norm", k * h)
        if experts := config.get("num_local_experts", config.get("num_experts")):
            moe, names = ("block_sparse_moe", ("w1", "w3", "w2")) if kind == "mixtral" else ("mlp", ("gate_proj", "up_proj", "down_proj"))
            linear(f"{layer}.{moe}.gate", experts, d)
            for e in range(experts):
                for name, rows, columns in zip(names, (f, f, d), (d, d, f), strict=True):
                    linear(f"{layer}.{moe}.experts.{e}.{name}", rows, columns)
            continue
        for name, rows, columns in (*((("gate_up", 2 * f, d),) if fused else (("gate", f, d), ("up", f, d))), ("down", d, f)):
            linear(f"{layer}.mlp.{name}_proj", rows, columns, config.get("mlp_bias", False))
    norm("model.norm", d)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], d)
    return {name: value.astype(np.float32) for name, value in out.items()}


def gpt_tensors(config: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`tensors` of GPT-2, GPT-J and GPT-NeoX: LayerNorms, plain MLPs, and each its own layout."""
    kind = config["model_type"]
    d, f = config.get("n_embd", config.get("hidden_size")), config.get("n_inner", config.get("intermediate_size")) or 4 * config["n_embd"]
    out: dict[str, np.ndarray] = {}

    def linear(name, rows, columns, with_bias=True):
        weight = rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)
        out[f"{name}.weight"] = weight.T if kind == "gpt2" and "lm_head" not in name else weight
        if with_bias:
            out[f"{name}.bias"] = rng.standard_normal(rows) * 0.3

    def norm(name):
        out[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(d)
        out[f"{name}.bias"] = 0.3 * rng.standard_normal(d)

    neox = kind == "gpt_neox"
    base = "gpt_neox" if neox else "transformer"
    out[f"{base}.embed_in.weight" if neox else f"{base}.wte.weight"] = rng.standard_normal((config["vocab_size"], d))
    if kind == "gpt2":
        out["transformer.wpe.weight"] = rng.standard_normal((config["n_positions"], d))
    for i in range(config["num_hidden_layers"] if neox else config["n_layer"]):
        layer = f"{base}.layers.{i}" if neox else f"{base}.h.{i}"
        norm(f"{layer}.input_layernorm" if neox else f"{layer}.ln_1")
        if kind != "gptj":
            norm(f"{layer}.post_attention_layernorm" if neox else f"{layer}.ln_2")
        if kind == "gptj":
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.attn.{name}", d, d, False)
        else:
            bias = config.get("attention_bias", True)
            linear(f"{layer}.attention.query_key_value" if neox else f"{layer}.attn.c_attn", 3 * d, d, bias)
            linear(f"{layer}.attention.dense" if neox else f"{layer}.attn.c_proj", d, d, bias)
        up, down = {"gpt2": ("c_fc", "c_proj"), "gptj": ("fc_in", "fc_out"), "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h")}[kind]
        linear(f"{layer}.mlp.{up}", f, d)
        linear(f"{layer}.mlp.{down}", d, f)
    norm(f"{base}.final_layer_norm" if neox else f"{base}.ln_f")
    if not config["tie_word_embeddings"]:
        linear("embed_out" if neox else "lm_head", config["vocab_size"], d, kind == "gptj")
    return {name: np.ascontiguousarray(value, np.float32) for name, value in out.items()}


def write_checkpoint(folder: Path, config: dict, seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    """A Hugging Face folder with random weights; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: value.astype(dtype) for name, value in tensors(config, seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def random_params(cfg, seed: int = 0):
    """Random parameters of `cfg` without compiling anything, of a size that makes every part matter."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        scale = 0.3 if leaf.ndim <= 2 else 1.5 / np.sqrt(cfg.d_model)
        return jnp.asarray(centre + scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.abstract_params(cfg))


def case_seed(name: str) -> int:
    return zlib.crc32(name.encode())


def inputs(name: str) -> dict[str, np.ndarray]:
    """tokens [2, 24], lengths [2] (the second row is right-padded) and the first of the long positions."""
    rng = np.random.default_rng(case_seed(name) + 1)
    tokens = rng.integers(3, SMALL["vocab_size"], (BATCH, TOKENS)).astype(np.int32)
    # Dynamic scaling grows the base with the position; 40 times the maximum is far for it.
    offset = np.int32(640 if name == "llama_dynamic" else 100_000)
    if "n_positions" in CASES[name]:  # vectors or a table for so many positions
        offset = np.int32(CASES[name]["n_positions"] - TOKENS)
    return {"tokens": tokens, "lengths": np.array([TOKENS, TOKENS - 7], np.int32), "offset": offset}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
