"""Attacks on the sandbox: other processes, and the limits. sandbox_attacks.py says what an attack is."""

from tests.rewards.sandbox_attacks import attack

# --- other processes ---


@attack(outside=True)
def signal_the_parent(host):
    import os

    os.kill(host["pid"], 0)
    return True


@attack(ends="value: False")
def kill_every_number(host):
    import os
    import signal

    killed = 0
    for pid in [*range(1, 3000), host["pid"], host["victim"]]:
        if pid != os.getpid():
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except OSError:
                pass
    return killed > 0


@attack(ends="value: True|error: ProcessLookupError")
def kill_everybody(host):
    import os
    import signal

    os.kill(-1, signal.SIGKILL)
    return True


@attack(ends="value: 0|error")
def kill_the_parent_and_the_group(host):
    import os
    import signal

    os.kill(os.getppid(), signal.SIGTERM)
    os.killpg(0, signal.SIGTERM)
    return os.getppid()


@attack()
def trace_the_parent(host):
    import ctypes

    return ctypes.CDLL(None).ptrace(16, host["pid"], 0, 0) == 0


@attack(ends="value: False", outside=True)
def be_traced(host):
    import ctypes

    return ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0


@attack()
def read_another_s_memory_by_its_number(host):
    import ctypes

    buffer = ctypes.create_string_buffer(16)
    piece = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    return ctypes.CDLL(None).process_vm_readv(host["pid"], piece, 1, piece, 1, 0) >= 0


