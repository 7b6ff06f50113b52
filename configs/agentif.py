"""AgentIF (Qi et al. 2025, arXiv:2505.16944): instruction following in agentic settings, from long system prompts with many constraints.

    jaxrl-llm eval --config=configs/agentif.py --workdir=runs/table --config.data.source=results.json
    jaxrl-llm eval --config=configs/agentif.py --workdir=runs/agentif --config.data.source=eval.json --config.policy.model=FOLDER \
        --config.judge.url=http://127.0.0.1:8000/v1 --config.judge.model=judge
    jaxrl-llm eval --config=configs/agentif.py:fresh --workdir=runs/fresh --config.policy.model=FOLDER

The first line recomputes the table of a result file from its stored scores, without a judge. The second lets a model answer and a judge and
the sandbox evaluate. The third makes new rows whose checkers are known: no judge is needed. WORKDIR/eval.json holds every figure with its
interval, WORKDIR/results.jsonl the rows with outputs and scores in the published schema, WORKDIR/report.html is the page. The same command
goes on where it stopped. docs/evaluation.md says what each figure is.
"""

import ml_collections

VARIANTS = ("fresh",)


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config. Variant "fresh": rows are made."""
    config = ml_collections.ConfigDict()
    config.kind = "agentif"  # what is evaluated

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # the rows (json, jsonl, a zip with results.json, data set folder or hub id), with outputs and scores or without
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a row that cannot be read: "error" stops, "skip" leaves it out, counted
    config.data.whole = ""  # file with all rows of the benchmark: those that the source lacks count as errors in the strict way; empty = none

    config.make = ml_collections.ConfigDict()
    config.make.rows = 40 if variant == "fresh" else 0  # rows to make, of each seed, in place of data.source; 0 = none
    config.make.seeds = (0,)  # of their content; with several, the rows of each have the same rules and lengths, and other content
    config.make.words = (750, 1500, 4000, 15000)  # lengths that they take in turn, in words; rules and examples alone take some 500

    config.scores = "auto"  # "stored" scores of the source, "fresh" ones, or "auto": stored ones where there are any
    config.replay = True  # run the code of stored scores again, in the sandbox, and tell where it disagrees

    config.policy = ml_collections.ConfigDict()
    config.policy.model = ""  # Hugging Face folder or hub id of the model that answers; without one, and without a url, outputs must be in the source
    config.policy.adapter = ""  # folder of a low-rank adapter for it, as PEFT lays it out; empty = none
    config.policy.dtype = "float32"  # of parameters and activations: float32 or bfloat16
    config.policy.mesh = ""  # such as "fsdp=4,tensor=2" over the devices there are; empty = one device
    config.policy.url = ""  # OpenAI-compatible server that answers in place of a model of ours, such as http://127.0.0.1:8000/v1
    config.policy.name = ""  # of the model there
    config.policy.key_variable = ""  # environment variable that holds the server's key; empty = none is needed
    config.policy.workers = 8  # requests to the server at once
    config.policy.timeout = 600.0  # seconds for one answer of the server
    config.policy.template = "chat"  # "chat", "none" or a format such as "{prompt}\nAnswer:"
    config.policy.max_prompt_tokens = ml_collections.config_dict.placeholder(int)  # room for a prompt; None = the context less max_new_tokens
    config.policy.overflow = "drop"  # a longer prompt: "error", "drop" (no response, which the strict way counts) or "truncate" (its beginning)
    config.policy.max_new_tokens = 4096  # limit of a response
    config.policy.temperature = 0.0  # 0 = greedy
    config.policy.batch_prompts = 4  # prompts sampled at once
    config.policy.seed = 0  # of the sampling

    config.judge = ml_collections.ConfigDict()
    config.judge.url = ""  # OpenAI-compatible server that judges; empty = constraints that need a judge stay without a verdict
    config.judge.model = ""  # its name there; the published figures are of gpt-4o-2024-11-20
    config.judge.key_variable = ""  # environment variable that holds the server's key; empty = none is needed
    config.judge.prompts = "delimited"  # "delimited": the response between markers that it cannot forge; "published": filled in as the public code does
    config.judge.mode = "line"  # how a delimited verdict is read: "line", "choice" (vLLM), "guided_choice" (vLLM before 0.12), "json_schema" or "logprobs"
    config.judge.workers = 8  # requests at once
    config.judge.timeout = 120.0  # seconds for one answer
    config.judge.max_tokens = 8192  # of an answer

    config.sandbox = ml_collections.ConfigDict()
    config.sandbox.workers = 2  # checks at once
    config.sandbox.wall_s = 5.0  # seconds for one check
    config.sandbox.isolation = "full"  # what a host must offer; docs/evaluation.md says what is run there
    config.sandbox.exec_text = True  # run checks that execute a response as a program, in the sandbox; else they are left out, counted

    config.batch_rows = 16  # rows evaluated before they are written down
    config.bootstrap = 1000  # resamples of the rows that intervals come from
    config.seed = 0  # of the resamples
    config.shown = 40  # rows on the page
    config.overwrite = False  # clear a workdir that holds another run
    return config
