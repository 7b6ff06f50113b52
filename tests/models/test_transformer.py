"""One forward pass in all its forms: padding, remat, unrolled, prefix, cache; all equal the plain one."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest

import models
from models import ModelError, layers
from models.attention import batched_matmul
from models.transformer import unstacked

T = 12


@pytest.fixture(scope="module")
def model():
    cfg = models.ModelConfig.from_hf(cases.CASES["qwen3_layer_types"])
    return cfg, cases.random_params(cfg)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(3, 64, (4, T)), jnp.int32)


def close(found, expected, tolerance=2e-5):
    """Each array of a tree, relative to its largest value."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(float(jnp.abs(b).max()), 1e-3)),
        found,
        expected,
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("remat", "unroll"))
def logits_and_grads(cfg, params, tokens, lengths, **kwargs):
    """Logits, and the gradient of a loss over the real tokens."""

    def loss(params):
        out = models.forward(cfg, params, tokens, lengths=lengths, **kwargs)
        logits = models.unembed(cfg, params, out.hidden)
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return jnp.sum(jnp.sin(logits).sum(-1) * real), logits

    grads, logits = jax.grad(loss, has_aux=True)(params)
    return logits, grads


@pytest.fixture(scope="module")
def plain(model, tokens):
    return logits_and_grads(*model, tokens, jnp.full(4, T))


@pytest.mark.parametrize("kwargs", [{"remat": True}, {"remat": "products"}, {"remat": "products", "unroll": True}])
def test_remat_and_unroll_change_no_number(model, tokens, plain, kwargs):
    close(logits_and_grads(*model, tokens, jnp.full(4, T), **kwargs), plain)


@pytest.fixture
def chunks_of_five(monkeypatch):
    """Attention of more than four queries in chunks of five."""
    monkeypatch.setattr(layers, "QUERIES", 4)
    monkeypatch.setattr(layers, "QUERY_CHUNK", 5)


def test_chunks_of_queries_change_no_number(model, tokens, plain, chunks_of_five):
    """Of the whole model, with and without windows; and no scores of all queries are made."""
    run = functools.partial(logits_and_grads.__wrapped__, model[0], remat=True)  # what is jitted does not know of the chunks
    close(jax.jit(run)(model[1], tokens, jnp.full(4, T)), plain)
    text = str(jax.make_jaxpr(run)(model[1], tokens, jnp.full(4, T)))
    assert f",5,{T}]" in text and not re.search(rf"f32\[[\d,]+,{T},{T}\]", text)


def test_probabilities_asked_for_come_whole(model, tokens, chunks_of_five):
    name = "blocks.1.attn_probs"
    probs = models.forward(*model, tokens, taps=(name,)).taps[name]
    assert probs.shape == (4, model[0].n_heads, T, T)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    edited = models.forward(*model, tokens, interventions={name: jnp.zeros_like}, taps=("blocks.1.attn_out",)).taps["blocks.1.attn_out"]
    assert (edited == edited[0, 0]).all()  # the bias alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_chunks_equals_attention(dtype):
    """Two segments, the first shared by two rows; queries that do not divide into chunks; values and gradients."""
    rng = np.random.default_rng(3)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    K, H = 2, 8
    q, weights = array(4, T, 2 * K, H), array(4, T, 2 * K, H)
    kvs = [(array(2, K, H, 6), array(2, K, 6, H)), (array(4, K, H, T), array(4, K, T, H))]
    masks = [jnp.asarray(rng.random((4, T, n)) < 0.7).at[:, :, 0].set(True) for n in (6, T)]

    def run(attend):
        def loss(q, kvs):
            out = attend(q, [(*kv, mask) for kv, mask in zip(kvs, masks, strict=True)])
            return jnp.sum(jnp.sin(out) * weights), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(q, kvs)

    found, expected = run(functools.partial(layers.attention_in_chunks, chunk=5)), run(layers.attention)
    as_float = functools.partial(jax.tree.map, lambda a: a.astype(jnp.float32))
    close(as_float(found), as_float(expected), 2e-5 if dtype == "float32" else 1e-2)


def test_padding_changes_nothing(model, tokens, plain):
    """Same logits at real positions whatever stands in the padding, and the same gradients. No id means padding."""
    lengths = np.array([T, 5, 1, 7])
    runs = []
    for filler in (0, 9):
        padded = jnp.where(jnp.arange(T) < lengths[:, None], tokens, filler)
        logits, grads = logits_and_grads(*model, padded, jnp.asarray(lengths))
        for row, n in enumerate(lengths):
            close(logits[row, :n], plain[0][row, :n])
        runs.append(grads)
    close(*runs)


