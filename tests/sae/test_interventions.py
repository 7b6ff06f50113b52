"""Edits of latents: their meaning by hand, what is kept, which tokens, in one pass and in generation, under jit and grad."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae
from jaxrl_llm.train.forward import completion_logprobs
from models.taps import Place
from models.transformer import _jitted_apply
from sae.architectures import ARCHITECTURES
from sae.config import NORMALISATIONS
from sae.interventions import SEPARATE, latents_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOOK = "blocks.0.resid_post"
CFG = models.ModelConfig(
    family="llama", vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24,
    tie_embeddings=True, max_position=64, eos_token_ids=(), initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="module")
def params():
    return models.init(CFG, jax.random.key(0))


def dictionary(architecture="topk", normalisation="none", d_in=16, d_sae=40, **fields):
    """A random dictionary with biases, so that no term is zero."""
    k = 5 if ARCHITECTURES[architecture].needs_k else None
    fields = {"input_scale": 1.7} | fields if normalisation == "expected_average_only_in" else fields
    cfg = sae.SAEConfig(architecture, d_in, d_sae, k, normalisation, hook_name=HOOK, **fields)
    d = sae.init(cfg, jax.random.key(1))
    drawn = {name: 0.3 * jax.random.normal(jax.random.key(i), value.shape) for i, (name, value) in enumerate(sorted(d.params.items()))}
    return d.replace(params=d.params | {name: drawn[name] for name in drawn if name.startswith("b_")} | {"W_dec": 1.5 * d.params["W_dec"]})


def rows(n=6, width=16):
    return jax.random.normal(jax.random.key(7), (2, n, width)) * 2 + 0.5


def everywhere(x):
    """The place of tokens 0, 1, 2, ... of each row, of which the first three are the prompt."""
    B, T = x.shape[:2]
    return Place(jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.arange(B), jnp.full(B, 3))


def test_every_kind_by_hand():
    """A dictionary of three latents over two numbers, worked out on paper: z = (2, 0, 1) of x = (2, -1)."""
    cfg = sae.SAEConfig("relu", 2, 3, apply_b_dec_to_input=False, hook_name=HOOK)
    given = {"W_enc": [[1.0, -1.0, 0.0], [0.0, 0.0, -1.0]], "b_enc": [0.0] * 3, "W_dec": [[1.0, 0.0], [0.0, 3.0], [0.5, -1.0]], "b_dec": [10.0, 20.0]}
    d = sae.Dictionary({name: jnp.asarray(value) for name, value in given.items()}, cfg)
    x = jnp.array([[[2.0, -1.0]]])
    np.testing.assert_array_equal(sae.encode(d, x)[0, 0], [2, 0, 1])
    place = Place(jnp.array([[0]]), jnp.array([0]))
    cases = {
        (2.0, -1.0): [sae.ablate(1), sae.scale([0, 2], 1.0), sae.clamp(0, 0.0, 5.0), sae.add(2, 0.0), sae.scale(1, 9.0)],
        (0.0, -1.0): [sae.ablate(0), sae.set_to(0, 0.0), sae.scale(0, 0.0), sae.add(0, -2.0), sae.clamp(0, upper=0.0)],
        (2.0, 11.0): [sae.set_to(1, 4.0), sae.add(1, 4.0), sae.clamp(1, lower=4.0)],
        (5.5, -2.0): [sae.set_to([0, 2], [5.0, 2.0]), sae.add([0, 2], [3.0, 1.0]), sae.scale([0, 2], [2.5, 2.0])],
        (0.5, -1.0): [sae.clamp([0, 1], upper=[0.5, 1.0])],
    }
    for expected, interventions in cases.items():
        for one in interventions:
            np.testing.assert_allclose(sae.intervene(d, one)(x, place)[0, 0], expected, atol=1e-6, err_msg=str(one))
    # In their order, also on one latent: (2 * 3 + 1) = 7, kept below 6.
    both = sae.intervene(d, [sae.scale(0, 3.0), sae.add(0, 1.0), sae.clamp(0, upper=6.0), sae.add(1, 1.0)])
    np.testing.assert_allclose(both(x, place)[0, 0], [2 + 4, -1 + 3], atol=1e-6)
    # decode(z') of z' = (0, 0, 1)
    np.testing.assert_allclose(sae.intervene(d, sae.ablate(0), passthrough=True)(x, place)[0, 0], [10.5, 19.0], atol=1e-6)


def edited_codes(z):
    """(interventions, z' in numpy) of all kinds on latents that fire and that do not."""
    order = np.argsort(-np.asarray(z).sum((0, 1)))
    a, b, c, e, f = map(int, order[:5])
    quiet = int(order[-1])
    new = np.array(z)
    new[..., a], new[..., b], new[..., quiet] = 0, new[..., b] * 2.5, 3.0
    new[..., c], new[..., e], new[..., f] = new[..., c] + 1.5, np.clip(new[..., e], 0.2, 0.6), -1.0
    listed = [sae.ablate(a), sae.scale(b, 2.5), sae.set_to([quiet, f], [3.0, -1.0]), sae.add(c, 1.5), sae.clamp(e, 0.2, 0.6)]
    return listed, new


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["topk", "relu", "gated", "jumprelu", "matryoshka"])
def test_the_edit_is_the_difference_of_two_decodings(architecture, normalisation):
    """Against the definition with dense codes, for every normalisation: h + decode(z') - decode(z), and decode(z')."""
    d, x = dictionary(architecture, normalisation), rows()
    z = sae.encode(d, x)
    listed, new = edited_codes(z)
    before, after = sae.decode(d, z, x), sae.decode(d, jnp.asarray(new), x)
    place = everywhere(x)
    np.testing.assert_allclose(sae.intervene(d, listed)(x, place), x + after - before, atol=2e-5)
    np.testing.assert_allclose(sae.intervene(d, listed, passthrough=True)(x, place), after, atol=2e-5)
    np.testing.assert_allclose(sae.intervene(d, passthrough=True)(x, place), sae.reconstruct(d, x), atol=2e-5)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edit_that_changes_no_latent_changes_no_bit(normalisation, dtype):
    d, x = dictionary("topk", normalisation), rows().astype(dtype)
    nothing = [[], [sae.scale([1, 2, 3], 1.0), sae.add([4, 5], 0.0), sae.clamp([6, 7], -1e9)]]
    for listed in nothing:
        found = sae.intervene(d, listed)(x, everywhere(x))
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(x, np.float32))


