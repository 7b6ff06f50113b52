"""`jaxrl-llm dpo` and `jaxrl-llm online_dpo` from files to a Hugging Face folder, their mistakes, and short runs on real data."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from jaxrl_llm.commands import dpo, online_dpo, sft
from jaxrl_llm.config import load_config
from jaxrl_llm.data.story_prompts import make_story_prompts, read_stories
from jaxrl_llm.errors import UserError
from jaxrl_llm.train.checks import check_dpo, check_online_dpo
from jaxrl_llm.train.config import DPOConfig, OnlineDPOConfig, from_mapping

WORDS = ["<pad>", "</s>", *"0123456789", "+", "="]
CHATS = "{% for m in messages %}{{ m['content'] }} + {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a tiny model that reads digits."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    core = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>", chat_template=CHATS)
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(WORDS), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32,
        tie_embeddings=True, max_position=32, eos_token_ids=(1,), pad_token_id=0,
    )  # fmt: skip
    models.save(folder, cfg, models.init(cfg, jax.random.key(0)), tokenizer_from=tokenizer)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Sums of two digits, the right one chosen, the next one rejected."""
    rows = [{"question": f"{a} + {b} =", "good": str(a + b), "bad": str((a + b + 1) % 10)} for a in range(5) for b in range(5)]
    return write(tmp_path_factory.mktemp("data") / "sums.jsonl", rows)


def config_of(verb, model, source, **overrides):
    fields = {"model": str(model), "data.source": str(source)}
    return load_config(f"configs/{verb}.py", fields | {key.replace("__", "."): value for key, value in overrides.items()})


FIELDS = "prompt=question,chosen=good,rejected=bad"
QUICK = dict(train__steps=40, train__optimizer__learning_rate=0.02, batch_rows=8, max_length=16, data__fields=FIELDS)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_dpo_from_a_file_to_a_folder_that_loads(model, sums, tmp_path, capsys):
    config = config_of("dpo", model, sums, data__held_out=5, evals=f"all={sums}", eval_limit=10, train__log_every=20, **QUICK)
    dpo.run(config, str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows"] == 20 and {name: found["n"] for name, found in summary["evals"].items()} == {"all": 10, "held_out": 5}
    assert summary["evals"]["all"]["accuracy"]["last"] > 0.9 and summary["evals"]["all"]["margin"]["last"] > 0.5
    assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "dpo"] == [20, 40]
    cfg, params = models.load(tmp_path / "run" / dpo.FOLDER)
    before = models.load(model)[1]
    assert max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)) > 0
    assert "all: accuracy 0." in capsys.readouterr().out
    dpo.run(config, str(tmp_path / "run"))  # a finished run: nothing to do, the folder is written again
    assert models.load(tmp_path / "run" / dpo.FOLDER)[0] == cfg


def encoded(model, path, names=dpo.PAIR, **overrides):
    config = config_of("dpo", model, path, **overrides)
    return dpo.encode(dpo._read(config, str(path), config.data.limit, names), models.load_tokenizer(model), (1,), config, names)


def test_rows_become_prompts_and_completions_with_an_end(model, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1 +", "chosen": "2 3", "rejected": "4"}, {"prompt": "5", "chosen": "6", "rejected": "6"}])
    data = encoded(model, path)
    assert data.prompts == [[3, 12], [7]] and data.completions == [([4, 5, 1], [6, 1]), ([8, 1], [8, 1])] and data.labels_N is None
    assert "1 of 2 pairs have the same text" in capsys.readouterr().out
    assert encoded(model, path, separator="= ").completions[0] == ([13, 4, 5, 1], [13, 6, 1])
    assert encoded(model, path, template="0 {prompt} =").prompts[0] == [2, 3, 12, 13]
    assert len(encoded(model, path, data__limit=1)) == 1


def test_chats_that_share_all_but_their_last_message(model, tmp_path):
    chat = lambda *texts: [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]  # noqa: E731
    rows = [
        {"chosen": chat("1", "2"), "rejected": chat("1", "3")},
        {"prompt": "4", "chosen": [{"role": "assistant", "content": "5"}], "rejected": [{"role": "assistant", "content": "6"}]},
        {"prompt": chat("7", "8", "9"), "chosen": "0", "rejected": "1"},
    ]
    data = encoded(model, write(tmp_path / "a.jsonl", rows), template="chat")
    assert data.prompts == [[3, 12], [6, 12], [9, 12, 10, 12, 11, 12]]
    assert data.completions == [([4, 1], [5, 1]), ([7, 1], [8, 1]), ([2, 1], [3, 1])]
    assert encoded(model, write(tmp_path / "b.jsonl", rows[:1]), template="{prompt}").prompts == [[3]]
    with pytest.raises(UserError, match=r"b.jsonl:1: prompt '.*': a chat, of which template=none would drop the roles: set the template to 'chat'"):
        encoded(model, tmp_path / "b.jsonl")


def test_completions_of_chats_end_as_the_template_has_it_and_the_written_model_stops_there(model, tmp_path, capsys):
    """Both verbs; the template ends with "+", and the model stops at "</s>" or at "</s>" and "+"."""
    cfg, params = models.load(model)
    tokenizer = models.load_tokenizer(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["+"]})
    models.save(tmp_path / "chatty", cfg, params, tokenizer_from=tokenizer)
    path = write(tmp_path / "a.jsonl", [{"prompt": "1", "chosen": "2 3", "rejected": "4"}])
    config = config_of("dpo", tmp_path / "chatty", path, template="chat", train__steps=1)
    rows = dpo._read(config, str(path), None, dpo.PAIR)
    assert dpo.encode(rows, tokenizer, (1, 12), config, dpo.PAIR).completions == [([4, 5, 12], [6, 12])]
    dpo.run(config, str(tmp_path / "dpo"))
    assert "ends an answer with +, where this model does not stop" in capsys.readouterr().out
    assert models.load(tmp_path / "dpo" / dpo.FOLDER)[0].eos_token_ids == (1, 12)
    config = config_of("sft", tmp_path / "chatty", path, template="chat", train__steps=1, response_field="chosen")
    tokens, mask = sft.encode(rows, tokenizer, (1, 12), config)
    assert tokens.tolist() == [[3, 12, 4, 5, 12]] and mask.tolist() == [[False, False, True, True, True]]
    sft.run(config, str(tmp_path / "sft"))
    assert models.load(tmp_path / "sft" / dpo.FOLDER)[0].eos_token_ids == (1, 12)
    config = config_of("sft", tmp_path / "chatty", path, template="{prompt} +", response_field="chosen")
    assert sft.encode(rows, tokenizer, (1, 12), config)[0].tolist() == [[3, 12, 4, 5, 1]]


