"""Each kind of block in all forms of the forward pass; its taps; its precision; its logits by sampler and trainer alike."""

import dataclasses
import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity_cases as cases
import pytest

import models
from jaxrl_llm.losses.logprobs import token_logprobs
from jaxrl_llm.train.forward import completion_logprobs
from models import layers
from models.taps import taps_of
from models.transformer import fused, unstacked

pytestmark = pytest.mark.usefixtures("quick_compilation")

T = 10
# One case for each kind: norms after, norms around with soft-caps, two rope bases, part of a head, learned positions, parallel
# residuals of two norms and of one (with a bias on the logits).
KINDS = ("olmo2", "gemma2", "gemma3", "phi3_part", "gpt2", "gpt_neox", "gptj")
ONE_INPUT = ("gpt_neox", "gptj")  # attention and MLP read the same


@functools.cache
def model(name):
    cfg = models.ModelConfig.from_hf(cases.CASES[name])
    return cfg, cases.random_params(cfg)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 64, (4, T)), jnp.int32)


def close(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(float(jnp.abs(b).max()), 1e-3)), found, expected)


def hidden_and_grads(cfg, params, **kwargs):
    def loss(params):
        hidden = models.forward(cfg, params, TOKENS, lengths=jnp.array([T, 3, T, 7]), **kwargs).hidden
        return jnp.sum(jnp.sin(hidden[:, :3])), hidden

    grads, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    if cfg.positions == "learned":  # keys that no rotation tells apart: one shift of all changes no probability
        assert float(jnp.abs(grads["blocks"].pop("k_bias")).max()) < 1e-5
    return hidden[0], grads


@pytest.mark.parametrize("name", KINDS)
def test_every_form_gives_the_same(name, monkeypatch):
    """Scan, loop, remat, chunks of queries; one kernel for q, k and v; a prefix and a cache of one array or one a layer."""
    cfg, params = model(name)
    plain = hidden_and_grads(cfg, params)
    close(hidden_and_grads(cfg, params, remat=True, unroll=True), plain)
    run = jax.jit(functools.partial(models.forward, cfg), static_argnames=("unroll", "return_kv"))
    places = jnp.broadcast_to(jnp.arange(T), (4, T))
    whole = run(params, TOKENS).hidden
    for unroll, given in ((False, fused(params)), (True, unstacked(params))):
        close(run(given, TOKENS, unroll=unroll).hidden, whole)
        prompt = run(params, TOKENS[::2, :4], unroll=unroll, return_kv=True).kv
        joined = jnp.concatenate([jnp.repeat(TOKENS[::2, :4], 2, axis=0), TOKENS[:, 4:]], axis=1)
        cache, found = models.init_cache(cfg, 4, 8, unrolled=unroll), []
        for start, stop in ((4, 8), (8, 9), (9, T)):
            out = run(given, joined[:, start:stop], positions=places[:, start:stop], prefix=prompt, cache=cache, unroll=unroll)
            cache = out.cache
            found.append(out.hidden)
        close(jnp.concatenate(found, axis=1), run(params, joined).hidden[:, 4:])
    monkeypatch.setattr(layers, "QUERIES", 4)
    monkeypatch.setattr(layers, "QUERY_CHUNK", 3)
    close(hidden_and_grads(cfg, params, remat=True), plain)


@pytest.mark.parametrize("name", KINDS)
def test_taps_add_up_and_interventions_reach_what_follows(name):
    cfg, params = model(name)
    names = ("embed", *(f"blocks.{i}.{kind}" for i in range(cfg.n_layers) for kind in taps_of(cfg)), "final_norm")

    def edit(x):  # not the same along the last axis, which LayerNorm would take out again
        return x + 0.3 * jnp.cos(jnp.arange(x.shape[-1]))

    @jax.jit
    def run(choice):
        edits = {n: (lambda x, i=i: jnp.where(choice == i, edit(x), x)) for i, n in enumerate(names)}
        out = models.forward(cfg, params, TOKENS, interventions=edits, taps=names)
        return models.unembed(cfg, params, out.hidden), out.taps

    logits, taps = run(-1)
    close(logits, models.apply(cfg, params, TOKENS)[0])
    np.testing.assert_array_equal(taps["blocks.0.resid_pre"], taps["embed"])
    for i in range(cfg.n_layers):
        tap = lambda kind, i=i: taps[f"blocks.{i}.{kind}"]  # noqa: E731
        close(tap("resid_mid"), tap("resid_pre") + tap("attn_out"))
        close(tap("resid_post"), tap("resid_mid") + tap("mlp_out"))
        if cfg.mlp == "plain":
            close(tap("mlp_act"), layers.ACTIVATIONS[cfg.activation](tap("mlp_pre")))
    for i, edited in enumerate(names):
        changed, found = run(i)
        assert cases.relative_error(np.asarray(changed), np.asarray(logits)) > 1e-4, edited
        close(found[edited], edit(taps[edited]), 1e-4)
        for earlier in names[:i]:
            close(found[earlier], taps[earlier], 1e-4)


