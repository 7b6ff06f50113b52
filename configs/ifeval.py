"""IFEval (Zhou et al. 2023, arXiv:2311.07911): how many of its verifiable instructions a model follows, by prompt and by instruction, strict and loose.

    jaxrl-llm eval --config=configs/ifeval.py --workdir=runs/ifeval --config.data.source=input_data.jsonl --config.policy.model=FOLDER
    jaxrl-llm eval --config=configs/ifeval.py --workdir=runs/ifeval --config.data.source=input_data.jsonl \
        --config.policy.url=http://127.0.0.1:8000/v1 --config.policy.name=policy
    jaxrl-llm eval --config=configs/ifeval.py --workdir=runs/ifeval --config.data.source=input_data.jsonl --config.responses.source=answers.jsonl

WORKDIR/eval.json holds every figure with its interval, WORKDIR/verdicts.jsonl each verdict with its reason, WORKDIR/report.html is the page.
The same command goes on with the prompts that are not answered. docs/evaluation.md says what each figure is.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.kind = "ifeval"  # what is evaluated

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # the prompts, with the columns prompt, instruction_id_list and kwargs (file, data set folder or hub id)
    config.data.fields = "id=key"  # field map; of the published file the ids are called key
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many prompts; None = all

    config.responses = ml_collections.ConfigDict()
    config.responses.source = ""  # file of responses to the prompts (columns prompt, response), or lm-eval's log of samples; empty = the policy answers
    config.responses.fields = ""  # field map, such as "prompt=instruction,response=output"

    config.policy = ml_collections.ConfigDict()
    config.policy.model = ""  # Hugging Face folder or hub id of the model that answers
    config.policy.adapter = ""  # folder of a low-rank adapter for it, as PEFT lays it out; empty = none
    config.policy.dtype = "float32"  # of parameters and activations: float32 or bfloat16
    config.policy.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are; empty = one device
    config.policy.url = ""  # OpenAI-compatible server that answers in place of a model of ours, such as http://127.0.0.1:8000/v1
    config.policy.name = ""  # of the model there
    config.policy.key_variable = ""  # environment variable that holds the server's key; empty = none is needed
    config.policy.workers = 8  # requests to the server at once
    config.policy.timeout = 600.0  # seconds for one answer of the server
    config.policy.template = "chat"  # "chat", "none" or a format such as "Question: {prompt}\nAnswer:"
    config.policy.max_prompt_tokens = ml_collections.config_dict.placeholder(int)  # room for a prompt; None = the context less max_new_tokens
    config.policy.overflow = "error"  # a longer prompt: "error", "drop" (no response, counted) or "truncate" (its beginning)
    config.policy.max_new_tokens = 1280  # limit of a response
    config.policy.temperature = 0.0  # 0 = greedy
    config.policy.batch_prompts = 16  # prompts sampled at once
    config.policy.seed = 0  # of the sampling

    config.thinking = "drop"  # "drop" judges what follows the reasoning (</think>), "keep" the whole response
    config.bootstrap = 1000  # resamples of the prompts that intervals by instruction come from
    config.seed = 0  # of the resamples
    config.shown = 40  # prompts on the page, followed and not followed ones
    config.overwrite = False  # clear a workdir that holds another run
    return config
