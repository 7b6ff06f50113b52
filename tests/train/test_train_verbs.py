"""`jaxrl-llm sft` and `jaxrl-llm grpo` from files to a Hugging Face folder, and what they say to a user's mistakes."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from jaxrl_llm.commands import grpo, sft
from jaxrl_llm.config import import_config, load_config, resolve_path
from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.trainability import TrainabilityBand
from jaxrl_llm.data.prompts import pad_rows
from jaxrl_llm.data.sampler import ShuffledSchedule
from jaxrl_llm.data.story_prompts import read_stories
from jaxrl_llm.errors import UserError
from jaxrl_llm.train.checks import check_grpo
from jaxrl_llm.train.config import GRPOConfig, from_mapping
from jaxrl_llm.train.rollout import overlong_tokens

WORDS = ["<pad>", "</s>", *"0123456789", "+", "="]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a tiny model that reads digits."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    core = Tokenizer(token_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    cfg = models.ModelConfig(
        family="llama", vocab_size=len(WORDS), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32,
        tie_embeddings=True, max_position=32, eos_token_ids=(1,), pad_token_id=0,
    )  # fmt: skip
    models.save(folder, cfg, models.init(cfg, jax.random.key(0)), tokenizer_from=tokenizer)
    return folder


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A jsonl file of sums of two digits, columns question and answer."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"question": f"{a} + {b} =", "answer": " ".join(str(a + b)), "level": b % 2} for a in range(5) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(verb, model, source, **overrides):
    fields = {"model": str(model), "data.source": str(source), "data.fields": "prompt=question,answer=answer"}
    return load_config(f"configs/{verb}.py", fields | {key.replace("__", "."): value for key, value in overrides.items()})


GRPO = dict(
    train__steps=2, train__max_new_tokens=4, train__num_samples=4, schedule__batch_prompts=4, reward__name="exact", max_prompt_tokens=16
)  # fmt: skip


def test_sft_then_grpo_then_a_folder_that_loads(model, sums, tmp_path, capsys):
    config = config_of("sft", model, sums, train__steps=60, train__optimizer__learning_rate=0.02, batch_rows=20, max_length=16)
    sft.run(config, str(tmp_path / "sft"))
    history = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and all(record["kind"] == "sft" for record in history)
    tuned = tmp_path / "sft" / sft.FOLDER
    config = config_of("grpo", tuned, sums, evals=f"sums={sums}", train__eval_by=("level",), **GRPO)
    grpo.run(config, str(tmp_path / "grpo"))
    summary = json.loads((tmp_path / "grpo" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["evals"]["sums"]["n"] == 20 and summary["evals"]["sums"]["first"] > 0
    cfg, params = models.load(tmp_path / "grpo" / grpo.FOLDER)
    tokenizer = models.load_tokenizer(tmp_path / "grpo" / grpo.FOLDER)
    before = models.load(tuned)[1]
    assert max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)) > 0
    answer = models.generate(cfg, params, tokenizer(["1 + 2 ="])["input_ids"], max_new_tokens=4, temperature=0.0)
    assert tokenizer.decode(answer.completions()[0])
    assert "accuracy" in capsys.readouterr().out
    grpo.run(config, str(tmp_path / "grpo"))  # a finished run: nothing to do, the folder is written again
    assert models.load(tmp_path / "grpo" / grpo.FOLDER)[0] == cfg


PAPERS = {
    "grpo": ("token", "clip", "sequence_mean", "group_mean", "group_std", None),
    "dr_grpo": ("token", "clip", "dr_grpo", "group_mean", "none", None),
    "dapo": ("token", "clip", "token_mean", "group_mean", "group_std", None),
    "rloo": ("token", "clip", "dr_grpo", "leave_one_out", "none", "sequence_reward"),
    "reinforce_pp": ("token", "clip", "token_mean", "batch_mean", "batch_std", "token_reward"),
    "gspo": ("sequence", "clip", "sequence_mean", "group_mean", "group_std", None),
    "cispo": ("token", "cispo", "token_mean", "group_mean", "group_std", None),
    "ppo": ("token", "clip", "token_mean", "value", "batch_std", "token_reward"),
}


def test_variants_are_the_papers():
    assert set(PAPERS) == set(import_config(resolve_path("configs/grpo.py")).VARIANTS)
    for name, (ratio, surrogate, aggregation, baseline, scale, place) in PAPERS.items():
        made = from_mapping(GRPOConfig, load_config(f"configs/grpo.py:{name}").train)
        check_grpo(made)
        loss = made.loss
        assert (loss.ratio, loss.surrogate, loss.aggregation, loss.baseline, loss.advantage_scale) == (ratio, surrogate, aggregation, baseline, scale)
        assert (loss.kl and loss.kl_place) == place and loss.mismatch is None and (place is None) == (loss.kl_coef == 0)
        assert (made.inner_epochs, made.updates_per_epoch) == {"gspo": (1, 4), "cispo": (1, 4), "ppo": (4, 1)}.get(name, (1, 1))
        assert (made.rollout_tries, made.overlong_buffer_share, made.overlong_buffer) == ((10, 0.2, 0) if name == "dapo" else (1, 0.0, 0))


def test_dapo_from_a_file_replaces_groups_and_its_buffer_follows_the_limit(model, sums, tmp_path):
    dapo = {**GRPO, "train__steps": 1, "train__rollout_tries": 2}
    fields = {"model": str(model), "data.source": str(sums), "data.fields": "prompt=question,answer=answer"}
    fields |= {key.replace("__", "."): value for key, value in dapo.items()}
    config = load_config("configs/grpo.py:dapo", fields)
    assert overlong_tokens(from_mapping(GRPOConfig, config.train)) == 1  # of four
    grpo.run(config, str(tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert len(record["rows"]) == 4 and record["rollouts"] in (1, 2) and len(record["rows_rolled"]) == 4 * record["rollouts"]


def test_parts_of_a_rollout_divide_its_prompts(model, sums, tmp_path):
    with pytest.raises(UserError, match="'updates_per_epoch' is 3, and a step has 4 prompts, which it does not divide: change it, or schedule.batch"):
        grpo.run(config_of("grpo", model, sums, train__updates_per_epoch=3, **GRPO), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_sft_masks_the_prompt_unless_it_trains_on_text(model, sums):
    tokenizer = models.load_tokenizer(model)
    rows = [{"id": "a", "prompt": "1 + 2 =", "answer": "3"}, {"id": "b", "prompt": "4", "answer": "1 2"}]
    tokens, mask = sft.encode(rows, tokenizer, (1,), config_of("sft", model, sums, max_length=6))
    assert tokens.tolist() == [[3, 12, 4, 13, 5, 1], [6, 3, 4, 1, 0, 0]]
    assert mask.astype(int).tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0]]
    tokens, mask = sft.encode(rows, tokenizer, (1,), config_of("sft", model, sums, loss_on="text", max_length=6))
    assert tokens.tolist() == [[3, 12, 4, 13, 1], [6, 1, 0, 0, 0]] and mask.sum() == 7


def test_sft_on_held_out_rows_and_their_page(model, sums, tmp_path, capsys):
    from jaxrl_llm.report.run import run_report

    # Other rows are known better at first, and worse once the training rows are known by heart.
    settings = dict(train__optimizer__learning_rate=0.05, train__eval_every=5, train__steps=25, batch_rows=20, max_length=16)
    settings |= dict(data__held_out=4, evals=f"some={sums}", eval_limit=6, train__keep_best="held_out", train__log_every=25)
    sft.run(config_of("sft", model, sums, **settings), str(tmp_path / "run"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rows"] == 16 and {name: found["n"] for name, found in summary["evals"].items()} == {"some": 6, "held_out": 4}
    best = summary["best"]
    assert best["step"] in (5, 10, 15, 20) and best["loss"] < summary["evals"]["held_out"]["loss"]["last"]
    told = capsys.readouterr().out
    assert f"policy (of step {best['step']}, the best on held_out)" in told and "some: loss 2." in told
    rows = sft._read(config_of("sft", model, sums), str(sums), None)
    tokens, mask = sft.encode(rows[-4:], models.load_tokenizer(model), (1,), config_of("sft", model, sums))
    cfg, params = models.load(tmp_path / "run" / sft.FOLDER)
    logits = np.asarray(models.apply(cfg, params, tokens)[0], np.float64)[:, :-1]
    logps = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[:, 1:, None], -1)[..., 0]
    assert -logps[mask[:, 1:]].mean() == pytest.approx(best["loss"], rel=1e-5)
    data = run_report(tmp_path / "run")
    assert [chart["title"] for chart in data["curves"]] == ["Held-out loss"] and "Loss" in [panel["title"] for panel in data["panels"]]


CHATML = "{% for m in messages %}{{ '+ ' if m.role == 'user' else '= ' }}{{ m.content }} </s>{% endfor %}{% if add_generation_prompt %}= {% endif %}"


def test_sft_on_chats_counts_every_turn_of_the_assistant(model, tmp_path):
    """From a file of messages to a folder; the template is the tokenizer's."""
    tokenizer = models.load_tokenizer(model)
    tokenizer.chat_template = CHATML
    cfg, params = models.load(model)
    folder = tmp_path / "chatty"
    models.save(folder, cfg, params, tokenizer_from=tokenizer)
    turns = [[("user", "1 2"), ("assistant", "3"), ("user", "4"), ("assistant", "5 6")], [("user", "1"), ("assistant", "2")]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat], "id": str(i)} for i, chat in enumerate(turns)]
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"model": str(folder), "data.source": str(source), "data.fields": "prompt=messages", "train.steps": 2, "max_length": 16}
    config = load_config("configs/sft.py:chats", fields)
    tokens, mask = sft.encode(sft._read(config, config.data.source, None), tokenizer, (1,), config)
    assert [tokenizer.decode(row[counts]) for row, counts in zip(tokens, mask, strict=True)] == ["3 </s> 5 6 </s>", "2 </s>"]
    sft.run(config, str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"] == 2 * 7
    with pytest.raises(UserError, match="is no chat: loss_on=assistant reads a list of messages"):
        sft.encode([{"id": "a", "prompt": "1"}], tokenizer, (1,), config)


def test_sft_rows_past_the_context_are_refused(model, tmp_path):
    source = tmp_path / "long.jsonl"
    source.write_text(json.dumps({"question": "1 " * 40, "answer": "1"}) + "\n")
    for pack in (False, True):
        with pytest.raises(UserError, match="the longest row has 42 tokens, the model's context is 32: lower max_length"):
            sft.run(config_of("sft", model, source, max_length=64, pack=pack), str(tmp_path / "run"))


def test_sft_on_packed_rows_is_sft_on_the_rows(model, sums, tmp_path):
    """The knob saves padding and changes no result."""
    records = {}
    for pack in (False, True):
        settings = dict(train__steps=3, train__optimizer__learning_rate=0.02, batch_rows=12, max_length=24, pack=pack)
        sft.run(config_of("sft", model, sums, **settings), str(tmp_path / str(pack)))
        records[pack] = [json.loads(line) for line in (tmp_path / str(pack) / "metrics.jsonl").read_text().splitlines()]
    for plain, packed in zip(records[False], records[True], strict=True):
        assert packed["tokens"] == plain["tokens"] and packed["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    schedule = ShuffledSchedule(20, 12, 0)
    config = config_of("sft", model, sums)
    tokens, mask = sft.encode(sft._read(config, str(sums), None), models.load_tokenizer(model), (1,), config)
    assert len(next(sft.batches_of(tokens, mask, schedule, 24))[0]) == 3 < len(next(sft.batches_of(tokens, mask, schedule))[0])


def test_sft_rows_longer_than_the_limit(model, sums, capsys):
    tokenizer = models.load_tokenizer(model)
    rows = [{"id": "a", "prompt": "1 + 2 =", "answer": "3"}, {"id": "b", "prompt": "4", "answer": "1 2"}]
    limited = lambda how: config_of("sft", model, sums, max_length=5, overflow=how)  # noqa: E731
    assert len(sft.encode(rows, tokenizer, (1,), limited("drop"))[0]) == 1
    assert "1 of 2 rows are longer than 5 tokens" in capsys.readouterr().out
    tokens, mask = sft.encode(rows, tokenizer, (1,), limited("truncate"))
    assert tokens.shape == (2, 5) and mask[0].tolist() == [False] * 4 + [True]
    with pytest.raises(UserError, match="row 'a' has 6 tokens"):
        sft.encode(rows, tokenizer, (1,), limited("error"))
    with pytest.raises(UserError, match="no row is left"):
        sft.encode(rows[:1], tokenizer, (1,), limited("drop"))


def test_curated_set_gives_rows_order_and_signals(model, sums, tmp_path):
    count = 12
    rows = [{"id": f"r{i}", "prompt": f"{i % 10} + 1 =", "answer": "1"} for i in range(count)]
    keep = np.arange(count) % 3 > 0
    order = np.full(count, -1)
    order[keep] = np.arange(keep.sum())[::-1]
    curated = CuratedSet(rows, np.arange(count) % 2, np.linspace(0, 1, count), np.ones(count), keep, order)
    folder = curated.write(tmp_path / "curated", formats=("parquet",))
    config = config_of("grpo", model, "", data__curated=str(folder), data__fields="", **GRPO)
    chosen, found = grpo._training_rows(config)
    assert [row["id"] for row in chosen] == [row["id"] for row in curated.curriculum()] == ["r11", "r10", "r8", "r7", "r5", "r4", "r2", "r1"]
    prompts = grpo.tokenise_prompts(chosen, models.load_tokenizer(model), max_length=16)
    assert [grpo._schedule(config, prompts, found).batch(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    hardest_last = config_of("grpo", model, "", data__curated=str(folder), schedule__kind="global_sort", **GRPO)
    assert grpo._schedule(hardest_last, prompts, found).batch(0).tolist() == [7, 6, 5, 4]
    shuffled = config_of("grpo", model, "", data__curated=str(folder), schedule__kind="shuffled", **GRPO)
    assert sorted(np.concatenate([grpo._schedule(shuffled, prompts, found).batch(s) for s in range(2)])) == list(range(8))
    with pytest.raises(UserError, match="'order' takes no options"):
        grpo._schedule(config_of("grpo", model, "", data__curated=str(folder), schedule__options='{"rho": 1}', **GRPO), prompts, found)


def band_set(folder, count=120):
    """A curated set from easy to hard, in curate's workdir with the vectors of its rows, which stand in another order there."""
    rows = [{"id": f"r{i}", "prompt": f"{i % 10} + 1 =", "answer": "1"} for i in range(count)]
    keep = np.arange(count) % 6 > 0
    order = np.full(count, -1)
    order[keep] = np.arange(keep.sum())
    curated = CuratedSet(rows, np.arange(count) % 2, np.linspace(0.01, 0.99, count), np.ones(count), keep, order)
    curated.write(folder / "curated", formats=("parquet",))
    vectors = np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32) / 2
    shuffled = np.random.default_rng(1).permutation(count)
    np.savez(folder / grpo.VECTORS, ids=np.array([row["id"] for row in rows])[shuffled], vectors=vectors[shuffled])
    return curated, vectors


def band_of(model, folder, **overrides):
    config = config_of("grpo", model, "", data__curated=str(folder), **{**GRPO, "schedule__kind": "band", "schedule__batch_prompts": 20, **overrides})
    rows, found = grpo._training_rows(config)
    return grpo._schedule(config, grpo.tokenise_prompts(rows, models.load_tokenizer(model), max_length=16), found), rows


def test_band_starts_from_the_sets_difficulties_vectors_and_clusters(model, tmp_path):
    curated, vectors = band_set(tmp_path)
    band, rows = band_of(model, tmp_path)
    kept = np.flatnonzero(curated.keep)
    assert [row["id"] for row in rows] == [f"r{i}" for i in kept]
    expected = TrainabilityBand(
        1 - curated.difficulty[kept], vectors[kept], 20, cluster=curated.cluster[kept], samples_per_prompt=4,
        temperature=0.5, easy_floor=0.125, epoch_share=0.3,
    )  # fmt: skip
    for step in range(4):
        assert band.batch(step).tolist() == expected.batch(step).tolist()
        for each in (band, expected):  # what decides whether a prompt passes is its vector
            each.observe(step, each.batch(step), (vectors[kept][each.batch(step), 0] > 0).astype(float))
    np.testing.assert_allclose(band.pass_probability(), expected.pass_probability())
    assert np.corrcoef(band.pass_probability(), vectors[kept, 0])[0, 1] > 0.3


def test_every_field_of_the_band_changes_its_batches(model, tmp_path):
    curated, _ = band_set(tmp_path)
    hardness = curated.difficulty[curated.keep]

    def first(**overrides):
        return hardness[band_of(model, tmp_path / "curated", schedule__band__easy_floor=0.0, **overrides)[0].batch(0)]

    spread = [np.abs(first(schedule__band__temperature=t) - 0.5).mean() for t in (0.05, 0.5, 50.0)]
    assert spread[0] < spread[1] < spread[2]
    easy = band_of(model, tmp_path, schedule__band__easy_floor=0.5, schedule__band__temperature=0.05)[0].batch(0)
    assert (hardness[easy] <= 0.25).sum() == 10 and (first(schedule__band__temperature=0.05) > 0.25).all()

    def steps_an_epoch(share):
        band, seen = band_of(model, tmp_path, schedule__band__epoch_share=share)[0], set()
        for step in range(6):
            rows = set(band.batch(step).tolist())
            if rows & seen:
                return step
            band.observe(step, band.batch(step), np.full(20, np.nan))
            seen |= rows
        return 6

    assert [steps_an_epoch(share) for share in (0.2, 0.6, 1.0)] == [1, 3, 5]
    cluster = curated.cluster[curated.keep]  # 40 rows of the one, 60 of the other
    of_one = [(cluster[band_of(model, tmp_path, schedule__band__balance=how)[0].batch(0)] == 0).sum() for how in ("items", "equal")]
    assert of_one == [8, 10]
    few, many = (band_of(model, tmp_path, train__num_samples=n)[0] for n in (2, 64))
    for band in (few, many):
        band.observe(0, band.batch(0), np.ones(20))
    assert many.pass_probability().mean() > few.pass_probability().mean(), "more samples say more"


def test_band_without_the_vectors_of_its_set_is_refused(model, tmp_path):
    band_set(tmp_path)
    path = tmp_path / grpo.VECTORS
    with pytest.raises(UserError, match="takes no schedule.options"):
        band_of(model, tmp_path, schedule__options='{"temperature": 1}')
    with pytest.raises(UserError, match="epoch has 20 prompts"):
        band_of(model, tmp_path, schedule__band__epoch_share=0.2, schedule__batch_prompts=21)
    np.savez(path, ids=np.array(["r1", "x"]), vectors=np.zeros((2, 3)))
    with pytest.raises(UserError, match="no vector of 99 of the 100 prompts, such as 'r2'.*another curated set"):
        band_of(model, tmp_path)
    for contents in (b"", b"PK broken", b"text"):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="vectors.npz holds no ids and vectors"):
            band_of(model, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="needs vectors.npz of the curate run"):
        band_of(model, tmp_path)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(model=""), "no model"),
        (dict(data__source=""), "neither is given"),
        (dict(data__curated="somewhere"), "both are given"),
        (dict(reward__name="exakt"), "exact"),
        (dict(reward__options="{ignore_case"), "reward.options.*no JSON"),
        (dict(reward__options="[1]"), "reward.options.*JSON object"),
        (dict(evals="only-a-file.jsonl"), "not NAME=SOURCE"),
        (dict(evals="a=x,a=y"), "'a' comes twice"),
        (dict(train__top_p=0.9), "allow_truncated_sampling"),
        (dict(schedule__kind="published"), "data.curated"),
        (dict(schedule__kind="band"), "data.curated"),
        (dict(schedule__batch_prompts=500), "larger than the 20 rows"),
        (dict(dtype="float16"), "'dtype' is 'float16'; it must be one of 'float32', 'bfloat16'"),
    ],
)
def test_grpo_mistakes_are_one_clear_line(model, sums, tmp_path, overrides, message):
    arguments = GRPO | dict(data__source=str(sums)) | overrides
    source, name = arguments.pop("data__source"), arguments.pop("model", model)
    with pytest.raises(UserError, match=message) as caught:
        grpo.run(config_of("grpo", name, source, **arguments), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(data__source=""), "no data"),
        (dict(loss_on="respons"), "did you mean response"),
        (dict(overflow="cut"), "overflow"),
        (dict(response_field="anser"), "anser"),
        (dict(dtype="float16"), "'dtype' is 'float16'"),
        (dict(data__held_out=20), "data.held_out is 20 of 20 rows"),
        (dict(data__held_out=2, evals="held_out={source}"), "name no set of evals 'held_out'"),
        (dict(train__log_every=0), "'log_every' must be at least 1"),
        (dict(train__keep_best="held_out"), "'keep_best' is 'held_out', which is no held-out set"),
    ],
)
def test_sft_mistakes_are_one_clear_line(model, sums, tmp_path, overrides, message):
    arguments = dict(data__source=str(sums)) | overrides
    source = arguments.pop("data__source")
    arguments |= {"evals": arguments.get("evals", "").format(source=source)}
    with pytest.raises(UserError, match=message):
        sft.run(config_of("sft", model, source, **arguments), str(tmp_path / "run"))