def test_an_empty_row_gives_finite_numbers(model, tokens):
    logits, grads = logits_and_grads(*model, tokens, jnp.array([T, 0, 3, 0]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, grads)))


@pytest.mark.parametrize("unroll", [False, True])
def test_cache_equals_one_pass(model, tokens, plain, unroll):
    """Chunks of 5, 1, 1, ... through a cache that is larger than needed, rows of different lengths."""
    cfg, params = model
    starts = jnp.array([0, 3, 0, 1])  # the first tokens of some rows are left out: their positions begin later
    step = jax.jit(functools.partial(models.forward, cfg, unroll=unroll))
    whole = jnp.where(jnp.arange(T) < starts[:, None], -1, jnp.arange(T) - starts[:, None])
    expected = step(params, tokens, positions=whole).hidden
    cache, found = models.init_cache(cfg, 4, T + 3, unrolled=unroll), []
    for start, stop in [(0, 5), *((i, i + 1) for i in range(5, T))]:
        out = step(params, tokens[:, start:stop], positions=whole[:, start:stop], cache=cache)
        cache = out.cache
        found.append(out.hidden)
    assert int(cache.next) == T
    np.testing.assert_array_equal(cache.positions[:, :T], whole)
    assert (np.asarray(cache.positions[:, T:]) == -1).all()
    real = np.asarray(whole) >= 0
    close(jnp.concatenate(found, axis=1)[real], expected[real])
    assert jax.tree.structure(cache) == jax.tree.structure(models.init_cache(cfg, 4, T + 3, unrolled=unroll))
    unpadded = models.unembed(cfg, params, expected[0])
    close(unpadded, plain[0][0])


def test_prefix_equals_one_pass(model, tokens):
    """Two prompts of different lengths, two continuations each: logits, and gradients back through the prefix."""
    cfg, params = model
    lengths, lengths_4 = jnp.array([6, 4]), np.array([6, 6, 4, 4])
    prompts, rest = tokens[::2, :6], tokens[:, 6:]
    joined = np.zeros((4, T), np.int32)
    for row, n in enumerate(lengths_4):
        joined[row, : n + T - 6] = np.concatenate([prompts[row // 2, :n], rest[row]])
    columns = lengths_4[:, None] + np.arange(T - 6)
    real = jnp.arange(6) < lengths[:, None]

    def loss(params):
        prompt = models.forward(cfg, params, prompts, lengths=lengths, return_kv=True)
        out = models.forward(cfg, params, rest, positions=jnp.asarray(columns), prefix=prompt.kv)
        first, last = (models.unembed(cfg, params, hidden) for hidden in (prompt.hidden, out.hidden))
        return 2 * jnp.sum(jnp.sin(first).sum(-1) * real) + jnp.sin(last).sum(), last

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected, expected_grads = logits_and_grads(cfg, params, jnp.asarray(joined), jnp.asarray(lengths_4) + T - 6)
    close(logits, np.take_along_axis(np.asarray(expected), columns[..., None], axis=1))
    close(grads, expected_grads)


def test_prefix_and_cache_together(model, tokens):
    """Sampling: the prompt in a prefix, the row's own tokens in a cache, the layers' parameters a tuple."""
    cfg, params = model
    prompts = tokens[:2, :6]
    kv = models.forward(cfg, params, prompts, return_kv=True, unroll=True).kv
    cache = models.init_cache(cfg, 4, 4, unrolled=True)
    step = jax.jit(functools.partial(models.forward, cfg, unroll=True))
    found = []
    for i in range(3):
        positions = jnp.full((4, 1), 6 + i)
        out = step(unstacked(params), tokens[:, 6 + i : 7 + i], positions=positions, prefix=kv, cache=cache)
        cache = out.cache
        found.append(out.hidden)
    joined = jnp.concatenate([jnp.repeat(prompts, 2, axis=0), tokens[:, 6:9]], axis=1)
    close(jnp.concatenate(found, axis=1), models.forward(cfg, params, joined).hidden[:, 6:])


def test_what_would_be_silently_wrong_is_refused(model, tokens):
    cfg, params = model
    cache = models.init_cache(cfg, 4, T)
    with pytest.raises(ModelError, match="needs positions"):
        models.forward(cfg, params, tokens, cache=cache)
    kv = models.KV(None, None, jnp.zeros((4, 2), jnp.int32))
    with pytest.raises(ModelError, match="needs positions"):
        models.forward(cfg, params, tokens, prefix=kv)
    with pytest.raises(ModelError, match="stop_at leaves the cache"):
        models.forward(cfg, params, tokens, positions=jnp.zeros((4, T), jnp.int32), cache=cache, stop_at=1)


def test_bfloat16_stays_near_fp32(model, tokens, plain):
    """Activations in bf16, logits in fp32, within bf16's rounding of the fp32 run."""
    cfg, params = model
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    logits, _ = models.apply(dataclasses.replace(cfg, dtype="bfloat16"), half, tokens)
    assert logits.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((logits - plain[0]) ** 2) / jnp.mean(plain[0] ** 2))
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_products_of_attention_are_widened_only_where_the_platform_needs_it(platform):
    """fp32 operands go in untouched everywhere, bf16 ones are made fp32 on CPUs, whose library fails on them."""

    def lowered(function, dtype, differentiate):
        def products(q, k):
            return function(q, k)

        q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 3, 5, 8), (2, 3, 8, 7)))
        if differentiate:
            products = jax.grad(lambda q, k, forward=products: jnp.sum(forward(q, k) ** 2), argnums=(0, 1))
        return jax.jit(products).trace(q, k).lower(lowering_platforms=(platform,)).as_text()

    plain = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    for differentiate in (False, True):
        assert lowered(batched_matmul, jnp.float32, differentiate) == lowered(plain, jnp.float32, differentiate)
        forward = re.findall(r"dot_general .* : \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\)", lowered(batched_matmul, jnp.bfloat16, differentiate))[0]
        assert forward == (("f32", "f32") if platform == "cpu" else ("bf16", "bf16"))


