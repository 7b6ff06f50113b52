r"""SAERL: the same policy trained by GRPO on plain and on SAE-curated data, arm beside arm.

    jaxrl-llm saerl --config=configs/saerl.py:demo --workdir=runs/demo      two arms, one seed, under ten minutes on two cores
    jaxrl-llm saerl --config=configs/saerl.py:lab --workdir=runs/lab        the matrix behind docs/saerl.md
    jaxrl-llm saerl --config=configs/saerl.py:dapo --workdir=runs/dapo      the claim under another algorithm (or ":rloo")
    jaxrl-llm saerl --config=configs/saerl.py:own --workdir=runs/own --config.policy.model=FOLDER --config.data.source=train.jsonl \
        --config.data.fields="prompt=question,answer=answer" --config.data.evals.test.source=test.jsonl      on one's own checkpoint and prompts
    jaxrl-llm plan --config=configs/plan.py --config.target=configs/saerl.py:qwen2.5-math-1.5b --config.mesh=v5e:2x4

Expected: docs/saerl.md has the measured tables of ":lab", README.md the figures of ":demo".
"""

from ml_collections import ConfigDict

VARIANTS = ("demo", "lab", "headline", "dapo", "rloo", "own", "qwen2.5-math-1.5b", "qwen2.5-math-7b")

# Every arm: which rows are kept, which features speak, and what orders the rows. Options go to the schedule.
FULL = dict(filter="sae", schedule="band", strata=True)
ARMS = {
    "vanilla": dict(about="shuffled pool, no curation", schedule="shuffled"),
    "vanilla_double": dict(about="shuffled pool, no curation, twice the steps", schedule="shuffled", length=2.0),
    "filter": dict(about="filter by SAE features alone, shuffled", filter="sae_alone", schedule="shuffled"),
    "curriculum": dict(about="strict easy to hard by the SAE proxy, no filter", schedule="global_sort"),
    "mixing": dict(about="single-cluster batches with moderate mixing, no order inside", schedule="published", within="shuffled"),
    "published": dict(about="filter by SAE features alone, clusters, easy to hard inside, alternate, mix", filter="sae_alone", schedule="published"),
    "full": dict(about="filter inside strata of SAE cluster x difficulty, then a trainability band that moves with the policy", **FULL),
    "full_random_clusters": dict(about="full with clusters dealt at random", **FULL, clusters="random"),
    "full_dense": dict(about="full on dense activations", **FULL | dict(filter="dense", features="dense")),
    "full_random_sae": dict(about="full on an SAE that was never trained", **FULL | dict(filter="random_sae", features="random_sae")),
    "full_tfidf": dict(about="full on length and TF-IDF in place of the SAE's features", **FULL | dict(filter="tfidf", features="tfidf")),
    "full_words": dict(about="full on length and TF-IDF alone: nothing of a model", **FULL | dict(filter="tfidf_alone", features="tfidf")),
    "full_logprob": dict(about="full with the policy's log-probabilities alone as quality", **FULL | dict(filter="logprob")),
    "full_tuned": dict(about="full with the log-probabilities and their gain in tuned policies as quality, without features", **FULL | dict(filter="tuned")),
    "vanilla_told": dict(about="vanilla from the policy fine-tuned on the rows told to be sound", schedule="shuffled", start="told"),
    "full_told": dict(about="full from the policy fine-tuned on the rows told to be sound, judged once by the base policy", **FULL, start="told"),
    "full_oracle_filter": dict(about="full with the truly corrupted rows dropped", **FULL | dict(filter="oracle")),
    "full_oracle_difficulty": dict(about="full with every row's true pass rate as prior", **FULL, difficulty="oracle"),
}


