"""What a quality probe reads: the policy's opinion, and that of policies tuned on the rows told to be sound."""

import jax
import numpy as np
import pytest
from tiny_curation import save_model

import sae
from jaxrl_llm.curation.likelihood import COLUMNS
from jaxrl_llm.curation.passes import LanguageModel
from jaxrl_llm.curation.probes import JoinedDesign
from jaxrl_llm.curation.signals import ALONE, KINDS, QualityProbe, SignalOptions
from jaxrl_llm.data import lab_world
from jaxrl_llm.train.sft import fine_tuner


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(48 rows of the lab's world, a random model of it, an untrained SAE, what is told of 40 of them)."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    model = LanguageModel.load(str(folder), "float32", None)
    dictionary = sae.init(sae.SAEConfig(d_in=16, d_sae=48, k=4, hook_name="blocks.1.resid_post"), jax.random.key(0))
    rows = [row for row in lab_world.generate_problems(80, seed=0) if len(row["prompt"].split()) < 16][:48]
    told = np.where(np.arange(48) < 40, np.random.default_rng(0).random(48) < 0.6, np.nan)
    return rows, model, dictionary, told


def probe_of(world, told, tuned=True):
    rows, model, dictionary, _ = world
    settings = SignalOptions(pooling=("last",), remove_length=False, copies=20, draws=20)
    return QualityProbe(rows, model, model, dictionary, told, {}, settings, fine_tuner(model.cfg) if tuned else None)


def test_tuned_policies_add_to_what_every_model_kind_reads(world):
    """Three columns beside the policy's own, joined to the features of each model kind; none where it is off or nobody was told."""
    rows, model, _, told = world
    on, off = probe_of(world, told), probe_of(world, told, tuned=False)
    with_, without = on.designs(model.params), off.designs(model.params)
    assert with_["tuned"].x.shape == (48, len(COLUMNS) + 3) and np.abs(with_["tuned"].x[:, -3:]).max() > 1e-4
    np.testing.assert_array_equal(with_["tuned"].x[:, :-3], with_["logprob"].x)
    assert "tuned" not in without and "tuned" not in on.designs(model.params, tune=False)
    assert set(without) == set(with_) - {"tuned"}
    values, report = on.table(model.params, ("dense",))
    plain, plain_report = off.table(model.params, ("dense",))
    assert set(values) == {"sae", "dense", "logprob", "tuned", *ALONE} == set(plain) | {"tuned"}
    assert "tuned" in report["probes"] and "tuned" not in plain_report["probes"]
    np.testing.assert_allclose(values["logprob"], plain["logprob"], atol=1e-6)
    for kind in ALONE:
        np.testing.assert_allclose(values[kind], plain[kind], atol=1e-6)  # they read no policy
    assert all(isinstance(with_[kind], JoinedDesign) for kind in KINDS)  # words and lengths too: kinds differ by their features only
    for kind in ("sae", "dense"):
        assert np.abs(values[kind] - plain[kind]).max() > 1e-4
        np.testing.assert_allclose(on.fit(kind, model.params), values[kind], atol=1e-6)
    untold = probe_of(world, None).designs(model.params)
    assert "tuned" not in untold