def test_widened_products_keep_their_operands_for_the_backward_pass_as_they_are():
    q, k = jnp.ones((2, 3, 5, 8), jnp.bfloat16), jnp.ones((2, 3, 8, 7), jnp.bfloat16)
    residuals = jax.eval_shape(lambda *args: jax.vjp(batched_matmul, *args)[1], q, k)
    assert sorted((leaf.size, leaf.dtype) for leaf in jax.tree.leaves(residuals)) == [(q.size, q.dtype), (k.size, k.dtype)]


def test_init(model):
    """Shapes and dtypes as declared, norms one, biases zero, matrices of the configured spread, layers different."""
    cfg = dataclasses.replace(model[0], initializer_range=0.05, d_ff=512)
    params = models.init(cfg, jax.random.key(0))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    assert shapes == models.abstract_params(cfg)
    blocks = params["blocks"]
    assert (np.asarray(blocks["attn_norm"]) == 1).all() and not np.asarray(blocks["q_bias"]).any()
    assert float(jnp.std(blocks["gate"])) == pytest.approx(0.05, rel=0.05)
    assert float(jnp.abs(jnp.corrcoef(blocks["gate"][0].ravel(), blocks["gate"][1].ravel())[0, 1])) < 0.05
    assert {
        leaf.dtype for leaf in jax.tree.leaves(models.abstract_params(dataclasses.replace(cfg, dtype="bfloat16")))
    } == {jnp.dtype("bfloat16")}


