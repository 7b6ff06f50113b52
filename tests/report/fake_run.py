"""A make-believe GRPO run directory, written by the house's own RunDir."""

import numpy as np

from jaxrl_llm.run_dir import RunDir


def write_run(path, steps=90, seed=0):
    rng = np.random.default_rng(seed)
    config = {"seed": 7, "steps": steps, "model": "a/folder", "optimizer": {"learning_rate": 1e-4, "clip_norm": 1.0}}
    run = RunDir(path, config, kind="grpo")
    for step in range(1, steps + 1):
        gain = 0.25 * (1 - np.exp(-step / 30))
        noise = rng.normal(0, 0.04, 6)
        run.log(
            {
                "kind": "train",
                "step": step,
                "kl": None,
                "reward": 0.35 + gain + noise[0],
                "pass_rate": 0.3 + gain + noise[0],
                "zero_spread": 0.55 + noise[1],
                "entropy": 1.4 - gain + noise[2],
                "completion_length": 30 + 10 * gain + 20 * noise[3],
                "clip_share": 0.0,
                "logp_diff_mean": 10.0 ** (-6 + noise[4] * 5),
                "logp_diff_max": 10.0 ** (-5 + noise[5] * 5),
                "grad_norm": 0.8 + noise[1],
                "loss": noise[5],
                "errors": 0,
                "my_own_metric": float(step % 7),
                "seconds_rollout": 0.9 + noise[2],
                "seconds_reward": 0.05,
                "seconds_update": 0.6 + noise[3],
                "tokens_per_s": 4000 + 1000 * noise[4],
            }
        )
        if step % 15 == 0:
            levels = {str(k): 0.9 - 0.15 * k + gain for k in range(1, 6)}
            record = {"kind": "eval", "step": step, "set": "test", "accuracy": 0.3 + gain, "n": 500, "avg_at_k": 0.29 + gain, "k": 4}
            run.log(record | {"by": {"level": levels}, "passed": [1, 0, None]})
            responses = [
                {"text": f"It is {i}.", "status": "PASS" if i % 2 else "FAIL", "score": float(i % 2), "reason": f"answer {i}"}
                for i in range(4)
            ]
            prompts = [{"id": f"p{step}", "prompt": f"Question {step}?", "answer": "3", "responses": responses}]
            run.sample({"kind": "samples", "step": step, "prompts": prompts})
    run.summary({"steps": steps, "reward_last": 0.55, "versions": {"jax": "0.10.2"}, "evals": {"test": {"first": 0.4, "last": 0.55}}})
    return run
