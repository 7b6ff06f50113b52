"""Loading, overriding, locking and comparing configs."""

import re
from pathlib import Path

import ml_collections
import pytest

import jaxrl_llm.config as config_module
from jaxrl_llm.config import (
    HOW,
    check_shape,
    config_hash,
    differences,
    field_names,
    import_config,
    is_named,
    load_config,
    resolve_path,
    says_what,
    to_dict,
    to_json,
)
from jaxrl_llm.config_help import about, describe, field_comments
from jaxrl_llm.errors import UserError, nearest

SOURCE = '''
import ml_collections
VARIANTS = ("small", "large")

def get_config(variant=None):
    config = ml_collections.ConfigDict()
    config.zeta = 1  # the first field
    # comment above
    config.rate = 0.5
    config.train = ml_collections.ConfigDict()
    config.train.steps = 10 if variant != "large" else 1000  # steps of training
    config.train.shuffle = True
    config.sae = ml_collections.ConfigDict()  # the dictionary
    config.sae.steps = 7  # steps of the SAE
    config.sae.width = 8
    config.name = "run"
    config.sizes = (1, 2)
    config.names = ()
    config.stops = ("\\n",)
    config.free = None
    config.limit = ml_collections.config_dict.placeholder(int)  # at most
    return config
'''


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "thing.py"
    path.write_text(SOURCE)
    return str(path)


def test_variant_changes_values_and_the_config_is_locked(spec):
    assert load_config(spec).train.steps == load_config(spec + ":small").train.steps == 10
    config = load_config(spec + ":large")
    assert config.train.steps == 1000
    with pytest.raises(AttributeError):
        config.train.stpes = 1
    with pytest.raises(UserError, match="unknown variant 'lrage' of thing.py: did you mean large"):
        load_config(spec + ":lrage")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("zeta", "3", 3),
        ("zeta", "1e3", 1000),
        ("rate", "2", 2.0),
        ("rate", "1e-4", 1e-4),
        ("train.shuffle", "false", False),
        ("train.shuffle", "1", True),
        ("name", "12", "12"),
        ("name", "", ""),
        ("sizes", "3,4,5", (3, 4, 5)),
        ("sizes", "(6,)", (6,)),
        ("sizes", "", ()),
        ("names", "a,'b'", ("a", "b")),
        ("names", r"'\n\n', ' Q, A:'", ("\n\n", " Q, A:")),
        ("stops", r"'\t'", ("\t",)),
        ("names", "it's, so", ("it's", "so")),
        ("free", "5", 5),
        ("free", "text", "text"),
        ("limit", "5", 5),
        ("limit", "None", None),
        ("free", "None", None),
    ],
)
def test_overrides_are_read_by_the_type_of_the_field(spec, key, text, value):
    config = load_config(spec, {key: text})
    found = to_dict(config)
    for part in key.split("."):
        found = found[part]
    assert found == (list(value) if isinstance(value, tuple) else value)
    got = config
    for part in key.split("."):
        got = got[part]
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("stpes", "1", "unknown config key 'stpes'"),
        ("train.stpes", "1", "unknown config key 'train.stpes': did you mean train.steps"),
        ("zeta.steps", "1", "unknown config key 'zeta.steps'"),
        ("train", "1", "'train' is a group of fields, set one of them: train.shuffle, train.steps"),
        ("zeta", "x", "'zeta' is a whole number, cannot read 'x'"),
        ("zeta", "1.5", "'zeta' is a whole number, cannot read '1.5'"),
        ("zeta", "1e999", "'zeta' is a whole number"),
        ("rate", "fast", "'rate' is a number, cannot read 'fast'"),
        ("train.shuffle", "maybe", "'train.shuffle' is true or false, cannot read 'maybe'"),
        ("sizes", "1,x", "cannot read 'x'"),
        ("limit", "many", "'limit' is a whole number"),
        ("zeta", "None", "'zeta' is a whole number and cannot be None"),
        ("name", True, "'name' is text and needs a value: --config.name="),
        ("zeta", True, "'zeta' is a whole number and needs a value"),
        ("name", "None", "'name' is text and cannot be None; to empty it write --config.name="),
    ],
)
def test_wrong_overrides_name_the_key(spec, key, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(spec, {key: text})
    assert "\n" not in str(caught.value)


def test_a_typed_value_of_the_wrong_type_is_refused(spec):
    with pytest.raises(UserError, match="config key 'name' is text, got 3"):
        load_config(spec, {"name": 3})


def test_missing_files_name_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no config file 'configs/genrate.py': did you mean configs/generate.py"):
        load_config("configs/genrate.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="has no get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "wrong.py").write_text("def get_config(variant=None): return {}\n")
    with pytest.raises(UserError, match="get_config returned dict"):
        load_config(str(tmp_path / "wrong.py"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ndef get_config(variant=None:\n", r"thing.py:2: the config file stops with SyntaxError"),
        ("import ml_collection\n", r"thing.py:1: the config file stops with ModuleNotFoundError: No module named 'ml_collection'"),
        ("def get_config(variant=None):\n\n    return here()\n", r"thing.py:3: the config file stops with NameError: name 'here'"),
        ("def get_config():\n    return 1\n", r"thing.py: the config file stops with TypeError: .*positional"),
        ("def get_config(variant=None):\n    import json\n    json.loads('{')\n", r"thing.py:3: .*JSONDecodeError"),
    ],
)
def test_a_config_file_that_cannot_run_is_named_with_its_line(tmp_path, source, message):
    (tmp_path / "thing.py").write_text(source)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "thing.py"))


