r"""Train a policy by GRPO on prompts with a checkable reward.

    jaxrl-llm grpo --config.model=FOLDER --config.data.source=train.jsonl --config.data.fields=prompt=question \
        --config.reward.name=maths --config.evals=test=test.jsonl --workdir=runs/grpo
    jaxrl-llm grpo --config=configs/grpo.py:dapo --config.model=FOLDER --config.data.curated=runs/curated --workdir=runs/curated_grpo

Variants: "grpo" (the default); "dr_grpo" (arXiv 2503.20783); "dapo" (arXiv 2503.14476: higher upper clip, mean over tokens, new prompts for
groups of equal rewards, soft penalty of long completions); "rloo" (arXiv 2402.14740); "reinforce_pp" (arXiv 2501.03262); "gspo"
(arXiv 2507.18071); "cispo" (arXiv 2506.13585); "ppo" (arXiv 1707.06347, with a critic). The trained policy is written to WORKDIR/policy as
a Hugging Face folder; `jaxrl-llm report --workdir=...` draws the run. Started again, a run goes on where it was.
Expected: reward and pass_rate rise, zero_spread stays well below 0.9, logp_diff_max stays below 1e-4 in fp32 (bfloat16: about 0.1).
docs/training.md has the formulas of the variants, explains every metric and says what others call the fields.
"""

import ml_collections

