"""A GRPO step of tunix's GRPOLearner: seconds for rollout, reward and update, fp32, no KL."""

import itertools
import time

import numpy as np
import optax
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from peer_common import arguments, emit
from tunix_common import WordTokenizer, mesh, model, texts


class EvenShare:
    """A reward that costs nothing, the share of even words; it also keeps the time of its calls, one a step."""

    __name__ = "even_share"

    def __init__(self):
        self.times = []

    def __call__(self, prompts, completions, **_):
        self.times.append(time.perf_counter())
        words = [[int(word[1:]) for word in text.split()] for text in completions]
        return [sum(number % 2 == 0 for number in row) / max(len(row), 1) for row in words]


def main():
    """Trains for repeats + 3 steps and takes the time from one reward to the next: update, rollout, reward."""
    args = arguments(__doc__, prompts=8, samples=8, prompt=32, new=64, repeats=3)
    steps = args.repeats + 3
    reward, place = EvenShare(), mesh()
    config = ClusterConfig(
        role_to_mesh={Role.ACTOR: place, Role.REFERENCE: place, Role.ROLLOUT: place},
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
            eval_every_n_steps=10**6,
            max_steps=steps,
            mini_batch_size=args.prompts,
            train_micro_batch_size=args.prompts,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=args.new,
            max_prompt_length=args.prompt,
            kv_cache_size=args.prompt + args.new,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
        ),
    )
    begin = time.perf_counter()
    cluster = RLCluster(actor=model(), tokenizer=WordTokenizer(), cluster_config=config)
    learner = GRPOLearner(
        rl_cluster=cluster, reward_fns=reward, algo_config=GRPOConfig(num_generations=args.samples, num_iterations=1, beta=0.0)
    )
    data = [{"prompts": np.array(texts(args.prompts, args.prompt, seed))} for seed in range(steps)]
    learner.train(data)
    assert len(reward.times) == steps, f"{len(reward.times)} reward calls in {steps} steps"
    gaps = [later - earlier for earlier, later in itertools.pairwise(reward.times[2:])]
    emit("google-tunix", min(gaps), "s", max(0.0, reward.times[1] - begin - 2 * min(gaps)), seconds=sorted(gaps)[len(gaps) // 2])


if __name__ == "__main__":
    main()
