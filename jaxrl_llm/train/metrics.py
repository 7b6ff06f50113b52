"""What a GRPO step reports, and a run at its end."""

import typing
from typing import Any

import numpy as np

from jaxrl_llm.rewards.verdict import Status
from jaxrl_llm.train.rollout import CUT_OFF, Experience

if typing.TYPE_CHECKING:
    from jaxrl_llm.checkpoint import Checkpoints
    from jaxrl_llm.run_dir import RunDir
    from jaxrl_llm.train.config import DPOConfig, SFTConfig


class Recorded:
    """A run on fixed data that keeps its records (`history`), and the checkpoint of least loss on the held-out set `config.keep_best`. best:
    (that loss, its step) of the best trained policy so far."""

    config: "DPOConfig | SFTConfig"
    run_dir: "RunDir | None"
    checkpoints: "Checkpoints | None"
    history: list[dict[str, Any]]
    best: tuple[float, int] | None

    def log(self, record: dict[str, Any]) -> None:
        """Adds a record to the history, and to the run directory's if there is one."""
        self.history.append(record)
        if self.run_dir is not None:
            self.run_dir.log(record)

    def see_best(self) -> bool:
        """Takes note of the evaluations; whether the newest is the best of a trained policy so far (the first of equals), whose checkpoint
        then stays."""
        before = self.best
        found = [r for r in self.history if r["kind"] == "eval" and r["set"] == self.config.keep_best and r["step"] > 0]
        if found and self.checkpoints is not None:
            best = min(found, key=lambda record: record["loss"])
            self.best = best["loss"], best["step"]
            self.checkpoints.name_best(best["step"])
        return self.best != before


def group_spread_share(rewards_N: np.ndarray, valid_N: np.ndarray, groups_N: np.ndarray) -> float:
    """The share of groups (with any valid row) whose valid rewards are all equal: they teach nothing."""
    groups = np.unique(groups_N[valid_N])
    flat = [np.ptp(rewards_N[valid_N & (groups_N == g)]) == 0 for g in groups]
    return float(np.mean(flat)) if flat else float("nan")


def experience_metrics(experience: Experience, compared_N: np.ndarray | None = None) -> dict[str, float | int]:
    """Reward, pass rate, spread, lengths and errors of a step's completions, over the rows that have a verdict; the spread over those of them
    that are learnt from. compared_N: an integer for each row, the same for those whose rewards are compared; None = those of a prompt."""
    valid, lengths = experience.valid_N, experience.rollout.completion_lengths_N
    passed = np.array([v.status is Status.PASS for v in experience.verdicts])
    statuses = [v.status for v in experience.verdicts]
    return {
        "reward": float(experience.rewards_N[valid].mean()) if valid.any() else float("nan"),
        "pass_rate": float(passed[valid].mean()) if valid.any() else float("nan"),
        "zero_spread": group_spread_share(experience.rewards_N, experience.learnt_N, experience.groups_N if compared_N is None else compared_N),
        "completion_length": float(lengths.mean()),
        "cut_off": float(np.mean(experience.rollout.finish_reason_N == CUT_OFF)),
        "errors": int(np.sum(~valid)),
        "timeouts": statuses.count(Status.TIMEOUT),
        "infrastructure": statuses.count(Status.INFRASTRUCTURE),
    }


def samples_record(experience: Experience, step: int, prompts: int) -> dict:
    """A line of samples.jsonl: the first `prompts` prompts of the step with all their completions and verdicts."""
    shown = []
    for g in range(min(prompts, len(experience.prompts))):
        rows = np.flatnonzero(experience.rollout.group_ids_N == g)
        row = experience.prompts.rows[g]
        shown.append(
            {
                "id": experience.prompts.ids[g],
                "prompt": row.get("prompt", ""),
                "answer": row.get("answer"),
                "responses": [
                    {
                        "text": experience.texts[i],
                        "status": experience.verdicts[i].status.name,
                        "score": experience.verdicts[i].value,
                        "reason": experience.verdicts[i].reason,
                    }
                    for i in rows
                ],
            }
        )
    return {"kind": "samples", "step": step, "prompts": shown}


def summarise(records: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """First, best and last accuracy of each set, mean reward of the first and last ten steps, and where the time went."""
    train = [r for r in records if r["kind"] == "train"]
    timed = ("rollout", "reward", "update", *(("reward_waited",) if any("seconds_reward_waited" in r for r in train) else ()))
    mean = lambda name, rows: float(np.mean([r[name] for r in rows if r[name] is not None] or [np.nan]))  # noqa: E731
    summary: dict[str, Any] = {
        "steps": steps,
        "reward_first": mean("reward", train[:10]),
        "reward_last": mean("reward", train[-10:]),
        "zero_spread": mean("zero_spread", train),
        "errors": int(sum(r["errors"] for r in train)),
        "seconds": {name: float(sum(r.get(f"seconds_{name}", 0.0) for r in train)) for name in timed},
        "evals": {},
    }
    for name in dict.fromkeys(r["set"] for r in records if r["kind"] == "eval"):
        rows = [r for r in records if r["kind"] == "eval" and r["set"] == name]
        first, last = rows[0], rows[-1]
        summary["evals"][name] = {"first": first["accuracy"], "last": last["accuracy"], "n": last["n"]}
        if last.get("avg_at_k") is not None:
            summary["evals"][name] |= {"first_avg_at_k": first["avg_at_k"], "last_avg_at_k": last["avg_at_k"], "k": last["k"]}
    return summary
