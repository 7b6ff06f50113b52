"""Completions equal transformers', per-token log-probabilities a full pass's; stops, streams, batches, buffers, errors."""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest

import models
from models import ModelError
from models.decode import FINISH_LENGTH, FINISH_STOP_STRING, FINISH_STOP_TOKEN, STAGE, Knobs, Rows, bucket, pad_prompts

pytestmark = pytest.mark.usefixtures("quick_compilation")

module = importlib.import_module("models.generate")  # `models.generate` is the function
TOLERANCE = 2e-5
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed: only the stored completions are checked")
# The id that pads arrays is also the model's end-of-text and padding id: only lengths may tell them apart.
CFG = dataclasses.replace(models.ModelConfig.from_hf(cases.CASES["qwen3_layer_types"]), eos_token_ids=(0,), pad_token_id=0)
PROMPTS = [np.random.default_rng(7).integers(3, CFG.vocab_size, n).tolist() for n in (4, 21, 1, 12)]
T = STAGE + 8  # most new tokens in nearly all tests: two stages of the cache


@pytest.fixture(scope="module")
def params():
    return cases.random_params(CFG)


@pytest.fixture(scope="module")
def call(params):
    """`generate` on the module's model and prompts: two samples a prompt at a temperature that gives variety."""
    settings = dict(max_new_tokens=T, num_samples=2, temperature=1.5, stop_tokens=(), seed=3)
    return lambda prompts=PROMPTS, cfg=CFG, **changes: models.generate(cfg, params, prompts, **settings | changes)


@pytest.fixture(scope="module")
def free(call):
    """The run that nothing stops."""
    return call()


