"""What features are for, on a real checkpoint: attribution beside real ablation, and how soon a page of 1,000 features is open.

    python -m benchmarks.sae_features --model=FOLDER --text=stories.txt [--separator="<|endoftext|>"] [--part=attribution,page] [--record]

A TopK dictionary (1,024 latents, k 16) is trained on the tap; the texts that are asked about were kept from it.

- attribution: of each of --prompts texts' first 32 tokens, the logit of the token that the model finds most likely less that of the second.
  Every latent that fires there is ablated by a pass of its own, at all tokens but the first, and what the difference really loses is set beside
  what `sae.attribute` says: gradient times activation, and as the peer integrated gradients of 8 steps. `_top`: over each prompt's 10 latents with
  the largest scores, each method's own; `_all`: over all that fire. Signs: share of latents whose effect has the sign of the score. Recall: share
  of the 10 latents with the largest real effects that are among the 10 with the largest scores. Limits are of a bootstrap over prompts (95%).
- page: `sae.feature_data.collect` and `write_features_page` on the kept texts, then the milliseconds that headless Chromium counts from asking for
  the file until the list stands and the first feature is open, each time in a new profile.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, median, progress, run_benchmark

PARTS = ("attribution", "page")
D_SAE, K, TOP, TOKENS, STEPS = 1024, 16, 10, 32, 8
PEER = f"integrated gradients, {STEPS} steps"


def measure(args: argparse.Namespace) -> Iterable[Figure]:
    """The parts that are asked for, of one dictionary."""
    import jax

    import models
    import sae
    from jaxrl_llm.data.sources import read_rows
    from jaxrl_llm.data.texts import special_tokens, token_rows

    cfg, params = models.load(args.model)
    tokenizer = models.load_tokenizer(args.model)
    rows = token_rows([row["prompt"] for row in read_rows(args.text, separator=args.separator)], tokenizer)
    hook, special = args.hook or f"blocks.{cfg.n_layers // 2}.resid_post", special_tokens(tokenizer)
    kept = max(args.prompts, args.texts)
    if len(rows) < 2 * kept:
        raise SystemExit(f"{args.text} has {len(rows)} texts, give at least {2 * kept}: {kept} are kept from training")
    harvest = lambda: sae.harvest_activations(cfg, params, rows[:-kept], hook, drop_tokens=special)  # noqa: E731
    progress(f"{args.steps} steps of a dictionary on {hook}, {len(rows) - kept} texts")
    described = sae.SAEConfig(d_in=cfg.d_model, d_sae=D_SAE, k=K, hook_name=hook)
    settings = sae.SAETrainConfig(steps=args.steps, learning_rate=1e-3, log_every=args.steps, dead_after=250_000)
    d, history = sae.train_sae(described, sae.ActivationBuffer(harvest, 2048, 65_536), settings, jax.random.key(0))
    where = f"{Path(args.model).name} {hook}, d_sae {D_SAE}, k {K}, FVU {history[-1]['fvu']:.3f}"
    if "attribution" in args.part:
        yield from attribution(args, cfg, params, d, rows[-kept:], where)
    if "page" in args.part:
        yield from page(args, cfg, params, d, rows[-kept:][: args.texts], special, tokenizer, where)


def attribution(args: argparse.Namespace, cfg: Any, params: Any, d: Any, rows: list[list[int]], where: str) -> Iterable[Figure]:
    """Correlations, signs and recall of scores with real effects."""
    from scipy import stats

    import models
    import sae

    long = [row[:TOKENS] for row in rows if len(row) >= TOKENS][: args.prompts]
    if len(long) < 2:
        raise SystemExit(f"of the texts kept from training {len(long)} have {TOKENS} tokens; give longer ones")
    tokens_NT = np.array(long, np.int32)
    first, second = np.argsort(-np.asarray(models.apply(cfg, params, tokens_NT)[0][:, -1]), axis=1)[:, :2].T
    metric = sae.logit_difference(first, second)
    plain, integrated = (np.asarray(sae.attribute(cfg, params, d, tokens_NT, metric, start=1, steps=n).totals_BF) for n in (0, STEPS))
    fires_NF = plain != 0
    most = int(fires_NF.sum(1).max())  # one number of ablations for all prompts, so that one program does them
    effects_NF = np.zeros_like(plain)
    progress(f"{most} ablations of each of {len(long)} prompts")
    for i, (tokens, row) in enumerate(zip(tokens_NT, fires_NF, strict=True)):
        which = np.resize(np.flatnonzero(row), most)
        effects_NF[i, which] = sae.ablation_effects(cfg, params, d, tokens, sae.logit_difference(first[i], second[i]), which, start=1)

    def chosen(scores_NF: np.ndarray, n: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """(scores, effects) of each prompt's n latents with the largest scores; None: of all that fire."""
        which = [np.argsort(-np.abs(row))[:n] if n else np.flatnonzero(fires) for row, fires in zip(scores_NF, fires_NF, strict=True)]
        return [(scores_NF[i, ids], effects_NF[i, ids]) for i, ids in enumerate(which)]

    pooled = lambda pairs: map(np.concatenate, zip(*pairs, strict=True))  # noqa: E731
    kinds: dict[str, Callable[[Any], float]] = {
        "pearson": lambda pairs: float(stats.pearsonr(*pooled(pairs)).statistic),
        "spearman": lambda pairs: float(stats.spearmanr(*pooled(pairs)).statistic),
        "signs": lambda pairs: float(np.mean(np.equal(*map(np.sign, pooled(pairs))))),
    }
    for name, n in (("top", TOP), ("all", None)):
        ours, theirs = chosen(plain, n), chosen(integrated, n)
        for kind, figure in kinds.items():
            shape = f"{where}; {len(long)} prompts, {sum(len(s) for s, _ in ours)} latents; {limits(ours, figure)}"
            unit = "share" if kind == "signs" else "correlation"
            yield Figure(f"sae_attribution_{kind}_{name}", figure(ours), unit, PEER, figure(theirs), shape=shape)
    largest = lambda a_NF: [set(np.argsort(-np.abs(row))[:TOP].tolist()) for row in a_NF]  # noqa: E731
    real = largest(effects_NF)
    hits = lambda scores_NF: [len(a & b) / TOP for a, b in zip(largest(scores_NF), real, strict=True)]  # noqa: E731
    shape = f"{where}; {len(long)} prompts; {limits(hits(plain), lambda shares: float(np.mean(shares)))}"
    yield Figure("sae_attribution_recall", float(np.mean(hits(plain))), "share", PEER, float(np.mean(hits(integrated))), shape=shape)