def test_ablating_all_latents_leaves_the_error_and_the_bias():
    d, x = dictionary(), rows()
    everything = sae.ablate(range(40))
    bias = d.params["b_dec"]
    np.testing.assert_allclose(sae.intervene(d, everything, passthrough=True)(x, everywhere(x)), jnp.broadcast_to(bias, x.shape), atol=2e-5)
    np.testing.assert_allclose(sae.intervene(d, everything)(x, everywhere(x)), x - sae.reconstruct(d, x) + bias, atol=2e-5)


def test_a_latent_that_is_added_takes_no_place_of_another():
    """The dictionary keeps 5 latents a token; with 9 more set, the 5 are all still there."""
    d, x = dictionary(), rows()
    z = np.array(sae.encode(d, x))
    quiet = np.argsort(z.sum((0, 1)), kind="stable")[:9]
    assert (z[..., quiet] == 0).all()
    z[..., quiet] = 2.0
    edit = sae.intervene(d, sae.set_to(quiet, 2.0), passthrough=True)
    np.testing.assert_allclose(edit(x, everywhere(x)), sae.decode(d, z, x), atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_single_latents_are_those_of_the_whole_code(architecture):
    d, x, ids = dictionary(architecture), rows(), np.array([3, 17, 0, 39])
    np.testing.assert_allclose(latents_of(d, x, ids), sae.encode(d, x)[..., ids], atol=1e-5)
    assert latents_of(d, x, np.zeros(0, int)).shape == (2, 6, 0)
    assert set(SEPARATE) <= set(ARCHITECTURES)


def test_which_tokens_are_edited():
    d, x = dictionary(), rows()
    place, edit = everywhere(x), lambda **how: sae.intervene(d, sae.set_to(3, 4.0), **how)
    chosen = lambda **how: np.asarray(jnp.any(edit(**how)(x, place) != x, axis=-1)).astype(int).tolist()  # noqa: E731
    assert chosen() == [[1] * 6] * 2
    assert chosen(where="prompt") == [[1, 1, 1, 0, 0, 0]] * 2 and chosen(where="generated") == [[0, 0, 0, 1, 1, 1]] * 2
    assert chosen(start=2, where="prompt") == [[0, 0, 1, 0, 0, 0]] * 2
    assert chosen(mask=np.array([True, False, True, True])) == [[1, 0, 1, 1, 0, 0]] * 2  # past its end nothing is edited
    per_text = np.array([[1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]], bool)
    assert chosen(mask=per_text) == per_text.astype(int).tolist()
    assert chosen(mask=per_text, where="generated") == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]
    padded = place._replace(positions_BT=jnp.where(jnp.arange(6) < 4, place.positions_BT, -1))
    assert not np.asarray(edit()(x, padded) != x)[:, 4:].any()
    with pytest.raises(models.ModelError, match="prompt_lengths"):
        edit(where="prompt")(x, Place(place.positions_BT, place.texts_B))


