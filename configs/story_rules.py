"""GRPO of a stories model on rule-checked continuations: does the held-out reward rise, and are the samples stories still?

    jaxrl-llm story_rules --config.model=FOLDER --config.stories=FILE --workdir=runs/story_rules

FOLDER: a small language model of stories (Hugging Face layout). FILE: a text file of stories between lines "<|endoftext|>".
With the 260K-parameter stories model of llama2.c and 2 MB of TinyStories on 2 CPU cores: see docs of the run's own report.html.
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
    config.rules.no_comma = True
    config.rules.at_least_words = 10
    config.rules.fewer_than_words = 35
    config.rules.full_sentence = True  # ends with . ! or ?
    config.reduce = "mean"  # reward: "mean" = share of rules kept, "all" = 1 only where every rule is kept

    config.openings = ml_collections.ConfigDict()  # which stories' first sentences are used
    config.openings.min_words = 4
    config.openings.max_words = 20
    config.openings.min_stories = 5  # a word that must come back is in so many stories at least
    config.openings.max_share = 0.2  # and in at most this share of them
    config.openings.min_letters = 3

    config.judge_samples = 4  # samples a held-out opening for the comparison before and after
    config.shown = 24  # held-out openings whose samples, before and after, are in the report

    config.grpo = ml_collections.ConfigDict()  # see jaxrl_llm.train.config.GRPOConfig for all fields
    config.grpo.steps = 150
    config.grpo.num_samples = 8  # continuations an opening
    config.grpo.max_new_tokens = 80
    config.grpo.stop_strings = ("\n",)  # a continuation is one paragraph
    config.grpo.eval_every = 25  # steps between evaluations on the held-out openings
    config.grpo.checkpoint_every = 50
    config.grpo.sample_every = 10

    config.grpo.loss = ml_collections.ConfigDict()
    config.grpo.loss.kl = "k3"  # stay near the model before training: None, "k1", "k2" or "k3"
    config.grpo.loss.kl_coef = 0.02

    config.grpo.optimizer = ml_collections.ConfigDict()
    config.grpo.optimizer.learning_rate = 3e-4
    config.grpo.optimizer.warmup_steps = 5

    config.overwrite = False  # clear a workdir that holds another run
    return config
