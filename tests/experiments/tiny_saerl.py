"""The SAERL experiment in seconds, as a program for tests that need processes of their own:

    python tiny_saerl.py FOLDER [JSON of changes] [STEP before which it waits to be killed; so it does at its end]
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.verdict import Status, Verdict

SMALL = {
    "policy.clean_steps": 20, "policy.mixed_steps": 5, "policy.batch": 32, "policy.d_model": 16, "policy.d_ff": 32, "policy.n_layers": 2,
    "policy.n_heads": 2, "sae.steps": 4, "sae.d_sae": 32, "sae.k": 4, "sae.batch": 64, "data.rows": 96, "data.test_rows": 12,
    "data.reward": "ends_right", "curation.labels": 48, "curation.label_samples": 4, "curation.quality_labels": 48, "curation.clusters": 3,
    "curation.dims": 4, "curation.refilter_every": 4, "grpo.steps": 10, "grpo.num_samples": 4, "grpo.max_new_tokens": 8, "grpo.eval_every": 0,
    "grpo.eval_samples": 2, "grpo.checkpoint_every": 3, "grpo.learning_rate": 1e-3, "map_prompts": 24, "formats": ("parquet",),
}  # fmt: skip
MOMENTS = "moments.txt"  # in the workdir of the program: when it started and when its schedules saw the policy


@registry.register("ends_right")
def ends_right():
    """PASS when the answer's last word is written: a policy that knows little does so now and then, then learns to."""
    passed = lambda item: item.answer.split()[-1] in item.response.split()  # noqa: E731
    return lambda inputs: [Verdict(Status.PASS if passed(item) else Status.FAIL) for item in inputs]


def config_of(**changes):
    from jaxrl_llm.config import load_config

    return load_config("configs/saerl.py:demo", SMALL | {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})


def without_times(value):
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.startswith(("seconds", "tokens_per_s", "stages"))}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder, without=(MOMENTS, "stages.json", "config.json")):
    """{relative path: what the file says} of every file below `folder`, without times and without the folder's own name."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name not in without):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                value = {name: (arrays[name].dtype, arrays[name].tobytes()) for name in arrays.files}
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(str(folder), "")
            value = [without_times(json.loads(part)) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        else:
            value = path.read_bytes()
        found[str(path.relative_to(folder))] = value
    return found


def watch(path, hold=None):
    """From now on the schedule that follows the policy writes down each step that it sees and which rows it keeps (bits, as hex), and waits
    where it comes to step `hold`."""
    from jaxrl_llm.curation import schedule

    class Watched(schedule.TrainabilityBand):
        def see_policy(self, step, params):
            if step == hold:
                time.sleep(600)
            note(path, f"{step} begins")
            super().see_policy(step, params)
            note(path, f"{step} keeps {np.packbits(self.state()['kept']).tobytes().hex()}")

    path.parent.mkdir(exist_ok=True)
    note(path, "start")
    schedule.TrainabilityBand = Watched


def kept_by(path):
    """{step: [N / 8] bytes of the rows kept} of the first arm that `path` tells of."""
    lines = [line.split(" keeps ") for line in path.read_text().splitlines() if "keeps" in line]
    found = {}
    for step, rows in lines:
        found.setdefault(int(step), np.frombuffer(bytes.fromhex(rows), np.uint8))
    return found


def note(path, text):
    with open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def run(folder, **changes):
    from experiments import saerl

    saerl.run(config_of(**changes), folder)


if __name__ == "__main__":
    hold = int(sys.argv[3]) if len(sys.argv) > 3 else None
    watch(Path(sys.argv[1]) / MOMENTS, hold)
    run(sys.argv[1], **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))
    if hold is not None:
        time.sleep(600)
