"""From prompts to a batch: verdicts that mask, groups by id, incomplete groups, and the sampler against the trainer."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_grpo as tiny

import models
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.verdict import Status, Verdict
from jaxrl_llm.train.checks import check_grpo
from jaxrl_llm.train.config import GRPOConfig, LossConfig, OptimizerConfig, from_mapping
from jaxrl_llm.train.metrics import experience_metrics, samples_record
from jaxrl_llm.train.resample import joined
from jaxrl_llm.train.rollout import Sampled, build_batch, collect, judged, overlong_tokens, samples_together
from jaxrl_llm.train.state import init_state
from jaxrl_llm.train.step import compiled_update, loss_and_grads, step_spec

S = tiny.TINY.num_samples


def sometimes_broken(inputs):
    """Raises on a batch that holds prompt 2, and alone on prompt 2."""
    if any(i.prompt == "prompt 2" for i in inputs):
        raise RuntimeError("the judge is down")
    return tiny.reward(inputs)


@pytest.fixture(scope="module")
def experience():
    batch = tiny.prompts().take([0, 2, 5, 7])
    return collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, sometimes_broken, tiny.TINY, jax.random.key(1))


def test_a_reward_that_raises_is_masked_and_counted(experience):
    assert [v.status for v in experience.verdicts[S : 2 * S]] == [Status.ERROR] * S
    assert "judge is down" in experience.verdicts[S].reason
    np.testing.assert_array_equal(experience.valid_N, np.repeat([True, False, True, True], S))
    metrics = experience_metrics(experience)
    passed = [v.status is Status.PASS for v in experience.verdicts if v.value is not None]
    assert metrics["errors"] == S and metrics["timeouts"] == 0
    assert 0 < np.mean(passed) < 1
    assert metrics["pass_rate"] == pytest.approx(np.mean(passed)) and metrics["reward"] == pytest.approx(np.mean(passed))
    rates = experience.pass_rates()
    assert np.isnan(rates[1]) and rates[0] == np.mean(passed[:S])


def test_texts_and_rewards_belong_to_their_rows(experience):
    for i, text in enumerate(experience.texts):
        n = experience.rollout.completion_lengths_N[i]
        assert text == tiny.Tokenizer().decode(experience.rollout.completion_tokens_NT[i, :n].tolist())
        row = experience.prompts.rows[experience.rollout.group_ids_N[i]]
        if experience.valid_N[i]:
            assert experience.rewards_N[i] == float(row["answer"] in text.split())


def test_batch_layout_and_mask(experience):
    batch = build_batch(experience, tiny.TINY)
    assert batch["prompts"].shape[:2] == (1, 4) and batch["completions"].shape[:2] == (1, 4 * S)
    np.testing.assert_array_equal(batch["prompt_lengths"][0], experience.prompts.lengths_N)
    np.testing.assert_array_equal(batch["lengths"][0], experience.rollout.completion_lengths_N)
    np.testing.assert_array_equal(batch["group_ids"][0], np.repeat(np.arange(4), S))
    # pad == eos here: the stop token of a finished row is inside its length, so it is trained on.
    stopped = np.flatnonzero(experience.rollout.finish_reason_N == 1)
    assert len(stopped)
    for i in stopped:
        assert batch["completions"][0, i, batch["lengths"][0, i] - 1] == tiny.STOP


def test_sampler_and_trainer_agree_in_fp32(experience):
    spec = step_spec(tiny.CONFIG, tiny.TINY)
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params())
    _, metrics, _ = compiled_update(spec)(state, build_batch(experience, tiny.TINY))
    assert float(metrics["logp_diff_max"]) < 1e-5 and float(metrics["ratio"]) == pytest.approx(1.0)


def test_temperature_is_the_same_in_sampling_and_loss():
    config = dataclasses.replace(tiny.TINY, temperature=0.6)
    batch = tiny.prompts().take([0, 1, 5, 7])
    experience = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, tiny.reward, config, jax.random.key(1))
    spec = step_spec(tiny.CONFIG, config)
    state = init_state(tiny.CONFIG, spec.optimizer, tiny.params())
    _, metrics, _ = compiled_update(spec)(state, build_batch(experience, config))
    assert float(metrics["logp_diff_max"]) < 1e-5


def test_micro_batches_keep_prompts_whole_where_they_fit_and_pad_with_empty_rows(experience):
    batch = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=3 * S))
    assert batch["prompts"].shape[:2] == (2, 3) and batch["completions"].shape[:2] == (2, 3 * S)
    assert not batch["lengths"][1, S:].any() and not batch["valid"][1, S:].any() and batch["prompt_lengths"].all()
    for_mesh = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=2 * S), row_multiple=2)
    assert for_mesh["prompts"].shape[:2] == (2, 2)
    assert build_batch(experience, tiny.TINY, row_multiple=8)["prompts"].shape[:2] == (1, 8)


@pytest.mark.parametrize("rows,ways,together", [(S // 2, 1, 2), (S, 2, 2), (S, 3, 1), (1, 1, 1), (3, 4, 1)])
def test_micro_batches_smaller_than_a_prompt_hold_part_of_its_completions(experience, rows, ways, together):
    whole = build_batch(experience, tiny.TINY)
    parts = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=rows), row_multiple=ways)
    micros, held = parts["completions"].shape[:2]
    assert held == max(rows // ways, 1) // together * together * ways and parts["prompts"].shape[:2] == (micros, held // together)
    for name, array in parts.items():
        of_row = np.repeat(whole[name][0], S, axis=0) if name in ("prompts", "prompt_lengths") else whole[name][0]
        got = np.repeat(array, together, axis=1) if name in ("prompts", "prompt_lengths") else array
        np.testing.assert_array_equal(got.reshape(-1, *array.shape[2:])[: len(of_row)], of_row, err_msg=name)
    spec = step_spec(tiny.CONFIG, tiny.TINY)
    grads = [jax.jit(loss_and_grads, static_argnums=0)(spec, tiny.params(), batch)[2] for batch in (whole, parts)]
    np.testing.assert_allclose(tiny.flat(grads[1]), tiny.flat(grads[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [2 * S, S // 2])
def test_with_buckets_micro_batches_have_completions_of_similar_lengths(experience, rows):
    plain = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=rows))
    batch = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=rows, length_buckets=3))
    together = batch["completions"].shape[1] // batch["prompts"].shape[1]
    longest = batch["lengths"].reshape(-1, together).max(axis=1)
    assert (np.diff(longest) >= 0).all()
    assert together == S or longest.min() < longest.max()

    def rows_of(given):
        """Each completion with its prompt and all that belongs to it."""
        prompts = [np.repeat(given[name], together, axis=1).reshape(-1, *given[name].shape[2:]) for name in ("prompts", "prompt_lengths")]
        others = [given[name].reshape(-1, *given[name].shape[2:]) for name in given if name not in ("prompts", "prompt_lengths")]
        return sorted(tuple(part[i].tobytes() for part in (*prompts, *others)) for i in range(len(prompts[0])))

    assert rows_of(batch) == rows_of(plain)


@pytest.mark.parametrize("change", [{}, {"micro_batch_rows": S}, {"micro_batch_rows": S, "length_buckets": 3}, {"micro_batch_rows": S // 2}], ids=str)
def test_parts_of_a_rollout_are_batches_of_its_prompts_one_after_the_other(experience, change):
    """Each as the batch of these prompts alone, but for widths and the groups' numbers; over two devices too, and of uneven parts."""
    one = dataclasses.replace(tiny.TINY, **change)
    for given, ways in ((experience, 1), (experience, 2), (without_first_row(experience), 1)):
        rows = given.rollout.group_ids_N
        both = build_batch(given, dataclasses.replace(one, updates_per_epoch=2), row_multiple=ways)
        micros = len(both["lengths"]) // 2
        for part, at in enumerate(([0, 1], [2, 3])):
            found, held = {name: array[part * micros :][:micros] for name, array in both.items()}, np.isin(rows, at)
            real = found["lengths"] > 0
            assert sorted(found["rewards"][real]) == sorted(given.rewards_N[held]) and set(found["group_ids"][real]) == set(given.groups_N[held])
            if given is experience:
                alone = build_batch(joined([(given, np.array(at))]), one, row_multiple=ways)
                for name in ("lengths", "valid", "prompt_lengths", "rewards"):
                    np.testing.assert_array_equal(found[name], alone[name], err_msg=name)


