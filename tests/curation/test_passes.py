"""The forward passes of curation: the training of the SAE goes on where it was stopped."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_curation import N, config_of, save_world

import sae
from jaxrl_llm.curation import passes
from jaxrl_llm.data.lab_world import generate_problems

TRAIN = sae.train_sae


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, rows, config) of a training of eight updates."""
    world = save_world(tmp_path_factory.mktemp("world"))
    config = config_of(world, **{"train_sae.steps": "8", "train_sae.batch_size": "32"})
    return passes.LanguageModel.load(config.model, config.dtype, None), generate_problems(N, seed=0), config


def stopped(monkeypatch, step):
    """`sae.train_sae` as of now stops by an exception after `step` updates, and saves a checkpoint at each."""

    def log(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    def train_sae(cfg, batches, options, key, **more):
        options = dataclasses.replace(options, log_every=1, init_rows=64)
        return TRAIN(cfg, batches, options, key, **more, on_log=log, checkpoint_every=1)

    monkeypatch.setattr(sae, "train_sae", train_sae)


def test_a_stopped_training_ends_as_an_undisturbed_one(setting, monkeypatch, tmp_path):
    folder = tmp_path / "training"
    stopped(monkeypatch, None)
    wanted, figures = passes.train_dictionary(*setting, None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, 5)
        passes.train_dictionary(*setting, None, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["3", "4"]
    found, again = passes.train_dictionary(*setting, None, folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert again == figures and not folder.exists()


def test_train_resumably_is_train_sae(tmp_path):
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    cfg, train = sae.SAEConfig(d_in=8, d_sae=16, k=2), sae.SAETrainConfig(steps=4, init_rows=32)
    a, _ = passes.train_resumably(tmp_path / "training", cfg, sae.array_batches(rows, 16), train, jax.random.key(0), progress=False)
    b, _ = sae.train_sae(cfg, sae.array_batches(rows, 16), train, jax.random.key(0), progress=False)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert not (tmp_path / "training").exists()
