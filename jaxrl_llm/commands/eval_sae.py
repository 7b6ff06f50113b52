"""`jaxrl-llm eval --config=configs/sae_eval.py`: dictionaries on a model's activations, one JSON and one page each, side by side."""

from __future__ import annotations

import importlib.metadata
import json
import time
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm import __version__
from jaxrl_llm.config import check_fields
from jaxrl_llm.data.prompts import fill_template
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.run_dir import RunDir, write_json

FOLDER, TOTAL = "saes", "eval.json"  # what the workdir gets beside the run's own files
PACKAGES = ("jax", "numpy", "scikit-learn")


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
    job = None
    records = []
    for name, (source, hook, fingerprint) in dictionaries.items():
        record = finished(folder / f"{name}.json", fingerprint)
        if record is None:
            if job is None:  # not before it is needed: it holds the model
                job = Job(config, texts, labelled, models.load_tokenizer(config.model), cfg)
                job.cfg, job.params = models.load(config.model, dtype=config.dtype)
            record, density = job.evaluate(name, source, hook)
            record |= {"fingerprint": fingerprint, "versions": versions()}
            np.save(folder / f"{name}.density.npy", density)
            write_json(folder / f"{name}.json", record)
        records.append(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        write_report(folder / f"{name}.html", sae_page(records[-1], config.to_dict()))
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


def check_saes(config: Any, cfg: Any) -> dict[str, tuple[str, str, str]]:
    """Short name -> (folder or hub id, tap, fingerprint of its parameters) of each SAE that can be read and fits the model.

    Raises UserError naming the SAE that does not.
    """
    import jax

    import sae
    from jaxrl_llm.curation.features import tree_fingerprint
    from models import ModelError, abstract_params
    from models.taps import parse_name
    from sae.harvest import tap

    found, widths = {}, {}
    for source, name in zip(config.saes, short_names(config.saes), strict=True):
        try:
            d = sae.load(source)
        except sae.SAEError as error:
            raise UserError(f"SAE {source}: {error}") from None
        hook = d.cfg.hook_name or config.hook
        if not hook:
            raise UserError(f"SAE {source} names no tap (hook_name): give the one it was trained on with --config.hook=blocks.N.resid_post")
        try:
            kind, _ = parse_name(cfg, hook, "tap")
        except ModelError as error:
            raise UserError(f"SAE {source}: its hook_name is no activation of {config.model}: {error}") from None
        if kind == "attn_probs":
            raise UserError(f"SAE {source}: {hook} is no vector a token; choose another tap")
        if hook not in widths:
            shape = jax.ShapeDtypeStruct((1, 2), np.int32), jax.ShapeDtypeStruct((1,), np.int32)
            widths[hook] = jax.eval_shape(lambda p, t, n, h=hook: tap(cfg, p, t, n, (h,)), abstract_params(cfg), *shape).shape[-1]
        if d.cfg.d_in != widths[hook]:
            raise UserError(f"SAE {source} reads {d.cfg.d_in} dimensions (d_in), but {hook} of {config.model} has {widths[hook]}")
        found[name] = (source, hook, tree_fingerprint(d.params))
    return found


def short_names(sources: tuple[str, ...]) -> list[str]:
    """A file name for each: its last folders, as many as tell it from the others."""
    parts = [[part for part in str(source).replace("\\", "/").split("/") if part not in ("", ".", "..")] for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{i + 1}" for i, name in enumerate(names)]


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
    return f"{record['name']}: {record['sae']['d_sae']} latents on {record['sae']['hook_name']}; {told}"


class Job:
    """The model and the token rows that all SAEs of a run are judged on."""

    def __init__(self, config: Any, texts: list[str], labelled: Any, tokenizer: Any, cfg: Any):
        """Makes what needs no weights; `params` are set before `evaluate`. Raises UserError and SAEError for texts that cannot be used."""
        self.config, self.cfg, self.params, self.tokenizer = config, cfg, None, tokenizer
        self.name = ""
        self.rows = self._tokens(texts)
        self.labelled: Any = None if labelled is None else self._labelled(*labelled)
        self.letters: Any = self._letters() if config.absorption.enabled else None

    def _labelled(self, texts: list[str], labels: list[str]) -> Any:
        """(token rows, labels, train and test row numbers) of the texts with a token."""
        from sae.probing import split

        rows = [row[: self.config.probe.context_size] for row in self._tokens(texts, keep_empty=True)]
        kept = [i for i, count in enumerate(self._counts(rows)) if count]
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
        bos = self.tokenizer.bos_token_id
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows if row or keep_empty]

    def _counts(self, rows: list[list[int]], skip_bos: bool | None = None) -> list[int]:
        from sae.metrics import token_counts

        return token_counts(rows, self.cfg.bos_token_id if (self.config.skip_bos if skip_bos is None else skip_bos) else None)

    def _activations(self, rows: list[list[int]], hook: str, what: str, skip_bos: bool | None = None, context: int | None = None) -> Any:
        import sae

        return sae.harvest_activations(
            self.cfg, self.params, self._bar(rows, what), hook, self.config.batch_rows, context or self.config.context_size,
            skip_bos=self.config.skip_bos if skip_bos is None else skip_bos,
        )  # fmt: skip

    def _bar(self, items: Any, what: str, unit: str = "text") -> Any:
        from tqdm import tqdm

        return tqdm(items, desc=f"{self.name}: {what}", unit=unit, disable=None, mininterval=0.5, leave=False)

    def evaluate(self, name: str, source: str, hook: str) -> tuple[dict[str, Any], np.ndarray]:
        """(everything that is told of one SAE, the share of tokens that each latent fires on)."""
        import sae
        from jaxrl_llm.evals import sae_figures

        self.name, seconds = name, {}
        d = sae.load(source)
        d = d.replace(cfg=d.cfg.replace(hook_name=hook))
        how = {"draws": self.config.bootstrap, "seed": self.config.seed}
        clock = time.monotonic()

        def lap(stage: str) -> None:
            nonlocal clock
            seconds[stage], clock = round(time.monotonic() - clock, 2), time.monotonic()

        found = sae.activation_statistics(d, self._activations(self.rows, hook, "activations"), self._counts(self.rows))
        figures = sae_figures.core_figures(found, **how)
        lap("activations")
        record: dict[str, Any] = {"name": name, "source": source, "sae": described(d), "figures": figures}
        record["data"] = {"source": self.config.data.source, "documents": len(self.rows), "tokens": found.tokens}
        if self.config.model_part:
            sums = sae.splice_sums(
                d, self.cfg, self.params, self._bar(self.rows, "model"), mean_D=found.mean_D, batch_size=self.config.batch_rows,
                context_size=self.config.context_size, skip_bos=self.config.skip_bos,
            )  # fmt: skip
            figures |= sae_figures.model_figures(sums, **how)
            record["data"]["predictions"] = int(sums["predictions"].sum())
            lap("model")
        if self.config.geometry:
            bar = lambda blocks: self._bar(blocks, "geometry", "block")  # noqa: E731
            figures |= {key: {"value": value} for key, value in sae.geometry(d, progress=bar).items()}
            lap("geometry")
        record["density"] = sae_figures.density_histogram(found.density_F)
        if self.labelled is not None:
            record |= self._probes(d, hook, how)
            lap("probes")
        if self.config.absorption.enabled:
            record["absorption"] = self._absorption(d, hook, how)
            lap("absorption")
        return record | {"seconds": seconds}, found.density_F.astype(np.float32)

    def _probes(self, d: Any, hook: str, how: dict[str, int]) -> dict[str, Any]:
        """k-sparse probing and, of three classes or more, targeted probe perturbation."""
        from jaxrl_llm.evals import sae_figures
        from sae.perturbation import targeted_probe_perturbation
        from sae.pooling import pool
        from sae.probing import one_vs_rest, probe_problem

        config, (rows, labels, train, test) = self.config.probe, self.labelled
        pooled = pool(d, self._activations(rows, hook, "labelled texts", context=config.context_size), self._counts(rows))
        problems = one_vs_rest(labels, train, test, seed=self.config.seed)
        results = [result for problem in self._bar(problems, "probes", "class") for result in probe_problem(pooled, problem, config.ks)]
        out: dict[str, Any] = {
            "probe": {
                "source": config.source, "classes": sorted(set(labels)), "train": len(train), "test": len(test),
                "methods": sae_figures.probe_figures(results, test, **how),
            }
        }  # fmt: skip
        if config.perturb and len(set(labels)) > 2:
            found = targeted_probe_perturbation(d, pooled, labels, train, test, ns=config.ns, seed=self.config.seed)
            out["tpp"] = sae_figures.perturbation_figures(found, test, **how)
        return out

    def _absorption(self, d: Any, hook: str, how: dict[str, int]) -> dict[str, Any]:
        """Feature absorption on tokens alone, or where they stand in the texts."""
        from jaxrl_llm.evals import sae_figures
        from sae.absorption import AbsorptionConfig, feature_absorption

        config, (letters, rows, places) = self.config.absorption, self.letters
        x, tokens = self._at(rows, places, hook), np.array([rows[i][j] for i, j in places], int)
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
        for batch in self._activations(rows, hook, "tokens", skip_bos=False):
            taken.append(batch[wanted[(wanted >= done) & (wanted < done + len(batch))] - done])
            done += len(batch)
        return np.concatenate(taken) if taken else np.zeros((0, 1), np.float32)


def described(d: Any) -> dict[str, Any]:
    """What the SAE is, without its parameters."""
    keys = ("architecture", "d_in", "d_sae", "k", "normalize_activations", "hook_name", "model_name", "context_size", "dtype")
    return {key: getattr(d.cfg, key, None) for key in keys}
