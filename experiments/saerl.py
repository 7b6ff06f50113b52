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

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from jaxrl_llm.data import lab_world
from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.run_dir import RunDir, write_json

# Feature kinds an arm may name; "sae" is ours, the others are its controls.
FEATURES = ("sae", "random_sae", "dense", "tfidf")
FILTERS = ("none", "oracle", "logprob", *FEATURES)


class Cell(NamedTuple):
    """One paired comparison: all arms of a cell share policy, pool, SAE, labels and RL seed."""

    pool: str
    base: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.pool}-base{self.base}-seed{self.seed}"


@dataclasses.dataclass
class Policy:
    """The base policy of a cell."""

    cfg: Any
    params: Any
    tokenizer: Any
    mesh: Any = None


@dataclasses.dataclass
class Signals:
    """What curation knows of the N rows of a pool; `truth` is for scoring and for oracle arms only."""

    reduced: dict[str, np.ndarray]  # feature kind -> [N, dims]
    clusters: dict[str, np.ndarray]  # feature kind -> [N] int
    difficulty: dict[str, np.ndarray]  # feature kind or "oracle" -> [N] expected fail rate
    quality: dict[str, np.ndarray]  # filter kind -> [N], higher is better
    faults: dict[str, np.ndarray]  # name -> [N] bool: rows dropped whatever their quality
    truth: dict[str, np.ndarray]
    report: dict[str, Any]


def run(config, workdir) -> None:
    """Runs every cell and arm of the config and writes report.html."""
    check(config)
    run_dir = RunDir(workdir, config, kind="saerl")
    cells = [Cell(p, b, s) for p in config.pools for b in config.bases for s in config.seeds]
    started = time.time()
    if config.workers > 1 and len(cells) > 1:
        run_parallel(config, run_dir.path, cells)
    else:
        for i, cell in enumerate(cells):
            print(f"cell {i + 1}/{len(cells)}: {cell.name}", flush=True)
            run_cell(config, run_dir.path, cell)
    from jaxrl_llm.report import saerl as page
    from jaxrl_llm.report import write_report

    data, summary = page.build(config, run_dir.path, cells, seconds=time.time() - started)
    run_dir.summary(summary)
    write_report(run_dir.path / "report.html", data)
    print(data["headline"])
    print(f"report: {run_dir.path / 'report.html'}")


def check(config) -> None:
    """Raises UserError for an arm, pool or feature kind that is not there, before anything is computed."""
    for what, names, table in (("arm", config.arms, config.arm_table), ("pool", config.pools, config.pool_table)):
        for name in names:
            if name not in table:
                raise UserError(f"config.{what}s: no {what} {name!r}; {nearest(name, list(table))}")
    if config.main_arm not in config.arms:
        raise UserError(f"config.main_arm is {config.main_arm!r}, which is not in config.arms {tuple(config.arms)}")
    for name in config.arms:
        arm = config.arm_table[name]
        for key, known in (("features", FEATURES), ("filter", FILTERS), ("clusters", ("features", "random")), ("difficulty", ("proxy", "oracle"))):
            if arm[key] not in known:
                raise UserError(f"config.arm_table.{name}.{key} is {arm[key]!r}; {nearest(arm[key], known)}")
        if config.data.source and "oracle" in (arm.filter, arm.difficulty):
            raise UserError(f"arm {name!r} needs the truth, which only the generated world has; take it out of config.arms")


def run_parallel(config, root: Path, cells: list[Cell]) -> None:
    """Cells over `config.workers` processes of one core each: small models gain more from that than from threads."""
    for base in sorted({c.base for c in cells}):
        make_policy(config, root, base)  # shared by cells, so made before they start
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with context.Pool(config.workers, maxtasksperchild=1) as pool:
        work = functools.partial(_cell_quietly, config, root)
        for i, name in enumerate(pool.imap_unordered(work, cells, chunksize=1)):
            print(f"cell {i + 1}/{len(cells)} done: {name}", flush=True)


def _cell_quietly(config, root: Path, cell: Cell) -> str:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[multiprocessing.current_process()._identity[0] % len(cores)]})
    run_cell(config, root, cell, progress=False)
    return cell.name


