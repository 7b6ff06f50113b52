"""The seccomp program, run by a small interpreter of classic BPF: what it says of each call, on both machines that it is written for."""

import errno
import platform
import struct

import pytest

from jaxrl_llm.rewards.sandbox import kernel, layers, syscall_filter

REFUSE, UNKNOWN = syscall_filter.ERRNO | errno.EPERM, syscall_filter.ERRNO | errno.ENOSYS
THREAD_FLAGS = 0x3D0F00  # what pthread_create passes
# Calls that Python lives on: (x86_64, aarch64)
ORDINARY = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "mmap": (9, 222), "brk": (12, 214), "rt_sigaction": (13, 134), "openat": (257, 56),
    "futex": (202, 98), "getrandom": (318, 278), "exit_group": (231, 94), "kill": (62, 129), "wait4": (61, 260), "pipe2": (293, 59),
}  # fmt: skip


def decide(program, arch, number, argument=0):
    """The action for a call; `seccomp_data` is nr, arch, instruction pointer, six arguments."""
    data = struct.pack("=iIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("HBBI", program))
    at = value = 0
    while True:
        code, if_true, if_false, k = instructions[at]
        at += 1
        if code == syscall_filter.RETURN:
            return k
        if code == syscall_filter.LOAD:
            value = struct.unpack_from("=I", data, k)[0]
            continue
        holds = {
            syscall_filter.EQUAL: value == k,
            syscall_filter.AT_LEAST: value >= k,
            syscall_filter.ANY_BIT: bool(value & k),
        }[code]
        at += if_true if holds else if_false


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: request.param)
    return request.param


@pytest.mark.parametrize("allow_fork", [False, True])
def test_the_program_refuses_what_the_table_names_and_nothing_else(machine, allow_fork):
    arch, refused, clone, forks = syscall_filter.MACHINES[machine]
    program = syscall_filter.build(allow_fork)
    assert len(program) // 8 < 4096  # the kernel's limit
    for number in range(syscall_filter.LAST_KNOWN + 1):
        if number == clone:
            continue
        expected = REFUSE if number in refused.values() or (number in forks and not allow_fork) else syscall_filter.ALLOW
        assert decide(program, arch, number) == (UNKNOWN if number == syscall_filter.CLONE3 else expected), number
    assert decide(program, arch, clone, THREAD_FLAGS) == syscall_filter.ALLOW
    assert decide(program, arch, clone, 17) == (syscall_filter.ALLOW if allow_fork else REFUSE)


def test_new_namespaces_are_refused_whatever_else_is_asked_for(machine):
    arch, _, clone, _ = syscall_filter.MACHINES[machine]
    flags = [kernel.CLONE_NEWNS, kernel.CLONE_NEWUTS, kernel.CLONE_NEWIPC, kernel.CLONE_NEWUSER, kernel.CLONE_NEWPID, kernel.CLONE_NEWNET, 0x02000000]
    for flag in [*flags, 0x8000]:
        for other in (0, 17, THREAD_FLAGS, 1 << 40):
            assert decide(syscall_filter.build(True), arch, clone, flag | other) == REFUSE


def test_another_numbering_ends_the_process_and_later_calls_are_unknown(machine):
    arch, refused, _, _ = syscall_filter.MACHINES[machine]
    program = syscall_filter.build(True)
    for other in (0x40000003, 0x40000028, 0xC00000F3):  # i386, arm, riscv64
        assert decide(program, other, 0) == syscall_filter.KILL
    assert decide(program, arch, 0x40000000 | refused["socket"]) == decide(program, arch, -1) == syscall_filter.KILL
    assert {decide(program, arch, number) for number in (451, 452, 462, 1000)} == {UNKNOWN}


def test_what_python_lives_on_is_allowed(machine):
    arch = syscall_filter.MACHINES[machine][0]
    column = ["x86_64", "aarch64"].index(machine)
    for name, numbers in ORDINARY.items():
        assert decide(syscall_filter.build(False), arch, numbers[column]) == syscall_filter.ALLOW, name


def test_both_tables_refuse_the_same_calls():
    only_x86 = {"iopl", "ioperm", "modify_ldt", "inotify_init", "mknod", "uselib"}  # calls that the other does not have
    assert set(syscall_filter.X86_64) - set(syscall_filter.AARCH64) == only_x86 and set(syscall_filter.AARCH64) <= set(syscall_filter.X86_64)
    assert all(len(set(table.values())) == len(table) for table in (syscall_filter.X86_64, syscall_filter.AARCH64))


def test_other_machines_have_no_filter(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not syscall_filter.supported()


@pytest.mark.skipif(bool(layers.missing()), reason="this host has no user namespaces that could be switched off")
def test_a_host_that_lets_nobody_make_namespaces_is_refused(run_python):
    """For real: in a user namespace of the test's own, in which the number of further ones is set to 0."""
    code = (
        "import os\n"
        "from jaxrl_llm.rewards.sandbox import kernel\n"  # and not yet what starts threads, with which a process may not do this
        "user, outside = os.geteuid(), os.readlink('/proc/self/ns/user')\n"
        "kernel.unshare(kernel.CLONE_NEWUSER)\n"
        "assert os.readlink('/proc/self/ns/user') != outside\n"
        "open('/proc/self/uid_map', 'w').write(f'0 {user} 1')\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "from jaxrl_llm.errors import UserError\n"
        "from jaxrl_llm.rewards.sandbox import layers\n"
        "from jaxrl_llm.rewards.sandbox.pool import Job, Sandbox\n"
        "try:\n"
        "    Sandbox()\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "with Sandbox(isolation=layers.WEAK) as sandbox:\n"
        "    print(sandbox.run([Job('def f(): return 7', 'f')])[0].value)\n"
    )
    refusal, weak = run_python(code).strip().splitlines()
    assert "cannot isolate code on this host (user namespace: unshare: " in refusal and "max_user_namespaces" in refusal and weak == "7"
