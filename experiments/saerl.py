"""SAERL (arXiv 2605.27354): do a model's own sparse features tell which problems to train it on, and in which order?

    jaxrl-llm saerl --config=configs/saerl.py:demo --workdir=runs/demo

The script reads as the method does, once for each cell (pool x base policy x seed):

  1. a base policy: pre-trained here on a generated world whose truth is known, or any Hugging Face checkpoint;
  2. a sparse autoencoder on the residual stream after its middle block;
  3. curation: pooled features of every prompt -> clusters (diversity), a difficulty proxy from a few labelled rows, a
     quality score; each scored against the truth, beside its baselines;
  4. GRPO arms on the same pool, differing only in the rows kept and their order;
  5. the arms compared at equal steps, paired over seeds; one report page.

Every stage leaves its result in the workdir and is skipped when it is found there, so the same command goes on where a
stopped run left off. Expected figures: docs/saerl.md.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

from experiments._saerl_checks import UNASKED, check
from jaxrl_llm.curation.processes import from_first, is_writer
from jaxrl_llm.data import lab_world
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, write_json

BAD = ("wrong_answer", "missing_clause", "garbled")  # a near-duplicate is a sound problem


class Cell(NamedTuple):
    """One paired comparison: all arms of a cell share policy, pool, SAE, labels and RL seed."""

    pool: str
    base: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.pool}-base{self.base}-seed{self.seed}"


@dataclasses.dataclass
class Bench:
    """What the arms of a cell share. models are `curation.passes.LanguageModel`s; truth is for scoring and oracle arms only."""

    config: Any
    cell: Cell
    folder: Path
    mesh: Any
    policy: Any
    pool: Any
    evals: dict[str, Any]
    reward: Any
    truth: dict[str, np.ndarray]
    progress: bool
    quality_probe: Callable[[], Any] | None = None  # made when an arm first asks, then kept


def run(config, workdir) -> None:
    """Runs every cell and arm of the config and writes report.html."""
    check(config)
    run_dir = RunDir(workdir, config, kind="saerl", owns=("cells", "policies"))
    cells = [Cell(p, b, s) for p in config.pools for b in config.bases for s in config.seeds]
    started = time.time()
    if config.workers > 1 and len(cells) > 1:
        run_parallel(config, run_dir.path, cells)
    else:
        for i, cell in enumerate(cells):
            print(f"cell {i + 1}/{len(cells)}: {cell.name}", flush=True)
            run_cell(config, run_dir.path, cell)
    if not run_dir.is_writer:
        return
    from jaxrl_llm.report import saerl as page
    from jaxrl_llm.report import save_data, write_report

    data, summary = page.build(config, run_dir.path, cells, seconds=time.time() - started)
    run_dir.summary(summary)
    save_data(run_dir.path, data)
    write_report(run_dir.path / "report.html", data)
    (run_dir.path / "tables.md").write_text(page.markdown(config, summary), encoding="utf-8")
    print(data["headline"])
    print(f"report: {run_dir.path / 'report.html'}")


def run_parallel(config, root: Path, cells: list[Cell]) -> None:
    """Cells over `config.workers` processes of one core each: small models gain more from that than from threads."""
    for base in sorted({c.base for c in cells}):
        make_policy(config, root, base)  # shared by cells, so made before they start
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
    with context.Manager() as manager:
        free_cores = manager.Queue()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for i in range(config.workers):
            free_cores.put(cores[i % len(cores)] if cores else None)
        with concurrent.futures.ProcessPoolExecutor(config.workers, mp_context=context, max_tasks_per_child=1) as pool:
            work = [pool.submit(_cell_quietly, config, root, cell, free_cores) for cell in cells]
            for i, done in enumerate(concurrent.futures.as_completed(work)):
                print(f"cell {i + 1}/{len(cells)} done: {done.result()}", flush=True)


def _cell_quietly(config, root: Path, cell: Cell, free_cores) -> str:
    from jaxrl_llm.runtime import use_compilation_cache

    use_compilation_cache()
    core = free_cores.get()
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        run_cell(config, root, cell, progress=False)
    finally:
        free_cores.put(core)
    return cell.name


def run_cell(config, root: Path, cell: Cell, progress: bool = True) -> None:
    """All arms of one cell."""
    from jaxrl_llm.runtime import parse_mesh

    folder = root / "cells" / cell.name
    if all((folder / name).exists() for name in (*(f"{arm}/result.json" for arm in config.arms), "rollouts.json")):
        return
    clock = Clock(folder)
    with clock("base policy"):
        policy, mesh = make_policy(config, root, cell.base, progress), parse_mesh(config.mesh)
    pool, evals, reward = make_data(config, cell, policy)
    bench = Bench(config, cell, folder, mesh, policy, pool, evals, reward, known_truth(pool), progress)
    with clock("sparse autoencoder"):
        dictionary, feature_model = make_dictionary(bench)
    with clock("curation"):
        signals = make_signals(bench, feature_model, dictionary)
        write_curated(bench, signals)
        page_material(bench, feature_model, dictionary, signals)
    bench.quality_probe = functools.cache(functools.partial(make_quality_probe, bench, feature_model, dictionary))
    for arm in config.arms:
        with clock(f"GRPO {arm}"):
            run_arm(bench, arm, signals)
    compare_answers(bench)
    if is_writer():
        shutil.rmtree(folder / "features", ignore_errors=True)  # every arm has read them; lab runs have hundreds of cells


class Clock:
    """Seconds of each stage, kept in stages.json over restarts."""

    def __init__(self, folder: Path):
        self.path = folder / "stages.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.stages = json.loads(self.path.read_text()) if self.path.exists() else {}

    def __call__(self, name: str):
        self.name = name
        return self

    def __enter__(self):
        self.start = time.time()

    def __exit__(self, *_):
        self.stages[self.name] = self.stages.get(self.name, 0.0) + time.time() - self.start
        if is_writer():
            write_json(self.path, self.stages)


# --- 1. the base policy ----------------------------------------------------------------------------------------------


def make_policy(config, root: Path, base: int, progress: bool = True):
    """Loads `config.policy.model`, or pre-trains one on the generated world (kept as a Hugging Face folder)."""
    from jaxrl_llm.curation.passes import LanguageModel
    from jaxrl_llm.runtime import parse_mesh

    folder = root / "policies" / f"base{base}"
    if from_first(not config.policy.model and not (folder / "config.json").exists()):  # all processes train, or none
        pretrain(config, folder, base, progress)
        from_first(0)  # the others wait until the first has written it
    return LanguageModel.load(str(config.policy.model or folder), config.policy.dtype, parse_mesh(config.mesh))


def pretrain(config, folder: Path, base: int, progress: bool) -> None:
    """Two phases: right answers, then answers mixed with each topic's mistake.

    A policy fine-tuned on right answers alone is so sure of itself that a fifth of GRPO's groups have mixed rewards; after
    the second phase it holds competing procedures, and reinforcement learning mostly re-weights these.
    """
    import jax

    import models
    from jaxrl_llm.train.sft import train_sft

    c, tokenizer = config.policy, lab_world.build_tokenizer()
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id)
    cfg = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), d_model=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_heads,
        head_dim=c.d_model // c.n_heads, d_ff=c.d_ff, tie_embeddings=True, qkv_bias=True, max_position=64, **special,
    )  # fmt: skip
    seed = 1000 * base
    held_out = {row["prompt"] for row in lab_test(config)}
    rows = lab_world.demonstrations(c.clean_steps * c.batch, seed + 7, c.clean_levels, (0.0,) * 5, held_out)
    batches = lab_world.sft_batches(rows, tokenizer, c.batch, seed)
    mixed = lab_world.demonstrations(c.mixed_steps * c.batch, seed + 8, c.mixed_levels, c.mistakes, held_out)
    batches += lab_world.sft_batches(mixed, tokenizer, c.batch, seed + 1)
    optimizer = dict(
        learning_rate=c.learning_rate, schedule="cosine", warmup_steps=50, final_share=0.05, b2=0.98, weight_decay=0.01
    )
    params = models.init(cfg, jax.random.key(base))
    settings = dict(steps=len(batches), remat=True, log_every=25, optimizer=optimizer)
    params, _ = train_sft(cfg, params, batches, settings, progress=progress)
    models.save(folder, cfg, params, tokenizer_from=tokenizer)


# --- data ------------------------------------------------------------------------------------------------------------


def lab_test(config) -> list[dict[str, Any]]:
    """The generated held-out problems: in no pool, and in nothing that the base policy was trained on."""
    return lab_world.generate_problems(config.data.test_rows, config.data.test_seed, prefix="test")


def make_data(config, cell: Cell, policy):
    """(pool, {name: held-out set}, reward)."""
    from jaxrl_llm.data.prompts import tokenise_prompts
    from jaxrl_llm.data.sources import parse_fields, read_rows
    from jaxrl_llm.rewards import registry

    d, needed = config.data, ("prompt", "answer")
    if d.source:
        rows = read_rows(d.source, parse_fields(d.fields), split=d.split, limit=d.rows, required=needed)
        held_out = {
            name: read_rows(e.source, parse_fields(e.fields or d.fields), split=e.split, required=needed)
            for name, e in d.evals.items() if e.source
        }  # fmt: skip
    else:
        test = lab_test(config)
        shares, taken = config.pool_table[cell.pool], {r["prompt"] for r in test}
        clean = lab_world.generate_problems(d.rows, 5000 + cell.seed, shares.levels, topic_skew=shares.topic_skew, exclude=taken)
        rows = lab_world.corrupt(clean, {k: shares[k] for k in lab_world.CORRUPTIONS}, cell.seed, exclude=taken)
        held_out = {"test": test}
    tokenise = functools.partial(
        tokenise_prompts, tokenizer=policy.tokenizer, max_length=d.max_prompt_tokens, template=d.template, overflow="drop"
    )
    reward = registry.get_reward(d.reward)
    for each in (rows, *held_out.values()):
        registry.validate_rows(reward, each)
    pool, evals = tokenise(rows), {name: tokenise(r) for name, r in held_out.items()}
    for name, batch in {"pool": pool, **evals}.items():
        if batch.dropped > len(batch):
            raise UserError(
                f"{name}: {batch.dropped} of {batch.dropped + len(batch)} prompts are longer than config.data.max_prompt_tokens="
                f"{d.max_prompt_tokens}: raise it, or start from configs/saerl.py:own, whose sizes are for real prompts"
            )
        if batch.dropped:
            print(f"  {name}: left out {batch.dropped} prompts longer than data.max_prompt_tokens={d.max_prompt_tokens}", flush=True)
    return pool, evals, reward


def known_truth(pool) -> dict[str, np.ndarray]:
    """Topic, level and corruption of the rows, where the rows tell."""
    return {k: np.array([row[k] for row in pool.rows]) for k in ("topic", "level", "corruption") if k in pool.rows[0]}


# --- 2. the sparse autoencoder ---------------------------------------------------------------------------------------


def make_dictionary(bench: Bench):
    """(dictionary, feature model): loaded, or trained on the feature model's activations over prompts and answers."""
    import jax

    import sae
    from jaxrl_llm.checkpoint import until_done
    from jaxrl_llm.curation.features import middle_hook
    from jaxrl_llm.curation.passes import LanguageModel
    from jaxrl_llm.curation.texts import answer_tokens

    config, c, folder, model = bench.config, bench.config.sae, bench.folder, bench.policy
    if c.model:
        model = LanguageModel.load(c.model, config.policy.dtype, bench.mesh)
    if c.path or (folder / "sae.json").exists():
        return sae.load(c.path or folder / "sae"), model
    hook = c.hook or middle_hook(model.cfg)
    cfg = sae.SAEConfig(architecture="topk", d_in=model.cfg.d_model, d_sae=c.d_sae, k=c.k, hook_name=hook, model_name=model.name)
    tokens = answer_tokens(bench.pool.rows, model.tokenizer)(0, len(bench.pool))[0]
    source = sae.harvest_activations(
        model.cfg, model.params, RepeatedRows(tokens, bench.cell.seed), hook, batch_size=256, context_size=c.context, mesh=bench.mesh
    )
    buffer = sae.ActivationBuffer(source, c.batch, 32 * c.batch, seed=bench.cell.seed)
    train = sae.SAETrainConfig(steps=c.steps, learning_rate=c.learning_rate, dead_after=50_000)
    key = jax.random.key(bench.cell.seed)
    with until_done(folder / "checkpoints") as checkpoints:
        shown = None if bench.progress else False
        dictionary, history = sae.train_sae(cfg, buffer, train, key, mesh=bench.mesh, progress=shown, checkpoints=checkpoints)
        if is_writer():
            sae.save(folder / "sae", dictionary, layout="saelens")
            write_json(folder / "sae.json", {"history": history})  # last: it says that the SAE is whole
    return dictionary, model


