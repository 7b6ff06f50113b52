"""The policy's likelihood columns against plain arithmetic on full logits."""

import jax
import numpy as np
import pytest

import models
from jaxrl_llm.curation.likelihood import CHUNK_TOKENS, COLUMNS, answer_likelihood


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