def without_first_row(experience):
    """So that a prompt has fewer completions than the others."""
    rollout = models.Rollout(**{f.name: getattr(experience.rollout, f.name)[1:] for f in dataclasses.fields(models.Rollout)})
    arrays = {name: getattr(experience, name)[1:] for name in ("texts", "verdicts", "rewards_N", "valid_N", "learnt_N", "groups_N")}
    return dataclasses.replace(experience, rollout=rollout, **arrays)


def test_most_of_a_prompt_s_completions_that_fit_and_divide_them_share_its_forward():
    found = [samples_together(8, rows, 4) for rows in (0, 1, 8, 12, 16, 31, 32, 64)]
    assert found == [8, 1, 2, 2, 4, 4, 8, 8] and samples_together(6, 20, 4) == 3 and samples_together(7, 24, 4) == 1
    assert [samples_together(8, 64, 4, most) for most in (0, 1, 3, 8, 9)] == [8, 1, 2, 8, 8]


def test_fewer_completions_may_share_a_prompt_s_forward(experience):
    batch = build_batch(experience, dataclasses.replace(tiny.TINY, micro_batch_rows=2 * S, samples_together=2))
    assert batch["completions"].shape[:2] == (2, 2 * S) and batch["prompts"].shape[:2] == (2, S)


