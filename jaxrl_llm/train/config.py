"""The settings of a training run as frozen dataclasses: hashable, so that those that shape a compiled program are static arguments."""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from jaxrl_llm.errors import UserError, nearest

if typing.TYPE_CHECKING:
    from models.lora import LoraConfig

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with a learning-rate schedule and a clip on the global gradient norm."""

    learning_rate: float = 1e-6  # peak
    schedule: str = "constant"  # after warm-up: "constant", "linear" or "cosine" down to final_share of the peak
    warmup_steps: int = 0  # linear, from 0
    decay_steps: int = 0  # updates at which a decaying schedule ends, warm-up included; 0 = the run's updates
    final_share: float = 0.0  # of the peak, at the end of a decaying schedule
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices; never on norms and biases
    clip_norm: float = 1.0  # global gradient norm; 0 = no clip
    spike_factor: float = 0.0  # an update whose gradient norm is above so many times its running mean is left out; 0 = none is


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Training a low-rank adapter (`models.lora`) in place of the parameters."""

    rank: int = 0  # columns of A; 0 = no adapter, all parameters are trained
    alpha: float = 32.0  # A B is scaled by alpha / rank
    rank_stabilised: bool = False  # by alpha / sqrt(rank) instead
    targets: tuple[str, ...] = ("blocks.*",)  # patterns over the names of the matrices that are adapted, such as "blocks.q"
    seed: int = 0  # of A's first values; B starts at zero

    @property
    def adapter(self) -> "LoraConfig | None":
        """What `models.lora` takes; None without an adapter."""
        from models.lora import LoraConfig

        return LoraConfig(self.targets, self.rank, self.alpha, self.rank_stabilised) if self.rank else None


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The GRPO objective; see `jaxrl_llm.losses.grpo` for the formulas and papers."""

    clip_low: float = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # DAPO: 0.28
    ratio: str = "token"  # of new to old policy: "token", "sequence" (GSPO) or "sequence_token" (GSPO-token)
    surrogate: str = "clip"  # "clip" (the clip takes the gradient) or "cispo" (the clipped ratio is a weight without gradient)
    mismatch: str | None = None  # truncated importance weight of trainer over sampler: None, "token" or "sequence"
    mismatch_cap: float = 2.0  # the largest such weight
    aggregation: str = "token_mean"  # "token_mean", "sequence_mean" or "dr_grpo"
    baseline: str = "group_mean"  # "group_mean", "leave_one_out" (RLOO), "batch_mean" (REINFORCE++, over the batch's tokens) or "value" (PPO)
    advantage_scale: str = "group_std"  # "group_std", "batch_std" or "none" (Dr. GRPO, RLOO)
    advantage_ddof: int = 1  # of the std: 1 = n - 1 in the denominator
    advantage_eps: float = 1e-4  # added to the std
    kl: str | None = None  # None (no reference model in memory), "k1", "k2" or "k3"
    kl_coef: float = 0.0
    # Where kl_coef x KL goes: "loss"; "sequence_reward", summed over a completion and taken from its reward; or "token_reward", taken from
    # the return of each token and those before it. In a reward it is the estimate of the policy that sampled, the same in all inner epochs.
    kl_place: str = "loss"
    entropy_coef: float = 0.0  # entropy_coef x the policy's entropy is taken from the loss: a bonus for staying open
    # With baseline "value": a linear head on the policy's last hidden states is its critic, see `jaxrl_llm.losses.ppo`.
    gamma: float = 1.0  # discount a token
    gae_lambda: float = 0.95  # 1 = returns less values, 0 = one-step errors
    value_coef: float = 0.5  # weight of the value loss
    value_clip: float = 0.2  # the value may move so far from the old one before its loss stops pulling; 0 = no clip

    @property
    def critic(self) -> bool:
        """Whether the training state has a value head."""
        return self.baseline == "value"


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """A GRPO run. Prompts a step come from the schedule; the workdir, model and data are arguments of `train_grpo`."""

    steps: int = 100  # rollouts; each is followed by inner_epochs x updates_per_epoch updates
    num_samples: int = 8  # completions a prompt (the group)
    max_new_tokens: int = 64  # generation limit in tokens
    temperature: float = 1.0  # of sampling and of the log-probabilities in the loss
    top_k: int = 0  # 0 = off; anything else biases the ratio, see allow_truncated_sampling
    top_p: float = 1.0  # 1 = off; the same
    allow_truncated_sampling: bool = False  # train with top_k or top_p on all the same (a warning is printed)
    stop_strings: tuple[str, ...] = ()  # a completion ends after any of these
    rollout_rows: int = 512  # most completions decoded at once
    rollout_refill: bool = False  # a finished completion gives its place to the next at once: the same samples, sooner, for more memory
    rollout_mesh: str = ""  # how the mesh's devices are used while sampling, such as "fsdp=4,tensor=2"; empty = as in training
    overlap_rewards: bool = False  # judge a step's completions while the next step's are sampled, by the policy before the update: one update old
    inner_epochs: int = 1  # times that each rollout is trained on (mu); above 1 the old log-probabilities are kept
    updates_per_epoch: int = 1  # parts of a rollout, by prompts, each of which makes an update; above 1 the old log-probabilities come first
    rollout_tries: int = 1  # most rollouts a step: groups of equal rewards are replaced by the schedule's next prompts (DAPO); 1 = never
    overlong_buffer: int = 0  # last tokens before max_new_tokens over which a soft penalty grows (DAPO eq. 13); 0 = by overlong_buffer_share
    overlong_buffer_share: float = 0.0  # of max_new_tokens: the same as a share, 0.2 in DAPO; 0 = no penalty
    overlong_penalty: float = 1.0  # what a completion that reaches max_new_tokens loses of its reward
    mask_cut_off: bool = False  # learn nothing from completions that reached max_new_tokens (DAPO's overlong filtering)
    micro_batch_rows: int = 0  # completions a micro-batch, gradients accumulated; 0 = all at once
    length_buckets: int = 1  # widths that micro-batches of completions sorted by length are cut to; 1 = all are as wide as the longest
    samples_together: int = 0  # most completions of a prompt that share one forward of it (fewer are sorted better); 0 = all that fit
    shared_prefix: bool = True  # forward each distinct prompt once for its samples (same gradient, less work)
    remat: bool = False  # recompute each layer in the backward pass: less memory, a third more work
    remat_keep: str = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give
    attention: str = "plain"  # of the update: "plain", or by a kernel of the accelerator, "splash" (TPU) or "cudnn" (GPU)
    logprob_chunk: int | None = None  # tokens a chunk of the unembedding; None picks by vocabulary
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraSettings = LoraSettings()
    seed: int = 0
    eval_every: int = 0  # steps between evaluations; 0 = only at the end; always also before the first step
    eval_samples: int = 0  # samples a prompt for avg@k beside greedy; 0 = greedy only
    eval_temperature: float = 1.0
    eval_batch: int = 256  # rows generated at once
    eval_by: tuple[str, ...] = ()  # row fields to break accuracy down by, such as ("level", "topic")
    checkpoint_every: int = 50  # steps; 0 = only at the end and on SIGTERM
    keep_checkpoints: int = 2
    keep_best: str = ""  # evaluation set whose most accurate checkpoint stays too and is what training returns; empty = the last
    watchdog_seconds: int = 0  # a run whose step takes longer ends, with its stacks on stderr; 0 = it waits
    sample_every: int = 10  # steps between lines in samples.jsonl; 0 = none
    samples_per_log: int = 2  # prompts shown each time, with all their completions
    zero_spread_warning: float = 0.9  # share of groups with equal rewards past which a warning is printed


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """A supervised run; also plain language-model training when every token is in the mask."""

    steps: int = 100
    micro_batch_rows: int = 0  # rows a micro-batch, gradients accumulated; 0 = all at once
    remat: bool = False  # recompute each layer in the backward pass
    remat_keep: str = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give
    attention: str = "plain"  # of the update: "plain", or by a kernel of the accelerator, "splash" (TPU) or "cudnn" (GPU)
    logprob_chunk: int | None = None
    router_balance: float = 0.0  # of a mixture of experts: weight of the loss that spreads tokens evenly over them; 0 = none
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, clip_norm=1.0)
    lora: LoraSettings = LoraSettings()
    log_every: int = 10  # steps between metric lines (and between waits for the device)
    eval_every: int = 0  # steps between held-out losses; 0 = only at the end; always also before the first step
    forward_rows: int = 64  # held-out rows forwarded at once
    checkpoint_every: int = 0  # steps; 0 = only at the end and on SIGTERM
    keep_checkpoints: int = 2
    keep_best: str = ""  # held-out set on which the checkpoint of least loss stays too and is what training returns; empty = the last
    watchdog_seconds: int = 0  # a run whose step takes longer ends, with its stacks on stderr; 0 = it waits


@dataclasses.dataclass(frozen=True)
class PairLossConfig:
    """A loss on pairs; see `jaxrl_llm.losses.preference` for the formulas and papers."""

    kind: str = "sigmoid"  # "sigmoid" (DPO), "robust", "hinge", "ipo", "simpo" or "orpo"
    beta: float = 0.1  # scale of the implicit reward: the higher, the nearer to the reference; SimPO: about 2; ORPO: the paper's lambda
    label_smoothing: float = 0.0  # share of labels taken to be flipped: "sigmoid" (conservative DPO), "robust" and "simpo"
    gamma: float = 1.0  # margin that "simpo" asks for
    reference: bool = True  # compare with the starting policy; False = reference-free; "simpo" and "orpo" never have one

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the starting policy."""
        return self.reference and self.kind not in ("simpo", "orpo")


