"""Telling latents: a latent planted to follow a target is found, with the contexts on which it fires."""

import jax
import numpy as np
import pytest

import models
import sae
from jaxrl_llm.curation import interpret


class Words:
    def decode(self, ids):
        return " ".join(f"<{i}>" for i in ids)


@pytest.fixture(scope="module")
def setting():
    cfg = models.ModelConfig(vocab_size=30, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, bos_token_id=0)
    params = models.init(cfg, jax.random.key(0))
    d = sae.init(sae.SAEConfig(architecture="topk", d_in=16, d_sae=32, k=4, hook_name="blocks.0.resid_post"), jax.random.key(1))
    rng = np.random.default_rng(0)
    tokens = [[0, *rng.integers(1, 30, rng.integers(3, 9))] for _ in range(80)]
    return cfg, params, d, tokens


def pooled(cfg, params, d, row, latent):
    """Plain reference: log(1 + max) of one latent over one row without its first token."""
    x = models.apply(cfg, params, np.array([row], np.int32), taps=(d.cfg.hook_name,))[1][d.cfg.hook_name]
    return float(np.log1p(np.asarray(sae.encode(d, x))[0, 1:, latent].max()))


def test_finds_the_latent_behind_a_target_and_its_contexts(setting):
    cfg, params, d, tokens = setting
    everything = np.array([[pooled(cfg, params, d, row, f) for f in range(32)] for row in tokens])
    planted = int(np.argmax(everything.std(axis=0) * ((everything > 0).mean(axis=0) < 0.9)))
    found = interpret.telling_latents(cfg, params, d, tokens, {"difficulty": everything[:, planted]}, Words(), latents=2, contexts=3)
    assert found[0]["id"] == planted and found[0]["effect"] == pytest.approx(1.0, abs=1e-4) and found[0]["drives"] == "difficulty"
    assert abs(found[1]["effect"]) < 1.0
    best = int(np.argmax(everything[:, planted]))
    top = found[0]["contexts"][0]
    assert top["tokens"] == [f"<{tokens[best][0]}>", *(f" <{t}>" for t in tokens[best][1:])]  # spaces between words are kept
    assert np.log1p(max(top["activations"])) == pytest.approx(everything[best, planted], abs=1e-4) and top["activations"][0] == 0
    assert found[0]["density"] == pytest.approx((everything[:, planted] > 0).mean())


def test_rare_latents_are_left_out(setting):
    cfg, params, d, tokens = setting
    found = interpret.telling_latents(cfg, params, d, tokens, {"x": np.arange(80.0)}, Words(), latents=32, min_share=0.5)
    assert all(f["density"] >= 0.5 or f["effect"] == 0.0 for f in found)


def test_plane_keeps_groups_together():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 40)
    out = interpret.plane(rng.normal(size=(80, 6)) + 12 * groups[:, None])
    xy = np.stack([out["x"], out["y"]], axis=1)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (groups[distance.argmin(axis=1)] == groups).all() and "t-SNE" in out["method"]
    assert "PCA" in interpret.plane(rng.normal(size=(20, 6)))["method"]
