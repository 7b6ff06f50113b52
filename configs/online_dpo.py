r"""Train a policy by DPO on pairs of its own samples: the best and the worst of each prompt by a checkable reward.

    jaxrl-llm online_dpo --config.model=FOLDER --config.data.source=prompts.jsonl --config.reward.name=constraints \
        --config.reward.options='{"reduce": "mean"}' --config.evals=test=test.jsonl --workdir=runs/online_dpo

Variants: "dpo" (the default), "ipo", "hinge" and "simpo" (no reference model in memory). Groups whose samples all have one reward make no
pair and are counted ("tied"); samples without a verdict are left out. The trained policy is written to WORKDIR/policy as a Hugging Face
folder. Started again, a run goes on where it was. Expected: reward and pass_rate rise, logp_diff_max stays below 1e-4 in fp32.
docs/training.md explains every metric.
"""

import ml_collections

VARIANTS = ("dpo", "ipo", "hinge", "simpo")


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config of a variant; None is "dpo"."""
    placeholder = ml_collections.config_dict.placeholder
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id of the starting policy, which is the reference too
    config.adapter = ""  # PEFT folder of a low-rank adapter to start from: merged, or with train.lora.rank above 0 trained on; empty = none
    config.dtype = "float32"  # the model computes in: float32 or bfloat16 (the trained copy is fp32 in any case)
    config.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are; empty = one device

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # training prompts: file (jsonl, json, csv, parquet), data set folder, hub id or tfds:NAME
    config.data.curated = ""  # or: workdir of `jaxrl-llm curate`, or the set in it (its kept rows, in its order)
    config.data.fields = ""  # field map of source and evals, such as "prompt=question,answer=answer"
    config.data.split = "train"  # of a source that has splits
    config.data.limit = placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.evals = ""  # held-out sets, "NAME=SOURCE" joined by commas; a source may end in "@SPLIT"
    config.eval_limit = placeholder(int)  # at most so many rows a set; None = all

    config.template = "none"  # "none", "chat" (which rows of messages want) or a format such as "Question: {prompt}\nAnswer:"
    config.max_prompt_tokens = 512  # room for a prompt
    config.overflow = "error"  # a longer prompt: "error", "drop" or "truncate"

    config.reward = ml_collections.ConfigDict()
    config.reward.name = "constraints"  # "constraints", "exact", "judge", "maths" or "verif", see jaxrl_llm.rewards.registry
    config.reward.options = "{}"  # its keyword arguments as JSON, such as '{"reduce": "mean"}'

    config.schedule = ml_collections.ConfigDict()
    config.schedule.batch_prompts = 8  # prompts a step: at most so many pairs
    config.schedule.kind = ""  # "shuffled"; with data.curated "order", "band" or a kind of jaxrl_llm.curation.schedule; empty = the natural one
    config.schedule.options = "{}"  # of a kind of jaxrl_llm.curation.schedule as JSON, such as '{"rho": 0.125}'
    config.schedule.band = ml_collections.ConfigDict()  # kind "band", see configs/grpo.py
    config.schedule.band.temperature = 0.5  # how sharply prompts that pass half the time are preferred
    config.schedule.band.easy_floor = 0.125  # share of every batch that stays with easy prompts
    config.schedule.band.epoch_share = 0.3  # of the prompts that an epoch visits
    config.schedule.band.balance = "items"  # clusters in a batch: in proportion to their "items", "equal", by "utility" or "none"
    config.schedule.band.refilter_every = 0  # training steps after which the policy judges anew which rows to keep; 0 = never

    config.train = ml_collections.ConfigDict()  # see jaxrl_llm.train.config.OnlineDPOConfig
    config.train.steps = 100  # rollouts, each followed by one update
    config.train.num_samples = 8  # completions a prompt, of which two make the pair
    config.train.max_new_tokens = 256  # limit of a completion in tokens
    config.train.temperature = 1.0  # of sampling and of the log-probabilities in the loss
    config.train.top_k = 0  # 0 = off
    config.train.top_p = 1.0  # 1 = off
    config.train.stop_strings = ()  # a completion ends after any of these
    config.train.rollout_rows = 512  # most completions decoded at once
    config.train.rollout_refill = False  # a finished completion gives its place to the next at once: same samples, sooner, more memory
    config.train.rollout_mesh = ""  # the mesh's shape while sampling, such as "fsdp=4,tensor=2": parameters that are whole, or split by heads, are waited for at no token; empty = as in training
    config.train.overlap_rewards = False  # judge a step's completions while the next step's are sampled: these are then of the policy before the update, see jaxrl_llm.train.overlap; for slow rewards, in one process
    config.train.overlong_buffer = 0  # last tokens before max_new_tokens over which a penalty of the reward grows; 0 = by overlong_buffer_share
    config.train.overlong_buffer_share = 0.0  # of max_new_tokens, such as 0.2: the same as a share; 0 = no penalty
    config.train.overlong_penalty = 1.0  # what a completion that reaches max_new_tokens loses of its reward
    config.train.mask_cut_off = False  # learn nothing from completions that reached max_new_tokens: they are in no pair
    config.train.micro_batch_rows = 0  # pairs a micro-batch, gradients accumulated; 0 = all at once
    config.train.length_buckets = 1  # widths that micro-batches are cut to, pairs sorted by length: less padding, same gradient; 1 = all as wide as the longest
    config.train.shared_prefix = True  # forward each prompt once for both completions: same gradient, less work
    config.train.remat = False  # recompute layers in the backward pass: less memory, a third more work
    config.train.remat_keep = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give: more memory, little more work
    config.train.attention = "plain"  # of the update: "plain", or by a kernel that holds no scores in memory: "splash" (TPU), or "cudnn" (GPU), which is given a mask [B, T, S] of queries and slots
    config.train.logprob_chunk = placeholder(int)  # tokens a chunk of the unembedding, on each device; None picks by vocabulary
    config.train.seed = 0  # of sampling and of the shuffled order
    config.train.eval_every = 20  # steps between evaluations; 0 = only before and after
    config.train.eval_samples = 0  # samples a prompt for avg@k beside greedy; 0 = greedy only
    config.train.eval_temperature = 1.0  # of those samples
    config.train.eval_batch = 256  # rows generated at once in an evaluation
    config.train.eval_by = ()  # row fields to break accuracy down by, such as ("level",)
    config.train.checkpoint_every = 20  # steps; 0 = only at the end and on SIGTERM
    config.train.keep_checkpoints = 2  # the newest so many stay
    config.train.keep_best = ""  # evaluation set whose most accurate checkpoint stays too, and is the policy that is written; empty = the last one is
    config.train.watchdog_seconds = 0  # a run whose step (the first with its compilation) takes longer ends and says where it stood; 0 = it waits
    config.train.sample_every = 10  # steps between lines of samples.jsonl; 0 = none
    config.train.samples_per_log = 2  # prompts shown each time, with all their completions
    config.train.zero_spread_warning = 0.9  # share of groups with equal rewards past which a warning is printed

    config.train.loss = ml_collections.ConfigDict()  # see jaxrl_llm.losses.preference for the formulas
    config.train.loss.kind = "sigmoid"  # "sigmoid" (DPO), "robust", "hinge", "ipo", "simpo" or "orpo"
    config.train.loss.beta = 0.1  # scale of the implicit reward: the higher, the nearer to the reference
    config.train.loss.label_smoothing = 0.0  # share of verdicts taken to be flipped: "sigmoid" (conservative DPO), "robust", "simpo"
    config.train.loss.gamma = 1.0  # margin that "simpo" asks for
    config.train.loss.reference = True  # compare with the starting policy; False = reference-free; "simpo" and "orpo" never have one

    config.train.lora = ml_collections.ConfigDict()  # a low-rank adapter is trained in place of the parameters, and written to WORKDIR/adapter for PEFT too
    config.train.lora.rank = 0  # of the adapter, such as 16; 0 = no adapter, all parameters are trained
    config.train.lora.alpha = 32.0  # the adapter's product is scaled by alpha / rank
    config.train.lora.rank_stabilised = False  # by alpha / sqrt(rank) instead
    config.train.lora.targets = ("blocks.*",)  # adapted matrices, as patterns: "blocks.*" (all of a block), "blocks.q", "lm_head.*", ...
    config.train.lora.seed = 0  # of the adapter's first values

    config.train.optimizer = ml_collections.ConfigDict()  # AdamW
    config.train.optimizer.learning_rate = 5e-7  # peak
    config.train.optimizer.schedule = "constant"  # after warm-up: "constant", "linear" or "cosine"
    config.train.optimizer.warmup_steps = 0  # linear, from 0
    config.train.optimizer.decay_steps = 0  # updates at which a falling schedule ends; 0 = with the run
    config.train.optimizer.final_share = 0.0  # of the peak, at that end
    config.train.optimizer.b1 = 0.9  # decay of the running mean of gradients
    config.train.optimizer.b2 = 0.999  # decay of that of their squares
    config.train.optimizer.eps = 1e-8  # added to the root of these squares
    config.train.optimizer.weight_decay = 0.0  # on matrices; never on norms and biases
    config.train.optimizer.clip_norm = 1.0  # global gradient norm; 0 = no clip
    config.train.optimizer.spike_factor = 0.0  # an update whose gradient norm is so many times its running mean is left out; 0 = none is

    config.overwrite = False  # clear a workdir that holds another run
    config.allow_changes = ()  # fields or groups, such as train.steps,train.optimizer, with other values of which the run in the workdir goes on

    loss = config.train.loss
    if variant in ("ipo", "hinge", "simpo"):
        loss.kind = variant
    if variant == "simpo":
        loss.beta = 2.0
    return config
