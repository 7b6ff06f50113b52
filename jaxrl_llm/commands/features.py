"""`jaxrl-llm features`: what the features of a dictionary fire on, as one page, with labels if a server is named."""

import json
from math import inf
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxrl_llm.commands.train_sae import FOLDER
from jaxrl_llm.config import check_fields, to_dict
from jaxrl_llm.data.prompts import fill_template
from jaxrl_llm.data.sources import parse_fields, read_rows
from jaxrl_llm.data.texts import special_tokens
from jaxrl_llm.data.texts import token_rows as texts_to_rows
from jaxrl_llm.errors import UserError, from_os_error
from jaxrl_llm.run_dir import RunDir, read_jsonl, write_text

DATA, PAGE, LABELS = "features.json", "features.html", "labels.jsonl"
CHOICES = {"dtype": ("float32", "bfloat16"), "data.on_bad": ("error", "skip")}
RANGES = dict.fromkeys(("features", "top", "batch_rows", "context_size", "data.limit", "labels.workers", "labels.max_tokens"), (1, inf))
RANGES |= dict.fromkeys(("sampled", "random", "before", "after", "related", "seed", "labels.retries"), (0, inf)) | {"labels.timeout": (0.001, inf)}


def run(config: Any, workdir: str) -> None:
    """Gathers the data, unless it is there, asks for the labels that are missing, and writes the page; see configs/features.py.

    Raises:
      UserError: no model, dictionary or text named, a field out of its range, a label server that fails (the page is then written with the
        labels that there are); and what reading, loading and gathering raise.
    """
    label_config = check(config)
    import jax

    if jax.process_count() > 1:
        raise UserError("features runs in one process: start it on one host alone")
    described = {key: value for key, value in to_dict(config).items() if key != "labels"}  # which may be added later
    run_dir = RunDir(workdir, described, kind="features", owns=(DATA, PAGE, LABELS))
    path = run_dir.path / DATA
    if not path.exists():
        write_text(path, json.dumps(_gather(config), ensure_ascii=False, separators=(",", ":")))
    data = json.loads(path.read_text())
    try:
        if label_config is not None:
            _ask_for_labels(data, label_config, run_dir.path / LABELS)
    finally:
        _write_page(data, run_dir, config.labels.model)


def check(config: Any) -> Any:
    """The settings of the labels, or None; raises UserError for a config that could not be run to its end, before anything is read."""
    for field, what in (("model", "a Hugging Face folder or hub id"), ("sae", "the folder of a dictionary"), ("data.source", "a file or data set")):
        value = config.data.source if field == "data.source" else config[field]
        if not value:
            raise UserError(f"nothing to make a page of: name {what} with --config.{field}=...")
    check_fields(config, CHOICES, RANGES | {"skip_first": (0, config.context_size - 1)})
    from jaxrl_llm.evals.feature_labels import LabelConfig

    labels = config.labels
    if not labels.url:
        if labels.model:
            raise UserError("config key 'labels.url' is empty, but 'labels.model' is given: name the server, such as http://127.0.0.1:8000/v1")
        return None
    return LabelConfig(seed=config.seed, **labels)


