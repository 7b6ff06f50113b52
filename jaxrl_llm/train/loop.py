"""GRPO: rollout, reward, update; evaluation, checkpoints and exact resume around it. Online DPO is the same loop with another update.

A run is a pure function of its arguments: the randomness of step s is fold_in(key(seed), s), the prompts of step s come from the
schedule, and a checkpoint holds all else (parameters, optimizer, step, the schedule's state). So a run that was killed and started
again ends with the parameters of one that was not, bit for bit.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

import models
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.verdict import Reward
from jaxrl_llm.run_dir import RunDir
from jaxrl_llm.runtime import parse_axes
from jaxrl_llm.train.checks import TOKEN_BASELINES, check_grpo
from jaxrl_llm.train.config import GRPOConfig, OnlineDPOConfig, from_mapping
from jaxrl_llm.train.evaluate import evaluate
from jaxrl_llm.train.metrics import experience_metrics, samples_record, summarise
from jaxrl_llm.train.overlap import Ahead, check_overlap, restored, step_ahead
from jaxrl_llm.train.preference_step import PreferenceSpec
from jaxrl_llm.train.resample import Filled, fill
from jaxrl_llm.train.resume import check_steps, not_finite, prompts_fingerprint
from jaxrl_llm.train.rollout import Experience, collect
from jaxrl_llm.train.signals import Interrupted, stop_on_signal, watchdog
from jaxrl_llm.train.state import State, abstract_state, frozen_params, given, init_state, laid_out, policy_params, start_params
from jaxrl_llm.train.step import StepSpec, step_spec
from jaxrl_llm.train.update import update_policy
from models.lora import adapter_of
from models.sharding import relaid

DRAWN = "loop.batches_drawn"  # among the schedule's arrays in a checkpoint
RESAMPLED = 2**31  # randomness of a step's further rollouts: above every step number
WARN_AGAIN_AFTER = 20  # steps between two warnings
SPREAD_STEPS = 20  # last steps over which the share of groups with equal rewards is taken
SPREAD_GROUPS = 64  # of fewer groups in fewer steps a high share may be luck: of 8, at a true share of 0.7, all are equal in 1 step of 17


class Schedule(Protocol):
    """Which prompts go into which step; `data.sampler.ShuffledSchedule` is the plain one. One that has `see_policy(step, params)` is
    shown the policy once before each training step: what it makes of it must depend on parameters and step only. In all else a step is a
    batch that it gave: a training step that rolls out several (`rollout_tries`) asks for, and reports, as many, in order. With
    `overlap_rewards` it is asked for a step's batch before it is told of the step before; one with `see_policy` is refused then."""

    def batch(self, step: int) -> np.ndarray:
        """Row indices of a step: a function of the schedule's arguments and state only."""

    def observe(self, step: int, indices: np.ndarray, pass_rates: np.ndarray) -> None:
        """Told each step's pass rates (NaN = no verdict)."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state` gave."""


