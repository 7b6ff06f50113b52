"""How well SAEs reconstruct: ours and SAELens's, trained on the same activations of a real checkpoint for as many rows, at matched L0.

    python -m benchmarks.sae_quality --model=FOLDER --text=stories.txt [--no-peers] [--record]

Each library trains each architecture with each of four learning rates. Of the runs whose L0 is within a tenth of k (the nearest to it where there
is none) the one that explains most of the variance of texts set apart for choosing counts, and is measured on texts that nothing was trained or
chosen on. Both libraries' results are read by `sae.load` and measured by `sae.evaluate`. TopK and BatchTopK run at each library's defaults. JumpReLU
aims at k active latents by a penalty on the distance to it, each library's own (SAELens: mode "quadratic", a row's distance; ours: the batch's),
with a bandwidth of 1 and thresholds that begin at 0.1 in both.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, progress, run_benchmark, run_peer

PEER = "SAELens 6.54.0"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SIZES = {"d_sae": 512, "k": 16, "batch": 2048}
OURS = {  # of JumpReLU: a penalty needs a weight, large enough that L0 comes to k (0.1 left it at 18); 1 is SAELens's default too, in its units
    "jumprelu": {"sparsity_coefficient": 1.0, "bandwidth": 1.0, "threshold_init": 0.1, "aux_coefficient": 0.0},
}


def measure(args: argparse.Namespace) -> Iterator[Figure]:
    """Explained variance and CE recovered, for each architecture."""
    import models
    import sae

    cfg, params = models.load(args.model)
    tokenizer = models.load_tokenizer(args.model)
    texts = [t for t in Path(args.text).read_text().split("\n\n") if t.strip()]
    bos = tokenizer.bos_token_id
    rows = [([] if bos is None else [bos]) + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    hook = args.hook or f"blocks.{cfg.n_layers // 2}.resid_post"
    held = len(rows) // 20
    if not held:
        raise SystemExit(f"{args.text} has {len(rows)} texts, parted by empty lines; give at least 20: a twentieth is to choose on, one to measure")
    parts = rows[: -2 * held], rows[-2 * held : -held], rows[-held:]
    train, choose, test = (np.concatenate(list(sae.harvest_activations(cfg, params, part, hook, context_size=256))) for part in parts)
    progress(f"{len(train)} activations of {hook} to train on, {len(test)} to measure on, width {train.shape[1]}")
    lm = (cfg, params, rows[-held:])
    where = f"{Path(args.model).name} {hook}, d_sae {SIZES['d_sae']}, {args.steps} x {SIZES['batch']} of {len(train)} rows"
    for architecture in args.architectures.split(","):
        rate, best = chosen(ours_trained(train, architecture, hook, args.steps), choose)
        ours, theirs, said = sae.evaluate(best, [test], lm=lm), None, ""
        if args.peers:
            their_rate, best = chosen(theirs_trained(train, architecture, hook, args.steps), choose)
            theirs = sae.evaluate(best, [test], lm=lm)
            said = f", theirs {theirs['l0']:.1f} at {their_rate:g}"
        said = f"{where}; L0 {ours['l0']:.1f} at rate {rate:g}{said}"
        for name in ("explained_variance", "ce_recovered"):
            yield Figure(f"sae_quality_{architecture}_{name}", ours[name], "share", PEER, theirs and theirs[name], None, said)


def chosen(trained: Iterator[Any], rows: np.ndarray) -> tuple[float, Any]:
    """Of the dictionaries whose L0 is near k, or of the nearest one, that with the largest explained variance; the rate comes with it."""
    import sae

    found = [(sae.evaluate(d, [rows]), rate, d) for rate, d in zip(RATES, trained, strict=True)]
    for figures, rate, _ in found:
        progress(f"rate {rate:g}: {figures['explained_variance']:.4f} of the variance explained at L0 {figures['l0']:.1f}")
    near = [one for one in found if abs(one[0]["l0"] / SIZES["k"] - 1) <= 0.1]
    near = near or [min(found, key=lambda one: abs(one[0]["l0"] - SIZES["k"]))]
    return max(near, key=lambda one: one[0]["explained_variance"])[1:]


def ours_trained(train: np.ndarray, architecture: str, hook: str, steps: int) -> Iterator[Any]:
    """Our dictionaries, one a rate."""
    import jax

    import sae
    from sae.architectures import ARCHITECTURES

    for rate in RATES:
        k = SIZES["k"] if ARCHITECTURES[architecture].needs_k else None
        cfg = sae.SAEConfig(architecture=architecture, d_in=train.shape[1], d_sae=SIZES["d_sae"], k=k, hook_name=hook,
                            normalize_activations="expected_average_only_in")  # fmt: skip
        own = dict(OURS.get(architecture, {}))
        if architecture == "jumprelu":
            own["target_l0"] = float(SIZES["k"])
        settings = sae.SAETrainConfig(steps=steps, learning_rate=rate, log_every=steps, **own)
        yield sae.train_sae(cfg, sae.array_batches(train, SIZES["batch"]), settings, jax.random.key(0))[0]


def theirs_trained(train: np.ndarray, architecture: str, hook: str, steps: int) -> Iterator[Any]:
    """SAELens's dictionaries, one a rate, read from the folders that it saves."""
    import dataclasses

    import sae

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/rows.npy", train)
        for rate in RATES:
            arguments = [f"{folder}/rows.npy", architecture, *SIZES.values(), steps, rate, f"{folder}/{rate}"]
            if run_peer("saelens", "saelens_quality", arguments) is None:
                raise SystemExit("the peer is not installed: make peer-saelens, or --no-peers")
            d = sae.load(f"{folder}/{rate}")
            yield dataclasses.replace(d, cfg=d.cfg.replace(hook_name=hook))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--model", required=True, help="Hugging Face folder of the model")
    parser.add_argument("--text", required=True, help="text file, texts parted by blank lines")
    parser.add_argument("--hook", default="", help="tap; default: after the middle block")
    parser.add_argument("--steps", type=int, default=2000, help="updates")
    parser.add_argument("--architectures", default="topk,batchtopk,jumprelu", help="which, with commas")


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