def test_a_config_file_has_the_fields_of_its_verb(tmp_path):
    """Also a file of one's own: a misspelt field there would be passed over, for ConfigDict takes any new name."""
    base = "from configs.generate import get_config as base\ndef get_config(variant=None):\n    config = base()\n"
    path = tmp_path / "own.py"

    def check(lines):
        path.write_text(base + lines + "    return config\n")
        check_shape(load_config(str(path)), str(path), "configs/generate.py")

    check("    config.temperature = 0.5\n")
    with pytest.raises(UserError, match=r"own.py has a field 'temprature' that configs/generate.py has not: did you mean temperature\?"):
        check("    config.temprature = 0.5\n")
    with pytest.raises(UserError, match=r"own.py has no field 'data.on_bad', which configs/generate.py has: start from"):
        check("    del config.data.on_bad\n")


def test_tables_may_have_other_rows_and_open_groups_more_fields(tmp_path):
    like = """
from ml_collections import ConfigDict
OPEN = ("grpo",)
def get_config(variant=None):
    return ConfigDict({"evals": {"test": {"source": "", "limit": 1}}, "grpo": {"steps": 1, "loss": {"kl": ""}}, "seed": 1})
"""
    (tmp_path / "like.py").write_text(like)

    def check(**changes):
        fields = {"evals": {"a": {"source": "x", "limit": 1}, "b": {"source": "y", "limit": 1}}, "grpo": {"steps": 1, "loss": {"kl": ""}}, "seed": 1}
        check_shape(ml_collections.ConfigDict(fields | changes), "own.py", str(tmp_path / "like.py"))

    check()
    check(grpo={"steps": 1, "loss": {"kl": "", "kl_coef": 1}, "temperature": 1.0})
    with pytest.raises(UserError, match="own.py has a field 'sead' that configs/like.py has not: did you mean seed"):
        check(sead=2)
    with pytest.raises(UserError, match="own.py has no field 'grpo.steps'"):
        check(grpo={"loss": {"kl": ""}, "temperature": 1.0})


