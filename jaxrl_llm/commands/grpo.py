"""`jaxrl-llm grpo`: trains a policy by GRPO and writes it as a Hugging Face folder."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.schedule import OfflineSchedule, Signals, TrainabilityBand, make_schedule
from jaxrl_llm.data.prompts import PromptBatch, tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import registry
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh

FOLDER = "policy"  # of the trained policy, inside the workdir
VECTORS = "vectors.npz"  # of a curate run: ids and reduced feature vectors of its rows


def run(config: Any, workdir: str) -> None:
    """Reads, trains, evaluates and exports; see configs/grpo.py for the fields.

    Raises:
      UserError: no model, no prompts or two sources of them, an unknown reward or schedule; and what reading and training raise.
    """
    import models
    from jaxrl_llm.train.config import GRPOConfig, check_grpo, from_mapping
    from jaxrl_llm.train.loop import train_grpo

    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    settings = from_mapping(GRPOConfig, config.train)
    check_grpo(settings)
    reward = registry.get_reward(config.reward.name, **parse_options("reward.options", config.reward.options))
    rows, curated = _training_rows(config)
    sets = {name: _read(config, source, config.eval_limit) for name, source in parse_evals(config.evals).items()}
    for each in (rows, *sets.values()):
        registry.validate_rows(reward, each)
    run_dir = RunDir(workdir, config, kind="grpo", owns=(FOLDER,))
    mesh = parse_mesh(config.mesh)
    cfg, params = models.load(config.model, dtype=config.dtype, mesh=mesh)
    tokenizer = models.load_tokenizer(config.model)

    def tokenised(rows) -> PromptBatch:
        return tokenise_prompts(rows, tokenizer, max_length=config.max_prompt_tokens, template=config.template, overflow=config.overflow)

    prompts = tokenised(rows)
    if prompts.dropped or prompts.truncated:
        print(f"prompts longer than {config.max_prompt_tokens} tokens: {prompts.dropped} left out, {prompts.truncated} shortened")
    schedule = _schedule(config, prompts, curated)
    evals = {name: tokenised(rows) for name, rows in sets.items()}
    trained, summary = train_grpo(cfg, params, tokenizer, prompts, reward, schedule, settings, run_dir, evals, mesh=mesh)
    models.save(run_dir.path / FOLDER, cfg, trained, tokenizer_from=config.model)
    if run_dir.is_writer:
        _tell(summary, run_dir)


def parse_options(field: str, text: str) -> dict[str, Any]:
    """Keyword arguments from a JSON object; raises UserError for anything else, naming the config field."""
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"config key '{field}' is no JSON ({error}): write an object such as '{{\"name\": 1}}'") from None
    if not isinstance(options, dict):
        raise UserError(f"config key '{field}' must be a JSON object such as '{{\"name\": 1}}', got {text}")
    return options


def parse_evals(text: str) -> dict[str, str]:
    """"name=source,..." -> {name: source}; raises UserError for an entry without a name, or a name that comes twice."""
    sets: dict[str, str] = {}
    for entry in text.split(",") if text.strip() else []:
        name, equals, source = (part.strip() for part in entry.partition("="))
        if not (name and equals and source):
            raise UserError(f"evals '{text}': '{entry}' is not NAME=SOURCE, such as test=test.jsonl")
        if name in sets:
            raise UserError(f"evals '{text}': the name '{name}' comes twice")
        sets[name] = source
    return sets


def _read(config: Any, source: str, limit: int | None) -> list[dict[str, Any]]:
    data = config.data
    source, _, split = source.rpartition("@") if "@" in source else (source, "", data.split)
    return read_rows(source, parse_fields(data.fields), split=split, limit=limit, on_bad=data.on_bad)


def _training_rows(config: Any) -> tuple[list[dict[str, Any]], CuratedSet | None]:
    data = config.data
    if bool(data.source) == bool(data.curated):
        found = "both are given" if data.source else "neither is given"
        raise UserError(f"training prompts come from data.source or from data.curated: {found}")
    if data.source:
        return _read(config, data.source, data.limit), None
    curated = CuratedSet.read(_set_folder(data.curated))
    kept = np.flatnonzero(curated.keep)
    order = kept[np.argsort(curated.order[kept])][: data.limit]
    return [curated.rows[i] for i in order], curated


def _set_folder(name: str) -> Path:
    """The folder of a curated set, given as such or as the workdir of the curate run."""
    folder = Path(name).expanduser()
    manifests = [place / "manifest.json" for place in (folder, folder / "curated")]
    return folder / "curated" if manifests[1].is_file() and not manifests[0].is_file() else folder


def _schedule(config: Any, prompts: PromptBatch, curated: CuratedSet | None):
    """The order of the prompts. A curated set is gone through in its own order, epoch after epoch, unless a kind is named."""
    size, seed = config.schedule.batch_prompts, config.train.seed
    kind = config.schedule.kind or ("order" if curated is not None else "shuffled")
    options = parse_options("schedule.options", config.schedule.options)
    if kind == "shuffled" and not options:
        return ShuffledSchedule(len(prompts), size, seed)
    if curated is None:
        raise UserError(f"schedule.kind '{kind}' needs clusters and difficulties: give data.curated, a folder of `jaxrl-llm curate`")
    place = {row["id"]: i for i, row in enumerate(curated.rows)}
    chosen = np.array([place[name] for name in prompts.ids])
    difficulty, cluster = curated.difficulty[chosen], curated.cluster[chosen]
    if kind == "band":
        if options:
            raise UserError("schedule.kind 'band' takes no schedule.options: set the fields of schedule.band")
        return _band(config, prompts.ids, difficulty, cluster)
    if kind == "order":
        if options:
            raise UserError("schedule.kind 'order' takes no options: the curated set says the order")
        as_written = lambda rng, sizes, signals: np.arange(len(prompts))  # noqa: E731
        return OfflineSchedule(np.arange(len(prompts)), Signals(cluster, difficulty), as_written, size, seed)
    return make_schedule(kind, batch_size=size, seed=seed, difficulty=difficulty, cluster=cluster, **options)


def _band(config: Any, ids: Sequence[str], difficulty: np.ndarray, cluster: np.ndarray) -> TrainabilityBand:
    """The schedule that follows the policy. Rows that curation dropped are not among the prompts, so it may draw them all."""
    band, features = config.schedule.band, _vectors(_set_folder(config.data.curated), ids)
    return TrainabilityBand(
        1.0 - difficulty, features, config.schedule.batch_prompts, seed=config.train.seed, cluster=cluster,
        samples_per_prompt=config.train.num_samples, temperature=band.temperature, easy_floor=band.easy_floor, epoch_share=band.epoch_share,
    )  # fmt: skip


def _vectors(folder: Path, ids: Sequence[str]) -> np.ndarray:
    """[prompts, D] the feature vectors that curate wrote for these ids, in its workdir or copied into the set's own folder."""
    found = [path for path in (folder / VECTORS, folder.parent / VECTORS) if path.is_file()]
    if not found:
        raise UserError(
            f"schedule.kind 'band' needs {VECTORS} of the curate run, which is neither in {folder} nor beside it: "
            "copy it there, run curate again, or choose another schedule.kind"
        )
    try:
        with np.load(found[0]) as file:
            names, vectors = file["ids"].tolist(), file["vectors"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{found[0]} holds no ids and vectors of a curate run: run curate again") from None
    place = {name: i for i, name in enumerate(names)}
    missing = [name for name in ids if name not in place]
    if missing:
        raise UserError(
            f"{found[0]} has no vector of {len(missing)} of the {len(ids)} prompts, such as {missing[0]!r}: it belongs to another "
            f"curated set than {folder}; run curate again"
        )
    return vectors[[place[name] for name in ids]]


def _tell(summary: dict[str, Any], run_dir: RunDir) -> None:
    print(f"reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f} (first and last ten steps)")
    for name, found in summary["evals"].items():
        print(f"{name}: accuracy {found['first']:.3f} -> {found['last']:.3f} of {found['n']}")
    print(f"policy: {run_dir.path / FOLDER}   report: jaxrl-llm report --workdir={run_dir.path}")
