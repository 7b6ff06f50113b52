"""Curate a prompt set: SAE features, clusters, difficulty, quality, and the order to train in.

    jaxrl-llm curate --config.model=FOLDER --config.data.source=prompts.jsonl --workdir=runs/curated
    jaxrl-llm curate --config=configs/curate.py:gsm8k --config.model=FOLDER --config.data.source=train.jsonl --workdir=runs/gsm8k
    jaxrl-llm curate --config=configs/curate.py:math --config.model=FOLDER --config.data.source=train_math.json --workdir=runs/math

Writes WORKDIR/curated (parquet, HF data set, ArrayRecord, manifest), WORKDIR/signals.json (every figure, beside its
baselines), WORKDIR/vectors.npz (reduced feature vectors, for adaptive schedules) and, where it trained one, WORKDIR/sae.
"""

import ml_collections

VARIANTS = ("gsm8k", "math")


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config. Variants: "gsm8k" and "math" name the fields and labels of those two data sets' files."""
    config = ml_collections.ConfigDict()
    config.model = ""  # feature model: Hugging Face folder or hub id; the SAE must fit it, the policy may be another
    config.policy = ""  # model whose likelihoods and rollouts are used; empty = the feature model
    config.sae = ""  # SAE folder or hub id; empty = train one on these texts
    config.dtype = "float32"  # of the models' parameters and activations: float32 or bfloat16
    config.mesh = ""  # such as "data=8" over the devices there are; empty = one device

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # jsonl, json, csv, parquet, data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=question,answer=answer"
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out and counts it
    config.data.topic = ""  # column with a known topic, only compared with the clusters (NMI); empty = none
    config.data.needs_answer = True  # drop rows with an empty answer, where the data has answers at all

    config.features = ml_collections.ConfigDict()
    config.features.hook = ""  # tap; empty = the SAE's own, or, where one is trained here, after the middle block
    config.features.pooling = "max_log1p"  # of latents over a row's tokens: "max_log1p", "max", "mean" or "last"
    config.features.context = 0  # longest piece that the model reads at once, in tokens; 0 = what the model can
    config.features.overflow = "window"  # a longer row: "window" (in pieces), "truncate" (its end), "drop" or "error"
    config.features.min_rows = 5  # a feature active in fewer rows is left out
    config.features.max_share = 0.5  # and one active in a larger share of them too
    config.features.remove_length = True  # regress token length out of the features
    config.features.batch_tokens = 8192  # tokens the model reads at once
    config.features.shard_rows = 2048  # rows a file; what a stopped run can lose

    config.train_sae = ml_collections.ConfigDict()  # where config.sae is empty
    config.train_sae.expansion = 16  # latents for each dimension of the activations
    config.train_sae.k = 16  # latents kept for each token
    config.train_sae.steps = 500  # updates
    config.train_sae.batch_size = 2048  # activations an update
    config.train_sae.buffer_rows = 65_536  # activations in the shuffling buffer

    config.clusters = ml_collections.ConfigDict()
    config.clusters.k = 32  # number of clusters
    config.clusters.dims = 256  # of the truncated SVD before k-means
    config.clusters.restarts = 10  # of k-means

    config.difficulty = ml_collections.ConfigDict()
    config.difficulty.labels = ""  # a column, "steps:COLUMN", "rollouts" (pass rates of the policy), or empty = label-free
    config.difficulty.use = "sae"  # features of the proxy: sae, sae+length, random_sae, dense_mean, dense_max, length_tfidf; or "labels"
    config.difficulty.free = "surprisal"  # the label-free proxy: "surprisal" or "active_count"
    config.difficulty.models = ("elastic_net", "ridge")  # probes to fit
    config.difficulty.max_labels = 2000  # labels a probe is fitted on; others check it
    config.difficulty.folds = 5  # of the cross-validation
    config.difficulty.reward = "maths"  # judges rollouts
    config.difficulty.samples = 8  # rollouts a prompt
    config.difficulty.temperature = 1.0  # of the rollouts
    config.difficulty.max_new_tokens = 512  # of a rollout
    config.difficulty.template = "none"  # prompt of a rollout: "none", "chat" or a format with {prompt}
    config.difficulty.max_prompt_tokens = 1024  # of a rollout's prompt; longer ones keep their end
    config.difficulty.batch_prompts = 32  # prompts rolled out at once

    config.quality = ml_collections.ConfigDict()
    config.quality.labels = ""  # column that says of some rows how fit to train on they are (two values: fit or not); empty = learn from corrupted copies
    config.quality.use = "auto"  # "sae", "random_sae", "dense_mean", "dense_max", "length_tfidf", "logp", "tuned", "sae+logp", "sae+tuned" or "answer_logp_mean"; "auto" = sae+tuned, or without tuning sae+logp, or without answers sae
    config.quality.tuned = True  # where labels have two values: also read the answers' gain in policies fine-tuned on the rows that are fit
    config.quality.corruptions = ("garble", "drop_clause", "drop_number", "truncate", "wrong_answer", "changed_number")  # kinds to learn from
    config.quality.samples = 1000  # rows that get a corrupted copy
    config.quality.separator = " "  # between prompt and answer
    config.quality.drop_fraction = 0.1  # share of the rows dropped for low quality, where no labels say how many are unfit
    config.quality.drop_per_bad = 1.5  # with labels of two values: rows dropped for each that is expected to be unfit; 0 = drop_fraction
    config.quality.drop_most = 0.6  # largest share dropped that way
    config.quality.strata = 4  # parts of a cluster by difficulty, inside each of which the worst rows are dropped; 0 = of the whole set
    config.quality.near_duplicates = True  # drop rows that nearly repeat an earlier one
    config.quality.duplicate_threshold = 0.85  # Jaccard similarity of three-word runs from which two rows are the same

    config.schedule = ml_collections.ConfigDict()
    config.schedule.kind = "published"  # order of the first epoch: "published", "shuffled", "global_sort", "reversed", "round_robin", "dirichlet", "e2h_gaussian", "random_clusters" or "soft"
    config.schedule.batch_size = 128  # prompts a step
    config.schedule.rho = 0.125  # share of a batch swapped with the next one ("published")

    config.controls = True  # also report random-SAE and dense features
    config.bootstrap = 1000  # resamples for the 95% intervals
    config.formats = ("parquet", "hf_dataset", "array_record")  # layouts of the curated set
    config.seed = 0  # of everything random
    config.overwrite = False  # clear a workdir that holds another run

    if variant == "gsm8k":
        config.data.fields = "prompt=question"
        config.difficulty.labels = "steps:answer"
    elif variant == "math":
        config.data.fields = "prompt=problem"
        config.data.topic = "type"
        config.difficulty.labels = "difficulty"
    return config
