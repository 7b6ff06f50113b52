"""Named activations: what they are, replacing them, stopping early, and that asking for none costs nothing."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest

import models
from models import ModelError
from models.attention import attention_mask
from models.layers import Block, rms_norm
from models.rope import rope_table
from models.taps import taps_of

CASE = "qwen3_layer_types"  # one windowed layer, one full; biases; q/k norm; YaRN
NAMES = ("embed", *(f"blocks.{i}.{kind}" for i in range(2) for kind in taps_of(models.ModelConfig.from_hf(cases.CASES[CASE]))), "final_norm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taps") / CASE
    cases.write_checkpoint(folder, cases.CASES[CASE], cases.case_seed(CASE))
    return folder, *models.load(folder)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(cases.inputs(CASE)["tokens"])


@pytest.fixture(scope="module")
def all_taps(model, tokens):
    """Every activation of one run (numpy), and its logits."""
    _, cfg, params = model
    logits, taps = models.apply(cfg, params, tokens, taps=NAMES)
    return np.asarray(logits), {name: np.asarray(tap) for name, tap in taps.items()}


def test_taps_are_the_named_parts_of_the_computation(model, all_taps, tokens):
    _, cfg, params = model
    logits, taps = all_taps
    assert set(taps) == set(NAMES)
    np.testing.assert_array_equal(taps["embed"], params["embed"]["embedding"][tokens])
    np.testing.assert_array_equal(taps["blocks.0.resid_pre"], taps["embed"])
    np.testing.assert_array_equal(taps["blocks.1.resid_pre"], taps["blocks.0.resid_post"])
    for i in range(2):
        tap, p = (lambda kind, i=i: taps[f"blocks.{i}.{kind}"]), jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        np.testing.assert_allclose(tap("resid_mid"), tap("resid_pre") + tap("attn_out"), atol=1e-5)
        np.testing.assert_allclose(tap("resid_post"), tap("resid_mid") + tap("mlp_out"), atol=1e-5)
        normed = rms_norm(tap("resid_mid"), p["mlp_norm"], cfg.norm_eps)
        np.testing.assert_allclose(tap("mlp_in"), normed, atol=1e-5)
        np.testing.assert_allclose(tap("mlp_normalized") * p["mlp_norm"], normed, atol=1e-5)
        np.testing.assert_allclose(tap("attn_out"), tap("attn_z") @ p["o"].reshape(-1, cfg.d_model) + p["o_bias"], atol=1e-4)
        np.testing.assert_allclose(tap("mlp_pre"), normed @ p["gate"], atol=1e-4)
        np.testing.assert_allclose(tap("mlp_act"), jax.nn.silu(tap("mlp_pre")) * (normed @ p["up"]), atol=1e-4)
        np.testing.assert_allclose(tap("mlp_out"), tap("mlp_act") @ p["down"], atol=1e-4)
        probs = tap("attn_probs")
        assert probs.shape == (2, cfg.n_heads, 24, 24) and probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
        reach = cfg.window(i) or 24
        seen = np.tri(24, dtype=bool) & ~np.tri(24, k=-reach, dtype=bool)
        assert (probs[..., ~seen] == 0).all() and (probs[..., seen] > 0).all()
    last = rms_norm(taps["blocks.1.resid_post"], params["final_norm"]["scale"], cfg.norm_eps)
    np.testing.assert_allclose(taps["final_norm"], last, atol=1e-5)
    np.testing.assert_allclose(logits, taps["final_norm"] @ np.asarray(params["lm_head"]["kernel"]), atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_taps_equal_transformers(model, all_taps, tokens):
    """Against forward hooks on the modules of transformers' own model."""
    import torch
    import transformers

    folder, _, _ = model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    seen = {}

    def keep(name, pick):
        return lambda module, given, kwargs, out: seen.update({name: pick(given, out).detach().numpy()})

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    hooks = {
        "embed": (theirs.model.embed_tokens, lambda given, out: out),
        "final_norm": (theirs.model.norm, lambda given, out: out),
    }
    for i, layer in enumerate(theirs.model.layers):
        hooks |= {
            f"blocks.{i}.resid_pre": (layer.input_layernorm, lambda given, out: given[0]),
            f"blocks.{i}.attn_z": (layer.self_attn.o_proj, lambda given, out: given[0]),
            f"blocks.{i}.attn_out": (layer.self_attn.o_proj, lambda given, out: out),
            f"blocks.{i}.attn_probs": (layer.self_attn, lambda given, out: out[1]),
            f"blocks.{i}.resid_mid": (layer.post_attention_layernorm, lambda given, out: given[0]),
            f"blocks.{i}.mlp_normalized": (layer.post_attention_layernorm, lambda given, out, norm=layer.post_attention_layernorm: out / norm.weight),
            f"blocks.{i}.mlp_in": (layer.mlp, lambda given, out: given[0]),
            f"blocks.{i}.mlp_pre": (layer.mlp.gate_proj, lambda given, out: out),
            f"blocks.{i}.mlp_act": (layer.mlp.down_proj, lambda given, out: given[0]),
            f"blocks.{i}.mlp_out": (layer.mlp, lambda given, out: out),
            f"blocks.{i}.resid_post": (layer, lambda given, out: first(out)),
        }
    for name, (module, pick) in hooks.items():
        module.register_forward_hook(keep(name, pick), with_kwargs=True)
    with torch.no_grad():
        theirs(torch.tensor(np.asarray(tokens), dtype=torch.long))
    _, taps = all_taps
    assert set(seen) == set(taps)
    for name, tap in taps.items():
        assert cases.relative_error(tap, seen[name]) < 2e-5, name