def get_config(variant: str | None = "demo") -> ConfigDict:
    """The config of a variant; None is the demo."""
    config = _base()
    {
        "demo": _demo,
        "lab": _lab,
        "headline": _headline,
        "dapo": _dapo,
        "rloo": _rloo,
        "own": _own,
        "qwen2.5-math-1.5b": lambda c: _qwen(c, "Qwen/Qwen2.5-Math-1.5B", 28, 1536, "fsdp=8", 64, "data=4,tensor=2", 512),
        "qwen2.5-math-7b": lambda c: _qwen(c, "Qwen/Qwen2.5-Math-7B", 28, 3584, "fsdp=64", 128, "data=16,tensor=4", 1024),
    }[variant or "demo"](config)
    return config


def _base() -> ConfigDict:
    c = ConfigDict()
    c.title = "SAERL"  # of the report
    c.arms = ("vanilla", "full")  # names of arm_table, in the order of the report; the first is the baseline
    c.main_arm = "full"  # the arm that the headline speaks of
    c.seeds = (0,)  # pool, labels, SAE and RL randomness; arms are paired over them
    c.bases = (0,)  # base policies (seeds of the pre-training)
    c.pools = ("mixed",)  # names of pool_table
    c.workers = 1  # processes that share the cells (pool x base x seed) between them; each then uses one core
    c.mesh = ""  # such as "fsdp=8" over the devices there are; empty = one device
    c.map_prompts = 1500  # points on the page's map of prompts
    c.formats = ("parquet",)  # of the curated set: some of "parquet", "hf_dataset", "array_record"
    c.overwrite = False  # clear a workdir that holds another run

    c.arm_table = ConfigDict()  # what each arm keeps, reads and orders by
    for name, arm in ARMS.items():
        row = dict(filter="none", strata=False, features="sae", clusters="features", difficulty="proxy", within="easy_to_hard")
        c.arm_table[name] = ConfigDict(row | dict(start="base", length=1.0) | arm)

    # Share of each level, skew of the topics, share of each corruption (of jaxrl_llm.data.lab_world).
    none = dict.fromkeys(("wrong_answer", "missing_clause", "garbled", "near_duplicate"), 0.0)
    mixed = dict.fromkeys(none, 0.05)
    wrong = none | dict(wrong_answer=0.4)
    web = dict(wrong_answer=0.05, missing_clause=0.25, garbled=0.25, near_duplicate=0.05)
    even, hard = dict(levels=(0.2,) * 5, topic_skew=0.0), dict(levels=(0.05, 0.1, 0.15, 0.3, 0.4), topic_skew=0.0)
    scraped = dict(levels=(0.15, 0.15, 0.2, 0.25, 0.25), topic_skew=1.0)
    pools = dict(mixed=even | mixed, wrong=even | wrong, hard=hard | mixed, web=scraped | web)
    c.pool_table = ConfigDict(pools)  # what each pool is made of

    _data(c)
    _policy(c)
    _sae(c)
    _curation(c)
    _grpo(c)
    return c


def _data(c: ConfigDict) -> None:
    c.data = ConfigDict()  # a real pool instead of the generated world
    c.data.source = ""  # rows (file, HF data set, tfds:NAME); empty = the generated world
    c.data.fields = "prompt=prompt,answer=answer"  # field map
    c.data.split = "train"  # of a data set that has splits
    # Held-out sets: a name for each, its rows, its field map (empty = that of the pool) and split.
    c.data.evals = ConfigDict(dict(test=dict(source="", fields="", split="test")))
    c.data.template = "none"  # "none", "chat" or a format with {prompt}
    c.data.reward = "exact"  # name in jaxrl_llm.rewards.registry
    c.data.told = ""  # column of the rows that says of some whether they are sound (two values); empty = the probe learns from corrupted copies
    c.data.rows = 3072  # rows of the pool (of a real source: at most so many)
    c.data.test_rows = 500  # held-out rows of the generated world
    c.data.test_seed = 991  # of the generated held-out rows
    c.data.max_prompt_tokens = 24  # longer prompts are dropped and counted


