r"""Train a sparse autoencoder on the activations of one tap of a model.

    jaxrl-llm train_sae --config.model=FOLDER --config.data.source=stories.txt --workdir=runs/sae
    jaxrl-llm train_sae --config.model=FOLDER --config.data.source=prompts.jsonl --config.data.fields=prompt=question \
        --config.hook=blocks.3.resid_post --config.sae.k=32 --workdir=runs/sae
    jaxrl-llm train_sae --config.model=FOLDER --config.data.source=stories.txt --config.hook=blocks.1.resid_post,blocks.3.resid_post \
        --config.sae.architecture=batchtopk --workdir=runs/layers
    jaxrl-llm train_sae --config.model=FOLDER --config.data.source=stories.txt --config.hook=blocks.2.mlp_in \
        --config.sae.hook_out=blocks.2.mlp_out --config.sae.skip=True --workdir=runs/transcoder

The dictionary goes to WORKDIR/sae (read it with sae.load), its metrics to WORKDIR/summary.json: l0, explained_variance,
ce_recovered and dead_share on rows that training did not see. With the TinyStories file of 2,316 stories and the 260k
Llama of the README, the defaults explain about 0.9 of the variance.
Several taps are harvested in one pass over the model, and several dictionaries of each (--config.sweep="sae.k=16,32,64") learn from the same
activations; they go to WORKDIR/sae/TAP, WORKDIR/sae/k16 or WORKDIR/sae/TAP/k16, their metrics under these names.
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id
    config.dtype = "float32"  # of the model's parameters and activations: float32 or bfloat16
    config.mesh = ""  # such as "data=4,tensor=2" over the devices there are; empty = one device
    config.hook = ""  # tap to harvest, such as "blocks.3.resid_post", or several with commas, a dictionary each; empty = after the middle block
    config.sweep = ""  # several dictionaries a tap in one pass: "sae.k=16,32 sae.architecture=topk,batchtopk" trains the four; empty = one

    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # text or prompts: file (txt, jsonl, json, csv, parquet), data set folder, hub id or tfds:NAME
    config.data.fields = ""  # field map, such as "prompt=text"
    config.data.separator = ml_collections.config_dict.placeholder(str)  # the line between texts of a txt file; None = a blank one
    config.data.split = "train"  # of a data set that has splits
    config.data.limit = ml_collections.config_dict.placeholder(int)  # at most so many rows; None = all
    config.data.on_bad = "error"  # a bad row: "error" stops, "skip" leaves it out
    config.data.template = "none"  # "none" or a format such as "{prompt} {answer}"
    config.data.eval_rows = 200  # last rows, kept for the metrics (at most a fifth of all)

    config.harvest = ml_collections.ConfigDict()
    config.harvest.batch_rows = 32  # rows the model reads at once
    config.harvest.context_size = 256  # longer rows are cut into pieces of so many tokens
    config.harvest.skip_first = 1  # leave so many first positions of each piece of a text out, BOS or not: activations are huge there
    config.harvest.drop_special = True  # leave the tokenizer's special tokens out, wherever they stand (BOS only if it is EOS too)
    config.harvest.buffer_rows = 65536  # activations in the shuffling buffer

    config.sae = ml_collections.ConfigDict()
    config.sae.architecture = "topk"  # "topk", "batchtopk", "matryoshka"; "relu", "gated", "jumprelu" (with train.sparsity_coefficient)
    config.sae.d_sae = 0  # latents; 0 = expansion times the width of the tap
    config.sae.expansion = 8  # see d_sae
    config.sae.k = 32  # latents kept for each token ("topk"; "batchtopk", "matryoshka": on average)
    config.sae.prefixes = ""  # "matryoshka": numbers of first latents that must do alone, such as "64,256"; empty = d_sae / 16, / 8, / 4, / 2
    config.sae.hook_out = ""  # a transcoder: the tap to reconstruct from `hook`'s; empty = an autoencoder of `hook`
    config.sae.skip = False  # a transcoder with a linear path beside the latents
    config.sae.normalize_activations = "none"  # "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm" or "layer_norm_eps"
    config.sae.apply_b_dec_to_input = True  # subtract the decoder's bias before encoding (never in a transcoder)
    config.sae.dtype = "float32"  # of the saved parameters: float32, bfloat16 or float16
    config.sae.layout = "native"  # of the saved folder: "native", "saelens" or "sparsify"

    config.batch_size = 2048  # activations an update
    config.checkpoint_every = 200  # updates; 0 = only at the end (they are removed when the dictionary is written)
    config.seed = 0  # of the initial parameters and the shuffling

    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000  # updates
    config.train.learning_rate = ml_collections.config_dict.placeholder(float)  # peak; None = 2e-4 / sqrt(d_sae / 2^14)
    config.train.warmup_steps = 50  # linear rise of the rate
    config.train.decay_share = 0.2  # last share of the steps, in which the rate falls to 0
    config.train.beta1 = 0.9  # Adam's moments
    config.train.beta2 = 0.999  # the second one
    config.train.grad_clip = 1.0  # global norm of the gradient; 0 = off
    config.train.sparsity_coefficient = 0.0  # weight of the sparsity penalty ("relu", "gated": L1; "jumprelu": see penalty)
    config.train.sparsity_warmup_steps = 0  # linear rise of that weight
    config.train.penalty = "step"  # "jumprelu": "step" counts active latents, "tanh" sums tanh(tanh_scale * activation); its recipe: docs/sae.md
    config.train.target_l0 = ml_collections.config_dict.placeholder(float)  # "jumprelu" with "step": active latents to aim at; None = fewer
    config.train.tanh_scale = 4.0  # "jumprelu" with "tanh"
    config.train.bandwidth = 0.05  # "jumprelu": width around a threshold in which it learns, in root mean squares of an activation's coordinate
    config.train.threshold_init = 0.01  # "jumprelu": in the same unit
    config.train.pre_act_coefficient = 0.0  # "jumprelu": weight of what draws dead latents up to their threshold
    config.train.threshold_decay = 0.99  # "batchtopk", "matryoshka": of the running mean that becomes the threshold
    config.train.aux_coefficient = ml_collections.config_dict.placeholder(float)  # of dead latents' AuxK; 0 = off; None = 1/32 with a k, else 0
    config.train.aux_k = ml_collections.config_dict.placeholder(int)  # dead latents it lets into each row; None = half the width
    config.train.dead_after = 250_000  # activations without firing after which a latent counts as dead
    config.train.resample_every = 0  # updates between replacements of dead latents by badly reconstructed activations; 0 = never
    config.train.decoder_norm = "unit"  # "unit": decoder rows kept at norm 1; "free": not
    config.train.b_dec_init = "geometric_median"  # of the first activations; or "mean", "zero"
    config.train.init_rows = 32_768  # activations read ahead for that
    config.train.matmul_dtype = "float32"  # of the products' operands; "bfloat16" is for accelerators
    config.train.method = "auto"  # "dense" or "sparse" products; auto: what is fastest here
    config.train.log_every = 50  # updates between lines of metrics.jsonl

    config.finetune = ml_collections.ConfigDict()  # end to end, once it is trained: on what the model loses by it
    config.finetune.steps = 0  # updates; 0 = none
    config.finetune.batch_rows = 8  # rows of tokens an update
    config.finetune.learning_rate = 5e-5  # falls linearly to 0
    config.finetune.kl_coefficient = 1.0  # weight of the divergence of the spliced model from the clean one
    config.finetune.fvu_coefficient = 1.0  # weight of the fraction of variance unexplained
    config.finetune.sparsity_coefficient = 0.0  # weight of the L1 penalty ("relu")
    config.finetune.grad_clip = 1.0  # global norm of the gradient; 0 = off

    config.overwrite = False  # clear a workdir that holds another run
    config.allow_changes = ()  # fields or groups, such as train.steps,train.learning_rate, with other values of which the run in the workdir goes on
    return config