def run_cell(config, root: Path, cell: Cell, progress: bool = True) -> None:
    """All arms of one cell."""
    folder = root / "cells" / cell.name
    if all((folder / arm / "result.json").exists() for arm in config.arms):
        return
    clock = Clock(folder)
    with clock("base policy"):
        policy = make_policy(config, root, cell.base, progress)
    pool, evals, reward = make_data(config, cell, policy)
    with clock("sparse autoencoder"):
        dictionary, feature_model = make_dictionary(config, folder, cell, policy, pool, progress)
    with clock("curation"):
        signals = measure(config, cell, policy, feature_model, dictionary, pool, reward)
    write_curated(config, folder, cell, pool, signals)
    page_material(config, folder, feature_model, dictionary, pool, signals)
    for arm in config.arms:
        with clock(f"GRPO {arm}"):
            run_arm(config, folder / arm, cell, arm, policy, pool, evals, reward, signals, progress)
    compare_answers(config, folder, policy, evals, reward)


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
        write_json(self.path, self.stages)


# --- 1. the base policy ----------------------------------------------------------------------------------------------


def make_policy(config, root: Path, base: int, progress: bool = True) -> Policy:
    """Loads `config.policy.model`, or pre-trains one on the generated world (kept as a Hugging Face folder)."""
    import models
    from jaxrl_llm.runtime import parse_mesh

    mesh = parse_mesh(config.mesh)
    folder = Path(config.policy.model) if config.policy.model else root / "policies" / f"base{base}"
    if not config.policy.model and not (folder / "config.json").exists():
        pretrain(config, folder, base, progress)
    cfg, params = models.load(config.policy.model or folder, dtype=config.policy.dtype, mesh=mesh)
    return Policy(cfg, params, models.load_tokenizer(config.policy.model or folder), mesh)


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
    rows = lab_world.demonstrations(c.clean_steps * c.batch, seed + 7, c.clean_levels, (0.0,) * 5)
    batches = lab_world.sft_batches(rows, tokenizer, c.batch, seed)
    mixed = lab_world.demonstrations(c.mixed_steps * c.batch, seed + 8, c.mixed_levels, c.mistakes)
    batches += lab_world.sft_batches(mixed, tokenizer, c.batch, seed + 1)
    optimizer = dict(
        learning_rate=c.learning_rate, schedule="cosine", warmup_steps=50, final_share=0.05, b2=0.98, weight_decay=0.01
    )
    params = models.init(cfg, jax.random.key(base))
    settings = dict(steps=len(batches), remat=True, log_every=25, optimizer=optimizer)
    params, _ = train_sft(cfg, params, batches, settings, progress=progress)
    models.save(folder, cfg, params)
    tokenizer.save_pretrained(folder)


# --- data ------------------------------------------------------------------------------------------------------------


def make_data(config, cell: Cell, policy: Policy):
    """(pool, {name: held-out set}, reward)."""
    from jaxrl_llm.data.prompts import tokenise_prompts
    from jaxrl_llm.data.sources import parse_fields, read_rows
    from jaxrl_llm.rewards import registry

    d = config.data
    if d.source:
        rows = read_rows(d.source, parse_fields(d.fields), limit=d.rows, required=("prompt", "answer"))
        named = [entry.split("=", 1) for entry in d.evals.split(",") if entry]
        held_out = {name: read_rows(source, parse_fields(d.fields), split="test", required=("prompt", "answer")) for name, source in named}
    else:
        test = lab_world.generate_problems(d.test_rows, 991, prefix="test")
        shares = config.pool_table[cell.pool]
        clean = lab_world.generate_problems(d.rows, 5000 + cell.seed, shares.levels, exclude={r["prompt"] for r in test})
        rows = lab_world.corrupt(clean, {k: shares[k] for k in lab_world.CORRUPTIONS}, cell.seed)
        held_out = {"test": test}
    tokenise = functools.partial(
        tokenise_prompts, tokenizer=policy.tokenizer, max_length=d.max_prompt_tokens, template=d.template, overflow="drop"
    )
    return tokenise(rows), {name: tokenise(r) for name, r in held_out.items()}, registry.get_reward(d.reward)


# --- 2. the sparse autoencoder ---------------------------------------------------------------------------------------


