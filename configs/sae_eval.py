r"""How good sparse autoencoders are: figures with intervals, one page an SAE and one that compares them.

    jaxrl-llm eval --config=configs/sae_eval.py --workdir=runs/eval --config.model=FOLDER --config.saes=runs/sae/sae,FOLDER_OR_HUB_ID \
        --config.data.source=stories.txt
    jaxrl-llm eval --config=configs/sae_eval.py --workdir=runs/eval --config.model=FOLDER --config.saes=runs/sae/sae \
        --config.data.source=stories.txt --config.probe.source=topics.jsonl --config.probe.fields="prompt=text,label=topic" \
        --config.absorption.enabled=True

WORKDIR/eval.json holds every figure, WORKDIR/report.html compares the SAEs, WORKDIR/saes/NAME.html is each one's own page. The same
command goes on with the SAEs that are not finished. docs/sae.md says what each figure is.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.kind = "sae"  # what is evaluated
    config.model = ""  # Hugging Face folder or hub id of the model that the SAEs read
    config.dtype = "float32"  # of the model's parameters and activations: float32 or bfloat16
    config.saes = ("",)  # folders or hub ids of the dictionaries, with commas between them
    config.hook = ""  # tap of SAEs that name none, such as "blocks.3.resid_post"
    config.hook_out = ""  # output tap of transcoders that name none, such as "blocks.3.mlp_out"

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # text that no SAE was trained on: file (txt, jsonl, json, csv, parquet), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=text"
    config.data.separator = ml_collections.config_dict.placeholder(str)  # the line between texts of a txt file; None = a blank one
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many texts; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.data.template = "none"  # "none" or a format such as "{prompt} {answer}"

    config.batch_rows = 16  # rows the model reads at once
    config.context_size = 128  # longer rows are cut into pieces of so many tokens
    config.skip_first = 1  # leave so many first positions of each piece of a text out, BOS or not: activations are huge there
    config.drop_special = True  # leave the tokenizer's special tokens out, wherever they stand (BOS only if it is EOS too), as train_sae does
    config.model_part = True  # cross-entropy and divergence with the reconstruction in the tap's place
    config.geometry = True  # cosines of the decoder's and the encoder's rows with each other
    config.bootstrap = 1000  # resamples of the texts that intervals come from
    config.seed = 0  # of splits and resamples

    config.probe = ml_collections.ConfigDict()
    config.probe.source = ""  # labelled texts for k-sparse probing; empty = none
    config.probe.fields = ""  # field map to the columns prompt and label, such as "prompt=text,label=topic"
    config.probe.split = "train"  # of a data set that has splits
    config.probe.limit = 5000  # at most so many texts
    config.probe.context_size = 128  # tokens of each text that are read
    config.probe.min_rows = 20  # classes with fewer texts are left out
    config.probe.test_share = 0.2  # of each class, kept for the test
    config.probe.ks = (1, 2, 5, 10, 20, 50)  # latents (raw dimensions) that a sparse probe may read
    config.probe.perturb = True  # targeted probe perturbation too, where there are three classes
    config.probe.ns = (2, 5, 10, 20, 50, 100, 500)  # latents taken out for a class

    config.absorption = ml_collections.ConfigDict()
    config.absorption.enabled = False  # feature absorption on the first letters of the vocabulary's tokens
    config.absorption.words_only = True  # only tokens that begin a word
    config.absorption.occurrences = 0  # of each token in the texts of data.source, at most; 0 = the token alone, after BOS
    config.absorption.test_share = 0.5  # of each letter's tokens, kept for the test
    config.absorption.max_k = 10  # main latents that a letter may have
    config.absorption.f1_jump = 0.03  # the rise in F1 that makes one more latent a main one
    config.absorption.cosine = 0.1  # least cosine with the probe of a latent that absorbs a part; in models of width 64 rather 0.5
    config.absorption.full_cosine = 0.025  # the same of the one latent of full absorption
    config.absorption.share = 0.4  # of the activation's part along the probe that absorbing latents must give
    config.absorption.max_absorbing = 3  # latents that may share a partial absorption
    config.absorption.least = 5  # tokens that a letter needs on each side of the split

    config.overwrite = False  # clear a workdir that holds another run
    return config