class RepeatedRows:
    """Token rows again and again, each pass in its own order: training stops when it has enough."""

    def __init__(self, rows, seed: int):
        self.rows, self.seed = rows, seed

    def __iter__(self):
        passes = 0
        while True:
            for i in np.random.default_rng([self.seed, passes]).permutation(len(self.rows)):
                yield self.rows[i]
            passes += 1


# --- 3. curation -----------------------------------------------------------------------------------------------------


def make_signals(bench: Bench, feature_model, dictionary):
    """Clusters, difficulty and quality of every row by each kind of features that an arm names, and their scores against the
    truth (`curation.signals`)."""
    from jaxrl_llm.curation import diversity
    from jaxrl_llm.curation.signals import Signals, measure

    found = Signals.load(bench.folder)
    if found is not None:
        bench.truth |= found.truth
        return found
    config, c, n = bench.config, bench.config.curation, len(bench.pool)
    arms = [config.arm_table[name] for name in config.arms]
    labelled = np.sort(np.random.default_rng([bench.cell.seed, 11]).permutation(n)[: c.labels])
    fails = fail_rates(bench, labelled, "labels", salt=1)
    signals = measure(
        bench.pool.rows, feature_model, bench.policy, dictionary, fails, told_quality(bench), kinds={a.features for a in arms},
        filters={a.filter for a in arms} - {"none", "oracle"}, options=signal_options(bench), tune=tuner(bench), mesh=bench.mesh,
        folder=bench.folder / "features",
    )  # fmt: skip
    if "topic" in bench.truth:
        nmi = {k: diversity.normalised_mutual_information(v, bench.truth["topic"]) for k, v in signals.clusters.items()}
        signals.report["clusters"] = nmi
        # Rows that no probe was told of, for the calibration on the page and for oracle arms.
        oracle = any(arm.difficulty == "oracle" for arm in arms)
        checked = np.arange(n) if oracle else np.setdiff1d(np.arange(n), labelled)[: config.data.test_rows]
        truly = fail_rates(bench, checked, "truth", salt=2)
        if oracle:
            signals.difficulty["oracle"] = truly
        checked = np.setdiff1d(checked, labelled)
        bench.truth |= {"checked": checked, "fail_rate": truly[checked]}
    signals.truth = bench.truth
    if is_writer():
        signals.save(bench.folder)
    return signals


