"""The whole of curation: rows, a model and a config in; the curated set and every figure out.

    rows -> SAE features -> {clusters, difficulty, quality} -> filter -> order -> curated set

Each stage is a function of the stages before it and can be called alone. Features and rollouts are kept on disk as they are made, so
a stopped run goes on; the rest is quick and is done again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sae
from jaxrl_llm import __version__
from jaxrl_llm.config import to_dict
from jaxrl_llm.curation import diversity
from jaxrl_llm.curation.baselines import length_features, length_tfidf_features, tfidf_features
from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.difficulty import Difficulty, active_count, fit_difficulty, surprisal, unit_ranks
from jaxrl_llm.curation.duplicates import exact_duplicates, near_duplicates
from jaxrl_llm.curation.feature_space import FeatureSpace
from jaxrl_llm.curation.features import tree_fingerprint
from jaxrl_llm.curation.judging import Judge, Judged, quality_drop_share, quality_stage
from jaxrl_llm.curation.labels import labels_from_rows, pass_rates, policy_roll_out
from jaxrl_llm.curation.likelihood import Tuner
from jaxrl_llm.curation.passes import LanguageModel, Rows, Stages, Views, extract, pooled_views, train_dictionary
from jaxrl_llm.curation.probes import ArrayDesign, JoinedDesign, spearman
from jaxrl_llm.curation.processes import from_first
from jaxrl_llm.curation.quality import Filtered, difficulty_strata, filter_rows
from jaxrl_llm.curation.schedule import make_schedule
from jaxrl_llm.curation.streaming import Results, write_npz
from jaxrl_llm.curation.texts import prompt_tokens
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, to_plain, write_json

OWNS = ("sae", "features", "pass_rates-*.jsonl", "curated", "vectors.npz", "signals.json")  # what a run makes in its workdir
PACKAGES = ("jax", "flax", "numpy", "scipy", "scikit-learn", "transformers")


def cluster_stage(views: Views, rows: Rows, config: Any, mesh: Any, tick) -> tuple[diversity.Clusters, np.ndarray, dict[str, Any]]:
    """(clusters in the SAE's space, its reduced vectors, figures beside the controls' and TF-IDF's clusters)."""
    options = config.clusters
    k = min(options.k, len(rows))
    truth = [str(row.get(config.data.topic)) for row in rows] if config.data.topic else None
    topics = len(set(truth or ()))
    texts = tfidf_features([row["prompt"] for row in rows])
    tfidf = FeatureSpace.fit(texts, views.results.lengths, min_rows=1, max_share=1.0, remove_length=config.features.remove_length)
    report: dict[str, Any] = {"k": k}
    for name, view in {**views.designs, "tfidf": tfidf.view(texts, views.results.lengths)}.items():
        x = view.reduce(options.dims, seed=config.seed)
        found = diversity.cluster(x, k, n_init=options.restarts, seed=config.seed, mesh=mesh)
        figures = {"silhouette": diversity.silhouette(x, found.labels), "sizes": np.bincount(found.labels).tolist(), "dims": x.shape[1]}
        if truth and topics > 1:  # with one topic there is nothing that clusters could tell of it
            figures["nmi"] = diversity.normalised_mutual_information(found.labels, np.array(truth))
        report[name] = figures
        if name == "sae":
            clusters, vectors = found, x
        tick()
    if truth:
        report["topic"] = {"column": config.data.topic, "different": topics}
    return clusters, vectors, report


def difficulty_labels(
    rows: Rows, policy: Callable[[], LanguageModel], config: Any, mesh: Any, workdir: Path | None, stages: Stages
) -> np.ndarray | None:
    """[N] labels, NaN where there are none; None for a label-free proxy."""
    options = config.difficulty
    if not options.labels:
        return None
    if options.labels != "rollouts":
        return labels_from_rows(rows, options.labels)
    from jaxrl_llm.data.prompts import tokenise_prompts
    from jaxrl_llm.rewards.registry import get_reward, validate_rows

    reward = get_reward(options.reward)
    validate_rows(reward, rows)
    model = policy()
    chosen = np.sort(np.random.default_rng([config.seed, 2]).permutation(len(rows))[: options.max_labels])
    roll_out = policy_roll_out(
        model.cfg, model.params, model.tokenizer, reward, samples=options.samples, template=options.template,
        max_prompt_tokens=options.max_prompt_tokens, temperature=options.temperature, max_new_tokens=options.max_new_tokens, seed=config.seed,
        mesh=mesh,
    )  # fmt: skip
    long = tokenise_prompts(
        [rows[i] for i in chosen], model.tokenizer, max_length=options.max_prompt_tokens, template=options.template, overflow="truncate"
    ).truncated
    if long:
        limit = f"difficulty.max_prompt_tokens={options.max_prompt_tokens}"
        print(f"rollouts: {long} of {len(chosen)} prompts are longer than {limit} and keep their end")
    rolled_out = {k: v for k, v in to_dict(options).items() if k not in ("use", "models", "folds")}
    made_of = [data_hash(rows), tree_fingerprint(model.params), rolled_out, config.seed]
    path = None if workdir is None else workdir / f"pass_rates-{short_hash(made_of)}.jsonl"
    with stages.stage("rollouts", len(chosen), "prompt") as tick:
        rates, _ = pass_rates(rows, chosen, roll_out, path=path, batch_prompts=options.batch_prompts, progress=tick)
    return 1.0 - rates


def difficulty_stage(views: Views, rows: Rows, labels: np.ndarray | None, config: Any, tick) -> Difficulty:
    """The proxy beside its baselines; without labels, the rank of a label-free score."""
    options, results = config.difficulty, views.results
    blocks, width = results.blocks("sae"), results.widths["sae"]
    free = {
        "surprisal": surprisal(blocks.blocks, width, results.lengths),
        "active_count": active_count(blocks.blocks, results.lengths),
        "length": np.log(np.maximum(results.lengths, 1)),
    }
    if labels is None:
        return Difficulty(unit_ranks(free[options.free]), {"labels": None, "used": options.free})
    texts = [row["prompt"] for row in rows]
    designs = {
        **views.designs,
        "sae+length": JoinedDesign(views.designs["sae"], ArrayDesign(length_features(texts))),
        "length_tfidf": length_tfidf_features(texts),
    }
    return fit_difficulty(
        designs,
        labels,
        use=options.use,
        models=tuple(options.models),
        free_scores=free,
        max_labels=options.max_labels,
        folds=options.folds,
        draws=config.bootstrap,
        seed=config.seed,
        tick=tick,
    )


def row_faults(rows: Rows, results: Results, config: Any) -> dict[str, np.ndarray]:
    """What disqualifies a row before any probe: name -> [N] bool."""
    texts = [row["prompt"] for row in rows]
    answers = [str(row.get("answer") or "") for row in rows]
    exact = exact_duplicates(texts)
    faults = {"not_read": results.dropped, "duplicate": exact >= 0}
    if config.quality.near_duplicates:
        near = near_duplicates(texts, threshold=config.quality.duplicate_threshold, answers=answers, seed=config.seed)
        faults["near_duplicate"] = (near >= 0) & (exact < 0)
    if config.data.needs_answer and any(answers):
        faults["empty_answer"] = np.array([not a.strip() for a in answers])
    return faults


def filter_stage(
    judged: Judged, faults: dict[str, np.ndarray], clusters: np.ndarray, difficulty: np.ndarray, config: Any
) -> tuple[Filtered, np.ndarray | None, float]:
    """(the rows kept, the strata [N] in which they competed, the share dropped for quality). Inside strata of what a row is about and how hard
    it is, a score that falls with difficulty does not take the hard rows away."""
    options = config.quality
    strata = difficulty_strata(clusters, difficulty, options.strata) if options.strata else None
    share = quality_drop_share(to_dict(options), judged.told)
    return filter_rows(judged.quality.values, share, faults, strata, judged.quality.expected_bad if options.strata else None), strata, share


def order_stage(keep, clusters, difficulty: np.ndarray, vectors: np.ndarray, config: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """([N] place in the first epoch of the configured schedule, -1 for dropped rows; the diversity of its batches beside that of
    shuffled and round-robin ones)."""
    options, kept = config.schedule, int(keep.sum())
    size = min(options.batch_size, kept)
    common = {"batch_size": size, "seed": config.seed, "difficulty": difficulty, "cluster": clusters, "keep": keep}
    chosen = {"rho": options.rho} if options.kind in ("published", "random_clusters") else {}
    schedules = {
        options.kind: make_schedule(options.kind, **common, **chosen),
        "shuffled": make_schedule("shuffled", **common),
        "round_robin": make_schedule("round_robin", **common),
    }
    steps = max(1, kept // size)
    stream = np.concatenate([schedules[options.kind].batch(step) for step in range(-(-kept // size))])[:kept]
    order = np.full(len(keep), -1)
    order[stream] = np.arange(kept)
    figures = {name: diversity.schedule_diversity(s, steps, clusters, vectors) for name, s in schedules.items()}
    return order, {"kind": options.kind, "batch_size": size, "steps_per_epoch": kept / size, "diversity": figures}


def data_hash(rows: Rows) -> str:
    """32 hex digits of every row's content, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(to_plain(row), sort_keys=True).encode())
    return digest.hexdigest()


def short_hash(value: Any) -> str:
    """12 hex digits of JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def manifest_of(rows: Rows, model: LanguageModel, dictionary: sae.Dictionary, config: Any) -> dict[str, Any]:
    """Where a curated set came from."""
    described = to_dict(config)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "data": {"source": config.data.source, "rows": len(rows), "hash": data_hash(rows)},
        "model": {"name": model.name, "hash": tree_fingerprint(model.params)},
        "sae": {"name": config.sae or "trained here", "hash": tree_fingerprint(dictionary.params), "hook": dictionary.cfg.hook_name},
        "config": described,
        "versions": {"jaxrl_llm": __version__, **versions},
    }


def curate(
    rows: Rows, config: Any, workdir: str | Path, make_tuner: Callable[[Any, Any], Tuner] | None = None
) -> tuple[CuratedSet, dict[str, Any]]:
    """Curate `rows` (from data.sources.read_rows) and write everything under `workdir`: (the set, the figures of signals.json).

    make_tuner(model config, mesh): fine-tunes copies of the policy where `quality.labels` tell which rows are sound; None = this is left out.
    """
    from jaxrl_llm.runtime import parse_mesh

    run_dir = RunDir(workdir, config, kind="curate", owns=OWNS)
    path, mesh, stages = run_dir.path, parse_mesh(config.mesh), Stages()
    with stages.stage("load"):
        model = LanguageModel.load(config.model, config.dtype, mesh)
    loaded: list[LanguageModel] = [] if config.policy and config.policy != config.model else [model]

    def policy() -> LanguageModel:
        if not loaded:
            loaded.append(LanguageModel.load(config.policy, config.dtype, mesh))
        return loaded[0]

    tokens = prompt_tokens(rows, model.tokenizer)
    if config.features.overflow == "error":
        refuse_long_rows(rows, tokens, min(config.features.context or model.cfg.max_position, model.cfg.max_position))
    dictionary, sae_report = dictionary_stage(model, rows, config, mesh, run_dir, stages)
    with stages.stage("features", len(rows)) as tick:
        results = extract(model, dictionary, tokens, len(rows), config, mesh, path / "features" / "prompts", tick)
        views = pooled_views(results, config)
    faults = row_faults(rows, results, config)

    with stages.stage("clusters", len(views.designs) + 1, "fit") as tick:
        clusters, vectors, diversity_report = cluster_stage(views, rows, config, mesh, tick)
    labels = difficulty_labels(rows, policy, config, mesh, path, stages)
    fits = (len(views.designs) + 2) * len(config.difficulty.models) * (config.difficulty.folds + 1)
    with stages.stage("difficulty", fits if labels is not None else 1, "fit") as tick:
        difficulty = difficulty_stage(views, rows, labels, config, tick)
    with_answers = any((row.get("answer") or "").strip() for row in rows)
    tune = make_tuner(policy().cfg, mesh) if make_tuner and with_answers and config.quality.tuned and config.quality.labels else None
    judge = Judge(model, policy, dictionary, config, mesh, path / "features", stages, with_answers, tune)
    judged = quality_stage(judge, rows, views)
    filtered, strata, share = filter_stage(judged, faults, clusters.labels, difficulty.values, config)
    with stages.stage("order"):
        options = config.clusters  # the published method filters before it clusters: broken rows make clusters of their own
        cluster = diversity.cluster_kept(vectors, filtered.keep, options.k, n_init=options.restarts, seed=config.seed, mesh=mesh)
        order, schedule_report = order_stage(filtered.keep, cluster, difficulty.values, vectors, config)

    manifest = manifest_of(rows, model, dictionary, config) | {"quality": {"used": judged.quality.report["used"]}}
    curated = CuratedSet(list(rows), cluster, difficulty.values, judged.quality.values, filtered.keep, order, manifest)
    signals = {
        "data": data_report(rows, results, faults),
        "sae": sae_report,
        "features": features_report(views),
        "diversity": diversity_report,
        "difficulty": difficulty.report,
        "quality": judged.quality.report,
        "filter": {"kept": int(filtered.keep.sum()), "dropped": filtered.reasons, "cut": filtered.cut, "drop_share": share},
        "schedule": schedule_report,
    }
    with stages.stage("write"):
        curated.write(path / "curated", tuple(config.formats))
    if run_dir.is_writer:
        arrays = {"ids": np.array([row["id"] for row in rows]), "vectors": vectors}
        if judged.told is not None and judged.directions is not None:  # what `grpo` judges the rows anew by
            faulty = np.any([np.zeros(len(rows), bool), *faults.values()], axis=0)
            arrays |= {"told": judged.told, "directions": judged.directions, "faulty": faulty}
            arrays |= {} if strata is None else {"strata": strata}
        write_npz(path / "vectors.npz", arrays)
        write_json(path / "signals.json", {**signals, "seconds": stages.seconds})
    run_dir.summary({"kept": int(filtered.keep.sum()), "rows": len(rows), "seconds": stages.seconds})
    return curated, to_plain({**signals, "seconds": stages.seconds})


def refuse_long_rows(rows: Rows, tokens: Callable[[int, int], list[list[int]]], context: int) -> None:
    """Raises UserError, with its place, for the first prompt of more than `context` tokens, before anything is trained."""
    for start in range(0, len(rows), 1024):
        for row, found in zip(rows[start : start + 1024], tokens(start, start + 1024), strict=True):
            if len(found) > context:
                where = getattr(rows, "places", {}).get(row["id"], f"row '{row['id']}'")
                raise UserError(
                    f"{where}: the prompt has {len(found)} tokens, more than the context of {context}: shorten it, or set features.overflow to "
                    "window, truncate or drop"
                )


def dictionary_stage(model: LanguageModel, rows: Rows, config: Any, mesh: Any, run_dir: RunDir, stages: Stages):
    """The SAE named in the config, or one trained on these rows (found again by a run that goes on, not by another one)."""
    folder, report = run_dir.path / "sae", run_dir.path / "sae" / "metrics.json"
    made_of = [data_hash(rows), tree_fingerprint(model.params), config.features.hook, config.features.context, config.seed]
    key = short_hash([*made_of, to_dict(config.train_sae)])
    if config.sae:
        dictionary = sae.load(config.sae)
        return dictionary, {"trained": False, "d_sae": dictionary.cfg.d_sae, "hook": dictionary.cfg.hook_name}
    found = json.loads(report.read_text()) if run_dir.is_writer and report.exists() else {}
    if from_first(found.get("key") == key):  # all processes train, or none
        return sae.load(folder), json.loads(report.read_text())
    with stages.stage("train SAE"):
        dictionary, metrics = train_dictionary(model, rows, config, mesh, run_dir.checkpoints / f"sae-{key}")
    shape = {"d_sae": dictionary.cfg.d_sae, "k": dictionary.cfg.k, "hook": dictionary.cfg.hook_name}
    figures = to_plain({"trained": True, "key": key, **shape, **metrics})
    if run_dir.is_writer:
        sae.save(folder, dictionary)
        write_json(report, figures)
    return dictionary, figures


def data_report(rows: Rows, results: Results, faults: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of everything unusual about the rows."""
    lengths = results.lengths
    return {
        "rows": len(rows),
        "skipped": dict(getattr(rows, "skipped", {})),
        "tokens": {"mean": float(lengths.mean()), "longest": int(lengths.max())},
        "longer_than_context": {k: results.counts[k] for k in ("windowed", "truncated", "dropped")},
        "empty_after_tokenising": results.counts["empty"],
        "faults": {name: int(hit.sum()) for name, hit in faults.items()},
    }


def features_report(views: Views) -> dict[str, Any]:
    """Width before and after the frequency filter, and how much of the raw features is length."""
    counts = active_count(views.results.blocks("sae").blocks)
    space = views.designs["sae"].space
    return {
        "width": views.results.widths["sae"],
        "kept": space.width,
        "mean_active": float(counts.mean()),
        "spearman_active_length": spearman(counts, views.results.lengths),
    }