@pytest.mark.parametrize(
    ("where", "unrolled", "refill"),
    [("all", True, False), ("all", False, True), ("prompt", True, True), ("prompt", False, False), ("generated", True, False),
     ("generated", True, True)],
)  # fmt: skip
def test_generation_equals_full_passes(params, where, unrolled, refill, monkeypatch):
    """Greedy completions with an edit are what one pass over the whole text, edited in the same way, calls most likely at each length."""
    monkeypatch.setattr(sys.modules["models.generate"], "UNROLLED_LAYERS", 8 if unrolled else 0)
    d = dictionary()
    edit = sae.intervene(d, [sae.set_to([3, 11], [6.0, 4.0]), sae.ablate([1, 2])], where=where, passthrough=where == "all")
    call = lambda **how: models.generate(CFG, params, PROMPTS, max_new_tokens=9, temperature=0, num_samples=2, refill=refill, **how)  # noqa: E731
    out = call(interventions={HOOK: edit})
    assert (out.completion_tokens_NT != call().completion_tokens_NT).any()
    for i, completion in enumerate(out.completions()):
        prompt = PROMPTS[out.group_ids_N[i]]
        whole = np.array([prompt + completion])
        logits, _ = models.apply(CFG, params, whole, interventions={HOOK: edit}, prompt_lengths=np.array([len(prompt)]))
        at = np.arange(len(prompt) - 1, whole.shape[1] - 1)
        assert np.asarray(logits)[0, at].argmax(-1).tolist() == completion
        told = jax.nn.log_softmax(logits[0, at])[np.arange(len(at)), np.array(completion)]
        np.testing.assert_allclose(out.logps_NT[i], told if len(at) == 9 else 0, atol=2e-5)


@pytest.mark.parametrize("refill", [False, True])
def test_masks_in_generation_are_of_prompts_and_positions(params, refill):
    """Each prompt its own mask, whatever the order and batches in which it is decoded, and counted on from first_prompt."""
    d = dictionary()
    edit = lambda mask: {HOOK: sae.intervene(d, sae.set_to([3, 11], [9.0, 7.0]), mask=mask)}  # noqa: E731
    mask = np.zeros((3, 12), bool)
    mask[0, 5:], mask[1, 2] = True, True
    how = {"max_new_tokens": 6, "temperature": 0, "refill": refill, "max_rows": 2}
    found = models.generate(CFG, params, PROMPTS, interventions=edit(mask), **how).completions()
    assert found != models.generate(CFG, params, PROMPTS, **how).completions()
    for i, prompt in enumerate(PROMPTS):
        assert models.generate(CFG, params, [prompt], interventions=edit(mask[i]), **how).completions()[0] == found[i]
        assert models.generate(CFG, params, [prompt], interventions=edit(mask), first_prompt=i, **how).completions()[0] == found[i]


