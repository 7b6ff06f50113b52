"""Every field of configs/saerl.py arrives where it acts. (Arms, filters, band, steps and pre-training rows: test_saerl.py.)"""

import dataclasses
import json
import types

import numpy as np
import pytest
from test_saerl import bench_of, tiny

import models
import sae
from experiments import saerl
from jaxrl_llm.config import load_config
from jaxrl_llm.curation import labels, passes
from jaxrl_llm.curation import signals as signals_module
from jaxrl_llm.data import lab_world, sources
from jaxrl_llm.data.prompts import PromptBatch


class Recorder:
    """Stands in for a function and keeps what it was called with."""

    def __init__(self, result=None):
        self.calls, self.result = [], result

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.result


def policy_of():
    cfg = types.SimpleNamespace(d_model=8, n_layers=4, max_position=64, mlp="gated")
    return types.SimpleNamespace(cfg=cfg, params={}, tokenizer=lab_world.build_tokenizer(), name="policy")


def pool_of(rows):
    return PromptBatch(np.ones((len(rows), 1), np.int32), np.ones(len(rows), np.int32), [str(i) for i in range(len(rows))], rows)


@pytest.mark.parametrize("change", [{"d_model": 64}, {"n_layers": 3}, {"n_heads": 4}, {"d_ff": 64}, {"learning_rate": 1e-3}])
def test_the_policys_settings_reach_its_pre_training(monkeypatch, tmp_path, change):
    trained = []

    def train_sft(cfg, params, batches, settings, progress):
        trained.append((cfg, settings["optimizer"]["learning_rate"]))
        return params, None

    monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", train_sft)
    monkeypatch.setattr(models, "init", Recorder({}))
    monkeypatch.setattr(models, "save", Recorder())
    monkeypatch.setattr(lab_world, "sft_batches", lambda *_: [])
    for config in (tiny(), tiny(**{f"policy.{name}": value for name, value in change.items()})):
        saerl.pretrain(config, tmp_path, 0, False)
    (before, rate), (after, other_rate) = trained
    ((name, value),) = change.items()
    different = {f.name for f in dataclasses.fields(before) if getattr(before, f.name) != getattr(after, f.name)}
    implied = {"d_model": {"head_dim"}, "n_heads": {"n_kv_heads", "head_dim"}}.get(name, set())
    assert different == ({name} | implied if name != "learning_rate" else set()) and (other_rate, rate) == (
        (value, 3e-3) if name == "learning_rate" else (rate, rate)
    )


def test_a_given_policy_is_loaded_as_told(monkeypatch, tmp_path):
    loaded = Recorder()
    monkeypatch.setattr(passes.LanguageModel, "load", loaded)
    monkeypatch.setattr("jaxrl_llm.runtime.parse_mesh", lambda text: f"mesh {text}")
    saerl.make_policy(tiny(**{"policy.model": "folder", "policy.dtype": "bfloat16", "mesh": "fsdp=2"}), tmp_path, 3)
    monkeypatch.setattr(saerl, "pretrain", Recorder())
    saerl.make_policy(tiny(), tmp_path, 3)
    assert [args for args, _ in loaded.calls] == [
        ("folder", "bfloat16", "mesh fsdp=2"), (str(tmp_path / "policies" / "base3"), "float32", "mesh "),
    ]  # fmt: skip
    assert [args[2] for args, _ in saerl.pretrain.calls] == [3]


def dictionary_of(monkeypatch, tmp_path, **changes):
    """What `make_dictionary` trains by, or loads."""
    seen = []
    monkeypatch.setattr(sae, "harvest_activations", lambda *args, context_size, **_: seen.append((args[3], context_size)))
    monkeypatch.setattr(sae, "ActivationBuffer", lambda source, *how, seed: seen.append((how, seed)))
    monkeypatch.setattr(sae, "train_sae", lambda cfg, buffer, train, *_, **__: (seen.append((cfg, train)), []))
    monkeypatch.setattr(sae, "save", Recorder())
    monkeypatch.setattr(sae, "load", lambda path: seen.append(str(path)))
    monkeypatch.setattr(passes.LanguageModel, "load", lambda name, *_: seen.append(name) or policy_of())
    pool = pool_of(lab_world.generate_problems(4, 0))
    bench = dataclasses.replace(bench_of(tiny(**changes)), policy=policy_of(), pool=pool, folder=tmp_path)
    saerl.make_dictionary(bench)
    (tmp_path / "sae.json").unlink(missing_ok=True)
    return seen