def limits(units: list[Any], figure: Callable[[list[Any]], float], draws: int = 300) -> str:
    """The 95% limits of a bootstrap over prompts, in words."""
    rng = np.random.default_rng(0)
    found = [figure([units[i] for i in rng.integers(0, len(units), len(units))]) for _ in range(draws)]
    return "95% {:.3f} to {:.3f}".format(*np.quantile(found, (0.025, 0.975)))


def page(
    args: argparse.Namespace, cfg: Any, params: Any, d: Any, rows: list[list[int]], special: list[int], tokenizer: Any, where: str
) -> Iterable[Figure]:
    """Seconds to gather the data and until the page is open."""
    import models
    from jaxrl_llm.commands.doctor import BROWSERS
    from jaxrl_llm.commands.features import token_texts
    from jaxrl_llm.report.features import write_features_page
    from sae.feature_data import CollectConfig, collect

    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("there is no Chromium on this machine (Debian: apt-get install chromium), or leave the part out: --part=attribution")
    progress(f"contexts of 1,000 features in {len(rows)} texts")
    begin = time.perf_counter()
    settings = CollectConfig(features=1000, context_size=256, drop_tokens=tuple(special))
    data = collect(cfg, params, d, rows, settings, unembed_DV=models.unembed_matrix(cfg, params))
    gathered = time.perf_counter() - begin
    shape = f"{where}; {len(data['features'])} features of {data['alive']} that fire, {data['tokens']} tokens"
    yield Figure("sae_page_gathered", gathered, "s", shape=shape, better="lower")
    about = {"title": "Features", "vocabulary": token_texts(tokenizer, list(range(cfg.vocab_size)))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.html"
        write_features_page(path, json.loads(json.dumps(about | data)))
        opened = [seconds_to_open(browser, path, Path(folder) / f"profile{i}") for i in range(args.repeats)]
        size = f"{len(data['features'])} features, {path.stat().st_size / 1e6:.1f} MB, headless, 1400 x 900"
    worst = f"{size}; the slowest of {args.repeats} {max(opened):.3f} s; goal under 2 s"
    yield Figure("sae_page_opens", median(opened), "s", shape=worst, better="lower")


def seconds_to_open(browser: str, path: Path, profile: Path) -> float:
    """What the page's own clock says when it is ready, in a browser that has not seen it."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--window-size=1400,900"]
    command = [browser, *flags, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<html[^>]* data-opened="(\d+)"', done.stdout)
    if not found:
        sys.exit(f"the page did not open in {browser}:\n{done.stderr[-2000:]}")
    return int(found.group(1)) / 1000


def parts(text: str) -> list[str]:
    """Of a list with commas."""
    named = text.split(",")
    if wrong := [name for name in named if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no part; parts: {','.join(PARTS)}")
    return named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own flags; there are no other libraries, so it takes the accelerator that is there."""
    parser.add_argument("--model", required=True, help="Hugging Face folder of the model")
    parser.add_argument("--text", required=True, help="texts: a file or data set, as of train_sae")
    parser.add_argument("--separator", help="the line between texts of a txt file; default: a blank one")
    parser.add_argument("--part", type=parts, default=list(PARTS), help="attribution,page or one of them")
    parser.add_argument("--hook", default="", help="tap in the residual stream; default: after the middle block")
    parser.add_argument("--steps", type=int, default=1000, help="updates of the dictionary")
    parser.add_argument("--prompts", type=int, default=50, help="texts whose logits are attributed")
    parser.add_argument("--texts", type=int, default=600, help="texts that the page is made of")
    parser.set_defaults(peers=False)


if __name__ == "__main__":
    run_benchmark(measure, __doc__, add_arguments)