def check_same(found, expected):
    """The same completions, whatever way they were made: tokens, lengths and reasons equal, log-probabilities close."""
    for name in ("completion_tokens_NT", "completion_lengths_N", "finish_reason_N", "prompt_lengths_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.logps_NT, expected.logps_NT, atol=TOLERANCE)


def check_cut(found, free, lengths, reasons):
    """`found` is the free run cut to `lengths`, with nothing after them."""
    np.testing.assert_array_equal(found.completion_lengths_N, lengths)
    np.testing.assert_array_equal(found.finish_reason_N, reasons)
    kept = np.arange(T) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(found.completion_tokens_NT, np.where(kept, free.completion_tokens_NT, 0))
    np.testing.assert_allclose(found.logps_NT, np.where(kept, free.logps_NT, 0), atol=TOLERANCE)
    assert found.completions() == [row[:n].tolist() for row, n in zip(free.completion_tokens_NT, lengths, strict=True)]


# --- against transformers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(repo):
    return np.load(repo / "tests" / "golden" / "completions.npz")


@pytest.fixture(scope="module")
def make_golden(repo):
    sys.path.insert(0, str(repo / "tests"))
    import make_golden

    return make_golden


def as_rows(rollout, width):
    return [row + [-1] * (width - len(row)) for row in rollout.completions()]


@pytest.mark.parametrize("name", cases.CASES)
def test_greedy_equals_the_stored_completions(name, golden, make_golden, tmp_path):
    """A batch of prompts of different lengths against transformers' one by one, past the first stage and the window."""
    cases.write_checkpoint(tmp_path, cases.CASES[name], cases.case_seed(name))
    cfg, params = models.load(tmp_path)
    width = make_golden.new_tokens(name)
    found = models.generate(cfg, params, make_golden.prompts(name), max_new_tokens=width, temperature=0.0)
    expected = golden[f"{name}/tokens"]
    np.testing.assert_array_equal(as_rows(found, width), expected)
    assert cases.relative_error(found.logps_NT, golden[f"{name}/logps"]) < TOLERANCE
    ended = (expected == cfg.eos_token_ids[0]).any(1)
    np.testing.assert_array_equal(found.finish_reason_N, np.where(ended, FINISH_STOP_TOKEN, FINISH_LENGTH))


def test_every_case_is_stored_and_they_stop_and_pass_stages(golden):
    assert set(golden.files) == {f"{name}/{what}" for name in cases.CASES for what in ("tokens", "logps")}
    lengths = {name: (golden[f"{name}/tokens"] >= 0).sum(1) for name in cases.CASES}
    assert all(n.max() > STAGE for name, n in lengths.items() if name != "llama_dynamic")  # it has 16 positions
    assert sum((n < T).sum() for n in lengths.values()) >= 5


@needs_torch
@pytest.mark.parametrize("name", cases.CASES)
def test_todays_transformers_gives_the_stored_completions(name, golden, make_golden):
    live = make_golden.case_completions(name)
    np.testing.assert_array_equal(live[f"{name}/tokens"], golden[f"{name}/tokens"])
    assert cases.relative_error(live[f"{name}/logps"], golden[f"{name}/logps"]) < TOLERANCE


LILY = "Once upon a time, there was a little girl named Lily."
GOES_ON = " She loved to play outside in the park. One day, she saw a big, red ball."


def test_the_story_goes_on(assets):
    """Greedy text of a real model; a stop string cuts it in the middle of a stage."""
    folder = assets / "checkpoints" / "stories260k"
    (cfg, params), tokenizer = models.load(folder), models.load_tokenizer(folder)
    prompt = tokenizer.encode(LILY)
    text = lambda rollout: tokenizer.decode(prompt + rollout.completions()[0], skip_special_tokens=True)  # noqa: E731
    greedy = functools.partial(models.generate, cfg, params, [prompt], max_new_tokens=48, temperature=0.0, tokenizer=tokenizer)
    whole = greedy(stop_strings=["never"])
    assert text(whole).startswith(LILY + GOES_ON) and whole.finish_reason_N[0] == FINISH_LENGTH
    cut = greedy(stop_strings=["never", " big, r"])
    n = int(cut.completion_lengths_N[0])
    assert cut.finish_reason_N[0] == FINISH_STOP_STRING and cut.completions()[0] == whole.completions()[0][:n]
    before = tokenizer.decode(whole.completions()[0][: n - 1])
    assert " big, r" in tokenizer.decode(cut.completions()[0]) and " big, r" not in before


@needs_torch
@pytest.mark.parametrize("name", ["stories260k", "babyllama-0.9m"])
def test_real_checkpoints_equal_transformers(name, assets, make_golden):
    folder = assets / "checkpoints" / name
    (cfg, params), tokenizer = models.load(folder), models.load_tokenizer(folder)
    prompts = [tokenizer.encode(text) for text in (LILY, "Tom", "One day, a dog and a cat went to the")]
    tokens, logps, lead = make_golden.reference_completions(folder, prompts, 48)
    found = models.generate(cfg, params, prompts, max_new_tokens=48, temperature=0.0)
    assert lead > 1e-4
    np.testing.assert_array_equal(as_rows(found, 48), tokens)
    assert cases.relative_error(found.logps_NT, logps) < TOLERANCE


# --- samples, log-probabilities, streams -------------------------------------------------------------------------------


def test_samples_of_a_prompt_equal_separate_prompts(call, free):
    """Same rows, same numbers, whether the samples of a prompt share its prefill or each row has its own."""
    check_same(call([p for p in PROMPTS for _ in range(2)], num_samples=1), free)
    np.testing.assert_array_equal(free.group_ids_N, [0, 0, 1, 1, 2, 2, 3, 3])
    assert [row[:n].tolist() for row, n in zip(free.prompt_tokens_NT, free.prompt_lengths_N)] == [p for p in PROMPTS for _ in range(2)]


def program(params):
    """(plan, arguments of `_start` after it) of the module's prompts, as `generate` makes them."""
    plan = module._plan_of(CFG, 2, T, 1.5, 0, 1.0, None)
    tokens, lengths = (jnp.asarray(a) for a in pad_prompts(PROMPTS, 24, 4))
    rows = Rows(jnp.arange(8, dtype=jnp.int32), jnp.full(8, T, jnp.int32))
    return plan, (params, tokens, lengths, rows, Knobs(jax.random.key(3), jnp.float32(1.5), jnp.float32(1)))


def test_the_prompt_is_computed_and_kept_once_for_its_samples(params):
    """In the program itself: keys of four prompts for eight rows, and no activation of eight rows times their width."""
    plan, arguments = program(params)
    prefix, state = jax.eval_shape(functools.partial(module._start, plan), *arguments)
    K, H = CFG.n_kv_heads, CFG.head_dim
    assert [k.shape for k in prefix.k] == [(4, K, H, 24)] * CFG.n_layers
    stage = jax.eval_shape(lambda *a: module._advance(plan, *a, (STAGE, STAGE)), params, (prefix,), state, *arguments[2:])[0]
    assert [k.shape for k in stage.k] == [(8, K, H, STAGE)] * CFG.n_layers
    text = str(jax.make_jaxpr(functools.partial(module._start, plan))(*arguments))
    assert "f32[4,24," in text and "f32[8,24," not in text


def full_logps(params, rollout, temperature):
    """log_softmax(logits / temperature) [N, T, V] at the completions' places, by one pass over prompt and completion."""
    rows = [p[:n].tolist() + c for p, n, c in zip(rollout.prompt_tokens_NT, rollout.prompt_lengths_N, rollout.completions(), strict=True)]
    tokens = np.array([row + [0] * (21 + T - len(row)) for row in rows], np.int32)
    logits = np.asarray(models.apply(CFG, params, tokens, lengths=[len(row) for row in rows])[0], np.float64) / temperature
    at = rollout.prompt_lengths_N[:, None] - 1 + np.arange(T)
    logits = np.take_along_axis(logits, at[..., None], axis=1)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def check_logps(params, rollout, temperature):
    """All rows of full length: the sampler's log-probabilities are one pass's. Returns all of those."""
    logps = full_logps(params, rollout, temperature)
    chosen = np.take_along_axis(logps, rollout.completion_tokens_NT[..., None], axis=-1)[..., 0]
    assert rollout.logps_NT.dtype == np.float32 and (rollout.completion_lengths_N == T).all()
    np.testing.assert_allclose(rollout.logps_NT, chosen, atol=TOLERANCE)
    return logps


def test_log_probabilities_are_those_of_one_pass(params, free):
    check_logps(params, free, 1.5)


def test_log_probabilities_are_of_the_full_vocabulary_whatever_restricts_the_draw(call, params):
    found = call(temperature=0.7, top_k=5, top_p=0.9)
    logps = check_logps(params, found, 0.7)
    chosen = found.logps_NT[..., None] - TOLERANCE
    assert ((logps > chosen).sum(-1) <= 5).all() and (logps.argmax(-1) != found.completion_tokens_NT).any()
    best = call(temperature=0.7, top_k=5, top_p=1e-6)
    np.testing.assert_array_equal(check_logps(params, best, 0.7).argmax(-1), best.completion_tokens_NT)


def test_seeds(call, free):
    check_same(call(seed=jax.random.key(3)), free)
    other = call(seed=4)
    assert (other.completion_tokens_NT[:, :4] != free.completion_tokens_NT[:, :4]).any(1).all()
    first, second = free.completion_tokens_NT[::2], free.completion_tokens_NT[1::2]
    assert (first != second).any(1).all()


def test_two_tokens_follow_the_joint_distribution(params):
    """Chi-square over the 16 pairs that top-k 4 allows: rows and steps draw independently."""
    n, prompt, V = 4096, PROMPTS[1], CFG.vocab_size
    found = models.generate(CFG, params, [prompt], max_new_tokens=2, num_samples=n, temperature=2.0, top_k=4, stop_tokens=())
    logits = np.asarray(models.apply(CFG, params, [[*prompt, token] for token in range(V)])[0][:, -2:], np.float64)

    def best_four(logits):
        best = np.argsort(-logits, axis=-1)[..., :4]
        mass = np.exp(np.take_along_axis(logits, best, -1) / 2)
        return best, mass / mass.sum(-1, keepdims=True)

    firsts, p_first = best_four(logits[0, 0])
    seconds, p_second = best_four(logits[firsts, 1])
    pairs = found.completion_tokens_NT.tolist()
    counts = np.array([[pairs.count([a, b]) for b in row] for a, row in zip(firsts, seconds, strict=True)])
    expected = n * p_first[:, None] * p_second
    assert counts.sum() == n and expected.min() > 5
    assert np.sum((counts - expected) ** 2 / expected) < 15 + 5 * np.sqrt(30)


def test_batches_change_nothing(call, free):
    """Three prompts a batch (the last batch has one), and at least one prompt whatever max_rows says."""
    for max_rows in (7, 1):
        check_same(call(max_rows=max_rows), free)


def test_padding_and_order_change_nothing(params, free):
    """Prompts in another order with their rows' numbers, wider, and among rows of length 0, which come back empty."""
    order = [2, 0, 3, 1]
    tokens, lengths = pad_prompts([PROMPTS[i] for i in order], 32, 6)
    rows = np.append(np.repeat(order, 2) * 2 + np.tile([0, 1], 4), [0] * 4).astype(np.int32)
    found = models.sample_tokens(
        CFG, params, jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(3), num_samples=2, max_new_tokens=T,
        temperature=1.5, stop_tokens=(), row_ids=jnp.asarray(rows),
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens_BT[:8], free.completion_tokens_NT[rows[:8]])
    np.testing.assert_allclose(found.logps_BT[:8], free.logps_NT[rows[:8]], atol=TOLERANCE)
    assert (np.asarray(found.lengths_B) == [T] * 8 + [0] * 4).all()
    assert not np.asarray(found.tokens_BT[8:]).any() and not np.asarray(found.logps_BT[8:]).any()


# --- many layers, scanned ----------------------------------------------------------------------------------------------


@pytest.fixture
def scanned(monkeypatch):
    """Sampling scans over the layers, however few there are."""
    monkeypatch.setattr(module, "UNROLLED_LAYERS", 0)


def test_scanned_layers_give_what_unrolled_give(call, free, monkeypatch):
    """Grouped heads and windows, samples of a prompt, two stages; drawn, greedy, and with the host's look after each stage."""
    text = Letters().decode(free.completion_tokens_NT[1].tolist())
    ways = {}, {"temperature": 0.0}, {"stop_strings": [text[40:46]], "tokenizer": Letters()}
    expected = [free, *(call(**way) for way in ways[1:])]
    monkeypatch.setattr(module, "UNROLLED_LAYERS", 0)
    for way, wanted in zip(ways, expected, strict=True):
        check_same(call(**way), wanted)


@pytest.mark.parametrize("name", ["qwen2_upper_window", "mistral_window"])
def test_scanned_greedy_equals_the_stored_completions(name, golden, make_golden, tmp_path, scanned):
    test_greedy_equals_the_stored_completions(name, golden, make_golden, tmp_path)


def test_the_program_of_many_layers_is_one_layers():
    """It does not grow with the layers beyond UNROLLED_LAYERS, up to which it does."""

    def lines(n_layers):
        cfg = dataclasses.replace(CFG, n_layers=n_layers, layer_windows=())
        shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 16), (4,))]
        sample = functools.partial(models.sample_tokens, cfg, max_new_tokens=T)
        return len(jax.jit(sample).lower(models.abstract_params(cfg), *shapes, jax.random.key(0)).as_text().splitlines())

    most = module.UNROLLED_LAYERS
    assert lines(most + 1) == lines(2 * most) < lines(most) / 2 and lines(most - 1) < lines(most)


