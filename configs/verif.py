"""VerIF (arXiv 2506.09942): does GRPO with rules and a judge teach a model to follow instructions, and what does each of the two do?

    jaxrl-llm verif --config=configs/verif.py --workdir=runs/verif --config.policy.model=FOLDER --config.stories.source=stories.txt
    jaxrl-llm verif --config=configs/verif.py:tulu-3-8b --workdir=runs/tulu --config.judge.url=http://judge:8000/v1 --config.judge.model=NAME

Variants: "demo" (the default): a stories model is taught the format and trained on instructions made from stories, by a judge that the run teaches
and serves itself; "tulu-3-8b" and "r1-distill-qwen-7b": the paper's settings, on VerInstruct, by the judge that judge.url names. WORKDIR/report.html
compares the arms on held-out prompts; WORKDIR/arms/ARM-seedN/policy are the trained policies. Started again, a run goes on where it was.
Expected, with the 260K-parameter stories model of llama2.c: docs/verif.md.
"""

from ml_collections import ConfigDict, config_dict

VARIANTS = ("demo", "tulu-3-8b", "r1-distill-qwen-7b")
OPEN = ("grpo",)  # a config file of one's own may set any field of GRPOConfig there
TULU, R1 = "allenai/Llama-3.1-Tulu-3-8B-SFT", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"

SEEN = "keywords:existence keywords:frequency keywords:count length_constraints:number_words length_constraints:number_sentences"
SEEN = (*SEEN.split(), "startend:first_word", "startend:opening", "punctuation:no_comma")
UNSEEN = "keywords:words keywords:in_sentence keywords:order length:words length:sentences length:characters length:different_words"
UNSEEN = (*UNSEEN.split(), "startend:last_word")

# What each arm is rewarded by: `use` of the reward "verif".
ARMS = {
    "both": dict(use="both", about="rules by code and the soft constraint by the judge: VerIF"),
    "rules": dict(use="rules", about="rules by code alone"),
    "judge": dict(use="judge", about="the soft constraint by the judge alone"),
    "judge_all": dict(use="judge_all", about="the judge decides the rules too, no code"),
}


def get_config(variant: str | None = None) -> ConfigDict:
    """The config of a variant; None is the demo."""
    config = _base()
    if variant not in (None, "demo"):
        _paper(config, TULU if variant == "tulu-3-8b" else R1)
    return config


