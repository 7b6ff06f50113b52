"""GRPO of a stories model on rule-checked continuations: does the held-out reward rise, and are the samples stories still?

    jaxrl-llm story_rules --config.model=FOLDER --config.stories=FILE --workdir=runs/story_rules

FOLDER: a small language model of stories (Hugging Face layout). FILE: a text file of stories between lines "<|endoftext|>".
WORKDIR/report.html shows the rules kept before and after, samples side by side and guards against degeneration; WORKDIR/policy is the
trained policy as a Hugging Face folder. Started again, a run goes on where it was. Expected, with the 260K-parameter stories model of
llama2.c and 2 MB of TinyStories: held-out reward and the share of continuations that keep every rule rise, their intervals clear of zero,
while NLL under the original model and the share of known words stay near those of the policy before.
"""

import ml_collections

VARIANTS = ()
OPEN = ("grpo",)  # a config file of one's own may set any field of GRPOConfig there


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id of the policy before training
    config.dtype = "float32"  # of parameters and activations: float32 or bfloat16
    config.mesh = ""  # such as "data=4" over the devices there are; empty = one device
    config.stories = ""  # stories: txt, jsonl, json, csv, parquet, data set folder, hub id or tfds:NAME
    config.fields = ""  # field map for tables, such as "prompt=text"
    config.separator = "<|endoftext|>"  # the line between two stories of a txt file
    config.story_end = "<s>"  # token by which the model ends a story, beside its own end tokens; empty = only those
    config.held_out = 200  # openings kept for the evaluation
    config.limit = ml_collections.config_dict.placeholder(int)  # at most so many openings to train on; None = all
    config.max_prompt_tokens = 64  # room for an opening
    config.batch_prompts = 16  # openings a step
    config.seed = 0  # of the split, the order and the sampling

    config.rules = ml_collections.ConfigDict()  # what a continuation must keep to; 0 or False leaves a rule out
    config.rules.words = 1  # so many of the opening's rarest words must come back
    config.rules.no_comma = True  # no comma in the continuation
    config.rules.at_least_words = 10  # so many words or more
    config.rules.fewer_than_words = 35  # and fewer than these
    config.rules.full_sentence = True  # ends with . ! or ?
    config.reduce = "mean"  # reward: "mean" = share of rules kept, "all" = 1 only where every rule is kept

    config.openings = ml_collections.ConfigDict()  # which stories' first sentences are used
    config.openings.min_words = 4  # of the sentence
    config.openings.max_words = 20  # of the sentence
    config.openings.min_stories = 5  # a word that must come back is in so many stories at least
    config.openings.max_share = 0.2  # and in at most this share of them
    config.openings.min_letters = 3  # of a word that must come back

    config.judge_samples = 4  # samples a held-out opening for the comparison before and after
    config.shown = 24  # held-out openings whose samples, before and after, are in the report

    config.grpo = ml_collections.ConfigDict()  # those of jaxrl_llm.train.config.GRPOConfig that matter most here; the others are as there
    config.grpo.steps = 150  # rollouts, each followed by an update
    config.grpo.num_samples = 8  # continuations an opening
    config.grpo.max_new_tokens = 80  # limit of a continuation in tokens
    config.grpo.temperature = 1.0  # of sampling, in training and in the comparison, and of the log-probabilities in the loss
    config.grpo.stop_strings = ("\n",)  # a continuation is one paragraph
    config.grpo.rollout_rows = 512  # most continuations decoded at once
    config.grpo.rollout_refill = False  # a finished continuation gives its place to the next at once: same samples, sooner, more memory
    config.grpo.rollout_mesh = ""  # how the mesh's devices are used while sampling, such as "fsdp=4,tensor=2": a policy whose parameters are whole, or split by heads, waits for none at each token; empty = as in training
    config.grpo.micro_batch_rows = 0  # continuations a micro-batch, gradients accumulated; 0 = all at once
    config.grpo.remat = False  # recompute layers in the backward pass: less memory, a third more work
    config.grpo.eval_samples = 0  # samples an opening for avg@k beside greedy in those evaluations; 0 = greedy only
    config.grpo.eval_batch = 256  # continuations generated at once in an evaluation and in the comparison
    config.grpo.eval_every = 25  # steps between evaluations on the held-out openings; 0 = only before and after
    config.grpo.keep_checkpoints = 2  # the newest so many stay
    config.grpo.checkpoint_every = 50  # steps; 0 = only at the end and on SIGTERM
    config.grpo.sample_every = 10  # steps between lines of samples.jsonl; 0 = none

    config.grpo.loss = ml_collections.ConfigDict()  # see jaxrl_llm.losses.grpo for the formulas
    config.grpo.loss.aggregation = "token_mean"  # "token_mean", "sequence_mean" or "dr_grpo"
    config.grpo.loss.kl = "k3"  # stay near the model before training: None, "k1", "k2" or "k3"
    config.grpo.loss.kl_coef = 0.02  # weight of that KL

    config.grpo.optimizer = ml_collections.ConfigDict()  # AdamW
    config.grpo.optimizer.learning_rate = 3e-4  # peak
    config.grpo.optimizer.warmup_steps = 5  # linear, from 0

    config.overwrite = False  # clear a workdir that holds another run
    return config