def signal_options(bench: Bench):
    """`curation.signals.SignalOptions` from the config."""
    from jaxrl_llm.curation.signals import SignalOptions

    s, c = bench.config.sae, bench.config.curation
    return SignalOptions(
        hook=s.hook or None, pooling=tuple(s.pooling), remove_length=c.remove_length, dims=c.dims, clusters=c.clusters, answers=c.answers,
        copies=c.copies, seed=bench.cell.seed,
    )  # fmt: skip


def tuner(bench: Bench):
    """Fine-tunes copies of the policy for the quality probe; None where the config leaves that out."""
    from jaxrl_llm.train.sft import fine_tuner

    return fine_tuner(bench.policy.cfg, bench.mesh) if bench.config.curation.tuned else None


def sampling(bench: Bench) -> tuple[Any, Callable[[Any], Any]]:
    """(mesh to sample on, what lays parameters of the policy's shape out on it): that of `grpo.rollout_mesh`, or that of all else."""
    from jaxrl_llm.runtime import parse_axes
    from jaxrl_llm.train.state import laid_out
    from models.sharding import relaid

    if not bench.config.grpo.rollout_mesh or bench.mesh is None:
        return bench.mesh, lambda params: params
    mesh = relaid(bench.mesh, parse_axes(bench.config.grpo.rollout_mesh))
    return mesh, laid_out(bench.policy.cfg, bench.mesh, mesh)


