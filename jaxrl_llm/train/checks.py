"""Checks of a training run's settings, before anything is compiled: each raises UserError with one line that names the setting and the fix."""

import dataclasses
import typing
from typing import Any

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.train.config import (
    DPOConfig,
    GRPOConfig,
    LoraSettings,
    LossConfig,
    OnlineDPOConfig,
    OptimizerConfig,
    PairLossConfig,
    SFTConfig,
)

if typing.TYPE_CHECKING:
    from models.config import ModelConfig

TOKEN_BASELINES = ("batch_mean", "value")  # those that give each token an advantage of its own and compare no samples of a prompt


def check_choice(name: str, value: Any, known: tuple) -> None:
    """Raises UserError unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"setting '{name}' is {value!r}; it must be one of {', '.join(map(repr, known))}")


def check_dtype(dtype: str) -> None:
    """Raises UserError for a precision that training does not run in: half precision overflows."""
    check_choice("dtype", dtype, ("float32", "bfloat16"))


def check_grpo(config: GRPOConfig) -> None:
    """Raises UserError for settings that have no meaning, before anything is compiled."""
    from jaxrl_llm.losses import grpo

    choices = {
        "aggregation": grpo.AGGREGATIONS, "baseline": grpo.BASELINES, "advantage_scale": grpo.ADVANTAGE_SCALES, "ratio": grpo.RATIOS,
        "surrogate": grpo.SURROGATES, "mismatch": grpo.MISMATCHES, "kl": grpo.KL_KINDS, "kl_place": grpo.KL_PLACES,
    }  # fmt: skip
    for name, known in choices.items():
        check_choice(f"loss.{name}", getattr(config.loss, name), known)
    _check_loss(config.loss)
    check_optimizer(config.optimizer)
    check_lora(config.lora)
    check_counts(config)
    _check_at_least_one(config, ("steps", "num_samples", "max_new_tokens", "inner_epochs", "updates_per_epoch", "rollout_rows", "rollout_tries"))
    _check_at_least_one(config, ("eval_batch", "length_buckets"))
    if config.num_samples == 1 and (config.rollout_tries > 1 or config.loss.baseline not in TOKEN_BASELINES):
        name = "rollout_tries" if config.rollout_tries > 1 else "loss.baseline"
        raise UserError(
            f"setting '{name}' compares the samples of a prompt, and num_samples=1: every advantage would be 0; "
            "set num_samples to 2 or more, or loss.baseline='batch_mean' or 'value' with rollout_tries=1"
        )
    _check_buckets(config)
    _check_overlap(config)
    _check_overlong(config)
    if not config.temperature > 0:
        raise UserError(f"setting 'temperature' must be above 0 in training, got {config.temperature}; evaluation is greedy anyway")
    truncated = config.top_k > 0 or config.top_p < 1.0
    if truncated and not config.allow_truncated_sampling:
        raise UserError(
            f"top_k={config.top_k}, top_p={config.top_p}: the log-probabilities in the loss are over the full vocabulary, so training on "
            "truncated samples biases the ratio; set top_k=0 and top_p=1, or allow_truncated_sampling=True to accept that"
        )


def _check_buckets(config: GRPOConfig | DPOConfig | OnlineDPOConfig) -> None:
    if config.length_buckets > 1 and not config.micro_batch_rows:
        raise UserError(f"setting 'length_buckets' is {config.length_buckets} and 'micro_batch_rows' 0: there is one micro-batch, so set that too")


def _check_overlap(config: GRPOConfig) -> None:
    if config.overlap_rewards and config.rollout_tries > 1:
        raise UserError(
            f"setting 'overlap_rewards' is True and 'rollout_tries' {config.rollout_tries}: whether to roll out again is known only when the step's "
            "completions are judged; set rollout_tries=1, or overlap_rewards=False"
        )
    if config.overlap_rewards and config.loss.mismatch is not None:
        raise UserError(
            f"setting 'loss.mismatch' is {config.loss.mismatch!r}, the weight of the trainer's old log-probabilities over the sampler's; with "
            "overlap_rewards the old ones are the sampler's: set it to None, or overlap_rewards=False"
        )


def _check_overlong(config: GRPOConfig | OnlineDPOConfig) -> None:
    if not 0 <= config.overlong_buffer <= config.max_new_tokens or config.overlong_penalty < 0:
        raise UserError(
            f"setting 'overlong_buffer' must be from 0 (off) to max_new_tokens={config.max_new_tokens} and 'overlong_penalty' not below 0, "
            f"got {config.overlong_buffer} and {config.overlong_penalty:g}"
        )
    if not 0 <= config.overlong_buffer_share <= 1:
        raise UserError(f"setting 'overlong_buffer_share' is a share of max_new_tokens: give 0 (off) to 1, got {config.overlong_buffer_share:g}")


def _check_loss(loss: LossConfig) -> None:
    """Raises UserError for settings of the loss that have no meaning together."""
    if not 0 <= loss.clip_low <= 1 or loss.clip_high < 0:
        raise UserError(f"setting 'loss.clip_low' must be from 0 to 1 and 'loss.clip_high' not below 0, got {loss.clip_low} and {loss.clip_high}")
    if loss.mismatch is not None and not loss.mismatch_cap > 0:
        raise UserError(f"setting 'loss.mismatch_cap' must be above 0, got {loss.mismatch_cap}")
    for name in ("kl_coef", "entropy_coef", "advantage_ddof"):
        if getattr(loss, name) < 0:
            raise UserError(f"setting 'loss.{name}' must not be below 0, got {getattr(loss, name)}")
    if loss.kl is None and loss.kl_coef:
        raise UserError(f"setting 'loss.kl_coef' is {loss.kl_coef:g}, but there is no KL: set loss.kl ('k2' or 'k3' in the loss), or kl_coef to 0")
    if not loss.advantage_eps > 0:
        raise UserError(f"setting 'loss.advantage_eps' must be above 0, got {loss.advantage_eps:g}: a std may be 0")
    if loss.kl is None and loss.kl_place != "loss":
        raise UserError(f"setting 'loss.kl_place' is {loss.kl_place!r}, but there is no KL: set loss.kl (usually 'k1') and loss.kl_coef")
    if loss.kl_place == "token_reward" and loss.baseline not in TOKEN_BASELINES:
        raise UserError(
            f"setting 'loss.kl_place' is 'token_reward', which gives each token a return of its own; loss.baseline={loss.baseline!r} is one "
            "number a completion: set loss.baseline='batch_mean' or 'value', or loss.kl_place='sequence_reward'"
        )
    if loss.baseline in TOKEN_BASELINES and loss.advantage_scale == "group_std":
        raise UserError(
            f"setting 'loss.advantage_scale' is 'group_std', but loss.baseline={loss.baseline!r} knows no groups: set 'batch_std' or 'none'"
        )
    for name in ("gamma", "gae_lambda"):
        if not 0 <= getattr(loss, name) <= 1:
            raise UserError(f"setting 'loss.{name}' must be from 0 to 1, got {getattr(loss, name)}")
    for name in ("value_coef", "value_clip"):
        if getattr(loss, name) < 0:
            raise UserError(f"setting 'loss.{name}' must not be below 0, got {getattr(loss, name)}")
    if loss.surrogate == "cispo" and loss.ratio == "sequence_token":
        raise UserError("setting 'loss.ratio' is 'sequence_token', but 'cispo' takes no gradient of the ratio: set loss.ratio='token'")


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError for an unknown schedule or a number out of its range."""
    check_choice("optimizer.schedule", config.schedule, ("constant", "linear", "cosine"))
    for name in ("learning_rate", "warmup_steps", "decay_steps", "final_share", "weight_decay", "clip_norm", "spike_factor"):
        if getattr(config, name) < 0:
            raise UserError(f"setting 'optimizer.{name}' must not be below 0, got {getattr(config, name)}")
    if not config.eps > 0:
        raise UserError(f"setting 'optimizer.eps' must be above 0, got {config.eps}: what has no gradient would be divided by 0")
    if 0 < config.spike_factor <= 1:
        told = f"setting 'optimizer.spike_factor' is {config.spike_factor:g}"
        raise UserError(f"{told}: 1 or less would leave out every other update; give 5, say, or 0 for none")
    for name in ("b1", "b2"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"setting 'optimizer.{name}' must be from 0 to below 1, got {getattr(config, name)}")


