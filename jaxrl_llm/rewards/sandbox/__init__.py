"""The sandbox: where Python that came with a data set, or that a model wrote, is run.

pool.py            Sandbox: many checks in parallel, each in a fresh process; Job in, Outcome or Verdict out
room.py            the parent's end of one room: starting it, asking it, ending it
layers.py          what this host allows, layer by layer, and the refusal where one is missing
worker.py          the room itself, a program of its own: the keeper, and for each check the confined process
jail.py            a room's namespaces and view, and how a check's process gives up its powers
kernel.py          the system calls behind it; syscall_filter.py the seccomp filter
runner.py          inside: runs the code and sends its result; plain.py says which checks may share a process

What holds the code, from the outside in:

1. A room is a process tree in user, mount, pid, network, ipc and host-name namespaces of its own. Its view of the files is Python's
   library and the system's shared libraries, read-only, without the host's home, /etc, /proc, /sys or any program; its network has no
   interface, not even loopback. Started by root, it runs under a user number that owns nothing.
2. A check is a fork of the room's keeper, a Python that has imported what checks use and has done nothing else: it never reads a
   request, and what a check sends and prints passes through memory that no child inherits, so no check finds another's data in its own.
   The fork is process 1 of a pid namespace of the check's own: when it ends, or is killed, the kernel ends all that it started. Its /tmp
   is an empty file system of bounded size, mounted for it and taken away after it.
3. The confined process gives up every capability and may gain none, has limits on memory, CPU time, file size, open files and
   processes, a Landlock domain where the kernel has it, and a filter that refuses system calls for network, programs, namespaces, mounts,
   tracing, shared memory, keys and clocks.
4. The keeper holds the clock, caps what is printed and returned, and kills.

Checks of one group, such as the rules of one response, share a confined process where each is so plain that it cannot reach another (plain.py).
Which are is decided in that process, before any of them runs. What ends such a process early is held against none: each then gets its own.

The result comes back over a pipe that only this check's process can write, framed by a number that the keeper drew. Printing forges
nothing. Code that runs in one interpreter with the function that is called can find that number, and then say whatever it likes in the name of
that one function, which its own return value could have said too; it has no way to another check's result. A checker that runs text
written by a model (exec) gives it its own voice: run the model's text as a check of its own and judge what it returned in another.
"""