def test_a_prompt_that_comes_twice_is_one_group():
    batch = tiny.prompts().take([3, 4, 3])
    made = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, tiny.reward, tiny.TINY, jax.random.key(1))
    np.testing.assert_array_equal(made.groups_N, np.repeat([0, 1, 0], S))
    np.testing.assert_array_equal(build_batch(made, tiny.TINY)["group_ids"][0], np.repeat([0, 1, 0], S))


def test_incomplete_groups_fall_back_to_one_row_a_prompt(experience):
    keep = np.arange(4 * S) != 1
    rollout = dataclasses.replace(
        experience.rollout, **{f.name: getattr(experience.rollout, f.name)[keep] for f in dataclasses.fields(experience.rollout)}
    )
    cut = dataclasses.replace(
        experience,
        rollout=rollout,
        **{name: getattr(experience, name)[keep] for name in ("rewards_N", "valid_N", "groups_N")},
    )
    batch = build_batch(cut, tiny.TINY)
    assert batch["prompts"].shape[1] == batch["completions"].shape[1] == 4 * S - 1
    np.testing.assert_array_equal(batch["prompt_lengths"][0, :S], np.repeat(experience.prompts.lengths_N, [S - 1, 1, 0, 0]))


def test_rows_in_another_order_give_the_same_batch(experience):
    order = np.random.default_rng(0).permutation(4 * S)
    rollout = dataclasses.replace(
        experience.rollout, **{f.name: getattr(experience.rollout, f.name)[order] for f in dataclasses.fields(experience.rollout)}
    )
    mixed = dataclasses.replace(
        experience, rollout=rollout, **{name: getattr(experience, name)[order] for name in ("rewards_N", "valid_N", "groups_N")}
    )
    batch = build_batch(mixed, tiny.TINY)
    np.testing.assert_array_equal(batch["group_ids"][0], np.repeat(np.arange(4), S))
    for g in range(4):
        rows = slice(g * S, (g + 1) * S)
        before, after = (np.sort(b["sampler_logps"][0, rows].sum(-1)) for b in (build_batch(experience, tiny.TINY), batch))
        np.testing.assert_allclose(after, before, rtol=1e-6)


def test_sample_record(experience):
    record = samples_record(experience, 3, 2)
    assert record["step"] == 3 and [p["id"] for p in record["prompts"]] == ["p0", "p2"]
    assert len(record["prompts"][0]["responses"]) == S and record["prompts"][1]["responses"][0]["status"] == "ERROR"


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 5}])
def test_truncated_sampling_is_refused_in_training_unless_allowed(change):
    with pytest.raises(UserError, match="allow_truncated_sampling"):
        check_grpo(GRPOConfig(**change))
    check_grpo(GRPOConfig(**change, allow_truncated_sampling=True))


@pytest.mark.parametrize(
    "mapping,message",
    [
        ({"num_sample": 4}, "did you mean num_samples"),
        ({"optimizer": {"learning_rat": 1.0}}, "optimizer.learning_rat.*did you mean learning_rate"),
        ({"steps": "many"}, "'steps' must be int"),
        ({"eval_by": "level"}, "'eval_by' must be a list"),
    ],
)
def test_mapping_with_a_mistake_names_the_field(mapping, message):
    with pytest.raises(UserError, match=message):
        from_mapping(GRPOConfig, mapping)