@pytest.mark.parametrize("name", [path.stem for path in sorted((Path(__file__).parents[2] / "configs").glob("[!_]*.py"))])
def test_every_variant_has_the_fields_of_its_file(name):
    spec = f"configs/{name}.py"
    for variant in import_config(resolve_path(spec)).VARIANTS:
        check_shape(load_config(f"{spec}:{variant}"), f"{spec}:{variant}", spec)


def test_paths_are_found_from_here_then_beside_the_package(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("configs/generate.py") == repo / "configs" / "generate.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "generate.py").write_text(SOURCE)
    assert not resolve_path("configs/generate.py").is_absolute()
    assert load_config("configs/generate.py").zeta == 1


def test_hash_and_difference(spec):
    one, other = load_config(spec), load_config(spec, {"train.steps": "11"})
    assert config_hash(one) == config_hash(load_config(spec)) != config_hash(other)
    assert differences(to_dict(one), to_dict(other)) == {"train.steps": (10, 11)}
    assert differences(to_dict(one), to_dict(one)) == {}
    assert differences({"a": 1, "d": {"x": 1}}, {"a": 1, "b": 2, "d": {}}) == {"d.x": (1, "(absent)"), "b": ("(absent)", 2), "d": ("(absent)", {})}
    assert config_hash({"a": 1, "overwrite": True}) == config_hash({"a": 1, "overwrite": False})
    assert '"sizes": [\n    1,' in to_json(one)


def test_fields_that_say_how_and_not_what(repo):
    """Each is a field of some config; all others count, and so do those that choose micro-batches where a loss depends on these."""
    fields = {key for path in (repo / "configs").glob("[!_]*.py") for key in field_names(load_config(str(path)))}
    assert set(HOW) == {key.rpartition(".")[2] for key in fields if not says_what(key)}
    one = {"mesh": "fsdp=8", "train": {"micro_batch_rows": 4, "remat": False, "router_balance": 0.0}}
    other = {"mesh": "fsdp=4", "train": {"micro_batch_rows": 8, "remat": True, "router_balance": 0.0}}
    assert config_hash(one) == config_hash(other) and set(differences(one, other)) == {"mesh", "train.micro_batch_rows", "train.remat"}
    one["train"]["router_balance"] = other["train"]["router_balance"] = 0.1
    assert config_hash(one) != config_hash(other) == config_hash(other | {"train": other["train"] | {"remat": False}})
    assert [is_named(key, ("a.b", "c")) for key in ("a.b", "a.b.x", "a.bx", "c", "a")] == [True, True, False, True, False]


def test_help_shows_values_and_comments_in_the_order_of_the_file(spec):
    text = describe(spec)
    lines = text.splitlines()
    assert lines[0] == "variants of thing.py: small, large"
    fields = [line.split()[0] for line in lines[2:]]
    assert fields[:4] == ["--config.zeta=1", "--config.rate=0.5", "--config.train.steps=10", "--config.train.shuffle=True"]
    assert len(fields) == len(field_names(load_config(spec)))
    comments = {line.split()[0].split("=")[0]: line.split(None, 1)[1] for line in lines[2:] if len(line.split()) > 1}
    assert comments["--config.zeta"] == "the first field"
    assert comments["--config.rate"] == "comment above"
    assert comments["--config.train.steps"] == "steps of training"
    assert comments["--config.sae.steps"] == "steps of the SAE"
    assert comments["--config.sae.width"] == "the dictionary"
    assert "--config.train.shuffle" not in comments


def test_help_shows_a_table_as_one_line(tmp_path):
    path = tmp_path / "rows.py"
    path.write_text("""
from ml_collections import ConfigDict
ROWS = {"size": dict(size=1, kind="a"), "other": dict(size=2, kind="b")}
def get_config(variant=None):
    c = ConfigDict()
    c.size = 3  # of all
    c.table = ConfigDict()  # one row a case
    for name, row in ROWS.items():
        c.table[name] = ConfigDict(row)
    return c
""")
    lines = describe(str(path)).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["--config.size=3", "of", "all"],
        ["--config.table.{other,size}.{kind,size}", "one", "row", "a", "case"],
    ]
    assert load_config(str(path), {"table.other.size": "5"}).table.other.size == 5


