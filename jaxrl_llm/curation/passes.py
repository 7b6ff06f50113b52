"""The forward passes of curation: a model, an SAE for it, and what they make of the rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import models
import sae
from jaxrl_llm.checkpoint import until_done
from jaxrl_llm.curation.feature_space import FeatureSpace, SpaceView, dense_space
from jaxrl_llm.curation.features import extract_features, hook_width, middle_hook, random_dictionary
from jaxrl_llm.curation.processes import on_this_process
from jaxrl_llm.curation.streaming import Results
from jaxrl_llm.curation.texts import with_bos
from models.sharding import place, replicated

Rows = Sequence[dict[str, Any]]


@dataclass
class LanguageModel:
    """A model with its tokenizer and where it came from."""

    cfg: models.ModelConfig
    params: Any
    tokenizer: Any
    name: str

    @classmethod
    def load(cls, name: str, dtype: str, mesh: Any) -> LanguageModel:
        tokenizer = models.load_tokenizer(name)  # before the weights, which take longer to come
        return cls(*models.load(name, dtype=dtype, mesh=mesh), tokenizer, name)


@dataclass
class Stages:
    """Seconds of each stage, and a bar for those that may take long."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "row") -> Iterator[Callable[..., None]]:
        """Times a stage; one with a total has a bar, whose advance it yields."""
        start = time.perf_counter()
        with tqdm(total=total, desc=f"{name:<12}", unit=unit, mininterval=0.5, disable=None if total else True) as bar:
            yield lambda count=1: bar.update(count)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def train_dictionary(
    model: LanguageModel, rows: Rows, config: Any, mesh: Any, folder: Path | None = None
) -> tuple[sae.Dictionary, dict[str, Any]]:
    """An SAE on the prompts themselves: (dictionary, its metrics on a tenth of the rows, which training does not see).

    folder: where checkpoints are kept until both are there; training that was stopped goes on from them, bit for bit. Name it by the
    rows and the config, which must be the same then.
    """
    settings, hook = config.train_sae, config.features.hook or middle_hook(model.cfg)
    order = np.random.default_rng(config.seed).permutation(len(rows))
    held_out = max(1, min(200, len(rows) // 10))
    context = min(config.features.context or model.cfg.max_position, model.cfg.max_position)

    def activations(chosen: np.ndarray) -> Iterator[np.ndarray]:
        def texts():
            for start in range(0, len(chosen), 512):
                yield from with_bos(model.tokenizer, [rows[i]["prompt"] for i in chosen[start : start + 512]])

        batch_rows = max(1, config.features.batch_tokens // context)
        return sae.harvest_activations(model.cfg, model.params, texts(), hook, batch_rows, context, mesh=mesh)

    train, test = (order[held_out:] if len(rows) > 1 else order), order[:held_out]
    width = hook_width(model.cfg, hook)
    cfg = sae.SAEConfig(
        d_in=width,
        d_sae=settings.expansion * width,
        k=settings.k,
        hook_name=hook,
        model_name=model.name,
        context_size=context,
    )
    buffer = sae.ActivationBuffer(lambda: activations(train), settings.batch_size, settings.buffer_rows, config.seed)
    options = sae.SAETrainConfig(steps=settings.steps, dead_after=settings.batch_size * 100)
    with nullcontext() if folder is None else until_done(folder) as checkpoints:
        dictionary, _ = sae.train_sae(cfg, buffer, options, jax.random.key(config.seed), mesh=mesh, checkpoints=checkpoints)
        dictionary = on_this_process(dictionary, mesh)
        return dictionary, sae.evaluate(dictionary, activations(test))


def train_resumably(folder: Path, *args: Any, **options: Any) -> tuple[sae.Dictionary, list[dict[str, float]]]:
    """`sae.train_sae` with checkpoints in `folder` while it runs: the same call goes on where it was stopped."""
    with until_done(folder) as checkpoints:
        return sae.train_sae(*args, checkpoints=checkpoints, **options)


@dataclass
class Views:
    """One pass of features as Designs: the SAE's space and, with controls, a random SAE's and the dense activations'."""

    results: Results
    designs: dict[str, SpaceView]

    def again(self, results: Results) -> dict[str, SpaceView]:
        """The same spaces on other rows."""
        return {name: view.space.view(results.blocks(name), results.lengths) for name, view in self.designs.items()}


def pooled_views(results: Results, config: Any) -> Views:
    """Fit a feature space for each output of a pass."""
    options, designs = config.features, {}
    for name in results.widths:
        blocks = results.blocks(name)
        if name.startswith("dense"):
            designs[name] = dense_space(blocks, results.lengths, options.remove_length)
        else:
            space = FeatureSpace.fit(
                blocks, results.lengths, min_rows=options.min_rows, max_share=options.max_share, remove_length=options.remove_length
            )
            designs[name] = space.view(blocks, results.lengths)
    return Views(results, designs)


def extract(model: LanguageModel, dictionary: sae.Dictionary, tokens: Any, n: int, config: Any, mesh: Any, folder: Path | None, tick) -> Results:
    """One pass: the SAE and, with controls, a random SAE and the dense activations."""
    dictionaries = {"sae": dictionary}
    if config.controls:
        dictionaries["random_sae"] = random_dictionary(dictionary, config.seed)
    if mesh is not None:  # beside the model once, not with every batch
        dictionaries = jax.tree.map(lambda array: place(np.asarray(array), replicated(mesh)), dictionaries)
    options = config.features
    return extract_features(
        model.cfg,
        model.params,
        dictionaries,
        tokens,
        n,
        hook=options.hook or None,
        pooling=options.pooling,
        dense=("dense_mean", "dense_max") if config.controls else (),
        context=options.context or None,
        overflow=options.overflow,
        batch_tokens=options.batch_tokens,
        shard_rows=options.shard_rows,
        mesh=mesh,
        model_name=model.name,
        folder=folder,
        progress=tick,
    )