def trained_as(model: "ModelConfig", config: "GRPOConfig | SFTConfig | DPOConfig | OnlineDPOConfig") -> "ModelConfig":
    """The model as the update computes it. Raises UserError for an attention that is unknown or that the model cannot have."""
    import jax

    from models.config import CHOICES
    from models.errors import ModelError

    check_choice("attention", config.attention, CHOICES["attention"])
    backend = jax.default_backend()  # a CPU takes splash too, slowly, which is for tests and `plan`
    if (config.attention, backend) in (("splash", "gpu"), ("cudnn", "tpu"), ("cudnn", "cpu")):
        told = f"setting 'attention' is {config.attention!r}, a kernel of {'TPUs' if config.attention == 'splash' else 'GPUs'}"
        other = "'plain' or 'cudnn'" if backend == "gpu" else "'plain'"
        raise UserError(f"{told}; this machine's devices are {backend.upper()}s: set {other}")
    if config.attention == "cudnn" and (model.dtype == "float32" or model.head_dim % 8 or model.head_dim > 256):
        told = f"this model computes in {model.dtype} with heads of {model.head_dim}"
        raise UserError(f"setting 'attention' is 'cudnn', which takes bfloat16 and heads of 8, 16, ... 256 units; {told}: set 'plain', or the dtype")
    try:
        return dataclasses.replace(model, attention=config.attention)
    except ModelError as error:
        raise UserError(f"setting 'attention': {error}") from error


