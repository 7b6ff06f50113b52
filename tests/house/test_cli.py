"""The front door: verbs, flags, help, and which errors are the user's."""

import json
import subprocess
import sys

import pytest

from jaxrl_llm import cli, config
from jaxrl_llm.errors import UserError


def call(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_lists_every_verb_and_no_verb_is_an_error(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in cli.VERBS)
    code, out, _ = call(capsys)
    assert code == 2 and "usage:" in out
    assert call(capsys, "--version")[1].startswith("jaxrl-llm 0.")


def test_help_imports_nothing_heavy(run_python):
    code = """
import sys
from jaxrl_llm import cli
assert cli.main(['--help']) == 0
assert cli.main(['generate', '--help']) == 0
heavy = {'jax', 'jaxlib', 'flax', 'numpy.linalg', 'transformers', 'torch', 'datasets', 'sklearn', 'models', 'sae'} & set(sys.modules)
print('HEAVY', sorted(heavy - {'numpy.linalg'}))
"""
    assert "HEAVY []" in run_python(code)


def test_python_m_and_console_script_are_the_same_door(repo):
    for command in ([sys.executable, "-m", "jaxrl_llm"], [sys.executable, "-c", "import sys; from jaxrl_llm.cli import main; sys.exit(main())"]):
        done = subprocess.run([*command, "grop"], capture_output=True, text=True, cwd=repo)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == "jaxrl-llm: unknown verb 'grop': did you mean grpo?; jaxrl-llm --help lists them\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--confg=x"], "generate: unknown flag '--confg': did you mean --config?"),
        (["doctor", "--workdri=x"], "doctor: unknown flag '--workdri'"),
        (["doctor", "--config=x"], "doctor: unknown flag '--config'"),
        (["generate", "more"], "generate: 'more' is no flag"),
        (["generate", "--config"], "--config needs a value"),
        (["generate", "--config.modle=x"], "unknown config key 'modle': did you mean model?"),
        (["generate", "--config=configs/genrate.py"], "did you mean configs/generate.py?"),
        (["generate", "--config=configs/generate.py:demo"], "unknown variant 'demo' of generate.py: there are none"),
        (["generate", "--config.model"], "config key 'model' is text and needs a value: --config.model=..."),
        (["plan", "--config=configs/generate.py"], "has a field 'adapter' that configs/plan.py has not: known: attention, "),
        (["generate", "--config.num_samples=few"], "config key 'num_samples' is a whole number, cannot read 'few'"),
        (["grpo", "--config=configs/grpo.py"], "grpo needs --workdir=DIR"),
        (["generate"], "no model: name a Hugging Face folder"),
        (["generate", "--config.model=x"], "no prompt: give"),
        (["generate", "--config.model=x", "--config.prompt=a", "--config.data.source=b"], "leave one out"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys, argv, message):
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("jaxrl-llm: ") and message in err and err.count("\n") == 1


@pytest.fixture
def fake_verb(monkeypatch):
    """The verb generate with the function given for its run."""

    def install(run):
        module = type(sys)("fake_verb")
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_verb", module)
        monkeypatch.setitem(cli.VERBS, "generate", cli.Verb("fake_verb", "a verb of the tests", workdir="optional"))

    return install


def test_flags_reach_the_verb_in_every_spelling(capsys, fake_verb):
    seen = []
    fake_verb(lambda config, workdir: seen.append((config.model, config.seed, config.overwrite, workdir)))
    spec = "--config=configs/generate.py"
    assert call(capsys, "generate", spec, "--config.model=a=b", "--workdir", "w", "--config.seed", "3", "--config.overwrite")[0] == 0
    assert call(capsys, "generate", spec)[0] == 0
    assert seen == [("a=b", 3, True, "w"), ("", 0, False, None)]


def test_which_errors_keep_their_traceback(capsys, fake_verb):
    from models.errors import ModelError

    def raising(error):
        def run(config, workdir):
            raise error

        fake_verb(run)
        return call(capsys, "generate", "--config=configs/generate.py")

    assert raising(UserError("two\nlines"))[::2] == (2, "jaxrl-llm: two lines\n")
    assert raising(ModelError("config.json: bad"))[::2] == (2, "jaxrl-llm: config.json: bad\n")
    code, _, err = raising(OSError(28, "No space left on device", "w/x"))
    assert code == 2 and "cannot write w/x: the disk is full" in err and err.count("\n") == 1
    code, _, err = raising(ValueError("DATA_LOSS: writing chunk: No space left on device"))
    assert code == 2 and "the disk is full" in err
    assert raising(PermissionError(13, "Permission denied", "w/x"))[2].startswith("jaxrl-llm: no permission for w/x:")
    code, _, err = raising(KeyboardInterrupt())
    assert code == 130 and "goes on from what is finished and saved" in err
    code, _, err = raising(ValueError("ours"))
    assert code == 1 and "Traceback" in err and "ValueError: ours" in err


