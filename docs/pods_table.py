"""Writes the table of docs/pods.md: every large recipe, compiled by the TPU's own compiler.

    python docs/pods_table.py            all of them, half an hour on two cores; needs the extra "tpu"
    python docs/pods_table.py FOLDER     keeps each plan there as JSON, and does not compile again what is there

Where a recipe's config, the compiler or the models change, run it again and commit what it writes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "pods.md"
BEGIN, END = "<!-- made by docs/pods_table.py -->\n", "<!-- end -->\n"

_SAERL = "--config.target=configs/saerl.py:qwen2.5-math-{}"
_GRPO = ("--config.target=configs/grpo.py", "--config.micro_batch_rows=64", "--config.remat=True", "--config.dtype=bfloat16")
_GRPO += ("--config.prompts=64", "--config.num_samples=8", "--config.prompt_tokens=256", "--config.max_new_tokens=512")

# What the table calls it -> what `plan` is asked.
RECIPES: dict[str, tuple[str, ...]] = {
    "GRPO, Qwen2.5-0.5B": (
        *_GRPO, "--config.model=qwen2.5-0.5b", "--config.mesh=v5e:2x4", "--config.layout=fsdp=8", "--config.rollout_layout=data=8",
    ),
    "SAERL, Qwen2.5-Math-1.5B": (_SAERL.format("1.5b"), "--config.mesh=v5e:2x4"),
    "SAERL, Qwen2.5-Math-7B": (_SAERL.format("7b"), "--config.mesh=v5e:8x8"),
    "VerIF, TULU-3-8B": ("--config.target=configs/verif.py:tulu-3-8b", "--config.mesh=v5p:2x2x4"),
    "VerIF, R1-Distill-Qwen-7B": ("--config.target=configs/verif.py:r1-distill-qwen-7b", "--config.mesh=v5p:2x2x4"),
    "GRPO, Qwen3-30B-A3B": (*_GRPO, "--config.model=qwen3-30b-a3b", "--config.mesh=v5p:4x4x4", "--config.layout=fsdp=8,expert=8"),
    "GRPO, Mixtral 8x7B": (
        *_GRPO, "--config.model=mixtral-8x7b", "--config.mesh=v5e:16x16", "--config.layout=fsdp=32,expert=8", "--config.prompts=256",
        "--config.micro_batch_rows=256",
    ),
}  # fmt: skip
PROGRAMS = {"move": "to sampling", "generate": "sampling", "train_step": "update", "sae_encode": "SAE, encoding", "sae_train": "SAE, a step"}


def main(folder: Path) -> None:
    """Plans what is not in `folder` yet and writes the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in RECIPES.items():
        kept = folder / f"{name}.json"
        if not kept.exists():
            print(name, file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "jaxrl_llm", "plan", "--config.json=True", *flags]
            done = subprocess.run(command, cwd=PAGE.parent.parent, stdout=subprocess.PIPE, text=True, check=True)
            kept.write_text(done.stdout)
    plans = {name: json.loads((folder / f"{name}.json").read_text()) for name in RECIPES}
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(plans) + END + rest.partition(END)[2])


def table(plans: dict[str, dict[str, Any]]) -> str:
    """The plans as Markdown: the commands, then a row for each program."""
    lines = ["```bash", *(f"jaxrl-llm plan {' '.join(flags)}" for flags in RECIPES.values()), "```", ""]
    head = ("recipe, slice", "program", "rows", "arguments", "working", "held", "total", "fits", "TFLOP", "s at least", "arithmetic, memory, links")
    rows = [head, ("---",) * len(head)]
    for name, plan in plans.items():
        layouts = "; sampling ".join(dict.fromkeys(map(_axes, (plan["layout"], plan["rollout_layout"]))))
        for number, (key, told) in enumerate((key, told) for key, told in PROGRAMS.items() if key in plan):
            program, least = plan[key], plan[key]["roofline"]
            sizes = [program[size] for size in ("argument_bytes", "temporary_bytes", "held_bytes")]
            sizes.append(program["total_bytes"] + program["held_bytes"])
            split = "" if key == "move" else f"{program['micro_batches' if key == 'train_step' else 'batches']} x {program['rows']}"
            parts = ", ".join(f"{least[part]:.2f}" for part in ("compute", "memory", "links"))
            rows.append((
                f"{name}, {plan['mesh']}: {layouts}" if number == 0 else "", told, split, *(f"{size / 2**30:.2f}" for size in sizes),
                "yes" if program["fits"] else "**no**", f"{program['flops'] / 1e12:,.0f}", f"{least['seconds']:.2f}", parts,
            ))  # fmt: skip
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]) + "\n"


def _axes(layout: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in layout.items() if size > 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