def remat_of(config: "GRPOConfig | SFTConfig | DPOConfig | OnlineDPOConfig") -> bool | str:
    """What `models.forward` takes. Raises UserError for an unknown `remat_keep`."""
    check_choice("remat_keep", config.remat_keep, ("nothing", "products"))
    return config.remat and config.remat_keep


def check_lora(config: LoraSettings) -> None:
    """Raises UserError for numbers that make no adapter; what the targets name is for the model to say."""
    if config.rank < 0 or not config.alpha > 0:
        raise UserError(f"setting 'lora.rank' must be 0 (off) or more and 'lora.alpha' above 0, got {config.rank} and {config.alpha:g}")
    if config.rank and not config.targets:
        raise UserError("setting 'lora.targets' is empty: name matrices such as 'blocks.*' (all of a block), or set lora.rank=0")


def check_counts(config: GRPOConfig | SFTConfig | DPOConfig | OnlineDPOConfig) -> None:
    """Raises UserError for a count (rows, steps, samples) below 0, and where one at least is needed to mean anything, below that."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least = 1 if field.name in ("keep_checkpoints", "logprob_chunk") else 0
        if field.name != "seed" and type(value) is int and value < least:
            raise UserError(f"setting '{field.name}' must be at least {least}, got {value}")


def check_parts(config: GRPOConfig, prompts: int) -> None:
    """Raises UserError where a step's prompts cannot be parted into as many equal updates."""
    if prompts % config.updates_per_epoch:
        raise UserError(
            f"setting 'updates_per_epoch' is {config.updates_per_epoch}, and a step has {prompts} prompts, which it does not divide: change it, or "
            "schedule.batch_prompts"
        )


