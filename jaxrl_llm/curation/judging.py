"""The quality stage: features of prompt + answer and of corrupted copies, and the probes between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sae
from jaxrl_llm.curation.baselines import length_tfidf_features
from jaxrl_llm.curation.corruptions import OF_ANSWERS, corrupt_rows
from jaxrl_llm.curation.labels import labels_from_rows
from jaxrl_llm.curation.likelihood import COLUMNS, answer_likelihood
from jaxrl_llm.curation.passes import LanguageModel, Rows, Stages, Views, extract, pooled_views
from jaxrl_llm.curation.probes import ArrayDesign, Design, JoinedDesign
from jaxrl_llm.curation.quality import Quality, answer_length_columns, fit_labelled_quality, fit_quality
from jaxrl_llm.curation.streaming import Results
from jaxrl_llm.curation.texts import answer_tokens, prompt_tokens

JOINED_DIMS = 32  # of the SAE's vectors beside the likelihood columns: with few labels fewer dimensions separate better
Pair = tuple[Design, Design]


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

    def _folder(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def features(self, rows: Rows, name: str) -> Results:
        """Pooled features of prompt + answer."""
        slice_of = answer_tokens(rows, self.model.tokenizer, self.config.quality.separator)
        tokens = (lambda a, b: slice_of(a, b)[0]) if self.with_answers else prompt_tokens(rows, self.model.tokenizer)
        with self.stages.stage(name, len(rows)) as tick:
            return extract(self.model, self.dictionary, tokens, len(rows), self.config, self.mesh, self._folder(name), tick)

    def likelihood(self, rows: Rows, name: str) -> np.ndarray:
        """[N, C]: the policy's likelihood columns, and the answer's length."""
        policy, options = self.policy(), self.config.features
        tokens = answer_tokens(rows, policy.tokenizer, self.config.quality.separator)
        with self.stages.stage("likelihood", len(rows)) as tick:
            columns, _ = answer_likelihood(
                policy.cfg, policy.params, tokens, len(rows), mesh=self.mesh, folder=self._folder(f"{name}-likelihood"),
                batch_tokens=options.batch_tokens, shard_rows=options.shard_rows, progress=tick,
            )  # fmt: skip
        return np.concatenate([columns, answer_length_columns([row.get("answer") for row in rows])], axis=1)

    def designs(self, rows: Rows, views: Views, copies: Rows) -> dict[str, Pair]:
        """Each kind of features for the rows and for their corrupted copies (both the rows' where there are no copies)."""
        again = views.again(self.features(copies, "copies")) if copies else views.designs
        pairs: dict[str, Pair] = {name: (view, again[name]) for name, view in views.designs.items()}
        texts = [row["prompt"] + self.config.quality.separator + (row.get("answer") or "") for row in [*rows, *copies]]
        words = length_tfidf_features(texts)
        pairs["length_tfidf"] = (ArrayDesign(words[: len(rows)]), ArrayDesign(words[len(rows) :]))
        if self.with_answers:
            own = self.likelihood(rows, "answers")
            spoilt = self.likelihood(copies, "copies") if copies else own
            pairs["logp"] = (ArrayDesign(own), ArrayDesign(spoilt))
            directions = views.designs["sae"].directions(JOINED_DIMS, seed=self.config.seed)
            reduced = (view.project(directions) for view in (views.designs["sae"], again["sae"]))
            pairs["sae+logp"] = tuple(JoinedDesign(ArrayDesign(z), logp) for z, logp in zip(reduced, pairs["logp"], strict=True))  # type: ignore[assignment]
        return pairs


def quality_stage(judge: Judge, rows: Rows, prompt_views: Views) -> Quality:
    """A quality score for each row, beside its baselines. Where rows have answers, everything is computed on prompt + answer."""
    config, options = judge.config, judge.config.quality
    use = ("sae+logp" if judge.with_answers else "sae") if options.use == "auto" else options.use
    copies: list[dict[str, Any]] = []
    if not options.labels:
        kinds = [kind for kind in options.corruptions if judge.with_answers or kind not in OF_ANSWERS]
        chosen = np.sort(np.random.default_rng([config.seed, 3]).permutation(len(rows))[: options.samples])
        copies, sources, kind_of = corrupt_rows(rows, chosen, kinds, config.seed)
        if not copies:
            report = {"probes": {}, "used": None, "counts": {"rows": 0, "copies": 0}, "why": "no corruption applies to these rows"}
            return Quality(np.zeros(len(rows)), report)
    views = pooled_views(judge.features(rows, "answers"), config) if judge.with_answers else prompt_views
    pairs = judge.designs(rows, views, copies)
    common = {"use": use, "draws": config.bootstrap, "seed": config.seed}
    with judge.stages.stage("quality", len(pairs) * 6, "fit") as tick:
        if options.labels:
            labels = labels_from_rows(rows, options.labels)
            return fit_labelled_quality({name: own for name, (own, _) in pairs.items()}, labels, tick=tick, **common)
        free = {}
        if "logp" in pairs:
            column = COLUMNS.index("answer_logp_mean")
            free["answer_logp_mean"] = tuple(design.rows(np.arange(len(design)))[:, column] for design in pairs["logp"])
        return fit_quality(pairs, sources, kind_of, free_scores=free, tick=tick, **common)