def test_other_values_and_latents_need_no_new_program(params):
    module, d = sys.modules["models.generate"], dictionary()
    other = dictionary()
    other = other.replace(params=jax.tree.map(lambda a: -a, other.params))
    how = {"max_new_tokens": 3, "temperature": 0}
    before, texts = module._sample_tokens._cache_size(), set()
    for which, feature, value in ((d, 3, 9.0), (d, 3, 30.0), (d, 11, 30.0), (other, 5, 30.0)):
        edit = sae.intervene(which, sae.set_to(feature, value))
        texts.add(str(models.generate(CFG, params, PROMPTS, interventions={HOOK: edit}, **how).logps_NT))
    assert module._sample_tokens._cache_size() - before == 1 and len(texts) == 4
    tokens, edit = np.array([[1, 2, 3]]), lambda value: {HOOK: sae.intervene(d, sae.add(3, value))}
    logits = [models.apply(CFG, params, tokens, interventions=edit(value))[0] for value in (1.0, 2.0)]
    size = _jitted_apply._cache_size()
    models.apply(CFG, params, tokens, interventions=edit(3.0))
    assert _jitted_apply._cache_size() == size and (logits[0] != logits[1]).any()


def test_plain_functions_edit_generation_too(params):
    how = {"max_new_tokens": 4, "temperature": 0}
    free = models.generate(CFG, params, PROMPTS, **how)
    same = models.generate(CFG, params, PROMPTS, interventions={HOOK: lambda x: x * 1.0}, **how)
    np.testing.assert_array_equal(same.completion_tokens_NT, free.completion_tokens_NT)
    partial = jax.tree_util.Partial(lambda vector, x: x + vector, jnp.full(16, 3.0))
    assert (models.generate(CFG, params, PROMPTS, interventions={HOOK: partial}, **how).logps_NT != free.logps_NT).any()
    with pytest.raises(models.ModelError, match="unknown intervention 'blocks.9.resid_post'"):
        models.generate(CFG, params, PROMPTS, interventions={"blocks.9.resid_post": partial}, **how)
    tokens = jnp.array([[1, 2, 3]])
    sampled = lambda **how: models.sample_tokens(CFG, params, tokens, jnp.array([3]), jax.random.key(0), max_new_tokens=3, temperature=0, **how)  # noqa: E731
    assert (sampled(interventions={HOOK: partial}).logps_BT != sampled().logps_BT).any()