def fail_rates(bench: Bench, rows: np.ndarray, name: str, salt: int) -> np.ndarray:
    """[N] share of failures of the base policy's samples, NaN for rows that are not asked for or could not be judged."""
    from jaxrl_llm.curation.labels import pass_rates, policy_roll_out

    config, c = bench.config, bench.config.curation
    mesh, lay_out = sampling(bench)
    roll_out = policy_roll_out(
        bench.policy.cfg, lay_out(bench.policy.params), bench.policy.tokenizer, bench.reward, samples=c.label_samples, template=config.data.template,
        max_prompt_tokens=config.data.max_prompt_tokens, max_new_tokens=config.grpo.max_new_tokens, seed=1000 * bench.cell.seed + 100_000 * salt,
        mesh=mesh,
    )  # fmt: skip
    path = bench.folder / f"pass_rates-{name}.jsonl"
    return 1 - pass_rates(bench.pool.rows, rows, roll_out, path=path, batch_prompts=c.label_batch)[0]


def make_quality_probe(bench: Bench, feature_model, dictionary):
    """The probe by which arms filter anew as their policy learns."""
    from jaxrl_llm.curation.signals import QualityProbe, feature_views

    rows, options = bench.pool.rows, signal_options(bench)
    folder = bench.folder / "features"  # found again there
    views = {} if options.answers else feature_views(rows, feature_model, dictionary, options, bench.mesh, folder=folder)
    return QualityProbe(rows, feature_model, bench.policy, dictionary, told_quality(bench), views, options, tuner(bench), bench.mesh, folder)


