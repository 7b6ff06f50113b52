"""The story experiment on a tiny random model: its files, its figures, its errors, and that a second start changes nothing."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from experiments import story_rules
from jaxrl_llm.config import load_config
from jaxrl_llm.errors import UserError

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
    summary = json.loads((workdir / "summary.json").read_text())
    figures = summary["story_rules"]
    for label in ("before", "after", "real"):
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
        ({"reduce": "sum"}, "it must be 'all' or 'mean'"),
    ],
)
def test_mistakes_are_said_in_one_line(inputs, tmp_path, overrides, message):
    with pytest.raises(UserError) as error:
        story_rules.run(config(inputs, **overrides), str(tmp_path / "run"))
    assert message in str(error.value)


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
