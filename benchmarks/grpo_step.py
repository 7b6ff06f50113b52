"""A GRPO step on the CPU: rollout, reward and update, on-policy, no KL, fp32.

    python -m benchmarks.grpo_step [--no-peers] [--record]

Qwen2 shape (6.4 M parameters: hidden 256, 6 layers, 4 heads, 2 KV heads, MLP 1024, vocabulary 2048 tied), 8 prompts x 8 samples,
32 + 64 tokens, every completion runs to its last token. Ours is the trainer's own loop, with decoding to text, metrics, records and
all: a step's time is that from one call of the reward to the next (update, rollout, reward), as with tunix; TRL's is from the end of
one step to the end of the next. `grpo_step_rollout`, `_reward` and `_update` are the parts of our best step by the trainer's own
clock. All count the best of the repeats, since a machine that others use too slows each by different amounts at different times.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.common import Figure, peer_value, progress, run_benchmark, run_peer, small_qwen2

PROMPTS, SAMPLES, PROMPT, NEW, VOCAB = 8, 8, 32, 64, 2048


def tokenizer(vocab: int = VOCAB):
    """One token a word, w0 to w2047 or as many as the vocabulary has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core)


class EvenShare:
    """A reward that costs nothing, the share of even words; it also keeps the time of its calls, one a step."""

    def __init__(self):
        self.times = []

    def __call__(self, inputs):
        from jaxrl_llm.rewards.verdict import Status, Verdict

        self.times.append(time.perf_counter())
        words = [item.response.split() for item in inputs]
        return [Verdict(Status.PASS, score=sum(int(w[1:]) % 2 == 0 for w in each) / max(len(each), 1)) for each in words]


