"""`jaxrl-llm grpo`: trains a policy by GRPO and writes it as a Hugging Face folder."""

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.commands._policy import FOLDER, OWNS, load_policy, of_step, save_policy
from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.judging import Refilter
from jaxrl_llm.curation.passes import LanguageModel
from jaxrl_llm.curation.processes import from_first
from jaxrl_llm.curation.schedule import OfflineSchedule, Signals, TrainabilityBand, make_schedule
from jaxrl_llm.data.prompts import PromptBatch, tokenise_prompts
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import registry
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_mesh

Asked = tuple[LanguageModel, Any]  # a policy whose parameters come later, and its mesh
VECTORS = "vectors.npz"  # of a curate run: ids, reduced feature vectors, and what it judged its rows by


def run(config: Any, workdir: str) -> None:
    """Reads, trains, evaluates and exports; see configs/grpo.py for the fields.

    Raises:
      UserError: no model, no prompts or two sources of them, an unknown reward or schedule; and what reading and training raise.
    """
    from jaxrl_llm.train.checks import check_grpo, check_parts
    from jaxrl_llm.train.config import GRPOConfig, from_mapping
    from jaxrl_llm.train.loop import train_grpo

    settings = from_mapping(GRPOConfig, config.train)
    check_grpo(settings)
    check_parts(settings, config.schedule.batch_prompts)
    train_policy(config, workdir, "grpo", settings, train_grpo)


def train_policy(config: Any, workdir: str, kind: str, settings: Any, train: Callable[..., tuple[Any, dict[str, Any]]]) -> None:
    """What every verb that trains on the policy's own samples does around `train` (arguments and result of `loop.train_grpo`). kind: of
    the run directory. settings: of the training, checked."""
    import models
    from jaxrl_llm.train.checks import check_dtype

    check_dtype(config.dtype)
    if not config.model:
        raise UserError("no model: name a Hugging Face folder or hub id with --config.model=...")
    reward = registry.get_reward(config.reward.name, **parse_options("reward.options", config.reward.options))
    rows, curated = _training_rows(config)
    sets = {name: _read(config, source, config.eval_limit) for name, source in parse_evals(config.evals).items()}
    for each in (rows, *sets.values()):
        registry.validate_rows(reward, each)
    run_dir = RunDir(workdir, config, kind=kind, owns=OWNS)
    mesh = parse_mesh(config.mesh)
    tokenizer = models.load_tokenizer(config.model)  # before the weights, which take longer to come
    compares = settings.loss.kl is not None if kind == "grpo" else settings.loss.needs_reference
    cfg, params = load_policy(config, mesh, settings.lora, run_dir if compares or settings.lora.rank else None)

    def tokenised(rows) -> PromptBatch:
        return tokenise_prompts(rows, tokenizer, max_length=config.max_prompt_tokens, template=config.template, overflow=config.overflow)

    prompts = tokenised(rows)
    if prompts.dropped or prompts.truncated:
        print(f"prompts longer than {config.max_prompt_tokens} tokens: {prompts.dropped} left out, {prompts.truncated} shortened")
    schedule = _schedule(config, prompts, curated, (LanguageModel(cfg, None, tokenizer, config.model), mesh))
    evals = {name: tokenised(rows) for name, rows in sets.items()}
    start = [params]
    del params  # handed over: training has its own copy, and keeps this one only where a KL term reads it
    trained, summary = train(cfg, start.pop, tokenizer, prompts, reward, schedule, settings, run_dir, evals, mesh=mesh)
    save_policy(run_dir, cfg, trained, settings.lora, config.model, mesh)
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
    if _refilters(config) and data.limit is not None:
        raise UserError(
            "config key 'data.limit' has no meaning with schedule.band.refilter_every, which may bring back any row of the curated set: curate "
            "fewer rows, or leave one of them out"
        )
    curated = CuratedSet.read(_set_folder(data.curated))
    kept = np.flatnonzero(curated.keep)
    order = kept[np.argsort(curated.order[kept])][: data.limit]
    if _refilters(config):  # rows that the filter dropped may come back, those with a fault may not
        sound = ~_kept_arrays(_set_folder(data.curated), [row["id"] for row in curated.rows], "schedule.band.refilter_every")["faulty"]
        order = np.concatenate([order, np.flatnonzero(sound & ~curated.keep)])
    return [curated.rows[i] for i in order], curated


def _refilters(config: Any) -> bool:
    return config.schedule.kind == "band" and config.schedule.band.refilter_every > 0


def _set_folder(name: str) -> Path:
    """The folder of a curated set, given as such or as the workdir of the curate run."""
    folder = Path(name).expanduser()
    manifests = [place / "manifest.json" for place in (folder, folder / "curated")]
    return folder / "curated" if manifests[1].is_file() and not manifests[0].is_file() else folder