# --- stops ---------------------------------------------------------------------------------------------------------------


def first_hits(free, stop, start=0):
    """Each row's length up to its first token of `stop`, or T."""
    hit = np.isin(free.completion_tokens_NT, stop)
    return np.where(hit.any(1), hit.argmax(1) + 1, T), hit.any(1)


def test_stop_tokens(call, free):
    """The stop token is kept and counted, nothing follows it, other rows go on. The first of several counts."""
    for stop in itertools.product(free.completion_tokens_NT[:, 0].tolist(), range(CFG.vocab_size)):
        lengths, hit = first_hits(free, stop)
        if lengths[hit].max() > STAGE and not hit.all():
            break
    assert lengths.min() == 1 and lengths[hit].max() > STAGE and not hit.all()
    check_cut(call(stop_tokens=stop), free, lengths, np.where(hit, FINISH_STOP_TOKEN, FINISH_LENGTH))


def test_the_models_end_of_text_is_the_default_stop(call, free):
    """Its id is the padding's too, and 0: a sampled one is kept and counted."""
    lengths, hit = first_hits(free, [0])
    assert hit.any() and not hit.all()
    found = call(stop_tokens=None)
    check_cut(found, free, lengths, np.where(hit, FINISH_STOP_TOKEN, FINISH_LENGTH))
    assert all(row[-1] == 0 for row, ended in zip(found.completions(), hit, strict=True) if ended)


