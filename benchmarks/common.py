"""What the benchmarks share: the small model, timing, peers in environments of their own, one JSON line a figure, the record.

A benchmark module has a `main()` that ends in `run_benchmark`:

    def measure(args):
        compile_s, seconds = timed(step, repeats=5)
        peer = run_peer("tunix", "generation", ["--batch", "64"])
        yield Figure("generation", tokens / median(seconds), "tokens/s", peer="tunix 0.1.7", peer_value=peer_value(peer),
                     compile_s=compile_s, shape="batch 64, 32 + 128 tokens")

    if __name__ == "__main__":
        run_benchmark(measure, __doc__)
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxrl_llm.run_dir import write_text
from jaxrl_llm.runtime import use_huge_pages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"


# Goals that wait for a machine that is not always here: figure -> (unit, goal). The record names them until they are measured.
AWAITED = {
    "decode_bound_1.5b_h200": ("%", "at least 50 %"),
    "train_mfu_1.5b_h200": ("%", "at least 45 %"),
    "grpo_0.5b_h200": ("s", "at most 7 s"),
    "sae_encode_jumprelu_h200": ("%", "at least 60 %"),
    "sae_encode_topk_h200": ("%", "at least 60 %"),
    "sae_stream_h200": ("%", "at least 50 %"),
}


def small_qwen2() -> Any:
    """The model of the speed benchmarks, 6.4 M parameters in the shape of Qwen2; peers/peer_common.py has the same."""
    import models

    return models.ModelConfig(
        family="qwen2", vocab_size=2048, d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=1024,
        tie_embeddings=True, qkv_bias=True, max_position=1024,
    )  # fmt: skip


def progress(text: str) -> None:
    """What is being measured now, on standard error."""
    print(f"... {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured figure. `better` says which direction is good, so that `ratio` above 1 always favours us."""

    name: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    compile_s: float | None = None
    shape: str = ""
    better: str = "higher"

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None where the peer was not measured."""
        if not self.peer_value or not self.value:
            return None
        return self.value / self.peer_value if self.better == "higher" else self.peer_value / self.value

    def record(self) -> dict[str, Any]:
        """The JSON line."""
        return {
            "name": self.name,
            "value": _round(self.value),
            "unit": self.unit,
            "peer": self.peer,
            "peer_value": _round(self.peer_value),
            "ratio": _round(self.ratio),
            "compile_s": _round(self.compile_s),
            "shape": self.shape,
        }


def timed(call: Callable[[], Any], *, repeats: int = 5, warm_up: int = 1) -> tuple[float, list[float]]:
    """Times a call.

    Args:
      call: what to time; its result (any pytree of arrays) is waited for.
      repeats: timed calls. warm_up: calls after the first one that are not timed.

    Returns:
      (compile seconds: the first call less the median of the timed ones, seconds of each timed call).
    """
    first = _seconds(call)
    for _ in range(warm_up):
        _seconds(call)
    seconds = [_seconds(call) for _ in range(repeats)]
    return max(0.0, first - median(seconds)), seconds


def timed_in_turns(calls: dict[str, Callable[[], Any]], *, repeats: int = 5) -> dict[str, tuple[float, list[float]]]:
    """Times several calls that take turns, so that a slow moment of the machine falls on all of them.

    Returns:
      {name: (compile seconds, seconds of each of the `repeats` calls after the first)}, as of `timed`.
    """
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
    return {name: (max(0.0, first - median(rest)), rest) for name, (first, *rest) in seconds.items()}


def median(values: Iterable[float]) -> float:
    """The middle value (of an even number, the mean of the two)."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def run_peer(environment: str, script: str, arguments: Iterable[Any] = (), *, timeout: float = 1800) -> dict[str, Any] | None:
    """Runs `benchmarks/peers/SCRIPT.py` in `.venvs/ENVIRONMENT` and returns the JSON object on its last line.

    None where that environment is not set up (`make bench` sets it up). The peer sees the same cores as we do, and none of our
    packages. A peer that fails is reported on standard error and counts as not measured.
    """
    python = ROOT / ".venvs" / environment / "bin" / "python"
    if not python.exists():
        return None
    progress(f"peer {environment}/{script}")
    command = [str(python), str(ROOT / "benchmarks" / "peers" / f"{script}.py"), *map(str, arguments)]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**variables, "JAX_PLATFORMS": "cpu"}, timeout=timeout, cwd=ROOT / ".venvs"
        )
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        print(f"peer {environment}/{script}: no result after {timeout:.0f} s", file=sys.stderr)
    except (IndexError, ValueError):
        print(f"peer {environment}/{script} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return None


def peer_value(result: dict[str, Any] | None, key: str = "value") -> float | None:
    """A number of a peer's result; None where there is no result."""
    return None if result is None else result.get(key)


def run_benchmark(
    measure: Callable[[argparse.Namespace], Iterable[Figure]],
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], Any] | None = None,
) -> None:
    """The command line of a benchmark: prints each figure as it is measured and, with --record, adds them to RESULTS.md.

    Beside peers, which run on the CPU, JAX is kept to the CPU too; with --no-peers it takes what the machine has. A benchmark
    that fails half-way records what it had measured.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="add the figures to benchmarks/RESULTS.md")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="do not run the peers")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls a figure")
    if add_arguments:
        add_arguments(parser)
    args = parser.parse_args()
    use_huge_pages()  # as the command line does; the peers inherit it
    if args.peers:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    figures = []
    try:
        for figure in measure(args):
            figures.append(figure)
            print(json.dumps(figure.record()), flush=True)
    finally:
        if args.record and figures:
            append_results(figures)


def append_results(figures: Iterable[Figure], results: Path = RESULTS) -> None:
    """Adds figures to the record, with command, date, versions and machine."""
    name = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    lines = [f"\n## {datetime.date.today().isoformat()} `{command}`\n", f"{machine()}; {versions()}\n"]
    lines += ["| name | value | unit | peer | peer value | ratio | compile s | shape |", "|---|---|---|---|---|---|---|---|"]
    for figure in figures:
        cells = ["" if value is None else str(value) for value in figure.record().values()]
        lines.append("| " + " | ".join(cells) + " |")
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    write_results(results, text + "\n".join(lines) + "\n")


_SECTION = re.compile(r"^## (\d{4}-\d\d-\d\d) ", re.MULTILINE)
_HEADING = "# Results of the benchmarks\n\nThe newest of each figure, then every record, added by `--record`. Ratio above 1: better than the peer.\n"


def write_results(results: Path, text: str) -> None:
    """Writes the records in `text` behind a table of the newest of each figure, with its goal and whether it is met, and of what is awaited."""
    first = _SECTION.search(text)
    log = "" if first is None else text[first.start() :]
    newest: dict[str, list[str]] = {}
    for section in re.split(r"(?m)^(?=## \d{4})", log):
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("| ") and len(cells) == 8 and cells[0] not in ("name", ""):
                name, value, unit, peer, _, ratio, _, shape = cells
                goal = shape.rpartition("goal ")[2] if "goal " in shape else ""
                newest.pop(name, None)
                newest[name] = [name, value, unit, ratio and f"{ratio} ({peer})", goal, _met(goal, value, ratio), section[3:13]]
    awaited = [[name, "not measured", unit, "", goal, "", ""] for name, (unit, goal) in AWAITED.items() if name not in newest]
    rows = ["| " + " | ".join(cells) + " |" for cells in (*newest.values(), *awaited)]
    table = ["| name | value | unit | ratio | goal | met | date |", "|---|---|---|---|---|---|---|", *rows]
    write_text(results, "\n".join([_HEADING, *table, "", log.rstrip(), ""]))


def _met(goal: str, value: str, ratio: str) -> str:
    """Whether a goal such as "2.5 x", "under 1 s", "at most 1.1", "at least 50 %" or "0" is met; "" where that cannot be told."""
    found = re.match(r"(?:at least |at most |under )?([\d.]+)(?: \S+)?$", goal)
    if not found or (goal.endswith(" x") and not ratio):
        return ""
    number = float(found.group(1))
    if goal.endswith(" x"):
        return "yes" if float(ratio) >= number else "NO"
    return "yes" if (float(value) >= number if goal.startswith("at least") else float(value) <= number) else "NO"


def machine() -> str:
    """The machine in a few words: cores this process may use, processor, memory, accelerators if JAX has any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{cores} cores, {_cpu_name()}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        text += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    if "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""):
        text += ", huge pages"
    jax = sys.modules.get("jax")
    if jax is not None and jax.default_backend() != "cpu":
        text += f", {jax.device_count()} x {jax.devices()[0].device_kind}"
    return text


def versions() -> str:
    """Versions of what the figures depend on, and the commit; "with changes" where the working tree is not that commit."""
    parts = [f"python {platform.python_version()}"]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "numpy")]
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT)  # noqa: E731
    commit = git("rev-parse", "--short", "HEAD")
    if commit.returncode == 0:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/RESULTS.md").stdout.strip()
        parts.append(f"commit {commit.stdout.strip()}{' with changes' if changed else ''}")
    return ", ".join(parts)


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    result = call()
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    return time.perf_counter() - begin


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.machine()


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
