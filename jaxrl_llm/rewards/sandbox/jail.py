"""A room's namespaces and what is to be seen in it, and how a check's process gives up its powers. Runs in the room only (worker.py).

The order matters: `enter_namespaces` in a process of the host, `build_view` in the first process of the new namespaces, the keeper, then for
each check `open_check` there, `confine` in the check's process, and `close_check` when that one has ended. Each raises OSError that names the
call that was refused.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
import sys

from jaxrl_llm.rewards.sandbox import kernel, syscall_filter

INSIDE = 1000  # the user and group number inside
NOBODY = 65534
UNUSED = 1_879_000_000  # outside: a number that no account has, where the host's own numbering reaches so far
OWN = "/box"  # the one folder that a check may write to
KEEPERS = 2  # processes of a room beside the check's: the launcher and the keeper
LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/lib32", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
OPEN_FILES = 64
INODES = 512


def enter_namespaces() -> None:
    """Moves this process into new namespaces; its next child is the first process there. Needs no rights where the host lets users make
    user namespaces. Run by root, root's number stays known inside until `become_nobody`, since what Python is made of may be root's."""
    outer = _outer_number() if os.geteuid() == 0 else None
    if outer is None:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(_all_namespaces())
        _write_maps("self", f"{INSIDE} {user} 1", f"{INSIDE} {group} 1")
        return
    os.setgroups([])
    ready, tell = os.pipe()
    helper = os.fork()  # a map of two numbers can only be written from outside
    if helper == 0:
        os.close(tell)
        try:
            if os.read(ready, 1):
                _write_maps(str(os.getppid()), f"0 0 1\n{INSIDE} {outer} 1", f"0 0 1\n{INSIDE} {outer} 1")
                os._exit(0)
        finally:
            os._exit(1)
    try:
        kernel.unshare(_all_namespaces())
        os.write(tell, b"1")
    finally:
        os.close(tell)
        os.close(ready)
        _, status = os.waitpid(helper, 0)
    if status:
        raise PermissionError("the map of user numbers of the new namespace cannot be written")


def _all_namespaces() -> int:
    return (
        kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    )


def _outer_number() -> int | None:
    """A number of no account that this process may turn into; None where it has none but its own (a container of one user)."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    for number in (UNUSED, NOBODY):
        if any(first <= number < first + length for first, _, length in ranges):
            return number
    return None


def _write_maps(process: str, users: str, groups: str) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", users), ("gid_map", groups)):
        descriptor = os.open(f"/proc/{process}/{name}", os.O_WRONLY)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def become_nobody(keep_capabilities: bool) -> None:
    """Takes the number INSIDE in place of root's; with keep_capabilities the powers over the room's own namespaces stay."""
    if os.getuid() != INSIDE:
        kernel.prctl(kernel.PR_SET_SECUREBITS, kernel.KEEP_CAPABILITIES if keep_capabilities else 0)
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no tracing, and no core dump that a program of the host would be started for


def build_view(packages: list[str]) -> None:
    """Replaces the root by a read-only one: Python's library, the system's shared libraries, `packages`, three devices and an empty OWN."""
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)  # nothing that follows reaches the host
    kernel.name_host("sandbox")
    library = os.path.dirname(os.__file__)
    compiled = os.path.join(sys.base_exec_prefix, sys.platlibdir, os.path.basename(library))
    wanted = dict.fromkeys([*LIBRARIES, library, compiled, *DEVICES, *packages])
    opened = {}  # opened first: the new root may be mounted over some of them
    links = {}
    for path in wanted:
        if os.path.islink(path) and path in LIBRARIES:
            links[path] = os.readlink(path)
        elif os.path.exists(path):
            opened[path] = os.open(path, os.O_PATH | os.O_CLOEXEC)
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    kernel.mount("sandbox", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"size=1m,nr_inodes={INODES},mode=755")
    os.umask(0o022)
    for path, descriptor in opened.items():
        _show(root, path, descriptor)
    for path, target in links.items():
        os.symlink(target, root + path)
    hidden = [os.path.join(folder, name) for folder in {library, compiled} for name in ("site-packages", "dist-packages")]
    for path in hidden:  # what happens to be installed there is not Python's library
        if os.path.isdir(root + path) and path not in packages:
            kernel.mount("sandbox", root + path, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY, "size=4k,mode=755")
    os.mkdir(root + OWN)
    if not os.path.lexists(root + "/tmp"):
        os.symlink(OWN, root + "/tmp")
    kernel.make_read_only(root)
    kernel.pivot_into(root)
    for descriptor in opened.values():
        os.close(descriptor)


def _show(root: str, path: str, descriptor: int) -> None:
    """Shows what is open as `descriptor` at `path` below the new root, unless a folder that holds it is shown already."""
    target = root + path
    if os.path.lexists(target):
        return
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o444))
    if path in DEVICES:
        kernel.mount(f"/proc/self/fd/{descriptor}", target, None, kernel.MS_BIND)
        kernel.make_read_only(target, devices=True)
    else:
        kernel.bind_read_only(descriptor, target)


def open_check(disk_mb: int, home: int) -> None:
    """In the keeper: its next child is process 1 of a pid namespace of its own, and OWN is an empty file system of `disk_mb` MiB.

    home: the keeper's own pid namespace, open; the kernel makes new ones only from there. The mount namespace and the ipc namespace are the
    room's: the filter refuses every call that could change the one or leave something in the other.
    """
    kernel.enter(home, kernel.CLONE_NEWPID)
    kernel.unshare(kernel.CLONE_NEWPID)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("box", OWN, "tmpfs", flags, f"size={disk_mb}m,nr_inodes={INODES},mode=700")


def close_check() -> None:
    """In the keeper, when the check and all that it started have ended: what is left of it goes."""
    kernel.unmount(OWN)


def set_limits(limits: dict, isolated: bool) -> None:
    """The kernel's own limits, hard and soft, so that they cannot be raised again."""
    mebi = 1 << 20
    wanted = {
        "RLIMIT_AS": limits["memory_mb"] * mebi,
        "RLIMIT_CPU": limits["cpu_s"],
        "RLIMIT_FSIZE": limits["file_mb"] * mebi,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    if isolated:  # elsewhere the number counts all processes of the user
        wanted["RLIMIT_NPROC"] = KEEPERS + limits["processes"]
    for name, value in wanted.items():
        number = getattr(resource, name, None)
        if number is None:
            continue
        try:
            resource.setrlimit(number, (value, value))
        except (OSError, ValueError):  # the host's own limit is lower, or macOS has none on memory
            if isolated:
                value = min(value, resource.getrlimit(number)[1])
                resource.setrlimit(number, (value, value))


def confine(limits: dict, isolated: bool, filters: dict[bool, bytes], rules: int | None) -> None:
    """In a check's process, last of all before the code runs: limits, no powers, Landlock, the filter.

    filters: the seccomp programs without and with leave to make processes; empty where this host has none, and then, as everywhere that
    a layer is not to be had, the user has said that it may be missing (isolated is False). rules: of Landlock, as a descriptor, which is closed.
    The keeper has given up what it could (`kernel.drop_future_powers`).
    """
    set_limits(limits, isolated)
    if sys.platform != "linux":
        return
    lenient = contextlib.nullcontext() if isolated else contextlib.suppress(OSError)
    with lenient:
        kernel.drop_capabilities()
    with lenient:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if rules is not None:
        with lenient:
            kernel.restrict_files(rules)
        os.close(rules)
    if filters:
        with lenient:
            syscall_filter.install(filters[isolated and limits["processes"] > 1], kernel.libc)