def make_dictionary(config, folder: Path, cell: Cell, policy: Policy, pool, progress: bool):
    """(dictionary, feature model): loaded, or trained on the feature model's activations over prompts and answers."""
    import jax

    import models
    import sae
    from jaxrl_llm.curation.features import middle_hook

    c, feature_model = config.sae, policy
    if c.model:
        cfg, params = models.load(c.model, dtype=config.policy.dtype, mesh=policy.mesh)
        feature_model = Policy(cfg, params, models.load_tokenizer(c.model), policy.mesh)
    path = c.path or folder / "sae"
    if c.path or (folder / "sae").exists():
        return sae.load(path), feature_model
    hook = c.hook or middle_hook(feature_model.cfg)
    width, name = feature_model.cfg.d_model, config.policy.model or "lab"
    cfg = sae.SAEConfig(architecture="topk", d_in=width, d_sae=c.d_sae, k=c.k, hook_name=hook, model_name=name)
    tokens = answered_tokens(feature_model, pool)[0]
    source = sae.harvest_activations(feature_model.cfg, feature_model.params, RepeatedRows(tokens, cell.seed), hook, batch_size=256)
    buffer = sae.ActivationBuffer(source, c.batch, 32 * c.batch, seed=cell.seed)
    train = sae.SAETrainConfig(steps=c.steps, learning_rate=c.learning_rate, dead_after=50_000, method="dense")
    dictionary, history = sae.train_sae(cfg, buffer, train, jax.random.key(cell.seed), progress=None if progress else False)
    sae.save(folder / "sae", dictionary, layout="saelens")
    write_json(folder / "sae.json", {"history": history})
    return dictionary, feature_model


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


def answered_tokens(model: Policy, pool) -> tuple[list[list[int]], list[int]]:
    """(prompt + answer token lists, positions where the answers begin)."""
    prompts = pool.token_lists()
    answers = [model.tokenizer(str(r.get("answer") or ""), add_special_tokens=False).input_ids for r in pool.rows]
    return [p + a for p, a in zip(prompts, answers, strict=True)], [len(p) for p in prompts]


# --- 3. curation -----------------------------------------------------------------------------------------------------


def measure(config, cell: Cell, policy: Policy, feature_model: Policy, dictionary, pool, reward) -> Signals:
    """Clusters, difficulty and quality of every row by each kind of features that an arm of the config names, and their
    scores against the truth."""
    from jaxrl_llm.curation import difficulty, diversity, quality, schedule
    from jaxrl_llm.curation.probes import ArrayDesign, JoinedDesign

    c, arms = config.curation, [config.arm_table[name] for name in config.arms]
    texts = [row["prompt"] for row in pool.rows]
    answered = [f"{row['prompt']} {row.get('answer') or ''}" for row in pool.rows]
    tokens, marks = answered_tokens(feature_model, pool)
    prompt_designs, lengths = designs(config, feature_model, dictionary, pool.token_lists(), texts)
    answer_designs, _ = designs(config, feature_model, dictionary, tokens, answered) if c.answers else (prompt_designs, lengths)
    likelihood = policy_likelihood(policy, pool)

    out = Signals({}, {}, {}, {}, {}, lab_truth(pool), {})
    for kind, design in prompt_designs.items():
        if kind in FEATURES:
            out.reduced[kind] = design.reduce(c.dims) if hasattr(design, "reduce") else schedule.reduce_features(design.x, c.dims)
            out.clusters[kind] = diversity.cluster(out.reduced[kind], c.clusters, n_init=4, seed=cell.seed).labels
    out.report["clusters"] = {
        kind: diversity.normalised_mutual_information(labels, out.truth["topic"]) for kind, labels in out.clusters.items() if "topic" in out.truth
    }

    rows, rates = label_rollouts(config, cell, policy, pool, reward)
    labels = np.full(len(pool), np.nan)
    labels[rows] = 1 - rates
    fit = functools.partial(difficulty.fit_difficulty, labels=labels, models=("ridge",), seed=cell.seed)
    fitted = fit(prompt_designs, use="sae")
    out.difficulty["sae"], out.report["difficulty"] = fitted.values, fitted.report
    for kind in {arm.features for arm in arms} - {"sae"}:
        out.difficulty[kind] = fit({kind: prompt_designs[kind]}, use=kind, reference=kind, draws=0).values
    if any(arm.difficulty == "oracle" for arm in arms):
        out.difficulty["oracle"] = 1 - true_rates(config, cell, policy, pool, reward, np.arange(len(pool)))
    else:
        held_out = np.setdiff1d(np.arange(len(pool)), rows)[: config.data.test_rows]
        out.truth["checked"] = held_out
        out.truth["fail_rate"] = 1 - true_rates(config, cell, policy, pool, reward, held_out)

    with_likelihood = {k: JoinedDesign(d, ArrayDesign(likelihood)) for k, d in answer_designs.items() if k in ("sae", "random_sae", "dense")}
    quality_designs = with_likelihood | {"logprob": ArrayDesign(likelihood)} | {k: d for k, d in answer_designs.items() if k not in with_likelihood}
    told = quality_labels(config, cell, out.truth, len(pool))
    for kind in sorted({"sae", "logprob"} | {arm.filter for arm in arms} - {"none", "oracle"}):
        use = quality_designs if kind == "sae" else {kind: quality_designs[kind]}
        against = dict(reference="length_tfidf", draws=1000) if kind == "sae" else dict(reference=kind, draws=0)
        found = quality.fit_labelled_quality(use, told, use=kind, seed=cell.seed, **against)
        out.quality[kind] = found.values
        if kind == "sae":
            out.report["quality"] = found.report
    return out