def test_exit_code_of_the_verb_is_passed_on(capsys, fake_verb):
    fake_verb(lambda config, workdir: 3)
    assert call(capsys, "generate", "--config=configs/generate.py")[0] == 3


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.config == "default"])
def test_every_verb_has_a_default_config_and_help(capsys, verb):
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0 and f"fields of configs/{verb}.py" in out and "--config." in out
    says = (config.import_config(config.PACKAGE_ROOT / "configs" / f"{verb}.py").__doc__ or "").strip().splitlines()
    assert f"\n\n{says[0]}\n" in out and all(len(line) <= 150 for line in out.partition("fields of")[0].splitlines())


def test_help_says_what_the_config_file_says_with_commands_as_one_types_them(capsys, tmp_path):
    out = call(capsys, "grpo", "--help")[1]
    assert "--config.data.fields=prompt=question \\\n        --config.reward.name=maths" in out and "\nExpected: reward and pass_rate rise" in out
    own = tmp_path / "own.py"
    own.write_text("from configs.grpo import get_config\n")
    assert "\n\ngrpo: train a policy by GRPO" in call(capsys, "grpo", f"--config={own}", "--help")[1]


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.kinds])
def test_a_verb_of_several_kinds_says_which_there_are(capsys, tmp_path, verb):
    for kind, path in cli.VERBS[verb].kinds:
        assert path in call(capsys, verb, "--help")[1] and f"kind {kind}" in call(capsys, verb, "--help")[1]
        assert f"fields of {path}" in call(capsys, verb, f"--config={path}", "--help")[1]
    code, _, err = call(capsys, verb, f"--workdir={tmp_path}")
    assert code == 2 and err.startswith(f"jaxrl-llm: {verb} needs a config that says what it is to do: --config={cli.VERBS[verb].kinds[0][1]}")
    code, _, err = call(capsys, verb, "--config=configs/sft.py", f"--workdir={tmp_path}")
    assert code == 2 and f"configs/sft.py is no config of {verb}: it has no field 'kind'" in err
    code, _, err = call(capsys, verb, f"--config={path}", "--config.kind=saee", f"--workdir={tmp_path}")
    assert code == 2 and "config key 'kind' is 'saee'" in err and err.count("\n") == 1
    own = tmp_path / "own.py"
    lines = ("def get_config(variant=None):", "    config = base()", "    config.sead = 1", "    return config")
    own.write_text("\n".join([f"from configs.{path[8:-3]} import get_config as base", *lines]))
    code, _, err = call(capsys, verb, f"--config={own}", f"--workdir={tmp_path}")
    assert code == 2 and f"own.py has a field 'sead' that {path} has not" in err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_run(verb):
    import importlib

    assert callable(importlib.import_module(cli.VERBS[verb].module).run)


def test_every_experiment_is_a_verb(repo):
    modules = {f"experiments.{path.stem}" for path in (repo / "experiments").glob("[!_]*.py")}
    assert modules <= {verb.module for verb in cli.VERBS.values()}


