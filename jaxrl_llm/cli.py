"""The front door: `jaxrl-llm VERB --config=configs/NAME.py[:variant] --workdir=DIR [--config.key=value]`.

Nothing heavy is imported before a verb runs, so that --help answers at once.
"""

import errno
import importlib
import os
import sys
import traceback
from typing import Any, NamedTuple

from jaxrl_llm import __version__, foreign_packages
from jaxrl_llm.errors import UserError, from_os_error, nearest


class Verb(NamedTuple):
    """A verb: the module whose `run(config, workdir)` it calls, what it does, and whether it takes a config and a workdir.

    kinds: of a verb with several jobs, what `config.kind` may be and the config file of each; its config must be given.
    """

    module: str
    help: str
    config: str = "default"  # "default" (configs/VERB.py where none is given), "kinds" (one of `kinds`, no default) or "none"
    workdir: str = "needed"  # "needed", "optional" or "none"
    kinds: tuple[tuple[str, str], ...] = ()


VERBS = {
    "saerl": Verb("experiments.saerl", "the main job: SAE curation and GRPO arms, side by side, with a report"),
    "story_rules": Verb("experiments.story_rules", "GRPO of a stories model on rule-checked continuations, with a report"),
    "verif": Verb("experiments.verif", "VerIF: GRPO on instructions by rules and a judge, arms side by side, with a report"),
    "curate": Verb("jaxrl_llm.commands.curate", "filter, cluster and order a prompt set by SAE features"),
    "train_sae": Verb("jaxrl_llm.commands.train_sae", "train a sparse autoencoder on a model's activations"),
    "eval": Verb(
        "jaxrl_llm.commands.eval", "how well a model follows instructions (IFEval, AgentIF), or how good SAEs are", config="kinds",
        kinds=(("sae", "configs/sae_eval.py"), ("ifeval", "configs/ifeval.py"), ("agentif", "configs/agentif.py")),
    ),
    "features": Verb("jaxrl_llm.commands.features", "a page of what a dictionary's features fire on, with labels if a server is named"),
    "sft": Verb("jaxrl_llm.commands.sft", "fine-tune (or pre-train) on text or on prompts with answers"),
    "grpo": Verb("jaxrl_llm.commands.grpo", "train a policy by GRPO on prompts with a checkable reward"),
    "dpo": Verb("jaxrl_llm.commands.dpo", "train a policy on preferences: DPO, IPO, hinge, SimPO, ORPO, KTO"),
    "online_dpo": Verb("jaxrl_llm.commands.online_dpo", "train a policy by DPO on pairs of its own samples, judged by a reward"),
    "generate": Verb("jaxrl_llm.commands.generate", "sample from a model", workdir="optional"),
    "serve": Verb("jaxrl_llm.commands.serve", "a model behind the OpenAI API: chat completions and completions", workdir="none"),
    "report": Verb("jaxrl_llm.commands.report", "make the HTML page of a run directory", config="none"),
    "plan": Verb("jaxrl_llm.commands.plan", "memory and FLOPs of a config on a named mesh, no weights needed", workdir="none"),
    "doctor": Verb("jaxrl_llm.commands.doctor", "what this machine has, what is missing", config="none", workdir="none"),
}

