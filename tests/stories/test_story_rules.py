"""The story experiment on a tiny random model: its files, its figures, its errors, and that a second start changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
import models.errors
from experiments import story_rules
from jaxrl_llm.config import load_config
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.errors import UserError
from jaxrl_llm.report import build_report
from jaxrl_llm.report.schema import validate
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict

NAMES = ["Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["needle", "pumpkin", "wagon", "lantern"]
STORIES = [f"One day {name} found a {thing}. {name} hid the {thing}.\nThey went home." for name in NAMES for thing in THINGS]


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story_inputs")
    tokenizer = byte_tokenizer()
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16,
        tie_embeddings=True, max_position=128, eos_token_ids=(2,), bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    models.save(folder / "model", cfg, models.init(cfg, jax.random.key(0)), tokenizer_from=tokenizer)
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    return {"model": str(folder / "model"), "stories": str(folder / "stories.txt")}


SMALL = {
    "held_out": "6",
    "batch_prompts": "4",
    "judge_samples": "2",
    "shown": "3",
    "openings.min_stories": "2",
    "openings.max_share": "0.5",
    "grpo.steps": "2",
    "grpo.num_samples": "2",
    "grpo.max_new_tokens": "12",
    "grpo.eval_every": "0",
    "grpo.sample_every": "1",
}


def config(inputs, **overrides):
    return load_config("configs/story_rules.py", {**inputs, **SMALL, **overrides})


def test_a_whole_run_and_a_second_start(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    story_rules.run(config(inputs), str(workdir))
    said = capsys.readouterr().out
    assert "32 stories: 26 openings to train on, 6 held out" in said and "report.html" in said
    assert f"policy: {workdir / 'policy'}\n" in said and (workdir / "policy" / "config.json").exists()
    summary = json.loads((workdir / "summary.json").read_text())
    figures = summary["story_rules"]
    for label in ("before", "after", "real"):
        assert figures[label]["without_verdict"] == 0
        assert set(figures[label]["rules"]) == set(story_rules.RULE_NAMES.values())
        assert set(figures[label]["health"]) == set(story_rules.HEALTH)
    # The real first paragraphs are "Ann hid the needle.": the word, no comma, a whole sentence, short, but not 10 words long.
    assert figures["real"]["rules"] == {name: float(name != "long enough") for name in story_rules.RULE_NAMES.values()}
    assert figures["real"]["reward"] == pytest.approx(0.8) and figures["real"]["passed"] == 0.0
    gain = figures["reward_gain"]
    assert gain["value"] == pytest.approx(figures["after"]["reward"] - figures["before"]["reward"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    page = (workdir / "report.html").read_text()
    assert "takes the opening&#x27;s word up" in page or "takes the opening's word up" in page
    data = json.loads((workdir / "report.json").read_text())
    assert len(data["rollouts"]) == 3
    assert [chart["title"] for chart in data["curves"]] == ["Held-out accuracy", "Held-out reward"]
    assert 0 < data["curves"][1]["series"][0]["mean"][0] < 1
    assert [response["arm"] for response in data["rollouts"][0]["responses"]] == ["before"] * 2 + ["after"] * 2

    cfg, params = models.load(workdir / "policy")
    assert cfg.eos_token_ids == (1, 2)  # <s> ends a story too
    start = models.load(inputs["model"])[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), params, start)
    assert max(jax.tree.leaves(moved)) > 0

    story_rules.run(config(inputs), str(workdir))
    assert json.loads((workdir / "summary.json").read_text())["story_rules"] == figures
    again = models.load(workdir / "policy")[1]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model": ""}, "no model: give --config.model="),
        ({"stories": ""}, "no stories: give --config.stories="),
        ({"story_end": "<end>"}, "this tokenizer has no token '<end>'"),
        ({"held_out": "32"}, "too few to hold out 32"),
        ({"held_out": "0"}, "config key 'held_out' is 0: at least 1"),
        ({"judge_samples": "0"}, "config key 'judge_samples' is 0: at least 1"),
        ({"limit": "0"}, "limit is 0: give the number of openings"),
        ({"rules.words": "-1"}, "none may be below 0"),
        ({"rules.at_least_words": "35"}, "has at least 35 and fewer than 35 words"),
        ({f"rules.{rule}": "0" for rule in ("words", "no_comma", "at_least_words", "fewer_than_words", "full_sentence")}, "at least one"),
        ({"grpo.temperature": "0"}, "setting 'temperature' must be above 0"),
        ({"grpo.loss.kl": "k4"}, "setting 'loss.kl' is 'k4'"),
        ({"reduce": "sum"}, "it must be 'all' or 'mean'"),
    ],
)
def test_mistakes_are_said_in_one_line(inputs, tmp_path, overrides, message):
    with pytest.raises(UserError) as error:
        story_rules.run(config(inputs, **overrides), str(tmp_path / "run"))
    assert message in str(error.value)


@pytest.fixture
def given(inputs, tmp_path, monkeypatch):
    """config changes -> what the policy before is judged by and what training is called with: a run that ends there."""

    def call(folder=None, **changes):
        seen = {}

        def judge_policy(cfg, policy, original, tokenizer, prompts, reward, grpo, samples, stories, mesh):
            seen.update(samples=samples, stories=stories)

        def train_grpo(cfg, params, tokenizer, prompts, reward, schedule, settings, run_dir, evals, mesh):
            values = [v.value for v in reward([RewardInput("One day.", "it went.", "", prompts.rows[0])])]
            seen.update(cfg=cfg, rows=prompts.rows, held_out=evals["held_out"].rows, first=schedule.batch(0).tolist(), values=values)
            seen.update(grpo=settings)
            raise InterruptedError

        monkeypatch.setattr(story_rules, "judge_policy", judge_policy)
        monkeypatch.setattr(story_rules, "train_grpo", train_grpo)
        with pytest.raises(InterruptedError):
            story_rules.run(config(inputs, **changes), str(folder or tmp_path / str(len(list(tmp_path.iterdir())))))
        return seen

    return call


def test_fields_beside_the_training_change_what_it_is_given(given, inputs, tmp_path):
    base = given()
    assert len(base["rows"]) == 26 and len(base["held_out"]) == 6 and base["samples"] == 2 and base["cfg"].eos_token_ids == (1, 2)
    fewer, other = given(limit="8", held_out="3"), given(seed="1")
    assert len(fewer["rows"]) == 8 and len(fewer["held_out"]) == 3
    assert other["held_out"] != base["held_out"] and other["first"] != base["first"] and (base["grpo"].seed, other["grpo"].seed) == (0, 1)
    assert given(judge_samples="5")["samples"] == 5 and len(given(batch_prompts="7")["first"]) == 7
    assert given(dtype="bfloat16")["cfg"].dtype == "bfloat16" and given(story_end="")["cfg"].eos_token_ids == (2,)
    assert given(reduce="all")["values"] == [0.0] and 0 < base["values"][0] < 1
    with pytest.raises(UserError, match="has .* tokens, longer than the 5"):
        given(max_prompt_tokens="5")
    assert given(**{"grpo.remat": "True"})["grpo"] == dataclasses.replace(base["grpo"], remat=True)
    # Rules and openings: every field, by what the rows ask for and which are there.
    rules = lambda found: [(rule["name"], rule["kwargs"]) for row in found["rows"][:1] for rule in row["constraints"]]  # noqa: E731
    for change in ("words=2", "no_comma=False", "at_least_words=3", "fewer_than_words=50", "full_sentence=False"):
        name, _, value = change.partition("=")
        assert rules(given(**{f"rules.{name}": value})) != rules(base), name
    for change in ("min_words=7", "max_words=5", "min_stories=9", "max_share=0.1", "min_letters=8"):
        name, _, value = change.partition("=")
        with pytest.raises(UserError, match="give 0 openings"):
            given(**{f"openings.{name}": value})
    # The source of the stories.
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES[:20]))
    (tmp_path / "plain.txt").write_text("\n---\n".join(STORIES))
    assert len(given(stories=str(tmp_path / "table.jsonl"), fields="prompt=text")["stories"]) == 20
    assert given(stories=str(tmp_path / "plain.txt"), separator="---")["stories"] == base["stories"]
    # A workdir of another run is kept unless it is to be cleared.
    given(tmp_path / "one")
    (tmp_path / "one" / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    with pytest.raises(UserError, match="overwrite"):
        given(tmp_path / "one", limit="8")
    assert len(given(tmp_path / "one", limit="8", overwrite="True")["rows"]) == 8


def batch(*rules):
    """A prompt for each list of rule names."""
    constraints = [[{"name": rule, "kwargs": {}} for rule in names] for names in rules]
    rows = [{"id": f"r{i}", "prompt": "One day.", "words": [], "constraints": given} for i, given in enumerate(constraints)]
    return PromptBatch(np.ones((len(rows), 2), np.int32), np.full(len(rows), 2, np.int32), [row["id"] for row in rows], rows)


def broken_at_times(inputs):
    """No comma is right; a question mark breaks the checker."""
    word = {True: Status.FAIL, False: Status.PASS}
    return [Verdict(Status.ERROR, reason="broken") if "?" in item.response else Verdict(word["," in item.response]) for item in inputs]


@pytest.fixture
def by_hand(monkeypatch):
    """Judges two given texts a prompt, without a model."""
    monkeypatch.setattr(story_rules.degeneration, "mean_nll", lambda *args: 1.0)

    def judged(prompts, texts, reward=broken_at_times):
        return story_rules._judged(None, None, prompts, reward, texts, [[1]] * len(texts), np.repeat(np.arange(len(prompts)), 2), STORIES)

    return judged


def test_an_error_is_no_score_and_is_counted(by_hand):
    prompts = batch(["punctuation:no_comma"], ["punctuation:no_comma"], ["logic:if"])
    zebra, no_comma = {"name": "keywords:words", "kwargs": {"words": ["zebra"]}}, {"name": "punctuation:no_comma"}
    prompts.rows[2]["constraints"][0]["kwargs"] = {"condition": zebra, "then": no_comma}
    before = by_hand(prompts, ["a.", "b, c.", "a.", "b?", "c?", "d?"])
    np.testing.assert_equal(before.passed_P, [0.5, 1.0, np.nan])
    np.testing.assert_equal(before.reward_P, [0.5, 1.0, np.nan])
    assert before.without_verdict == 3 and before.rules["no comma"] == 0.75
    assert np.isnan(before.rules["logic:if"])  # its condition is not met: it is not said to be broken

    after = by_hand(prompts, ["a.", "b.", "a?", "b?", "c.", "d."])
    figures = story_rules.compare(before, after, before)
    assert figures["before"]["passed"] == 0.75 and figures["after"]["passed"] == 1.0 and figures["after"]["without_verdict"] == 2
    assert figures["passed_gain"]["value"] == 0.5  # of the one opening that has verdicts both times
    page = story_rules.report_data({}, prompts, before, after, figures, 3)
    assert "3 continuations before, 2 after, 3 real" in page["tables"][0]["note"]
    assert page["tables"][0]["rows"][0]["cells"] == [{"value": 0.75}, {"value": 0.75}, None]
    assert [response["score"] for response in page["rollouts"][1]["responses"]] == [1.0, None, None, None]
    validate(page)
    bold = {table["title"]: "<b class=\"value\">" in build_report({**page, "tables": [table]}) for table in page["tables"]}
    assert bold == {"Rules kept": True, "Stories still?": False}  # no guard is better for being larger or smaller
    assert "SAE" not in build_report(page)


def test_no_verdict_at_all_stops_before_training(by_hand):
    with pytest.raises(UserError, match=r"no continuation of the held-out openings got a verdict; the first: error \(broken\)"):
        by_hand(batch(["punctuation:no_comma"]), ["a?", "b?"])


def test_the_mesh_is_used(inputs, tmp_path, run_python):
    with pytest.raises(models.errors.ModelError, match="needs 3 devices"):
        story_rules.run(config(inputs, mesh="data=3"), str(tmp_path / "three"))
    given = json.dumps({**inputs, **SMALL, "mesh": "data=2"}), str(tmp_path / "two")
    run_python(ON_A_MESH, given, devices=2, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    figures = json.loads((tmp_path / "two" / "summary.json").read_text())["story_rules"]
    assert figures["real"]["reward"] == pytest.approx(0.8) and np.isfinite(figures["after"]["health"]["nll"])


ON_A_MESH = """
import json, sys
from experiments import story_rules
from jaxrl_llm.config import load_config
story_rules.run(load_config("configs/story_rules.py", json.loads(sys.argv[1])), sys.argv[2])
"""


def test_the_export_is_read_back_by_transformers_with_equal_greedy_output(inputs, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers")
    workdir = tmp_path / "run"
    story_rules.run(config(inputs, **{"grpo.optimizer.learning_rate": "0.01"}), str(workdir))
    cfg, params = models.load(workdir / "policy")
    tokens = models.load_tokenizer(workdir / "policy")("One day Ann")["input_ids"]
    ours = models.generate(cfg, params, [tokens], max_new_tokens=20, temperature=0.0).completions()[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / "policy")
    out = theirs.generate(torch.tensor([tokens]), max_new_tokens=20, do_sample=False)[0, len(tokens) :].tolist()
    assert ours == out


def test_a_real_stories_model_learns_the_rules(assets, tmp_path):
    """16 steps of a real model on real openings: on others, which it never saw, it keeps more of the rules, and what it says is still words.

    The margins are half of what seed 0 gains.
    """
    folder, stories = assets / "checkpoints" / "stories260k", assets / "data" / "tinystories" / "tinystories_sample.txt"
    settings = {
        "model": str(folder), "stories": str(stories), "held_out": "40", "batch_prompts": "8", "judge_samples": "4", "grpo.steps": "16",
        "grpo.num_samples": "8", "grpo.max_new_tokens": "40", "grpo.eval_every": "0", "grpo.optimizer.learning_rate": "8e-4",
    }  # fmt: skip
    story_rules.run(load_config("configs/story_rules.py", settings), str(tmp_path))
    figures = json.loads((tmp_path / "summary.json").read_text())["story_rules"]
    before, after, gain = figures["before"], figures["after"], figures["reward_gain"]
    assert gain["value"] > 0.1 and gain["low"] > 0.07
    assert after["rules"]["no comma"] > before["rules"]["no comma"] + 0.2
    assert after["health"]["known_words"] > 0.8 and after["health"]["different_texts"] > 0.9