@dataclasses.dataclass
class Run:
    """What every part of the loop needs. update: (run, state, experience) -> (state, its metrics, with "finite"), of which `spec` shapes
    the compiled part."""

    model: models.ModelConfig
    tokenizer: Any
    prompts: PromptBatch
    reward: Reward
    schedule: Schedule
    config: GRPOConfig | OnlineDPOConfig
    spec: StepSpec | PreferenceSpec
    update: "Callable[[Run, State, Experience], tuple[State, dict[str, Any]]]"
    run_dir: RunDir
    evals: Mapping[str, PromptBatch]
    mesh: Any
    name: str  # on the progress bar
    compares: bool = False  # the update compares with the policy that training starts from
    tries: int = 1  # rollouts that a step may take
    critic: bool = False  # the state has a value head
    reference: Any = dataclasses.field(init=False, default=None)  # parameters of that policy
    frozen: Any = dataclasses.field(init=False, default=None)  # what an adapter is put into: the same ones
    sampler_mesh: Any = dataclasses.field(init=False)  # `mesh`, or the one of `rollout_mesh`
    checkpoints: Checkpoints = dataclasses.field(init=False)
    key: jax.Array = dataclasses.field(init=False)
    drawn: int = 0  # batches taken from the schedule
    ahead: Ahead | None = None  # with `overlap_rewards`, the next step's completions
    best: tuple[float, float, int] | None = None  # (accuracy on the set of `keep_best`, reward, step) of the most accurate trained policy so far
    warned_at: int = -WARN_AGAIN_AFTER
    # (groups with a verdict, share of them with equal rewards, mean reward) of the last steps; a resumed run starts it anew
    spreads: collections.deque = dataclasses.field(default_factory=lambda: collections.deque(maxlen=SPREAD_STEPS))

    def __post_init__(self):
        _check_lengths(self.model, self.prompts, self.config, "prompts")
        for name, batch in self.evals.items():
            _check_lengths(self.model, batch, self.config, f"evaluation set {name!r}")
        if self.config.keep_best and self.config.keep_best not in self.evals:
            known = nearest(self.config.keep_best, self.evals)
            raise UserError(f"setting 'keep_best' is {self.config.keep_best!r}, which is no evaluation set: {known}")
        if self.config.rollout_mesh and self.mesh is None:
            raise UserError(f"setting 'rollout_mesh' is {self.config.rollout_mesh!r}, but there is no mesh to use otherwise: set that too")
        if self.config.overlap_rewards:
            check_overlap(self.schedule)
        self.sampler_mesh = relaid(self.mesh, parse_axes(self.config.rollout_mesh)) if self.config.rollout_mesh else self.mesh
        self.checkpoints = Checkpoints(self.run_dir.checkpoints, self.config.keep_checkpoints)
        self.key = jax.random.key(self.config.seed)

    @property
    def compares_batch(self) -> bool:
        """Whether a reward counts against those of the whole step, not of its prompt: the step is then one group."""
        return isinstance(self.config, GRPOConfig) and self.config.loss.baseline in TOKEN_BASELINES

    def policy(self, state: State) -> Any:
        """The policy's parameters as the model computes with them."""
        return policy_params(self.model, state["params"], self.spec.lora, self.frozen)

    def sampler(self, state: State) -> Any:
        """The policy's parameters where they lie while it samples."""
        policy = self.policy(state)
        return policy if self.sampler_mesh is self.mesh else laid_out(self.model, self.mesh, self.sampler_mesh, self.spec.lora)(policy)

    def see_best(self, records: list[dict[str, Any]]) -> bool:
        """Takes note of evaluations; whether one of them is the best of a trained policy so far, whose checkpoint then stays: the most accurate
        one, of equals that of the highest mean reward (a graded one may never pass), of these the first."""
        before = self.best
        for record in records:
            trained = record["kind"] == "eval" and record["set"] == self.config.keep_best and record["step"] > 0
            found = record["accuracy"] if trained else None
            # Where no row got a verdict there is no accuracy.
            if found is not None and np.isfinite(found) and (self.best is None or (found, record["reward"]) > self.best[:2]):
                self.best = found, record["reward"], record["step"]
        if self.best is not None:
            self.checkpoints.name_best(self.best[2])
        return self.best != before


