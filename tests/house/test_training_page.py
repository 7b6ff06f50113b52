"""docs/training.md is held to the code: what each variant changes, every metric that a training verb logs, fields, and names of other libraries."""

import ast
import json
import re

import pytest

from jaxrl_llm import config as config_module
from jaxrl_llm.config import config_path, field_names, import_config, load_config
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.verdict import RewardInput, Status

VERBS = ("sft", "dpo", "grpo", "online_dpo")
# Where the lines of metrics.jsonl are made: (file, functions, what stands before their keys).
TRAINED = [("train/state.py", ("apply_gradients",), "")]
PAIRED = [("train/online_dpo.py", ("_update",), "")]
WRITERS = {
    "Reading a GRPO run": [
        *TRAINED, *PAIRED, ("train/loop.py", ("_step", "_evaluate"), ""), ("train/loop.py", ("_experience",), "seconds_"),
        ("train/overlap.py", ("step_ahead",), "seconds_"), ("train/metrics.py", ("experience_metrics",), ""),
        ("train/evaluate.py", ("evaluate",), ""), ("train/step.py", ("micro_loss", "_update"), ""), ("losses/grpo.py", ("grpo_loss",), ""),
        ("train/resample.py", ("fill",), ""), ("train/preference_step.py", ("micro_loss",), ""),
    ],
    "Reading a preference run": [
        *TRAINED, *PAIRED, ("train/dpo.py", ("_record", "_evaluate"), ""), ("train/preference_step.py", ("_update",), ""),
        ("losses/preference.py", ("_pair_metrics", "orpo_loss", "kto_loss"), ""),
    ],
    "Reading a supervised run": [("train/sft.py", ("_record", "_micro_loss", "_update"), "")],
}  # fmt: skip
NOT_LOGGED = {"params", "opt_state"}  # of the training state, which `apply_gradients` gives too


@pytest.fixture(scope="module")
def page(repo):
    return (repo / "docs" / "training.md").read_text()


def section(page, title):
    """What stands under a heading, its subsections with it, commands left out."""
    parts = re.split(r"^(#+ .*)\n", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE)
    heads = [head.partition(" ")[::2] for head in parts[1::2]]
    begin = next((i for i, (_, name) in enumerate(heads) if name == title), None)
    assert begin is not None, f"docs/training.md has no section '{title}'"
    end = next((i for i in range(begin + 1, len(heads)) if len(heads[i][0]) <= len(heads[begin][0])), len(heads))
    return "".join(parts[2 + 2 * begin : 1 + 2 * end])


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def rows(text):
    """The cells of each row of the tables in a text, without their heads."""
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in table if "`" in cells[0]]


def changes(verb):
    """variant -> {"field=value", ...}, what it changes in the config of its verb."""
    fields = lambda config: {key: config_module._at(config, key) for key in field_names(config)}  # noqa: E731
    spec = f"configs/{verb}.py"
    plain = fields(load_config(spec))
    differing = {name: fields(load_config(f"{spec}:{name}")).items() - plain.items() for name in import_config(config_path(spec)[0]).VARIANTS}
    return {name: {f"{key.removeprefix('train.')}={value}" for key, value in items} for name, items in differing.items()}


@pytest.mark.parametrize("verb", ["grpo", "dpo"])
def test_the_table_has_every_variant_with_the_fields_that_it_changes(page, verb):
    table = {quoted(cells[0])[0]: cells[1] for cells in rows(section(page, f"Of `{verb}`"))}
    wanted = changes(verb)
    assert list(table) == list(wanted)
    for name, fields in wanted.items():
        assert fields == set(quoted(table[name])) or (not fields and table[name].startswith("none")), name


@pytest.mark.parametrize("verb", ["sft", "online_dpo"])
def test_the_other_variants_are_named_with_their_fields(page, verb):
    told = next(text for text in section(page, "Variants").split("\n\n") if text.startswith(f"`{verb}` has "))
    for name, fields in changes(verb).items():
        assert {name, *fields} <= set(quoted(told)), name


