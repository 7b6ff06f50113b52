"""What this host allows of the sandbox's layers, and the refusal where one that isolates is missing."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.sandbox import room

FULL, WEAK = "full", "weak-i-accept-the-risk"
ISOLATIONS = (FULL, WEAK)
NEEDED = ("user namespace", "mount namespace", "pid namespace", "network namespace", "ipc namespace", "no new privileges", "seccomp")
EXTRA = ("landlock",)  # a second lock on doors that the view does not have
NAMESPACES = (
    "let users make user namespaces and mount in them (sysctl user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; "
    "in a container, a seccomp profile that allows unshare and mount), on Linux 5.12 or newer"
)
ADVICE = {"seccomp": "run on x86_64 or aarch64 with a kernel that has CONFIG_SECCOMP_FILTER", "no new privileges": "run on Linux 5.12 or newer"}


@functools.cache
def probe() -> dict[str, str]:
    """Layer -> "" where this host allows it, else why not; tried in processes that end at once."""
    names: list[str] = [*NEEDED, *EXTRA]
    if sys.platform != "linux":
        return dict.fromkeys(names, f"{sys.platform} has none, Linux does")
    options = {"capture_output": True, "timeout": room.START_SECONDS, "env": room.environment(), "cwd": "/"}
    done = subprocess.run(room.command("probe"), **options)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = dict.fromkeys(names, f"the probe fails: {(done.stderr.decode(errors='replace').strip().splitlines() or ['no reason'])[-1]}")
    return found


def missing() -> dict[str, str]:
    """The layers that isolate and are not to be had here -> why not."""
    found = probe()
    return {name: found.get(name, "not probed") for name in NEEDED if found.get(name, "not probed")}


def refusal(why: dict[str, str]) -> UserError:
    """What is told instead of running untrusted code with less around it than was asked for."""
    what = "; ".join(f"{name}: {reason}" for name, reason in why.items())
    advice = ADVICE.get(next(iter(why)), NAMESPACES)
    return UserError(
        f"the sandbox cannot isolate code on this host ({what}): {advice}; "
        f"or, for code that you trust with your files, isolation={WEAK!r}, which keeps time, memory and process limits only"
    )