def _policy(c: ConfigDict) -> None:
    c.policy = ConfigDict()  # the base policy: pre-trained by the run, or loaded
    c.policy.model = ""  # Hugging Face folder or hub id; empty = pre-train one on the generated world
    c.policy.dtype = "float32"  # of parameters and activations
    c.policy.d_model = 96
    c.policy.n_layers = 4
    c.policy.n_heads = 4
    c.policy.d_ff = 256
    c.policy.learning_rate = 3e-3  # pre-training: Adam, 50 steps of warm-up, cosine to a twentieth
    c.policy.clean_steps = 1200  # first phase: right answers
    c.policy.mixed_steps = 250  # second phase: answers mixed with each topic's mistake, so that samples differ
    c.policy.batch = 192
    c.policy.clean_levels = (0.35, 0.27, 0.18, 0.12, 0.08)  # share of each level, first phase
    c.policy.mixed_levels = (0.25, 0.22, 0.2, 0.18, 0.15)
    c.policy.mistakes = (0.5, 0.55, 0.6, 0.65, 0.7)  # rate of the mistake at each level, second phase


def _sae(c: ConfigDict) -> None:
    c.sae = ConfigDict()
    c.sae.path = ""  # SAE folder or hub id (of any model: set sae.model too); empty = train one on the policy's activations
    c.sae.model = ""  # feature model, Hugging Face folder or hub id; empty = the policy
    c.sae.hook = ""  # activation; empty = the SAE's own, or, where one is trained here, the residual stream after the middle block
    # Pooled latents side by side: the maximum over a prompt says what it is about, the last token what the policy makes of it.
    c.sae.pooling = ("max_log1p", "last")
    c.sae.d_sae = 1024  # latents
    c.sae.k = 16  # latents kept a token
    c.sae.context = 64  # longest text of the SAE's training, in tokens
    c.sae.steps = 300  # updates
    c.sae.batch = 1024  # activations a step
    c.sae.learning_rate = 2e-3  # peak


def _curation(c: ConfigDict) -> None:
    c.curation = ConfigDict()
    c.curation.answers = True  # the quality probe reads prompt + answer and the policy's log-probabilities, not the prompt alone
    c.curation.remove_length = False  # regress length out of the features; in the lab's world longer truly is harder
    c.curation.labels = 512  # rows whose pass rate is measured by rollouts for the difficulty proxy
    c.curation.label_samples = 8  # rollouts a labelled row
    c.curation.label_batch = 256  # prompts rolled out at once
    c.curation.clusters = 16  # K of the spherical k-means
    c.curation.dims = 64  # of the truncated SVD under clusters and band
    c.curation.quality_labels = 400  # rows whose corruption is told to the quality probe; 0 = it learns from corrupted copies
    c.curation.tuned = True  # the probe also reads the answers' gain in policies fine-tuned on the rows told to be sound
    c.curation.told_epochs = 15  # of fine-tuning on those rows before the reinforcement learning ("told" arms)
    c.curation.copies = 1000  # corrupted copies, where nobody tells
    c.curation.drop_per_bad = 1.0  # rows that a filter drops from the whole pool, for every bad one expected from those told
    c.curation.strata_drop_per_bad = 1.5  # the same from each stratum ("strata" arms)
    c.curation.drop_most = 0.6  # largest share of rows that either drops
    c.curation.drop = 0.1  # share of rows dropped where nothing was told
    c.curation.strata = 4  # parts of a cluster by difficulty, in each of which the worst rows are dropped ("strata" arms)
    c.curation.rho = 0.125  # of a batch, swapped with the next one ("published")
    c.curation.refilter_every = 60  # steps after which band arms judge the rows' answers anew, by the policy as it is then; 0 = never
    c.curation.band_temperature = 0.5  # sharpness of the trainability band
    c.curation.band_easy_floor = 0.125  # share of every batch that stays with easy prompts
    c.curation.band_epoch_share = 0.5  # of the kept rows that one epoch of the band visits
    c.curation.band_balance = "equal"  # clusters in a batch: in proportion to their "items", "equal", by "utility" or "none"


