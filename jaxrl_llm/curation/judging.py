"""The quality stage: features of prompt + answer and of corrupted copies, what a policy thinks of the answers, and the probes between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sae
from jaxrl_llm.curation.baselines import length_tfidf_features
from jaxrl_llm.curation.corruptions import OF_ANSWERS, corrupt_rows
from jaxrl_llm.curation.labels import labels_from_rows, told_sound
from jaxrl_llm.curation.likelihood import COLUMNS, Tuner, policy_opinion
from jaxrl_llm.curation.passes import LanguageModel, Rows, Stages, Views, extract, pooled_views
from jaxrl_llm.curation.probes import ArrayDesign, Design, JoinedDesign
from jaxrl_llm.curation.quality import Quality, answer_length_columns, drop_share, filter_rows, fit_labelled_quality, fit_quality
from jaxrl_llm.curation.streaming import Results
from jaxrl_llm.curation.texts import answer_tokens, prompt_tokens
from jaxrl_llm.errors import UserError

JOINED_DIMS = 32  # of the SAE's vectors beside the policy's columns: with few labels fewer dimensions separate better
FEATURES = ("sae", "random_sae", "dense_mean", "dense_max", "length_tfidf")
OPINIONS = ("logp", "tuned")  # the policy's log-probabilities; these and their gain in policies tuned on the rows told to be sound
USES = ("auto", *FEATURES, *OPINIONS, *(f"sae+{name}" for name in OPINIONS), "answer_logp_mean")
Pair = tuple[Design, Design]


def opinion_columns(
    rows: Rows, model: LanguageModel, params: Any, separator: str, *, told: np.ndarray | None = None, **options: Any
) -> dict[str, np.ndarray]:
    """`likelihood.policy_opinion` on rows, each with the answers' lengths beside it. params: of `model`, as they are now."""
    found = policy_opinion(model.cfg, params, answer_tokens(rows, model.tokenizer, separator), len(rows), told=told, **options)
    lengths = answer_length_columns([row.get("answer") for row in rows])
    return {name: np.concatenate([columns, lengths], axis=1) for name, columns in found.items()}


def joined(features: np.ndarray | None, opinions: Mapping[str, np.ndarray]) -> dict[str, Design]:
    """Designs of what a policy thinks, alone and ("sae+...") beside the SAE's directions [N, JOINED_DIMS]."""
    out: dict[str, Design] = {name: ArrayDesign(columns) for name, columns in opinions.items()}
    return out if features is None else out | {f"sae+{name}": JoinedDesign(ArrayDesign(features), out[name]) for name in opinions}


@dataclass
class Judged:
    """quality: of the rows. told: [N] 1 fit to train on, 0 not, NaN unknown; None where no labels of two values say so. directions:
    [N, JOINED_DIMS] of the SAE's features of prompt + answer, or None where rows have no answers."""

    quality: Quality
    told: np.ndarray | None = None
    directions: np.ndarray | None = None


