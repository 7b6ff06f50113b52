"""The experiment on a tiny random model: a whole run with a taught judge, VerInstruct's rows with a judge elsewhere, every field, mistakes."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
import models.errors
from experiments import verif
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.data.story_themes import keeps_theme
from jaxrl_llm.errors import UserError
from jaxrl_llm.report.schema import validate
from jaxrl_llm.rewards.verdict import RewardInput, Status

NAMES = ["Ann", "Ben", "Cid", "Dot", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["cat", "cake", "doll", "lake"]
STORIES = [f"{name} saw a {thing} far away. {name} was glad and ran home. The {thing} was big. It was so late." for name in NAMES for thing in THINGS]
SMALL = {
    "data.held_out": "4", "stories.held_out": "8", "stories.least_words": "4", "stories.most_words": "9", "shown": "3", "sft.steps": "2",
    "sft.batch": "4", "judge.steps": "10", "judge.batch": "4", "judge.learning_rate": "0.05", "judge.places": "4", "batch_prompts": "2",
    "grpo.steps": "2", "grpo.num_samples": "2", "grpo.max_new_tokens": "12", "arms": "('both',)", "made.least_rules": "1",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quickly(quick_compilation):
    """What is compiled here is compared with nothing."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verif_inputs")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(token_models.BPE({token: n for n, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16,
        tie_embeddings=True, max_position=512, eos_token_ids=(2,), bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    models.save(folder / "model", cfg, models.init(cfg, jax.random.key(0)), tokenizer_from=tokenizer)
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    return {"policy.model": str(folder / "model"), "stories.source": str(folder / "stories.txt")}


def config(inputs, variant="", **overrides):
    changes = {name.replace("__", "."): str(value) for name, value in overrides.items()}
    return load_config(f"configs/verif.py{variant}", {**inputs, **SMALL, **changes})


def test_a_whole_run_and_a_second_start(inputs, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    verif.run(config(inputs), str(workdir))
    assert "held out: 4 seen, 4 unseen" in capsys.readouterr().out
    summary = json.loads((workdir / "summary.json").read_text())
    for kind in ("sets", "sampled"):
        for name in ("seen", "unseen"):
            found = summary["figures"][kind][name]
            assert set(found) == {"as given", "before", "both"} and all(0 <= of["instructions"]["value"] <= 1 for of in found.values())
            assert all(of["judged"] is not None for of in found.values())
    assert summary["judge"]["held-out stories"]["n"] > 4 and summary["judge"]["held-out stories"]["without"] == 0
    assert summary["nats_a_token"]["before"]["value"] > 0 and set(summary["gains"]["sets"]["seen"]) == {"both"}
    data = json.loads((workdir / "report.json").read_text())
    validate(data)
    assert [response["arm"] for response in data["rollouts"][0]["responses"]] == ["before", "both"]
    assert "| before |" in (workdir / "tables.md").read_text() and "Language still modelled?" in (workdir / "report.html").read_text()
    metrics = [json.loads(line) for line in (workdir / "arms" / "both-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert [record["errors"] + record["infrastructure"] for record in metrics if record["kind"] == "train"] == [0, 0]
    assert models.load(workdir / "arms" / "both-seed0" / "policy")[0].d_model == 16

    # What is there is not made again: the second start trains nothing, and says the same.
    for name in ("tuned", "respond", "judged_follow"):
        monkeypatch.setattr(verif, name, lambda *_, **__: pytest.fail("made again"))
    verif.run(config(inputs), str(workdir))
    again = json.loads((workdir / "summary.json").read_text())
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


def verinstruct(path):
    code = "def check_following(instruction, response):\n    return instruction.startswith('Say') and len(response) > {}"
    checkers = ["[rule] Length", "[llm] Style: calm"]
    rows = [{"id": f"v{n}", "prompt": f"Say {n}.", "checkers": checkers, "functions": [code.format(n % 3), ""]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_verinstruct_and_a_judge_elsewhere(inputs, tmp_path, judge_server, monkeypatch):
    monkeypatch.setattr("jaxrl_llm.train.loop.train_grpo", lambda cfg, params, *_, **__: (params, {}))
    own = dict(data__source=verinstruct(tmp_path / "rows.jsonl"), stories__source="", sft__steps=0, judge__url=judge_server, judge__mode="line")
    verif.run(config(inputs, **own, judge__model="m", judge__show_instruction=True), str(tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    of = found["figures"]["sampled"]["held out"]["both"]
    assert of["judged"]["value"] == 1.0 and of["soft"] is None and 0 < of["instructions"]["value"] <= 1 and found["nats_a_token"] == {}
    assert not (tmp_path / "run" / "judge").exists() and not (tmp_path / "run" / "sft").exists()
    with pytest.raises(UserError, match="answer"):  # what the policy would be taught by
        verif.make_data(config(inputs, **own | {"sft__steps": 1}))


@pytest.fixture
def judge_server():
    """The url of one that says YES to whatever it sees with the instruction."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            said = "Verdict: " + ("YES" if "BEGIN INSTRUCTION" in asked and "Style: calm" in asked else "NO")
            body = json.dumps({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


MISTAKES = {
    "no model: name": {"policy__model": ""},
    "no instructions: give --config.stories.source": {"stories__source": ""},
    "config.arms: no arm 'bath'; did you mean both": {"arms": "('bath',)"},
    "config.arms and config.seeds: name at least one": {"seeds": "()"},
    "arm 'both' asks one; it is taught here only": {"data__source": "rows.jsonl"},
    "no model of the judge": {"judge__url": "http://127.0.0.1:9/v1", "judge__model": ""},
    "'judge.mode' is 'line': a judge that is taught here": {"judge__mode": "line"},
    "'judge.show_instruction' is True": {"judge__show_instruction": True},
    "'judge.sampled'": {"judge__sampled": 1.5},
    "'reward.combine'": {"reward__combine": "sum"},
    "'reward.rule_reduce'": {"reward__rule_reduce": "any"},
    "'arm_table.both.use'": {"arm_table__both__use": "bath"},
    "'data.overflow'": {"data__overflow": "drp"},
    "'policy.*'|'dtype'": {"policy__dtype": "float16"},
    "setting 'loss.kl' is 'k4'": {"grpo__loss__kl": "k4"},
    "'judge.options' is no JSON": {"judge__options": "{"},
    "'made.seen': unknown constraint 'no:such'": {"made__seen": "('no:such',)"},
    "'made.unseen': constraint copy:exact cannot be read off": {"made__unseen": "('copy:exact',)"},
    "both name length:words": {"made__seen": "('length:words',)"},
    "'made.least_rules' is 3, above made.most_rules=2": {"made__least_rules": 3},
    "too few to hold out 32": {"stories__held_out": 32},
    "fewer than asked for: give more stories": {"data__held_out": 40},
    "longer than the 9 there is room for": {"data__max_prompt_tokens": 9},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_said_before_anything_is_trained(inputs, tmp_path, monkeypatch, message):
    monkeypatch.setattr(verif, "tuned", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        verif.run(config(inputs, **MISTAKES[message]), str(tmp_path / "run"))


def test_a_rows_file_that_is_too_short(inputs, tmp_path):
    with pytest.raises(UserError, match="has 12 rows, too few to hold out 12"):
        verif.make_data(config(inputs, data__source=verinstruct(tmp_path / "rows.jsonl"), data__held_out=12, sft__steps=0))


# ---- every field ----

ARMS = ("both", "rules", "judge", "judge_all")
TOLD_ELSEWHERE = {"overwrite", "title"} | {f"arm_table.{arm}.{field}" for arm in ARMS for field in ("use", "about")}
MADE = {  # a field of the instructions -> another value
    "data.limit": 24, "data.held_out": 3, "data.seed": 1, "stories.held_out": 9, "stories.pieces": 1, "stories.least_words": 6,
    "stories.most_words": 20, "made.seen": "('length:words',)", "made.unseen": "('startend:last_word',)", "made.least_rules": 2, "made.most_rules": 3,
    "made.template": "{constraints} Go:",
}  # fmt: skip
OTHER_UNSEEN = {"made.seen": {"made.unseen": "('startend:last_word',)"}}
READ = {"stories.source", "stories.fields", "stories.separator", "data.source", "data.fields", "data.split"}
PROMPTS = {"data.template", "data.max_prompt_tokens", "data.overflow"}
TUNED = {"sft.stories"}
TUNED |= {"sft.steps", "sft.batch", "sft.learning_rate", "judge.steps", "judge.batch", "judge.learning_rate", "judge.sampled", "judge.places"}
JUDGE = {"judge.url", "judge.model", "judge.mode", "judge.show_instruction", "judge.options"}
REST = {"reward.combine", "reward.rule_reduce", "arms", "seeds", "mesh", "shown", "policy.model", "policy.dtype", "batch_prompts"}


def test_every_field_has_a_test():
    grpo = {name for name in field_names(load_config("configs/verif.py")) if name.startswith("grpo.")}  # test_grpo_settings.py
    assert TOLD_ELSEWHERE | set(MADE) | READ | PROMPTS | TUNED | JUDGE | REST | grpo == set(field_names(load_config("configs/verif.py")))


@pytest.mark.parametrize("field", MADE)
def test_another_value_makes_other_instructions(inputs, field):
    base = verif.make_data(config(inputs))
    other = verif.make_data(config(inputs, **{field: MADE[field]}, **OTHER_UNSEEN.get(field, {})))
    assert dataclasses.asdict(base) != dataclasses.asdict(other)
    kept = {"made.seen": "unseen", "made.unseen": "seen"}.get(field)
    assert kept is None or field == "made.seen" or base.sets[kept] == other.sets[kept]


def test_the_truth_and_what_is_held_out(inputs):
    data = verif.make_data(config(inputs))
    assert data.truth is keeps_theme and len(data.stories) == 8 and len(data.train) > 20
    types = lambda rows: {rule["name"] for row in rows for rule in row["constraints"]}  # noqa: E731
    assert types(data.sets["seen"]) <= set(config(inputs).made.seen) and not types(data.sets["unseen"]) & types(data.train)
    held = {row["answer"] for rows in data.sets.values() for row in rows}
    assert not held & {row["answer"] for row in data.train} and not set(data.texts) & set(data.held_texts)
    assert len({row["id"] for rows in (data.train, *data.sets.values()) for row in rows}) == len(data.train) + 8


def test_where_rows_and_stories_are_read(inputs, tmp_path, monkeypatch):
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    (tmp_path / "plain.txt").write_text("\n---\n".join(STORIES))
    base = verif.make_data(config(inputs))
    assert verif.make_data(config(inputs, stories__source=tmp_path / "table.jsonl", stories__fields="prompt=text")) == base
    assert verif.make_data(config(inputs, stories__source=tmp_path / "plain.txt", stories__separator="---")) == base
    asked = []
    monkeypatch.setattr(verif, "read_rows", lambda *args, **how: asked.append((*args, how)) or [{"id": str(n), "prompt": "p"} for n in range(9)])
    data = verif.make_data(config(inputs, data__source="rows", data__fields="prompt=q", data__split="test", data__limit=9, sft__steps=0))
    assert asked == [("rows", {"prompt": "q"}, {"split": "test", "limit": 9, "required": ("prompt",)})]
    assert len(data.train) == 5 and not data.made and data.truth is None


def bench_of(inputs, root, **changes):
    c = config(inputs, **changes)
    tokenizer = models.load_tokenizer(c.policy.model)
    cfg, base = models.load(c.policy.model, dtype=c.policy.dtype)
    return verif.Bench(c, root, None, verif.make_data(c), tokenizer, cfg, base, verif.VerifReward(use="rules"))


def test_prompts_are_given_as_set(inputs, tmp_path):
    prompts = lambda **changes: verif.prompts_of(bench_of(inputs, tmp_path, **changes), verif.make_data(config(inputs)).train)  # noqa: E731
    base, marked = prompts(), prompts(data__template="Q {prompt}")
    assert (marked.lengths_N == base.lengths_N + 2).all()
    assert prompts(data__max_prompt_tokens=60, data__overflow="drop").dropped > 0
    assert prompts(data__max_prompt_tokens=60, data__overflow="truncate").lengths_N.max() == 60


def test_the_supervised_stages_are_trained_as_set(inputs, tmp_path, monkeypatch):
    seen = []

    def train_sft(cfg, params, batches, settings, run_dir, mesh):
        seen.append((settings.steps, settings.optimizer.learning_rate))
        return params, [{"loss": 1.0}]

    monkeypatch.setattr("jaxrl_llm.train.sft.train_sft", train_sft)
    sampled = []
    monkeypatch.setattr(verif, "respond", lambda bench, params, rows, **how: sampled.append(len(rows)) or ["A cat ran."] * len(rows))
    batch_sizes = []
    real = verif.ShuffledSchedule
    monkeypatch.setattr(verif, "ShuffledSchedule", lambda n, size, seed: batch_sizes.append((n, size)) or real(n, size, seed))
    bench = bench_of(inputs, tmp_path, sft__steps=3, sft__batch=5, sft__learning_rate=0.01, judge__steps=4, judge__batch=6, judge__learning_rate=0.02)
    verif.teach_format(bench)
    verif.teach_judge(bench, tmp_path / "judge", bench.base)
    assert seen == [(3, 0.01), (4, 0.02)] and batch_sizes == [(len(bench.data.train) * 4 // 3, 5), (24, 6)]
    assert sampled == [12]
    verif.teach_judge(bench_of(inputs, tmp_path, judge__sampled=0.25, judge__steps=4, judge__batch=6), tmp_path / "other", bench.base)
    assert sampled == [12, 6]
    verif.teach_format(bench_of(inputs, tmp_path / "alone", sft__stories=0))
    assert batch_sizes[-1] == (len(bench.data.train), 4)
    assert verif.teach_format(bench_of(inputs, tmp_path, sft__steps=0)) is not None and len(seen) == 4
    tokenizer = models.load_tokenizer(tmp_path / "judge" / "policy")
    assert tokenizer.chat_template == verif.JUDGE_TEMPLATE
    asked = tokenizer.decode(verif.judge_prompt(tokenizer, "Write about an animal.", "A cat\n\nran."))
    assert asked == "<s>Write about an animal.\nA cat\nran.\nAnswer:"  # neither task nor markers: what is the same in all, and what is random


def test_texts_past_the_context_are_refused(inputs, tmp_path, monkeypatch):
    bench = bench_of(inputs, tmp_path)
    with pytest.raises(UserError, match="sft: the longest text has 600 tokens, the model's context is 512"):
        verif.tuned(bench, tmp_path / "sft", bench.cfg, [([1] * 600, 1)], bench.tokenizer, bench.config.sft)


def test_questions_have_known_answers_of_both_kinds():
    texts = ["A cat ran.", "He sat.", " ", "The lake and the cake."] * 20
    found = verif.theme_questions(texts, np.random.default_rng(0))
    assert len(found) == 60 and all(keeps_theme(sentence, text) is kept for sentence, text, kept in found)
    of = {text: [kept for _, asked, kept in found if asked == text] for text in texts}
    assert 0.3 < np.mean(of["A cat ran."] + of["The lake and the cake."]) < 0.7 and not any(of["He sat."])


def test_the_judge_is_asked_as_set(inputs, tmp_path, monkeypatch):
    def options(**changes):
        with verif.judge_of(bench_of(inputs, tmp_path, **changes), None) as asked:
            return asked

    url = "http://127.0.0.1:9/v1"
    given = options(judge__url=url, judge__model="m", judge__mode="line", judge__show_instruction=True, judge__options='{"retries": 9}')
    assert given == {"url": url, "model": "m", "mode": "line", "show_instruction": True, "retries": 9}
    places = []
    monkeypatch.setattr(verif, "teach_judge", lambda *_: None)
    monkeypatch.setattr(verif, "served", lambda folder, n, room: places.append((n, room)) or verif.contextlib.nullcontext("http://127.0.0.1:9/v1"))
    assert options(judge__places=7)["workers"] == 14 and places == [(7, 511)]


@pytest.mark.parametrize(("arm", "judged"), [("both", True), ("rules", False), ("judge", True), ("judge_all", True)])
def test_an_arm_is_rewarded_as_set(inputs, arm, judged):
    asked = {"url": "http://127.0.0.1:9/v1", "model": "m", "thinks": True}
    made = verif.arm_reward(config(inputs, reward__combine="average", reward__rule_reduce="all"), arm, asked)
    assert (made.use, made.combine, made.rule_reduce, made.thinks, made.judge is not None) == (arm, "average", "all", True, judged)
    row = {"checkers": ["[llm] x"], "functions": [""], "constraints": [{"name": "numbers:no_digits"}]}
    assert made([RewardInput("p", "never ends", row=row)])[0].status is Status.FAIL


def test_arms_and_seeds_are_trained_as_set(inputs, tmp_path, monkeypatch):
    seen, seen_rules = [], []

    def train_grpo(cfg, params, tokenizer, prompts, reward, schedule, settings, run_dir, evals, mesh):
        seen.append((run_dir.path.name, len(schedule.batch(0)), schedule.batch(0).tolist(), settings.seed, settings.steps, cfg.dtype, mesh))
        return params, {}

    def page_of(config, root, sets, results, seconds):
        return {}, {"headline": "", "title": "", "tables": [], "results": list(results)}

    monkeypatch.setattr("jaxrl_llm.train.loop.train_grpo", train_grpo)
    monkeypatch.setattr(verif, "measured", lambda bench, name, *_: seen_rules.append(bench.rules._sandbox_options) or {})
    monkeypatch.setattr(verif, "teach_format", lambda bench: bench.base)
    monkeypatch.setattr(verif, "measure_judge", lambda *_: None)
    monkeypatch.setattr(verif, "judge_of", lambda *_: verif.contextlib.nullcontext({"url": "http://127.0.0.1:9/v1", "model": "m"}))
    monkeypatch.setattr(verif, "page", types.SimpleNamespace(build=page_of, markdown=lambda _: ""))
    monkeypatch.setattr(verif, "report", types.SimpleNamespace(save_data=lambda *_: None, write_report=lambda *_: None))
    own = '{"sandbox": {"workers": 3}, "thinks": true}'
    verif.run(config(inputs, seeds="(3,4)", arms="('both','rules')", batch_prompts=5, policy__dtype="bfloat16", judge__options=own),
              str(tmp_path / "run"))  # fmt: skip
    assert seen_rules[0] == ({"workers": 3}, {})
    assert [each[0] for each in seen] == ["both-seed3", "rules-seed3", "both-seed4", "rules-seed4"]
    assert [(each[1], each[3], each[4], each[5]) for each in seen] == [(5, seed, 2, "bfloat16") for seed in (3, 3, 4, 4)]
    assert seen[0][2] == seen[1][2] != seen[2][2]  # arms of a seed see the same prompts
    with pytest.raises(models.errors.ModelError, match="needs 3 devices"):
        verif.run(config(inputs, mesh="data=3"), str(tmp_path / "three"))
