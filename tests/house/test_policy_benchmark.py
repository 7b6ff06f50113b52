"""benchmarks/policy.py: bounds and FLOPs by hand, whose rates are taken, which figures carry a goal, and all parts at a tiny shape."""

import argparse
import dataclasses

import jax
import pytest

import models
from benchmarks import policy
from benchmarks.policy import Peak

CFG = models.ModelConfig(
    family="qwen2", vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, tie_embeddings=True, qkv_bias=True,
    max_position=64,
)  # fmt: skip
PEAK = Peak("h200", flops=1e9, memory_rate=1e6, told="by hand")


def arguments(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    policy.add_arguments(parser)
    return parser.parse_args(flags)


def timings(monkeypatch, run=False, **seconds):
    """What decoding all tokens and the first one takes is said here; with `run` both are called all the same, else there is no model either."""
    if not run:
        monkeypatch.setattr(models, "init", lambda *given: None)

    def in_turns(calls, *, repeats):
        for call in calls.values() if run else ():
            call()
        return {name: (1.5, [seconds[name]] * repeats) for name in calls}

    monkeypatch.setattr(policy, "timed_in_turns", in_turns)


def test_the_bytes_of_decoding_by_hand():
    """Two tokens after the first, of 3 rows with 5 + 1 and 5 + 2 tokens before: parameters twice, 2 x 2 layers x 8 numbers a cached token."""
    cached = 3 * (6 + 7) * 2 * 2 * 8
    assert policy.bytes_read(CFG, 3, 5, 3) == 4 * (2 * CFG.param_count() + cached)
    half = dataclasses.replace(CFG, dtype="bfloat16", tie_embeddings=False)
    # An embedding of its own is not read, so that as much is as where it is tied.
    assert policy.bytes_read(half, 3, 5, 3) == 2 * (2 * CFG.param_count() + cached)


def test_the_flops_of_a_trained_token_by_hand():
    """6 a matrix entry: q and o 16 x 16, k and v 16 x 8, MLP 3 x 16 x 32, in 2 layers, unembedding 16 x 64; 12 L n H x 20 / 2 of attention."""
    matrices = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32) + 16 * 64
    assert policy.train_flops(CFG, 20) == 6 * matrices + 12 * 2 * 2 * 8 * 10


def test_decoding_is_measured_without_the_first_token(monkeypatch):
    timings(monkeypatch, all=3.0, first=1.0)
    args = arguments("--batch=3", "--prompt=5", "--new=3")
    rate, bound = policy.decode(args, CFG, PEAK)
    assert (rate.name, rate.value, rate.unit, rate.compile_s) == ("decode_0.5b_h200", 3.0, "tokens/s", 1.5)
    assert bound.value == pytest.approx(100 * policy.bytes_read(CFG, 3, 5, 3) / 1e6 / 2.0) and "1e+03 ms a token" in bound.shape
    timings(monkeypatch, all=1.0, first=1.0)
    with pytest.raises(SystemExit, match="took no longer than one"):
        list(policy.decode(args, CFG, PEAK))


def test_a_goal_is_for_its_shape_on_its_machine(monkeypatch):
    timings(monkeypatch, all=3.0, first=1.0)
    half = dataclasses.replace(CFG, dtype="bfloat16")

    def bound(peak, *flags):
        return list(policy.decode(arguments("--prompt=2", "--new=2", *flags), half, peak))[1].shape

    at = ("--size=1.5b", "--dtype=bfloat16", "--batch=256")
    assert bound(PEAK, *at).endswith("; goal at least 50 %")
    assert "goal" not in bound(PEAK, *at[:2], "--batch=8") + bound(PEAK, at[0], at[2]) + bound(dataclasses.replace(PEAK, where="cpu"), *at)

    steps = [{"seconds": 9.0, "seconds_rollout": 3.0, "seconds_reward": 1.0, "seconds_update": 5.0} for _ in range(4)]
    monkeypatch.setattr(policy, "train_grpo", lambda *given, **settings: (steps, [9.0, 9.0, 6.5]))
    shape = ("--batch=512", "--samples=8", "--prompt=256", "--new=512")
    step, *split = policy.grpo(arguments("--dtype=bfloat16", *shape), half, PEAK)
    assert step.value == 6.5 and step.shape.endswith("; goal at most 7 s") and step.compile_s == 5.0
    assert {figure.name.rpartition("_")[2]: figure.value for figure in split} == {"rollout": 3.0, "reward": 1.0, "update": 5.0}
    assert "goal" not in next(iter(policy.grpo(arguments("--dtype=bfloat16", *shape[:3], "--new=128"), half, PEAK))).shape


