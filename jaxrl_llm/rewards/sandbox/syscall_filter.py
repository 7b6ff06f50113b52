"""The seccomp filter of the sandbox: which system calls a check's process is refused.

A classic BPF program (linux/filter.h, linux/seccomp.h): refused calls fail with EPERM, calls of a later kernel than the table with ENOSYS,
so that libraries fall back to older ones; a call in another architecture's numbering ends the process. Numbers: the kernel's
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CLONE_THREAD = 0x10000
CLONE_REFUSED = 0x7E028000  # every CLONE_NEW... flag, and CLONE_PARENT
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2

# Calls to open a way out, to run a program, to watch or change another process, to leave something behind in the kernel, to set clocks.
X86_64 = {
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "move_mount": 429, "open_tree": 428,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "quotactl": 179, "quotactl_fd": 443, "swapon": 167,
    "swapoff": 168, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "process_mrelease": 448,
    "kcmp": 312, "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "execve": 59, "execveat": 322, "socket": 41,
    "socketpair": 53, "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "shmat": 30, "shmctl": 31, "shmdt": 67, "semget": 64,
    "semop": 65, "semtimedop": 220, "semctl": 66, "msgget": 68, "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241,
    "add_key": 248, "request_key": 249, "keyctl": 250, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "bpf": 321,
    "perf_event_open": 298, "userfaultfd": 323, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "kexec_file_load": 320, "reboot": 169, "acct": 163, "syslog": 103, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159,
    "clock_adjtime": 305, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "modify_ldt": 154, "personality": 135,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "lookup_dcookie": 212, "inotify_init": 253, "inotify_init1": 294,
    "fanotify_init": 300, "mknod": 133, "mknodat": 259, "vhangup": 153, "migrate_pages": 256, "move_pages": 279, "mbind": 237,
    "set_mempolicy": 238, "nfsservctl": 180, "uselib": 134,
}  # fmt: skip
AARCH64 = {
    "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "move_mount": 429, "open_tree": 428,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "quotactl": 60, "quotactl_fd": 443, "swapon": 224,
    "swapoff": 225, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "process_madvise": 440, "process_mrelease": 448,
    "kcmp": 272, "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "execve": 221, "execveat": 281, "socket": 198,
    "socketpair": 199, "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "shmat": 196, "shmctl": 195, "shmdt": 197, "semget": 190,
    "semop": 193, "semtimedop": 192, "semctl": 191, "msgget": 186, "msgsnd": 189, "msgrcv": 188, "msgctl": 187, "mq_open": 180,
    "mq_unlink": 181, "add_key": 217, "request_key": 218, "keyctl": 219, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "init_module": 105, "finit_module": 273,
    "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294, "reboot": 142, "acct": 89, "syslog": 116, "settimeofday": 170,
    "clock_settime": 112, "adjtimex": 171, "clock_adjtime": 266, "sethostname": 161, "setdomainname": 162, "personality": 92,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "lookup_dcookie": 18, "inotify_init1": 26, "fanotify_init": 262, "mknodat": 33,
    "vhangup": 58, "migrate_pages": 238, "move_pages": 239, "mbind": 235, "set_mempolicy": 237, "nfsservctl": 42,
}  # fmt: skip
CLONE3, LAST_KNOWN = 435, 450  # the same numbers everywhere; all calls above are refused as unknown
X32 = 0x40000000  # from here on: x86's x32 numbering

# machine -> (audit number of the architecture, refused calls, clone, calls that make a process and nothing else)
MACHINES = {
    "x86_64": (0xC000003E, X86_64, 56, (57, 58)),
    "aarch64": (0xC00000B7, AARCH64, 220, ()),
}


def supported() -> bool:
    """Whether the filter is written for this machine."""
    return platform.machine() in MACHINES and struct.calcsize("P") == 8


def build(allow_fork: bool) -> bytes:
    """The BPF program for this machine, 8 bytes an instruction. allow_fork: whether new processes may be made; threads may always.

    A binary search over the numbers: the kernel runs it once for every call that there is when it is installed, and then for each call made.
    """
    arch, refused, clone, forks = MACHINES[platform.machine()]
    no, unknown = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    leave = [step(RETURN, ALLOW)] if allow_fork else [step(ANY_BIT, CLONE_THREAD, 1, 0), step(RETURN, no), step(RETURN, ALLOW)]
    flags = [step(LOAD, 16), step(ANY_BIT, CLONE_REFUSED, 0, 1), step(RETURN, no), *leave]  # clone's are the low half of its first argument
    actions = {number: [step(RETURN, ALLOW)] for number in range(LAST_KNOWN + 1)}
    actions |= {number: [step(RETURN, no)] for number in (*refused.values(), *(() if allow_fork else forks))}
    actions |= {CLONE3: [step(RETURN, unknown)]}  # its flags are in memory, where a filter cannot look; libraries then use clone
    actions |= {clone: flags, LAST_KNOWN + 1: [step(RETURN, unknown)], X32: [step(RETURN, KILL)]}
    starts = [number for number in sorted(actions) if actions[number] != actions.get(number - 1)]

    def search(low: int, high: int) -> list[bytes]:
        """What decides numbers from the start `low` to before the start `high`."""
        if high - low == 1:
            return actions[starts[low]]
        middle = (low + high) // 2
        below = search(low, middle)
        return [step(AT_LEAST, starts[middle], len(below), 0), *below, *search(middle, high)]

    machine = [step(LOAD, 4), step(EQUAL, arch, 1, 0), step(RETURN, KILL)]  # seccomp_data.arch
    return b"".join([*machine, step(LOAD, 0), *search(0, len(starts))])  # seccomp_data.nr


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(program: bytes, libc: ctypes.CDLL) -> None:
    """Puts the filter on this process and all that it starts, for good; no_new_privs must be on. Raises OSError where refused."""
    block = _Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(block), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