def test_only_what_is_asked_for_comes_back(model, tokens, all_taps):
    _, cfg, params = model
    names = ("blocks.1.mlp_act", "embed", "blocks.1.mlp_act")
    _, taps = models.apply(cfg, params, tokens, taps=names)
    assert set(taps) == set(names)
    np.testing.assert_allclose(taps["blocks.1.mlp_act"], all_taps[1]["blocks.1.mlp_act"], atol=1e-5)


def test_interventions(model, tokens, all_taps):
    """One compiled function that edits the activation it is told to: each changes the logits, none changes nothing."""
    _, cfg, params = model

    @jax.jit
    def run(choice):
        def edit(i):
            return lambda x: jnp.where(choice == i, 1.5 * x + 0.1, x)

        interventions = {name: edit(i) for i, name in enumerate(NAMES)}
        out = models.forward(cfg, params, tokens, interventions=interventions, taps=NAMES)
        return models.unembed(cfg, params, out.hidden), out.taps

    plain, taps = all_taps
    logits, found = run(-1)
    np.testing.assert_allclose(logits, plain, atol=2e-5 * np.abs(plain).max())
    for i, name in enumerate(NAMES):
        logits, found = run(i)
        assert cases.relative_error(np.asarray(logits), plain) > 1e-3, name
        # The tap shows the edited value, later ones its effect, earlier ones nothing.
        np.testing.assert_allclose(found[name], 1.5 * taps[name] + 0.1, atol=1e-4)
        for earlier in NAMES[:i]:
            np.testing.assert_allclose(found[earlier], taps[earlier], atol=1e-4)
        assert all(cases.relative_error(np.asarray(found[later]), taps[later]) > 1e-5 for later in NAMES[i + 1 :])


def test_apply_takes_interventions(model, tokens, all_taps):
    _, cfg, params = model
    same, _ = models.apply(cfg, params, tokens, interventions={"blocks.1.mlp_act": lambda x: x})
    np.testing.assert_allclose(same, all_taps[0], atol=2e-5 * np.abs(all_taps[0]).max())
    cut, taps = models.apply(
        cfg, params, tokens, taps=("blocks.1.resid_post",), interventions={"blocks.1.resid_post": jnp.zeros_like}
    )
    assert not np.asarray(taps["blocks.1.resid_post"]).any() and not np.asarray(cut).any()


