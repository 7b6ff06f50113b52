"""A room of the sandbox as a program: launcher, keeper and the checks' processes (see __init__.py).

Started by room.py, by path, as `python -S -s -P -B worker.py '{"isolated": true, "packages": [...], "preload": [...]}'` with an empty
environment; requests come on standard input, replies go to standard output, each as two lengths of 4 bytes, a JSON header and a body.
The request's header holds the limits, its body what runner.py reads; the reply's header says how the check ended, its body is what the
check sent ("result" bytes of it) and then what it printed. `worker.py probe` prints what this host allows instead.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator

# Run by path and without site-packages: what is ours lies three folders up, and is on the path for these imports only.
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))
from jaxrl_llm.rewards.sandbox import jail, kernel, runner, syscall_filter

del sys.path[0]

HEADER = struct.Struct(">II")
NONCE, LENGTH = 16, 4
PIECE = 1 << 16
LAST_WORDS_MS = 200  # between the end of the result and the end of the process, to tell a crash from a closed pipe
REQUESTS, REPLIES = 3, 4  # the keeper's descriptors
RESULT, RULES = 3, 4  # those of a check's process beside the standard ones; the second is closed before the code runs
READ = b"r"  # what a check's process sends first: it has read its request, and its time begins


def read_exactly(descriptor: int, size: int) -> bytes:
    """`size` bytes; EOFError where the other end closes before."""
    pieces = []
    while size:
        piece = os.read(descriptor, min(size, PIECE))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def send(descriptor: int, header: dict, *body: memoryview) -> None:
    """One frame."""
    text = json.dumps(header).encode()
    for view in (memoryview(HEADER.pack(len(text), sum(map(len, body))) + text), *body):
        while view:
            view = view[os.write(descriptor, view) :]


def unshared(size: int) -> mmap.mmap:
    """`size` bytes of memory that no child inherits, and that are given back whole."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


def told(error: OSError) -> str:
    """The call that was refused and why, without the number; the file where there is one."""
    text = error.strerror or str(error) or "refused"
    return f"{text}: {error.filename}" if error.filename else text


def launch(options: dict) -> int:
    """The outermost process: makes the namespaces, starts the keeper in them, and waits for it."""
    os.dup2(0, REQUESTS)
    os.dup2(1, REPLIES)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(REPLIES + 1, 1 << 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # Python's handler for SIGINT would let a check signal process 1 of the room
    if not options["isolated"]:
        return keep(options)
    try:
        jail.enter_namespaces()
        keeper = os.fork()
        if keeper == 0:
            os._exit(keep(options))
        jail.become_nobody(keep_capabilities=False)
    except OSError as error:
        send(REPLIES, {"fatal": told(error)})
        return 1
    os.close(REQUESTS)
    os.close(REPLIES)
    os.waitpid(keeper, 0)
    return 0


def keep(options: dict) -> int:
    """The keeper: forks a process for each request, watches it and tells how it ended. It runs nothing that came from outside. The request it
    never reads, and what a check sends and prints only passes through memory that no child inherits."""
    isolated, home = options["isolated"], -1
    try:
        if isolated:
            home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)  # the view has no /proc
            jail.build_view(options["packages"])
            jail.become_nobody(keep_capabilities=True)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        landlock = 0
        if sys.platform == "linux":
            with contextlib.nullcontext() if isolated else contextlib.suppress(OSError):
                kernel.drop_future_powers()
            landlock = kernel.landlock_version()
        allowed = sys.platform == "linux" and syscall_filter.supported()
        filters = {leave: syscall_filter.build(leave) for leave in (False, True)} if allowed else {}
    except OSError as error:
        send(REPLIES, {"fatal": told(error)})
        return 1
    prepare_interpreter(options)
    send(REPLIES, {"ready": True})
    poll = select.poll()
    poll.register(REQUESTS, select.POLLIN)
    while any(event & select.POLLIN for _, event in poll.poll()):
        header, body = HEADER.unpack(read_exactly(REQUESTS, HEADER.size))
        limits = json.loads(read_exactly(REQUESTS, header))
        if isolated:
            try:
                jail.open_check(limits["disk_mb"], home)
            except OSError as error:  # the host's limit on namespaces, or its memory: another room may find more
                send(REPLIES, {"ended": "failed", "why": told(error), "cut": False})
                return 1  # with the request unread
            send(REPLIES, *run_check(limits, body, jail.OWN, True, filters, landlock))
            jail.close_check()
            continue
        with own_folder() as folder:
            reply = run_check(limits, body, folder, False, filters, landlock)
        send(REPLIES, *reply)  # when nothing of the check is left
    return 0