def test_an_end_of_text_in_the_prompt_is_a_token(call, params):
    """Prompts that hold, or end in, the id of padding and end-of-text go on as any other."""
    found = call([[5, 0, 9, 0], [0], [*PROMPTS[1][:-1], 0], [8, 0]])
    np.testing.assert_array_equal(found.prompt_lengths_N[::2], [4, 1, 21, 2])
    check_logps(params, found, 1.5)


class Letters:
    """Two letters a token, so that strings can lie across the border of two tokens."""

    def decode(self, ids):
        return "".join(chr(97 + i % 26) + chr(65 + i // 26) for i in ids)


def string_lengths(free, strings):
    """Each row's length up to the token that completes a stop string, by trying every length; and whether it has one."""
    found = []
    for row in free.completion_tokens_NT.tolist():
        holds = (n for n in range(1, T + 1) if any(s in Letters().decode(row[:n]) for s in strings))
        found.append(next(holds, 0))
    return np.where(found, found, T), np.array(found) > 0


STRINGS = {  # name: (the strings from a row's text, two letters a token; that row's length)
    "at the first token": (lambda text: [text[:2]], 1),
    "half of the first token": (lambda text: text[0], 1),
    "across a border in mid-stage": (lambda text: [text[21:25]], 13),
    "across the border of two stages": (lambda text: [text[2 * STAGE - 3 : 2 * STAGE + 3]], STAGE + 2),
    "at the last token": (lambda text: [text[-5:]], T),
    "the earliest of several": (lambda text: ["absent", text[60:65], text[30:35], ""], 18),
    "never": (lambda text: ["absent"], T),
}


@pytest.mark.parametrize("name", STRINGS)
def test_stop_strings(name, call, free):
    """A row ends with the token that completes a string; its tokens, log-probabilities and length are cut there.

    Rows that sample an end-of-text token first end with that.
    """
    of_text, expected = STRINGS[name]
    by_token, token_hit = first_hits(free, [0])
    row = np.flatnonzero(~token_hit)[-1]
    strings = of_text(Letters().decode(free.completion_tokens_NT[row].tolist()))
    by_string, string_hit = string_lengths(free, [s for s in strings if s])
    assert by_string[row] == expected
    of_string = string_hit & (by_string <= by_token)
    reasons = np.where(of_string, FINISH_STOP_STRING, np.where(token_hit, FINISH_STOP_TOKEN, FINISH_LENGTH))
    found = call(stop_strings=strings, stop_tokens=None, tokenizer=Letters())
    check_cut(found, free, np.minimum(by_token, by_string), reasons)


def test_stop_strings_around_a_stop_token(call, free):
    """Before it, the string decides; after it, the token; the token that does both counts as the string."""
    by_token, token_hit = first_hits(free, [0])
    row = next(i for i in np.flatnonzero(token_hit) if 5 < by_token[i] < T - 5)
    text, n = Letters().decode(free.completion_tokens_NT[row].tolist()), by_token[row]
    cases = [(n - 3, FINISH_STOP_STRING), (n, FINISH_STOP_STRING), (n + 4, FINISH_STOP_TOKEN)]
    for end, reason in cases:
        found = call(stop_strings=[text[2 * end - 5 : 2 * end]], stop_tokens=None, tokenizer=Letters())
        assert (found.completion_lengths_N[row], found.finish_reason_N[row]) == (min(end, n), reason)


def test_stop_strings_end_decoding_with_the_stage(call, free, monkeypatch):
    """The host looks at the text after a stage: no later stage runs once every row has its string."""
    ran, advance = [], module._jitted_advance

    def watched(*arguments):
        kv, state = advance(*arguments)
        ran.append(int(state.step))
        return kv, state

    monkeypatch.setattr(module, "_jitted_advance", watched)
    strings = [Letters().decode(row[3:5].tolist()) for row in free.completion_tokens_NT]
    found = call(stop_strings=strings, stop_tokens=None, tokenizer=Letters())
    assert (found.completion_lengths_N <= 5).all() and ran == [STAGE]
    call(stop_strings=strings[:1], stop_tokens=None, tokenizer=Letters())
    assert ran == [STAGE, STAGE, T]


# --- limits of a prompt, and places that are filled again ----------------------------------------------------------------


LIMITS = [T, 3, STAGE + 1, 1]


def test_each_prompt_has_its_own_most_new_tokens(call, free):
    lengths = np.repeat(LIMITS, 2)
    check_cut(call(max_new_tokens=LIMITS), free, lengths, np.full(8, FINISH_LENGTH))


WAYS_TO_END = {
    "length": {},
    "limits": {"max_new_tokens": LIMITS * 2},
    "greedy": {"temperature": 0.0},
    "stop tokens": {"stop_tokens": tuple(range(0, 64, 9))},
    "stop strings": {"stop_tokens": tuple(range(0, 64, 17)), "stop_strings": ["a", "bC"], "tokenizer": Letters()},
}


@pytest.mark.parametrize("way", WAYS_TO_END)
def test_places_filled_again_give_the_plain_loops_completions(way, call):
    """16 rows in 6 places, prompts prefilled three at a time: rows enter at any step, the ring goes round, the last places are few."""
    settings = {"seed": 5, "prompts": [*PROMPTS, *PROMPTS[::-1]]} | WAYS_TO_END[way]
    expected = call(**settings)
    assert way in ("length", "greedy") or len(set(expected.completion_lengths_N.tolist())) > 2
    check_same(call(**settings, refill=True, max_rows=6), expected)


def test_places_are_halved_when_no_rows_wait(call, monkeypatch):
    """The first row lasts long, the others do not: it ends among the fewest places; scanned layers do as well."""
    places = importlib.import_module("models.refill")
    sizes, decode = [], places._decode

    def watched(plan, layers, held, *rest):
        sizes.append(held.done_B.shape[0])
        return decode(plan, layers, held, *rest)

    monkeypatch.setattr(places, "_decode", watched)
    monkeypatch.setattr(places, "FEWEST", 2)
    monkeypatch.setattr(module, "UNROLLED_LAYERS", 0)
    check_same(call(max_new_tokens=LIMITS, refill=True), call(max_new_tokens=LIMITS))
    assert sizes[0] == 8 and sizes[-1] == 2 and sizes == sorted(sizes, reverse=True)


def test_no_prompts_fill_no_places(call):
    assert call([], refill=True).completions() == [] and call([], max_new_tokens=[]).completions() == []


# --- work and buffers ------------------------------------------------------------------------------------------------------


def test_decoding_stops_when_every_row_has(call, free, monkeypatch):
    """One pass over the prompts, then one a token but the first: as many passes as the longest completion has tokens.

    They are counted as they run, not as they are traced; no other test has this max_new_tokens, so that the program
    is compiled with the count in it.
    """
    runs, forward = [], module.forward

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: runs.append(1))
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "forward", counted)
    stop = sorted({int(row[5]) for row in free.completion_tokens_NT})
    lengths, _ = first_hits(free, stop)
    found = call(stop_tokens=stop, max_new_tokens=T + 1)
    np.testing.assert_array_equal(found.completion_lengths_N, lengths)
    jax.effects_barrier()
    assert len(runs) == lengths.max() <= 6