def told_quality(bench: Bench) -> np.ndarray | None:
    """[N] 1 fit to train on, 0 not, NaN unknown: a column of real rows, or of the generated world a small random subset, as an annotator
    would tell; None where nobody knows."""
    from jaxrl_llm.curation.labels import labels_from_rows, told_sound

    n, count, column = len(bench.pool), bench.config.curation.quality_labels, bench.config.data.told
    if bench.config.data.source:
        return told_sound(labels_from_rows(bench.pool.rows, column)) if column else None
    if not count or "corruption" not in bench.truth:
        return None
    told, rows = np.full(n, np.nan), np.random.default_rng([bench.cell.seed, 12]).permutation(n)[:count]
    told[rows] = ~np.isin(bench.truth["corruption"][rows], BAD)
    return told


def arm_clusters(bench: Bench, arm, signals, keep: np.ndarray | None = None) -> np.ndarray:
    """[N] int: clusters by an arm's features (of the whole pool, or of the rows kept), or as many random ones."""
    from jaxrl_llm.curation import diversity
    from jaxrl_llm.curation.schedule import random_clusters

    k, seed = bench.config.curation.clusters, bench.cell.seed
    if arm.clusters == "random":
        return random_clusters(len(bench.pool), k, seed)
    if keep is None or keep.all():
        return signals.clusters[arm.features]
    return diversity.cluster_kept(signals.reduced[arm.features], keep, k, n_init=4, seed=seed, mesh=bench.mesh)


def arm_difficulty(arm, signals) -> np.ndarray:
    """[N] expected fail rate by an arm's features, or the true one."""
    return signals.difficulty["oracle" if arm.difficulty == "oracle" else arm.features]