USAGE = "jaxrl-llm VERB [--config=configs/NAME.py[:variant]] [--workdir=DIR] [--config.key=value ...]"


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None and arguments and arguments[0] in VERBS:
            from jaxrl_llm.runtime import use_huge_pages

            use_huge_pages()
        problem = foreign_packages()
        if problem:
            raise UserError(problem)
        return _run(arguments)
    except KeyboardInterrupt:
        print("\njaxrl-llm: interrupted; the same command goes on from what is finished and saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (such as `head`) has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _users_mistake(error)
        if message is None:
            traceback.print_exc()
            return 1
        print(f"jaxrl-llm: {message}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxrl-llm {__version__}")
        return 0
    name = arguments[0]
    if name not in VERBS:
        raise UserError(f"unknown verb '{name}': {nearest(name, VERBS)}; jaxrl-llm --help lists them")
    verb = VERBS[name]
    flags, overrides, wants_help = _parse(name, verb, arguments[1:])
    if wants_help:
        print(_verb_help(name, verb, flags.get("config")))
        return 0
    config = None
    if verb.config != "none":
        from jaxrl_llm.config import PACKAGE_ROOT, check_shape, load_config

        spec = flags.get("config") or _default(name, verb)
        config = load_config(spec, overrides)
        check_shape(config, spec, str(PACKAGE_ROOT / (_of_kind(name, verb, spec, config) if verb.kinds else _default(name, verb))))
    workdir = flags.get("workdir")
    if verb.workdir == "needed" and not workdir:
        raise UserError(f"{name} needs --workdir=DIR, the directory for what it writes")
    _prepare_jax()
    run = importlib.import_module(verb.module).run
    return run(config, workdir) or 0


def _default(name: str, verb: Verb) -> str:
    """The config file of a verb where none is given; raises UserError where it has one for each kind of job."""
    if verb.kinds:
        kinds = ", ".join(f"--config={path} ({kind})" for kind, path in verb.kinds)
        raise UserError(f"{name} needs a config that says what it is to do: {kinds}")
    return f"configs/{name}.py"


def _of_kind(name: str, verb: Verb, spec: str, config: Any) -> str:
    """The config file of the kind that a config names."""
    kinds, kind = dict(verb.kinds), config.get("kind", None)
    if kind is None:
        raise UserError(f"{spec} is no config of {name}: it has no field 'kind'; start from one of {', '.join(kinds.values())}")
    if kind not in kinds:
        raise UserError(f"config key 'kind' is {kind!r}: {nearest(str(kind), kinds)}")
    return kinds[kind]


def _parse(name: str, verb: Verb, arguments: list[str]) -> tuple[dict[str, str], dict[str, Any], bool]:
    """Splits a verb's arguments into flags (config, workdir), config overrides, and whether help is asked for."""
    known = [flag for flag, use in (("config", verb.config), ("workdir", verb.workdir)) if use != "none"]
    flags: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            return flags, overrides, True
        if not argument.startswith("--"):
            raise UserError(f"{name}: '{argument}' is no flag; flags are {' and '.join('--' + flag + '=...' for flag in known) or 'none'}")
        key, equals, value = argument[2:].partition("=")
        is_override = key.startswith("config.") and "config" in known
        if not is_override and key not in known:
            flag_names = [f"--{flag}" for flag in [*known, "help"]]
            raise UserError(f"{name}: unknown flag '--{key}': {nearest('--' + key, flag_names)}")
        if not equals:
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif is_override:
                overrides[key.removeprefix("config.")] = True  # a bare --config.overwrite switches it on
                continue
            else:
                raise UserError(f"{name}: --{key} needs a value: --{key}=...")
        if is_override:
            overrides[key.removeprefix("config.")] = value
        else:
            flags[key] = value
    return flags, overrides, False


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"usage: {USAGE}", "", "verbs:"]
    lines += [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    lines += [
        "",
        "jaxrl-llm VERB --help lists the fields of its config. Without --config, configs/VERB.py is used.",
        "A config is looked for from the current folder, then beside the installed package.",
    ]
    return "\n".join(lines)


def _verb_help(name: str, verb: Verb, spec: str | None) -> str:
    usage = [f"jaxrl-llm {name}"]
    given = "--config=configs/NAME.py[:variant]"
    usage += [f"{given if verb.kinds else f'[{given}]'} [--config.key=value ...]"] if verb.config != "none" else []
    usage += {"needed": ["--workdir=DIR"], "optional": ["[--workdir=DIR]"], "none": []}[verb.workdir]
    lines, told = [f"usage: {' '.join(usage)}", ""], f"{name}: {verb.help}"
    if verb.kinds and not spec:
        lines += [told, ""]
        lines += [f"  --config={path:<24}  kind {kind}; jaxrl-llm {name} --config={path} --help lists its fields" for kind, path in verb.kinds]
    elif verb.config != "none":
        from jaxrl_llm.config_help import about, describe

        spec = spec or f"configs/{name}.py"
        lines += [about(spec) or told, "", describe(spec)]
    else:
        lines += [told]
    return "\n".join(lines)


def _prepare_jax() -> None:
    """Settings that JAX reads once, when it is imported or first used: the compilation cache, and the processes of one job."""
    from jaxrl_llm import runtime

    runtime.use_compilation_cache()
    runtime.maybe_initialize()


def _users_mistake(error: BaseException) -> str | None:
    """The one line for a mistake that the user can mend; None for an error of ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    model_errors = sys.modules.get("models.errors")
    if model_errors is not None and isinstance(error, model_errors.ModelError):
        return " ".join(str(error).split())
    if isinstance(error, PermissionError) and error.filename:
        return f"no permission for {error.filename}: choose another path, or ask for the right to it"
    cause: BaseException | None = error
    while cause is not None:
        if _is_disk_refusal(cause):
            where: Any = getattr(cause, "filename", None) or "the working directory"
            return str(from_os_error(cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, ""), where, "write"))
        cause = cause.__cause__ or cause.__context__
    return None


def _is_disk_refusal(error: BaseException) -> bool:
    # Array libraries wrap the operating system's error in their own and leave only its text.
    refused = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return refused or "No space left on device" in str(error)


if __name__ == "__main__":
    sys.exit(main())