@pytest.mark.parametrize("verb,variants", [("grpo", (None, "grpo", "dr_grpo", "dapo")), ("sft", (None, "pairs", "chats", "text"))])
def test_config_files_have_every_setting_of_the_trainer(verb, variants):
    from jaxrl_llm.train.checks import check_grpo
    from jaxrl_llm.train.config import GRPOConfig, SFTConfig, from_mapping

    kind = GRPOConfig if verb == "grpo" else SFTConfig
    for variant in variants:
        train = load_config(f"configs/{verb}.py" + (f":{variant}" if variant else "")).train
        made = from_mapping(kind, train)
        assert set(train) == set(kind.__dataclass_fields__)
        for group in ("loss", "optimizer"):
            if group in train:
                assert set(train[group]) == set(type(getattr(made, group)).__dataclass_fields__)
        if verb == "grpo":
            check_grpo(made)
    if verb == "grpo":
        losses = [from_mapping(kind, load_config(f"configs/grpo.py:{v}").train).loss for v in variants[1:]]
        assert len(set(losses)) == 3


# --- a real checkpoint and data --------------------------------------------------------------------------------------


def held_out_loss(folder, tokenizer, stories, width=128):
    """Nats a token of whole stories that training does not see."""
    cfg, params = models.load(folder)
    rows = [(tokenizer.encode(story) + [cfg.eos_token_ids[0]])[:width] for story in stories]
    tokens, mask = pad_rows([(row, np.ones(len(row), bool)) for row in rows])
    logits = np.asarray(models.apply(cfg, params, tokens)[0], np.float64)[:, :-1]
    logps = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[:, 1:, None], -1)[..., 0]
    return -logps[mask[:, 1:]].mean()


