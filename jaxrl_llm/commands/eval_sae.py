"""`jaxrl-llm eval --config=configs/sae_eval.py`: dictionaries on a model's activations, one JSON and one page each, side by side."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm import __version__
from jaxrl_llm.commands._saes import Source, check_saes, described
from jaxrl_llm.config import check_fields
from jaxrl_llm.data.prompts import fill_template
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.data.texts import special_tokens, token_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, write_json

FOLDER, TOTAL = "saes", "eval.json"  # what the workdir gets beside the run's own files
PACKAGES = ("jax", "numpy", "scikit-learn")
KEPT_BYTES = 1 << 30  # of a stream of activations that stays in memory for further SAEs of the tap; a larger one is harvested anew

# What is not asked of a transcoder, and why.
NO_TPP = "a transcoder writes to another tap than the probes read: its latents cannot be taken out there"
NO_ABSORPTION = "a transcoder writes to another tap than the probe reads: its latents carry no part of it"


def run(config: Any, workdir: str) -> None:
    """Evaluates every SAE of the config that is not finished and writes its JSON and page; see configs/sae_eval.py for the fields.

    Raises:
      UserError: a setting out of its range; no model, SAE or text named; an SAE that cannot be read, or does not fit the model, before the
        model's weights are read; labelled texts without two classes; and what reading, loading, harvesting and measuring raise.
    """
    check(config)
    texts = read_texts(config.data)
    labelled = read_labelled(config.probe)

    import models
    from jaxrl_llm.report import write_report
    from jaxrl_llm.report.sae_eval import comparison_page, sae_page
    from models.hf import read_config
    from models.hub import resolve

    cfg = read_config(resolve(config.model, ("*.json",)))
    dictionaries = check_saes(config, cfg)
    run_dir = RunDir(workdir, config, kind="eval_sae", owns=(FOLDER, TOTAL))
    folder = run_dir.path / FOLDER
    folder.mkdir(exist_ok=True)
    pending = {name: one for name, one in dictionaries.items() if finished(folder / f"{name}.json", one.fingerprint) is None}
    if pending:  # not before it is needed: the job holds the model
        job = Job(config, texts, labelled, models.load_tokenizer(config.model), cfg, [one.taps for one in pending.values()])
        job.cfg, job.params = models.load(config.model, dtype=config.dtype)
        for name, one in sorted(pending.items(), key=lambda item: item[1].taps):  # what they share of a tap is kept for one tap at a time
            record, arrays = job.evaluate(name, one)
            record |= {"fingerprint": one.fingerprint, "versions": versions()}
            for what, array in arrays.items():
                np.save(folder / f"{name}.{what}.npy", array)
            write_json(folder / f"{name}.json", record)
    records = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in dictionaries]
    for record in records:
        write_report(folder / f"{record['name']}.html", sae_page(record, config.to_dict()))
    write_json(run_dir.path / TOTAL, {"kind": "eval_sae", "model": config.model, "saes": records, "versions": versions()})
    page = run_dir.path / "report.html"
    write_report(page, comparison_page(records, config.to_dict(), run_dir.path.resolve().name))
    for record in records:
        print(summary_line(record))
    print(f"{run_dir.path / TOTAL}\nreport: {page}")


def check(config: Any) -> None:
    """Raises UserError for a config that could not be run to its end, before anything is read."""
    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    if not any(config.saes):
        raise UserError("no SAE: name folders or hub ids with --config.saes=...,...")
    if not all(config.saes) or len(set(config.saes)) < len(config.saes):
        raise UserError(f"config key 'saes' is {tuple(config.saes)}: an entry is empty or named twice")
    if not config.data.source:
        raise UserError("no text: name a file or data set with --config.data.source=...")
    choices = {"dtype": ("float32", "bfloat16"), "data.on_bad": ("error", "skip")}
    ones = ("data.limit", "batch_rows", "bootstrap", "probe.limit", "probe.context_size", "absorption.max_k", "absorption.least")
    ranges = {
        **dict.fromkeys(ones, (1, inf)),
        "context_size": (2, inf),  # of one token nothing is predicted
        "skip_first": (0, config.context_size - 1),
        "seed": (0, inf),
        "probe.min_rows": (2, inf),
        "probe.test_share": (1e-6, 1 - 1e-6),
        "absorption.test_share": (1e-6, 1 - 1e-6),
        "absorption.occurrences": (0, inf),
        "absorption.f1_jump": (0, 1),
        "absorption.cosine": (0, 1),
        "absorption.full_cosine": (0, 1),
        "absorption.share": (0, 1),
        "absorption.max_absorbing": (0, inf),
    }
    check_fields(config, choices, ranges)
    for key in ("ks", "ns"):
        if not config.probe[key] or min(config.probe[key]) < 1:
            raise UserError(f"config key 'probe.{key}' is {tuple(config.probe[key])}: give numbers of 1 or more")


def read_texts(data: Any) -> list[str]:
    """The texts that the figures are measured on."""
    rows = read_rows(
        data.source, parse_fields(data.fields), split=data.split, limit=data.limit, on_bad=data.on_bad, separator=data.separator
    )
    return [row["prompt"] if data.template == "none" else fill_template(data.template, row) for row in rows]


def read_labelled(probe: Any) -> tuple[list[str], list[str]] | None:
    """(texts, labels) for probes, classes with fewer than min_rows texts left out; None where no source is named."""
    if not probe.source:
        return None
    rows = read_rows(probe.source, parse_fields(probe.fields), split=probe.split, limit=probe.limit, required=("prompt", "label"))
    counts: dict[str, int] = {}
    for row in rows:
        counts[str(row["label"])] = counts.get(str(row["label"]), 0) + 1
    kept = {label for label, count in counts.items() if count >= probe.min_rows}
    if len(kept) < 2:
        most = ", ".join(f"{label} ({count})" for label, count in sorted(counts.items(), key=lambda item: -item[1])[:5])
        raise UserError(f"{probe.source}: fewer than two classes with {probe.min_rows} texts (probe.min_rows): {most}; label more, or lower it")
    chosen = [row for row in rows if str(row["label"]) in kept]
    return [row["prompt"] for row in chosen], [str(row["label"]) for row in chosen]


def finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier start of this run wrote of the SAE, unless it has changed since; None where it must be evaluated."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["fingerprint"] == fingerprint else None


def versions() -> dict[str, str]:
    """Of ourselves and of what the figures hang on."""
    return {"jaxrl_llm": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def summary_line(record: dict[str, Any]) -> str:
    """The figures of one SAE that a person wants to see first."""
    figures, names = record["figures"], ("l0", "explained_variance", "ce_recovered", "kl_recovered", "dead_share")
    told = ", ".join(f"{name} {figures[name]['value']:.3f}" for name in names if name in figures and figures[name]["value"] is not None)
    place = " to ".join(record["sae"][key] for key in ("hook_name", "hook_name_out") if record["sae"].get(key))
    return f"{record['name']}: {record['sae']['d_sae']} latents on {place}; {told}"


class Job:
    """The model and the token rows that all SAEs of a run are judged on."""

    def __init__(self, config: Any, texts: list[str], labelled: Any, tokenizer: Any, cfg: Any, taps: Sequence[tuple[str, ...]] = ()):
        """Makes what needs no weights; `params` are set before `evaluate`. taps: of each SAE that will be evaluated. Raises UserError and
        SAEError for texts that cannot be used."""
        self.config, self.cfg, self.params, self.tokenizer = config, cfg, None, tokenizer
        self.name = ""
        self.special = special_tokens(tokenizer) if config.drop_special else []
        self.taps, self.shared, self.kept = Counter(taps), (), {}  # of the taps in `shared`: what no SAE changes, by what it is
        self.rows = self._tokens(texts)
        self.labelled: Any = None if labelled is None else self._labelled(*labelled)
        self.letters: Any = self._letters() if config.absorption.enabled else None

    def _labelled(self, texts: list[str], labels: list[str]) -> Any:
        """(token rows, labels, train and test row numbers) of the texts with a token."""
        from sae.probing import split

        rows = [row[: self.config.probe.context_size] for row in self._tokens(texts, keep_empty=True)]
        kept = [i for i, count in enumerate(self._counts(rows, self.config.probe.context_size)) if count]
        rows, labels = [rows[i] for i in kept], [labels[i] for i in kept]
        parts = split(labels, [tuple(row) for row in rows], test_share=self.config.probe.test_share, seed=self.config.seed)
        return rows, labels, *parts

    def _letters(self) -> Any:
        """(token id -> first letter, token rows, places of the tokens in them); UserError where too few letters have enough tokens."""
        from sae.absorption import first_letters

        config = self.config.absorption
        letters = first_letters(self.tokenizer.get_vocab(), words_only=config.words_only)
        rows, places = self._letter_rows(letters, config.occurrences)
        words: dict[str, set[int]] = {}
        for i, j in places:
            words.setdefault(letters[rows[i][j]], set()).add(rows[i][j])
        if sum(len(own) > 1 for own in words.values()) < 2:
            raise UserError(
                f"config key 'absorption.enabled': the vocabulary of {self.config.model} has {len(words)} letter(s) that begin two tokens; "
                "leave it off, or set absorption.words_only=False"
            )
        return letters, rows, places

    def _tokens(self, texts: list[str], keep_empty: bool = False) -> list[list[int]]:
        """Token ids of each text, opened by BOS where the tokenizer has one; texts without a token are left out."""
        rows = token_rows(texts, self.tokenizer)
        return [row for row, text in zip(rows, texts, strict=True) if keep_empty or (row and text)]

    def _counts(self, rows: list[list[int]], context: int) -> list[int]:
        """How many activations `_activations` gives of each row, run in pieces of `context` tokens."""
        from sae.metrics import token_counts

        return token_counts(rows, min(context, self.cfg.max_position), self.config.skip_first, self.special)

    def _activations(self, rows: list[list[int]], taps: tuple[str, ...], what: str, *, whole: bool = False, context: int | None = None) -> Any:
        """Arrays of the rows' activations; whole: with every position. They are kept where another SAE of the taps is to come and they are
        few enough."""
        import sae

        key = (what, *taps)
        if key in self.kept:
            return self.kept[key]
        stream = sae.harvest_activations(
            self.cfg, self.params, self._bar(rows, what), taps, self.config.batch_rows, context or self.config.context_size,
            skip_first=0 if whole else self.config.skip_first, drop_tokens=() if whole else self.special,
        )  # fmt: skip
        return self._keeping(key, stream) if self.taps[self.shared] > 1 else stream

    def _keeping(self, key: tuple[str, ...], stream: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The stream, which is kept at its end unless it is too large."""
        parts, size = [], 0
        for batch in stream:
            size += batch.nbytes
            if size <= KEPT_BYTES:
                parts.append(batch)
            else:
                parts.clear()
            yield batch
        if size <= KEPT_BYTES:
            self.kept[key] = parts

    def _bar(self, items: Any, what: str, unit: str = "text") -> Any:
        from tqdm import tqdm

        return tqdm(items, desc=f"{self.name}: {what}", unit=unit, disable=None, mininterval=0.5, leave=False)

    def evaluate(self, name: str, one: Source) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(everything that is told of one SAE; density: the share of tokens that each latent fires on, [F], density_limits: of each, [2, F])."""
        import sae
        from jaxrl_llm.evals import sae_figures

        self.name, seconds, d = name, {}, one.load()
        if one.taps != self.shared:
            self.shared, self.kept = one.taps, {}
        how = {"draws": self.config.bootstrap, "seed": self.config.seed}
        clock = time.monotonic()

        def lap(stage: str) -> None:
            nonlocal clock
            seconds[stage], clock = round(time.monotonic() - clock, 2), time.monotonic()

        found = sae.activation_statistics(d, self._activations(self.rows, one.taps, "activations"), self._counts(self.rows, self.config.context_size))
        figures, limits = sae_figures.core_figures(found, **how)
        lap("activations")
        record: dict[str, Any] = {"name": name, "source": one.source, "sae": described(d), "figures": figures}
        record["data"] = {"source": self.config.data.source, "documents": len(self.rows), "tokens": found.tokens}
        if self.config.model_part:
            sums = sae.splice_sums(
                d, self.cfg, self.params, self._bar(self.rows, "model"), mean_D=found.mean_D, batch_size=self.config.batch_rows,
                context_size=self.config.context_size, skip_first=self.config.skip_first, drop_tokens=self.special, ablations=self.kept.get("sums"),
            )  # fmt: skip
            self.kept["sums"] = sums
            figures |= sae_figures.model_figures(sums, **how)
            record["data"]["predictions"] = int(sums["predictions"].sum())
            lap("model")
        if self.config.geometry:
            bar = lambda blocks: self._bar(blocks, "geometry", "block")  # noqa: E731
            figures |= {key: {"value": value} for key, value in sae.geometry(d, progress=bar).items()}
            lap("geometry")
        record["density"] = sae_figures.density_histogram(found.density_F)
        if self.labelled is not None:
            record |= self._probes(d, how)
            lap("probes")
        if self.config.absorption.enabled and d.cfg.d_out is None:
            record["absorption"] = self._absorption(d, how)
            lap("absorption")
        if left_out := self._left_out(d):
            record["left_out"] = left_out
        arrays = {"density": found.density_F, "density_limits": limits}
        return record | {"seconds": seconds}, {what: array.astype(np.float32) for what, array in arrays.items()}

    def _left_out(self, d: Any) -> dict[str, str]:
        """What the config asks for and this SAE has no answer to, with the reason."""
        if d.cfg.d_out is None:
            return {}
        asked = {"tpp": self.labelled is not None and self.config.probe.perturb, "absorption": self.config.absorption.enabled}
        return {name: why for name, why in (("tpp", NO_TPP), ("absorption", NO_ABSORPTION)) if asked[name]}

    def _probes(self, d: Any, how: dict[str, int]) -> dict[str, Any]:
        """k-sparse probing of what the SAE reads and, of three classes or more, targeted probe perturbation."""
        from jaxrl_llm.evals import sae_figures
        from sae.perturbation import targeted_probe_perturbation
        from sae.pooling import pool
        from sae.probing import one_vs_rest, probe_problem

        config, (rows, labels, train, test) = self.config.probe, self.labelled
        stream = self._activations(rows, (d.cfg.hook_name,), "labelled texts", context=config.context_size)
        pooled = pool(d, stream, self._counts(rows, config.context_size))
        problems = one_vs_rest(labels, train, test, seed=self.config.seed)
        results = [result for problem in self._bar(problems, "probes", "class") for result in probe_problem(pooled, problem, config.ks)]
        out: dict[str, Any] = {
            "probe": {
                "source": config.source, "classes": sorted(set(labels)), "train": len(train), "test": len(test),
                "methods": sae_figures.probe_figures(results, test, **how),
            }
        }  # fmt: skip
        if config.perturb and len(set(labels)) > 2 and d.cfg.d_out is None:
            found = targeted_probe_perturbation(d, pooled, labels, train, test, ns=config.ns, seed=self.config.seed)
            out["tpp"] = sae_figures.perturbation_figures(found, test, **how)
        return out

    def _absorption(self, d: Any, how: dict[str, int]) -> dict[str, Any]:
        """Feature absorption on tokens alone, or where they stand in the texts."""
        from jaxrl_llm.evals import sae_figures
        from sae.absorption import AbsorptionConfig, feature_absorption

        config, (letters, rows, places) = self.config.absorption, self.letters
        x, tokens = self._at(rows, places, d.cfg.hook_name), np.array([rows[i][j] for i, j in places], int)
        settings = {key: config[key] for key in ("max_k", "f1_jump", "cosine", "full_cosine", "share", "max_absorbing", "least")}
        found = feature_absorption(
            d, x, [letters[int(token)] for token in tokens], tokens, cfg=AbsorptionConfig(**settings), test_share=config.test_share,
            seed=self.config.seed, progress=lambda known: self._bar(known, "absorption", "letter"),
        )  # fmt: skip
        return {"rows": len(tokens), "tokens": len(set(tokens.tolist())), **sae_figures.absorption_table(found, tokens, **how)}

    def _letter_rows(self, letters: dict[int, str], occurrences: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """(rows of token ids, (row, position) of each token whose first letter is asked for)."""
        bos = self.tokenizer.bos_token_id
        if not occurrences:
            rows = [[token] if bos is None else [bos, token] for token in sorted(letters) if token < self.cfg.vocab_size]
            return rows, [(i, len(row) - 1) for i, row in enumerate(rows)]
        seen: dict[int, int] = {}
        places = []
        for i, row in enumerate(self.rows):
            for j, token in enumerate(row):
                if token in letters and seen.get(token, 0) < occurrences:
                    seen[token] = seen.get(token, 0) + 1
                    places.append((i, j))
        return self.rows, places

    def _at(self, rows: list[list[int]], places: list[tuple[int, int]], hook: str) -> np.ndarray:
        """[places, D] activations at the positions, which are in order."""
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        wanted, taken, done = np.array([starts[i] + j for i, j in places], int), [], 0
        for batch in self._activations(rows, (hook,), "tokens", whole=True):
            taken.append(batch[wanted[(wanted >= done) & (wanted < done + len(batch))] - done])
            done += len(batch)
        return np.concatenate(taken) if taken else np.zeros((0, 1), np.float32)