def train_grpo(
    model_cfg: models.ModelConfig,
    params,
    tokenizer,
    prompts: PromptBatch,
    reward: Reward,
    schedule: Schedule,
    config: GRPOConfig | Mapping[str, Any],
    run_dir: RunDir,
    evals: Mapping[str, PromptBatch] | None = None,
    *,
    mesh=None,
    progress: bool = True,
):
    """Trains a policy by GRPO and returns (parameters, summary).

    params: the starting policy, any float dtype (kept unchanged; it is also the reference of the KL term; with `lora`, maybe with an adapter in
    it to go on with), or a function that gives it and
    keeps no hold of it: without KL and adapter it is then out of memory before the first step. prompts: what the schedule's indices point into.
    reward: list[RewardInput] -> list[Verdict]. config: a GRPOConfig or a mapping with its fields. run_dir: metrics, samples, summary and
    checkpoints go there; if it holds checkpoints of this run, training goes on from the newest. evals: name -> held-out prompts, evaluated
    before the first step, every `eval_every` steps and at the end. mesh: a mesh of `models.sharding.make_mesh`, or None for one device.

    With `keep_best` the parameters returned are those of the most accurate evaluation. They have the model's dtype. Raises UserError for
    settings without meaning, a disk that refuses, or a loss that is not finite (the step is named, the last good checkpoint stays);
    Interrupted (a SystemExit) after SIGTERM, state saved.
    """
    config = from_mapping(GRPOConfig, config)
    check_grpo(config)
    if config.top_k > 0 or config.top_p < 1.0:
        logging.warning("training on samples truncated by top_k or top_p: the ratio is biased, see allow_truncated_sampling")
    run = Run(
        model_cfg,
        tokenizer,
        prompts,
        reward,
        schedule,
        config,
        step_spec(model_cfg, config),
        update_policy,
        run_dir,
        evals or {},
        mesh,
        "grpo",
        compares=bool(config.loss.kl),
        tries=config.rollout_tries,
        critic=config.loss.critic,
    )
    return train(run, params, progress)


def train(run: Run, params, progress: bool = True):
    """Goes on from the newest checkpoint of `run.run_dir`, or starts from `params`; (parameters, summary), see `train_grpo`."""
    run.run_dir.same_rows({name: prompts_fingerprint(rows) for name, rows in {"prompts": run.prompts, **run.evals}.items()})
    with run.checkpoints:
        state, start = _restore(run, params)
        state = _train(run, state, start, progress)
        if run.best is not None and run.best[2] < run.config.steps:
            del state
            found = run.checkpoints.restore(_abstract(run), at=run.best[2])
            state = found[1]  # pyright: ignore[reportOptionalSubscript]
    summary = summarise(run.run_dir.metrics(), run.config.steps)
    if run.best is not None:
        summary["best"] = {"set": run.config.keep_best, "step": run.best[2], "accuracy": run.best[0], "reward": run.best[1]}
    run.run_dir.summary(summary)
    return run.policy(state), summary


def _check_lengths(model_cfg, prompts: PromptBatch, config: GRPOConfig | OnlineDPOConfig, what: str) -> None:
    if len(prompts) == 0:
        raise UserError(f"{what}: no prompts")
    longest = int(prompts.lengths_N.max())
    if longest + config.max_new_tokens > model_cfg.max_position:
        row = prompts.ids[int(prompts.lengths_N.argmax())]
        raise UserError(
            f"{what}: prompt {row} has {longest} tokens, with max_new_tokens={config.max_new_tokens} that is over the model's context "
            f"of {model_cfg.max_position}; lower max_new_tokens, or drop or truncate long prompts"
        )


def _restore(run: Run, params) -> tuple[dict, int]:
    """(state, step): the newest checkpoint, or the start."""
    params, optimizer, critic, lora = given(params), run.spec.optimizer, run.critic, run.spec.lora
    if run.compares or lora is not None:
        base = frozen_params(run.model, params, run.mesh)
        run.frozen = None if lora is None else base
        if run.compares:
            run.reference = start_params(run.model, params, run.mesh) if adapter_of(params) else base
    found = run.checkpoints.restore(_abstract(run))
    if found is None:
        run.run_dir.truncate_after(-1)
        run.run_dir.note_changes(0)
        return init_state(run.model, optimizer, params, run.mesh, critic, lora, run.config.lora.seed), 0
    step, state, schedule_state = found
    check_steps(step, run.config.steps, run.run_dir)
    run.drawn = int(schedule_state.pop(DRAWN, step))
    ahead = restored(run, schedule_state)
    run.ahead = ahead if run.config.overlap_rewards else None
    run.schedule.restore(schedule_state)
    run.run_dir.truncate_after(step)
    run.run_dir.note_changes(step)
    run.see_best(run.run_dir.metrics(until=step))
    logging.info("resumed from step %d of %s", step, run.run_dir.path)
    return state, step