def designs(config, feature_model: Policy, dictionary, tokens, texts):
    """({feature kind: probe design}, lengths): the SAE, the same SAE untrained, dense activations, length and TF-IDF."""
    from jaxrl_llm.curation import baselines
    from jaxrl_llm.curation.feature_space import FeatureSpace, dense_space
    from jaxrl_llm.curation.features import extract_features, random_dictionary
    from jaxrl_llm.curation.probes import ArrayDesign

    dictionaries = {"sae": dictionary, "random_sae": random_dictionary(dictionary.cfg)}
    lengths = np.array([len(t) for t in tokens])
    found = [
        extract_features(
            feature_model.cfg, feature_model.params, dictionaries, tokens, hook=config.sae.hook or None, pooling=pooling,
            dense=("dense_mean", "dense_last") if i == 0 else (), mesh=feature_model.mesh,
        )
        for i, pooling in enumerate(config.sae.pooling)
    ]  # fmt: skip
    views = {}
    for name in dictionaries:
        pooled = sparse.hstack([results.csr(name) for results in found], format="csr")
        views[name] = FeatureSpace.fit(pooled, lengths, remove_length=config.curation.remove_length).view(pooled, lengths)
    dense = np.concatenate([found[0].dense("dense_mean"), found[0].dense("dense_last")], axis=1)
    views["dense"] = dense_space(dense, lengths, remove_length=config.curation.remove_length)
    views["tfidf"] = views["length_tfidf"] = ArrayDesign(baselines.length_tfidf_features(texts))
    views["length"] = ArrayDesign(baselines.length_features(texts))
    return views, lengths


def policy_likelihood(policy: Policy, pool) -> np.ndarray:
    """[N, columns] what the policy thinks of each prompt and of its gold answer (curation.likelihood.COLUMNS)."""
    from jaxrl_llm.curation.likelihood import answer_likelihood

    tokens, marks = answered_tokens(policy, pool)
    columns, _ = answer_likelihood(policy.cfg, policy.params, lambda a, b: (tokens[a:b], marks[a:b]), len(tokens), mesh=policy.mesh)
    return columns


def label_rollouts(config, cell: Cell, policy: Policy, pool, reward) -> tuple[np.ndarray, np.ndarray]:
    """(rows, pass rates) of a random subset: the only rollouts that curation pays for."""
    rows = np.sort(np.random.default_rng([cell.seed, 11]).permutation(len(pool))[: config.curation.labels])
    return rows, true_rates(config, cell, policy, pool, reward, rows, salt=1)


def true_rates(config, cell: Cell, policy: Policy, pool, reward, rows, salt: int = 2) -> np.ndarray:
    """[rows] pass rates of the base policy over `label_samples` samples."""
    from jaxrl_llm.train.evaluate import sampled_passes

    passes = sampled_passes(
        policy.cfg, policy.params, policy.tokenizer, pool.take(rows), reward, samples=config.curation.label_samples,
        max_new_tokens=config.grpo.max_new_tokens, seed=1000 * cell.seed + salt,
    )[1]  # fmt: skip
    return np.nanmean(passes, axis=1)


def lab_truth(pool) -> dict[str, np.ndarray]:
    """Topic, level and corruption of the rows, where the rows tell."""
    return {k: np.array([row[k] for row in pool.rows]) for k in ("topic", "level", "corruption") if k in pool.rows[0]}


def quality_labels(config, cell: Cell, truth, n: int) -> np.ndarray:
    """[N] 1 fit to train on, 0 not, NaN unknown: a small random subset is told, as an annotator would."""
    told = np.full(n, np.nan)
    rows = np.random.default_rng([cell.seed, 12]).permutation(n)[: config.curation.quality_labels]
    told[rows] = ~np.isin(truth["corruption"][rows], BAD)
    return told


BAD = ("wrong_answer", "missing_clause", "garbled")  # a near-duplicate is a sound problem


def keep_rows(config, cell: Cell, arm, signals: Signals, n: int) -> np.ndarray:
    """[N] bool: the rows an arm trains on."""
    from jaxrl_llm.curation.quality import filter_rows

    if arm.filter == "none":
        return np.ones(n, bool)
    if arm.filter == "oracle":
        return ~np.isin(signals.truth["corruption"], BAD)
    return filter_rows(signals.quality[arm.filter], config.pool_table[cell.pool].drop).keep


def make_arm_schedule(config, cell: Cell, name: str, signals: Signals, n: int):
    """The schedule of an arm, over all N rows."""
    from jaxrl_llm.curation.schedule import TrainabilityBand, make_schedule, random_clusters

    arm, c, size = config.arm_table[name], config.curation, config.grpo.prompts_per_step
    keep = keep_rows(config, cell, arm, signals, n)
    clusters = signals.clusters[arm.features] if arm.clusters == "features" else random_clusters(n, c.clusters, cell.seed)
    hard = signals.difficulty["oracle" if arm.difficulty == "oracle" else arm.features]
    if arm.schedule != "band":
        options = dict(rho=c.rho, within=arm.within) if arm.schedule == "published" else {}
        return make_schedule(arm.schedule, batch_size=size, seed=cell.seed, difficulty=hard, cluster=clusters, keep=keep, **options)
    return TrainabilityBand(
        1 - hard, signals.reduced[arm.features], size, seed=cell.seed, cluster=clusters, keep=keep,
        samples_per_prompt=config.grpo.num_samples, temperature=c.band_temperature, easy_floor=c.band_easy_floor,
        epoch_share=c.band_epoch_share,
    )  # fmt: skip


