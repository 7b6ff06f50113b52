"""Supervised fine-tuning, and language-model training from scratch when every token counts."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

import models
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.errors import UserError
from jaxrl_llm.losses.logprobs import token_logprobs
from jaxrl_llm.losses.sft import load_balancing_loss, sft_loss
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.train.checks import check_keep_best, check_sft, remat_of, trained_as
from jaxrl_llm.train.config import OptimizerConfig, SFTConfig, from_mapping
from jaxrl_llm.train.metrics import Recorded
from jaxrl_llm.train.resume import check_steps, not_finite
from jaxrl_llm.train.signals import Alive, Interrupted, StopRequest, stop_on_signal, watchdog
from jaxrl_llm.train.state import (
    abstract_state,
    apply_gradients,
    frozen_params,
    frozen_shardings,
    given,
    init_state,
    policy_params,
    resolve_decay,
    state_shardings,
    trained_shardings,
    whole,
)
from jaxrl_llm.train.step import batch_shardings, chunk_on
from models.adapted import merged
from models.decode import bucket
from models.lora import LoraConfig
from models.sharding import batch_ways, place


@dataclasses.dataclass(frozen=True)
class SFTSpec:
    """All that shapes the compiled update."""

    model: models.ModelConfig
    optimizer: OptimizerConfig
    remat: bool | str  # as of `models.forward`
    logprob_chunk: int | None
    lora: LoraConfig | None = None
    router_balance: float = 0.0


def _micro_loss(trained, spec: SFTSpec, frozen, tokens_BT, mask_BT, total, segments_BT=None):
    compute = jax.tree.map(lambda p: p.astype(spec.model.dtype), whole(spec.lora, trained, frozen))
    # Rows are right-padded and attention is causal, so no counted token ever sees padding.
    segments = None if segments_BT is None else segments_BT[:, :-1]
    taps = tuple(f"blocks.{i}.router_logits" for i in range(spec.model.n_layers)) if spec.router_balance else ()
    out = models.forward(spec.model, compute, tokens_BT[:, :-1], segments=segments, taps=taps, remat=spec.remat)
    logps_BT, _ = token_logprobs(out.hidden, models.head(spec.model, compute).spread(), tokens_BT[:, 1:], chunk=spec.logprob_chunk)
    loss, counted_BT = sft_loss(logps_BT, mask_BT[:, 1:], total_tokens=total)[0], mask_BT[:, 1:]
    if not spec.router_balance:
        return loss, {"loss": loss}
    # What comes before a row's last counted token is text, not padding. Micro-batches count by their tokens, as in the loss.
    text_BT = jnp.flip(jnp.cumsum(jnp.flip(counted_BT, 1), axis=1), 1) > 0
    balance = load_balancing_loss(jnp.stack([out.taps[name] for name in taps]), text_BT, spec.model.experts_per_token)
    share = jnp.sum(counted_BT, dtype=jnp.float32) / jnp.maximum(total, 1.0)
    return loss + spec.router_balance * share * balance, {"loss": loss, "router_balance": share * balance}


def _update(spec: SFTSpec, state, batch, frozen=None):
    """One update on {"tokens" [M, b, T] int32, "mask" [M, b, T] bool} and, of packed rows, "segments" [M, b, T] int32: micro-batches
    weighted by their tokens. The loss that is told is that of the tokens alone; of a mixture of experts with `router_balance` its balance too."""
    tokens = jnp.sum(batch["mask"][:, :, 1:], dtype=jnp.float32)
    grad_fn = jax.value_and_grad(functools.partial(_micro_loss, spec=spec, frozen=frozen, total=tokens), has_aux=True)

    def one(micro):
        (_, told), grads = grad_fn(state["params"], **{f"{name}_BT": rows for name, rows in micro.items()})
        return told, grads

    if batch["tokens"].shape[0] == 1:
        told, grads = one(jax.tree.map(lambda x: x[0], batch))
    else:
        names = ("loss", "router_balance") if spec.router_balance else ("loss",)
        zero = (dict.fromkeys(names, jnp.zeros(())), jax.tree.map(jnp.zeros_like, state["params"]))
        (told, grads), _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zero, batch)
    state, moved = apply_gradients(spec.optimizer, state, grads)
    return state, told | {"tokens": tokens} | moved


@functools.lru_cache(maxsize=64)
def compiled_update(spec: SFTSpec, mesh=None):
    """jitted (state, batch, frozen parameters or None) -> (state, metrics); see `_update`. The state is donated."""
    spec = chunk_on(spec, mesh)
    if mesh is None:
        return jax.jit(functools.partial(_update, spec), donate_argnums=0)
    shardings = state_shardings(spec.model, spec.optimizer, mesh, lora=spec.lora)
    return jax.jit(
        functools.partial(_update, spec),
        in_shardings=(shardings, batch_shardings(mesh), frozen_shardings(spec.model, mesh, spec.lora)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


@functools.lru_cache(maxsize=64)
def _compiled_nats(spec: SFTSpec, mesh=None):
    """jitted (what is trained, batch of one micro-batch, frozen parameters or None) -> nats of its counted tokens, summed, without gradients."""
    spec = chunk_on(dataclasses.replace(spec, router_balance=0.0), mesh)

    def nats(trained, batch, frozen=None):
        return _micro_loss(trained, spec, frozen, batch["tokens"][0], batch["mask"][0], 1.0)[0]

    if mesh is None:
        return jax.jit(nats)
    shardings = trained_shardings(spec.model, mesh, lora=spec.lora), batch_shardings(mesh), frozen_shardings(spec.model, mesh, spec.lora)
    return jax.jit(nats, in_shardings=shardings, out_shardings=NamedSharding(mesh, PartitionSpec()))


def micro_batches(
    tokens_BT: np.ndarray, mask_BT: np.ndarray, rows: int, multiple: int = 1, segments_BT: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """[B, T] -> {"tokens", "mask" and, if given, "segments"} of [M, b, T], b at most `rows` (0 = B) rounded up to `multiple`, padded with
    uncounted rows."""
    count = len(tokens_BT)
    b = -(-min(rows or count, count) // multiple) * multiple
    M = -(-count // b)
    pad = ((0, M * b - count), (0, 0))
    batch = {
        "tokens": np.pad(np.asarray(tokens_BT, np.int32), pad).reshape(M, b, -1),
        "mask": np.pad(np.asarray(mask_BT, bool), pad).reshape(M, b, -1),
    }
    if segments_BT is not None:
        batch["segments"] = np.pad(np.asarray(segments_BT, np.int32), pad, constant_values=-1).reshape(M, b, -1)
    return batch


Rows = tuple[np.ndarray, np.ndarray]  # tokens [N, T] int, loss mask [N, T] bool


@dataclasses.dataclass
class _Run(Recorded):
    """What every part of the loop needs. frozen: what an adapter is put into."""

    spec: SFTSpec
    config: SFTConfig
    held_out: Mapping[str, Rows]
    run_dir: RunDir | None
    checkpoints: Checkpoints | None
    mesh: Any
    history: list[dict[str, Any]]
    frozen: Any
    progress: bool
    best: tuple[float, int] | None = None


def train_sft(
    model_cfg: models.ModelConfig,
    params,
    batches: Iterable[tuple[np.ndarray, ...]],
    config: SFTConfig | Mapping[str, Any],
    run_dir: RunDir | None = None,
    held_out: Mapping[str, Rows] | None = None,
    *,
    mesh=None,
    progress: bool = True,
):
    """Trains on batches (tokens [B, T] int, loss_mask [B, T] bool), or (tokens, loss_mask, segments [B, T] int) where several texts are
    packed into each row (see `models.forward` and `data.prompts.pack_rows`), and returns (parameters, history).

    params: the starting model, any float dtype, or a function that gives it; with `lora`, maybe with an adapter in it to go on with.
    tokens: right-padded rows. loss_mask: True on the tokens to be
    predicted (the response, or all of them; the first token of a row is never predicted). batches: from the first step on, at least
    `config.steps` of them; a resumed run draws and drops those it has seen. run_dir: where metrics and checkpoints go; None keeps nothing
    on disk, and a run that is found there goes on. held_out: name -> rows (tokens, loss_mask) whose loss is logged before the first step,
    every `eval_every` steps and at the end. With `keep_best` the parameters returned are those of least loss on that set. history: the logged
    records, of kind "sft" (step, loss in nats a token, grad_norm, tokens, tokens_per_s, learning_rate, seconds) and of kind "eval" (step, set,
    loss, n rows, tokens, seconds).

    Raises UserError when the batches run out, the loss is not finite (step named, last checkpoint kept) or the disk refuses;
    Interrupted after SIGTERM, state saved.
    """
    config = from_mapping(SFTConfig, config)
    check_sft(config)
    check_keep_best(config.keep_best, held_out or {}, run_dir)
    lora = config.lora.adapter
    if config.router_balance and model_cfg.mlp != "experts":
        raise UserError(f"train.router_balance={config.router_balance:g} is for mixtures of experts; this {model_cfg.family} has none: set it to 0")
    optimizer = resolve_decay(config.optimizer, config.steps)
    spec = SFTSpec(trained_as(model_cfg, config), optimizer, remat_of(config), config.logprob_chunk, lora, config.router_balance)
    checkpoints = None if run_dir is None else Checkpoints(run_dir.checkpoints, config.keep_checkpoints)
    found = None if checkpoints is None else checkpoints.restore(abstract_state(model_cfg, spec.optimizer, mesh, lora=lora))
    params = given(params)
    start, state = (
        (found[0], found[1]) if found else (0, init_state(model_cfg, spec.optimizer, params, mesh, lora=lora, seed=config.lora.seed))
    )
    frozen = None if lora is None else frozen_params(model_cfg, params, mesh)
    del params  # the state has a copy
    if run_dir is not None:
        check_steps(start, config.steps, run_dir)
        run_dir.truncate_after(start if found else -1)
        run_dir.note_changes(start)
    history = [] if run_dir is None else [r for r in run_dir.metrics(until=start if found else -1) if r["kind"] in ("sft", "eval")]
    run = _Run(spec, config, held_out or {}, run_dir, checkpoints, mesh, history, frozen, progress)
    with contextlib.nullcontext() if checkpoints is None else checkpoints:
        run.see_best()
        state = _train(run, state, start, iter(batches))
        if run.best is not None and run.best[1] < config.steps:
            del state
            state = checkpoints.restore(abstract_state(model_cfg, spec.optimizer, mesh, lora=lora), at=run.best[1])[1]
    return policy_params(model_cfg, state["params"], lora, frozen), run.history


def fine_tuner(model_cfg: models.ModelConfig, mesh=None) -> Callable[[Any, list[tuple[np.ndarray, np.ndarray]], float], Any]:
    """(parameters, batches, learning rate) -> parameters after one step on each batch: `train_sft` that leaves nothing on disk. An adapter
    among the parameters is merged: all of them are tuned."""

    def tune(params, batches, learning_rate):
        settings = SFTConfig(steps=len(batches), checkpoint_every=0, optimizer=OptimizerConfig(learning_rate=learning_rate))
        return train_sft(model_cfg, merged(params), batches, settings, mesh=mesh, progress=False)[0]

    return tune


def _train(run: _Run, state, start: int, batches):
    """The loop. Step numbers in records and checkpoints count finished steps."""
    config, checkpoints = run.config, run.checkpoints
    update = compiled_update(run.spec, run.mesh)
    if start == 0:
        with watchdog(config.watchdog_seconds) as alive:
            _evaluate(run, state, 0, alive)
    for _ in range(start):
        _next(batches, 0)
    bar = tqdm(total=config.steps, initial=start, desc="sft", unit="step", mininterval=0.5, disable=None if run.progress else True, leave=False)
    pending, since = [], time.perf_counter()
    # Without a run directory there is nothing to save: a signal is the caller's affair.
    stopping = contextlib.nullcontext(StopRequest()) if run.run_dir is None else stop_on_signal()
    with bar, stopping as stop, watchdog(config.watchdog_seconds) as alive:
        for step in range(start, config.steps):
            alive()
            state, metrics = update(state, _placed(*_next(batches, step), config=config, mesh=run.mesh), run.frozen)
            pending.append(metrics)
            bar.update()
            done, last = step + 1, step + 1 == config.steps
            evaluate = last or (config.eval_every and done % config.eval_every == 0)
            asked = stop.agreed(waits=done % config.log_every == 0)
            save = checkpoints is not None and (
                last or asked or (config.checkpoint_every and done % config.checkpoint_every == 0)
            )
            if save or (evaluate and run.held_out) or last or done % config.log_every == 0:
                record = _record(jax.device_get(pending), done, time.perf_counter() - since, checkpoints, run.run_dir)
                run.log(record)
                bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                if evaluate:
                    _evaluate(run, state, done, alive)
                    save = run.see_best() or save
                pending, since = [], time.perf_counter()
            if save and checkpoints is not None:
                alive.rest()
                checkpoints.save(done, state, {})
                if last or asked:
                    checkpoints.finish()
            if asked and not last:
                saved = "the same command goes on from there"
                logging.warning("stopped by signal %d after step %d; %s", asked, done, saved)
                raise Interrupted(asked, f"stopped by signal {asked} after step {done}; {saved}")
    return state


def _evaluate(run: _Run, state, step: int, alive: Alive) -> None:
    """Logs the loss of each held-out set, in nats a token over all its counted tokens."""
    for name, (tokens_NT, mask_NT) in run.held_out.items():
        began = time.perf_counter()
        tokens = int(np.sum(mask_NT[:, 1:]))
        loss = _nats(run, state, tokens_NT, mask_NT, name, alive) / max(tokens, 1)
        if not np.isfinite(loss):
            raise UserError(f"the loss of held-out set '{name}' after step {step} is {loss:g}: lower the learning rate, or look at its rows")
        record = {"kind": "eval", "step": step, "set": name, "loss": loss, "n": len(tokens_NT), "tokens": tokens}
        run.log(record | {"seconds": time.perf_counter() - began})


def _nats(run: _Run, state, tokens_NT: np.ndarray, mask_NT: np.ndarray, name: str, alive: Alive) -> float:
    """The summed nats of the counted tokens, `forward_rows` rows at a time, by length, so that short rows are not padded to the longest."""
    ways = 1 if run.mesh is None else batch_ways(run.mesh)
    size = -(-min(run.config.forward_rows, len(tokens_NT)) // ways) * ways
    reach_N = reach(mask_NT)
    order, forward, total = np.argsort(reach_N, kind="stable"), _compiled_nats(run.spec, run.mesh), 0.0
    bar = tqdm(total=len(order), desc=f"loss of {name}", unit="row", mininterval=0.5, disable=None if run.progress else True, leave=False)
    with bar:
        for begin in range(0, len(order), size):
            alive()
            chosen = order[begin : begin + size]
            width = min(bucket(int(reach_N[chosen].max()), 32), tokens_NT.shape[1])
            # A last chunk of fewer rows is padded to the same shape.
            batch = micro_batches(tokens_NT[chosen, :width], mask_NT[chosen, :width], 0, size)
            if run.mesh is not None:
                batch = jax.tree.map(lambda x: place(x, batch_shardings(run.mesh)), batch)
            total += float(jax.device_get(forward(state["params"], batch, run.frozen)))
            bar.update(len(chosen))
    return total


def reach(mask_NT: np.ndarray) -> np.ndarray:
    """int [N]: tokens of each row up to the last that counts."""
    return mask_NT.shape[1] - np.argmax(mask_NT[:, ::-1], axis=1)


def _next(batches, step):
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"the batches ran out at step {step + 1}: give more rows, more epochs or fewer steps") from None


def _placed(tokens_BT, mask_BT, segments_BT=None, *, config, mesh):
    ways = 1 if mesh is None else batch_ways(mesh)
    batch = micro_batches(tokens_BT, mask_BT, config.micro_batch_rows, ways, segments_BT)
    if mesh is None:
        return batch
    return jax.tree.map(lambda x: place(x, batch_shardings(mesh)), batch)


def _record(pending, step, seconds, checkpoints, run_dir) -> dict:
    """The record of the steps since the last one: losses averaged over tokens, the rest from the last step."""
    for back, m in enumerate(reversed(pending)):
        if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"])):
            raise not_finite(step - back, float(m["loss"]), float(m["grad_norm"]), checkpoints, run_dir)
    tokens = sum(float(m["tokens"]) for m in pending)
    return {
        "kind": "sft",
        "step": step,
        "loss": sum(float(m["loss"] * m["tokens"]) for m in pending) / max(tokens, 1.0),
        **{name: float(pending[-1][name]) for name in ("router_balance",) if name in pending[-1]},
        "grad_norm": float(pending[-1]["grad_norm"]),
        **({"spike": float(np.mean([m["spike"] for m in pending]))} if "spike" in pending[-1] else {}),
        "learning_rate": float(pending[-1]["learning_rate"]),
        "tokens": int(tokens),
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }
