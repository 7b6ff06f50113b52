"""A room of the sandbox as a program: launcher, keeper, supervisors and the checks' processes (see __init__.py).

Started by room.py, by path, as `python -S -s -P -B worker.py '{"isolated": true, "packages": [...], "preload": [...]}'` with an empty
environment; requests come on standard input, replies go to standard output, each as two lengths of 4 bytes, a JSON header and a body.
The request's header holds the limits, its body what runner.py reads; the reply's header says how the check ended, its body is what the
check sent. `worker.py probe` prints what this host allows instead.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time

# Run by path and without site-packages: what is ours lies three folders up, and is on the path for these imports only.
sys.path.insert(0, os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "..")))
from jaxrl_llm.rewards.sandbox import jail, kernel, runner, syscall_filter

del sys.path[0]

HEADER = struct.Struct(">II")
NONCE = 16
PIECE = 1 << 16
LAST_WORDS_MS = 200  # between the end of the result and the end of the process, to tell a crash from a closed pipe
REQUESTS, REPLIES = 3, 4  # descriptors of the keeper and the supervisors
RESULT = 3  # descriptor of a check's process


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


def send(descriptor: int, header: dict, body: bytes = b"") -> None:
    """One frame."""
    text = json.dumps(header).encode()
    view = memoryview(HEADER.pack(len(text), len(body)) + text + body)
    while view:
        view = view[os.write(descriptor, view) :]


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
    """The keeper: forks a supervisor for each request and waits for it. It never reads a request itself, so that no check inherits
    another's data, and it runs nothing that came from outside."""
    isolated = options["isolated"]
    try:
        if isolated:
            jail.build_view(options["packages"])
            jail.become_nobody(keep_capabilities=True)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        landlock = kernel.landlock_version() if sys.platform == "linux" else 0
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
        supervisor = os.fork()
        if supervisor == 0:
            code = 1
            try:
                supervise(isolated, filters, landlock)
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(supervisor, 0)[1]:
            return 1  # the reply may be half sent; the pool starts another room
    return 0