def test_apply_compiles_an_intervention_once(model, tokens, all_taps):
    """Outside of jit too: one function is traced for its first call of a shape, whatever the number of calls."""
    _, cfg, params = model
    traced = []

    def scaled(x, by=0.5):
        traced.append(by)
        return by * x

    first, _ = models.apply(cfg, params, tokens, interventions={"blocks.1.mlp_out": scaled})
    count = len(traced)
    for _ in range(3):
        again, _ = models.apply(cfg, params, tokens, interventions={"blocks.1.mlp_out": scaled})
        np.testing.assert_array_equal(again, first)
    assert len(traced) == count > 0
    other, _ = models.apply(cfg, params, tokens, interventions={"blocks.1.mlp_out": functools.partial(scaled, by=1.0)})
    assert len(traced) > count and traced[-1] == 1.0
    np.testing.assert_allclose(other, all_taps[0], atol=2e-5 * np.abs(all_taps[0]).max())
    moved, _ = models.apply(cfg, params, tokens, interventions={"blocks.0.mlp_out": scaled})
    assert cases.relative_error(np.asarray(moved), np.asarray(first)) > 1e-3

    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return 0.5 * x

    same, _ = models.apply(cfg, params, tokens, interventions={"blocks.1.mlp_out": Unhashable()})
    np.testing.assert_allclose(same, first, atol=2e-5 * np.abs(first).max())


def test_gradients_of_apply_flow_through_what_an_intervention_reads(model, tokens):
    """A fresh function each time, over a value that is being differentiated: no program of another trace is used."""
    _, cfg, params = model

    def loss(scale):
        edit = {"blocks.0.resid_post": lambda x: x * scale}
        return jnp.mean(models.apply(cfg, params, tokens, interventions=edit)[0] ** 2)

    slope = jax.grad(loss)
    found = [float(slope(at)) for at in (0.7, 0.7, 1.3)]
    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx((float(loss(0.75)) - float(loss(0.65))) / 0.1, rel=0.05)


def test_gradients_flow_into_an_intervention(model, tokens):
    """The slope along the gradient of a steering vector equals a central difference."""
    _, cfg, params = model

    def loss(vector):
        out = models.forward(cfg, params, tokens, interventions={"blocks.0.resid_post": lambda x: x + vector})
        return jnp.mean(models.unembed(cfg, params, out.hidden) ** 2)

    vector = jnp.asarray(np.random.default_rng(0).standard_normal(cfg.d_model) * 0.3, jnp.float32)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    _, grad = value_and_grad(vector)
    step = 1e-2 * grad / jnp.linalg.norm(grad)
    slope = (value_and_grad(vector + step)[0] - value_and_grad(vector - step)[0]) / 2e-2
    assert float(jnp.linalg.norm(grad)) == pytest.approx(float(slope), rel=1e-2)


def test_stop_at(model, tokens, all_taps):
    _, cfg, params = model
    names = ("embed", "blocks.0.mlp_act", "blocks.0.resid_post")
    out = models.forward(cfg, params, tokens, stop_at=1, taps=names)
    assert out.hidden is None
    for name in names:
        np.testing.assert_allclose(out.taps[name], all_taps[1][name], atol=1e-5)
    whole, half = (
        # Unrolled, because the compiler counts a loop's body once.
        jax.jit(lambda p, n=n: models.forward(cfg, p, tokens, stop_at=n, taps=names, unroll=True).taps)
        .lower(params)
        .cost_analysis()["flops"]
        for n in (2, 1)
    )
    assert 0.4 * whole < half < 0.6 * whole


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"taps": ("blocks.2.resid_post",)}, "unknown tap 'blocks.2.resid_post'; known: embed, blocks.0..1"),
        ({"taps": ("blocks.1.residual",)}, "unknown tap 'blocks.1.residual'.*resid_pre, attn_probs, attn_z, attn_out"),
        ({"taps": ("blocks.01.resid_post",)}, "unknown tap"),
        ({"interventions": {"head": lambda x: x}}, "unknown intervention 'head'"),
        ({"taps": ("blocks.1.mlp_act",), "stop_at": 1}, "'blocks.1.mlp_act' is never reached.*after 1 blocks"),
        ({"interventions": {"final_norm": lambda x: x}, "stop_at": 2}, "'final_norm' is never reached"),
        ({"stop_at": 3}, "stop_at=3 must be within 0..2"),
    ],
)
def test_bad_names_and_stops(model, tokens, kwargs, told):
    _, cfg, params = model
    with pytest.raises(ModelError, match=told):
        models.forward(cfg, params, tokens, **kwargs)