def named_keys(repo, writers):
    """The names that the functions give to what they measure: keys of all dict literals in them, and of metrics[...] and record[...] = ."""
    found = set()
    for file, functions, before in writers:
        tree = ast.parse((repo / "jaxrl_llm" / file).read_text())
        bodies = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for node in (node for name in functions for node in ast.walk(bodies[name])):
            keys = node.keys if isinstance(node, ast.Dict) else []
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) in ("metrics", "record"):
                keys = [target.slice]
            found |= {before + key.value for key in keys if isinstance(key, ast.Constant)}
    return found - NOT_LOGGED


@pytest.mark.parametrize("title", WRITERS)
def test_every_metric_is_explained_and_nothing_else(repo, page, title):
    text, named = section(page, title), named_keys(repo, WRITERS[title])
    assert len(named) > 6
    everywhere = set(quoted(section(page, "Reading a GRPO run"))) & {"kind", "step"}  # said once, of all lines
    missing = named - set(quoted(text)) - everywhere
    assert not missing, f"docs/training.md, '{title}', does not explain {sorted(missing)}"
    if title == "Reading a preference run":
        text = text.partition("### ")[0]
    explained = {name for cells in rows(text) for name in quoted(cells[0])}
    assert explained <= named, f"docs/training.md, '{title}', explains {sorted(explained - named)}, which nothing logs"


def test_a_metric_that_is_new_would_be_missed(tmp_path):
    file = tmp_path / "jaxrl_llm" / "new.py"
    file.parent.mkdir()
    file.write_text("def f(metrics, batch):\n    metrics['a'] = 1\n    batch['b'] = 2\n    return {'c': {'d': 3}, **metrics}\n")
    assert named_keys(tmp_path, [("new.py", ("f",), "seconds_")]) == {"seconds_a", "seconds_c", "seconds_d"}


def test_fields_that_the_page_names_exist(page):
    """Names with a dot, and keys of "field=value", such as `loss.clip_high` and `train.loss.kl=k3`."""
    known = {key for verb in VERBS for key in field_names(load_config(f"configs/{verb}.py"))}
    ends = {".".join(parts[i:]) for key in known for parts in [key.split(".")] for i in range(len(parts))}
    ours = page.partition("## Coming from")[0] + " ".join(f"{cells[1]} " for cells in rows(page.partition("## Coming from")[2]))
    spans = [re.match(r"([a-z_][\w.]*)(=|$)", span) for span in quoted(re.sub(r"```.*?```", "", ours, flags=re.DOTALL))]
    named = {match[1] for match in spans if match and (match[2] or "." in match[1]) and not re.search(r"\.(md|py|jsonl?|rewards\w*)\b", match[1])}
    wrong = {name for name in named if name not in ends and ("." in name or f"`{name}=" in page)}
    assert len(named & ends) > 80 and not wrong, wrong


def test_names_of_other_libraries_are_on_the_page(page):
    told = " ".join(quoted(section(page, "Coming from TRL, Tunix or EasyDeL")))
    assert not [name for name in config_module._ALSO_CALLED if not re.search(rf"\b{name}\b", told)]


def test_the_reward_of_ones_own_is_one(page, tmp_path, monkeypatch):
    """As `jaxrl-llm grpo --config=brief.py:dapo` reads it, more than once."""
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    file = tmp_path / "brief.py"
    file.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    for _ in range(2):
        config = load_config(f"{file}:dapo", {"reward.options": '{"limit": 2}'})
        config_module.check_shape(config, str(file), "configs/grpo.py")
    assert config.train.rollout_tries == 10
    reward = registry.get_reward(config.reward.name, **json.loads(config.reward.options))
    found = reward([RewardInput("p", "two words"), RewardInput("p", "now there are three")])
    assert [(verdict.status, verdict.value) for verdict in found] == [(Status.PASS, pytest.approx(1 / 3)), (Status.FAIL, pytest.approx(1 / 5))]
