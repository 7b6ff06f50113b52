r"""Make a page of the features of a sparse autoencoder: contexts, histograms, logits, neighbours, and labels if a server is named.

    jaxrl-llm features --config.model=FOLDER --config.sae=runs/sae/sae --config.data.source=stories.txt --workdir=runs/features
    jaxrl-llm features --config.model=FOLDER --config.sae=runs/sae/sae --config.data.source=stories.txt --workdir=runs/features \
        --config.labels.url=http://127.0.0.1:8000/v1 --config.labels.model=NAME

WORKDIR/features.html is the page, features.json its data, labels.jsonl the labels as they came. Labels may be added to a page that is
there: the texts are not read again. See docs/sae_features.md.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id
    config.dtype = "float32"  # of the model's parameters and activations: float32 or bfloat16
    config.sae = ""  # the dictionary: a folder or hub id that sae.load reads
    config.hook = ""  # tap of the activations; empty = the one that the dictionary records

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # text or prompts: file (txt, jsonl, json, csv, parquet), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=text"
    config.data.separator = ml_collections.config_dict.placeholder(str)  # the line between texts of a txt file; None = a blank one
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.data.template = "none"  # "none" or a format such as "{prompt} {answer}"

    config.features = 1000  # so many, drawn at random among those that fire; all where there are no more
    config.ids = (0,)[:0]  # these features instead, such as 12,90
    config.top = 12  # contexts with the strongest activations
    config.sampled = 8  # further contexts, spread over the quantiles of the texts in which a feature fires
    config.random = 64  # contexts drawn from all texts, of which labels are judged
    config.before = 20  # tokens of a context before its peak
    config.after = 11  # and after it
    config.related = 8  # nearest and co-firing features
    config.batch_rows = 32  # texts the model reads at once
    config.context_size = 256  # longer texts are cut into pieces of so many tokens
    config.skip_first = 1  # leave so many first positions of each piece of a text out, BOS or not: activations are huge there
    config.drop_special = True  # leave the tokenizer's special tokens out, wherever they stand (BOS only if it is EOS too), as train_sae does
    config.seed = 0  # of what is drawn

    config.labels = ml_collections.ConfigDict()
    config.labels.url = ""  # of an OpenAI-compatible server that labels features, such as http://127.0.0.1:8000/v1; empty = no labels
    config.labels.model = ""  # its name there
    config.labels.key_variable = ""  # environment variable that holds the server's key; empty = it needs none
    config.labels.timeout = 60.0  # seconds for an answer
    config.labels.retries = 2  # further tries when the server fails or an answer cannot be read
    config.labels.workers = 4  # requests at once
    config.labels.max_tokens = 256  # of an answer

    config.overwrite = False  # clear a workdir that holds another run
    return config