@dataclasses.dataclass(frozen=True)
class PreferenceLossConfig(PairLossConfig):
    """A loss on pairs, or with kind "kto" on single completions that are desirable or not."""

    desirable_weight: float = 1.0  # of "kto"
    undesirable_weight: float = 1.0  # of "kto"


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Training on a fixed set of preferences. Rows a step come from the schedule; the workdir, model and data are arguments of `train_dpo`."""

    steps: int = 100
    micro_batch_rows: int = 0  # pairs (KTO: rows) a micro-batch, gradients accumulated; 0 = all at once
    length_buckets: int = 1  # widths that micro-batches of pairs sorted by length are cut to; 1 = all are as wide as the step's longest completion
    temperature: float = 1.0  # of the log-probabilities, the policy's and the reference's: that of the sampling to come
    shared_prefix: bool = True  # forward each prompt once for both completions (same gradient, less work)
    remat: bool = False  # recompute each layer in the backward pass
    remat_keep: str = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give
    attention: str = "plain"  # of the update: "plain", or by a kernel of the accelerator, "splash" (TPU) or "cudnn" (GPU)
    logprob_chunk: int | None = None
    loss: PreferenceLossConfig = PreferenceLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-7, clip_norm=1.0)
    lora: LoraSettings = LoraSettings()
    log_every: int = 1  # steps between metric lines (and between waits for the device)
    eval_every: int = 0  # steps between held-out figures; 0 = only at the end; always also before the first step
    forward_rows: int = 64  # pairs forwarded at once where no gradient is needed: reference and held-out figures
    checkpoint_every: int = 0  # steps; 0 = only at the end and on SIGTERM
    keep_checkpoints: int = 2
    keep_best: str = ""  # held-out set on which the checkpoint of least loss stays too and is what training returns; empty = the last
    watchdog_seconds: int = 0  # a run whose step takes longer ends, with its stacks on stderr; 0 = it waits


@dataclasses.dataclass(frozen=True)
class OnlineDPOConfig:
    """Online DPO: like `GRPOConfig`, but each prompt's best and worst sample make a pair."""

    steps: int = 100  # rollouts, each followed by one update
    num_samples: int = 8  # completions a prompt, of which two make the pair
    max_new_tokens: int = 64  # generation limit in tokens
    temperature: float = 1.0  # of sampling and of the log-probabilities in the loss
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    stop_strings: tuple[str, ...] = ()  # a completion ends after any of these
    rollout_rows: int = 512  # most completions decoded at once
    rollout_refill: bool = False  # a finished completion gives its place to the next at once: the same samples, sooner, for more memory
    rollout_mesh: str = ""  # how the mesh's devices are used while sampling, such as "fsdp=4,tensor=2"; empty = as in training
    overlap_rewards: bool = False  # judge a step's completions while the next step's are sampled, by the policy before the update: one update old
    overlong_buffer: int = 0  # last tokens before max_new_tokens over which a soft penalty grows (DAPO eq. 13); 0 = by overlong_buffer_share
    overlong_buffer_share: float = 0.0  # of max_new_tokens: the same as a share, 0.2 in DAPO; 0 = no penalty
    overlong_penalty: float = 1.0  # what a completion that reaches max_new_tokens loses of its reward
    mask_cut_off: bool = False  # learn nothing from completions that reached max_new_tokens (DAPO's overlong filtering)
    micro_batch_rows: int = 0  # pairs a micro-batch, gradients accumulated; 0 = all at once
    length_buckets: int = 1  # widths that micro-batches of pairs sorted by length are cut to; 1 = all are as wide as the step's longest completion
    shared_prefix: bool = True  # forward each prompt once for both completions (same gradient, less work)
    remat: bool = False  # recompute each layer in the backward pass
    remat_keep: str = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give
    attention: str = "plain"  # of the update: "plain", or by a kernel of the accelerator, "splash" (TPU) or "cudnn" (GPU)
    logprob_chunk: int | None = None
    loss: PairLossConfig = PairLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-7, clip_norm=1.0)
    lora: LoraSettings = LoraSettings()
    seed: int = 0
    eval_every: int = 0  # steps between evaluations; 0 = only at the end; always also before the first step
    eval_samples: int = 0  # samples a prompt for avg@k beside greedy; 0 = greedy only
    eval_temperature: float = 1.0
    eval_batch: int = 256  # rows generated at once
    eval_by: tuple[str, ...] = ()  # row fields to break accuracy down by
    checkpoint_every: int = 50  # steps; 0 = only at the end and on SIGTERM
    keep_checkpoints: int = 2
    keep_best: str = ""  # evaluation set whose most accurate checkpoint stays too and is what training returns; empty = the last
    watchdog_seconds: int = 0  # a run whose step takes longer ends, with its stacks on stderr; 0 = it waits
    sample_every: int = 10  # steps between lines in samples.jsonl; 0 = none
    samples_per_log: int = 2  # prompts shown each time, with all their completions
    zero_spread_warning: float = 0.9  # share of groups with equal rewards past which a warning is printed


def from_mapping(kind: type[T], config: Any, where: str = "") -> T:
    """`kind` (a dataclass of this module) from a ConfigDict, dict or `kind` itself. Lists become tuples.

    Raises UserError for an unknown field (the nearest one is named) or a value of another type.
    """
    if isinstance(config, kind):
        return config
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in dict(config).items():
        if name not in fields:
            raise UserError(f"unknown setting '{where}{name}': {nearest(name, fields)}")
        values[name] = _convert(hints[name], value, where + name)
    return kind(**values)


def _convert(hint, value, name):
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise UserError(f"setting '{name}' must be a list, got {value!r}")
        return tuple(map(str, value) if str in typing.get_args(hint) else value)  # "7" on a command line was read as a number
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(value) is int and float in allowed:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed)
        raise UserError(f"setting '{name}' must be {names}, got {value!r}")
    return value