def _abstract(run: Run) -> State:
    return abstract_state(run.model, run.spec.optimizer, run.mesh, run.critic, run.spec.lora)


def _train(run: Run, state, start: int, progress: bool):
    """The loop. Step numbers in records and checkpoints count finished steps, so a record of step s belongs to checkpoint s."""
    config = run.config
    if start == 0:
        _evaluate(run, state, 0)
    bar = tqdm(
        total=config.steps, initial=start, desc=run.name, unit="step", mininterval=0.5, disable=None if progress else True, leave=False
    )
    with bar, stop_on_signal() as stop, watchdog(config.watchdog_seconds) as alive:
        for step in range(start, config.steps):
            alive()
            state, record = _step(run, state, step)
            done, last = step + 1, step + 1 == config.steps
            run.run_dir.log(record)
            bar.update()
            bar.set_postfix(reward=f"{record['reward']:.3f}", refresh=False)
            best = False
            if last or (config.eval_every and done % config.eval_every == 0):
                alive()
                best = run.see_best(_evaluate(run, state, done))
            asked = stop.agreed()
            if last or asked or best or (config.checkpoint_every and done % config.checkpoint_every == 0):
                # Without resampling, now or before, the batches drawn are the steps.
                drawn = {DRAWN: np.int64(run.drawn)} if run.drawn > done else {}
                ahead = run.ahead.state() if run.ahead is not None else {}
                alive.rest()
                run.checkpoints.save(done, state, run.schedule.state() | drawn | ahead)
                if last or asked:
                    run.checkpoints.finish()
            if asked and not last:
                message = f"stopped by signal {asked} after step {done}; the same command goes on from there"
                logging.warning("%s", message)
                raise Interrupted(asked, message)
    return state


def _step(run: Run, state, step: int) -> tuple[dict, dict]:
    """One rollout, or as many as make a full batch, and its updates: (new state, the record to log)."""
    began = time.perf_counter()
    filled, rolled, seconds = _experience(run, state, step)
    trained, everything = filled.experience(), filled.everything()
    update_began = time.perf_counter()
    state, measured = run.update(run, state, trained)
    _check_finite(run, measured, step)
    now = time.perf_counter()
    compared_N = np.zeros_like(everything.groups_N) if run.compares_batch else everything.groups_N
    # What the policy does is told of all that it did: the groups that were chosen for their spread would flatter or slander it.
    record = {"kind": "train", "step": step + 1, "kl": None} | experience_metrics(everything, compared_N) | measured
    record |= {
        "rows": np.concatenate([rolled[number][at] for number, at in filled.trained]).tolist(),  # enough to retrace a schedule that adapts
        "tokens_per_s": float(everything.rollout.completion_lengths_N.sum() / (now - began)),
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "seconds_update": now - update_began,
        "seconds": now - began,
    }
    if run.tries > 1:
        record |= filled.counts | {"rows_rolled": np.concatenate(rolled).tolist()}
    groups = np.unique(compared_N[everything.learnt_N]).size
    if groups:
        run.spreads.append((groups, record["zero_spread"], record["reward"]))
    _warn(run, record, step)
    if run.config.sample_every and step % run.config.sample_every == 0:
        run.run_dir.sample(samples_record(trained, step + 1, run.config.samples_per_log))
    return state, record


def _experience(run: Run, state: State, step: int) -> tuple[Filled, list[np.ndarray], dict[str, float]]:
    """(what the step trains on, the rows of each rollout, seconds). The policy as it samples, in bf16 a copy, is let go at the end: the update
    needs the room."""
    policy = run.sampler(state)
    if run.config.overlap_rewards:
        experience, rows, seconds = step_ahead(run, policy, step)
        return Filled([experience], [(0, np.arange(len(rows)))], {}), [rows], seconds
    rolled: list[np.ndarray] = []
    scheduling: list[float] = []

    def draw(attempt: int) -> Experience:
        indices, seconds, experience = _roll_out(run, state, policy, step, attempt)
        rolled.append(indices)
        scheduling.append(seconds)
        return experience

    filled = fill(draw, run.tries)
    seconds = {"rollout": filled.everything().seconds_rollout, "reward": filled.everything().seconds_reward, "schedule": sum(scheduling)}
    return filled, rolled, seconds


