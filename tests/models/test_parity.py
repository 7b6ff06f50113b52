"""Logits equal `transformers` in fp32 to 2e-5 of the largest logit: against stored ones, and live where torch is."""

import functools
import importlib.util
import json
import sys

import jax
import numpy as np
import parity_cases as cases
import pytest

import models

TOLERANCE = 2e-5
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: only the stored logits are checked")


AS_SHIPPED = {"xla_cpu_use_fusion_emitters": True}  # as users have it; conftest.py turns it off


@pytest.fixture(scope="module")
def golden(repo):
    return np.load(repo / "tests" / "golden" / "logits.npz")


@pytest.fixture(scope="module")
def make_golden(repo):
    sys.path.insert(0, str(repo / "tests"))
    import make_golden

    return make_golden


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name -> (folder, cfg, params), each checkpoint made and read once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("parity") / name
            cases.write_checkpoint(folder, cases.CASES[name], cases.case_seed(name))
            made[name] = (folder, *models.load(folder))
        return made[name]

    return get


@functools.partial(jax.jit, static_argnums=0, compiler_options=AS_SHIPPED)
def logits_at(cfg, params, tokens, positions):
    return models.unembed(cfg, params, models.forward(cfg, params, tokens, positions=positions).hidden)


@pytest.mark.parametrize("name", cases.CASES)
def test_stored_logits(name, golden, loaded):
    """Right-padded from position 0, and whole rows from a far position."""
    _, cfg, params = loaded(name)
    given = cases.inputs(name)
    positions = np.broadcast_to(np.arange(cases.TOKENS, dtype=np.int32), given["tokens"].shape)
    real = positions < given["lengths"][:, None]
    padded = logits_at(cfg, params, given["tokens"], np.where(real, positions, -1))
    assert cases.relative_error(np.asarray(padded)[real], golden[f"{name}/padded"][real]) < TOLERANCE
    far = logits_at(cfg, params, given["tokens"], positions + given["offset"])
    assert cases.relative_error(np.asarray(far), golden[f"{name}/far"]) < TOLERANCE


def test_every_case_and_family_is_stored(golden, repo, make_golden):
    assert set(golden.files) == {f"{name}/{run}" for name in cases.CASES for run in ("padded", "far")}
    assert {c["model_type"] for c in cases.CASES.values()} == set(models.families.FAMILIES)
    size = sum(path.stat().st_size for path in (repo / "tests" / "golden").iterdir())
    assert size < 1_000_000
    versions = json.loads((repo / "tests" / "golden" / "versions.json").read_text())
    assert {"torch", "transformers"} <= versions.keys()
    assert make_golden.weights_digest() == versions["weights_sha256"], "numpy draws other weights: run make_golden.py"


@needs_torch
@pytest.mark.parametrize("name", cases.CASES)
def test_live_and_exported_logits(name, golden, loaded, make_golden, tmp_path):
    """Today's transformers gives the stored logits, and reads our export as the same model."""
    folder, cfg, params = loaded(name)
    real = np.arange(cases.TOKENS) < cases.inputs(name)["lengths"][:, None]
    live = make_golden.padded_logits(name, folder)
    assert cases.relative_error(live[real], golden[f"{name}/padded"][real]) < TOLERANCE
    models.save(tmp_path / "export", cfg, params)
    exported = make_golden.padded_logits(name, tmp_path / "export")
    np.testing.assert_array_equal(exported[real], live[real])


@pytest.mark.parametrize(("name", "nll"), [("stories260k", 1.245), ("babyllama-0.9m", 0.604)])
def test_real_checkpoint_nll(name, nll, assets):
    """Mean negative log-likelihood of the first 40 stories, cut to the context, is what the checkpoint's maker saw."""
    cfg, params = models.load(assets / "checkpoints" / name)
    tokenizer = models.load_tokenizer(assets / "checkpoints" / name)
    rows = [tokenizer.encode(text)[: cfg.max_position] for text in first_stories(assets, 40)]
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    total = count = 0
    for start in range(0, len(rows), 10):
        part, sizes = tokens[start : start + 10], lengths[start : start + 10]
        logits = np.asarray(models.apply(cfg, params, part, lengths=sizes)[0], np.float64)
        logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        mask = np.arange(1, part.shape[1]) < sizes[:, None]
        total -= (np.take_along_axis(logps[:, :-1], part[:, 1:, None], -1)[..., 0] * mask).sum()
        count += mask.sum()
    assert total / count == pytest.approx(nll, abs=0.01)


def first_stories(assets, n):
    text = (assets / "data" / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8", errors="ignore")
    return [story.strip() for story in text.split("<|endoftext|>")[:n]]


REAL = ["stories260k", "babyllama-0.9m"]


@pytest.mark.parametrize("name", REAL)
def test_stored_logits_of_real_checkpoints(name, assets, repo, make_golden):
    """Some logits of the real checkpoints by transformers, kept in the repository, so that they are checked without torch too."""
    folder = assets / "checkpoints" / name
    told = json.loads((repo / "tests" / "golden" / "versions.json").read_text())["real"]
    assert make_golden.file_digest(folder / "model.safetensors") == told["weights_sha256"][name], "other weights: run make_golden.py real"
    expected = np.load(repo / "tests" / "golden" / "real_logits.npz")[name]
    cfg, params = models.load(folder)
    tokens, lengths = make_golden.real_inputs(cfg.vocab_size)
    found = make_golden.stored_part(models.apply(cfg, params, tokens, lengths=lengths)[0])
    assert 100 < expected.size < 1000 and expected.shape == found.shape and expected.std() > 1
    assert cases.relative_error(found, expected) < TOLERANCE


def test_the_versions_of_the_stored_real_logits_are_told(repo, make_golden):
    told = json.loads((repo / "tests" / "golden" / "versions.json").read_text())["real"]
    assert {"torch", "transformers", "numpy"} <= told.keys() and list(told["weights_sha256"]) == REAL == list(make_golden.REAL)


@needs_torch
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoint_logits(name, assets, repo, make_golden):
    """Every logit, live; and the stored ones are what today's transformers gives."""
    folder = assets / "checkpoints" / name
    cfg, params = models.load(folder)
    tokens, lengths = make_golden.real_inputs(cfg.vocab_size)
    found = np.asarray(models.apply(cfg, params, tokens, lengths=lengths)[0])
    real = np.arange(64) < lengths[:, None]
    expected = make_golden.reference_logits(folder, tokens, lengths)
    assert cases.relative_error(found[real], expected[real]) < TOLERANCE
    stored = np.load(repo / "tests" / "golden" / "real_logits.npz")[name]
    assert cases.relative_error(make_golden.stored_part(expected), stored) < TOLERANCE