def check_sft(config: SFTConfig) -> None:
    """Raises UserError for settings that have no meaning; what only some models take is for `train_sft` to say."""
    check_counts(config)
    _check_at_least_one(config, ("steps", "log_every", "forward_rows"))
    check_optimizer(config.optimizer)
    check_lora(config.lora)
    if config.router_balance < 0:
        raise UserError(f"setting 'router_balance' must not be below 0, got {config.router_balance:g}")


def check_keep_best(keep_best: str, sets: Any, run_dir: Any) -> None:
    """Raises UserError where `keep_best` is none of the held-out sets, or there is no run directory that could keep a checkpoint."""
    if keep_best and keep_best not in sets:
        raise UserError(f"setting 'keep_best' is {keep_best!r}, which is no held-out set: {nearest(keep_best, sets)}")
    if keep_best and run_dir is None:
        raise UserError("setting 'keep_best' keeps a checkpoint: give a run directory to keep it in")


def check_dpo(config: DPOConfig) -> None:
    """Raises UserError for settings that have no meaning."""
    _check_preference(config)
    _check_at_least_one(config, ("steps", "log_every", "forward_rows"))
    for name in ("desirable_weight", "undesirable_weight"):
        if getattr(config.loss, name) < 0:
            raise UserError(f"setting 'loss.{name}' must not be below 0, got {getattr(config.loss, name)}")
        if getattr(config.loss, name) != 1 and config.loss.kind != "kto":
            told = f"setting 'loss.{name}' is {getattr(config.loss, name):g}, a weight of loss.kind 'kto'"
            raise UserError(f"{told}, and the kind is '{config.loss.kind}': leave it out")


def check_online_dpo(config: OnlineDPOConfig) -> None:
    """Raises UserError for settings that have no meaning; all samples of a prompt being one, there is no pair to be made."""
    _check_preference(config)
    _check_at_least_one(config, ("steps", "max_new_tokens", "rollout_rows", "eval_batch"))
    _check_overlong(config)
    if config.num_samples < 2:
        raise UserError(f"setting 'num_samples' must be at least 2, got {config.num_samples}: a pair is made of two samples of a prompt")
    if config.loss.kind == "kto":
        raise UserError("setting 'loss.kind' is 'kto', which learns from single labelled completions: online DPO makes pairs, choose another kind")


def _check_preference(config: DPOConfig | OnlineDPOConfig) -> None:
    from jaxrl_llm.losses import preference

    loss = config.loss
    check_counts(config)
    _check_at_least_one(config, ("length_buckets",))
    _check_buckets(config)
    check_choice("loss.kind", loss.kind, (*preference.DPO_KINDS, "simpo", "orpo", "kto"))
    check_optimizer(config.optimizer)
    check_lora(config.lora)
    if not loss.beta > 0:
        raise UserError(f"setting 'loss.beta' must be above 0, got {loss.beta}")
    if not 0 <= loss.label_smoothing < 0.5:
        raise UserError(f"setting 'loss.label_smoothing' is the share of flipped labels: give 0 up to below 0.5, got {loss.label_smoothing}")
    if loss.label_smoothing and loss.kind not in ("sigmoid", "robust", "simpo"):
        raise UserError(f"setting 'loss.label_smoothing' has no meaning with loss.kind '{loss.kind}': set it to 0")
    if loss.gamma != PairLossConfig.gamma and loss.kind != "simpo":
        raise UserError(f"setting 'loss.gamma' is {loss.gamma:g}, the margin of loss.kind 'simpo', and the kind is '{loss.kind}': leave it out")
    if not loss.reference and loss.kind == "kto":
        raise UserError("setting 'loss.reference' is False, but loss.kind 'kto' measures against a reference: set it to True")
    if not config.temperature > 0:
        raise UserError(f"setting 'temperature' must be above 0 in training, got {config.temperature}")


def _check_at_least_one(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"setting '{name}' must be at least 1, got {getattr(config, name)}")