def test_many_stages_give_what_two_give(call, free, monkeypatch):
    """Up to four earlier caches beside the prompt's, in layers with and without a window, and with the host's look after each stage."""
    text = Letters().decode(free.completion_tokens_NT[1].tolist())
    strings = dict(stop_strings=[text[40:46]], tokenizer=Letters())
    expected = call(**strings)
    monkeypatch.setattr(module, "STAGE", 4)
    module._sample_tokens.clear_cache()  # it does not know that the stages differ
    assert [end for _, end in module._stages(T)] == [4, 8, 16, 32, 40]
    check_same(call(), free)
    check_same(call(**strings), expected)
    module._sample_tokens.clear_cache()


def test_stages_and_buckets():
    assert [module._stages(n) for n in (1, STAGE)] == [[(1, 1)], [(STAGE, STAGE)]]
    assert module._stages(200) == [(32, 32), (32, 64), (64, 128), (72, 200)]
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 25)] == [1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert bucket(3, 16) == 16 and bucket(17, 16) == 24
    assert all(n <= bucket(n) <= max(1.5 * n, 1) for n in range(1, 300))


def test_many_prompt_lengths_and_knobs_need_few_programs(params):
    """24 lengths make two widths, five to eight prompts two heights; temperature, top-p and seed are not compiled in."""
    settings = dict(max_new_tokens=3, stop_tokens=())
    before = module._sample_tokens._cache_size()
    for n in range(1, 25):
        models.generate(CFG, params, [[5] * n], temperature=n / 10, top_p=n / 25, seed=n, **settings)
    assert module._sample_tokens._cache_size() - before == 2
    for n in (5, 6, 7, 8):
        models.generate(CFG, params, [[5]] * n, top_p=0.5, **settings)
    assert module._sample_tokens._cache_size() - before == 2 + 2


@pytest.mark.parametrize("unrolled", [module.UNROLLED_LAYERS, 0])
def test_decoding_copies_no_cache(params, unrolled, monkeypatch):
    """A stage's loop writes its cache in place, reads the earlier ones as they are, and takes over the state's buffers."""
    monkeypatch.setattr(module, "UNROLLED_LAYERS", unrolled)
    layers = "" if unrolled else f"{CFG.n_layers},"  # of the stack, where the layers' caches are one array
    plan, (_, tokens, lengths, *rest) = program(params)
    prompt, state = module._jitted_start(plan, params, tokens, lengths, *rest)
    earlier = (prompt,)
    for stage in module._stages(T):
        given = jax.tree.leaves((state.tokens_BT, state.logps_BT))
        arguments = (plan, params, earlier, state, lengths, *rest, stage)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # JAX warns of donated buffers that cannot be used
            lowered = module._jitted_advance.lower(*arguments)
        assert lowered.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(state))
        caches = {f"f32[{','.join(map(str, array.shape))}]" for kv in earlier for array in jax.tree.leaves((kv.k, kv.v))}
        K, H = CFG.n_kv_heads, CFG.head_dim
        caches |= {f"f32[{layers}8,{K},{H},{stage[0]}]", f"f32[{layers}8,{K},{stage[0]},{H}]"}
        inside = lowered.compile().as_text().split("\nENTRY ")[0]  # the loop's body, and the outside last
        assert "dynamic-update-slice" in inside and not caches & set(re.findall(r"= (f32\[[\d,]+\])\S* copy\(", inside))
        kv, state = module._jitted_advance(*arguments)
        assert all(array.is_deleted() for array in given)
        earlier += (kv,)


