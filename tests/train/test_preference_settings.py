"""Every field of configs/dpo.py and configs/online_dpo.py changes what a run reads, trains with or leaves; both in bfloat16; their pages.

That each field of `train` arrives as its own setting: test_grpo_settings.py. What the formulas make of it: test_preference_step.py (loss),
test_train_state.py (optimizer), test_train_dpo.py and test_online_dpo.py (loop, sampling, memory).
"""

import dataclasses
import json
import logging
import types

import numpy as np
import pytest
import tiny_grpo as tiny
import tiny_preferences as prefs
from test_grpo_settings import sampled_by
from test_preference_verbs import FIELDS, config_of, model, records, sums, write  # noqa: F401 (fixtures)

import models
import models.errors
from jaxrl_llm.cli import main
from jaxrl_llm.commands import dpo, grpo, online_dpo
from jaxrl_llm.config import load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.report import build_report, run_report
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict
from jaxrl_llm.train import dpo as train_dpo
from jaxrl_llm.train import online_dpo as train_online


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Sums of two digits with their answers, for a policy that samples."""
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(5)]
    return write(tmp_path_factory.mktemp("asked") / "asked.jsonl", rows)


@pytest.fixture
def given(model, sums, asked, tmp_path, monkeypatch):  # noqa: F811
    """(verb, config changes) -> what its trainer is called with: a run that ends there."""
    base = {
        "dpo": dict(data__fields=FIELDS, evals=f"sums={sums}", batch_rows=4, max_length=16),
        "online_dpo": dict(
            data__fields="prompt=question", evals=f"sums={asked}", reward__name="exact", max_prompt_tokens=16, schedule__batch_prompts=4
        ),
    }

    def call(verb, **changes):
        seen = {}

        def trained(cfg, params, *arguments, mesh):
            names = ["data", "schedule", "settings", "run_dir", "evals"]
            if verb == "online_dpo":
                names = ["tokenizer", "data", "reward", "schedule", "settings", "run_dir", "evals"]
            seen.update(zip(names, arguments, strict=True), dtype=cfg.dtype, mesh=mesh)
            raise InterruptedError

        command, trainer = (dpo, train_dpo) if verb == "dpo" else (online_dpo, train_online)
        monkeypatch.setattr(trainer, f"train_{verb}", trained)
        source = changes.pop("data__source", sums if verb == "dpo" else asked)
        folder = changes.pop("workdir", None) or tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(InterruptedError):
            command.run(config_of(verb, changes.pop("model", model), source, **(base[verb] | changes)), str(folder))
        return seen

    return call


@pytest.mark.parametrize("verb", ["dpo", "online_dpo"])
def test_fields_that_both_verbs_have(given, verb, tmp_path, sums, asked, model):  # noqa: F811
    base, rows = given(verb), 25 if verb == "dpo" else 20
    assert len(base["data"]) == rows == len(base["evals"]["sums"]) and base["mesh"] is None and base["settings"].steps == 100
    assert len(given(verb, eval_limit=3)["evals"]["sums"]) == 3 and len(given(verb, data__limit=8)["data"]) == 8
    assert given(verb, evals="")["evals"] == {} and given(verb, train__steps=5)["settings"].steps == 5
    assert (base["dtype"], given(verb, dtype="bfloat16")["dtype"]) == ("float32", "bfloat16")
    with pytest.raises(models.errors.ModelError, match="needs 3 devices"):
        given(verb, mesh="data=3")
    tokens = lambda found: found["data"].prompts if verb == "dpo" else found["data"].token_lists()  # noqa: E731
    assert [len(tokens) for tokens in tokens(given(verb, template="1 {prompt}"))] == [len(tokens) + 1 for tokens in tokens(base)]
    seeds = [given(verb, **{name: 1}) for name in (["seed"] if verb == "dpo" else ["train__seed"])]
    assert all(found["schedule"].batch(0).tolist() != base["schedule"].batch(0).tolist() for found in seeds)
    # A workdir of another run is kept unless it is to be cleared.
    given(verb, workdir=tmp_path / "one")
    (tmp_path / "one" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    with pytest.raises(UserError, match="overwrite"):
        given(verb, workdir=tmp_path / "one", data__limit=8)
    assert len(given(verb, workdir=tmp_path / "one", data__limit=8, overwrite=True)["data"]) == 8


@pytest.mark.parametrize("verb", ["dpo", "online_dpo"])
def test_the_split_and_bad_rows_are_asked_for(given, monkeypatch, verb):
    found, module = [], dpo if verb == "dpo" else grpo
    read = module.read_rows

    def read_rows(*args, **how):
        found.append((how["split"], how["on_bad"]))
        return read(*args, **how)

    monkeypatch.setattr(module, "read_rows", read_rows)
    given(verb, data__split="test", data__on_bad="skip")
    given(verb)
    assert found == [("test", "skip")] * 2 + [("train", "error")] * 2


def test_fields_of_dpo_alone(given):
    base = given("dpo")
    assert len(base["schedule"].batch(0)) == 4 and len(given("dpo", batch_rows=5)["schedule"].batch(0)) == 5
    kept = given("dpo", data__held_out=5)
    assert len(kept["data"]) == 20 and kept["evals"]["held_out"].ids == base["data"].ids[20:]
    ends = given("dpo", separator="= ")
    assert [len(pair[0]) for pair in ends["data"].completions] == [len(pair[0]) + 1 for pair in base["data"].completions]
    # A prompt has four tokens, a completion one and its end.
    assert {len(pair[0]) for pair in given("dpo", max_length=5, overflow="truncate")["data"].completions} == {1}
    for overflow, message in (("drop", "no row is left: all 25"), ("error", "has 6 tokens, over max_length=5")):
        with pytest.raises(UserError, match=message):
            given("dpo", max_length=5, overflow=overflow)


def test_fields_of_online_dpo_alone(given, asked, tmp_path):
    base = given("online_dpo")
    assert len(base["schedule"].batch(0)) == 4 and len(given("online_dpo", schedule__batch_prompts=5)["schedule"].batch(0)) == 5
    assert (given("online_dpo", max_prompt_tokens=3, overflow="truncate")["data"].lengths_N == 3).all()
    with pytest.raises(UserError, match="has 4 tokens"):
        given("online_dpo", max_prompt_tokens=3)
    upper = lambda found: [v.value for v in found["reward"]([RewardInput("p", "A", "a", {})])]  # noqa: E731
    assert upper(base) != upper(given("online_dpo", reward__options='{"ignore_case": false}'))
    assert type(given("online_dpo", reward__name="maths")["reward"]) is not type(base["reward"])
    with pytest.raises(UserError, match="both are given"):
        given("online_dpo", data__curated=str(tmp_path))
    with pytest.raises(UserError, match="schedule"):
        given("online_dpo", schedule__kind="order")  # which only a curated set has


@pytest.mark.parametrize("verb", ["grpo", "online_dpo"])
def test_fields_of_the_schedule_that_follows_the_policy(monkeypatch, verb):
    """Each changes what is drawn from a curated set, or (refilter_every, balance) arrives."""
    rng, n = np.random.default_rng(0), 64
    curated = types.SimpleNamespace(
        rows=[{"id": str(i)} for i in range(n)], manifest={"config": {"difficulty": {"labels": "rollouts"}}}, difficulty=rng.random(n),
        cluster=np.sort(rng.integers(0, 5, n) ** 2 // 4), keep=np.ones(n, bool),
    )  # fmt: skip
    vectors = rng.normal(size=(n, 3)).astype(np.float32)
    monkeypatch.setattr(grpo, "_kept_arrays", lambda *_: {"vectors": vectors})

    def drawn(**changes):
        fields = {"schedule.kind": "band", "schedule.batch_prompts": 8, "data.curated": "x"}
        config = load_config(f"configs/{verb}.py", fields | {f"schedule.band.{name}": value for name, value in changes.items()})
        band = grpo._band(config, curated, np.arange(n), None)
        rows = []
        for step in range(4):
            rows += band.batch(step).tolist()
            band.observe(step, np.array(rows[-8:]), np.full(8, 0.5))
        return rows, band.refilter_every

    base = drawn()
    assert drawn() == base
    for change in (dict(temperature=0.05), dict(easy_floor=0.6), dict(epoch_share=0.9), dict(balance="equal"), dict(balance="none")):
        assert drawn(**change)[0] != base[0], change
    assert (base[1], drawn(refilter_every=3)[1]) == (0, 3)


BASE = dataclasses.replace(prefs.ONLINE, steps=2, eval_every=1, eval_samples=2)


def left_by(folder, monkeypatch, **changes):
    """What two steps leave: the steps of evaluations, samples and checkpoints, and in how large batches it sampled."""
    batches = sampled_by(monkeypatch)
    prefs.train_online(folder, dataclasses.replace(BASE, **changes), evals={"held_out": tiny.prompts(6, seed=1)})
    monkeypatch.undo()
    evals = [record for record in records(folder) if record["kind"] == "eval"]
    shown = (folder / "samples.jsonl").read_text().splitlines()
    return {
        "evals": [record["step"] for record in evals], "rates": [record.get("rates") for record in evals],
        "by": [record["by"] for record in evals], "samples": [len(json.loads(line)["prompts"]) for line in shown],
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()), "batches": batches,
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
    found = left_by(tmp_path / "run", monkeypatch, **change)
    assert {name for name in found if found[name] != base_run[name]} == different


def test_the_share_of_ties_that_is_warned_of(tmp_path, caplog):
    def warned(name, share):
        caplog.clear()
        config = dataclasses.replace(BASE, steps=20, eval_every=0, eval_samples=0, checkpoint_every=0, zero_spread_warning=share)
        half = lambda inputs: [Verdict(Status.FAIL) if int(i.prompt.split()[1]) % 2 else v for i, v in zip(inputs, tiny.reward(inputs))]  # noqa: E731
        with caplog.at_level(logging.WARNING):
            prefs.train_online(tmp_path / name, config, reward=half)
        return "have equal rewards" in caplog.text

    assert warned("low", 0.1) and not warned("high", 1.0)


# --- in bfloat16, and what the report makes of it ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("verb", ["dpo", "online_dpo"])
def test_a_run_of_the_verb_and_its_page(verb, dtype, model, sums, asked, tmp_path, capsys):  # noqa: F811
    train = dict(train__steps=24, train__optimizer__learning_rate=0.02, train__optimizer__warmup_steps=0, train__eval_every=12, dtype=dtype)
    if verb == "dpo":
        config = config_of("dpo", model, sums, data__fields=FIELDS, data__held_out=5, batch_rows=8, max_length=16, **train)
        dpo.run(config, str(tmp_path / "run"))
    else:
        more = dict(reward__name="exact", max_prompt_tokens=16, train__max_new_tokens=4, train__num_samples=16, evals=f"held_out={asked}")
        online_dpo.run(config_of("online_dpo", model, asked, data__fields="prompt=question", **more, **train), str(tmp_path / "run"))
    assert f"report: jaxrl-llm report --workdir={tmp_path / 'run'}" in capsys.readouterr().out
    steps = [r for r in records(tmp_path / "run") if r["kind"] != "eval"]
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() for r in steps)
    if verb == "dpo":
        assert steps[-1]["margin"] > steps[0]["margin"] + 0.03
    else:  # the sampler against the trainer
        assert np.mean([r["reward"] for r in steps[-6:]]) > np.mean([r["reward"] for r in steps[:6]]) + 0.01
        assert max(r["logp_diff_max"] for r in steps) < (1e-4 if dtype == "float32" else 0.2)
    trained, exported = models.load(tmp_path / "run" / "policy")
    assert trained.dtype == dtype
    assert np.abs(tiny.flat(exported) - tiny.flat(models.load(model)[1])).max() > 0.01

    assert main(["report", f"--workdir={tmp_path / 'run'}"]) == 0
    data = run_report(tmp_path / "run")
    titles = [panel["title"] for panel in data["panels"]]
    told = {"Loss", "Margin of the implicit reward", "Implicit reward", "Log-probability of completions", "Gradient norm"}
    assert told <= set(titles) and not {"Margin", "Implicit chosen", "Logp chosen", "Accuracy", "Seconds"} & set(titles)
    charts = ["Held-out accuracy", "Held-out loss", "Held-out margin"] if verb == "dpo" else ["Held-out accuracy"]
    assert [chart["title"] for chart in data["curves"]] == charts and data["curves"][0]["series"][0]["steps"] == [0, 12, 24]
    assert ("rollouts" in data) == (verb == "online_dpo") and ("Pairs to learn from" in titles) == (verb == "online_dpo")
    assert "held_out" in data["headline"] and "Implicit reward" in build_report(data)