def _grpo(c: ConfigDict) -> None:
    c.grpo = ConfigDict()  # fields of jaxrl_llm.train.config.GRPOConfig
    c.grpo.steps = 240
    c.grpo.prompts_per_step = 4  # small, so that the gradient's noise limits learning, as it does for large models (docs/saerl.md)
    c.grpo.num_samples = 8
    c.grpo.max_new_tokens = 8
    c.grpo.learning_rate = 1e-4
    c.grpo.b2 = 0.99
    c.grpo.clip_high = 0.2  # DAPO: 0.28
    c.grpo.baseline = "group_mean"  # "group_mean", "leave_one_out" (RLOO) or "batch_mean" (REINFORCE++)
    c.grpo.aggregation = "token_mean"  # "token_mean" (DAPO), "sequence_mean" (GRPO) or "dr_grpo"
    c.grpo.advantage_scale = "group_std"  # "group_std", "batch_std" or "none" (Dr. GRPO)
    c.grpo.rollout_tries = 1  # most rollouts a step: groups of equal rewards are replaced by the schedule's next prompts (DAPO); 1 = never
    c.grpo.overlong_buffer = 0  # last tokens before max_new_tokens over which a penalty of the reward grows (DAPO); 0 = no penalty
    c.grpo.overlong_penalty = 1.0  # what a completion that reaches max_new_tokens loses of its reward
    c.grpo.rollout_rows = 512  # most completions decoded at once
    c.grpo.rollout_mesh = ""  # how the mesh's devices are used while sampling, such as "fsdp=4,tensor=2"; empty = as in training
    c.grpo.overlap_rewards = False  # judge a step's completions while the next step's are sampled, which are then one update old; no arm may follow the policy
    c.grpo.micro_batch_rows = 0  # completions a micro-batch; 0 = all at once
    c.grpo.remat = False
    c.grpo.attention = "plain"  # of the update: "plain", or by a kernel that holds no scores in memory: "splash" (TPU), or "cudnn" (GPU), which is given a mask [B, T, S] of queries and slots
    c.grpo.eval_every = 40
    c.grpo.eval_samples = 4  # avg@k beside greedy
    c.grpo.checkpoint_every = 80


def _demo(c: ConfigDict) -> None:
    c.title = "SAERL, demo"
    c.pools = ("wrong",)
    c.formats = ("parquet", "hf_dataset", "array_record")


def _lab(c: ConfigDict) -> None:
    """The matrix. Held-out problems, seeds and base policy are others than those that `full` was chosen on (docs/saerl.md)."""
    c.title = "SAERL, lab"
    c.arms = tuple(ARMS)
    c.pools = ("wrong", "mixed", "hard", "web")
    c.bases, c.seeds, c.data.test_seed = (7,), (300, 301, 302, 303, 304), 994
    c.workers = 2


def _headline(c: ConfigDict) -> None:
    """The claim alone: eight paired seeds on each of three base models that nothing was tuned on."""
    c.title = "SAERL, headline"
    c.arms = ("vanilla", "vanilla_double", "full", "full_random_clusters", "full_random_sae", "full_tuned", "full_tfidf", "full_words")
    c.pools = ("wrong", "web")
    c.bases, c.seeds, c.data.test_seed = (4, 5, 6), tuple(range(200, 208)), 995
    c.workers = 2


def _algorithm(c: ConfigDict, name: str) -> None:
    """The claim and its nearest controls under another algorithm, on policies, seeds and problems of the headline's kind."""
    c.title = f"SAERL, {name}"
    c.arms = ("vanilla", "full", "full_random_clusters", "full_words")
    c.pools = ("wrong",)
    c.bases, c.seeds, c.data.test_seed = (8, 9), (400, 401, 402), 996
    c.workers = 2


def _dapo(c: ConfigDict) -> None:
    """Dynamic sampling and the raised clip, as `configs/grpo.py:dapo`; answers here are of a length."""
    _algorithm(c, "DAPO")
    c.grpo.clip_high, c.grpo.rollout_tries = 0.28, 10


def _rloo(c: ConfigDict) -> None:
    """A leave-one-out baseline without scale, summed over a sequence; no KL, as in the other runs here."""
    _algorithm(c, "RLOO")
    c.grpo.baseline, c.grpo.advantage_scale, c.grpo.aggregation = "leave_one_out", "none", "dr_grpo"