# --- edges and errors ------------------------------------------------------------------------------------------------------


def test_no_prompts_and_one_token(call, free):
    empty = call([])
    assert empty.completion_tokens_NT.shape == empty.logps_NT.shape == (0, T) and empty.completions() == []
    one = call(max_new_tokens=1)
    np.testing.assert_array_equal(one.completion_tokens_NT, free.completion_tokens_NT[:, :1])


ARGUMENTS = [
    ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
    ({"temperature": -0.5}, "temperature is -0.5; it must be 0 (greedy) or above"),
    ({"temperature": float("nan")}, "temperature is nan; it must be 0 (greedy) or above"),
    ({"top_k": -1}, "top_k is -1; it must be 0 (no limit) or above"),
    ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1 (no limit)"),
    ({"top_p": 1.5}, "top_p is 1.5; it must be above 0 and at most 1 (no limit)"),
    ({"stop_tokens": [3, 64]}, "stop_tokens (3, 64) name ids outside the vocabulary of 64"),
    ({"stop_tokens": [-1]}, "stop_tokens (-1,) name ids outside the vocabulary of 64"),
]
PROMPT_MISTAKES = [
    ({"prompts": [[3], []]}, "prompt 1 is empty; give at least one token (the model's beginning-of-text id, say)"),
    ({"prompts": [[3], [4, 64, 5]]}, "prompt 1 holds token id 64, outside the vocabulary of 64"),
    ({"prompts": [[-1, 70]]}, "prompt 0 holds token id -1, outside the vocabulary of 64"),
    (
        {"prompts": [[3] * 250], "max_new_tokens": 7},
        "prompt 0 has 250 tokens and max_new_tokens is 7, but the model's context is 256; shorten one of them",
    ),
    ({"prompts": "text"}, 'prompts are text; give lists of token ids: tokenizer(texts)["input_ids"]'),
    ({"prompts": ["text"]}, 'prompts are text; give lists of token ids: tokenizer(texts)["input_ids"]'),
    ({"prompts": [3, 4]}, "prompt 0 is 3; give a list of token ids for each prompt"),
    ({"prompts": [[3], [[4]]]}, "prompt 1 is [[4]]; give a list of token ids for each prompt"),
    ({"prompts": [[3], [1.5]]}, "prompt 1 holds float64 numbers; token ids are whole numbers"),
    ({"max_new_tokens": [5, 5]}, "max_new_tokens is int64 of shape (2,); give one whole number, or one for each of 4 prompts"),
    ({"max_new_tokens": [5, 0, 5, 5]}, "max_new_tokens of prompt 1 is 0; it must be at least 1"),
    ({"stop_strings": [7]}, "stop_strings hold 7, which is no text; ids belong into stop_tokens"),
    ({"stop_strings": ["end"]}, "stop_strings needs the tokenizer: pass tokenizer=models.load_tokenizer(folder)"),
]


@pytest.mark.parametrize(("settings", "message"), ARGUMENTS + PROMPT_MISTAKES)
def test_mistakes_are_said_in_one_line(call, settings, message):
    with pytest.raises(ModelError) as error:
        call(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *ARGUMENTS,
        (
            {"max_new_tokens": 241},
            "the prompts are 16 tokens wide and max_new_tokens is 241, but the model's context is 256; shorten one of them",
        ),
    ],
)
def test_the_core_checks_its_arguments_too(params, settings, message):
    with pytest.raises(ModelError) as error:
        models.sample_tokens(CFG, params, jnp.ones((1, 16), jnp.int32), jnp.array([16]), jax.random.key(0), **settings)
    assert str(error.value) == message
