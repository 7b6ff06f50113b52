r"""Train a policy on preferences: pairs of a chosen and a rejected completion, or (KTO) single completions with a label.

    jaxrl-llm dpo --config.model=FOLDER --config.data.source=pairs.jsonl --config.data.held_out=100 --workdir=runs/dpo
    jaxrl-llm dpo --config=configs/dpo.py:simpo --config.model=FOLDER --config.data.source=pairs.jsonl \
        --config.data.fields="prompt=instruction,chosen=good,rejected=bad" --workdir=runs/simpo
    jaxrl-llm dpo --config=configs/dpo.py:kto --config.model=FOLDER --config.data.source=labelled.jsonl --workdir=runs/kto

Rows hold "prompt", "chosen" and "rejected", or chats under "chosen" and "rejected" that share all but their last message; for KTO
"prompt", "completion" and "label" (true or false). Variants: "dpo" (the default), "conservative" and "robust" (10% of the labels taken to
be flipped), "hinge", "ipo", "simpo", "orpo", "kto". The trained model is written to WORKDIR/policy as a Hugging Face folder. Started again,
a run goes on where it was. Expected: held-out accuracy (a tie, as at the start with a reference, counts half) and margin rise.
docs/training.md has the formulas of the variants, explains every metric and says what others call the fields.
"""

import ml_collections