def test_labelled_rows_get_an_unrelated_completion(model, tmp_path):
    rows = [{"prompt": "1", "completion": "2", "label": True}, {"prompt": "1", "completion": "3", "label": 0}]
    rows += [{"prompt": "4", "completion": "5 6", "label": "false"}]
    data = encoded(model, write(tmp_path / "a.jsonl", rows), dpo.SINGLE)
    assert data.labels_N.tolist() == [True, False, False]
    assert data.completions == [([4, 1], [7, 8, 1]), ([5, 1], [7, 8, 1]), ([7, 8, 1], [4, 1])]


def test_rows_longer_than_the_limit(model, tmp_path, capsys):
    rows = [{"id": "a", "prompt": "1 + 2 =", "chosen": "3", "rejected": "4 5 6"}, {"id": "b", "prompt": "4", "chosen": "1", "rejected": "2"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert encoded(model, path, max_length=6).ids == ["b"]
    assert "1 of 2 rows are longer than 6 tokens" in capsys.readouterr().out
    assert encoded(model, path, max_length=6, overflow="truncate").completions[0] == ([5, 1], [6, 7])
    with pytest.raises(UserError, match=r"a.jsonl:1: row 'a' has 8 tokens"):
        encoded(model, path, max_length=6, overflow="error")
    with pytest.raises(UserError, match="no row is left"):
        encoded(model, path, max_length=2)


@pytest.mark.parametrize(
    "rows,names,message",
    [
        ([{"chosen": "1", "rejected": "2"}], dpo.PAIR, r"a.jsonl:1: no text in field 'prompt'"),
        ([{"prompt": "1", "chosen": "1", "rejected": "2"}, {"prompt": "1", "chosen": "1"}], dpo.PAIR, r"a.jsonl:2: no field 'rejected'"),
        ([{"prompt": "1", "chosen": " ", "rejected": "2"}], dpo.PAIR, r"a.jsonl:1: field 'chosen' is empty"),
        ([{"prompt": "1", "chosen": 5, "rejected": "2"}], dpo.PAIR, r"a.jsonl:1: field 'chosen' is 5: give text"),
        ([{"prompt": "1", "chosen": ["x"], "rejected": "2"}], dpo.PAIR, r"a.jsonl:1: field 'chosen' is a list, but not of messages"),
        ([{"prompt": "1", "completion": "1", "label": "good"}], dpo.SINGLE, r"a.jsonl:1: field 'label' is 'good': give true"),
        ([{"prompt": "1", "completion": "1"}], dpo.SINGLE, r"a.jsonl:1: no field 'label'"),
        (
            [{
                "chosen": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
                "rejected": [{"role": "user", "content": "0"}, {"role": "assistant", "content": "3"}],
            }],
            dpo.PAIR,
            r"a.jsonl:1: the chats under chosen and rejected differ before their last message",
        ),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_line_and_field(model, tmp_path, rows, names, message):
    with pytest.raises(UserError, match=message) as caught:
        encoded(model, write(tmp_path / "a.jsonl", rows), names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(model=""), "no model"),
        (dict(data__source=""), "no data"),
        (dict(overflow="cut"), "overflow"),
        (dict(dtype="float16"), "'dtype' is 'float16'"),
        (dict(data__held_out=25), "data.held_out is 25 of 25 rows"),
        (dict(data__held_out=3, evals="held_out=x.jsonl"), "no such file"),
        (dict(train__loss__kind="kto"), "no field 'completion'"),
        (dict(train__loss__beta=0.0), "loss.beta"),
        (dict(evals="only-a-file.jsonl"), "not NAME=SOURCE"),
        (dict(data__fields="prompt=question,chosen=god,rejected=bad"), "did you mean good"),
    ],
)
def test_dpo_mistakes_are_one_clear_line(model, sums, tmp_path, overrides, message):
    arguments = QUICK | dict(data__source=str(sums)) | overrides
    source, name = arguments.pop("data__source"), arguments.pop("model", model)
    with pytest.raises(UserError, match=message) as caught:
        dpo.run(config_of("dpo", name, source, **arguments), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


def test_online_dpo_from_a_file_to_a_folder_that_loads(model, tmp_path, capsys):
    rows = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(5)]
    path = write(tmp_path / "sums.jsonl", rows)
    config = config_of(
        "online_dpo", model, path, data__fields="prompt=question", evals=f"sums={path}", reward__name="exact", max_prompt_tokens=16,
        train__steps=2, train__max_new_tokens=4, train__num_samples=16, train__optimizer__learning_rate=0.01,
    )  # fmt: skip
    online_dpo.run(config, str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["evals"]["sums"]["n"] == 20
    assert sum(r["pairs"] for r in records(tmp_path / "run") if r["kind"] == "train") > 0
    models.load(tmp_path / "run" / "policy")
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["kind"] == "online_dpo"


@pytest.mark.parametrize(
    "verb,kind,check", [("dpo", DPOConfig, check_dpo), ("online_dpo", OnlineDPOConfig, check_online_dpo)], ids=["dpo", "online_dpo"]
)
def test_config_files_have_every_setting_of_the_trainer(verb, kind, check):
    from jaxrl_llm.config import config_path, import_config

    variants = import_config(config_path(f"configs/{verb}.py")[0]).VARIANTS
    losses = set()
    for variant in (None, *variants):
        train = load_config(f"configs/{verb}.py" + (f":{variant}" if variant else "")).train
        made = from_mapping(kind, train)
        check(made)
        losses.add(made.loss)
        assert set(train) == set(kind.__dataclass_fields__)
        for group in ("loss", "optimizer"):
            assert set(train[group]) == set(type(getattr(made, group)).__dataclass_fields__)
    assert len(losses) == len(variants)


# --- real checkpoints and data ---------------------------------------------------------------------------------------


def test_dpo_on_real_pairs_prefers_the_chosen_of_held_out_rows(assets, tmp_path):
    """All 1,100 instructions with a chosen and a rejected answer, long ones cut; a stories model of 260 K parameters."""
    config = config_of(
        "dpo", assets / "checkpoints" / "stories260k", assets / "data" / "preference_pairs" / "instruction-data-with-preference.json",
        data__fields="prompt=instruction", template="{prompt} {input} ", data__held_out=100, max_length=112, overflow="truncate", batch_rows=16,
        train__steps=12, train__log_every=6, train__eval_every=0, train__forward_rows=128,
        train__optimizer__learning_rate=1e-3, train__optimizer__warmup_steps=2,
    )  # fmt: skip
    dpo.run(config, str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["evals"]["held_out"]
    assert found["n"] == 100 and found["accuracy"]["last"] > 0.55 and found["margin"]["last"] > 0.05
    assert found["loss"]["last"] < found["loss"]["first"]


def test_online_dpo_on_real_story_prompts(assets, tmp_path):
    """The rules of experiments/story_rules.py: most prompts make a pair, fresh pairs are told apart better, what is sampled is worth more, and so
    is what the policy writes for held-out openings. (Rewards of ten such steps of two seeds: 0.60 and 0.57 in the first three, 0.72 and 0.76 in
    the last; held out 0.64 before, 0.79 and 0.77 after.)"""
    stories = read_stories(str(assets / "data" / "tinystories" / "tinystories_sample.txt"), separator="<|endoftext|>")
    rows, held = make_story_prompts(stories, held_out=32, limit=64)
    train, test = write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", held)
    config = config_of(
        "online_dpo", assets / "checkpoints" / "stories260k", train, evals=f"held_out={test}", reward__options='{"reduce": "mean"}',
        schedule__batch_prompts=8, max_prompt_tokens=64, train__steps=8, train__num_samples=6, train__max_new_tokens=48,
        train__stop_strings=("\n",), train__optimizer__learning_rate=5e-4, train__eval_every=0,
    )  # fmt: skip
    online_dpo.run(config, str(tmp_path / "run"))
    steps, evals = ([r for r in records(tmp_path / "run") if r["kind"] == kind] for kind in ("train", "eval"))
    assert len(steps) == 8 and sum(r["pairs"] for r in steps) > 32 and all(r["logp_diff_max"] < 1e-3 and r["errors"] == 0 for r in steps)
    assert abs(steps[0]["margin"]) < 1e-3 < 0.02 < np.mean([r["margin"] for r in steps[1:]]) and all(r["grad_norm"] > 0 for r in steps)
    assert np.mean([r["reward"] for r in steps[-3:]]) > np.mean([r["reward"] for r in steps[:3]]) + 0.05
    assert evals[-1]["reward"] > evals[0]["reward"] + 0.03