def test_remat_keeps_less_for_the_backward_pass(model, tokens):
    cfg, params = model

    def kept(remat):
        def residuals(params):
            return jax.vjp(lambda p: models.forward(cfg, p, tokens, remat=remat).hidden, params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, params)))

    assert kept(True) == kept("nothing") < 0.5 * kept(False)
    # Beside the inputs of the layers: queries, keys, values, what attention and MLP give, and what the MLP's two matrices do, but no scores.
    B, T = tokens.shape
    product = B * T * ((cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim + 2 * cfg.d_model + 2 * cfg.d_ff)
    assert kept("products") <= kept(True) + cfg.n_layers * product and kept(True) < kept("products") < kept(False)
    with pytest.raises(ModelError, match="remat='dots' is not known; known: False, True, 'nothing', 'products'"):
        kept("dots")


@pytest.mark.parametrize("run", [models.apply, models.forward])
def test_tokens_that_no_row_of_the_vocabulary_is_for_are_refused(run, model):
    cfg, params = model
    for wrong in (64, -1):
        tokens = np.full((2, 5), 7, np.int32)
        tokens[1, 3] = wrong
        with pytest.raises(ModelError, match=rf"token id {wrong} \(row 1, column 3\) is outside the vocabulary of 64"):
            run(cfg, params, tokens)
        with pytest.raises(ModelError, match=f"token id {wrong} "):
            run(cfg, params, jnp.asarray(tokens), lengths=jnp.array([5, 4]))
        run(cfg, params, jnp.asarray(tokens), lengths=jnp.array([5, 3]))  # padding may hold anything
    with pytest.raises(ModelError, match="tokens are float32 of shape"):
        run(cfg, params, np.ones((2, 5), np.float32))
    with pytest.raises(ModelError, match=r"tokens are int\d+ of shape \(5,\)"):
        run(cfg, params, np.ones(5, int))


@pytest.mark.parametrize("run", [models.apply, models.forward])
@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((0, 5), None, r"tokens are of shape \(0, 5\): there is nothing to run"),
        ((2, 0), None, r"tokens are of shape \(2, 0\): there is nothing to run"),
        ((2, 5), [5], r"lengths are of shape \(1,\); 2 rows of tokens have one each"),
        ((2, 5), [[5, 5]], r"lengths are of shape \(1, 2\)"),
        ((2, 5), [5, 6], "lengths hold 6; rows are 5 tokens wide"),
        ((2, 5), [-1, 5], "lengths hold -1; rows are 5 tokens wide"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(run, model, shape, lengths, message):
    cfg, params = model
    with pytest.raises(ModelError, match=message):
        run(cfg, params, np.full(shape, 7, np.int32), lengths=None if lengths is None else jnp.asarray(lengths))


@pytest.mark.parametrize("run", [models.apply, models.forward])
def test_rows_past_the_context_are_refused(run, model):
    cfg, params = dataclasses.replace(model[0], max_position=8), model[1]
    tokens = jnp.full((2, 9), 7, jnp.int32)
    with pytest.raises(ModelError, match=r"row 0 reaches position 8, the model's context ends at 7"):
        run(cfg, params, tokens)
    with pytest.raises(ModelError, match="row 1 reaches position 8"):
        run(cfg, params, tokens, lengths=jnp.array([8, 9]))
    run(cfg, params, tokens, lengths=jnp.array([8, 3]))
    dynamic = dataclasses.replace(cfg, rope_scaling=models.RopeScaling("dynamic", factor=2.0))
    run(dynamic, params, tokens)
    with pytest.raises(ModelError, match="row 0 reaches position 20"):
        models.forward(cfg, params, tokens[:, :1], positions=jnp.full((2, 1), 20))


def test_inside_jit_nothing_is_looked_at(model):
    """As documented: the check costs a compiled program nothing, and a wrong id shows as NaN."""
    cfg, params = model
    tokens = jnp.full((1, 5), 7, jnp.int32)
    run = jax.jit(lambda tokens: models.forward(cfg, params, tokens).hidden)
    assert np.isfinite(run(tokens)).all()
    assert np.isnan(run(tokens.at[0, 2].set(64))[0, 2]).all()


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unrolled"])
def test_texts_packed_into_a_row_do_not_see_each_other(model, tokens, unroll):
    """Three texts in two rows, with padding: each text's hidden states are those of a row of its own, windows included."""
    cfg, params = model
    lengths = (5, 7, 9)
    rows = np.zeros((2, 14), np.int32)
    segments = np.full((2, 14), -1, np.int32)
    places = ((0, 0), (0, 5), (1, 2))  # the last after two tokens of padding, which a segment may have before it too
    for number, (length, (row, start)) in enumerate(zip(lengths, places, strict=True)):
        rows[row, start : start + length] = tokens[number, :length]
        segments[row, start : start + length] = number
    packed = models.forward(cfg, params, jnp.asarray(rows), segments=jnp.asarray(segments), unroll=unroll).hidden
    for number, (length, (row, start)) in enumerate(zip(lengths, places, strict=True)):
        alone = models.forward(cfg, params, tokens[number : number + 1, :length]).hidden
        np.testing.assert_allclose(packed[row, start : start + length], alone[0], rtol=1e-5, atol=1e-5)


def test_segments_stand_alone(model, tokens):
    cfg, params = model
    with pytest.raises(ModelError, match="segments say where texts packed into a row begin and end"):
        models.forward(cfg, params, tokens, segments=jnp.zeros_like(tokens), lengths=jnp.full(4, T))
