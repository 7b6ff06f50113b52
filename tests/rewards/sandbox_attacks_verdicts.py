"""Attacks on the sandbox: forged verdicts, Python's own doors, things left in the kernel. sandbox_attacks.py says what an attack is."""

from tests.rewards.sandbox_attacks import attack

# --- verdicts that are not the function's ---


@attack(ends="value: False")
def forge_by_printing(host):
    import os
    import sys

    for text in ('{"value": true}\n', "True\n", "PASS\n"):
        print(text)
        sys.stderr.write(text)
        os.write(1, text.encode())
    return False


@attack(ends="error: the code wrote to the pipe")
def forge_by_writing_everywhere(host):
    import contextlib
    import os

    answer = b'{"value": true}'
    for number in range(64):
        for text in (answer, len(answer).to_bytes(4, "big") + answer, bytes(16) + len(answer).to_bytes(4, "big") + answer):
            with contextlib.suppress(OSError):
                os.write(number, text)
    return False


@attack(ends="error: the process ended")
def close_every_descriptor(host):
    import os

    os.closerange(0, 64)
    return True


@attack(ends="error: the process ended")
def put_another_pipe_in_place_of_the_result(host):
    import os

    read, write = os.pipe()
    for number in range(16):
        if number not in (read, write):
            os.dup2(write, number)
    return True


@attack(ends="value: False")
def forge_by_changing_json(host):
    import json

    json.dumps = json.encoder.JSONEncoder.encode = json.encoder.encode_basestring = lambda *_, **__: '{"value": true}'
    return False


@attack(ends="value: False|error")
def forge_by_changing_builtins(host):
    import builtins

    builtins.bool = builtins.isinstance = builtins.len = lambda *_: True
    return False


@attack(ends="value: False|error: (KeyError|ImportError|ModuleNotFoundError)")
def forge_by_changing_the_runner(host):
    import sys

    for name, module in list(sys.modules.items()):
        if "sandbox" in name or name == "__main__":
            for key in ("answer", "framed", "call", "describe"):
                setattr(module, key, lambda *_, **__: b'{"value": true}')
    return False


@attack(ends="value: False")
def forge_at_the_exit(host):
    import atexit
    import os

    atexit.register(lambda: [os.write(number, b'{"value": true}') for number in range(8)])
    return False


@attack(ends="error: the process ended without a result .exit code 0")
def leave_by_the_back_door(host):
    import os

    os._exit(0)


@attack(ends="error: SystemExit")
def leave_by_the_front_door(host):
    import sys

    sys.exit(True)


@attack(ends="error: the process ended without a result .signal 11")
def crash(host):
    import ctypes

    ctypes.string_at(0)
    return True


@attack(ends="error: (the process ended|KeyboardInterrupt)|timeout")
def abort(host):
    import os

    os.abort()


@attack(ends="error: Liar")
def raise_what_cannot_be_read(host):
    class Liar(BaseException):
        def __str__(self):
            raise self

    raise Liar


@attack(ends="error: TypeError")
def return_what_only_looks_true(host):
    class Truth:
        __class__ = bool

        def __bool__(self):
            raise SystemExit(0)

        def __eq__(self, other):
            return True

    return Truth()


@attack(ends="error: (ValueError|the result is not JSON)")
def return_what_is_no_number(host):
    return float("nan")


# --- Python's own doors ---


@attack(ends="error: ModuleNotFoundError")
def import_the_project(host):
    import sys

    sys.path.insert(0, host["repo"])
    import jaxrl_llm

    return jaxrl_llm is not None


@attack(ends="error: ModuleNotFoundError")
def import_what_the_caller_has_installed(host):
    import numpy

    return numpy is not None


@attack(ends="value: False", outside=True)
def run_a_command_by_unpickling(host):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    try:
        return pickle.loads(pickle.dumps(Evil())) == 0
    except pickle.PicklingError:
        return pickle.loads(b"cposix\nsystem\n(Vtrue\ntR.") == 0


@attack(ends="value: False")
def find_another_s_data_in_memory(host):
    import gc
    import sys

    needle = "of the row before"

    def inside(thing):
        return isinstance(thing, str) and needle in thing and thing != needle

    for thing in gc.get_objects():
        try:
            parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple, set)) else ()
            if any(inside(part) for part in parts if part is not needle and "inside(thing)" not in str(part)[:9000]):
                return True
        except Exception:
            pass
    frame = sys._getframe()
    while frame:
        if any(inside(value) for name, value in frame.f_locals.items() if name not in ("code", "needle")):
            return True
        frame = frame.f_back
    return False


# --- things left in the kernel ---


@attack(ends="error: (FileNotFoundError|OSError|PermissionError|ModuleNotFoundError)")
def leave_shared_memory(host):
    from multiprocessing import shared_memory

    shared_memory.SharedMemory("sandboxattack", create=True, size=4096)
    return True


@attack(ends="error|value: False")
def leave_a_semaphore(host):
    import multiprocessing

    multiprocessing.get_context("fork").Semaphore()
    return True


@attack()
def leave_shared_memory_of_the_old_kind(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return libc.shmget(0x5A5A, 4096, 0o1666) >= 0 or libc.semget(0x5A5A, 1, 0o1666) >= 0 or libc.msgget(0x5A5A, 0o1666) >= 0


@attack()
def leave_a_message_queue(host):
    import ctypes

    return ctypes.CDLL(None).syscall(240, b"sandboxattack", 0o102, 0o600, None) >= 0


@attack(ends="value: False", outside=True)
def watch_folders_of_others(host):
    import ctypes

    return ctypes.CDLL(None).inotify_init() >= 0


@attack()
def load_a_program_into_the_kernel(host):
    import ctypes

    libc = ctypes.CDLL(None)
    return libc.syscall(321, 0, ctypes.create_string_buffer(128), 128) >= 0 or libc.syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0) >= 0


@attack()
def set_the_clock_and_the_name(host):
    import socket
    import time

    done = []
    for change in (lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()), lambda: socket.sethostname("sandboxattack")):
        try:
            change()
            done.append(change)
        except OSError:
            pass
    return done != []


@attack(ends="error: the process ended without a result .signal 31|value: False")
def call_the_kernel_in_another_numbering(host):
    import ctypes
    import os

    if os.uname().machine != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0) >= 0


@attack(ends="error: the process ended without a result .signal 31|value: False")
def call_the_kernel_as_a_32_bit_program(host):
    import ctypes
    import mmap
    import os

    if os.uname().machine != "x86_64":
        return False
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret: getpid of the old numbering
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return call() > 0