@contextlib.contextmanager
def own_folder() -> Iterator[str]:
    """A folder of the host for one check, where a room is not closed."""
    import shutil  # here, since rooms that are closed do not need them
    import tempfile

    tempfile.tempdir = None
    os.environ.pop("TMPDIR", None)
    folder = tempfile.mkdtemp(prefix="check-")
    tempfile.tempdir = folder
    os.environ.update(HOME=folder, TMPDIR=folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare_interpreter(options: dict) -> None:
    """Imports what checks use, and leaves nothing of the room's own start in what they inherit."""
    register, os.register_at_fork = os.register_at_fork, lambda **_: None  # random would draw a new seed in every check
    for name in options["preload"]:
        with contextlib.suppress(ImportError):
            __import__(name)
    os.register_at_fork = register
    if "random" in sys.modules:
        sys.modules["random"].seed(0)  # the same verdict in every room
    for name in [name for name in sys.modules if name.startswith("jaxrl_llm")]:
        del sys.modules[name]
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    sys.path.extend(options["packages"])
    sys.argv[:] = [""]
    sys.orig_argv[:] = []
    os.environ.clear()
    os.environ.update(LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HOME=jail.OWN, TMPDIR=jail.OWN)
    os.umask(0o077)
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared


def run_check(limits: dict, size: int, folder: str, isolated: bool, filters: dict, landlock: int) -> tuple[dict, memoryview, memoryview]:
    """Forks the check's process, which reads its request of `size` bytes, watches it, ends it and returns the reply. Raises EOFError where it
    ended before the request was read."""
    nonce = os.urandom(NONCE)
    rules = kernel.file_rules(landlock, "/", "/dev", folder) if landlock else None
    from_result, to_parent = os.pipe()
    from_output, printed = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            payload = read_exactly(REQUESTS, size)
            become_check(to_parent, printed, rules, folder)
            os.write(RESULT, READ)
            try:
                jail.confine(limits, isolated, filters, None if rules is None else RULES)
            except OSError as error:
                os.write(RESULT, runner.framed(nonce, json.dumps({"error": f"the sandbox cannot be closed: {told(error)}"}).encode()))
                os._exit(0)
            runner.run(payload, nonce, RESULT)
        finally:
            os._exit(1)
    for descriptor in (to_parent, printed) if rules is None else (to_parent, printed, rules):
        os.close(descriptor)
    try:
        read_exactly(from_result, len(READ))
        watch = Watch(from_result, from_output, nonce, limits["result_kb"] << 10, limits["output_kb"] << 10)
        ended = watch.until(time.monotonic() + limits["wall_s"])
        status, usage = kill_tree(child, isolated, ended == "closed")
        watch.drain()
        header, body = reply_of(ended, watch, status, usage.ru_utime + usage.ru_stime, limits)
        return header, *body
    finally:
        os.close(from_result)
        os.close(from_output)


def become_check(result: int, printed: int, rules: int | None, folder: str) -> None:
    """Descriptors 0 to 4 and no others, a session of its own, the own folder as working, home and temporary folder."""
    os.setsid()
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    above = 1 << 8
    os.dup2(result, above)
    os.dup2(above if rules is None else rules, above + 1)
    os.dup2(above, RESULT)
    os.dup2(above + 1, RULES)
    os.closerange(RESULT + 1 if rules is None else RULES + 1, 1 << 16)
    os.chdir(folder)


class Watch:
    """Collects what a check sends and prints, within bounds. What is printed beyond `most_output` bytes is dropped."""

    def __init__(self, result: int, output: int, nonce: bytes, most_result: int, most_output: int):
        self.from_result, self.from_output, self.nonce = result, output, nonce
        self.most_result, self.most_output = most_result, most_output
        self.sent, self.printed, self.cut = 0, 0, False  # the first two in bytes
        frame = NONCE + LENGTH + most_result
        memory = memoryview(unshared(frame + most_output + PIECE))
        self.result, self.output, self.spare = memory[:frame], memory[frame : frame + most_output], memory[frame + most_output :]

    def until(self, deadline: float) -> str:
        """Waits for one whole frame ("sent"), or the end of the pipe without one ("closed"), or bytes that are no frame ("forged"), or a
        frame that is too long ("large"), or the deadline ("late")."""
        poll = select.poll()
        for descriptor in (self.from_result, self.from_output):
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000 + 1):
                if descriptor == self.from_output:
                    if not self.keep():
                        poll.unregister(descriptor)
                    continue
                size = os.readv(self.from_result, [self.result[self.sent :]])
                self.sent += size
                state = self.state() or ("" if size else "closed")
                if state:
                    return state
        return "late"

    def state(self) -> str:
        """What the bytes so far amount to; "" where the frame is not whole yet."""
        if self.result[: min(self.sent, NONCE)] != self.nonce[: self.sent]:
            return "forged"
        if self.sent < NONCE + LENGTH:
            return ""
        length = self.length()
        if length > self.most_result:
            return "large"
        return "sent" if self.sent >= NONCE + LENGTH + length else ""

    def length(self) -> int:
        """Bytes of the frame's body."""
        return int.from_bytes(self.result[NONCE : NONCE + LENGTH], "big")

    def keep(self) -> int:
        """Reads what was printed and keeps as much as there is room for: the bytes read, 0 at the end."""
        size = os.readv(self.from_output, [self.output[self.printed :], self.spare])
        self.cut = self.cut or self.printed + size > self.most_output
        self.printed = min(self.printed + size, self.most_output)
        return size

    def drain(self) -> None:
        """What was printed before the process ended and still lies in the pipe; a pipe holds a bounded number of bytes."""
        with contextlib.suppress(BlockingIOError):
            while not self.cut and self.keep():
                pass