def test_mapping_becomes_the_dataclass():
    made = from_mapping(GRPOConfig, {"steps": 3, "temperature": 1, "eval_by": ["level"], "loss": {"kl": "k3"}, "optimizer": {}})
    assert made == GRPOConfig(steps=3, temperature=1.0, eval_by=("level",), loss=LossConfig(kl="k3"), optimizer=OptimizerConfig())
    assert isinstance(hash(made), int)


@pytest.mark.parametrize(
    "config,message",
    [
        (GRPOConfig(loss=LossConfig(aggregation="mean")), "token_mean"),
        (GRPOConfig(loss=LossConfig(kl="kl")), "loss.kl"),
        (GRPOConfig(optimizer=OptimizerConfig(schedule="sine")), "cosine"),
        (GRPOConfig(temperature=0.0), "temperature"),
        (GRPOConfig(num_samples=0), "num_samples"),
        (GRPOConfig(loss=LossConfig(ratio="row")), "loss.ratio.*sequence_token"),
        (GRPOConfig(loss=LossConfig(surrogate="ppo")), "loss.surrogate.*cispo"),
        (GRPOConfig(loss=LossConfig(mismatch="geo")), "loss.mismatch.*sequence"),
        (GRPOConfig(loss=LossConfig(baseline="mean")), "loss.baseline.*leave_one_out"),
        (GRPOConfig(loss=LossConfig(kl="k1", kl_place="reward")), "loss.kl_place.*sequence_reward"),
        (GRPOConfig(loss=LossConfig(clip_low=1.5)), "loss.clip_low"),
        (GRPOConfig(loss=LossConfig(clip_high=-0.1)), "loss.clip_high"),
        (GRPOConfig(loss=LossConfig(mismatch="token", mismatch_cap=0.0)), "loss.mismatch_cap"),
        (GRPOConfig(loss=LossConfig(kl_place="sequence_reward")), "loss.kl_place.*no KL.*loss.kl"),
        (GRPOConfig(loss=LossConfig(kl_coef=0.04)), "loss.kl_coef' is 0.04, but there is no KL: set loss.kl"),
        (GRPOConfig(loss=LossConfig(kl="k3", kl_coef=-0.04)), "loss.kl_coef' must not be below 0"),
        (GRPOConfig(loss=LossConfig(entropy_coef=-0.1)), "loss.entropy_coef"),
        (GRPOConfig(loss=LossConfig(advantage_ddof=-1)), "loss.advantage_ddof"),
        (GRPOConfig(loss=LossConfig(advantage_eps=0.0)), "loss.advantage_eps' must be above 0"),
        (GRPOConfig(loss=LossConfig(kl="k1", kl_place="token_reward")), "loss.kl_place.*loss.baseline"),
        (GRPOConfig(loss=LossConfig(baseline="batch_mean")), "loss.advantage_scale.*batch_std"),
        (GRPOConfig(loss=LossConfig(baseline="value")), "loss.advantage_scale.*'value'"),
        (GRPOConfig(loss=LossConfig(gamma=1.1)), "loss.gamma"),
        (GRPOConfig(loss=LossConfig(gae_lambda=-0.1)), "loss.gae_lambda"),
        (GRPOConfig(loss=LossConfig(value_coef=-1.0)), "loss.value_coef"),
        (GRPOConfig(loss=LossConfig(value_clip=-1.0)), "loss.value_clip"),
        (GRPOConfig(loss=LossConfig(surrogate="cispo", ratio="sequence_token")), "loss.ratio.*cispo"),
        (GRPOConfig(num_samples=1), "loss.baseline.*num_samples=1"),
        (GRPOConfig(num_samples=1, rollout_tries=2, loss=LossConfig(baseline="batch_mean", advantage_scale="none")), "rollout_tries.*num_samples"),
        (GRPOConfig(rollout_tries=0), "rollout_tries"),
        (GRPOConfig(max_new_tokens=8, overlong_buffer=9), "overlong_buffer.*max_new_tokens=8"),
        (GRPOConfig(overlong_penalty=-1.0), "overlong_penalty"),
        (GRPOConfig(overlong_buffer_share=1.1), "overlong_buffer_share.*0 .off. to 1, got 1.1"),
    ],
)
def test_settings_without_meaning_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        check_grpo(config)


def test_a_single_sample_is_enough_for_a_baseline_over_the_batch():
    check_grpo(GRPOConfig(num_samples=1, loss=LossConfig(baseline="batch_mean", advantage_scale="batch_std")))