# One case a family; Llama's modules are those of Qwen, Mistral and Ministral too, Qwen3's are in test_taps.py.
FAMILY_CASES = ("llama_biases_linear", "mixtral", "qwen3_moe", "olmo2", "phi3", "gemma2", "gemma3", "gpt2", "gpt_neox", "gptj")
HALVES = {"gpt2": ("attn.c_proj", "c_fc", "c_proj"), "gptj": ("attn.out_proj", "fc_in", "fc_out"),
          "gpt_neox": ("attention.dense", "dense_h_to_4h", "dense_4h_to_h"), "phi3": ("self_attn.o_proj", "gate_up_proj", "down_proj")}  # fmt: skip
MLP_NORM = {"gpt2": "ln_2", "gptj": None, "olmo2": None, "gemma2": "pre_feedforward_layernorm", "gemma3": "pre_feedforward_layernorm"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_taps_equal_transformers(name, tmp_path):
    """Against forward hooks: what the heads give and what is added to the residual stream; what enters the MLP, before its norm's scale
    and after; what goes into and comes out of the MLP's activation."""
    import torch
    import transformers

    cases.write_checkpoint(tmp_path, cases.CASES[name], cases.case_seed(name))
    cfg, params = models.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    base = theirs.base_model
    seen = {}

    def keep(tap, pick):
        return lambda module, given, out: seen.update({tap: pick(given, out).detach().numpy()})

    def result(given, out):
        return out[0] if isinstance(out, tuple) else out

    def entered(given, out):
        return given[0]

    def unscaled(norm):
        scale = norm.weight + (cfg.norm == "rms_plus_one")
        return lambda given, out: (out - getattr(norm, "bias", 0)) / scale

    projection, up, down = HALVES.get(name, ("self_attn.o_proj", "gate_proj", "down_proj"))
    mlp_norm = MLP_NORM.get(name, "post_attention_layernorm")
    for i, layer in enumerate(base.layers if hasattr(base, "layers") else base.h):
        gemma = name.startswith("gemma")
        post = gemma or name == "olmo2"
        found = [
            ("attn_z", layer.get_submodule(projection), entered),
            ("attn_out", layer.post_attention_layernorm if post else layer.get_submodule(projection), result),
            ("mlp_in", layer.mlp, entered),
            ("mlp_out", layer.post_feedforward_layernorm if post else layer.mlp, result),
            ("resid_post", layer, result),
        ]
        if mlp_norm:
            norm = layer.get_submodule(mlp_norm)
            found.append(("mlp_normalized", norm, unscaled(norm)))
        if cfg.mlp != "experts":
            pre = (lambda given, out: out.chunk(2, dim=-1)[0]) if name == "phi3" else result
            found += [("mlp_pre", layer.mlp.get_submodule(up), pre), ("mlp_act", layer.mlp.get_submodule(down), entered)]
        for tap, module, pick in found:
            module.register_forward_hook(keep(f"blocks.{i}.{tap}", pick))
    with torch.no_grad():
        theirs(torch.tensor(np.asarray(TOKENS), dtype=torch.long))
    expected = set(taps_of(cfg)) - {"resid_pre", "attn_probs", "resid_mid", "router_logits"}
    assert set(seen) == {f"blocks.{i}.{kind}" for i in range(cfg.n_layers) for kind in expected}
    _, taps = models.apply(cfg, params, TOKENS, taps=tuple(seen))
    for tap, value in seen.items():
        assert cases.relative_error(np.asarray(taps[tap]), value) < 2e-5, tap


# --- precision --------------------------------------------------------------------------------------------------------


def test_norms_round_where_their_family_does():
    """In bf16: Llama rounds before it scales, OLMo 2 and Gemma after; Gemma adds 1 in fp32; LayerNorm is fp32 throughout."""
    rng = np.random.default_rng(1)
    half = lambda a: np.asarray(a, np.float32).astype(ml_dtypes.bfloat16)  # noqa: E731
    x, scale, bias = (half(rng.standard_normal(shape)) for shape in ((64, 32), 32, 32))
    wide, s, b = (a.astype(np.float32) for a in (x, scale, bias))
    unit = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-6))
    centred = wide - wide.mean(-1, keepdims=True)
    expected = {
        "rms": half(s * half(unit).astype(np.float32)),
        "rms_fp32": half(s * unit),
        "rms_plus_one": half((1 + s) * unit),
        "layer": half(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * s + b),
    }
    for kind, value in expected.items():
        cfg = models.ModelConfig(norm=kind, norm_eps=1e-6)
        found = np.asarray(layers.norm(cfg, jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias) if kind == "layer" else None))
        assert found.dtype == ml_dtypes.bfloat16
        same = (found == value).mean()
        assert same > 0.995, (kind, same)  # a last place of fp32 may tip the rounding
    assert (expected["rms"] != expected["rms_fp32"]).mean() > 0.05


