"""What all tests share: JAX on the CPU, our own `models` and `sae`, the real assets, and Python in a process of its own."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXRL_LLM_HUGE_PAGES", "0")  # asking for them restarts the program, which here is pytest

ROOT = Path(__file__).resolve().parent.parent

import jax  # noqa: E402
from jax._src import compiler  # noqa: E402  (what compiles a program has no public name)

import jaxrl_llm  # noqa: E402  (JAX_PLATFORMS must be set before anything can import JAX)

# Commands that run inside pytest would turn it on for all later tests; processes of their own keep it.
jax.config.update("jax_enable_compilation_cache", False)

NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false"  # they take three quarters of the time of a quick compilation
MOST_MAPS = 20_000  # memory maps of a test process: Linux refuses more than 65,530 (vm.max_map_count), and XLA crashes on that

if (problem := jaxrl_llm.foreign_packages()) is not None:
    pytest.exit(problem, returncode=2)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Every program that XLA compiles for the CPU holds memory maps as long as JAX caches it: some tens of thousands over all tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs are compiled quickly rather than well: for tests that spend their time in the compiler and compare what was compiled alike.

    Processes of their own do so with JAX_DISABLE_MOST_OPTIMIZATIONS=1 and, unless `run_python` starts them, NO_EMITTERS in XLA_FLAGS.
    """
    before, options = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options

    def without_emitters(*args, env_options_overrides=None, **given):
        # As NO_EMITTERS in XLA_FLAGS, which a process reads once and cannot take back.
        return options(*args, env_options_overrides={"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {}), **given)

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = without_emitters
    yield
    compiler.get_compile_options = options
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real checkpoints and data: JAXRL_LLM_ASSETS, or shared/assets beside the repository. Skips without it."""
    folder = Path(os.environ.get("JAXRL_LLM_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"no real assets at {folder}: set JAXRL_LLM_ASSETS")
    return folder


@pytest.fixture(scope="session")
def run_python():
    """Runs Python code in a fresh process, for tests that need devices, flags or imports of their own.

    `run_python(code, args=(), env=None, devices=None)` returns its standard output; a failure shows its standard error.
    """

    def run(code: str, args: tuple[str, ...] = (), env: dict[str, str] | None = None, devices: int | None = None) -> str:
        variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **(env or {})}
        flags = [NO_EMITTERS] if variables.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1" else []
        if devices:
            # Many devices on few cores: a device may wait for the others longer than XLA's 40 s before all have come to a collective.
            patience = "--xla_cpu_collective_call_terminate_timeout_seconds=500"
            flags += [f"--xla_force_host_platform_device_count={devices}", patience]
            # XLA's pool has one thread a device, and whatever else it runs holds one that a collective waits for: 4 of 8 runs under load hung.
            variables["PJRT_NPROC"] = str(4 * devices)
            code = f'import jax; jax.config.update("jax_cpu_enable_async_dispatch", False)\n{code}'  # for the same reason
        if flags:
            variables["XLA_FLAGS"] = " ".join(flags)
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=variables, cwd=ROOT, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
