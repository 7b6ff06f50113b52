"""The Linux system calls of the sandbox, through ctypes: namespaces, mounts, capabilities, Landlock.

Each function raises OSError that names the call. Numbers: the kernel's include/uapi (linux/sched.h, mount.h, prctl.h, capability.h,
landlock.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x04000000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 1, 4, 24, 28, 38, 39
KEEP_CAPABILITIES = 1 << 2  # SECBIT_NO_SETUID_FIXUP
NO_ROOT_POWERS = 0b101111  # root's number means nothing, and that is locked; PR_SET_KEEPCAPS is locked off
HIGHEST_CAPABILITY = 63
PIVOT_ROOT, CAPSET = {"x86_64": (155, 126), "aarch64": (41, 91)}.get(platform.machine(), (-1, -1))

libc = ctypes.CDLL(None, use_errno=True)
if hasattr(libc, "prctl"):
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Enters new namespaces."""
    _check(libc.unshare(flags), "unshare")


def enter(namespace: int, kind: int) -> None:
    """Enters the namespace of `kind` that is open as the descriptor `namespace`; for CLONE_NEWPID the next children do."""
    _check(libc.setns(namespace, kind), "setns")


def name_host(name: str) -> None:
    """Sets the host name of this namespace."""
    _check(libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "sethostname")


def prctl(option: int, value: int = 0) -> int:
    """prctl with one argument."""
    return _check(libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), os.fsencode(target), kind and kind.encode(), ctypes.c_ulong(flags), options.encode() or None)
    _check(libc.mount(*arguments), f"mount {kind or source} on {target}")


def unmount(target: str) -> None:
    """Takes the mount at `target` away; its files go once nobody has them open."""
    _check(libc.umount2(os.fsencode(target), MNT_DETACH), f"umount2 of {target}")


def bind_read_only(descriptor: int, target: str) -> None:
    """Shows the file or folder open as `descriptor` at `target` too, with what is mounted below, all read-only and without set-user-id."""
    mount(f"/proc/self/fd/{descriptor}", target, None, MS_BIND | MS_REC)
    make_read_only(target, AT_RECURSIVE)


def make_read_only(target: str, recursive: int = 0, devices: bool = False) -> None:
    """Makes the mount at `target` read-only, without set-user-id and, unless `devices`, without device files. Linux 5.12 or newer."""
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | (0 if devices else MS_NODEV), 0, 0, 0)
    here = ctypes.c_int(-100)  # AT_FDCWD
    result = libc.syscall(MOUNT_SETATTR, here, os.fsencode(target), ctypes.c_uint(recursive), attributes, ctypes.c_size_t(len(attributes)))
    _check(result, f"mount_setattr on {target}")


def pivot_into(root: str) -> None:
    """Makes the mount at `root` the root and takes the old one away."""
    os.chdir(root)
    _check(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount2 of the old root")
    os.chdir("/")


VERSION_3 = struct.pack("Ii", 0x20080522, 0)  # of capset's header, for this process
NONE = bytes(24)  # effective, permitted and inheritable capabilities, twice 32 of each


def drop_capabilities() -> None:
    """No capability is left to this process."""
    _check(libc.syscall(CAPSET, VERSION_3, NONE), "capset")


def drop_future_powers() -> None:
    """No capability by running a program, none for being root, and no way to get one back, for this process and all that it starts. Raises
    OSError where that fails; no_new_privs, which needs no rights, is on by then."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(HIGHEST_CAPABILITY + 1):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL and capability:  # the first number that this kernel does not have
                break
            raise
    with contextlib.suppress(OSError):  # not allowed without a user namespace of one's own; no_new_privs then stands alone
        prctl(PR_SET_SECUREBITS, NO_ROOT_POWERS)


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0 for none."""
    return max(0, libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


READ_FILE, READ_DIR, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
# Ordinary work in the own folder: read, write, list, remove and make files, folders and symbolic links, move, truncate.
OWN_FOLDER = WRITE_FILE | READ_FILE | READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12


def file_rules(version: int, readable: str, devices: str, own: str) -> int:
    """Landlock's rules as a descriptor: reading below `readable`, writing to files below `devices`, everything ordinary below `own`; no TCP, and
    from version 6 on no signal or abstract socket out of the domain."""
    handled = (1 << 13) - 1
    handled |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    own_rights = OWN_FOLDER | (handled & (1 << 13 | 1 << 14))  # moving between folders, truncating
    attributes = struct.pack("Q", handled)
    attributes += struct.pack("Q", 0b11) if version >= 4 else b""  # binding and connecting TCP
    attributes += struct.pack("Q", 0b11) if version >= 6 else b""  # abstract Unix sockets, signals
    result = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    ruleset = _check(result, "landlock_create_ruleset")
    for path, rights in ((readable, READ_FILE | READ_DIR), (devices, READ_FILE | WRITE_FILE), (own, own_rights)):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, descriptor)
        result = libc.syscall(LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
        _check(result, f"landlock_add_rule for {path}")
        os.close(descriptor)
    return ruleset


def restrict_files(rules: int) -> None:
    """Holds this process and all that it starts to `file_rules`, for good; no_new_privs must be on."""
    _check(libc.syscall(LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)), "landlock_restrict_self")