@pytest.mark.parametrize(
    "change",
    [
        {"sae.hook": "blocks.0.mlp_act"}, {"sae.d_sae": 65}, {"sae.k": 9}, {"sae.context": 9}, {"sae.steps": 9}, {"sae.batch": 9},
        {"sae.learning_rate": 9.0}, {"sae.path": "somewhere"}, {"sae.model": "another"},
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_the_dictionarys_settings_reach_its_training(monkeypatch, tmp_path, change):
    base, found = dictionary_of(monkeypatch, tmp_path), dictionary_of(monkeypatch, tmp_path, **change)
    assert base == dictionary_of(monkeypatch, tmp_path) != found
    ((name, value),) = change.items()
    if name in ("sae.path", "sae.model"):
        assert value == found[0] and (len(found) == 1) == (name == "sae.path")


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("sae.hook", "blocks.0.mlp_act", "hook"), ("sae.pooling", ("mean",), "pooling"), ("curation.remove_length", True, "remove_length"),
        ("curation.dims", 9, "dims"), ("curation.clusters", 9, "clusters"), ("curation.answers", False, "answers"), ("curation.copies", 9, "copies"),
    ],
)  # fmt: skip
def test_settings_of_the_signals_are_their_options(field, value, option):
    """What the options do: tests/curation."""
    before, after = (dataclasses.asdict(saerl.signal_options(bench_of(config))) for config in (tiny(), tiny(**{field: value})))
    assert {name for name in before if before[name] != after[name]} == {option} and after[option] == value


@pytest.mark.parametrize(
    ("field", "value", "argument"),
    [
        ("curation.label_samples", 3, "samples"), ("data.template", "Q: {prompt}", "template"), ("data.max_prompt_tokens", 9, "max_prompt_tokens"),
        ("grpo.max_new_tokens", 9, "max_new_tokens"), ("curation.label_batch", 9, "batch_prompts"),
    ],
)  # fmt: skip
def test_settings_of_the_labels_reach_the_rollouts(monkeypatch, tmp_path, field, value, argument):
    def arguments(config):
        roll_out, rates = Recorder(), Recorder((np.zeros(64), 0))
        monkeypatch.setattr(labels, "policy_roll_out", roll_out)
        monkeypatch.setattr(labels, "pass_rates", rates)
        bench = dataclasses.replace(bench_of(config), policy=policy_of(), pool=types.SimpleNamespace(rows=[]), folder=tmp_path)
        saerl.fail_rates(bench, np.arange(3), "labels", 1)
        return roll_out.calls[0][1] | {"batch_prompts": rates.calls[0][1]["batch_prompts"]}

    before, after = arguments(tiny()), arguments(tiny(**{field: value}))
    assert {name for name in before if before[name] != after[name]} == {argument} and after[argument] == value


def test_settings_of_the_curation_say_what_is_known(monkeypatch, tmp_path):
    """How many rows are rolled out and told, and whether policies are tuned, by which arms."""
    seen = Recorder(types.SimpleNamespace(report={}, save=Recorder()))
    monkeypatch.setattr(signals_module, "measure", seen)
    monkeypatch.setattr(saerl, "fail_rates", lambda bench, rows, name, salt: len(rows))
    monkeypatch.setattr("jaxrl_llm.train.sft.fine_tuner", lambda *_: "tunes")

    def known(**changes):
        bench = dataclasses.replace(bench_of(tiny(**changes)), policy=policy_of(), folder=tmp_path, pool=pool_of([{}] * 64))
        saerl.make_signals(bench, None, None)
        args, options = seen.calls[-1]
        return args[4], int(np.isfinite(args[5]).sum()), options["tune"], options["kinds"], options["filters"]

    assert known(**{"curation.labels": 20, "curation.quality_labels": 10}) == (20, 10, "tunes", {"sae"}, {"sae"})
    arms = {"arms": ("vanilla", "full_dense"), "main_arm": "vanilla"}
    assert known(**{"curation.labels": 9, "curation.quality_labels": 8, "curation.tuned": False} | arms) == (9, 8, None, {"sae", "dense"}, {"dense"})


def test_settings_of_real_rows_reach_their_reading(monkeypatch):
    given = {
        "data.source": "pool.jsonl", "data.fields": "prompt=q,answer=a", "data.split": "dev", "data.rows": 7, "data.evals.test.source": "test.jsonl",
        "data.evals.test.fields": "prompt=question,answer=gold", "data.evals.test.split": "held", "data.max_prompt_tokens": 6, "data.reward": "maths",
    }  # fmt: skip
    rows = Recorder([{"id": "a", "prompt": "1 plus 2 =", "answer": "3"}, {"id": "b", "prompt": "1 plus 2 plus 3 plus 4 =", "answer": "10"}])
    monkeypatch.setattr(sources, "read_rows", rows)
    pool, evals, reward = saerl.make_data(tiny(**given), saerl.Cell("mixed", 0, 0), policy_of())
    read = [(args[0], args[1]["prompt"], args[1]["answer"], how["split"], how.get("limit")) for args, how in rows.calls]
    assert read == [("pool.jsonl", "q", "a", "dev", 7), ("test.jsonl", "question", "gold", "held", None)]
    assert [len(pool), len(evals["test"])] == [1, 1] and pool.dropped == 1, "the longer prompt is dropped"
    longer = saerl.make_data(tiny(**given | {"data.max_prompt_tokens": 20, "data.template": "1 1 {prompt}"}), saerl.Cell("mixed", 0, 0), policy_of())
    assert len(longer[0]) == 2 and longer[0].lengths_N[0] == pool.lengths_N[0] + 2
    other = saerl.make_data(tiny(**given | {"data.reward": "exact"}), saerl.Cell("mixed", 0, 0), policy_of())[2]
    assert type(other) is not type(reward) or other.__qualname__ != reward.__qualname__