VARIANTS = ("dpo", "conservative", "robust", "hinge", "ipo", "simpo", "orpo", "kto")


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config of a variant; None is "dpo"."""
    placeholder = ml_collections.config_dict.placeholder
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id of the starting policy, which is the reference too
    config.adapter = ""  # PEFT folder of a low-rank adapter to start from: merged, or with train.lora.rank above 0 trained on; empty = none
    config.dtype = "float32"  # the model computes in: float32 or bfloat16 (the trained copy is fp32 in any case)
    config.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are; empty = one device

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # preferences: file (jsonl, json, csv, parquet), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map of source and evals, such as "prompt=question,chosen=better,rejected=worse"
    config.data.split = "train"  # of a source that has splits
    config.data.limit = placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.data.held_out = 0  # the last so many rows are not trained on but are the evaluation set "held_out"
    config.evals = ""  # more held-out sets, "NAME=SOURCE" joined by commas; a source may end in "@SPLIT"
    config.eval_limit = placeholder(int)  # at most so many rows a set of evals; None = all

    config.template = "none"  # of the prompt: "none", "chat" (which rows of messages want) or a format such as "Question: {prompt}\nAnswer:"
    config.separator = ""  # text between prompt and completion, such as " "
    config.max_length = 512  # tokens that prompt and completion may have, end token included
    config.overflow = "drop"  # a longer row: "drop" (counted), "truncate" (the completion's end is cut) or "error"
    config.batch_rows = 32  # pairs (KTO: rows) a step

    config.train = ml_collections.ConfigDict()  # see jaxrl_llm.train.config.DPOConfig
    config.train.steps = 100  # updates
    config.train.micro_batch_rows = 0  # pairs (KTO: rows) a micro-batch, gradients accumulated; 0 = all at once
    config.train.length_buckets = 1  # widths that micro-batches are cut to, pairs sorted by length: less padding, same gradient; 1 = all as wide as the longest
    config.train.temperature = 1.0  # of the log-probabilities, the policy's and the reference's: that of the sampling to come
    config.train.shared_prefix = True  # forward each prompt once for both completions: same gradient, less work
    config.train.remat = False  # recompute layers in the backward pass: less memory, a third more work
    config.train.remat_keep = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give: more memory, little more work
    config.train.attention = "plain"  # of the update: "plain", or by a kernel that holds no scores in memory: "splash" (TPU), or "cudnn" (GPU), which is given a mask [B, T, S] of queries and slots
    config.train.logprob_chunk = placeholder(int)  # tokens a chunk of the unembedding, on each device; None picks by vocabulary
    config.train.log_every = 1  # steps between lines of metrics.jsonl
    config.train.eval_every = 20  # steps between held-out figures; 0 = only before and after
    config.train.forward_rows = 64  # pairs forwarded at once where no gradient is needed: reference and held-out figures
    config.train.checkpoint_every = 100  # steps; 0 = only at the end and on SIGTERM
    config.train.keep_checkpoints = 2  # the newest so many stay
    config.train.keep_best = ""  # held-out set on which the checkpoint of least loss stays too, and is the policy that is written; empty = the last one is
    config.train.watchdog_seconds = 0  # a run whose step (the first with its compilation) takes longer ends and says where it stood; 0 = it waits
    config.seed = 0  # of the shuffling

    config.train.loss = ml_collections.ConfigDict()  # see jaxrl_llm.losses.preference for the formulas
    config.train.loss.kind = "sigmoid"  # "sigmoid" (DPO), "robust", "hinge", "ipo", "simpo", "orpo" or "kto"
    config.train.loss.beta = 0.1  # scale of the implicit reward: the higher, the nearer to the reference; ORPO: the paper's lambda
    config.train.loss.label_smoothing = 0.0  # share of labels taken to be flipped: "sigmoid" (conservative DPO), "robust", "simpo"
    config.train.loss.gamma = 1.0  # margin that "simpo" asks for
    config.train.loss.reference = True  # compare with the starting policy; False = reference-free; "simpo" and "orpo" never have one
    config.train.loss.desirable_weight = 1.0  # of "kto", for rows whose label is true: keep weight x rows of both labels within a factor of 4/3
    config.train.loss.undesirable_weight = 1.0  # of "kto": the same for rows whose label is false

    config.train.lora = ml_collections.ConfigDict()  # a low-rank adapter is trained in place of the parameters, and written to WORKDIR/adapter for PEFT too
    config.train.lora.rank = 0  # of the adapter, such as 16; 0 = no adapter, all parameters are trained
    config.train.lora.alpha = 32.0  # the adapter's product is scaled by alpha / rank
    config.train.lora.rank_stabilised = False  # by alpha / sqrt(rank) instead
    config.train.lora.targets = ("blocks.*",)  # adapted matrices, as patterns: "blocks.*" (all of a block), "blocks.q", "lm_head.*", ...
    config.train.lora.seed = 0  # of the adapter's first values

    config.train.optimizer = ml_collections.ConfigDict()  # AdamW
    config.train.optimizer.learning_rate = 5e-7  # peak
    config.train.optimizer.schedule = "cosine"  # after warm-up: "constant", "linear" or "cosine"
    config.train.optimizer.warmup_steps = 10  # linear, from 0
    config.train.optimizer.decay_steps = 0  # updates at which a falling schedule ends; 0 = with the run
    config.train.optimizer.final_share = 0.1  # of the peak, at that end
    config.train.optimizer.b1 = 0.9  # decay of the running mean of gradients
    config.train.optimizer.b2 = 0.999  # decay of that of their squares
    config.train.optimizer.eps = 1e-8  # added to the root of these squares
    config.train.optimizer.weight_decay = 0.0  # on matrices; never on norms and biases
    config.train.optimizer.clip_norm = 1.0  # global gradient norm; 0 = no clip
    config.train.optimizer.spike_factor = 0.0  # an update whose gradient norm is so many times its running mean is left out; 0 = none is

    config.overwrite = False  # clear a workdir that holds another run
    config.allow_changes = ()  # fields or groups, such as train.steps,train.optimizer, with other values of which the run in the workdir goes on

    loss = config.train.loss
    if variant in ("robust", "hinge", "ipo", "simpo", "orpo", "kto"):
        loss.kind = variant
    if variant in ("conservative", "robust"):
        loss.label_smoothing = 0.1
    elif variant == "simpo":
        loss.beta = 2.0
    return config
