"""Fine-tuning on the model's divergence: the loss by numpy, its gradient, what it wins, its settings and its mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import sae
from sae.end_to_end import FinetuneConfig, finetune, spliced_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOOK = "blocks.0.resid_post"
WEIGHTS = {"kl": 0.7, "fvu": 0.4, "sparsity": 0.2}
loss_of = jax.jit(spliced_loss, static_argnums=(1, 2))  # one program rather than one for each operation


@pytest.fixture(scope="module")
def lm():
    cfg = models.ModelConfig(
        vocab_size=23, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_position=32, bos_token_id=1, eos_token_ids=(2,)
    )
    return cfg, jax.tree.map(lambda a: a * 3, models.init(cfg, jax.random.key(0)))


def dictionary(architecture="topk", hook=HOOK, **changes):
    cfg = sae.SAEConfig(architecture=architecture, d_in=16, d_sae=24, k=4 if architecture == "topk" else None, hook_name=hook, **changes)
    return sae.init(cfg, jax.random.key(1))


TOKENS = np.array([[1, 5, 6, 7, 9], [4, 9, 3, 0, 0]], np.int32)
LENGTHS = np.array([5, 3], np.int32)
KEEP = np.zeros((2, 5), bool)
KEEP[0, 0] = True


def transcoder():
    d = dictionary(d_out=16, skip=True, hook_name_out="blocks.0.mlp_out", hook="blocks.0.mlp_in")
    return d.replace(params=d.params | {"W_skip": 0.3 * jax.random.normal(jax.random.key(2), (16, 16)), "b_dec": jnp.full(16, 0.1)})


@pytest.mark.parametrize("kind", ["topk", "relu", "transcoder"])
def test_loss_by_numpy(lm, kind):
    cfg, params = lm
    d = transcoder() if kind == "transcoder" else dictionary(kind)
    reads, place = d.cfg.hook_name, d.cfg.place
    total, parts = loss_of(d.params, d.cfg, cfg, params, TOKENS, LENGTHS, KEEP, WEIGHTS)
    kl, rows, hats, penalties = [], [], [], []
    plain = jax.jit(functools.partial(models.apply, cfg, taps=(reads, place)))
    replaced = jax.jit(lambda params, tokens, new: models.apply(cfg, params, tokens, interventions={place: lambda h: new[None]})[0])
    norms = np.linalg.norm(d.params["W_dec"], axis=1)
    for row, length, keep in zip(TOKENS, LENGTHS, KEEP, strict=True):
        tokens = row[None, :length]
        clean, taps = plain(params, tokens)
        x, given = np.asarray(taps[place][0]), taps[reads][0]
        x_hat = np.asarray(sae.reconstruct(d, given))
        spliced = np.where(keep[:length, None], x, x_hat)
        edited = replaced(params, tokens, spliced)
        p, q = (np.asarray(jax.nn.log_softmax(logits[0, :-1])) for logits in (clean, edited))
        kl.append((np.exp(p) * (p - q)).sum())
        rows.append(x[~keep[:length]])
        hats.append(x_hat[~keep[:length]])
        penalties.append(np.asarray(sae.encode(d, given) @ norms)[~keep[:length]])
    x, x_hat = np.concatenate(rows), np.concatenate(hats)
    variance = np.square(x - x.mean(0)).sum(1).mean()
    fvu = np.square(x - x_hat).sum(1).mean() / variance
    penalty = np.concatenate(penalties).mean() / np.sqrt(variance) if kind == "relu" else 0.0
    kl = sum(kl) / (LENGTHS - 1).sum()
    assert float(parts["kl"]) == pytest.approx(kl, rel=1e-4) and float(parts["fvu"]) == pytest.approx(fvu, rel=1e-4)
    assert float(total) == pytest.approx(0.7 * kl + 0.4 * fvu + 0.2 * penalty, rel=1e-4)


def test_padding_changes_nothing(lm):
    d = dictionary()
    wide = np.pad(TOKENS, ((0, 1), (0, 3)), constant_values=7)
    more = loss_of(d.params, d.cfg, *lm, wide, np.array([5, 3, 0], np.int32), np.pad(KEEP, ((0, 1), (0, 3))), WEIGHTS)[0]
    assert float(more) == pytest.approx(float(loss_of(d.params, d.cfg, *lm, TOKENS, LENGTHS, KEEP, WEIGHTS)[0]), rel=1e-5)


@pytest.mark.parametrize("kind", ["topk", "relu", "transcoder"])
def test_gradient_by_finite_differences(lm, kind):
    d = transcoder() if kind == "transcoder" else dictionary(kind)

    def value(p):
        return loss_of(p, d.cfg, *lm, TOKENS, LENGTHS, KEEP, WEIGHTS)[0]

    gradient, rng, step = jax.jit(jax.grad(value))(d.params), np.random.default_rng(5), 1e-4
    direction = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in d.params.items()}
    ends = [float(value({n: d.params[n] + s * step * direction[n] for n in d.params})) for s in (1, -1)]
    slope = sum(float(np.vdot(gradient[n], direction[n])) for n in direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=5e-2)


ROWS = [[1, *np.random.default_rng(i).integers(3, 23, 11)] for i in range(40)]


def trained(lm, architecture="topk"):
    cfg, params = lm
    d_cfg = dictionary(architecture).cfg
    rows = np.concatenate(list(sae.harvest_activations(cfg, params, ROWS, HOOK)))
    train = sae.SAETrainConfig(steps=200, learning_rate=1e-2, init_rows=256, sparsity_coefficient=0.1)
    return sae.train_sae(d_cfg, sae.array_batches(rows, 128), train, jax.random.key(0), progress=False)[0]


def test_the_model_loses_less_afterwards(lm):
    cfg, params = lm
    d = trained(lm)
    before = sae.ce_recovered(d, cfg, params, ROWS)
    tuned, history = finetune(d, cfg, params, ROWS, FinetuneConfig(steps=100, learning_rate=5e-3, kl_coefficient=10.0), progress=False)
    after = sae.ce_recovered(tuned, cfg, params, ROWS)
    assert after["kl_sae"] < 0.7 * before["kl_sae"] and history[-1]["kl"] < history[0]["kl"]
    np.testing.assert_allclose(np.linalg.norm(tuned.params["W_dec"], axis=1), 1.0, rtol=1e-5)
    assert history[-1]["l0"] <= 4 and len(history) == 100


OTHERS = {"steps": 5, "batch_rows": 3, "context_size": 6, "learning_rate": 1e-3, "kl_coefficient": 0.1, "fvu_coefficient": 0.0,
          "sparsity_coefficient": 0.5, "grad_clip": 1e-3, "skip_first": 0, "drop_tokens": (5, 6), "seed": 1}  # fmt: skip


def test_every_setting_changes_the_result(lm):
    assert set(OTHERS) == {f.name for f in dataclasses.fields(FinetuneConfig)}
    d = trained(lm, "relu")
    base = {"steps": 4, "learning_rate": 1e-2, "batch_rows": 4}
    results = {name: finetune(d, *lm, ROWS, FinetuneConfig(**(base | {name: value})), progress=False)[0] for name, value in OTHERS.items()}
    plain, again = (finetune(d, *lm, ROWS, FinetuneConfig(**base), progress=False)[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, plain.params, again.params)
    for name, other in results.items():
        assert np.any(np.asarray(other.params["W_enc"]) != np.asarray(plain.params["W_enc"])), name


def test_tuning_is_the_same_at_any_scale_of_the_activations(lm):
    """Updates are in each parameter's own size: of a model whose stream is 64 times as large, 64 times the dictionary is tuned alike."""
    cfg, small = dataclasses.replace(lm[0], norm_eps=1e-14), lm[1]
    blocks = small["blocks"] | {name: 64 * small["blocks"][name] for name in ("o", "down")}
    large = small | {"embed": {"embedding": 64 * small["embed"]["embedding"]}, "blocks": blocks}
    d, settings = trained(lm), FinetuneConfig(steps=5, learning_rate=1e-2)
    raised = d.replace(params=d.params | {name: 64 * d.params[name] for name in ("b_enc", "b_dec")})
    one, other = (finetune(each, cfg, model, ROWS, settings, progress=False)[0].params for each, model in ((d, small), (raised, large)))
    assert np.abs(np.asarray(one["b_dec"] - d.params["b_dec"])).max() > 1e-3
    for name, times in (("W_enc", 1), ("W_dec", 1), ("b_dec", 64), ("b_enc", 64)):
        np.testing.assert_allclose(other[name], times * np.asarray(one[name]), rtol=1e-3, atol=1e-4 * times, err_msg=name)


