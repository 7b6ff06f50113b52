"""A policy, prompts, a tokenizer and a reward small enough for a test, and a run of them; also used by subprocesses."""

import sys

import jax
import numpy as np

import models
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.config import GRPOConfig, OptimizerConfig
from jaxrl_llm.train.loop import train_grpo

VOCAB = 16
STOP = 1
CONFIG = models.ModelConfig(
    family="llama", vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, tie_embeddings=True,
    max_position=32, eos_token_ids=(STOP,), pad_token_id=STOP, initializer_range=0.3,
)  # fmt: skip
TINY = GRPOConfig(
    steps=4, num_samples=4, max_new_tokens=6, optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-3), checkpoint_every=1, sample_every=1
)


class Tokenizer:
    """Token 7 is written as " 7"."""

    def decode(self, row, skip_special_tokens=True):
        return " ".join(str(t) for t in row if t != STOP)

    def batch_decode(self, rows, skip_special_tokens=True):
        return [self.decode(row) for row in rows]


def params(seed=0):
    return models.init(CONFIG, jax.random.key(seed))


def prompts(count=12, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 8, count).astype(np.int32)
    rows = [{"id": f"p{i}", "prompt": f"prompt {i}", "answer": str(2 + i % 5), "level": i % 2} for i in range(count)]
    return PromptBatch(rng.integers(2, VOCAB, (count, 8)).astype(np.int32), lengths, [r["id"] for r in rows], rows)


def reward(inputs):
    """PASS when the answer is among the written tokens."""
    return [Verdict(Status.PASS if i.answer in i.response.split() else Status.FAIL) for i in inputs]


def run(folder, config=TINY, *, reward=reward, schedule=None, evals=None, data=None, start=None, **kwargs):
    data = prompts() if data is None else data
    schedule = ShuffledSchedule(len(data), 4, seed=3) if schedule is None else schedule
    run_dir = RunDir(folder, {"name": "tiny"}, kind="grpo")
    start = params() if start is None else start
    return train_grpo(CONFIG, start, Tokenizer(), data, reward, schedule, config, run_dir, evals, progress=False, **kwargs)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


if __name__ == "__main__":  # python tiny_grpo.py FOLDER STEPS: a run that a test may kill
    import dataclasses

    trained, _ = run(sys.argv[1], dataclasses.replace(TINY, steps=int(sys.argv[2])))
    np.save(sys.argv[1] + "/final.npy", flat(trained))