def test_sft_on_real_stories_makes_others_likelier(assets, tmp_path):
    """A stories model of 260 K parameters, which knows such stories: 24 steps on 768 of them, each seen once, and 64 others cost less after."""
    folder = assets / "checkpoints" / "stories260k"
    stories = read_stories(str(assets / "data" / "tinystories" / "tinystories_sample.txt"), separator="<|endoftext|>")
    source = tmp_path / "stories.txt"
    source.write_text("\n<|endoftext|>\n".join(stories[:-64]))
    overrides = {
        "model": str(folder), "data.source": str(source), "data.separator": "<|endoftext|>", "max_length": 128, "overflow": "truncate",
        "train.steps": 24, "train.log_every": 1, "train.optimizer.learning_rate": 5e-4, "train.optimizer.warmup_steps": 2,
        "train.optimizer.schedule": "linear",
    }  # fmt: skip
    sft.run(load_config("configs/sft.py:text", overrides), str(tmp_path / "run"))
    tokenizer = models.load_tokenizer(folder)
    before, after = (held_out_loss(place, tokenizer, stories[-64:]) for place in (folder, tmp_path / "run" / "policy"))
    assert before < 1.5 and after < before - 0.005
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 24 and losses[0] == pytest.approx(before, abs=0.1) and max(losses) < before + 0.1