def _own(c: ConfigDict) -> None:
    """One's own policy.model, data.source and data.evals.test.source: sizes for a model of some hundred million parameters up on one
    accelerator; learning rate and template are the first to be looked at."""
    c.title = "SAERL"
    c.pools = ("data",)
    c.pool_table.data = ConfigDict()
    c.data.reward = "maths"
    c.data.rows, c.data.max_prompt_tokens = 20_000, 512
    c.sae.d_sae, c.sae.k, c.sae.steps, c.sae.batch, c.sae.learning_rate, c.sae.context = 8192, 32, 4000, 4096, 5e-4, 512
    c.curation.labels, c.curation.clusters, c.curation.dims, c.curation.label_batch = 1000, 32, 128, 64
    c.curation.remove_length = True
    c.grpo.steps, c.grpo.prompts_per_step, c.grpo.max_new_tokens = 200, 32, 512
    c.grpo.learning_rate, c.grpo.b2 = 1e-6, 0.999
    c.grpo.micro_batch_rows, c.grpo.remat = 32, True
    c.grpo.eval_every, c.grpo.eval_samples, c.grpo.checkpoint_every = 50, 4, 50


def _qwen(c: ConfigDict, model: str, layers: int, d_model: int, mesh: str, micro_batch_rows: int, rollout_mesh: str, rollout_rows: int) -> None:
    """The paper's setting, ready for a pod: DeepMath-103K, GRPO, maths benchmarks."""
    c.title = f"SAERL, {model}"
    c.arms = ("vanilla", "published", "full")
    c.pools = ("data",)
    c.pool_table.data = ConfigDict()
    c.mesh = mesh
    c.policy.model, c.policy.dtype = model, "bfloat16"
    c.policy.d_model, c.policy.n_layers = d_model, layers
    c.data.source = "zwhe99/DeepMath-103K"
    c.data.fields = "prompt=question,answer=final_answer"
    c.data.evals.gsm8k = ConfigDict(dict(source="openai/gsm8k:main", fields="prompt=question,answer=answer", split="test"))
    c.data.evals.math500 = ConfigDict(dict(source="HuggingFaceH4/MATH-500", fields="prompt=problem,answer=answer", split="test"))
    # The paper's other sets; field names as their cards give them.
    aime, amc = dict(source="HuggingFaceH4/aime_2024", fields="prompt=problem,answer=answer", split="train"), dict(source="math-ai/amc23")
    minerva, olympiad = dict(source="math-ai/minervamath"), dict(source="knoveleng/OlympiadBench", split="train")
    for name, row in dict(aime24=aime, amc23=amc, minerva=minerva, olympiad=olympiad).items():
        c.data.evals[name] = ConfigDict(dict(fields="prompt=question,answer=answer", split="test") | row)
    c.data.template = "chat"
    c.data.reward = "maths"
    c.data.rows, c.data.max_prompt_tokens = 103_022, 1024
    c.sae.d_sae, c.sae.k, c.sae.steps, c.sae.batch, c.sae.learning_rate = 16_384, 64, 50_000, 4096, 2e-4
    c.sae.context = 2048
    c.curation.labels, c.curation.clusters, c.curation.dims = 2000, 32, 256
    c.curation.quality_labels, c.curation.remove_length = 0, True
    c.grpo.steps, c.grpo.prompts_per_step, c.grpo.num_samples, c.grpo.max_new_tokens = 300, 128, 8, 3000
    c.grpo.learning_rate, c.grpo.b2, c.grpo.aggregation, c.grpo.advantage_scale = 1e-6, 0.999, "dr_grpo", "none"
    c.grpo.micro_batch_rows, c.grpo.remat = micro_batch_rows, True
    # Sharded as in training, each token would wait for the whole model to come over the links.
    c.grpo.rollout_mesh, c.grpo.rollout_rows = rollout_mesh, rollout_rows