VARIANTS = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo", "ppo")


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config of a variant; None is "grpo"."""
    placeholder = ml_collections.config_dict.placeholder
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id of the starting policy
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
    config.reward.name = "maths"  # "constraints", "exact", "judge", "maths" or "verif", see jaxrl_llm.rewards.registry
    config.reward.options = "{}"  # its keyword arguments as JSON, such as '{"ignore_case": false}'

    config.schedule = ml_collections.ConfigDict()
    config.schedule.batch_prompts = 8  # prompts a step
    config.schedule.kind = ""  # "shuffled"; with data.curated "order", "band" or a kind of jaxrl_llm.curation.schedule; empty = the natural one
    config.schedule.options = "{}"  # of a kind of jaxrl_llm.curation.schedule as JSON, such as '{"rho": 0.125}'
    config.schedule.band = ml_collections.ConfigDict()  # kind "band": prompts that the policy passes about half the time, as it learns
    config.schedule.band.temperature = 0.5  # how sharply these are preferred: near 0 only they, large hardly
    config.schedule.band.easy_floor = 0.125  # share of every batch that stays with easy prompts, so that they are not forgotten
    config.schedule.band.epoch_share = 0.3  # of the prompts that an epoch visits; it passes over the least useful
    config.schedule.band.balance = "items"  # clusters in a batch: in proportion to their "items", "equal", by "utility" or "none"
    config.schedule.band.refilter_every = 0  # training steps after which the policy as it is then judges which rows to keep (needs labels in curate); 0 = never

    config.train = ml_collections.ConfigDict()  # see jaxrl_llm.train.config.GRPOConfig
    config.train.steps = 100  # rollouts; each is followed by inner_epochs x updates_per_epoch updates
    config.train.num_samples = 8  # completions a prompt (the group)
    config.train.max_new_tokens = 256  # limit of a completion in tokens
    config.train.temperature = 1.0  # of sampling and of the log-probabilities in the loss
    config.train.top_k = 0  # 0 = off; anything else needs allow_truncated_sampling
    config.train.top_p = 1.0  # 1 = off; the same
    config.train.allow_truncated_sampling = False  # train on truncated samples although that biases the ratio
    config.train.stop_strings = ()  # a completion ends after any of these
    config.train.rollout_rows = 512  # most completions decoded at once
    config.train.rollout_refill = False  # a finished completion gives its place to the next at once: same samples, sooner, more memory
    config.train.rollout_mesh = ""  # the mesh's shape while sampling, such as "fsdp=4,tensor=2": parameters that are whole, or split by heads, are waited for at no token; empty = as in training
    config.train.overlap_rewards = False  # judge a step's completions while the next step's are sampled: these are then of the policy before the update, see jaxrl_llm.train.overlap; for slow rewards, in one process
    config.train.inner_epochs = 1  # times that each rollout is trained on
    config.train.updates_per_epoch = 1  # equal parts of a rollout's prompts, each of which makes an update (mini-batches); advantages are those of the whole
    config.train.rollout_tries = 1  # most rollouts a step: groups of equal rewards are replaced by the schedule's next prompts; 1 = never
    config.train.overlong_buffer = 0  # last tokens before max_new_tokens over which a penalty of the reward grows; 0 = by overlong_buffer_share
    config.train.overlong_buffer_share = 0.0  # of max_new_tokens, such as 0.2: the same as a share; 0 = no penalty
    config.train.overlong_penalty = 1.0  # what a completion that reaches max_new_tokens loses of its reward
    config.train.mask_cut_off = False  # learn nothing from completions that reached max_new_tokens: they are neither in the loss nor in the baseline of their group
    config.train.micro_batch_rows = 0  # completions a micro-batch, gradients accumulated; 0 = all at once
    config.train.length_buckets = 1  # widths that micro-batches are cut to, completions sorted by length: less padding, same gradient; 1 = all as wide as the longest
    config.train.samples_together = 0  # most completions of a prompt that share one forward of it: fewer can be sorted better by length, for more work on prompts; 0 = all that fit
    config.train.shared_prefix = True  # forward each prompt once for its samples: same gradient, less work
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

    config.train.loss = ml_collections.ConfigDict()  # see jaxrl_llm.losses.grpo for the formulas
    config.train.loss.clip_low = 0.2  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    config.train.loss.clip_high = 0.2  # the upper side: how much likelier a token of good advantage may become before it stops pulling; DAPO: 0.28
    config.train.loss.ratio = "token"  # of new to old policy, by "token", "sequence" (GSPO) or "sequence_token" (its value, each token's gradient)
    config.train.loss.surrogate = "clip"  # "clip" (clipped tokens have no gradient) or "cispo" (the clipped ratio is a weight)
    config.train.loss.mismatch = placeholder(str)  # weight of trainer over sampler by "token" or "sequence", for bfloat16 or another sampler; None = off
    config.train.loss.mismatch_cap = 2.0  # the largest such weight
    config.train.loss.aggregation = "sequence_mean"  # "token_mean", "sequence_mean" or "dr_grpo"
    config.train.loss.baseline = "group_mean"  # "group_mean", "leave_one_out" (RLOO), "batch_mean" (REINFORCE++) or "value" (PPO: a critic on the policy's hidden states)
    config.train.loss.advantage_scale = "group_std"  # "group_std", "batch_std" or "none"
    config.train.loss.advantage_ddof = 1  # of the std: 1 = n - 1 in the denominator
    config.train.loss.advantage_eps = 1e-4  # added to the std
    config.train.loss.kl = placeholder(str)  # None (no reference model in memory), "k1", "k2" or "k3"
    config.train.loss.kl_coef = 0.0  # weight of KL to the policy that training starts from
    config.train.loss.kl_place = "loss"  # kl_coef x KL goes into the "loss", is taken from a completion's reward ("sequence_reward") or from each token's return ("token_reward")
    config.train.loss.entropy_coef = 0.0  # bonus for a policy that stays open: so many times its entropy (nats a token) is taken from the loss
    config.train.loss.gamma = 1.0  # with baseline "value": discount a token
    config.train.loss.gae_lambda = 0.95  # with baseline "value": 1 = returns less values, 0 = one-step errors
    config.train.loss.value_coef = 0.5  # with baseline "value": weight of the value loss
    config.train.loss.value_clip = 0.2  # with baseline "value": how far a value may move from the old one before its loss stops pulling; 0 = no clip

    config.train.lora = ml_collections.ConfigDict()  # a low-rank adapter is trained in place of the parameters, and written to WORKDIR/adapter for PEFT too
    config.train.lora.rank = 0  # of the adapter, such as 16; 0 = no adapter, all parameters are trained
    config.train.lora.alpha = 32.0  # the adapter's product is scaled by alpha / rank
    config.train.lora.rank_stabilised = False  # by alpha / sqrt(rank) instead
    config.train.lora.targets = ("blocks.*",)  # adapted matrices, as patterns: "blocks.*" (all of a block), "blocks.q", "lm_head.*", ...
    config.train.lora.seed = 0  # of the adapter's first values

    config.train.optimizer = ml_collections.ConfigDict()  # AdamW
    config.train.optimizer.learning_rate = 1e-6  # peak
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

    _vary(config.train, variant)
    return config


def _vary(train: ml_collections.ConfigDict, variant: str | None) -> None:
    """The papers' settings, where they differ from GRPO's."""
    loss = train.loss
    if variant == "dr_grpo":
        loss.aggregation, loss.advantage_scale = "dr_grpo", "none"
    elif variant == "dapo":
        loss.aggregation, loss.clip_high = "token_mean", 0.28  # acts with updates_per_epoch, of which the authors make 16 of 512 prompts
        train.rollout_tries = 10  # of the authors' recipe
        train.overlong_buffer_share = 0.2  # 4,096 of 20,480 tokens there
    elif variant == "rloo":  # the sum over a sequence, as "dr_grpo" takes it up to a constant
        loss.aggregation, loss.baseline, loss.advantage_scale = "dr_grpo", "leave_one_out", "none"
        loss.kl, loss.kl_coef, loss.kl_place = "k1", 0.05, "sequence_reward"
    elif variant == "reinforce_pp":
        loss.aggregation, loss.baseline, loss.advantage_scale = "token_mean", "batch_mean", "batch_std"
        loss.kl, loss.kl_coef, loss.kl_place = "k1", 0.01, "token_reward"
    elif variant == "gspo":  # the ratio matters from the second update on
        loss.ratio, loss.clip_low, loss.clip_high = "sequence", 3e-4, 4e-4
        train.updates_per_epoch = 4  # as in the paper
    elif variant == "cispo":  # no lower bound; weights up to 5 (ScaleRL, arXiv 2510.13786)
        loss.surrogate, loss.aggregation, loss.clip_low, loss.clip_high = "cispo", "token_mean", 1.0, 4.0
        train.updates_per_epoch = 4  # the paper's 16 need as many prompts
    elif variant == "ppo":
        loss.aggregation, loss.baseline, loss.advantage_scale = "token_mean", "value", "batch_std"
        loss.kl, loss.kl_coef, loss.kl_place = "k1", 0.01, "token_reward"
        train.inner_epochs = 4