def test_no_taps_cost_nothing(model, tokens):
    """The compiled program without taps is that of a bare scan over the layers; with a tap it is more."""
    _, cfg, params = model

    def bare(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape)
        rope = rope_table(cfg, positions)
        masks = jnp.stack([attention_mask(positions, positions, w) for w in (7, None)])
        which = jnp.array([0, 1])

        def layer(x, given):
            i, p = given
            x, _ = Block(cfg).apply(
                {"params": p}, x, rope, lambda k, v: ([(k, v, masks[which[i]])], None), lambda _, y: y
            )
            return x, None

        x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
        x, _ = jax.lax.scan(layer, x, (jnp.arange(2), params["blocks"]))
        return rms_norm(x, params["final_norm"]["scale"], cfg.norm_eps)

    def ours(params, tokens, taps=()):
        out = models.forward(cfg, params, tokens, taps=taps)
        return (out.hidden, out.taps) if taps else out.hidden

    def compiled(fn, **kwargs):
        return jax.jit(fn, static_argnames="taps" if kwargs else ()).lower(params, tokens, **kwargs).compile()

    plain, hooked = compiled(bare), compiled(ours)
    tapped = compiled(ours, taps=("blocks.1.mlp_act",))
    for key in ("flops", "bytes accessed", "transcendentals"):
        assert hooked.cost_analysis()[key] == plain.cost_analysis()[key], key
    assert hooked.memory_analysis().temp_size_in_bytes == plain.memory_analysis().temp_size_in_bytes
    assert tapped.cost_analysis()["bytes accessed"] > plain.cost_analysis()["bytes accessed"]
    np.testing.assert_array_equal(plain(params, tokens), hooked(params, tokens))


class _Marks:
    """An edit that is told where the tokens stand: adds 100 to what is generated."""

    takes_place = True

    def __call__(self, x, place):
        return x + 100.0 * place.generated_BT()[..., None]


def test_an_edit_may_be_told_where_tokens_stand(model, tokens):
    _, cfg, params = model
    plain = models.forward(cfg, params, tokens, taps=("embed",)).taps["embed"]
    how = {"taps": ("embed",), "interventions": {"embed": _Marks()}}
    lengths = jnp.array([3, 24])
    marked = models.forward(cfg, params, tokens, prompt_lengths=lengths, **how).taps["embed"]
    expected = np.where(np.arange(24) >= np.array([[3], [24]]), 100.0, 0.0)
    np.testing.assert_allclose(marked - plain, np.broadcast_to(expected[..., None], plain.shape), atol=1e-4)
    later = models.forward(cfg, params, tokens, positions=jnp.arange(24) + jnp.array([[2], [0]]), prompt_lengths=lengths, **how).taps["embed"]
    np.testing.assert_allclose((later - plain)[0, :, 0], np.where(np.arange(24) >= 1, 100.0, 0.0), atol=1e-4)
    np.testing.assert_array_equal(models.apply(cfg, params, tokens, prompt_lengths=lengths, **how)[1]["embed"], marked)
    with pytest.raises(ModelError, match="prompt_lengths"):
        models.forward(cfg, params, tokens, **how)
    with pytest.raises(ModelError, match="segments pack several texts"):
        models.forward(cfg, params, tokens, segments=jnp.zeros((2, 24), jnp.int32), prompt_lengths=lengths, **how)