@pytest.mark.parametrize("where", ["all", "prompt", "generated"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_loss_and_its_gradient_through_an_edit(params, where, remat):
    """The shared-prefix path equals the plain one with an edit, values and gradients by the parameters and by the edit's value."""
    d = dictionary("relu")
    prompts, lengths = jnp.array([[1, 2, 3, 0], [4, 5, 6, 7]]), jnp.array([3, 4])
    completions, sizes = jnp.array([[8, 9, 1], [2, 3, 4], [5, 6, 0], [7, 8, 9]]), jnp.array([3, 3, 2, 3])
    real = jnp.arange(3) < sizes[:, None]
    mask = np.array([[1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]], bool)

    def loss(params, value, shared):
        edit = sae.intervene(d, [sae.add([3, 11], value), sae.scale(5, 0.5)], where=where, mask=mask)
        how = {"shared_prefix": shared, "remat": remat, "interventions": {HOOK: edit}}
        logps, _ = completion_logprobs(CFG, params, prompts, lengths, completions, sizes, **how)
        return jnp.sum(jnp.where(real, logps, 0.0))

    both = [jax.jit(jax.value_and_grad(lambda p, v, s=s: loss(p, v, s), argnums=(0, 1)))(params, jnp.array([1.0, 2.0])) for s in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4, rtol=1e-4), *both)
    slope, step = both[1][1][1], 1e-2
    for i in range(2):
        ways = [loss(params, jnp.array([1.0, 2.0]).at[i].add(sign * step), False) for sign in (1, -1)]
        np.testing.assert_allclose((ways[0] - ways[1]) / (2 * step), slope[i], rtol=2e-2, atol=2e-3)
    assert float(loss(params, jnp.zeros(2), False)) != float(both[1][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: sae.intervene(d, sae.ablate(40)), "no latent 40; the dictionary has 0 to 39"),
        (lambda d: sae.intervene(d, sae.ablate([-1])), "no latent -1"),
        (lambda d: sae.intervene(d, sae.ablate([2, 2])), "latent 2 is named twice"),
        (lambda d: sae.intervene(d, sae.ablate([1.5])), "give a latent's number"),
        (lambda d: sae.intervene(d, sae.ablate([])), "give a latent's number"),
        (lambda d: sae.intervene(d, sae.add([1, 2], [1.0, 2.0, 3.0])), "shift has shape"),
        (lambda d: sae.intervene(d, sae.set_to(1, np.nan)), "shift is nan"),
        (lambda d: sae.intervene(d, sae.scale(1, np.inf)), "factor is inf"),
        (lambda d: sae.clamp(1), "give a lower or an upper bound"),
        (lambda d: sae.clamp(1, 2.0, 1.0), "the lower bound 2.0 is above"),
        (lambda d: sae.intervene(d, sae.clamp(1, upper=np.nan)), "upper is nan"),
        (lambda d: sae.intervene(d, where="promt"), "did you mean 'prompt'"),
        (lambda d: sae.intervene(d, mask=np.ones(3)), "give bools"),
        (lambda d: sae.intervene(d, mask=np.ones((2, 3, 4), bool)), "give bools"),
        (lambda d: sae.intervene(d, sae.ablate(1))(rows(width=12), everywhere(rows())), "needs a last axis of 16"),
        (lambda d: sae.intervene(transcoder(hook_name=None)), "names no hook_name; set it to the tap that it reads"),
        (lambda d: sae.intervene(transcoder(d_out=12))(rows(width=16), everywhere(rows()), rows()), "edits .* needs a last axis of 12"),
        (lambda d: sae.intervene(transcoder(d_in=12))(rows(), everywhere(rows())), "reads .* needs a last axis of 12"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(sae.SAEError, match=message):
        call(dictionary())


def transcoder(architecture="topk", normalisation="none", **fields):
    """Reads what enters the first MLP and writes what comes out of it, with a skip."""
    scale = {"input_scale": 1.7, "output_scale": 0.6} if normalisation == "expected_average_only_in" else {}
    fields = {"d_in": 16, "d_out": 16, "skip": True, "hook_name": READS, "hook_name_out": WRITES} | scale | fields
    fields["normalize_activations"] = normalisation
    k = 5 if ARCHITECTURES[architecture].needs_k else None
    d = sae.init(sae.SAEConfig(architecture, d_sae=40, k=k, **fields), jax.random.key(3))
    drawn = {name: 0.3 * jax.random.normal(jax.random.key(i), value.shape) for i, (name, value) in enumerate(sorted(d.params.items()))}
    return d.replace(params=d.params | {name: drawn[name] for name in drawn if name.startswith("b_") or name == "W_skip"})


READS, WRITES = "blocks.0.mlp_in", "blocks.0.mlp_out"


def transcoded(d, x, changed):
    """decode(z') and decode(z') - decode(z) of a transcoder in numpy; changed(z) -> z'."""
    p = {name: np.asarray(value, np.float64) for name, value in d.params.items()}
    pre = np.asarray(x, np.float64) * d.cfg.input_scale @ p["W_enc"] + p["b_enc"]
    z = np.maximum(pre, 0)
    if d.cfg.architecture == "topk":
        z = np.where(pre >= np.sort(pre, axis=-1)[..., -5:-4], z, 0)
    if "threshold" in p:
        z = np.where(pre > p["threshold"], z, 0)
    new = changed(z.copy())
    whole = new @ p["W_dec"] + p["b_dec"] + np.asarray(x, np.float64) * d.cfg.input_scale @ p["W_skip"]
    return whole / d.cfg.output_scale, (new - z) @ p["W_dec"] / d.cfg.output_scale


@pytest.mark.parametrize("normalisation", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_a_transcoder_edits_what_it_writes_by_latents_of_what_it_reads(params, architecture, normalisation):
    d, tokens = transcoder(architecture, normalisation), np.array([[1, 5, 9, 7, 30, 12]])
    taps = models.apply(CFG, params, tokens, taps=(READS, WRITES))[1]

    def changed(z):
        z[..., 3], z[..., 11] = 6.0, 0.0
        return z

    whole, difference = transcoded(d, taps[READS], changed)
    listed = [sae.set_to(3, 6.0), sae.ablate(11)]
    run = lambda edit: models.apply(CFG, params, tokens, taps=(WRITES,), interventions={d.cfg.place: edit})[1][WRITES]  # noqa: E731
    np.testing.assert_allclose(run(sae.intervene(d, listed)), taps[WRITES] + difference, atol=2e-4)
    np.testing.assert_allclose(run(sae.intervene(d, listed, passthrough=True)), whole, atol=2e-4)
    np.testing.assert_array_equal(run(sae.intervene(d)), taps[WRITES])
    found = run(sae.intervene(d, listed, start=2))
    np.testing.assert_array_equal(found[:, :2], taps[WRITES][:, :2])
    assert np.abs(difference).max() > 1


@pytest.mark.parametrize("unrolled,refill", [(True, False), (False, True)])
def test_a_transcoder_edits_generation(params, unrolled, refill, monkeypatch):
    """Log-probabilities of completions are those of one edited pass over the whole."""
    monkeypatch.setattr(sys.modules["models.generate"], "UNROLLED_LAYERS", 8 if unrolled else 0)
    edit = {WRITES: sae.intervene(transcoder(), [sae.set_to(3, 9.0), sae.scale(7, 0.2)], where="generated")}
    prompts = [[1, 2, 3], [4, 5, 6]]
    out = models.generate(CFG, params, prompts, max_new_tokens=6, temperature=0, refill=refill, interventions=edit)
    whole = np.array([prompt + completion for prompt, completion in zip(prompts, out.completions(), strict=True)])
    found = {}
    for name, how in (("edited", {"interventions": edit, "prompt_lengths": np.array([3, 3])}), ("free", {})):
        logp = jax.nn.log_softmax(models.apply(CFG, params, whole, **how)[0][:, 2:-1])
        found[name] = np.take_along_axis(np.asarray(logp), whole[:, 3:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logps_NT, found["edited"], atol=2e-5)
    assert np.abs(found["edited"] - found["free"]).max() > 1e-3


def test_a_transcoder_edits_the_loss(params):
    """The shared-prefix path equals the plain one, and the slope by the edit's value a difference."""
    prompts, lengths = jnp.array([[1, 2, 3, 0], [4, 5, 6, 7]]), jnp.array([3, 4])
    completions, sizes = jnp.array([[8, 9, 1], [2, 3, 4]]), jnp.array([3, 3])

    def loss(value, shared):
        edit = {WRITES: sae.intervene(transcoder(), [sae.set_to(3, value), sae.scale(7, 0.2)], where="generated")}
        logps, _ = completion_logprobs(CFG, params, prompts, lengths, completions, sizes, shared_prefix=shared, interventions=edit)
        return jnp.sum(logps)

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, slope), other = run(2.0, True), run(2.0, False)
    np.testing.assert_allclose((value, slope), other, rtol=1e-4)
    np.testing.assert_allclose((run(2.05, True)[0] - run(1.95, True)[0]) / 0.1, slope, rtol=2e-2)
    assert abs(float(slope)) > 1e-3


def test_a_feature_of_a_real_model_steers_what_it_tells(assets):
    """On the 260 K stories model: a dictionary trained for a moment, and its most used latent added at every token."""
    cfg, params = models.load(assets / "checkpoints" / "stories260k")
    tokenizer = models.load_tokenizer(assets / "checkpoints" / "stories260k")
    texts = [f"Once upon a time, there was a little {who} named Lily. She had a red ball." for who in ("girl", "dog", "cat", "bird")]
    tokens = [[cfg.bos_token_id, *row] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    hook = "blocks.2.resid_post"
    x = np.concatenate(list(sae.harvest_activations(cfg, params, tokens, hook)))
    settings = sae.SAETrainConfig(steps=60, learning_rate=3e-3, warmup_steps=5, init_rows=64, aux_coefficient=0.0)
    batches = sae.array_batches(x, 64)
    d, _ = sae.train_sae(sae.SAEConfig("topk", 64, 128, 8, hook_name=hook, context_size=128), batches, settings, jax.random.key(0))
    busiest = int(np.asarray(sae.encode(d, x)).sum(0).argmax())
    prompt = [cfg.bos_token_id, *tokenizer("Once upon a time, there was a little girl named Lily.", add_special_tokens=False)["input_ids"]]
    tell = lambda edit: tokenizer.decode(  # noqa: E731
        models.generate(cfg, params, [prompt], max_new_tokens=24, temperature=0, interventions=edit and {hook: edit}).completions()[0]
    )
    plain = tell(None)
    assert "She loved to play outside" in plain
    assert tell(sae.intervene(d, sae.scale(busiest, 1.0))) == plain and tell(sae.intervene(d, sae.add(busiest, 40.0), where="generated")) != plain
    assert tell(sae.intervene(d, sae.add(busiest, 40.0), start=1)) != plain


ON_A_MESH = """
import jax, numpy as np, models, sae
from jaxrl_llm.runtime import parse_mesh
from models.sharding import param_shardings
cfg = models.ModelConfig(
    family="llama", vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24, tie_embeddings=True,
    max_position=64, eos_token_ids=(),
)
params, mesh = models.init(cfg, jax.random.key(0)), parse_mesh("fsdp=2,data=2")
spread = jax.device_put(params, param_shardings(cfg, mesh))
d = sae.init(sae.SAEConfig(d_in=16, d_sae=32, k=4, hook_name="blocks.0.resid_post"), jax.random.key(1))
mask = np.random.default_rng(0).random((5, 20)) < 0.5
edits = {d.cfg.hook_name: sae.intervene(d, [sae.set_to([3, 5], [6.0, 4.0]), sae.ablate(7)], where="generated", mask=mask)}
prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [1, 5], [3, 3, 3]]
call = lambda params, **how: models.generate(cfg, params, prompts, max_new_tokens=6, num_samples=2, **how)
for refill in (False, True):
    one, four = (call(p, interventions=edits, refill=refill, mesh=m) for p, m in ((params, None), (spread, mesh)))
    np.testing.assert_array_equal(one.completion_tokens_NT, four.completion_tokens_NT)
    np.testing.assert_allclose(one.logps_NT, four.logps_NT, atol=1e-5)
    assert (call(params, refill=refill).completion_tokens_NT != one.completion_tokens_NT).any()
print("equal")
"""


def test_rows_on_a_mesh_are_edited_alike(run_python):
    assert run_python(ON_A_MESH, devices=4).strip().endswith("equal")
