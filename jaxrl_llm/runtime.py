"""What must be settled before JAX is first used: memory pages, the persistent compilation cache, the processes of a multi-host job."""

import atexit
import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError


def use_huge_pages(setting: str = "/sys/kernel/mm/transparent_hugepage/enabled") -> None:
    """Starts this program anew, once, with memory in huge pages where Linux gives them to those who ask ("madvise").

    XLA takes gigabytes for the temporaries of each step and gives them back; in pages of 4 KiB their first touch is a fifth of a
    training step on CPU (docs/architecture.md). Only the C library can ask, and only as it starts: hence the restart, under the
    same process id. GLIBC_TUNABLES that already say something of it are left alone, and JAXRL_LLM_HUGE_PAGES=0 leaves all as it is.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    from_stdin = sys.orig_argv[1:2] in ([], ["-"])  # the program itself was read from there, and is gone
    if "glibc.malloc.hugetlb" in tunables or os.environ.get("JAXRL_LLM_HUGE_PAGES") == "0" or "jax" in sys.modules or from_stdin:
        return
    try:
        asked_for = "[madvise]" in Path(setting).read_text()
        version = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ").split(".")
    except (OSError, ValueError):
        return
    if asked_for and [int(part) for part in version if part.isdigit()] >= [2, 35]:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
        os.environ["JAXRL_LLM_HUGE_PAGES"] = "0"  # asked for: never again, should something clear the tunables
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_compilation_cache() -> Path | None:
    """Turns on JAX's persistent compilation cache, so that a second run does not compile again.

    The folder is JAX_COMPILATION_CACHE_DIR, else one in the user's cache folder. The CPU's features are part of that name: a
    program compiled for one kind of CPU may not run on another that shares the home folder. JAX_ENABLE_COMPILATION_CACHE=false
    leaves it off. Returns the folder, or None where it is off or cannot be made.
    """
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "").lower() in ("0", "false", "no"):
        return None
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else base / "jaxrl_llm" / f"xla-{_cpu_features()}"
    if "://" not in str(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"no compilation cache: cannot make {folder} ({error.strerror})", file=sys.stderr)
            return None
    # JAX's own threshold of 1 s would leave out most programs of a small model, which are what a short run waits for.
    seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    if "jax" in sys.modules:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))
    else:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = seconds
    return folder


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, str | int] | None:
    """What `jax.distributed.initialize` is to be called with: None for a job of one process, {} where JAX detects it itself.

    JAX_COORDINATOR_ADDRESS (host:port) with JAX_NUM_PROCESSES and JAX_PROCESS_ID says it outright. A Slurm step or Open MPI job
    of several tasks, a GKE or multi-slice TPU job, or JAXRL_LLM_DISTRIBUTED=1 (for example on each worker of a TPU slice) leave
    it to JAX. JAXRL_LLM_DISTRIBUTED=0 keeps to one process.

    Raises:
      UserError: the coordinator is named but the number or the index of the process is not, or is no number.
    """
    if environment.get("JAXRL_LLM_DISTRIBUTED") == "0":
        return None
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        arguments: dict[str, str | int] = {"coordinator_address": environment["JAX_COORDINATOR_ADDRESS"]}
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            if not environment.get(variable, "").isdigit():
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS is set but {variable} is '{environment.get(variable, '')}': "
                    "give each process JAX_NUM_PROCESSES and its own JAX_PROCESS_ID, or unset JAX_COORDINATOR_ADDRESS"
                )
            arguments[name] = int(environment[variable])
        return arguments
    tasks = max(int(environment.get(name) or 1) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several_workers = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS"))
    asked = environment.get("JAXRL_LLM_DISTRIBUTED") == "1"
    return {} if tasks > 1 or several_workers or asked else None


def heartbeat_seconds(environment: Mapping[str, str]) -> int:
    """After how many seconds of silence a process of the job counts as gone, and the others end: JAXRL_LLM_HEARTBEAT_S, else 100.

    Raises:
      UserError: it is no whole number of seconds above 0.
    """
    given = environment.get("JAXRL_LLM_HEARTBEAT_S", "100")
    if not given.isdecimal() or not int(given):
        raise UserError(f"JAXRL_LLM_HEARTBEAT_S is '{given}': give whole seconds, at least 1, or unset it for 100")
    return int(given)


def maybe_initialize(timeout_s: int = 300) -> None:
    """Joins this process to its job where the environment says that there are several; must run before any other JAX call.

    From then on a process that hears nothing of another one for `heartbeat_seconds` ends, and so does one whose coordinator is gone.

    Raises:
      UserError: the environment is incomplete, or not all processes came within `timeout_s` seconds.
    """
    arguments = distributed_arguments(os.environ)
    if arguments is None:
        return
    heartbeat = heartbeat_seconds(os.environ)
    # Before JAX is imported: what is registered first runs last, and JAX's own end of the job, behind it, may abort.
    _leave_a_witness(heartbeat)
    import jax

    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout_s, heartbeat_timeout_seconds=heartbeat)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"could not join the other processes within {timeout_s} s ({reason}): start the same command on every host, "
            "or set JAXRL_LLM_DISTRIBUTED=0 to run on this one alone"
        ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} devices",
        file=sys.stderr,
        flush=True,
    )


def _leave_a_witness(heartbeat: int) -> None:
    """A shell that waits for this process to end and says a clear line if it did not end by itself.

    XLA aborts a process whose job has lost another one from a thread of its own, where no Python runs; its message is long and names
    neither the run nor what to do.
    """
    line = (
        f"jaxrl-llm: this process was ended from outside: another process of the job is gone (unheard for {heartbeat} s, "
        "JAXRL_LLM_HEARTBEAT_S; its own log says why), or this one was killed. "
        "The same command on every host goes on from the newest checkpoint"
    )
    with contextlib.suppress(OSError):
        # In a session of its own, where Ctrl-C and signals to the job's group do not reach it.
        watch = ["sh", "-c", 'read word || echo "$0" >&2', line]
        witness = subprocess.Popen(watch, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        assert witness.stdin is not None
        atexit.register(_dismiss, witness)


def _dismiss(witness: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        witness.communicate(b"ended\n")


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]


def parse_mesh(text: str) -> Any:
    """The device mesh of a config's text: "" is None (one device; that others are idle is said), "fsdp=4,tensor=2" a mesh over all devices.

    Raises:
      UserError: the text is not AXIS=NUMBER entries, or names no mesh and the job has several processes, each of which would train a model of its
        own. models.errors.ModelError: an unknown axis, or not that many devices.
    """
    if not text.strip():
        import jax
        from absl import logging

        if jax.process_count() > 1:
            raise UserError(
                f"mesh is empty, which is one device, and this job has {jax.process_count()} processes: say how their {jax.device_count()} "
                "devices are used, such as --config.mesh=fsdp=-1 (all share the parameters), or start it on one host alone"
            )
        if jax.device_count() > 1:
            logging.warning("mesh is empty: one of %d devices is used; --config.mesh=fsdp=-1 uses all", jax.device_count())
        return None
    from models.sharding import make_mesh

    return make_mesh(parse_axes(text))


def parse_axes(text: str) -> dict[str, int]:
    """The axes of a config's text: "fsdp=4,tensor=2" -> {"fsdp": 4, "tensor": 2}; raises UserError for anything else."""
    shape = {}
    for entry in text.split(","):
        name, _, size = entry.partition("=")
        if not size.strip().removeprefix("-").isdigit():
            raise UserError(f"mesh '{text}': '{entry}' is not AXIS=NUMBER, such as fsdp=4")
        shape[name.strip()] = int(size)
    return shape