class _Adds:
    """An edit that adds another activation."""

    def __init__(self, reads, takes_place=False):
        self.reads, self.takes_place = reads, takes_place

    def __call__(self, x, *given):
        assert len(given) == 1 + self.takes_place
        return x + 0.1 * given[-1]


@pytest.mark.parametrize("unroll", [False, True])
def test_an_edit_may_read_an_earlier_activation(model, tokens, all_taps, unroll):
    """Of its own layer, of an earlier one, and from outside of the layers: as it stands in that run, after edits of its own."""
    _, cfg, params = model
    taps = all_taps[1]
    edits = {
        "blocks.0.mlp_in": jnp.ones_like,
        "blocks.0.mlp_out": _Adds("blocks.0.mlp_in", takes_place=True),
        "blocks.1.attn_out": _Adds("blocks.0.resid_pre"),
        "blocks.1.resid_pre": _Adds("embed"),
        "final_norm": _Adds("blocks.1.resid_post"),
    }
    names = ("blocks.0.mlp_in", "blocks.0.mlp_out", "blocks.1.resid_pre", "blocks.1.attn_out", "final_norm")
    run = functools.partial(models.forward, cfg, params, tokens, unroll=unroll)
    found = run(interventions=edits, taps=names)
    assert set(found.taps) == set(names)
    alone = run(interventions={"blocks.0.mlp_in": jnp.ones_like}, taps=("blocks.0.mlp_out", "blocks.0.resid_post"))
    np.testing.assert_array_equal(found.taps["blocks.0.mlp_in"], np.ones_like(taps["embed"]))
    np.testing.assert_allclose(found.taps["blocks.0.mlp_out"], alone.taps["blocks.0.mlp_out"] + 0.1, atol=1e-5)
    before = alone.taps["blocks.0.resid_post"] + 0.1
    np.testing.assert_allclose(found.taps["blocks.1.resid_pre"], before + 0.1 * taps["embed"], atol=1e-5)
    stated = {"blocks.1.resid_pre": lambda x: found.taps["blocks.1.resid_pre"]}
    clean = run(interventions=stated, taps=("blocks.1.attn_out", "blocks.1.mlp_out"))
    attn_out = clean.taps["blocks.1.attn_out"] + 0.1 * taps["blocks.0.resid_pre"]
    np.testing.assert_allclose(found.taps["blocks.1.attn_out"], attn_out, atol=1e-4)
    whole = run(interventions=stated | {"blocks.1.attn_out": lambda x: attn_out}, taps=("blocks.1.resid_post",))
    np.testing.assert_allclose(found.hidden, whole.hidden + 0.1 * whole.taps["blocks.1.resid_post"], atol=2e-4)
    np.testing.assert_array_equal(found.taps["final_norm"], found.hidden)


@pytest.mark.parametrize(
    ("at", "reads", "told"),
    [
        ("blocks.0.mlp_out", "blocks.0.resid_post", "at blocks.0.mlp_out reads blocks.0.resid_post, which is not computed before it"),
        ("blocks.0.mlp_in", "blocks.0.mlp_in", "not computed before it"),
        ("blocks.0.mlp_out", "blocks.1.mlp_in", "not computed before it"),
        ("embed", "embed", "not computed before it"),
        ("blocks.0.mlp_out", "blocks.0.nothing", "unknown activation read by an intervention 'blocks.0.nothing'"),
    ],
)
def test_an_edit_cannot_read_what_is_not_there(model, tokens, at, reads, told):
    with pytest.raises(ModelError, match=told):
        models.forward(*model[1:], tokens, interventions={at: _Adds(reads)})