def _gather(config: Any) -> dict[str, Any]:
    """The data of the page, without labels."""
    import models
    import sae
    from jaxrl_llm.curation.features import choose_hook, tell_transfer
    from sae.feature_data import CollectConfig, collect

    data = config.data
    how = {"split": data.split, "limit": data.limit, "on_bad": data.on_bad, "separator": data.separator}
    rows = read_rows(data.source, parse_fields(data.fields), **how)
    texts = [row["prompt"] if data.template == "none" else fill_template(data.template, row) for row in rows]
    tokenizer = models.load_tokenizer(config.model)
    token_rows = texts_to_rows(texts, tokenizer)
    names = ("top", "sampled", "random", "before", "after", "related", "batch_rows", "context_size", "skip_first", "seed")
    special = tuple(special_tokens(tokenizer)) if config.drop_special else ()
    settings = CollectConfig(features=tuple(config.ids) or config.features, drop_tokens=special, **{name: config[name] for name in names})
    d = sae.load(config.sae)
    cfg, params = models.load(config.model, dtype=config.dtype)
    hook = choose_hook(cfg, {config.sae: d}, config.hook or None)
    d = d.replace(cfg=d.cfg.replace(hook_name=hook))
    tell_transfer([d], config.model)
    batches = -(-sum(-(-len(row) // min(config.context_size, cfg.max_position)) for row in token_rows) // config.batch_rows)
    progress = lambda items, name: tqdm(items, desc=name, unit="batch", total=batches if name != "contexts" else None, mininterval=0.5)  # noqa: E731
    found = collect(cfg, params, d, token_rows, settings, unembed_DV=models.unembed_matrix(cfg, params), progress=progress)
    shown = {token for feature in found["features"] for context in feature["contexts"] for token in context["tokens"]}
    shown |= {token for context in found["random"] for token in context["tokens"]}
    shown |= {token for f in found["features"] for side in (f["logits"] or {}).values() for token, _ in side}
    about = {"title": f"Features of {told_name(config.sae)}", "model": Path(config.model).name}
    return about | {"vocabulary": token_texts(tokenizer, sorted(shown))} | found


def told_name(source: str) -> str:
    """The last folder of a path or hub id; with the one above it where it is the name that train_sae gives to all."""
    parts = Path(source).resolve().parts
    return "/".join(parts[-2:] if parts[-1] == FOLDER else parts[-1:])


def token_texts(tokenizer: Any, ids: list[int]) -> dict[str, str]:
    """{id: what the token adds to a text}, spaces included, which a token decoded alone may lack."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    alone = tokenizer.decode(anchor)
    after = tokenizer.batch_decode([[*anchor, token] for token in ids])
    own = tokenizer.batch_decode([[token] for token in ids])
    return {str(t): a.removeprefix(alone) if a.startswith(alone) else o for t, a, o in zip(ids, after, own, strict=True)}


def _ask_for_labels(data: dict[str, Any], config: Any, path: Path) -> None:
    from jaxrl_llm.evals.feature_labels import label_features

    if not data["random"]:
        raise UserError("config key 'random' is 0: labels are judged on those contexts too; give some, such as 64")
    records = read_jsonl(path)
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))  # without a line that a kill cut short
    done = [record["id"] for record in records if record.get("by") == config.model and "label" in record]

    def save(record: dict[str, Any]) -> None:
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record | {"by": config.model}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise from_os_error(error, path, "write") from error

    label_features(data, config, save, done=done, progress=lambda items, n: tqdm(items, desc="labels", unit="feature", total=n, mininterval=0.5))


def _write_page(data: dict[str, Any], run_dir: RunDir, by: str) -> None:
    """The page and the summary, with the last label of each feature; of the model `by` alone, if one is named: scores of two judges do not
    stand side by side."""
    from jaxrl_llm.report.features import write_features_page

    found = {record["id"]: record for record in read_jsonl(run_dir.path / LABELS) if by in ("", record.get("by"))}
    fields = ("label", "score", "judged")
    for feature in data["features"]:
        feature |= {name: found[feature["id"]][name] for name in fields if name in found.get(feature["id"], ())}
    page = run_dir.path / PAGE
    write_features_page(page, data)
    scores = [record["score"] for record in found.values() if record.get("score") is not None]
    summary = {"features": len(data["features"]), "alive": data["alive"], "tokens": data["tokens"]}
    summary |= {"labelled": sum("label" in record for record in found.values()), "failed_labels": sum("error" in r for r in found.values())}
    run_dir.summary(summary | {"scored": len(scores), "mean_score": sum(scores) / len(scores) if scores else None})
    print(f"{page} ({page.stat().st_size / 1e6:,.1f} MB): {len(data['features']):,} features; open it in a browser")