def _roll_out(run: Run, state: State, policy, step: int, attempt: int) -> tuple[np.ndarray, float, Experience]:
    """(rows, seconds that the schedule looked at the policy, completions) of the schedule's next batch; it is told what they scored."""
    began = time.perf_counter()
    # A step's further rollouts are of the same policy: there is nothing new to see.
    if attempt == 0 and (see_policy := getattr(run.schedule, "see_policy", None)) is not None:
        see_policy(step, policy if run.sampler_mesh is run.mesh else run.policy(state))
    seconds = time.perf_counter() - began
    indices = np.asarray(run.schedule.batch(run.drawn))
    key = jax.random.fold_in(jax.random.fold_in(run.key, RESAMPLED + attempt) if attempt else run.key, step)
    experience = collect(run.model, policy, run.tokenizer, run.prompts.take(indices), run.reward, run.config, key, run.sampler_mesh)
    run.schedule.observe(run.drawn, indices, experience.pass_rates())
    run.drawn += 1
    return indices, seconds, experience


def _check_finite(run: Run, measured: dict, step: int) -> None:
    if measured.pop("finite"):
        return
    more = " (samples.jsonl shows the steps before)"
    raise not_finite(step + 1, measured["loss"], measured["grad_norm"], run.checkpoints, run.run_dir, more)


def _warn(run: Run, record: dict, step: int) -> None:
    """Says what usually explains a run that learns nothing, at most every WARN_AGAIN_AFTER steps."""
    if step - run.warned_at < WARN_AGAIN_AFTER:
        return
    if record["errors"] and np.isnan(record["reward"]):
        logging.warning("step %d: no completion got a verdict (%d errors); nothing was learnt", step + 1, record["errors"])
    elif np.isnan(record["zero_spread"]):
        logging.warning("step %d: no completion ended before max_new_tokens, so that mask_cut_off left none to learn from", step + 1)
    elif (share := _zero_spread(run)) > run.config.zero_spread_warning:
        logging.warning(
            "step %d: %.0f%% of the %slast %d step(s) have equal rewards (mean %.2f), so they teach nothing: the prompts are "
            "too easy or too hard for the policy, %s is too small, or the reward is constant",
            step + 1,
            100 * share,
            "" if run.compares_batch else "groups of the ",
            len(run.spreads),
            np.mean([reward for _, _, reward in run.spreads]),
            "the step" if run.compares_batch else "num_samples",
        )
    else:
        return
    run.warned_at = step


def _zero_spread(run: Run) -> float:
    """The share of groups with equal rewards over the last steps; 0 while too few were seen to tell."""
    counts = [groups for groups, _, _ in run.spreads]
    if sum(counts) < SPREAD_GROUPS and len(counts) < SPREAD_STEPS:
        return 0.0
    return float(np.average([share for _, share, _ in run.spreads], weights=counts))


def _evaluate(run: Run, state, step: int) -> list[dict[str, Any]]:
    """Logs a record for each evaluation set. The randomness of avg@k is the same at every step: differences are the policy's."""
    config, records = run.config, []
    if not run.evals:
        return records
    policy = run.sampler(state)
    for name, prompts in run.evals.items():
        began = time.perf_counter()
        record = evaluate(
            run.model,
            policy,
            run.tokenizer,
            prompts,
            run.reward,
            max_new_tokens=config.max_new_tokens,
            samples=config.eval_samples,
            temperature=config.eval_temperature,
            batch_rows=config.eval_batch,
            by=config.eval_by,
            stop_strings=config.stop_strings,
            seed=run.key,
            mesh=run.sampler_mesh,
        )
        records.append({"kind": "eval", "step": step, "set": name} | record | {"seconds": time.perf_counter() - began})
        run.run_dir.log(records[-1])
    return records