def write_curated(config, folder: Path, cell: Cell, pool, signals: Signals) -> None:
    """The curated set of the main arm (readable by other trainers) and every signal of the cell."""
    from jaxrl_llm.curation.curated_set import CuratedSet
    from jaxrl_llm.curation.schedule import make_schedule

    arm, n = config.arm_table[config.main_arm], len(pool)
    keep = keep_rows(config, cell, arm, signals, n)
    hard, clusters = signals.difficulty[arm.features], signals.clusters[arm.features]
    size = config.grpo.prompts_per_step
    published = make_schedule("published", batch_size=size, seed=cell.seed, difficulty=hard, cluster=clusters, keep=keep, rho=config.curation.rho)
    steps = -(-int(keep.sum()) // size)
    drawn = np.concatenate([published.batch(step) for step in range(steps)])[: int(keep.sum())]
    order = np.full(n, -1)
    order[drawn] = np.arange(len(drawn))
    quality = signals.quality.get(arm.filter, np.zeros(n))
    manifest = {"experiment": "saerl", "cell": cell.name, "arm": config.main_arm, "report": signals.report}
    rows = [{k: v for k, v in row.items() if k not in ("clauses", "operands")} for row in pool.rows]
    CuratedSet(rows, clusters, np.clip(hard, 0, 1), quality, keep, order, manifest).write(folder / "curated", tuple(config.formats))
    arrays = {f"{group}/{name}": value for group in ("clusters", "difficulty", "quality", "truth") for name, value in getattr(signals, group).items()}
    np.savez_compressed(folder / "signals.npz", **arrays, **{"keep": keep})
    write_json(folder / "signals.json", signals.report)


def page_material(config, folder: Path, feature_model: Policy, dictionary, pool, signals: Signals) -> None:
    """What the page shows of the SAE: the map of prompts, and the latents that drive each signal with their top contexts."""
    from jaxrl_llm.curation import interpret

    if (folder / "page.json").exists():
        return
    rows = np.sort(np.random.default_rng(0).permutation(len(pool))[: config.map_prompts])
    targets = {"difficulty": signals.difficulty["sae"][rows]}
    if "sae" in signals.quality:
        targets["quality"] = signals.quality["sae"][rows]
    latents = interpret.telling_latents(
        feature_model.cfg, feature_model.params, dictionary, pool.take(rows).token_lists(), targets, feature_model.tokenizer
    )
    write_json(folder / "page.json", {"rows": rows, "map": interpret.plane(signals.reduced["sae"][rows]), "features": latents})


# --- 4. GRPO ---------------------------------------------------------------------------------------------------------


def grpo_settings(config, cell: Cell) -> dict[str, Any]:
    """The fields of `GRPOConfig` for this experiment."""
    g = config.grpo
    loss = dict(clip_high=g.clip_high, aggregation=g.aggregation, advantage_scale=g.advantage_scale)
    return dict(
        steps=g.steps, num_samples=g.num_samples, max_new_tokens=g.max_new_tokens, micro_batch_rows=g.micro_batch_rows, remat=g.remat,
        seed=cell.seed, eval_every=g.eval_every, eval_samples=g.eval_samples, eval_by=("level",), checkpoint_every=g.checkpoint_every,
        loss=loss, optimizer=dict(learning_rate=g.learning_rate, b2=g.b2),
    )  # fmt: skip


def run_arm(config, folder: Path, cell: Cell, name: str, policy: Policy, pool, evals, reward, signals: Signals, progress: bool) -> None:
    """Trains one arm; leaves its run directory, the trained policy as a Hugging Face folder, and result.json."""
    import models
    from jaxrl_llm.train.loop import train_grpo

    if (folder / "result.json").exists():
        return
    if progress:
        print(f"  {name}: {config.arm_table[name].about}", flush=True)
    settings = grpo_settings(config, cell)
    schedule = make_arm_schedule(config, cell, name, signals, len(pool))
    run_dir = RunDir(folder, {**settings, "arm": name, "cell": cell.name, "overwrite": config.overwrite}, kind="grpo")
    params, summary = train_grpo(
        policy.cfg, policy.params, policy.tokenizer, pool, reward, schedule, settings, run_dir, evals, mesh=policy.mesh, progress=progress
    )
    models.save(folder / "policy", policy.cfg, params)
    policy.tokenizer.save_pretrained(folder / "policy")
    shutil.rmtree(run_dir.checkpoints, ignore_errors=True)  # the exported policy stays; lab runs have hundreds of arms
    write_json(folder / "result.json", summary)



def compare_answers(config, folder: Path, policy: Policy, evals, reward, prompts: int = 24) -> None:
    """rollouts.json: greedy answers of the base policy and of every arm to the same held-out prompts, with verdicts."""
    import models
    from jaxrl_llm.train.rollout import decode_completions, judge

    batch = next(iter(evals.values()))
    batch = batch.take(np.random.default_rng(0).permutation(len(batch))[:prompts])
    tags = [{k: r[k] for k in ("topic", "level") if k in r} for r in batch.rows]
    items = [{"prompt": r["prompt"], "answer": r["answer"], "tags": t, "responses": []} for r, t in zip(batch.rows, tags, strict=True)]
    for name in ("base", *config.arms):
        params = policy.params if name == "base" else models.load(folder / name / "policy", dtype=config.policy.dtype, mesh=policy.mesh)[1]
        rollout = models.generate(policy.cfg, params, batch.token_lists(), max_new_tokens=config.grpo.max_new_tokens, temperature=0.0)
        texts = decode_completions(policy.tokenizer, rollout)
        for i, verdict in enumerate(judge(reward, batch, rollout.group_ids_N, texts)):
            answer = {"arm": name, "text": texts[i], "status": str(verdict.status), "reason": verdict.reason}
            items[rollout.group_ids_N[i]]["responses"].append(answer)
    write_json(folder / "rollouts.json", items)