def filter_arm(bench: Bench, arm, signals, quality: np.ndarray | None = None):
    """The rows an arm trains on, and how far each is above its cut (`curation.quality.Filtered`). quality: [N], by default that of the
    base policy."""
    from jaxrl_llm.curation.quality import difficulty_strata, filter_rows

    n = len(bench.pool)
    if arm.filter == "none":
        return filter_rows(np.zeros(n), 0.0)
    if arm.filter == "oracle":
        return filter_rows(np.zeros(n), 0.0, {"truly corrupted": np.isin(bench.truth["corruption"], BAD)})
    quality = signals.quality[arm.filter] if quality is None else quality
    if not arm.strata:
        return filter_rows(quality, drop_share(bench, arm))
    strata = difficulty_strata(arm_clusters(bench, arm, signals), arm_difficulty(arm, signals), bench.config.curation.strata)
    # The probe is logistic: its score is the log-odds of a sound row.
    return filter_rows(quality, drop_share(bench, arm), strata=strata, expected_bad=expit(-quality))


def drop_share(bench: Bench, arm) -> float:
    """The share of rows that an arm's filter drops, from the share of bad ones among those told."""
    from jaxrl_llm.curation.quality import drop_share as share

    c = bench.config.curation
    return share(told_quality(bench), c.strata_drop_per_bad if arm.strata else c.drop_per_bad, c.drop_most, c.drop)


def keep_rows(bench: Bench, arm, signals) -> np.ndarray:
    """[N] bool: the rows an arm trains on."""
    return filter_arm(bench, arm, signals).keep


def make_arm_schedule(bench: Bench, name: str, signals):
    """The schedule of an arm, over all N rows."""
    from jaxrl_llm.curation.schedule import TrainabilityBand, make_schedule

    config, arm, seed = bench.config, bench.config.arm_table[name], bench.cell.seed
    c, size, keep = config.curation, config.grpo.prompts_per_step, keep_rows(bench, arm, signals)
    clusters, hard = arm_clusters(bench, arm, signals, keep), arm_difficulty(arm, signals)
    if arm.schedule != "band":
        # An order spans the rows that the run gets to (at most, with resampling): cut off before its end, an easy-to-hard pass would never
        # meet a hard one.
        rows, visits = np.flatnonzero(keep), arm_steps(config, arm) * config.grpo.rollout_tries * size
        keep = np.isin(np.arange(len(keep)), np.random.default_rng([seed, 14]).permutation(rows)[:visits])
        options = dict(rho=c.rho, within=arm.within) if arm.schedule == "published" else {}
        return make_schedule(arm.schedule, batch_size=size, seed=seed, difficulty=hard, cluster=clusters, keep=keep, **options)
    # A policy that was tuned on the told rows can no longer judge by them.
    probed = c.refilter_every and arm.filter not in UNASKED and arm.start == "base"

    def refilter(params) -> np.ndarray:
        # Rounding differs between hosts, and all must go on with the same rows.
        return np.asarray(from_first(filter_arm(bench, arm, signals, bench.quality_probe().fit(arm.filter, params)).keep), bool)

    return TrainabilityBand(
        1 - hard, signals.reduced[arm.features], size, seed=seed, cluster=clusters, keep=keep, samples_per_prompt=config.grpo.num_samples,
        temperature=c.band_temperature, easy_floor=c.band_easy_floor, epoch_share=c.band_epoch_share, balance=c.band_balance,
        refilter=refilter if probed else None, refilter_every=c.refilter_every,
    )  # fmt: skip