def test_the_embedding_scale_is_rounded_to_the_dtype():
    """Gemma's sqrt(3072) = 55.4256 is 55.5 in bf16."""
    cfg = models.ModelConfig(embed_scale=3072**0.5, dtype="bfloat16", d_model=4)
    table = jnp.ones((3, 4), jnp.bfloat16)
    x = layers.embed_at(cfg, {"embedding": table}, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    assert x.dtype == jnp.bfloat16 and (np.asarray(x, np.float32) == 55.5).all()


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_stays_near_fp32(name):
    cfg, params = model(name)
    plain, _ = models.apply(cfg, params, TOKENS)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    out = models.forward(dataclasses.replace(cfg, dtype="bfloat16"), half, TOKENS)
    logits = models.unembed(cfg, half, out.hidden)
    assert out.hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((logits - plain) ** 2) / jnp.mean(plain**2))
    assert 1e-4 < error < 0.1


def test_a_position_past_the_learned_ones_makes_no_nan():
    """Padding past the context, as a wide batch has it, must not reach the tokens before it."""
    cfg, params = model("gpt2")
    cfg = dataclasses.replace(cfg, max_position=6)
    params = {**params, "embed": {**params["embed"], "positions": params["embed"]["positions"][:6]}}
    run = jax.jit(lambda tokens: models.forward(cfg, params, tokens).hidden)
    wide = run(TOKENS)
    assert np.isfinite(wide).all()
    close(wide[:, :6], run(TOKENS[:, :6]))


# --- from hidden states to log-probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "gptj"])
@pytest.mark.parametrize("unrolled", [True, False])
def test_sampler_and_trainer_give_the_same_log_probabilities(name, unrolled, monkeypatch):
    """With a soft-cap and with a bias on the logits, at a temperature, in chunks; both through loop and scan."""
    module = importlib.import_module("models.generate")  # `models.generate` is the function
    monkeypatch.setattr(module, "UNROLLED_LAYERS", 8 * unrolled)
    cfg, params = model(name)
    prompts = [[5, 6, 7, 8], [9, 10]]
    out = models.generate(cfg, params, prompts, max_new_tokens=6, num_samples=2, temperature=1.3, stop_tokens=(), seed=1)
    tokens, lengths = np.array([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32), np.array([4, 2])
    run = jax.jit(functools.partial(completion_logprobs, cfg, temperature=1.3, chunk=8))
    logps, _ = run(params, tokens, lengths, out.completion_tokens_NT, out.completion_lengths_N)
    np.testing.assert_allclose(out.logps_NT, logps, atol=2e-5)
    full = jax.nn.log_softmax(models.apply(cfg, params, np.array([[5, 6, 7, 8, *row] for row in out.completion_tokens_NT[:2]]))[0] / 1.3)
    chosen = np.take_along_axis(np.asarray(full)[:, 3:-1], out.completion_tokens_NT[:2, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logps_NT[:2], chosen, atol=2e-5)


def test_soft_cap_and_bias_by_hand():
    cfg = dataclasses.replace(model("gptj")[0], logit_softcap=2.0)
    params = model("gptj")[1]
    hidden = np.random.default_rng(0).standard_normal((2, 3, cfg.d_model)).astype(np.float32)
    plain = hidden @ np.asarray(params["lm_head"]["kernel"]) + np.asarray(params["lm_head"]["bias"])
    close(models.unembed(cfg, params, hidden), 2 * np.tanh(plain / 2))
    assert np.abs(plain).max() > 2


def test_log_probabilities_take_a_matrix_or_a_head_alike():
    cfg, params = model("olmo2")
    hidden = jax.random.normal(jax.random.key(0), (2, 7, cfg.d_model))
    targets = TOKENS[:2, :7]
    expected = token_logprobs(hidden, models.unembed_matrix(cfg, params), targets, chunk=4, with_entropy=True)
    jax.tree.map(np.testing.assert_array_equal, token_logprobs(hidden, models.head(cfg, params), targets, chunk=4, with_entropy=True), expected)


@pytest.mark.parametrize("chunk", [None, 6])
def test_gradients_through_a_soft_cap(chunk):
    """Of the trainers' log-probabilities, along the gradient, against a central difference; in one chunk and in several."""
    cfg, params = model("gemma2")

    @jax.jit
    def loss(params):
        hidden = models.forward(cfg, params, TOKENS[:, :-1]).hidden
        return jnp.mean(token_logprobs(hidden, models.head(cfg, params), TOKENS[:, 1:], chunk=chunk)[0])

    grads = jax.jit(jax.grad(loss))(params)
    size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    moved = lambda step: loss(jax.tree.map(lambda p, g: p + step * g / size, params, grads))  # noqa: E731
    assert float(size) == pytest.approx(float(moved(5e-3) - moved(-5e-3)) / 1e-2, rel=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_init(name):
    """Shapes as declared, every norm the identity, biases zero: a fresh model of each kind is finite."""
    cfg = model(name)[0]
    params = models.init(cfg, jax.random.key(0))
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params) == models.abstract_params(cfg)
    unit = 0.0 if cfg.norm == "rms_plus_one" else 1.0
    for group in ("blocks", "final_norm"):
        for leaf, value in params[group].items():
            if leaf.endswith("bias"):
                assert not np.asarray(value).any(), leaf
            elif leaf.endswith(("norm", "scale")):
                assert (np.asarray(value) == unit).all(), leaf
    assert np.isfinite(models.forward(cfg, params, TOKENS).hidden).all()
