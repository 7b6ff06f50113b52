"""Writes tests/golden/trl.json: advantages, losses and gradients by TRL's own trainers on log-probabilities that are given to them.

Run `.venvs/trl/bin/python tests/make_golden_trl.py` (`make peer-trl` sets that python up; any that has trl will do). Sampling, forward
passes and rewards are replaced by numbers from a seed; what TRL makes of them is its own code, from rewards to the loss. Versions and
inputs stand beside the numbers, so that tests/losses/test_trl_parity.py needs no TRL.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("WANDB_DISABLED", "true")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

GOLDEN = Path(__file__).resolve().parent / "golden" / "trl.json"
GROUPS, SAMPLES, LIMIT, VOCAB = 2, 4, 7, 12
LENGTHS = [7, 2, 4, 1, 3, 5, 7, 6]
COMMON = dict(clip_low=0.2, clip_high=0.2)
# name -> (GRPOConfig of TRL, ours); "vllm" turns on the weight of trainer over sampler.
LOSSES = {
    "grpo": (dict(loss_type="grpo"), dict(aggregation="sequence_mean")),
    "bnpo": (dict(loss_type="bnpo"), dict(aggregation="token_mean")),
    "dr_grpo": (dict(loss_type="dr_grpo"), dict(aggregation="dr_grpo")),
    "dapo": (dict(loss_type="dapo", epsilon_high=0.28), dict(aggregation="token_mean", clip_high=0.28)),
    "gspo": (dict(loss_type="grpo", importance_sampling_level="sequence"), dict(aggregation="sequence_mean", ratio="sequence")),
    "cispo": (
        dict(loss_type="cispo", epsilon_high=1.3), dict(aggregation="token_mean", surrogate="cispo", clip_low=1.0, clip_high=0.3)
    ),
    "kl": (dict(loss_type="grpo", beta=0.3, use_bias_correction_kl=False), dict(aggregation="sequence_mean", kl="k3", kl_coef=0.3)),
    "mismatch": (
        dict(loss_type="dapo", vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1.1),
        dict(aggregation="token_mean", mismatch="token", mismatch_cap=1.1),
    ),
}  # fmt: skip
ADVANTAGES = {
    "grpo_group": ("grpo", dict(scale_rewards="group"), dict(scale="group_std")),
    "grpo_none": ("grpo", dict(scale_rewards="none"), dict(scale="none")),
    "rloo": ("rloo", dict(beta=0.0), dict(baseline="leave_one_out", scale="none")),
    "rloo_normalised": ("rloo", dict(beta=0.0, normalize_advantages=True), dict(baseline="leave_one_out", scale="batch_std")),
    "rloo_kl": ("rloo", dict(beta=0.3), dict(baseline="leave_one_out", scale="none", kl_coef=0.3)),
}


def inputs() -> dict[str, np.ndarray]:
    """Log-probabilities [rows, LIMIT] under four policies, and rewards; the last row of the second group has no verdict (NaN)."""
    rng = np.random.default_rng(16)
    logps = -rng.uniform(0.1, 3.0, (GROUPS * SAMPLES, LIMIT))
    rewards = rng.integers(0, 3, GROUPS * SAMPLES).astype(float)
    rewards[-1] = np.nan
    drift = {name: logps + rng.normal(0, scale, logps.shape) for name, scale in (("old", 0.3), ("sampler", 0.3), ("ref", 0.5))}
    return {"logps": logps, **drift, "rewards": rewards}


def tokenizer():
    """One token a word; the trainers ask for one."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", *map(str, range(VOCAB - 2))])}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", padding_side="left")


def make_trainer(kind: str, folder: str, options: dict, given: dict[str, torch.Tensor]):
    """A trainer of TRL whose sampling, forward passes and rewards are what is given."""
    config, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    args = config(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=GROUPS * SAMPLES, num_generations=SAMPLES,
        max_completion_length=LIMIT, num_iterations=2, gradient_checkpointing=False, epsilon=0.2, save_strategy="no", disable_tqdm=True,
        **options,
    )  # fmt: skip
    made = trainer(
        model=folder, args=args, reward_funcs=lambda completions, **_: [0.0] * len(completions), processing_class=tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "1 2"}] * GROUPS * SAMPLES),
    )  # fmt: skip
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    completions = [[2] * n for n in LENGTHS]
    texts = ["0"] * len(LENGTHS)
    sampled = [given["sampler"][i, :n].tolist() for i, n in enumerate(LENGTHS)]
    prompts = [[3, 4]] * len(LENGTHS)
    made._generate = lambda _: (prompts, completions, None, texts, sampled, {}, None, None) if kind == "grpo" else (prompts, completions, texts)
    made._calculate_rewards = lambda *_: given["rewards"][:, None]

    def logprobs(model, *_, compute_entropy=False, **__):
        """The reference's, the trained policy's in the loss (which asks for entropies), the old policy's before it."""
        name = "logps" if compute_entropy else "ref" if model is made.ref_model else "old"
        return given[name], torch.zeros_like(given[name]), None

    made._get_per_token_logps_and_entropies = logprobs
    return made


def on_policy_gradient(kind: str, folder: str, rows: list[dict], numbers: dict[str, np.ndarray]) -> list:
    """The gradient of the loss at the policy that sampled, where TRL's ratio of a whole sequence is 1."""
    given = {k: torch.tensor(v) for k, v in (numbers | {"old": numbers["logps"]}).items()}
    given["logps"].requires_grad_()
    trainer = make_trainer(kind, folder, {"beta": 0.0}, given)
    trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows)).backward()
    return given["logps"].grad.tolist()


def main() -> None:
    numbers = inputs()
    result: dict = {"losses": {}, "advantages": {}}
    with tempfile.TemporaryDirectory() as folder:
        shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
        transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=VOCAB, eos_token_id=1, pad_token_id=0, **shape)).save_pretrained(folder)
        rows = [{"prompt": "1 2"}] * GROUPS * SAMPLES
        for name, (kind, options, ours) in ADVANTAGES.items():
            trainer = make_trainer(kind, folder, options, {k: torch.tensor(v) for k, v in numbers.items()})
            scored = trainer._generate_and_score_completions(rows)
            result["advantages"][name] = {"ours": ours, "advantages": scored["advantages"].tolist()}
        for name, (options, ours) in LOSSES.items():
            given = {k: torch.tensor(v) for k, v in numbers.items()}
            given["logps"].requires_grad_()
            trainer = make_trainer("grpo", folder, {"scale_rewards": "group", "beta": 0.0} | options, given)
            trainer.use_vllm = name == "mismatch"
            loss = trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows))
            loss.backward()
            result["losses"][name] = {"ours": COMMON | ours, "loss": loss.item(), "grad": given["logps"].grad.tolist()}
        result["rloo_on_policy_grad"] = on_policy_gradient("rloo", folder, rows, numbers)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    head = {"command": ".venvs/trl/bin/python tests/make_golden_trl.py", "versions": versions, "samples": SAMPLES, "limit": LIMIT, "lengths": LENGTHS}
    plain = {k: [None if np.isnan(x) else x for x in v] if v.ndim == 1 else v.tolist() for k, v in numbers.items()}
    GOLDEN.write_text(json.dumps(head | {"inputs": plain} | result) + "\n")
    print(f"{GOLDEN.stat().st_size:,} bytes, {versions}")


if __name__ == "__main__":
    main()