@attack()
def enter_the_parent_s_namespaces(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return libc.syscall(434, host["pid"], 0) >= 0 or libc.setns(0, 0) == 0


@attack(ends="value: False", outside=True)
def make_a_user_namespace(host):
    import ctypes

    return ctypes.CDLL(None).unshare(0x10000000) == 0


@attack()
def clone_into_new_namespaces(host):
    import ctypes
    import os

    pid = ctypes.CDLL(None).syscall(56 if os.uname().machine == "x86_64" else 220, 0x10000000 | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return pid > 0


@attack()
def clone_by_the_call_that_hides_its_flags(host):
    import ctypes
    import os
    import struct

    arguments = struct.pack("11Q", 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)
    pid = ctypes.CDLL(None).syscall(435, arguments, len(arguments))
    if pid == 0:
        os._exit(0)
    return pid > 0


@attack(outside=True)
def run_a_program(host):
    import subprocess

    return subprocess.run(["/bin/sh", "-c", "true"]).returncode == 0


@attack(outside=True)
def run_a_program_by_the_shell(host):
    import os

    return os.system("true") == 0


@attack()
def become_a_program_of_one_s_own(host):
    import os

    with open("program", "w") as file:
        file.write("#!/bin/sh\n")
    os.chmod("program", 0o4755)
    os.execv("program", ["program"])


@attack(ends="error: PermissionError")
def fork_bomb(host):
    import os

    while True:
        os.fork()


@attack(ends="error: (BlockingIOError|PermissionError)|timeout", processes=6)
def fork_bomb_where_forks_are_allowed(host):
    import os

    while True:
        os.fork()


@attack(ends="value: False", processes=6)
def more_processes_than_allowed(host):
    import os
    import time

    made = 0
    for _ in range(50):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            made += 1
        except OSError:
            break
    return made != 5  # with its own, six


@attack(ends="value: False|error: RuntimeError")
def thread_bomb(host):
    import threading
    import time

    for _ in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return True


@attack(ends="value: 'returned'", processes=6)
def leave_a_daemon(host):
    import contextlib
    import os
    import signal
    import time

    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                with contextlib.suppress(OSError):
                    signal.signal(number, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
    return "returned"


@attack(ends="value: 'returned'", processes=6)
def leave_zombies(host):
    import os

    for _ in range(4):
        if os.fork() == 0:
            os._exit(0)
    return "returned"


@attack(ends="value: 'returned'", processes=6)
def leave_a_thread(host):
    import threading
    import time

    threading.Thread(target=time.sleep, args=(600,)).start()
    return "returned"


# --- limits ---


@attack(ends="timeout: no result")
def sleep_for_ever(host):
    import time

    time.sleep(600)


@attack(ends="timeout: no result")
def sleep_and_ignore_all_signals(host):
    import contextlib
    import signal
    import time

    for number in range(1, 65):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    while True:
        time.sleep(600)


@attack(ends="timeout: (used up|no result)")
def spin_and_ignore_the_cpu_signal(host):
    import signal

    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass


@attack(ends="timeout: (no result|used up)|error: the process ended")
def stop_oneself(host):
    import os
    import signal
    import time

    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


@attack(ends="error: (ValueError|PermissionError)")
def raise_the_memory_limit(host):
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
    return True


@attack(ends="value: False")
def raise_any_limit(host):
    import resource

    raised = []
    for name in ("CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK"):
        number = getattr(resource, f"RLIMIT_{name}")
        try:
            resource.setrlimit(number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            raised.append(name)
        except (OSError, ValueError):
            pass
    return raised != []


@attack(ends="value: False")
def take_the_processor(host):
    import os

    taken = []
    for grab in (
        lambda: os.nice(-10),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, -10),
        lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    ):
        try:
            grab()
            taken.append(grab)
        except OSError:
            pass
    return taken != []


@attack(ends="timeout: memory ran out")
def memory_bomb(host):
    kept = []
    while True:
        kept.append(bytearray(1 << 20))


@attack(ends="timeout: memory ran out")
def memory_bomb_of_small_objects(host):
    kept = [None]
    while True:
        kept.append([kept[-1]])


@attack(ends="error: OSError|value: False|timeout: memory")
def memory_bomb_by_mapping(host):
    import mmap

    kept = [mmap.mmap(-1, 64 << 20) for _ in range(40)]
    return len(kept) == 40


@attack(ends="error: (PermissionError|AttributeError)")
def hide_memory_in_files_without_a_name(host):
    import os

    kept = [os.memfd_create("x") for _ in range(8)]
    return kept != []


@attack(ends="value: False")
def fill_the_disk(host):
    written = 0
    try:
        for i in range(40):
            with open(f"file{i}", "wb", buffering=0) as file:
                for _ in range(8):
                    written += file.write(bytes(1 << 20))
    except OSError:
        pass
    return written > 17 << 20


@attack(ends="error: (OSError|the process ended)|value: False")
def one_huge_file(host):
    with open("file", "wb", buffering=0) as file:
        file.seek(1 << 30)
        file.write(b"x")
    return True


@attack(ends="value: False")
def fill_the_table_of_files(host):
    made = 0
    try:
        for i in range(5000):
            open(f"file{i}", "w").close()
            made += 1
    except OSError:
        pass
    return made > 1000


@attack(ends="value: False")
def open_files_without_end(host):
    kept = []
    try:
        while len(kept) < 5000:
            kept.append(open("/dev/null"))  # noqa: SIM115
    except OSError:
        pass
    return len(kept) > 100


@attack(ends="timeout: (used up|no result)")
def regex_bomb(host):
    import re

    return re.match(r"(a|a)*b", "a" * 60) is None


@attack(ends="timeout")
def number_bomb(host):
    return len(str(7 ** (7 ** (7**7))))


@attack(ends="timeout: (memory|used up|no result)")
def infinite_iterator(host):
    import itertools

    return list(itertools.count())


@attack(ends="error: TypeError")
def infinite_generator(host):
    import itertools

    return itertools.count()


@attack(ends="error: RecursionError|error: the process ended|timeout")
def recursion_without_end(host):
    import sys

    sys.setrecursionlimit(1 << 30)

    def deeper(x):
        return [deeper(x), deeper(x)]

    return deeper(host)


@attack(ends="error: (RecursionError|the result|the process ended)")
def result_of_great_depth(host):
    import sys

    sys.setrecursionlimit(100_000)
    value = []
    for _ in range(20_000):
        value = [value]
    return value


@attack(ends="error: the result is longer")
def huge_result(host):
    return "x" * (5 << 20)


@attack(ends="value: False")
def huge_output(host):
    for _ in range(2000):
        print("x" * 1000)
    return False


@attack(ends="timeout: (used up|no result)")
def output_without_end(host):
    while True:
        print("x" * 10_000)


@attack(ends="error: (SyntaxError|MemoryError|RecursionError|ValueError|the process ended)|timeout")
def source_that_the_compiler_cannot_bear(host):
    return eval("(" * 50_000 + ")" * 50_000) or eval("-" * 1_000_000 + "1")