def train(
    steps: int, cfg: Any = None, prompts: int = PROMPTS, samples: int = SAMPLES, width: int = PROMPT, new: int = NEW, **settings: Any
) -> tuple[list[dict], list[float]]:
    """The records of `steps` steps of `train_grpo`, and the seconds from one reward to the next.

    cfg: the model, whose random parameters are made here; None is the small one. settings: further fields of `GRPOConfig`.
    """
    import jax

    import models
    from jaxrl_llm.data.prompts import PromptBatch
    from jaxrl_llm.data.sampler import ShuffledSchedule
    from jaxrl_llm.run_dir import RunDir
    from jaxrl_llm.train.config import GRPOConfig, OptimizerConfig
    from jaxrl_llm.train.loop import train_grpo

    cfg, reward, count = cfg or small_qwen2(), EvenShare(), prompts * steps
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (count, width)).astype(np.int32)
    rows = [{"prompt": str(i)} for i in range(count)]
    batch = PromptBatch(tokens, np.full(count, width, np.int32), [str(i) for i in range(count)], rows)
    config = GRPOConfig(
        steps=steps,
        num_samples=samples,
        max_new_tokens=new,
        checkpoint_every=0,
        sample_every=0,
        optimizer=OptimizerConfig(learning_rate=1e-4),
        **settings,
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(folder, dataclasses.asdict(config), kind="grpo")
        start = lambda: models.init(cfg, jax.random.key(0))  # noqa: E731
        schedule = ShuffledSchedule(count, prompts)
        train_grpo(cfg, start, tokenizer(cfg.vocab_size), batch, reward, schedule, config, run_dir, progress=False)
        records = [record for record in run_dir.metrics() if record["kind"] == "train"]
    assert all(record["completion_length"] == new for record in records), "a completion ended early"
    return records, [later - earlier for earlier, later in itertools.pairwise(reward.times)]


def updates(buckets: int, repeats: int, longest: int = 256) -> tuple[float, float]:
    """(best seconds of an update, seconds to compile) on completions of lengths spread evenly over 1:8, 8 a micro-batch."""
    import jax

    import models
    from jaxrl_llm.data.prompts import PromptBatch
    from jaxrl_llm.rewards.verdict import Status, Verdict
    from jaxrl_llm.train.config import GRPOConfig, OptimizerConfig
    from jaxrl_llm.train.rollout import Experience, build_batch
    from jaxrl_llm.train.state import init_state
    from jaxrl_llm.train.step import compiled_update, step_spec

    cfg, rng, N = small_qwen2(), np.random.default_rng(0), PROMPTS * SAMPLES
    lengths = rng.permutation(np.linspace(longest // 8, longest, N).astype(np.int32))
    draw = lambda *shape: rng.integers(0, VOCAB, shape).astype(np.int32)  # noqa: E731
    rows = np.repeat(np.arange(PROMPTS, dtype=np.int32), SAMPLES)
    sampled = (draw(N, longest), lengths, -np.ones((N, longest), np.float32), rows, np.zeros(N, np.int32))
    rollout = models.Rollout(draw(N, PROMPT), np.full(N, PROMPT, np.int32), *sampled)
    prompts = PromptBatch(draw(PROMPTS, PROMPT), np.full(PROMPTS, PROMPT, np.int32), [str(i) for i in range(PROMPTS)], [{}] * PROMPTS)
    rewards = rng.random(N).astype(np.float32)
    judged = Experience(prompts, rollout, [""] * N, [Verdict(Status.PASS)] * N, rewards, np.ones(N, bool), np.ones(N, bool), rows, 0.0, 0.0)
    optimizer = OptimizerConfig(learning_rate=1e-6)
    config = GRPOConfig(num_samples=SAMPLES, max_new_tokens=longest, micro_batch_rows=8, length_buckets=buckets, optimizer=optimizer)
    config = dataclasses.replace(config, samples_together=2 if buckets > 1 else 0)
    spec, batch = step_spec(cfg, config), build_batch(judged, config)
    state, update, seconds = init_state(cfg, spec.optimizer, models.init(cfg, jax.random.key(0))), compiled_update(spec), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, metrics, _ = jax.block_until_ready(update(state, batch))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]), seconds[0] - min(seconds[1:])


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """Seconds a step beside the peers, then where they go."""
    peers = {name: run_peer(name, f"{name}_grpo", ["--repeats", args.repeats]) if args.peers else None for name in ("tunix", "trl")}
    shape = f"{PROMPTS} x {SAMPLES} completions, {PROMPT} + {NEW} tokens, 6.4 M parameters, fp32"
    progress("our steps")
    records, gaps = train(args.repeats + 3)
    seconds = min(gaps[2:])
    compile_s = max(0.0, records[0]["seconds"] + records[1]["seconds"] - 2 * seconds)
    for (peer, result), goal in zip(peers.items(), ("; goal 2 x", "")):
        name = None if result is None else result["peer"]
        yield Figure(f"grpo_step_vs_{peer}", seconds, "s", name, peer_value(result), compile_s, shape + goal, better="lower")
    best = min(records[2:], key=lambda record: record["seconds"])
    for part in ("rollout", "reward", "update"):
        yield Figure(f"grpo_step_{part}", best[f"seconds_{part}"], "s", shape=shape, better="lower")
    progress("updates on completions of many lengths")
    (cut, compile_s), (whole, _) = (updates(buckets, args.repeats) for buckets in (4, 1))
    shape = f"{PROMPTS} x {SAMPLES} completions of 32 to 256 tokens, 8 a micro-batch, 2 of a prompt together, length_buckets 4"
    yield Figure("grpo_update_buckets", cut, "s", "length_buckets 1", whole, compile_s, shape, better="lower")
    if args.plain:
        progress("our steps without the shared prefix")
        plain = min(record["seconds_update"] for record in train(args.repeats + 3, shared_prefix=False)[0][2:])
        update = min(record["seconds_update"] for record in records[2:])
        yield Figure("grpo_update_shared_prefix", update, "s", "our plain path", plain, shape=shape, better="lower")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--plain", action="store_true", help="also time the update without the shared prefix")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