def test_every_config_of_the_repository_loads_in_every_variant(repo):
    for path in sorted((repo / "configs").glob("[!_]*.py")):
        for variant in (None, *getattr(import_config(path), "VARIANTS", ())):
            config = load_config(str(path) + (f":{variant}" if variant else ""))
            assert isinstance(config, ml_collections.ConfigDict) and config.is_locked


def test_every_field_of_every_config_has_a_comment(repo):
    bare = {
        path.name: [key for key, comment in field_comments(path, load_config(str(path))).items() if not comment]
        for path in sorted((repo / "configs").glob("[!_]*.py"))
    }
    assert not any(bare.values()), bare


@pytest.mark.parametrize("name", ["dpo", "grpo", "online_dpo", "sft"])
def test_every_field_of_training_has_a_comment_of_its_own_that_one_reads_at_a_glance(repo, name):
    path = repo / "configs" / f"{name}.py"
    comments = field_comments(path, load_config(str(path)))
    assert len(set(comments.values())) == len(comments), "two fields have one comment: that of their group"
    head = path.read_text().partition("config.overwrite")[0]
    assert not re.findall(r"^    config\.[\w.]+ = (?!ml_collections)[^#\n]*$", head, re.MULTILINE)
    assert not {key: len(comment) for key, comment in comments.items() if len(comment) > 200}


def test_help_says_what_a_config_says_of_itself_and_names_every_reward(repo):
    from jaxrl_llm.rewards import registry

    ours = {name for name, factory in registry._FACTORIES.items() if factory.__module__.startswith("jaxrl_llm.")}  # tests register more
    for name in ("grpo", "online_dpo"):
        path = repo / "configs" / f"{name}.py"
        text = about(str(path))
        assert text.startswith("Train a policy by ") and f"    jaxrl-llm {name} --config.model=FOLDER" in text and "Expected: reward" in text
        told = field_comments(path, load_config(str(path)))["reward.name"]
        assert set(re.findall(r'"(\w+)"', told)) == ours


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("train.optimizer.lr", "did you mean train.optimizer.learning_rate?"),
        ("lr", "did you mean train.optimizer.learning_rate?"),
        ("stepz", "did you mean train.steps?"),
        ("batch_size", "did you mean schedule.batch_prompts?"),
        ("train.num_generations", "did you mean train.num_samples?"),
        ("beta", "did you mean train.loss.kl_coef?"),
        ("train.loss.loss_type", "did you mean train.loss.aggregation?"),
        ("train.epsilon_high", "did you mean train.loss.clip_high?"),
        ("output_dir", "the run's folder is given by --workdir=..."),
        ("train.lora.zzzz", "known: train.lora.alpha, train.lora.rank, train.lora.rank_stabilised, train.lora.seed, train.lora.targets"),
        ("qqq", "template, train.*"),
    ],
)
def test_an_unknown_key_is_answered_by_the_name_of_the_field_not_by_its_path(key, end):
    with pytest.raises(UserError, match=re.escape(end) + "$"):
        load_config("configs/grpo.py", {key: "1"})


def test_names_used_elsewhere_lead_to_fields_that_exist(repo):
    known = {name.rpartition(".")[2] for path in repo.glob("configs/[!_]*.py") for name in field_names(load_config(str(path)))}
    assert {name for names in config_module._ALSO_CALLED.values() for name in names} <= known | {"workdir"}


def test_help_writes_a_line_break_as_one_types_it():
    assert r"--config.grpo.stop_strings=\n  " in describe("configs/story_rules.py")


def test_nearest():
    assert nearest("greedy", []) == "there are none"
    assert nearest("xyz", ["steps", "seed"]) == "known: seed, steps"
    assert nearest("q", [f"name{i:02d}" for i in range(20)]).endswith("name11 and 8 more")
