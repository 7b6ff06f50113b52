"""The compilation cache and the joining of processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm import runtime
from jaxrl_llm.errors import UserError

CACHED = """
import sys
from jaxrl_llm import runtime
runtime.use_compilation_cache()
import jax, jax.numpy as jnp
from jax._src import monitoring
events = []
monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: jnp.sin(x) @ x.T + 3)(jnp.ones((40, 30))).block_until_ready()
hits = sum(event == '/jax/compilation_cache/cache_hits' for event in events)
misses = sum(event == '/jax/compilation_cache/cache_misses' for event in events)
print(hits, misses)
"""


def test_a_second_process_takes_its_programs_from_the_cache(run_python, tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_COMPILATION_CACHE_DIR": ""}
    hits, misses = map(int, run_python(CACHED, env=env).split())
    folders = list((tmp_path / "jaxrl_llm").iterdir())
    files = {path.name for path in folders[0].iterdir()}
    assert hits == 0 and misses > 0 and len(folders) == 1 and files
    hits, second_misses = map(int, run_python(CACHED, env=env).split())
    assert hits == misses and second_misses == 0
    assert {path.name for path in folders[0].iterdir() if not path.name.endswith("-atime")} >= {
        name for name in files if not name.endswith("-atime")
    }


def test_cache_folder_of_the_environment_wins_and_it_can_be_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # the settings then go to the environment, as before the first import
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    assert runtime.use_compilation_cache() == tmp_path / "mine" and (tmp_path / "mine").is_dir()
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    assert runtime.use_compilation_cache() is None


def test_an_impossible_cache_folder_is_only_a_note(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert runtime.use_compilation_cache() is None
    assert "no compilation cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, {}),
        ({"JAXRL_LLM_DISTRIBUTED": "1"}, {}),
        ({"JAXRL_LLM_DISTRIBUTED": "0", "SLURM_STEP_NUM_TASKS": "4"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_how_a_job_is_recognised(environment, expected):
    assert runtime.distributed_arguments(environment) == expected


def test_an_incomplete_job_says_what_is_missing():
    with pytest.raises(UserError, match="JAX_PROCESS_ID is ''"):
        runtime.distributed_arguments({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES is 'two'"):
        runtime.distributed_arguments({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"})


def test_the_heartbeat_is_a_number_of_seconds():
    assert runtime.heartbeat_seconds({}) == 100 and runtime.heartbeat_seconds({"JAXRL_LLM_HEARTBEAT_S": "7"}) == 7
    for wrong in ("0", "-3", "soon", ""):
        with pytest.raises(UserError, match=f"JAXRL_LLM_HEARTBEAT_S is '{wrong}': give whole seconds"):
            runtime.heartbeat_seconds({"JAXRL_LLM_HEARTBEAT_S": wrong})


JOINED = """
import sys
from jaxrl_llm import cli, runtime
from jaxrl_llm.run_dir import RunDir
runtime.maybe_initialize(60)
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jaxrl_llm.commands.doctor import collective_sum
assert collective_sum() == 10, collective_sum()
mesh = jax.make_mesh((4,), ('data',), (jax.sharding.AxisType.Auto,))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
mine = np.arange(4.0, dtype=np.float32) + 10 * jax.process_index()
whole = jax.make_array_from_process_local_data(rows, mine)
assert float(jax.jit(jnp.sum)(whole)) == 6 + 46
rewards = multihost_utils.process_allgather(np.float32(jax.process_index() + 1))
assert rewards.tolist() == [1.0, 2.0], rewards
run = RunDir(sys.argv[1], {'steps': 1}, kind='test')
run.log({'step': jax.process_index()})
multihost_utils.sync_global_devices('written')
assert run.metrics() == [{'step': 0}]
print('process', jax.process_index(), 'ok')
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_sum_gather_and_write_once(repo, tmp_path):
    base = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(repo),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, str(tmp_path / "run")],
            env={**base, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    for i, (process, (out, err)) in enumerate(zip(started, ended, strict=True)):
        assert process.returncode == 0, err[-3000:]
        assert f"process {i} ok" in out
        assert f"process {i} of 2: 2 of 4 devices" in err
        assert "is gone" not in err, "what is left to say that a process was ended is called off"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_mesh_of_a_config_text(run_python):
    assert runtime.parse_mesh("") is None
    with pytest.raises(UserError, match="'fsdp' is not AXIS=NUMBER"):
        runtime.parse_mesh("fsdp")
    code = "from jaxrl_llm.runtime import parse_mesh; print(dict(parse_mesh('fsdp=-1,tensor=2').shape))"
    assert "{'data': 1, 'fsdp': 4, 'expert': 1, 'tensor': 2}" in run_python(code, devices=8)


def test_an_empty_mesh_says_what_lies_idle_and_is_none_for_several_processes(monkeypatch, caplog):
    import jax

    assert runtime.parse_mesh("") is None and not caplog.messages
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert runtime.parse_mesh(" ") is None and caplog.messages == ["mesh is empty: one of 8 devices is used; --config.mesh=fsdp=-1 uses all"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="mesh is empty, which is one device, and this job has 2 processes: say how their 8 devices are used"):
        runtime.parse_mesh("")


def test_cache_name_tells_cpus_apart(monkeypatch):
    mine = runtime._cpu_features()
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : sse2\n")
    assert runtime._cpu_features() != mine and len(mine) == 8


def test_huge_pages_are_asked_for_once_by_a_restart(tmp_path):
    """Under the same process id, beside other tunables, only where the system gives them on request, and not twice."""

    def ran(setting, **environment):
        (tmp_path / "enabled").write_text(setting)
        code = f"""
import os, sys
from jaxrl_llm.runtime import use_huge_pages
open({str(tmp_path / "pids")!r}, "a").write(f"{{os.getpid()}} ")
use_huge_pages({str(tmp_path / "enabled")!r})
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""
        (tmp_path / "pids").write_text("")
        clean = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "JAXRL_LLM_HUGE_PAGES")}
        done = subprocess.run([sys.executable, "-c", code, "a b"], capture_output=True, text=True, check=True, env=clean | environment)
        return done.stdout.strip(), (tmp_path / "pids").read_text().split()

    on = "glibc.malloc.hugetlb=1"
    if (os.confstr("CS_GNU_LIBC_VERSION") or "") >= "glibc 2.35":
        output, pids = ran("always [madvise] never")
        assert output == f"{on} a b" and len(pids) == 2 and len(set(pids)) == 1
        other = "glibc.malloc.check=0"
        assert ran("always [madvise] never", GLIBC_TUNABLES=other)[0] == f"{other}:{on} a b"
    for setting in ("[always] madvise never", "always madvise [never]"):
        assert ran(setting)[0] == "None a b"
    assert ran("always [madvise] never", JAXRL_LLM_HUGE_PAGES="0")[0] == "None a b"
    assert ran("always [madvise] never", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[0] == "glibc.malloc.hugetlb=0 a b"