def _schedule(config: Any, prompts: PromptBatch, curated: CuratedSet | None, policy: Asked | None = None):
    """The order of the prompts. A curated set is gone through in its own order, epoch after epoch, unless a kind is named. policy: model (its
    parameters are not read) and mesh, for a schedule that asks it."""
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
        return _band(config, curated, chosen, policy)
    if kind == "order":
        if options:
            raise UserError("schedule.kind 'order' takes no options: the curated set says the order")
        as_written = lambda rng, sizes, signals: np.arange(len(prompts))  # noqa: E731
        return OfflineSchedule(np.arange(len(prompts)), Signals(cluster, difficulty), as_written, size, seed)
    return make_schedule(kind, batch_size=size, seed=seed, difficulty=difficulty, cluster=cluster, **options)


def _band(config: Any, curated: CuratedSet, chosen: np.ndarray, policy: Asked | None) -> TrainabilityBand:
    """The schedule that follows the policy, over the rows `chosen` of a curated set."""
    band, folder, ids = config.schedule.band, _set_folder(config.data.curated), [row["id"] for row in curated.rows]
    vectors = _kept_arrays(folder, [ids[i] for i in chosen], "schedule.kind 'band'")["vectors"]
    labels = curated.manifest.get("config", {}).get("difficulty", {}).get("labels")
    if labels != "rollouts":
        what = f"from {labels!r}" if labels else "label-free"
        print(f"difficulty of this set is {what}, no fail rate: the band starts from it as if it were one and learns the rest")
    refilter = None
    if _refilters(config) and policy is not None:
        refilter = _refilter(config, curated, _kept_arrays(folder, ids, "schedule.band.refilter_every"), policy)

    def judged_anew(params: Any) -> np.ndarray:
        return np.asarray(from_first(refilter(params)[chosen]), bool)

    return TrainabilityBand(
        1.0 - curated.difficulty[chosen], vectors, config.schedule.batch_prompts, seed=config.train.seed, cluster=curated.cluster[chosen],
        keep=curated.keep[chosen], samples_per_prompt=config.train.num_samples, temperature=band.temperature, easy_floor=band.easy_floor,
        epoch_share=band.epoch_share, balance=band.balance, refilter=None if refilter is None else judged_anew,
        refilter_every=band.refilter_every,
    )  # fmt: skip


def _refilter(config: Any, curated: CuratedSet, kept: dict[str, np.ndarray], policy: Asked) -> Refilter:
    """Judges all rows of a curated set anew, with the settings that it was curated with."""
    from jaxrl_llm.train.sft import fine_tuner

    model, mesh = policy
    made = curated.manifest["config"]
    return Refilter(
        curated.rows, model, kept["directions"], kept["told"], kept["faulty"], kept.get("strata"), made["quality"],
        curated.manifest["quality"]["used"], seed=made["seed"], tune=fine_tuner(model.cfg, mesh), mesh=mesh,
    )  # fmt: skip


def _kept_arrays(folder: Path, ids: Sequence[str], wanted_by: str) -> dict[str, np.ndarray]:
    """What curate wrote of these ids beside the set (vectors.npz), in its workdir or copied into the set's own folder: "vectors" [prompts, D]
    and, where labels told which rows are sound, "told", "directions", "faulty" and "strata". wanted_by: the setting that needs it."""
    found = [path for path in (folder / VECTORS, folder.parent / VECTORS) if path.is_file()]
    if not found:
        raise UserError(
            f"{wanted_by} needs {VECTORS} of the curate run, which is neither in {folder} nor beside it: "
            "copy it there, run curate again, or choose another schedule.kind"
        )
    try:
        with np.load(found[0]) as file:
            arrays = {name: file[name] for name in file.files}
        names, _ = arrays.pop("ids").tolist(), arrays["vectors"]  # both must be there
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{found[0]} holds no ids and vectors of a curate run: run curate again") from None
    if "refilter" in wanted_by and "told" not in arrays:
        raise UserError(
            f"{wanted_by}: {found[0]} does not say which rows are sound, by which the others are judged anew: curate with "
            "quality.labels=COLUMN (1 for rows fit to train on, 0 for others, empty for unknown), or set it to 0"
        )
    place = {name: i for i, name in enumerate(names)}
    missing = [name for name in ids if name not in place]
    if missing:
        raise UserError(
            f"{found[0]} has no vector of {len(missing)} of the {len(ids)} prompts, such as {missing[0]!r}: it belongs to another "
            f"curated set than {folder}; run curate again"
        )
    at = np.array([place[name] for name in ids])
    return {name: array[at] for name, array in arrays.items()}


def _tell(summary: dict[str, Any], run_dir: RunDir) -> None:
    print(f"reward {summary['reward_first']:.3f} -> {summary['reward_last']:.3f} (first and last ten steps)")
    for name, found in summary["evals"].items():
        print(f"{name}: accuracy {found['first']:.3f} -> {found['last']:.3f} of {found['n']}")
    print(f"policy: {run_dir.path / FOLDER}{of_step(summary)}   report: jaxrl-llm report --workdir={run_dir.path}")
