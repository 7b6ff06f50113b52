"""Memory and FLOPs of generation and of a step of GRPO, DPO or SFT, on a named mesh, before anything is rented: no weights are needed.

    jaxrl-llm plan --config.model=qwen2.5-1.5b --config.mesh=v5e:2x4
    jaxrl-llm plan --config.target=configs/saerl.py:qwen2.5-math-1.5b --config.mesh=v5e:2x4

TPU meshes are compiled for by the TPU compiler itself, on any machine with `pip install 'jaxrl-llm[tpu]'`; GPU meshes (`h200:8`) by the
CPU's, so that their working memory is indicative.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    placeholder = ml_collections.config_dict.placeholder
    config = ml_collections.ConfigDict()
    # A config of sft, grpo, saerl, story_rules, verif, dpo or online_dpo: its loss, and its sizes and model where none is given below.
    config.target = ""  # such as configs/grpo.py:ppo; empty = GRPO with the sizes below
    config.model = ""  # a preset such as "qwen2.5-0.5b", a Hugging Face folder or a hub id (only its config.json is read)
    config.mesh = "here"  # "here" (the devices of this machine), "cpu:4", a TPU slice such as "v5e:2x4" or "v5p:4x4x4", or GPUs such as "h200:8" (a100, h100, h200)
    config.layout = placeholder(str)  # how the mesh is used: data=, fsdp=, expert= and tensor=, one of them -1 for all remaining devices; None = the target's if it fits, or a fitting one
    config.rollout_layout = placeholder(str)  # how it is used while sampling; None = the target's if it fits, or as in training
    config.dtype = placeholder(str)  # of parameters and activations; the trained copy and AdamW's moments are float32; None = the target's, or bfloat16
    config.prompts = placeholder(int)  # prompts (of sft: rows) a step; None = the target's, or 16
    config.num_samples = placeholder(int)  # completions a prompt; None = the target's, or 8
    config.prompt_tokens = placeholder(int)  # width of the prompts (of sft a row has this and the next number of tokens); None = the target's, or 256
    config.max_new_tokens = placeholder(int)  # width of the completions; None = the target's, or 512
    config.rollout_rows = placeholder(int)  # completions sampled at once; None = the target's, or 512
    config.rollout_refill = placeholder(bool)  # each completion then has its own copy of its prompt's keys and values; None = the target's, or False
    config.micro_batch_rows = placeholder(int)  # completions (of dpo and online_dpo: pairs) a micro-batch of the update, 0 = all at once; None = the target's, or 0
    config.samples_together = placeholder(int)  # most completions of a prompt that share one forward of it in the update, 0 = all that fit; None = the target's, or 0
    config.inner_epochs = placeholder(int)  # of GRPO: times that each rollout is trained on; None = the target's, or 1
    config.updates_per_epoch = placeholder(int)  # of GRPO: parts of a rollout's prompts, each of which makes an update; None = the target's, or 1
    config.lora_rank = placeholder(int)  # of an adapter that is trained in place of the parameters, on the target's matrices; None = the target's, or 0 (none)
    config.remat = placeholder(bool)  # recompute each layer in the backward pass; None = the target's, or True
    config.remat_keep = placeholder(str)  # with remat, what is not recomputed: "nothing", or "products", what the weight matrices give; None = the target's, or "nothing"
    config.attention = placeholder(str)  # of the update: "plain", "splash" (TPU) or "cudnn" (GPU); None = the target's, or "plain"
    config.json = False  # print one JSON object instead of a table
    return config
