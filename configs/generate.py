"""Sample from a model.

    jaxrl-llm generate --config.model=FOLDER --config.prompt="Once upon a time"
    jaxrl-llm generate --config.model=FOLDER --config.data.source=prompts.jsonl --workdir=runs/samples
    jaxrl-llm generate --config.model=FOLDER --config.prompt="Once upon a time" --config.steer.sae=FOLDER \
        --config.steer.features="12=add:4.0,90=ablate"

Without a workdir the samples are printed; with one they go to its samples.jsonl, and a run that was stopped goes on.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id
    config.adapter = ""  # PEFT folder of a low-rank adapter of that model, such as the WORKDIR/adapter of a training run; empty = none
    config.dtype = "float32"  # of parameters and activations: float32 or bfloat16
    config.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are, which share parameters and completions; empty = one device
    config.prompt = ""  # one prompt; empty = read data.source

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # file of prompts (jsonl, json, csv, parquet, txt), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=question,answer=answer"
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many prompts; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out

    config.template = "none"  # "none", "chat" (which rows of messages want) or a format such as "Question: {prompt}\nAnswer:"
    config.max_prompt_tokens = 512  # room for a prompt; less where the model's context less max_new_tokens is less
    config.overflow = "error"  # a longer prompt: "error", "drop" or "truncate" (its beginning)
    config.num_samples = 1  # completions a prompt
    config.max_new_tokens = 128  # limit of a completion
    config.temperature = 1.0  # 0 = greedy
    config.top_k = 0  # 0 = off
    config.top_p = 1.0  # 1 = off
    config.stop_strings = ()  # a completion ends after any of these, such as "'\n','Question:'", quotes included
    config.batch_prompts = 32  # prompts sampled at once
    config.seed = 0  # of the sampling

    config.steer = ml_collections.ConfigDict()
    config.steer.sae = ""  # dictionary (folder or hub id) whose latents are edited while the model reads and writes; empty = none are
    config.steer.features = ""  # ID=KIND[:NUMBER] between commas, such as "12=add:4.0,90=ablate,7=set:3,8=scale:0.5,9=clamp:0:2.5"
    config.steer.where = "all"  # tokens: "all", "prompt" or "generated"
    config.steer.start = 0  # first position that is edited; 1 leaves the beginning-of-text token alone
    config.steer.passthrough = False  # replace activations by the decoded code, rather than add the difference to them
    config.steer.hook = ""  # tap of the activations; empty = the one that the dictionary records

    config.overwrite = False  # clear a workdir that holds another run
    return config
