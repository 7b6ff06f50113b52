"""What curation knows of a pool, by several kinds of features side by side: the comparison that SAERL stands on.

A trained SAE ("sae") stands beside the same SAE never trained ("random_sae"), the activations that both read ("dense") and length
with TF-IDF of the text ("tfidf"). Each gives clusters, a difficulty and a quality to every row by the same code, so that whatever
differs downstream is due to the features. Each piece is a function of rows and arrays; `measure` puts them together.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

import sae
from jaxrl_llm.curation import difficulty, diversity, quality, schedule
from jaxrl_llm.curation.baselines import length_features, length_tfidf_features
from jaxrl_llm.curation.corruptions import CORRUPTIONS, corrupt_rows
from jaxrl_llm.curation.feature_space import FeatureSpace, dense_space
from jaxrl_llm.curation.features import extract_features, random_dictionary
from jaxrl_llm.curation.judging import JOINED_DIMS
from jaxrl_llm.curation.likelihood import Tuner, policy_opinion
from jaxrl_llm.curation.passes import LanguageModel, Rows
from jaxrl_llm.curation.probes import ArrayDesign, Design, JoinedDesign, SliceDesign
from jaxrl_llm.curation.streaming import write_npz
from jaxrl_llm.curation.texts import answer_tokens, prompt_tokens
from jaxrl_llm.run_dir import to_plain, write_json

KINDS = ("sae", "random_sae", "dense", "tfidf")
ALONE = ("sae_alone", "tfidf_alone")  # qualities by features without what the policy thinks of the answers
POLICY_KINDS = ("logprob", "tuned")  # qualities by the policy alone: its log-probabilities; these and their gain from tuning
GROUPS = ("reduced", "clusters", "difficulty", "quality", "truth")


@dataclasses.dataclass
class Signals:
    """What is known of N rows. report: the figures of every probe, beside its baselines."""

    reduced: dict[str, np.ndarray]  # kind of features -> [N, dims], rows of mean squared norm 1
    clusters: dict[str, np.ndarray]  # kind -> [N] int
    difficulty: dict[str, np.ndarray]  # kind -> [N] expected fail rate
    quality: dict[str, np.ndarray]  # kind, or one of POLICY_KINDS or ALONE -> [N], higher is better
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    truth: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of generated rows, to score the rest by

    def save(self, folder: str | Path) -> None:
        """signals.npz (arrays GROUP/KIND) and signals.json (the report), each written in one rename; the report last."""
        arrays = {f"{group}/{kind}": value for group in GROUPS for kind, value in getattr(self, group).items()}
        write_npz(Path(folder) / "signals.npz", arrays)
        write_json(Path(folder) / "signals.json", to_plain(self.report))

    @classmethod
    def load(cls, folder: str | Path) -> Signals | None:
        """What `save` wrote, or None where it did not finish."""
        report = Path(folder) / "signals.json"
        if not report.exists():
            return None
        groups: dict[str, dict[str, np.ndarray]] = {group: {} for group in GROUPS}
        with np.load(Path(folder) / "signals.npz", allow_pickle=False) as arrays:
            for name in arrays.files:
                group, kind = name.split("/")
                groups[group][kind] = arrays[name]
        return cls(**groups, report=json.loads(report.read_text()))


@dataclasses.dataclass(frozen=True)
class SignalOptions:
    """How signals are made; the names are those of the config."""

    hook: str | None = None  # tap; None = the SAE's own
    pooling: tuple[str, ...] = ("max_log1p", "last")  # poolings of the latents, side by side
    remove_length: bool = True  # regress length out of the features
    dims: int = 256  # of the truncated SVD under clusters and adaptive schedules
    clusters: int = 32  # K of the spherical k-means
    restarts: int = 4  # of the k-means
    answers: bool = True  # the quality probe reads prompt + answer and the policy's log-probabilities, not the prompt alone
    separator: str = " "  # between prompt and answer
    copies: int = 1000  # corrupted copies that the quality probe learns from where nobody labelled rows
    models: tuple[str, ...] = ("ridge",)  # probes of difficulty
    draws: int = 1000  # bootstrap resamples of the intervals
    seed: int = 0


def measure(
    rows: Rows,
    model: LanguageModel,
    policy: LanguageModel,
    dictionary: sae.Dictionary,
    fail_rates: np.ndarray,
    told: np.ndarray | None,
    *,
    kinds: Sequence[str] = KINDS,
    filters: Sequence[str] = ("sae",),
    options: SignalOptions | None = None,
    tune: Tuner | None = None,
    mesh: Any = None,
    folder: Path | None = None,
) -> Signals:
    """Clusters, difficulty and quality of `rows` by each kind of features.

    model: what the dictionary reads; it tokenises the texts itself and need not be the policy. fail_rates: [N] measured on a few
    rows, NaN elsewhere. told: [N] 1 for rows fit to train on, 0 for others, NaN unknown; None learns quality from corrupted
    copies of the rows. kinds: those that get a difficulty of their own. filters: kinds, POLICY_KINDS or ALONE that get a quality.
    tune: fine-tunes the policy, so that the quality probe can read what answers gain by it where rows are told; None = it does not.
    folder: where features are kept as they are made, so that a stopped run goes on; None = in memory.
    """
    options = options or SignalOptions()
    views = feature_views(rows, model, dictionary, options, mesh, folder=folder)
    out = Signals({}, {}, {}, {})
    for kind in KINDS:
        view = views[kind]
        out.reduced[kind] = _reduce(view, options.dims)
        found = diversity.cluster(out.reduced[kind], min(options.clusters, len(rows)), n_init=options.restarts, seed=options.seed, mesh=mesh)
        out.clusters[kind] = found.labels
    fit = functools.partial(difficulty.fit_difficulty, labels=fail_rates, models=options.models, seed=options.seed)
    fitted = fit(views, use="sae", draws=options.draws)
    out.difficulty["sae"], out.report["difficulty"] = fitted.values, fitted.report
    for kind in sorted({*kinds} - {"sae"}):
        out.difficulty[kind] = fit({kind: views[kind]}, use=kind, reference=kind, draws=0).values
    probe = QualityProbe(rows, model, policy, dictionary, told, views, options, tune, mesh, folder)
    out.quality, out.report["quality"] = probe.table(policy.params, filters)
    return out


def _reduce(view: Any, dims: int) -> np.ndarray:
    """[N, dims] the first directions of a view, rows of mean squared norm 1."""
    return view.reduce(dims) if hasattr(view, "reduce") else schedule.reduce_features(view.x, dims)


def feature_views(
    rows: Rows, model: LanguageModel, dictionary: sae.Dictionary, options: SignalOptions, mesh: Any = None, *, answers: bool = False,
    folder: Path | None = None,
) -> dict[str, Design]:
    """A Design over the rows for each of KINDS, and for the baselines "length" and "length_tfidf"; of prompt + answer if `answers`.
    folder: where the pooled features are kept, and found again."""
    tokenised = answer_tokens(rows, model.tokenizer, options.separator)
    tokens = (lambda a, b: tokenised(a, b)[0]) if answers else prompt_tokens(rows, model.tokenizer)
    texts = [f"{row['prompt']}{options.separator}{row.get('answer') or ''}" if answers else row["prompt"] for row in rows]
    dictionaries = {"sae": dictionary, "random_sae": random_dictionary(dictionary, options.seed)}
    found = [
        extract_features(
            model.cfg, model.params, dictionaries, tokens, len(rows), hook=options.hook, pooling=pooling,
            dense=("dense_mean", "dense_last") if i == 0 else (), mesh=mesh, model_name=model.name,
            folder=None if folder is None else folder / pooling,
        )
        for i, pooling in enumerate(options.pooling)
    ]  # fmt: skip
    lengths, views = found[0].lengths, {}
    for name in dictionaries:
        pooled = sparse.hstack([results.csr(name) for results in found], format="csr")
        views[name] = FeatureSpace.fit(pooled, lengths, remove_length=options.remove_length).view(pooled, lengths)
    dense = np.concatenate([found[0].dense("dense_mean"), found[0].dense("dense_last")], axis=1)
    views["dense"] = dense_space(dense, lengths, remove_length=options.remove_length)
    views["tfidf"] = views["length_tfidf"] = ArrayDesign(length_tfidf_features(texts))
    views["length"] = ArrayDesign(length_features(texts))
    return views


class QualityProbe:
    """Tells rows fit to train on from others, by features of prompt + answer and by what a policy thinks of the answer.

    The features stay those of the feature model; the policy's parameters are an argument of `fit`, since a policy that has
    learnt tells better. Arguments as for `measure`; views: `feature_views` of the prompts.
    """

    def __init__(
        self, rows: Rows, model, policy, dictionary, told: np.ndarray | None, views, options: SignalOptions, tune: Tuner | None = None,
        mesh: Any = None, folder: Path | None = None,
    ):  # fmt: skip
        copies: list[dict[str, Any]] = []
        if told is None:
            chosen = np.sort(np.random.default_rng([options.seed, 3]).permutation(len(rows))[: options.copies])
            copies, self.sources, self.kind_of = corrupt_rows(rows, chosen, list(CORRUPTIONS), options.seed)
        self.n, self.told, self.policy, self.options, self.tune, self.mesh = len(rows), told, policy, options, tune, mesh
        self.everything = [*rows, *copies]
        if options.answers or copies:
            judged = None if folder is None else folder / "judged"  # with the copies, and with the answers: not the features of the prompts
            views = feature_views(self.everything, model, dictionary, options, mesh, answers=options.answers, folder=judged)
        self.views = dict(views)
        if options.answers:
            self.views |= {kind: ArrayDesign(_reduce(views[kind], JOINED_DIMS)) for kind in KINDS}
        self.alone = {"sae_alone": views["sae"], "tfidf_alone": views["tfidf"]}

    def designs(self, params: Any, tune: bool = True) -> dict[str, Design]:
        """A Design over rows and copies for each of KINDS and of ALONE, for "logprob", "length_tfidf" and "length"; for "tuned" where it is.

        What the policy thinks of the answers is joined to every kind alike, so that kinds differ by their features only.

        tune: False leaves the tuning out, for a quality that does not read it.
        """
        opinion = policy_opinion(
            self.policy.cfg, params, answer_tokens(self.everything, self.policy.tokenizer, self.options.separator), len(self.everything),
            told=self.told, tune=self.tune if tune and self.options.answers else None, seed=self.options.seed, mesh=self.mesh,
        )  # fmt: skip
        policy = {{"logp": "logprob"}.get(name, name): ArrayDesign(columns) for name, columns in opinion.items()}
        best = policy.get("tuned", policy["logprob"])
        out = {kind: JoinedDesign(self.views[kind], best) if self.options.answers else self.views[kind] for kind in KINDS}
        return out | self.alone | policy | {name: self.views[name] for name in ("length_tfidf", "length")}

    def table(self, params: Any, kinds: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """({kind: [N] quality} of "sae", of POLICY_KINDS, ALONE and `kinds`, the report of all probes beside "sae")."""
        designs = self.designs(params)
        first = self._fit("sae", designs, self.options.draws)
        rest = sorted({*(kind for kind in (*POLICY_KINDS, *ALONE) if kind in designs), *kinds} - {"sae"})
        values = {"sae": first.values} | {kind: self._fit(kind, {kind: designs[kind]}, 0).values for kind in rest}
        return values, first.report | {"told": self.told is not None}

    def fit(self, kind: str, params: Any) -> np.ndarray:
        """[N] quality by one kind under the policy's current parameters."""
        designs = self.designs(params, tune=kind == "tuned" or kind in KINDS)
        return self._fit(kind, {kind: designs[kind]}, 0).values

    def _fit(self, kind: str, used: dict[str, Design], draws: int) -> quality.Quality:
        n, stop = self.n, len(self.everything)
        common = dict(use=kind, reference="length_tfidf" if "length_tfidf" in used else kind, draws=draws, seed=self.options.seed)
        if self.told is not None:
            return quality.fit_labelled_quality({name: SliceDesign(d, 0, n) for name, d in used.items()}, self.told, **common)
        pairs = {name: (SliceDesign(d, 0, n), SliceDesign(d, n, stop)) for name, d in used.items()}
        return quality.fit_quality(pairs, self.sources, self.kind_of, **common)