def prepare_interpreter(options: dict) -> None:
    """Imports what checks use, and leaves nothing of the room's own start in what they inherit."""
    for name in options["preload"]:
        with contextlib.suppress(ImportError):
            __import__(name)
    sys.path.extend(options["packages"])
    sys.argv[:] = [""]
    sys.orig_argv[:] = []
    os.environ.clear()
    os.environ.update(LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared


def supervise(isolated: bool, filters: dict[bool, bytes], landlock: int) -> None:
    """Reads one request, runs it in a process of its own and sends the reply."""
    header, body = HEADER.unpack(read_exactly(REQUESTS, HEADER.size))
    limits = json.loads(read_exactly(REQUESTS, header))
    payload = read_exactly(REQUESTS, body)
    if isolated:
        try:
            jail.enter_check(limits["disk_mb"])
        except OSError as error:  # the host's limit on namespaces, or its memory: the next request may find more
            return send(REPLIES, {"ended": "failed", "why": told(error), "output": "", "cut": False})
        reply = run_check(limits, payload, jail.OWN, True, filters, landlock)
    else:
        if sys.platform == "linux":
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        folder = tempfile.mkdtemp(prefix="check-")
        try:
            reply = run_check(limits, payload, folder, False, filters, landlock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    send(REPLIES, *reply)


def run_check(limits: dict, payload: bytes, folder: str, isolated: bool, filters: dict, landlock: int) -> tuple[dict, bytes]:
    """Forks the check's process and watches it: (how it ended, what it sent)."""
    nonce = os.urandom(NONCE)
    from_result, to_parent = os.pipe()
    from_output, printed = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            become_check(to_parent, printed, folder)
            try:
                jail.confine(limits, isolated, folder, filters, landlock)
            except OSError as error:
                os.write(RESULT, runner.framed(nonce, json.dumps({"error": f"the sandbox cannot be closed: {told(error)}"}).encode()))
                os._exit(0)
            runner.run(payload, nonce, RESULT)
        finally:
            os._exit(1)
    os.close(to_parent)
    os.close(printed)
    watch = Watch(from_result, from_output, nonce, limits["result_kb"] << 10, limits["output_kb"] << 10)
    ended = watch.until(time.monotonic() + limits["wall_s"])
    status, usage = kill_tree(child, isolated, ended == "closed")
    watch.drain()
    return reply_of(ended, watch, status, usage.ru_utime + usage.ru_stime, limits)


def become_check(result: int, printed: int, folder: str) -> None:
    """Descriptors 0 to 3 and no others, a session of its own, the own folder as working, home and temporary folder."""
    os.setsid()
    os.dup2(result, RESULT + 100)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.dup2(RESULT + 100, RESULT)
    os.closerange(RESULT + 1, 1 << 16)
    os.chdir(folder)
    os.umask(0o077)
    os.environ.update(HOME=folder, TMPDIR=folder)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)


class Watch:
    """Collects what a check sends and prints, within bounds. What is printed beyond `most_output` bytes is dropped."""

    def __init__(self, result: int, output: int, nonce: bytes, most_result: int, most_output: int):
        self.from_result, self.from_output, self.nonce = result, output, nonce
        self.most_result, self.most_output = most_result, most_output
        self.sent, self.printed, self.cut = bytearray(), bytearray(), False

    def until(self, deadline: float) -> str:
        """Waits for one whole frame ("sent"), or the end of the pipe without one ("closed"), or bytes that are no frame ("forged"), or a
        frame that is too long ("large"), or the deadline ("late")."""
        poll = select.poll()
        for descriptor in (self.from_result, self.from_output):
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(left * 1000 + 1):
                piece = os.read(descriptor, PIECE)
                if descriptor == self.from_output:
                    self.keep(piece)
                    if not piece:
                        poll.unregister(descriptor)
                    continue
                self.sent += piece
                state = self.state() or ("" if piece else "closed")
                if state:
                    return state
        return "late"

    def state(self) -> str:
        """What the bytes so far amount to; "" where the frame is not whole yet."""
        if not self.nonce.startswith(self.sent[:NONCE]):
            return "forged"
        if len(self.sent) < NONCE + 4:
            return ""
        length = int.from_bytes(self.sent[NONCE : NONCE + 4], "big")
        if length > self.most_result:
            return "large"
        return "sent" if len(self.sent) >= NONCE + 4 + length else ""

    def frame(self) -> bytes:
        """The body of the whole frame."""
        length = int.from_bytes(self.sent[NONCE : NONCE + 4], "big")
        return bytes(self.sent[NONCE + 4 : NONCE + 4 + length])

    def keep(self, piece: bytes) -> None:
        """Keeps as much of what was printed as there is room for."""
        room = self.most_output - len(self.printed)
        self.printed += piece[:room]
        self.cut = self.cut or len(piece) > room

    def drain(self) -> None:
        """What was printed before the process ended and still lies in the pipe; a pipe holds a bounded number of bytes."""
        with contextlib.suppress(BlockingIOError):
            while not self.cut and (piece := os.read(self.from_output, PIECE)):
                self.keep(piece)


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


def reply_of(ended: str, watch: Watch, status: int, cpu: float, limits: dict) -> tuple[dict, bytes]:
    """The reply: its header's `ended` is "sent", or why there is no result."""
    code = os.waitstatus_to_exitcode(status)
    if ended == "closed":
        ended = "cpu" if code == -signal.SIGKILL and cpu >= limits["cpu_s"] - 0.1 else "died"
    header = {"ended": ended, "code": code, "output": watch.printed.decode("utf-8", "replace"), "cut": watch.cut, "cpu_s": round(cpu, 3)}
    return header, watch.frame() if ended == "sent" else b""


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