def test_long_completions_lose_reward(experience):
    """0 up to the buffer, then linear, the whole penalty at the limit; verdicts stay as they are, and rows without one get nothing."""
    batch, shy = tiny.prompts().take([0, 2, 5, 7]), dataclasses.replace(tiny.TINY, overlong_buffer=4, overlong_penalty=0.5)
    made = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, sometimes_broken, shy, jax.random.key(1))
    lengths = made.rollout.completion_lengths_N
    assert made.verdicts == experience.verdicts and lengths.min() <= 2 and lengths.max() == 6
    penalty = np.select([lengths <= 2, lengths == 3, lengths == 4, lengths == 5], [0, -0.25, -0.5, -0.75], -1.0)
    np.testing.assert_allclose(made.rewards_N, np.where(made.valid_N, experience.rewards_N + 0.5 * penalty, 0))
    assert experience_metrics(made)["pass_rate"] == experience_metrics(experience)["pass_rate"]
    assert experience_metrics(made)["reward"] < experience_metrics(experience)["reward"]
    wider = dataclasses.replace(shy, overlong_buffer=6)
    again = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, sometimes_broken, wider, jax.random.key(1))
    assert again.rewards_N.sum() < made.rewards_N.sum()
    shares = {0.0: 0, 0.01: 1, 2 / 3: 4, 1.0: 6}  # of six tokens
    assert {share: overlong_tokens(dataclasses.replace(tiny.TINY, overlong_buffer_share=share)) for share in shares} == shares
    assert overlong_tokens(dataclasses.replace(shy, overlong_buffer_share=1.0)) == 4
    by_share = dataclasses.replace(shy, overlong_buffer=0, overlong_buffer_share=0.6)
    share = judged(Sampled(batch, made.rollout, made.texts, 0.0), made.verdicts, 0.0, by_share)
    np.testing.assert_array_equal(share.rewards_N, made.rewards_N)


def test_broken_reward_verdict_count():
    batch = tiny.prompts().take([0, 1])
    made = collect(tiny.CONFIG, tiny.params(), tiny.Tokenizer(), batch, lambda i: [Verdict(Status.PASS)], tiny.TINY, jax.random.key(1))
    assert not made.valid_N.any() and np.isnan(experience_metrics(made)["reward"])


MESH = """
import sys; sys.path.insert(0, "tests/train")
import dataclasses, importlib, tempfile
import jax, numpy as np, models.sharding
import tiny_grpo as tiny
module = importlib.import_module("models.generate")
mesh = models.sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
params = jax.device_put(tiny.params(), models.sharding.param_shardings(tiny.CONFIG, mesh))
for stop in ((), (" 7 ",)):
    knobs = dict(num_samples=3, max_new_tokens=6, seed=jax.random.key(4), stop_strings=stop, tokenizer=tiny.Tokenizer())
    one = models.generate(tiny.CONFIG, tiny.params(), tiny.prompts().token_lists(), **knobs)
    for rows, unrolled in ((512, 8), (12, 8), (12, 0)):  # all at once; in three parts; with the layers in a scan
        module.UNROLLED_LAYERS = unrolled
        many = models.generate(tiny.CONFIG, params, tiny.prompts().token_lists()[:11], max_rows=rows, mesh=mesh, **knobs)
        same = [a == b for a, b in zip(many.completions(), one.completions())]
        assert len(same) == 33 and np.mean(same) > 0.9, same  # rounding may turn a rare draw
        np.testing.assert_allclose(many.logps_NT[np.array(same)], one.logps_NT[:33][np.array(same)], atol=1e-4)
    module.UNROLLED_LAYERS = 8
    assert (many.finish_reason_N == 2).any() == bool(stop)
with tempfile.TemporaryDirectory() as folder:
    config = dataclasses.replace(tiny.TINY, steps=2)
    trained, summary = tiny.run(folder + "/mesh", config, mesh=mesh, evals={"held_out": tiny.prompts(5, seed=1)})
    again, _ = tiny.run(folder + "/mesh", config, mesh=mesh)
    np.testing.assert_array_equal(tiny.flat(again), tiny.flat(trained))
    assert summary["evals"]["held_out"]["n"] == 5 and np.isfinite(summary["reward_last"])
print("equal")
"""


def test_rows_spread_over_a_mesh_are_the_same_rows(run_python):
    assert "equal" in run_python(MESH, devices=8)
