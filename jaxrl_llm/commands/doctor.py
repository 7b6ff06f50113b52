"""`jaxrl-llm doctor`: what this machine has, one collective over all its devices, and what is missing for what."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from jaxrl_llm import __version__

OURS = "jaxrl-llm"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "datasets", "tensorflow-datasets")
IMPORTED = ("models", "sae", "optax", "orbax.checkpoint", "transformers", "datasets")  # models brings flax, which may not fit jax

# import name, what it is for, how to get it; what a plain install brings is not listed.
OPTIONAL = (
    ("pytest", "the tests", "pip install 'jaxrl-llm[test]'"),
    ("libtpu", "plan on TPU meshes", "pip install 'jaxrl-llm[tpu]'"),
    ("torch", "the live parity tests against transformers", "pip install torch"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(config: Any = None, workdir: str | None = None) -> int:
    """Prints the findings; returns 1 where something that every verb needs does not work, else 0."""
    problems: list[str] = []
    for title, lines in (
        ("machine", machine()),
        ("versions", versions(problems)),
        ("imports", imports(problems)),
        ("devices", devices(problems)),
        ("compilation cache", compilation_cache()),
        ("optional", optional()),
        ("sandbox", sandbox()),
    ):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    print("\n".join(["problems", *(f"  {line}" for line in problems)]) if problems else "all that is needed works")
    return 1 if problems else 0


def machine() -> list[str]:
    """Cores, memory, free disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {cores} cores"]
    memory = memory_gib()
    if memory:
        lines.append(f"memory {memory[0]:.1f} GiB, {memory[1]:.1f} GiB available")
    lines.append(f"disk here {shutil.disk_usage('.').free / 2**30:.1f} GiB free")
    return lines


def memory_gib() -> tuple[float, float] | None:
    """Total and available memory, where the system tells."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemTotal"].split()[0]) / 2**20, int(fields["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError):
        return None


def versions(problems: list[str]) -> list[str]:
    """The versions that matter; a missing package is a problem, and so is one outside the bounds that were tested."""
    lines = [f"jaxrl-llm {__version__} from {Path(__file__).resolve().parents[2]}"]
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install jaxrl-llm (again)")
    problems += out_of_bounds()
    return [*lines, ", ".join(found)]


def out_of_bounds() -> list[str]:
    """A line for each dependency that is missing or not of a version that setup.py allows; none where we run without being installed."""
    try:
        requirements = map(Requirement, importlib.metadata.requires(OURS) or ())
    except importlib.metadata.PackageNotFoundError:
        return []
    lines = []
    for wanted in requirements:
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.name not in PACKAGES:
                lines.append(f"{wanted.name} is not installed: pip install '{wanted.name}{wanted.specifier}'")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            told = f"{wanted.name} {version} is not among the versions this was tested with"
            lines.append(f"{told}: pip install '{wanted.name}{wanted.specifier}'")
    return lines


def imports(problems: list[str]) -> list[str]:
    """What every verb imports, each tried; what fails is a problem: two packages may be there and not fit each other."""
    works = []
    for name in IMPORTED:
        try:
            importlib.import_module(name)
            works.append(name)
        except Exception as error:  # whatever a broken installation raises is the finding
            problems.append(f"import {name} fails: {type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}")
    return [", ".join(works) or "none"]


def devices(problems: list[str]) -> list[str]:
    """JAX's devices with their memory, and the result of one sum over all of them."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # whatever a broken driver or library raises is the finding
        problems.append(f"JAX finds no device: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
        return ["none"]
    kinds = sorted({device.device_kind for device in found})
    lines = [f"{len(found)} x {', '.join(kinds)} ({jax.default_backend()})"]
    if jax.process_count() > 1:
        lines[0] += f", this is process {jax.process_index()} of {jax.process_count()}"
    stats = found[0].memory_stats() if found[0].process_index == jax.process_index() else None
    if stats and "bytes_limit" in stats:
        lines.append(f"memory {stats['bytes_limit'] / 2**30:.1f} GiB a device, {stats.get('bytes_in_use', 0) / 2**30:.1f} GiB in use")
    begin = time.perf_counter()
    try:
        total = collective_sum()
    except Exception as error:  # a collective that fails is the finding
        problems.append(f"a sum over the devices fails: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
        return lines
    expected = sum(range(1, len(found) + 1))
    if total != expected:
        problems.append(f"a sum over the devices gives {total}, not {expected}")
    else:
        lines.append(f"one sum over all devices: right ({time.perf_counter() - begin:.2f} s with compilation)")
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        problems.append("there is an NVIDIA driver but JAX uses the CPU: pip install 'jaxrl-llm[cuda]', and unset JAX_PLATFORMS")
    return lines


def collective_sum() -> int:
    """The sum of 1..n with one number on each of the n devices (of all processes), computed by a psum over a mesh."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    n = jax.device_count()
    mesh = jax.make_mesh((n,), ("all",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("all"))
    numbers = jax.make_array_from_callback((n,), rows, lambda index: np.arange(1, n + 1, dtype=np.int32)[index])
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec())
    return int(jax.jit(summed)(numbers)[0])


def compilation_cache() -> list[str]:
    """Where compiled programs are kept, and how much there is."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        return ["off"]
    files = [path for path in Path(folder).glob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    return [f"{folder}: {len(files)} files, {size:.0f} MiB (safe to delete)"]


def optional() -> list[str]:
    """What is there beyond a plain install, and how to get what is not."""
    lines = []
    for name, use, how in OPTIONAL:
        there = importlib.util.find_spec(name) is not None
        lines.append(f"{name}: " + ("yes" if there else f"no; for {use}: {how}"))
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    lines.append(f"chromium: {browser}" if browser else "chromium: no; for the tests of the report page: apt-get install chromium")
    return lines


def sandbox() -> list[str]:
    """The layers around code that nobody vouches for, and whether they suffice here; rewards that run no such code need none of them."""
    from jaxrl_llm.rewards.sandbox import layers

    lines = [f"{name}: " + (f"no: {why}" if why else "yes") for name, why in layers.probe().items()]
    missing = layers.missing()
    return [*lines, f"refused: {layers.refusal(missing)}" if missing else "isolates: yes"]


if __name__ == "__main__":
    sys.exit(run())