def kill_tree(child: int, isolated: bool, wait: bool):
    """Ends the check's process and all that it started, and collects it: (wait status, resource usage)."""
    deadline = time.monotonic() + LAST_WORDS_MS / 1000
    while wait and time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        time.sleep(0.0005)
    if isolated:
        os.kill(child, signal.SIGKILL)  # process 1 of its namespace: the kernel ends the others before it can be collected
    else:
        os.killpg(child, signal.SIGKILL)  # without namespaces the group is what there is; the filter, where there is one, forbids forks
    _, status, usage = os.wait4(child, 0)
    return status, usage


def reply_of(ended: str, watch: Watch, status: int, cpu: float, limits: dict) -> tuple[dict, tuple[memoryview, memoryview]]:
    """The reply, header and body: the header's "ended" is "sent", or why there is no result."""
    code = os.waitstatus_to_exitcode(status)
    if ended == "closed":
        ended = "cpu" if code == -signal.SIGKILL and cpu >= limits["cpu_s"] - 0.1 else "died"
    length = watch.length() if ended == "sent" else 0
    header = {"ended": ended, "code": code, "cut": watch.cut, "cpu_s": round(cpu, 3), "result": length}
    return header, (watch.result[NONCE + LENGTH : NONCE + LENGTH + length], watch.output[: watch.printed])


def probe() -> dict[str, str]:
    """What this host allows: layer -> "" where it works, else why not. Each is tried in a process of its own."""
    found = {}
    user = kernel.CLONE_NEWUSER
    attempts = {
        "user namespace": lambda: kernel.unshare(user),
        "mount namespace": _try_mounts,
        "pid namespace": lambda: kernel.unshare(user | kernel.CLONE_NEWPID),
        "network namespace": lambda: kernel.unshare(user | kernel.CLONE_NEWNET),
        "ipc namespace": lambda: kernel.unshare(user | kernel.CLONE_NEWIPC),
        "no new privileges": lambda: kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1),
        "seccomp": _try_filter,
        "landlock": _try_landlock,
    }
    for name, attempt in attempts.items():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                attempt()
                os.write(write, b"works")
            except OSError as error:
                os.write(write, told(error).encode())
            finally:
                os._exit(0)
        os.close(write)
        said = os.read(read, PIECE).decode() or "the attempt ended its process"
        found[name] = "" if said == "works" else said
        os.close(read)
        os.waitpid(child, 0)
    return found


def _try_mounts() -> None:
    """Some hosts let users make namespaces and refuse what they are for."""
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.make_read_only("/")  # in this namespace, which ends with this process


def _try_filter() -> None:
    if not syscall_filter.supported():
        raise OSError("no filter is written for this machine")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    syscall_filter.install(syscall_filter.build(False), kernel.libc)


def _try_landlock() -> None:
    if not kernel.landlock_version():
        raise OSError("the kernel has none")


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        print(json.dumps(probe()))
    else:
        sys.exit(launch(json.loads(sys.argv[1])))
