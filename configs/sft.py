r"""Supervised fine-tuning on prompts with answers, or language-model training on texts.

    jaxrl-llm sft --config.model=FOLDER --config.data.source=train.jsonl --config.data.fields="prompt=question,answer=answer" --workdir=runs/sft
    jaxrl-llm sft --config=configs/sft.py:text --config.model=FOLDER --config.data.source=stories.txt --config.data.held_out=200 \
        --config.train.keep_best=held_out --workdir=runs/stories
    jaxrl-llm sft --config=configs/sft.py:chats --config.model=FOLDER --config.data.source=chats.jsonl --config.data.fields="prompt=messages" \
        --workdir=runs/chats

Variants: "pairs" (the default: the loss is on the response only), "chats" (on every turn of the assistant) and "text" (on every
token). The trained model is written to WORKDIR/policy as a Hugging Face folder. Started again, a run goes on where it was. Expected: the loss
(nats a token) falls, on held-out rows too; where that rises again the model learns its rows by heart, and keep_best keeps it from before.
docs/training.md explains every metric.
"""

import ml_collections

VARIANTS = ("pairs", "chats", "text")


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config of a variant; None is "pairs"."""
    placeholder = ml_collections.config_dict.placeholder
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id of the starting model
    config.adapter = ""  # PEFT folder of a low-rank adapter to start from: merged, or with train.lora.rank above 0 trained on; empty = none
    config.dtype = "float32"  # the model computes in: float32 or bfloat16 (the trained copy is fp32 in any case)
    config.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are; empty = one device

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # rows: file (jsonl, json, csv, parquet, txt), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=question,answer=solution"
    config.data.split = "train"  # of a source that has splits
    config.data.limit = placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.data.separator = placeholder(str)  # the line between two texts of a txt file; None = a blank line
    config.data.held_out = 0  # the last so many rows are not trained on but are the evaluation set "held_out"
    config.evals = ""  # more held-out sets, "NAME=SOURCE" joined by commas; a source may end in "@SPLIT"
    config.eval_limit = placeholder(int)  # at most so many rows a set of evals; None = all

    config.loss_on = "response"  # "response": the column `response_field`; "assistant": that role's turns of chats; "text": every token of "prompt"
    config.response_field = "answer"  # the column that holds the response
    config.template = "none"  # of the prompt: "none", "chat" (which rows of messages want) or a format such as "Question: {prompt}\nAnswer:"
    config.separator = ""  # text between prompt and response, such as " "
    config.max_length = 512  # tokens a row may have, end token included
    config.overflow = "drop"  # a longer row: "drop" (counted), "truncate" (its end is cut) or "error"
    config.batch_rows = 32  # rows a step
    config.pack = False  # put the rows of a step one behind the other into rows of max_length tokens: same gradient, less padding; it takes the place of the length_buckets of grpo and dpo

    config.train = ml_collections.ConfigDict()  # see jaxrl_llm.train.config.SFTConfig
    config.train.steps = 100  # updates
    config.train.micro_batch_rows = 0  # rows (packed ones with pack) a micro-batch, gradients accumulated; 0 = all at once
    config.train.remat = False  # recompute layers in the backward pass: less memory, a third more work
    config.train.remat_keep = "nothing"  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give: more memory, little more work
    config.train.attention = "plain"  # of the update: "plain", or by a kernel that holds no scores in memory: "splash" (TPU), or "cudnn" (GPU), which is given a mask [B, T, S] of queries and slots
    config.train.logprob_chunk = placeholder(int)  # tokens a chunk of the unembedding, on each device; None picks by vocabulary
    config.train.router_balance = 0.0  # of a mixture of experts: weight of the loss that spreads tokens evenly over them, such as 0.001; 0 = none
    config.train.log_every = 10  # steps between lines of metrics.jsonl
    config.train.eval_every = 20  # steps between held-out losses; 0 = only before and after
    config.train.forward_rows = 64  # held-out rows forwarded at once
    config.train.checkpoint_every = 100  # steps; 0 = only at the end and on SIGTERM
    config.train.keep_checkpoints = 2  # the newest so many stay
    config.train.keep_best = ""  # held-out set on which the checkpoint of least loss stays too, and is the model that is written; empty = the last one is
    config.train.watchdog_seconds = 0  # a run whose step (the first with its compilation) takes longer ends and says where it stood; 0 = it waits
    config.seed = 0  # of the shuffling

    config.train.lora = ml_collections.ConfigDict()  # a low-rank adapter is trained in place of the parameters, and written to WORKDIR/adapter for PEFT too
    config.train.lora.rank = 0  # of the adapter, such as 16; 0 = no adapter, all parameters are trained
    config.train.lora.alpha = 32.0  # the adapter's product is scaled by alpha / rank
    config.train.lora.rank_stabilised = False  # by alpha / sqrt(rank) instead
    config.train.lora.targets = ("blocks.*",)  # adapted matrices, as patterns: "blocks.*" (all of a block), "blocks.q", "lm_head.*", ...
    config.train.lora.seed = 0  # of the adapter's first values

    config.train.optimizer = ml_collections.ConfigDict()  # AdamW
    config.train.optimizer.learning_rate = 1e-5  # peak
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

    if variant == "chats":
        config.loss_on = "assistant"
    elif variant == "text":
        config.loss_on = "text"
    return config