def test_foreign_package_is_named_in_one_line(tmp_path, repo):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('imported')\n")
    environment = {"PYTHONPATH": str(repo), "PATH": ""}
    done = subprocess.run([sys.executable, "-m", "jaxrl_llm", "doctor"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"package 'models' is imported from {tmp_path / 'models'}, but jaxrl_llm needs its own, {repo / 'models'}" in done.stderr
    for how in (("-c", "import jaxrl_llm"), ("-m", "experiments.saerl")):
        done = subprocess.run([sys.executable, *how], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 1 and f"ImportError: package 'models' is imported from {tmp_path / 'models'}" in done.stderr


@pytest.mark.parametrize("shape", ["package", "file"])
@pytest.mark.parametrize(
    ("foreign", "code"),
    [
        ("models", "import sae"),
        ("models", "from sae.harvest import harvest_activations"),
        ("models", "import experiments.saerl"),
        ("models", "from jaxrl_llm.curation.features import extract_features"),
        ("models", "import models; import jaxrl_llm"),
        ("sae", "import experiments.story_rules"),
        ("sae", "import jaxrl_llm.curation.passes"),
        ("configs", "import jaxrl_llm"),
    ],
)
def test_a_foreign_package_is_named_whatever_is_imported_first(tmp_path, repo, foreign, code, shape):
    """Not as a missing module of somebody's `models`, which is what a bare `import models` in our packages would end in."""
    place = tmp_path / foreign if shape == "package" else tmp_path / f"{foreign}.py"
    place.mkdir() if shape == "package" else place.write_text("")
    if shape == "package":
        (place / "__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(repo), "PATH": ""})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: package '{foreign}' is imported from {place}, but "), done.stderr
    assert str(repo / foreign) in last and str(tmp_path) in last


def test_a_module_made_by_hand_is_no_sibling(monkeypatch):
    import types

    import jaxrl_llm

    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    assert "package 'models' is imported from code that made it by hand" in jaxrl_llm.foreign_packages()


def test_doctor_reports_and_finds_all_right(run_python):
    out = run_python("from jaxrl_llm import cli; raise SystemExit(cli.main(['doctor']))", devices=4)
    assert "4 x cpu" in out and "one sum over all devices: right" in out and "all that is needed works" in out
    assert "user namespace: " in out and ("isolates: yes" in out or "refused: the sandbox cannot isolate" in out)


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    from jaxrl_llm.commands import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor, "OPTIONAL", (("no_such_module", "a use", "pip install it"),))
    monkeypatch.setattr(doctor, "collective_sum", lambda: -1)
    assert doctor.run() == 1
    out = capsys.readouterr().out
    assert "no-such-package is not installed" in out and "no_such_module: no; for a use: pip install it" in out
    assert "a sum over the devices gives -1, not" in out and "one sum over all devices: right" not in out


def test_doctor_says_whether_code_can_be_isolated(monkeypatch):
    from jaxrl_llm.commands import doctor
    from jaxrl_llm.rewards.sandbox import layers

    found = dict.fromkeys([*layers.NEEDED, *layers.EXTRA], "")
    monkeypatch.setattr(layers, "probe", lambda: found | {"landlock": "the kernel has none"})
    assert doctor.sandbox()[-2:] == ["landlock: no: the kernel has none", "isolates: yes"]
    monkeypatch.setattr(layers, "probe", lambda: found | {"seccomp": "refused"})
    assert "seccomp: no: refused" in doctor.sandbox()
    assert doctor.sandbox()[-1].startswith("refused: the sandbox cannot isolate code on this host (seccomp")


def test_doctor_names_versions_that_do_not_fit_and_imports_that_fail(capsys, monkeypatch):
    """A jax that flax does not know is there, has devices and sums over them; nothing else works."""
    import importlib.metadata

    from jaxrl_llm.commands import doctor

    requires = ["numpy>=1", "jax<0.2,>=0.1", "no-such-package>=3", "torch>=99; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    monkeypatch.setattr(doctor, "IMPORTED", ("json", "no_such_module"))
    assert doctor.run() == 1
    problems = capsys.readouterr().out.split("problems\n")[1].splitlines()
    assert len(problems) == 3
    assert "is not among the versions this was tested with: pip install 'jax<0.2,>=0.1'" in problems[0] and problems[0].startswith("  jax ")
    assert problems[1] == "  no-such-package is not installed: pip install 'no-such-package>=3'"
    assert problems[2] == "  import no_such_module fails: ModuleNotFoundError: No module named 'no_such_module'"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert doctor.out_of_bounds() == []  # run from a checkout that is not installed


def test_generate_on_the_real_checkpoint(capsys, assets, tmp_path, quick_compilation):
    model = f"--config.model={assets / 'checkpoints' / 'stories260k'}"
    common = [model, "--config.temperature=0", "--config.max_new_tokens=24"]
    opening = "Once upon a time, there was a little girl named Lily."
    code, out, _ = call(capsys, "generate", *common, f"--config.prompt={opening}")
    assert code == 0 and f"{opening} She loved to play outside in the park. One day, she saw" in out
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"q": q}) + "\n" for q in (opening, "Tom had a dog.", "One day")))
    source = [f"--config.data.source={tmp_path / 'prompts.jsonl'}", "--config.data.fields=prompt=q", f"--workdir={tmp_path / 'run'}"]
    batches = ["--config.batch_prompts=2", "--config.num_samples=2"]
    assert call(capsys, "generate", *common, *source, *batches)[0] == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["completion"].startswith(" She loved to play")
    # A run that was stopped after the first batch goes on and ends the same.
    (tmp_path / "run" / "samples.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert call(capsys, "generate", *common, *source, *batches)[0] == 0
    assert (tmp_path / "run" / "samples.jsonl").read_text().splitlines() == lines


def test_a_verb_of_the_program_asks_for_huge_pages_first(monkeypatch, capsys):
    """Only as a program and only for a verb: a call from Python must not be restarted, and --help has nothing to gain."""
    from jaxrl_llm import runtime

    asked = []
    monkeypatch.setattr(runtime, "use_huge_pages", lambda: asked.append(sys.argv[1:]))
    assert cli.main(["doctor", "--help"]) == 0 and asked == []
    for arguments in (["--help"], ["doctor", "--help"]):
        monkeypatch.setattr(sys, "argv", ["jaxrl-llm", *arguments])
        assert cli.main() == 0
    assert asked == [["doctor", "--help"]]