def test_a_chip_s_published_rates_count_for_bfloat16(monkeypatch):
    monkeypatch.setattr(policy, "timed", lambda call: (0.0, [0.5]))
    peak = policy.peak_of("NVIDIA H200", "gpu", "bfloat16")
    assert (peak.where, peak.flops, peak.memory_rate) == ("h200", 989e12, 4800e9) and peak.told.startswith("published: 989 TFLOP/s, 4.8e+03")
    assert set(policy.KINDS.values()) <= set(policy.CHIPS)
    here = policy.peak_of("cpu", "cpu", "float32")
    assert (here.where, here.flops, here.memory_rate) == ("cpu", 4 * 2048**3, 2**30) and here.told.startswith("measured")


def test_all_parts_at_a_tiny_shape(monkeypatch, quick_compilation):
    """With every flag of the update; the middle one of its three does not fit, which is no figure and does not stop the rest."""
    timings(monkeypatch, run=True, all=3.0, first=1.0)
    monkeypatch.setattr(policy, "model_of", lambda args: CFG)
    monkeypatch.setattr(policy, "peak_of", lambda *given: dataclasses.replace(PEAK, where="cpu"))
    args = arguments("--prompt=4", "--new=4", "--micro=2", "--remat", "--repeats=1")
    assert policy.update_settings(args) == {"micro_batch_rows": 2, "remat": True, "attention": "plain"}
    found = {figure.name: figure for figure in policy.measure(args)}
    names = ["decode", "decode_bound", "decode_peak", "train", "train_mfu", "train_peak", "grpo"]
    splits = [f"grpo_0.5b_cpu_{part}" for part in ("rollout", "reward", "update")]
    assert list(found) == [f"{name}_0.5b_cpu" for name in names] + splits + ["grpo_peak_0.5b_cpu"]
    assert all(figure.value > 0 for figure in found.values())
    assert "2 rows a micro-batch, attention plain, remat, float32" in found["train_0.5b_cpu"].shape

    def refuse(*given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(policy, "train", refuse)
    monkeypatch.setattr(policy, "grpo", lambda *given: iter(()))
    left = [figure.name for figure in policy.measure(args)]
    assert left == [f"{name}_0.5b_cpu" for name in ("decode", "decode_bound", "decode_peak", "grpo_peak")]


def test_the_shapes_are_qwen_s_and_never_end():
    for size, billions in (("0.5b", 0.494), ("1.5b", 1.544), ("7b", 7.616)):
        cfg = policy.model_of(arguments(f"--size={size}", "--dtype=bfloat16"))
        assert cfg.param_count() == pytest.approx(billions * 1e9, rel=1e-3) and cfg.dtype == "bfloat16" and not cfg.eos_token_ids


@pytest.mark.parametrize("flag", ["--part=decode,sing", "--new=1", "--samples=1", "--batch=-1", "--batch=x", "--size=3b"])
def test_flags_out_of_range_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        arguments(flag)
    assert flag.partition("=")[0] in capsys.readouterr().err
    assert arguments("--part=grpo,decode").part == ["decode", "grpo"]


def test_a_batch_of_grpo_is_of_whole_groups():
    with pytest.raises(SystemExit, match="--batch 5 is no multiple of --samples 2"):
        next(iter(policy.measure(arguments("--batch=5"))))