def test_thresholds_stay(lm):
    d = dictionary("jumprelu")
    d = d.replace(params=d.params | {"threshold": jnp.full(24, 0.05)})
    tuned, _ = finetune(d, *lm, ROWS, FinetuneConfig(steps=3, learning_rate=1e-2), progress=False)
    np.testing.assert_array_equal(tuned.params["threshold"], d.params["threshold"])
    assert np.any(np.asarray(tuned.params["W_enc"]) != np.asarray(d.params["W_enc"]))


def test_mistakes(lm):
    for changes, message in (({"steps": 0}, "steps is 0"), ({"kl_coefficient": -1.0}, "kl_coefficient is -1.0")):
        with pytest.raises(sae.SAEError, match=message):
            FinetuneConfig(**changes)
    settings = FinetuneConfig()
    with pytest.raises(sae.SAEError, match="must name its tap .hook_name., a transcoder's both"):
        finetune(dictionary(d_out=16), *lm, ROWS, settings)
    last = dictionary()
    with pytest.raises(sae.SAEError, match="nothing of the model follows final_norm"):
        finetune(last.replace(cfg=last.cfg.replace(hook_name="final_norm")), *lm, ROWS, settings)
    with pytest.raises(sae.SAEError, match="3 rows of two tokens or more are fewer than batch_rows 8"):
        finetune(dictionary(), *lm, [*ROWS[:3], [1]], settings)
    with pytest.raises(sae.SAEError, match="leave no token of the first batch"):
        finetune(dictionary(), *lm, ROWS, FinetuneConfig(skip_first=12))
    with pytest.raises(sae.SAEError, match="the loss is nan at step 1"):
        broken = dictionary()
        finetune(broken.replace(params=broken.params | {"b_dec": jnp.full(16, jnp.nan)}), *lm, ROWS, settings, progress=False)