def _base() -> ConfigDict:
    c = ConfigDict()
    c.title = "VerIF, demo"  # of the report
    c.arms = ("both", "rules", "judge")  # names of arm_table, in the order of the report; the first is the one that the headline speaks of
    c.seeds = (0,)  # of order and sampling; arms are paired over them
    c.mesh = ""  # such as "fsdp=4" over the devices there are; empty = one device
    c.shown = 16  # held-out prompts whose responses are on the page
    c.overwrite = False  # clear a workdir that holds another run
    c.arm_table = ConfigDict({name: ConfigDict(arm) for name, arm in ARMS.items()})  # what each arm is rewarded by

    c.policy = ConfigDict()
    c.policy.model = ""  # Hugging Face folder or hub id of the policy before training
    c.policy.dtype = "float32"  # of parameters and activations: float32 or bfloat16

    c.data = ConfigDict()  # instructions: read, or made from the stories below
    c.data.source = ""  # VerInstruct's rows, or any with columns prompt and constraints: file, data set folder or hub id; empty = made from stories
    c.data.fields = ""  # field map, such as "prompt=question"
    c.data.split = "train"  # of a data set that has splits
    c.data.limit = config_dict.placeholder(int)  # at most so many rows, or stories; None = all
    c.data.held_out = 200  # prompts of each held-out set
    c.data.template = "none"  # "none", "chat" or a format with {prompt}
    c.data.max_prompt_tokens = 128  # room for a prompt
    c.data.overflow = "error"  # a longer one: "error", "drop" or "truncate"
    c.data.seed = 0  # of the instructions that are made, and of the split

    c.stories = ConfigDict()  # what instructions are made from; and, held out, what tells whether language is still modelled
    c.stories.source = ""  # stories: txt, jsonl, json, csv, parquet, data set folder, hub id or tfds:NAME; empty = none (with data.source)
    c.stories.fields = ""  # field map for tables, such as "prompt=text"
    c.stories.separator = "<|endoftext|>"  # the line between two stories of a txt file
    c.stories.held_out = 300  # stories that nothing is trained on: held-out instructions are made from them
    c.stories.pieces = 2  # texts cut from a story
    c.stories.least_words = 6  # of a text
    c.stories.most_words = 24  # of a text

    c.made = ConfigDict()  # instructions that a text of a story keeps: its rules, read off it, and one theme
    c.made.seen = SEEN  # types of rules to train on
    c.made.unseen = UNSEEN  # types of the second held-out set, in no training row
    c.made.least_rules = 2  # of a prompt
    c.made.most_rules = 2  # of a prompt
    c.made.template = "{constraints}\n\nStory:"  # a prompt

    c.sft = ConfigDict()  # first the policy is taught the format by the texts that the instructions were made from
    c.sft.steps = 300  # updates; 0 = it knows the format
    c.sft.batch = 32  # texts a step
    c.sft.learning_rate = 1e-3  # peak, cosine
    c.sft.stories = 0.25  # share of its texts that are stories without an instruction, so that language is kept

    c.judge = ConfigDict()  # who decides the soft constraints
    c.judge.url = ""  # of an OpenAI-compatible API; empty = the run teaches a copy of the policy to answer, and serves it on the loopback
    c.judge.model = "judge"  # its name there
    c.judge.mode = "logprobs"  # how its verdict is read: "logprobs", "line" (any server), "choice" (vLLM), "guided_choice" (vLLM before 0.12) or "json_schema"
    c.judge.show_instruction = False  # whether it sees the whole prompt beside the soft constraints
    c.judge.options = "{}"  # more of the reward "verif", as JSON, such as '{"cache": "judge.sqlite", "key_variable": "JUDGE_KEY"}'
    c.judge.steps = 300  # of a judge that is taught: updates
    c.judge.batch = 32  # questions a step
    c.judge.learning_rate = 2e-3  # peak, cosine
    c.judge.sampled = 0.5  # share of its questions about texts of the policy, the others about stories
    c.judge.places = 32  # questions answered at once

    c.reward = ConfigDict()
    # Of rules and judge: "product" (the authors' code) or "average" (the paper), by which the rules still teach where the judge says no.
    c.reward.combine = "average"
    c.reward.rule_reduce = "mean"  # of the rules: "mean" (the authors' code) or "all" (the paper)

    c.batch_prompts = 16  # prompts a step
    c.grpo = ConfigDict()  # those of jaxrl_llm.train.config.GRPOConfig that matter most here; the others are as there
    c.grpo.steps = 40  # rollouts, each followed by an update
    c.grpo.num_samples = 8  # responses a prompt
    c.grpo.max_new_tokens = 80  # limit of a response in tokens
    c.grpo.temperature = 1.0  # of sampling, and of the log-probabilities in the loss
    c.grpo.rollout_rows = 512  # most responses decoded at once
    c.grpo.rollout_refill = False  # a finished response gives its place to the next at once: same samples, sooner, more memory
    c.grpo.rollout_mesh = ""  # how the mesh's devices are used while sampling, such as "fsdp=4,tensor=2"; empty = as in training
    c.grpo.overlap_rewards = False  # judge a step's responses while the next step's are sampled, which are then one update old: for slow judges
    c.grpo.overlong_buffer = 10  # last tokens before max_new_tokens over which a penalty of the reward grows, or long responses win (docs/verif.md)
    c.grpo.overlong_penalty = 0.5  # what a response that reaches max_new_tokens loses of its reward
    c.grpo.micro_batch_rows = 0  # responses a micro-batch, gradients accumulated; 0 = all at once
    c.grpo.remat = False  # recompute layers in the backward pass: less memory, a third more work
    c.grpo.attention = "plain"  # of the update: "plain", or by a kernel that holds no scores in memory: "splash" (TPU) or "cudnn" (GPU)
    c.grpo.checkpoint_every = 20  # steps; 0 = only at the end and on SIGTERM
    c.grpo.sample_every = 10  # steps between lines of samples.jsonl; 0 = none

    c.grpo.loss = ConfigDict()  # see jaxrl_llm.losses.grpo for the formulas
    c.grpo.loss.aggregation = "token_mean"  # "token_mean", "sequence_mean" or "dr_grpo"
    c.grpo.loss.kl = "k3"  # stay near the policy before: None, "k1", "k2" or "k3"
    c.grpo.loss.kl_coef = 0.1  # weight of that KL: far from that policy the judge is wrong (docs/verif.md)
    c.grpo.loss.entropy_coef = 0.0  # bonus for a policy that stays open
    c.grpo.loss.advantage_eps = 1e-4  # added to the std

    c.grpo.optimizer = ConfigDict()  # AdamW
    c.grpo.optimizer.learning_rate = 3e-4  # peak
    c.grpo.optimizer.warmup_steps = 5  # linear, from 0
    c.grpo.optimizer.weight_decay = 0.0  # on matrices
    return c


def _paper(c: ConfigDict, model: str) -> None:
    """The authors' scripts, alike for both models: 32 prompts x 16 responses a step, AdamW 1e-6, KL 1e-3 (k3), entropy 1e-3. Their loss is a mean over
    the tokens of each micro-batch of two rows, ours over all tokens of the step. 688 steps are an epoch of 22,000 rows; they kept the best on
    IFEval, usually before step 200."""
    c.title = f"VerIF, {model}"
    c.mesh = "fsdp=16"
    c.policy.model, c.policy.dtype = model, "bfloat16"
    c.data.source = "THU-KEG/VerInstruct"
    c.data.template, c.data.max_prompt_tokens, c.data.overflow = "chat", 1024, "drop"
    c.sft.steps = 0
    c.judge.model, c.judge.mode, c.judge.show_instruction = "", "line", True
    # A judge that reasons takes minutes over a batch: as many tokens as the authors give it, and time for them.
    c.judge.options = '{"max_tokens": 4096, "timeout": 900, "workers": 128' + (', "thinks": true}' if model == R1 else "}")
    c.reward.rule_reduce = "all"  # as their figures were made; their code computes "product" with "mean"
    c.batch_prompts = 32
    c.grpo.steps, c.grpo.num_samples, c.grpo.max_new_tokens = 688, 16, 4096
    c.grpo.overlong_buffer = 0  # theirs has none
    c.grpo.rollout_mesh = "data=16"
    c.grpo.micro_batch_rows, c.grpo.remat, c.grpo.checkpoint_every = 32, True, 20 if model == TULU else 50
    c.grpo.loss.kl_coef, c.grpo.loss.entropy_coef, c.grpo.loss.advantage_eps = 1e-3, 1e-3, 1e-6
    c.grpo.optimizer.learning_rate, c.grpo.optimizer.warmup_steps, c.grpo.optimizer.weight_decay = 1e-6, 0, 0.01
