"""Every field of configs/grpo.py arrives where it acts, and those that are no part of the update's formulas change what a run leaves.

The formulas: test_grpo_update_rules.py (loss), test_train_state.py (optimizer), test_grpo_step.py (memory), test_rollout.py (sampling).
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_grpo as tiny
from test_train_verbs import config_of, model, sums  # noqa: F401 (fixtures)

import jaxrl_llm.train.evaluate as evaluation
import jaxrl_llm.train.rollout as rollout
import models
from jaxrl_llm.commands import grpo
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.train import loop
from jaxrl_llm.train.checks import check_dpo, check_grpo, check_online_dpo
from jaxrl_llm.train.config import DPOConfig, GRPOConfig, OnlineDPOConfig, SFTConfig, from_mapping
from jaxrl_llm.train.preference_step import preference_spec
from jaxrl_llm.train.step import step_spec

NAMED = {"aggregation": "dr_grpo", "advantage_scale": "none", "kl": "k1", "schedule": "linear", "stop_strings": ("x",), "eval_by": ("level",)}
NAMED |= {"kind": "ipo", "ratio": "sequence", "surrogate": "cispo", "baseline": "leave_one_out", "kl_place": "sequence_reward", "mismatch": "token"}
NAMED |= {"targets": ("blocks.q",), "remat_keep": "products", "keep_best": "x", "attention": "splash", "rollout_mesh": "tensor=2"}


KINDS = {"grpo": GRPOConfig, "sft": SFTConfig, "dpo": DPOConfig, "online_dpo": OnlineDPOConfig, "story_rules": GRPOConfig, "verif": GRPOConfig}


@pytest.mark.parametrize(("verb", "kind"), KINDS.items(), ids=KINDS)
def test_every_training_field_changes_its_own_setting_and_no_other(verb, kind):
    config, part = load_config(f"configs/{verb}.py"), "grpo" if verb in ("story_rules", "verif") else "train"
    base = dataclasses.asdict(from_mapping(kind, config[part]))
    for name in field_names(config[part]):
        *groups, field = name.split(".")
        before = base
        for group in groups:
            before = before[group]
        value = before[field]
        other = NAMED[field] if field in NAMED else (not value) if isinstance(value, bool) else 7 if value is None else value + 1
        after = dataclasses.asdict(from_mapping(kind, load_config(f"configs/{verb}.py", {f"{part}.{name}": other})[part]))
        inside = base, after
        for group in groups:
            assert {key for key in inside[0] if inside[0][key] != inside[1][key]} == {group}
            inside = tuple(each[group] for each in inside)
        assert {key for key in inside[0] if inside[0][key] != inside[1][key]} == {field} and inside[1][field] == other


def test_stop_strings_are_text_even_where_they_look_like_numbers():
    config = load_config("configs/grpo.py", {"train.stop_strings": "7,x"})
    assert from_mapping(GRPOConfig, config.train).stop_strings == ("7", "x")


COUNTS = {"micro_batch_rows": -1, "length_buckets": 0, "keep_checkpoints": 0, "checkpoint_every": -1, "logprob_chunk": 0}
SAMPLED = {"sample_every": -1, "samples_per_log": -1, "eval_samples": -1, "eval_every": -3}
OPTIMIZER = {"warmup_steps": -1, "decay_steps": -1, "clip_norm": -1.0, "b1": 1.0, "b2": -0.1, "eps": -1e-8, "weight_decay": -0.1, "final_share": -1.0}


@pytest.mark.parametrize(("verb", "check"), [("grpo", check_grpo), ("dpo", check_dpo), ("online_dpo", check_online_dpo)])
def test_numbers_out_of_range_are_one_clear_line(verb, check):
    kind = KINDS[verb]
    counts = {"dpo": COUNTS, "online_dpo": COUNTS | SAMPLED, "grpo": COUNTS | SAMPLED}[verb]
    for name, value in counts.items():
        with pytest.raises(UserError, match=f"^setting '{name}' must be at least [01], got {value}$"):
            check(from_mapping(kind, {name: value}))
    for name, value in OPTIMIZER.items():
        with pytest.raises(UserError, match=f"^setting 'optimizer.{name}' must .*, got {value}$"):
            check(from_mapping(kind, {"optimizer": {name: value}}))
    check(from_mapping(kind, {name: -1 for name in ("seed",) if verb != "dpo"}))
    with pytest.raises(UserError, match="'length_buckets' is 3 and 'micro_batch_rows' 0: there is one micro-batch"):
        check(from_mapping(kind, {"length_buckets": 3}))


@pytest.fixture
def given(model, sums, tmp_path, monkeypatch):  # noqa: F811
    """config changes -> what `train_grpo` is called with: a run that ends there."""

    def call(**changes):
        seen = {}

        def train_grpo(cfg, params, tokenizer, prompts, reward, schedule, settings, run_dir, evals, mesh):
            seen.update(prompts=prompts, evals=evals, schedule=schedule, settings=settings, dtype=cfg.dtype, reward=reward, mesh=mesh)
            raise InterruptedError

        monkeypatch.setattr(loop, "train_grpo", train_grpo)
        settings = dict(evals=f"sums={sums}", reward__name="exact", max_prompt_tokens=16, schedule__batch_prompts=4) | changes
        with pytest.raises(InterruptedError):
            grpo.run(config_of("grpo", model, sums, **settings), str(tmp_path / str(len(list(tmp_path.iterdir())))))
        return seen

    return call


def test_fields_beside_the_training_reach_it(given):
    base = given()
    assert len(base["prompts"]) == 20 == len(base["evals"]["sums"]) and base["mesh"] is None and base["settings"].steps == 100
    limited = given(eval_limit=3)
    assert len(limited["evals"]["sums"]) == 3 and len(limited["prompts"]) == 20
    limited = given(data__limit=8)
    assert len(limited["evals"]["sums"]) == 20 and len(limited["prompts"]) == 8
    assert given(evals="")["evals"] == {} and given(train__steps=5)["settings"].steps == 5
    assert (base["dtype"], given(dtype="bfloat16")["dtype"]) == ("float32", "bfloat16")
    longer = given(template="1 + 1 = 2 {prompt}")
    assert (longer["prompts"].lengths_N == base["prompts"].lengths_N + 5).all()
    assert (given(max_prompt_tokens=3, overflow="truncate")["prompts"].lengths_N == 3).all()
    assert len(base["schedule"].batch(0)) == 4 and len(given(schedule__batch_prompts=5)["schedule"].batch(0)) == 5
    assert base["schedule"].batch(0).tolist() != given(train__seed=1)["schedule"].batch(0).tolist()


def test_the_split_and_bad_rows_are_asked_for(given, monkeypatch):
    asked, read = [], grpo.read_rows

    def read_rows(*args, **how):
        asked.append((how["split"], how["on_bad"]))
        return read(*args, **how)

    monkeypatch.setattr(grpo, "read_rows", read_rows)
    given(data__split="test", data__on_bad="skip")
    given()
    assert asked == [("test", "skip")] * 2 + [("train", "error")] * 2


def test_options_of_the_reward_reach_it(given):
    upper = lambda found: [v.value for v in found["reward"]([rollout.RewardInput("p", "A", "a", {})])]  # noqa: E731
    assert upper(given()) != upper(given(reward__options='{"ignore_case": false}'))


BASE = dataclasses.replace(tiny.TINY, steps=2, checkpoint_every=1, sample_every=1, eval_every=1, eval_samples=2)


def sampled_by(monkeypatch):
    """A list to which every sampling adds (rows at once, samples a prompt, temperature), and "refill" where places are filled again."""
    batches, generate = [], models.generate

    def watched(*args, max_rows, num_samples, temperature, **how):
        batches.append((max_rows, num_samples, temperature, *(["refill"] if how.get("refill") else [])))
        return generate(*args, max_rows=max_rows, num_samples=num_samples, temperature=temperature, **how)

    for module in (rollout, evaluation):
        monkeypatch.setattr(module.models, "generate", watched)
    return batches


def left_by(folder, monkeypatch, **changes):
    """What a run of two steps leaves: evaluations, samples and checkpoints, and in how large batches it sampled."""
    batches = sampled_by(monkeypatch)
    tiny.run(folder, dataclasses.replace(BASE, **changes), evals={"held_out": tiny.prompts(6, seed=1)})
    monkeypatch.undo()
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()] if (folder / name).exists() else []  # noqa: E731
    evals = [record for record in read("metrics.jsonl") if record["kind"] == "eval"]
    shown = [(record["step"], len(record["prompts"])) for record in read("samples.jsonl")]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    rates = [record.get("rates") for record in evals]
    return {
        "evals": [record["step"] for record in evals], "rates": rates, "by": [record["by"] for record in evals], "samples": shown,
        "checkpoints": checkpoints, "batches": batches,
    }  # fmt: skip


@pytest.fixture(scope="module")
def base_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return left_by(tmp_path_factory.mktemp("base") / "run", patch)


@pytest.mark.parametrize(
    ("change", "different"),
    [
        ({"eval_every": 0}, {"evals", "rates", "by", "batches"}), ({"eval_samples": 0}, {"rates", "batches"}),
        ({"eval_temperature": 0.05}, {"rates", "batches"}), ({"eval_batch": 4}, {"batches"}), ({"eval_by": ("level",)}, {"by"}),
        ({"checkpoint_every": 0}, {"checkpoints"}), ({"keep_checkpoints": 1}, {"checkpoints"}), ({"sample_every": 2}, {"samples"}),
        ({"samples_per_log": 3}, {"samples"}), ({"rollout_rows": 4}, {"batches"}), ({"rollout_refill": True}, {"batches"}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_a_run_leaves_is_as_set(base_run, tmp_path, monkeypatch, change, different):
    """And everything else stays as it was: how many rows are sampled at once changes no sample."""
    found = left_by(tmp_path / "run", monkeypatch, **change)
    assert {name for name in found if found[name] != base_run[name]} == different
    assert base_run["checkpoints"] == ["1", "2"] and base_run["samples"] == [(1, 2), (2, 2)] and base_run["evals"] == [0, 1, 2]
    wanted = {
        "eval_batch": (4, 1, 0.0) in found["batches"] and (4, 2, 1.0) in found["batches"], "rollout_rows": (4, 4, 1.0) in found["batches"],
        "rollout_refill": (512, 4, 1.0, "refill") in found["batches"],
        "keep_checkpoints": found["checkpoints"] == ["2"], "checkpoint_every": found["checkpoints"] == ["2"],
        "samples_per_log": found["samples"] == [(1, 3), (2, 3)], "sample_every": found["samples"] == [(1, 2)],
        "eval_every": found["evals"] == [0, 2], "eval_temperature": (256, 2, 0.05) in found["batches"],
    }  # fmt: skip
    assert wanted.get(next(iter(change)), True)


def test_stop_strings_end_completions(tmp_path):
    def lengths(name, *strings):
        tiny.run(tmp_path / name, dataclasses.replace(BASE, steps=1, eval_every=0, eval_samples=0, stop_strings=strings))
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["completion_length"]

    assert lengths("stopped", "1", "2", "3") < lengths("whole")


def test_inner_epochs_update_again(tmp_path):
    once, twice = (tiny.flat(tiny.run(tmp_path / str(n), dataclasses.replace(tiny.TINY, steps=1, inner_epochs=n))[0]) for n in (1, 2))
    start = tiny.flat(tiny.params())
    assert np.abs(twice - start).mean() > 1.2 * np.abs(once - start).mean()


def test_completions_that_are_cut_off_teach_as_little_as_those_without_a_verdict(tmp_path, caplog):
    """The same parameters, bit for bit; but they have a verdict, which is told of. With all cut off a line says so."""
    masked = dataclasses.replace(tiny.TINY, steps=2, mask_cut_off=True, checkpoint_every=0)

    def without_verdict(inputs):  # a stop token is not written, so a completion of six words reached the limit
        long = [len(item.response.split()) == masked.max_new_tokens for item in inputs]
        return [Verdict(Status.ERROR) if cut else found for cut, found in zip(long, tiny.reward(inputs), strict=True)]

    found, _ = tiny.run(tmp_path / "masked", masked)
    wanted, _ = tiny.run(tmp_path / "errors", dataclasses.replace(masked, mask_cut_off=False), reward=without_verdict)
    plain, _ = tiny.run(tmp_path / "plain", dataclasses.replace(masked, mask_cut_off=False))
    np.testing.assert_array_equal(tiny.flat(found), tiny.flat(wanted))
    assert not np.array_equal(tiny.flat(found), tiny.flat(plain))
    records = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("masked", "errors", "plain")]
    masked_one, error_one, plain_one = (of_run[0] for of_run in records)
    assert masked_one["errors"] == 0 < error_one["errors"] and 0 < masked_one["cut_off"] < 1
    assert (masked_one["reward"], masked_one["pass_rate"]) == (plain_one["reward"], plain_one["pass_rate"])
    assert masked_one["zero_spread"] == error_one["zero_spread"] and masked_one["loss"] == error_one["loss"]
    loop._warn(SimpleNamespace(warned_at=-loop.WARN_AGAIN_AFTER), masked_one | {"zero_spread": float("nan")}, 0)
    assert "no completion ended before max_new_tokens, so that mask_cut_off left none" in caplog.text


def test_the_attention_of_the_update(monkeypatch):
    with pytest.raises(UserError, match="setting 'attention' is 'cudnn', a kernel of GPUs; this machine's devices are CPUs: set 'plain'$"):
        step_spec(tiny.CONFIG, GRPOConfig(attention="cudnn"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="'splash', a kernel of TPUs; this machine's devices are GPUs: set 'plain' or 'cudnn'$"):
        step_spec(tiny.CONFIG, GRPOConfig(attention="splash"))
    dpo, online = (from_mapping(kind, {"attention": "cudnn"}) for kind in (DPOConfig, OnlineDPOConfig))
    with pytest.raises(UserError, match="'cudnn', which takes bfloat16 and heads of .*; this model computes in float32 with heads of 8"):
        step_spec(tiny.CONFIG, GRPOConfig(attention="cudnn"))
    half = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    specs = [step_spec(half, GRPOConfig(attention="cudnn")), *(preference_spec(half, each) for each in (dpo, online))]
    assert [spec.model.attention for spec in specs] == ["cudnn", "cudnn", "cudnn"]
    monkeypatch.undo()
    assert step_spec(tiny.CONFIG, GRPOConfig(attention="splash")).model.attention == "splash"
    with pytest.raises(UserError, match="setting 'attention' is 'flash'; it must be one of 'plain', 'splash', 'cudnn'"):
        step_spec(tiny.CONFIG, GRPOConfig(attention="flash"))
    windowed = dataclasses.replace(tiny.CONFIG, layer_windows=(4, None))
    with pytest.raises(UserError, match="setting 'attention': attention='splash' has no sliding windows"):
        step_spec(windowed, GRPOConfig(attention="splash"))