def write_curated(bench: Bench, signals) -> None:
    """The curated set of the main arm, readable by other trainers, ordered as the published method orders."""
    from jaxrl_llm.curation.curated_set import CuratedSet
    from jaxrl_llm.curation.schedule import make_schedule

    config, n = bench.config, len(bench.pool)
    if (bench.folder / "curated" / "manifest.json").exists():
        return
    arm = config.arm_table[config.main_arm]
    keep, hard = keep_rows(bench, arm, signals), arm_difficulty(arm, signals)
    clusters = arm_clusters(bench, arm, signals, keep)
    size, kept = config.grpo.prompts_per_step, int(keep.sum())
    options = dict(seed=bench.cell.seed, difficulty=hard, cluster=clusters, keep=keep, rho=config.curation.rho)
    published = make_schedule("published", batch_size=size, **options)
    drawn = np.concatenate([published.batch(step) for step in range(-(-kept // size))])[:kept]
    order = np.full(n, -1)
    order[drawn] = np.arange(kept)
    quality = signals.quality.get(arm.filter, np.zeros(n))
    manifest = {"experiment": "saerl", "cell": bench.cell.name, "arm": config.main_arm, "report": signals.report}
    rows = [{k: v for k, v in row.items() if k not in ("clauses", "operands")} for row in bench.pool.rows]
    curated = CuratedSet(rows, clusters, np.clip(hard, 0, 1), quality, keep, order, manifest)
    curated.write(bench.folder / "curated", tuple(config.formats))


def page_material(bench: Bench, feature_model, dictionary, signals) -> None:
    """What the page shows of the SAE: the map of prompts, and the latents that drive each signal with their top contexts."""
    from jaxrl_llm.curation import interpret
    from jaxrl_llm.curation.texts import prompt_tokens

    if (bench.folder / "page.json").exists():
        return
    rows = np.sort(np.random.default_rng(0).permutation(len(bench.pool))[: bench.config.map_prompts])
    targets = {name: getattr(signals, name)["sae"][rows] for name in ("difficulty", "quality")}
    chosen = [bench.pool.rows[i] for i in rows]
    tokens = prompt_tokens(chosen, feature_model.tokenizer)(0, len(chosen))
    latents = interpret.telling_latents(feature_model.cfg, feature_model.params, dictionary, tokens, targets, feature_model.tokenizer)
    margin = filter_arm(bench, bench.config.arm_table[bench.config.main_arm], signals).margin
    page = {"rows": rows, "map": interpret.plane(signals.reduced["sae"][rows]), "features": latents, "margin": np.nan_to_num(margin)}
    if is_writer():
        write_json(bench.folder / "page.json", page)


# --- 4. GRPO ---------------------------------------------------------------------------------------------------------


def arm_steps(config, arm) -> int:
    """GRPO steps of an arm."""
    return round(arm.length * config.grpo.steps)


def grpo_settings(config, cell: Cell, arm) -> dict[str, Any]:
    """The fields of `GRPOConfig` for an arm."""
    g = config.grpo
    loss = dict(clip_high=g.clip_high, baseline=g.baseline, aggregation=g.aggregation, advantage_scale=g.advantage_scale)
    return dict(
        steps=arm_steps(config, arm), num_samples=g.num_samples, max_new_tokens=g.max_new_tokens, rollout_tries=g.rollout_tries,
        rollout_rows=g.rollout_rows, rollout_mesh=g.rollout_mesh, overlap_rewards=g.overlap_rewards, attention=g.attention,
        overlong_buffer=g.overlong_buffer, overlong_penalty=g.overlong_penalty, micro_batch_rows=g.micro_batch_rows, remat=g.remat,
        seed=cell.seed, eval_every=g.eval_every, eval_samples=g.eval_samples, eval_by=("level",), checkpoint_every=g.checkpoint_every,
        loss=loss, optimizer=dict(learning_rate=g.learning_rate, b2=g.b2),
    )  # fmt: skip


def start_policy(bench: Bench, name: str):
    """The parameters that an arm starts from: those of the base policy, or ("told") of the base policy after plain supervised fine-tuning
    on the rows told to be sound."""
    from jaxrl_llm.curation.likelihood import TunedOptions
    from jaxrl_llm.train.sft import fine_tuner

    policy, seed, how = bench.policy, bench.cell.seed, TunedOptions()
    if bench.config.arm_table[name].start == "base":
        return policy.params
    sound, rng = np.flatnonzero(told_quality(bench) == 1), np.random.default_rng([seed, 13])
    order = np.concatenate([rng.permutation(sound) for _ in range(bench.config.curation.told_epochs)])
    encoded = told_answers(bench, sound)
    longest = max(len(tokens) for tokens, _ in encoded.values())
    widths = (longest,) if bench.config.data.source else lab_world.WIDTHS
    batches = lab_world.answer_batches([encoded[i] for i in order if i in encoded], min(how.batch, len(encoded)), seed, widths)
    return fine_tuner(policy.cfg, bench.mesh)(policy.params, batches, how.learning_rate)


def told_answers(bench: Bench, rows: np.ndarray) -> dict[int, tuple[list[int], int]]:
    """Row -> (prompt as the policy reads it + answer + end, where the answer begins); rows that the context does not hold are left out."""
    prompts, tokenizer, limit = bench.pool.token_lists(), bench.policy.tokenizer, bench.policy.cfg.max_position
    answers = {i: tokenizer(str(bench.pool.rows[i]["answer"]), add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for i in rows}
    found = {i: ([*prompts[i], *answer], len(prompts[i])) for i, answer in answers.items() if len(prompts[i]) + len(answer) <= limit}
    if not found:
        raise UserError(f"config.data.told: none of the {len(rows)} rows told to be sound fits the policy's context of {limit} tokens")
    return found


def run_arm(bench: Bench, name: str, signals) -> None:
    """Trains one arm; leaves its run directory, the trained policy as a Hugging Face folder, and result.json."""
    import models
    from jaxrl_llm.train.loop import train_grpo

    config, folder, policy = bench.config, bench.folder / name, bench.policy
    if (folder / "result.json").exists():
        return
    if bench.progress:
        print(f"  {name}: {config.arm_table[name].about}", flush=True)
    settings = grpo_settings(config, bench.cell, config.arm_table[name])
    schedule = make_arm_schedule(bench, name, signals)
    run_dir = RunDir(folder, {**settings, "arm": name, "cell": bench.cell.name, "overwrite": config.overwrite}, kind="grpo", owns=("policy",))
    params, summary = train_grpo(
        policy.cfg, start_policy(bench, name), policy.tokenizer, bench.pool, bench.reward, schedule, settings, run_dir, bench.evals, mesh=bench.mesh,
        progress=bench.progress,
    )  # fmt: skip
    models.save(folder / "policy", policy.cfg, params, tokenizer_from=policy.tokenizer)
    if is_writer():
        write_json(folder / "result.json", summary)
        shutil.rmtree(run_dir.checkpoints, ignore_errors=True)  # the exported policy stays; lab runs have hundreds of arms


def compare_answers(bench: Bench, prompts: int = 24) -> None:
    """rollouts.json: greedy answers of the base policy and of every arm to the same held-out prompts, with verdicts."""
    import models
    from jaxrl_llm.train.rollout import decode_completions, judge

    config, policy, (mesh, lay_out) = bench.config, bench.policy, sampling(bench)
    batch = next(iter(bench.evals.values()))
    batch = batch.take(np.random.default_rng(0).permutation(len(batch))[:prompts])
    tags = [{k: r[k] for k in ("topic", "level") if k in r} for r in batch.rows]
    items = [{"prompt": r["prompt"], "answer": str(r["answer"]), "tags": t, "responses": []} for r, t in zip(batch.rows, tags, strict=True)]
    how = dict(max_new_tokens=config.grpo.max_new_tokens, temperature=0.0, mesh=mesh)
    for name in ("base", *config.arms):
        trained = bench.folder / name / "policy"
        params = policy.params if name == "base" else models.load(trained, dtype=config.policy.dtype, mesh=bench.mesh)[1]
        rollout = models.generate(policy.cfg, lay_out(params), batch.token_lists(), **how)
        texts = decode_completions(policy.tokenizer, rollout)
        for i, verdict in enumerate(judge(bench.reward, batch, rollout.group_ids_N, texts)):
            answer = {"arm": name, "text": texts[i], "status": str(verdict.status), "reason": verdict.reason}
            items[rollout.group_ids_N[i]]["responses"].append(answer)
    if is_writer():
        write_json(bench.folder / "rollouts.json", items)