@dataclass
class Judge:
    """What the quality stage runs on any rows. policy() loads the policy when it is first needed."""

    model: LanguageModel
    policy: Callable[[], LanguageModel]
    dictionary: sae.Dictionary
    config: Any
    mesh: Any
    folder: Path | None
    stages: Stages
    with_answers: bool
    tune: Tuner | None = None

    def _folder(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def features(self, rows: Rows, name: str) -> Results:
        """Pooled features of prompt + answer."""
        slice_of = answer_tokens(rows, self.model.tokenizer, self.config.quality.separator)
        tokens = (lambda a, b: slice_of(a, b)[0]) if self.with_answers else prompt_tokens(rows, self.model.tokenizer)
        with self.stages.stage(name, len(rows)) as tick:
            return extract(self.model, self.dictionary, tokens, len(rows), self.config, self.mesh, self._folder(name), tick)

    def opinions(self, rows: Rows, name: str, told: np.ndarray | None) -> dict[str, np.ndarray]:
        """`opinion_columns` of the policy as it is."""
        policy, options = self.policy(), self.config.features
        tune = self.tune if told is not None and self.config.quality.tuned else None
        with self.stages.stage("likelihood", len(rows) * (1 if tune is None else 5)) as tick:
            return opinion_columns(
                rows, policy, policy.params, self.config.quality.separator, told=told, tune=tune, seed=self.config.seed, mesh=self.mesh,
                folder=self._folder(f"{name}-likelihood"), batch_tokens=options.batch_tokens, shard_rows=options.shard_rows, progress=tick,
            )  # fmt: skip

    def designs(self, rows: Rows, views: Views, copies: Rows, told: np.ndarray | None) -> tuple[dict[str, Pair], np.ndarray | None]:
        """(each kind of features for the rows and for their corrupted copies, both the rows' where there are no copies; the rows'
        directions beside the policy's columns)."""
        again = views.again(self.features(copies, "copies")) if copies else views.designs
        pairs: dict[str, Pair] = {name: (view, again[name]) for name, view in views.designs.items()}
        texts = [row["prompt"] + self.config.quality.separator + (row.get("answer") or "") for row in [*rows, *copies]]
        words = length_tfidf_features(texts)
        pairs["length_tfidf"] = (ArrayDesign(words[: len(rows)]), ArrayDesign(words[len(rows) :]))
        if not self.with_answers:
            return pairs, None
        directions = views.designs["sae"].directions(JOINED_DIMS, seed=self.config.seed)
        of_rows, of_copies = (view.project(directions) for view in (views.designs["sae"], again["sae"]))
        own = self.opinions(rows, "answers", told)
        spoilt = self.opinions(copies, "copies", None) if copies else own
        first, second = joined(of_rows, own), joined(of_copies, spoilt)
        return pairs | {name: (first[name], second[name]) for name in first}, of_rows


def quality_stage(judge: Judge, rows: Rows, prompt_views: Views) -> Judged:
    """A quality score for each row, beside its baselines. Where rows have answers, everything is computed on prompt + answer."""
    config, options = judge.config, judge.config.quality
    copies: list[dict[str, Any]] = []
    labels = told = None
    if options.labels:
        labels = labels_from_rows(rows, options.labels)
        told = told_sound(labels)
    else:
        kinds = [kind for kind in options.corruptions if judge.with_answers or kind not in OF_ANSWERS]
        chosen = np.sort(np.random.default_rng([config.seed, 3]).permutation(len(rows))[: options.samples])
        copies, sources, kind_of = corrupt_rows(rows, chosen, kinds, config.seed)
        if not copies:
            report = {"probes": {}, "used": None, "counts": {"rows": 0, "copies": 0}, "why": "no corruption applies to these rows"}
            return Judged(Quality(np.zeros(len(rows)), report, log_odds=False))
    views = pooled_views(judge.features(rows, "answers"), config) if judge.with_answers else prompt_views
    pairs, directions = judge.designs(rows, views, copies, told)
    use = next(name for name in ("sae+tuned", "sae+logp", "sae") if name in pairs) if options.use == "auto" else options.use
    common = {"use": use, "draws": config.bootstrap, "seed": config.seed}
    with judge.stages.stage("quality", len(pairs) * 6, "fit") as tick:
        if labels is not None:
            found = fit_labelled_quality({name: own for name, (own, _) in pairs.items()}, labels, tick=tick, **common)
            return Judged(found, told, directions)
        free = {}
        if "logp" in pairs:
            column = COLUMNS.index("answer_logp_mean")
            free["answer_logp_mean"] = tuple(design.rows(np.arange(len(design)))[:, column] for design in pairs["logp"])
        return Judged(fit_quality(pairs, sources, kind_of, free_scores=free, tick=tick, **common), directions=directions)


@dataclass
class Refilter:
    """Which rows of a curated set to keep, by the policy as it is now: the labelled quality stage of `curate` once more, on the features
    that it kept. A policy that has learnt tells sound answers from wrong ones better than the one that was asked first.

    rows: all of the set. model: config and tokenizer of the policy. directions, told: of `Judged`. faulty: [N] bool, rows that no score
    saves. strata: [N] int or None. options: the set's `config.quality`; used: the kind of features that gave its quality, which must
    read the policy.
    """

    rows: Rows
    model: LanguageModel
    directions: np.ndarray
    told: np.ndarray
    faulty: np.ndarray
    strata: np.ndarray | None
    options: Mapping[str, Any]
    used: str
    seed: int = 0
    tune: Tuner | None = None
    mesh: Any = None

    def __post_init__(self):
        if self.used.removeprefix("sae+") not in OPINIONS:
            raise UserError(f"a set judged by {self.used!r}, which asks no policy, cannot be judged anew: curate with quality.use=auto")

    def __call__(self, params: Any) -> np.ndarray:
        """[N] bool under the policy's parameters."""
        tune = self.tune if self.used.endswith("tuned") else None
        opinions = opinion_columns(
            self.rows, self.model, params, self.options["separator"], told=self.told, tune=tune, seed=self.seed, mesh=self.mesh
        )
        design = joined(self.directions, opinions)[self.used]
        found = fit_labelled_quality({self.used: design}, self.told, use=self.used, reference=self.used, draws=0, seed=self.seed)
        share = quality_drop_share(self.options, self.told)
        return filter_rows(found.values, share, {"fault": self.faulty}, self.strata, found.expected_bad).keep


def quality_drop_share(options: Mapping[str, Any], told: np.ndarray | None) -> float:
    """The share of rows that `curate` drops: options is its `config.quality`."""
    per_bad = options["drop_per_bad"]
    return drop_share(told if per_bad else None, per_bad, options["drop_most"], options["drop_fraction"])
