"""Memory and FLOPs of generation and of a GRPO step, on a named mesh, before anything is rented: no weights are needed.

    jaxrl-llm plan --config.model=qwen2.5-1.5b --config.mesh=v5e:2x4
    jaxrl-llm plan --config.target=configs/saerl.py:qwen2.5-math-1.5b --config.mesh=v5e:2x4

TPU meshes are compiled for by the TPU compiler itself, on any machine with `pip install 'jaxrl-llm[tpu]'`.
"""

import ml_collections


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config; there are no variants."""
    config = ml_collections.ConfigDict()
    config.target = ""  # a grpo or saerl config whose sizes, and model if it names one, replace those below; empty = those below
    config.model = ""  # a preset such as "qwen2.5-0.5b", a Hugging Face folder or a hub id (only its config.json is read)
    config.dtype = "bfloat16"  # of parameters and activations; the trained copy and AdamW's moments are float32
    config.mesh = "here"  # "here" (the devices of this machine), "cpu:4", or a TPU slice such as "v5e:2x4" or "v5p:4x4x4"
    config.layout = "fsdp=-1"  # how the mesh is used: data=, fsdp= and tensor=, one of them -1 for all remaining devices
    config.prompts = 16  # prompts a step
    config.num_samples = 8  # completions a prompt
    config.prompt_tokens = 256  # width of the prompts
    config.max_new_tokens = 512  # width of the completions
    config.rollout_rows = 512  # completions sampled at once
    config.micro_batch_rows = 0  # completions a micro-batch of the update; 0 = all at once
    config.remat = True  # recompute each layer in the backward pass
    config.json = False  # print one JSON object instead of a table
    return config
