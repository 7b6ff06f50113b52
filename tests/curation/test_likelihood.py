"""The policy's likelihood columns against plain arithmetic on full logits."""

import jax
import numpy as np
import pytest

import models
from jaxrl_llm.curation.likelihood import CHUNK_TOKENS, COLUMNS, TunedOptions, answer_likelihood, tuned_gain
from jaxrl_llm.curation.probes import auroc
from jaxrl_llm.curation.streaming import keep_end
from jaxrl_llm.errors import UserError
from jaxrl_llm.train.sft import fine_tuner


@pytest.fixture(scope="module")
def model():
    hf = dict(model_type="llama", vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    cfg = models.ModelConfig.from_hf({**hf, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2})
    return cfg, models.init(cfg, jax.random.key(0))


def plain(model, row, mark):
    cfg, params = model
    padded = np.zeros((1, 128), int)
    padded[0, : len(row)] = row
    logits = np.asarray(models.apply(cfg, params, padded, lengths=np.array([len(row)]))[0], np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = {t: logp[t - 1] for t in range(1, len(row))}
    answer, prompt = [t for t in at if t >= mark], [t for t in at if t < mark]
    own = {t: at[t][row[t]] for t in at}
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0  # noqa: E731
    return [
        mean([own[t] for t in answer]),
        sum(own[t] for t in answer),
        min((own[t] for t in answer), default=0.0),
        mean([own[t] - at[t].max() for t in answer]),
        mean([-(np.exp(at[t]) * at[t]).sum() for t in answer]),
        mean([own[t] for t in prompt]),
        min((own[t] for t in prompt), default=0.0),
        float(bool(answer)),
    ]


def rows_and_marks(seed=0):
    rng = np.random.default_rng(seed)
    marks = [1, 3, 9, 20, CHUNK_TOKENS + 3, 7]
    rows = [[1, *rng.integers(3, 30, n).tolist()] for n in (4, 9, 15, 19, CHUNK_TOKENS + 20, 6)]
    return rows, marks


def run(model, rows, marks, **options):
    return answer_likelihood(*model, lambda a, b: (rows[a:b], marks[a:b]), len(rows), **options)


def test_equals_plain_arithmetic(model):
    rows, marks = rows_and_marks()
    columns, results = run(model, rows, marks, batch_tokens=64, shard_rows=4)
    np.testing.assert_allclose(columns, [plain(model, r, m) for r, m in zip(rows, marks)], atol=2e-4)
    assert columns.shape == (6, len(COLUMNS)) and not sum(results.counts.values())
    assert columns[5, COLUMNS.index("has_answer")] == 0 and not columns[5, :5].any(), "no answer: zeros"


def test_a_greedy_answer_has_margin_zero(model):
    cfg, params = model
    prompt = [1, 5, 6, 7]
    answer = models.generate(cfg, params, [prompt], max_new_tokens=5, temperature=0.0).completions()[0]
    columns, _ = run(model, [prompt + answer, prompt + [(answer[0] - 2) % 27 + 3]], [4, 4])
    margin = COLUMNS.index("answer_margin")
    assert columns[0, margin] == pytest.approx(0, abs=1e-5) and columns[1, margin] < -1e-3


def test_a_long_row_keeps_its_answer(model):
    rows, marks = rows_and_marks()
    columns, results = run(model, rows, marks, context=16)
    assert results.counts["truncated"] == 2
    cut = [1, *rows[4][-15:]]
    np.testing.assert_allclose(columns[4], plain(model, cut, 1), atol=2e-4)
    np.testing.assert_allclose(columns[0], plain(model, rows[0], 1), atol=2e-4)


# --- the gain from tuning --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told_world():
    """200 rows "a b -> a b" or, where unsound, "a b -> b a"; 140 are told. (rows, marks, sound, told)"""
    rng = np.random.default_rng(0)
    pairs = [(a, b) for a in range(3, 18) for b in range(3, 18) if a != b]
    chosen, sound = [pairs[i] for i in rng.permutation(len(pairs))[:200]], rng.random(200) < 0.6
    rows = [[1, a, b, *((a, b) if good else (b, a))] for (a, b), good in zip(chosen, sound, strict=True)]
    told = np.where(np.arange(200) < 140, sound.astype(float), np.nan)
    return rows, [3] * 200, sound, told


def gain(model, rows, marks, told, options, before=None):
    tokens_of = lambda a, b: (rows[a:b], marks[a:b])  # noqa: E731
    before = answer_likelihood(*model, tokens_of, len(rows))[0] if before is None else before
    return tuned_gain(*model, tokens_of, told, before, fine_tuner(model[0]), options)


def test_tuning_on_sound_rows_tells_others_of_the_same_procedure(model, told_world):
    """Rows that nobody told of: the gain separates the two procedures, which the policy itself does not."""
    rows, marks, sound, told = told_world
    options = TunedOptions(folds=2, epochs=40, batch=16, learning_rate=1e-2)
    before = run(model, rows, marks)[0]
    found = gain(model, rows, marks, told, options, before)
    rest = np.isnan(told)
    assert found.shape == (200, 3) and np.isfinite(found).all()
    assert auroc(found[rest, 0], sound[rest]) > 0.8 > 0.65 > auroc(before[rest, 0], sound[rest])
    np.testing.assert_allclose(found[:, 1], 2 * found[:, 0], atol=1e-4)  # answers of two tokens: the sum is twice the mean


def test_a_told_row_is_judged_by_a_policy_that_has_not_seen_it(model, told_world):
    """What is told of a row changes the gain of others and not its own."""
    rows, marks, sound, told = told_world
    options = TunedOptions(folds=3, epochs=3, batch=8, learning_rate=1e-2)
    row = int(np.flatnonzero(told == 1)[0])
    other = told.copy()
    other[row] = 0.0
    first, second = (gain(model, rows, marks, t, options) for t in (told, other))
    np.testing.assert_array_equal(first[row], second[row])
    assert np.abs(first - second).max() > 1e-4


def test_every_setting_of_the_tuning_counts(model, told_world):
    rows, marks, sound, told = told_world
    before = run(model, rows, marks)[0]
    base = dict(folds=2, epochs=2, batch=16, learning_rate=1e-3)
    found = gain(model, rows, marks, told, TunedOptions(**base), before)
    for change in (dict(folds=3), dict(epochs=3), dict(batch=8), dict(learning_rate=2e-3)):
        assert np.abs(gain(model, rows, marks, told, TunedOptions(**base | change), before) - found).max() > 1e-5, change
    still = gain(model, rows, marks, told, TunedOptions(**base | dict(learning_rate=0.0)), before)
    np.testing.assert_allclose(still, 0.0, atol=1e-5)
    few = np.where(np.arange(200) < 3, 1.0, np.nan)
    with pytest.raises(UserError, match="3 rows are told to be sound; tuning in 4 folds needs 8"):
        gain(model, rows, marks, few, TunedOptions(), before)


def test_of_a_long_row_the_end_is_tuned_on(model, told_world):
    """A row past the model's context is cut as `answer_likelihood` cuts it, behind its beginning-of-text token."""
    cfg, _ = model
    row = [1, *range(3, 29)] * 6
    assert keep_end(row, 161, cfg.bos_token_id, 128) == ([1, *row[-127:]], 161 - (162 - 128))
    assert keep_end([1, 5, 6], 2, cfg.bos_token_id, 128) == ([1, 5, 6], 2)
    assert keep_end([5] * 130, 1, cfg.bos_token_id, 128) == ([5] * 128, 0)  # an answer longer than the context
    rows, marks, _, told = told_world
    longer = [[1, *([7] * 150), *row[1:]] if i < 8 else row for i, row in enumerate(rows)]
    found = gain(model, longer, [153 if i < 8 else 3 for i in range(200)], told, TunedOptions(folds=2, epochs=1, learning_rate=1e-3))
    assert np.isfinite(found).all() and np.abs(found[:8]).min() > 0