def test_pools_bases_and_seeds_are_the_cells(monkeypatch, tmp_path, capsys):
    """Each cell once, in this order, and its policy, pool and randomness its own."""
    ran, pages = [], []
    monkeypatch.setattr(saerl, "run_cell", lambda config, root, cell: ran.append(tuple(cell)))
    from jaxrl_llm.report import saerl as page

    def build(config, root, cells, seconds):
        pages.append((config.title, [c.name for c in cells]))
        raise InterruptedError

    monkeypatch.setattr(page, "build", build)
    with pytest.raises(InterruptedError):
        saerl.run(tiny(pools=("mixed", "web"), bases=(2, 3), seeds=(5,), title="Named"), tmp_path)
    assert ran == [("mixed", 2, 5), ("mixed", 3, 5), ("web", 2, 5), ("web", 3, 5)]
    assert pages == [("Named", [saerl.Cell(*cell).name for cell in ran])] and "cell 4/4: web-base3-seed5" in capsys.readouterr().out
    pool = lambda *cell: [row["prompt"] for row in saerl.make_data(tiny(), saerl.Cell(*cell), policy_of())[0].rows]  # noqa: E731
    pools = [json.dumps(pool(*cell)) for cell in (("mixed", 0, 5), ("web", 0, 5), ("mixed", 0, 6))]
    assert len(set(pools)) == 3 and pools[0] == json.dumps(pool("mixed", 1, 5))
    rows = []
    monkeypatch.setattr(lab_world, "sft_batches", lambda made, *_: rows.append([row["prompt"] for row in made]) or [])
    monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", lambda cfg, params, *_, **__: (rows.append(params) or params, None))
    monkeypatch.setattr(models, "init", lambda cfg, key: str(key))
    monkeypatch.setattr(models, "save", Recorder())
    for base in (0, 1):
        saerl.pretrain(tiny(), tmp_path, base, False)
    assert all(one != other for one, other in zip(rows[:3], rows[3:], strict=True)), "other rows and other initial parameters"


def test_a_larger_or_smaller_filter_and_other_strata_change_the_rows_kept():
    rng, n = np.random.default_rng(0), 64
    quality, hard = rng.random(n), rng.random(n)
    signals = types.SimpleNamespace(quality={"sae": quality}, difficulty={"sae": hard}, clusters={"sae": rng.integers(0, 3, n)})
    keep = lambda **changes: saerl.keep_rows(bench_of(tiny(**changes)), tiny().arm_table.full, signals)  # noqa: E731
    assert (keep(**{"curation.strata": 1}) != keep(**{"curation.strata": 8})).any()


def test_rho_mixes_the_batches_of_the_published_order():
    rng, n = np.random.default_rng(0), 64
    signals = types.SimpleNamespace(difficulty={"sae": rng.random(n)}, clusters={"sae": rng.integers(0, 4, n)})

    def mixed(rho):
        schedule = saerl.make_arm_schedule(bench_of(tiny(**{"curation.rho": rho, "grpo.steps": 8})), "mixing", signals)
        return np.mean([len(set(signals.clusters["sae"][schedule.batch(step)])) for step in range(8)])

    assert mixed(0.0) < mixed(0.5)


def test_resampling_shows_the_plain_order_as_many_rows_as_it_may_draw():
    """Otherwise vanilla would see fewer rows than the band that it is compared with."""
    signals = types.SimpleNamespace(difficulty={"sae": np.zeros(64)}, clusters={"sae": np.zeros(64, int)})

    def distinct(tries):
        schedule = saerl.make_arm_schedule(bench_of(tiny(**{"grpo.rollout_tries": tries, "grpo.prompts_per_step": 4})), "vanilla", signals)
        return len({row for step in range(12) for row in schedule.batch(step).tolist()})

    assert (distinct(1), distinct(3)) == (12, 36)  # 3 steps of 4 prompts


@pytest.mark.parametrize("variant", ["dapo", "rloo"])
def test_the_algorithms_are_those_of_the_grpo_verb(variant):
    ours, theirs = load_config(f"configs/saerl.py:{variant}").grpo, load_config(f"configs/grpo.py:{variant}").train
    names = ("clip_high", "baseline", "advantage_scale", "aggregation")
    assert {name: ours[name] for name in names} == {name: theirs.loss[name] for name in names} and ours.rollout_tries == theirs.rollout_tries
